"""Kernel gradient flow of a kernel in memory, and its derivative by the kernel.

With A = k(X, X) / N = V diag(l) V^T, phi_t(l) = (1 - exp(-t l)) / l and f_t(x) = k(x, X) phi_t(A)
Y / N, a change dk of the kernel changes f_t(x), to first order, by

    dk(x, X) phi_t(A) Y / N + k(x, X) V (phi_t[l_i, l_j] * (V^T dk(X, X) V)_ij) V^T Y / N^2

where phi_t[., .] is the divided difference (Daletskii & Krein 1965). For large matrices, and times
without a matrix in memory, see `dnntk.KernelFlow`.
"""

import math

import numpy as np

from dnntk.errors import InputError
from dnntk.infinite_depth.spectral_filter import SpectralFilter

__all__ = ["MatrixFlow"]


class MatrixFlow:
    """Kernel gradient flow from 0 in the eigenvectors of A = K / N, of a kernel in memory."""

    def __init__(self, kernel: np.ndarray, y: np.ndarray) -> None:
        """``kernel`` [N + n, N] of all inputs by the training ones, these first; y [N, d_out]."""
        count = len(y)
        self.values, self.vectors = np.linalg.eigh(kernel[:count] / count)
        self.values = np.maximum(self.values, 0)
        self.cross = kernel[count:] @ self.vectors / count
        self.y = self.vectors.T @ y

    def predict(self, time: float) -> np.ndarray:
        """f_t at the other inputs: [n, d_out]."""
        return self.cross @ self._filtered(time)

    def filters(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """phi_t(l) Y [N, d_out] in the eigenvectors, and phi_t[l_i, l_j] [N, N]."""
        return self._filtered(time), _divided(self.values, time)

    def change(self, kernel: np.ndarray, filters: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The change of f_t if ``kernel`` [N + n, N] is added to the kernel: [n, d_out]."""
        filtered, divided = filters
        count = len(self.y)
        inner = divided * (self.vectors.T @ kernel[:count] @ self.vectors)
        return (kernel[count:] @ self.vectors @ filtered + self.cross @ (inner @ self.y)) / count

    def changes(self, g: np.ndarray, filters: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """`change` by the kernel g(x).g(x') of each of some units: [units, n, d_out].

        ``g`` [N + n, units, shifts] holds training inputs first.
        """
        filtered, divided = filters
        count, (units, shifts) = len(self.y), g.shape[1:]
        h = (self.vectors.T @ g[:count].reshape(count, -1)).reshape(count, units, shifts)
        direct = np.einsum("iuk,io->uko", h, filtered)
        found = np.einsum("xuk,uko->uxo", g[count:], direct, optimize=True)
        for output, y in enumerate(self.y.T):
            inner = divided @ (h * y[:, None, None]).reshape(count, -1)
            by_mode = np.einsum("iuk,iuk->iu", h, inner.reshape(h.shape))
            found[:, :, output] += (self.cross @ by_mode).T
        return found / count

    def _filtered(self, time: float) -> np.ndarray:
        rounding = len(self.values) * np.finfo(float).eps * self.values[-1]
        if math.isinf(time) and self.values[0] <= rounding:
            raise InputError(
                "time: expected a finite one, since the kernel of these training inputs is "
                "singular in float64, got inf; drop duplicate inputs, or give a finite time"
            )
        return SpectralFilter(time)(self.values)[:, None] * self.y


def _divided(values: np.ndarray, time: float) -> np.ndarray:
    """(phi_t(l_i) - phi_t(l_j)) / (l_i - l_j), exact to rounding for (nearly) equal l too.

    With l <= m it is (e - phi_t(l)) / m, where e = (exp(-t l) - exp(-t m)) / (m - l); for small t m
    the two terms cancel, and the power series is summed instead.
    """
    if math.isinf(time):
        return -1 / np.multiply.outer(values, values)
    low, high = (f.outer(values, values) * time for f in (np.minimum, np.maximum))
    e = np.exp(-low) * SpectralFilter(1.0)(high - low)
    small = high < 0.1
    series, powers, homogeneous = np.zeros_like(low), np.ones_like(low), np.ones_like(low)
    for k in range(2, 13):
        series -= (-1) ** k / math.factorial(k) * homogeneous
        powers = np.where(small, powers * high, 0)
        homogeneous = np.where(small, low * homogeneous + powers, 0)
    far = (e - SpectralFilter(1.0)(low)) / np.where(small, 1, high)
    return time**2 * np.where(small, series, far)
