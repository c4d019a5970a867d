"""What training learns of each eigenvector of the kernel, as a function of its eigenvalue.

`SpectralFilter` is gradient flow's function, `DescentFilter` that of gradient descent in steps,
with heavy-ball momentum or without. The state at time t is phi(A) B, for the matrix A = K / N.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dnntk.checks import number_within
from dnntk.errors import InputError

__all__ = ["DescentFilter", "SpectralFilter", "filters_at", "largest_stable_step"]

Array = NDArray[np.float64]
WHOLE = 1e-9  # relative: a number of steps this near to a whole one is whole


@dataclasses.dataclass(frozen=True)
class SpectralFilter:
    """phi(s) = (1 - exp(-t (s + r))) / (s + r): the flow's solution at time t is phi(A) B.

    Attributes:
        time: t, may be infinite.
        ridge: r, added to every eigenvalue.
    """

    time: float
    ridge: float = 0.0

    def __call__(self, s: Array) -> Array:
        """phi(s), and t where s + r is 0."""
        s = s + self.ridge
        positive = s > np.finfo(np.float64).tiny
        safe = np.where(positive, s, 1.0)
        return np.where(positive, -np.expm1(-self.time * safe) / safe, self.time)


@dataclasses.dataclass(frozen=True)
class DescentFilter(SpectralFilter):
    """phi of n steps x <- x - eta v, v <- mu v + (s + r) x - 1 from x = v = 0.

    So optax.sgd(eta, momentum=mu) descends. Without momentum phi(s) = (1 - (1 - eta (s + r))^n) /
    (s + r). A step counts eta / (1 - mu) of kernel time; at t = infinity phi is the flow's.

    Attributes:
        time_step: eta.
        momentum: mu, at least 0 and below 1.

    Raises:
        InputError: the time is no whole number of steps.
    """

    time_step: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a time that is no whole number of steps."""
        each, count = self.time_step / (1 - self.momentum), self._count
        if math.isfinite(count) and abs(count - round(count)) > WHOLE * max(count, 1.0):
            raise InputError(
                f"time: expected a whole number of steps of time_step / (1 - momentum) = {each:g}, "
                f"got {self.time:g}, {count:.9g} of them; the nearest are {int(count) * each:.12g} "
                f"and {(int(count) + 1) * each:.12g}"
            )

    @property
    def steps(self) -> float:
        """n, a whole number or infinite."""
        return round(self._count) if math.isfinite(self._count) else math.inf

    @property
    def _count(self) -> float:
        return self.time * (1 - self.momentum) / self.time_step

    def __call__(self, s: Array) -> Array:
        """phi(s); where descent grows beyond float64, not finite.

        A step is an affine map of (x / eta, -v), with matrix M by which n steps add up S_n =
        I + M + ... + M^(n-1). S_2n = S_n (2 I - (I - M) S_n), so n takes log2(n) products, whose
        errors do not depend on how near M's eigenvalues are to each other or to 1.
        """
        if math.isinf(self.steps):
            return super().__call__(s)
        a, mu = self.time_step * (np.asarray(s) + self.ridge), self.momentum
        rest = np.array([[a, np.full_like(a, -mu)], [a, np.full_like(a, 1 - mu)]])  # I - M
        one = np.eye(2)[:, :, None]
        total = np.zeros_like(rest)
        with np.errstate(over="ignore", invalid="ignore"):
            for bit in f"{int(self.steps):b}":
                total = _product(total, 2 * one - _product(rest, total))
                if bit == "1":
                    total = one + total - _product(rest, total)
            return self.time_step * (total[0, 0] + total[0, 1])


def _product(x: Array, y: Array) -> Array:
    return np.einsum("ij...,jk...->ik...", x, y)


def filters_at(
    times: Sequence[float], ridge: float, time_step: float | None = None, momentum: float = 0.0
) -> list[SpectralFilter]:
    """The filters at these times: of the flow, or of descent if there is a ``time_step``.

    Raises:
        InputError: the step, the momentum or a time, which must be whole steps, is out of range.
    """
    momentum = _momentum(momentum)
    if time_step is None:
        if momentum:
            raise InputError(
                f"momentum: expected 0 for gradient flow, got {momentum:g}; give a time_step too"
            )
        return [SpectralFilter(t, ridge) for t in times]
    step = number_within(
        "time_step", time_step, lambda s: 0 < s < math.inf, "a finite number above 0"
    )
    return [DescentFilter(t, ridge, step, momentum) for t in times]


def largest_stable_step(largest: float, momentum: float = 0.0) -> float:
    """2 (1 + mu) / s: the step above which descent grows at the eigenvalue s (Polyak, 1964)."""
    return 2 * (1 + _momentum(momentum)) / largest if largest > 0 else math.inf


def _momentum(momentum: float) -> float:
    """The momentum as a float, refused unless it is at least 0 and below 1."""
    expected = "a number at least 0 and below 1"
    return number_within("momentum", momentum, lambda m: 0 <= m < 1, expected)
