"""What gradient flow learns of each eigenvector of the kernel, as a function of its eigenvalue."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

__all__ = ["SpectralFilter"]


@dataclasses.dataclass(frozen=True)
class SpectralFilter:
    """phi(s) = (1 - exp(-t (s + r))) / (s + r): the flow's solution at time t is phi(A) B.

    Attributes:
        time: t, may be infinite.
        ridge: r, added to every eigenvalue.
    """

    time: float
    ridge: float = 0.0

    def __call__(self, s: NDArray[np.float64]) -> NDArray[np.float64]:
        """phi(s), and t where s + r is 0."""
        s = s + self.ridge
        positive = s > np.finfo(np.float64).tiny
        safe = np.where(positive, s, 1.0)
        return np.where(positive, -np.expm1(-self.time * safe) / safe, self.time)
