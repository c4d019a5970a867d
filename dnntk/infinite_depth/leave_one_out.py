"""What gradient flow predicts of each training example from all others, by one factorization.

With A = K / n and the residual targets R = y - f_0, the coefficients of the flow on all examples
follow dc/dt = R / n - (A + r) c. Without example i they are those of the full system under a force
u_i(t) on example i that keeps c_i at 0, and the i-th equation then says that u_i is the error of
the prediction there, f_i - y_i. In Laplace's domain c_i = 0 reads

    U_i(p) = -[(p + A + r)^-1 R]_i / (p [(p + A + r)^-1]_ii)

whose singular points lie on the negative real axis. At t = infinity it is the known closed form
u_i = -[(A + r)^-1 R]_i / [(A + r)^-1]_ii (Allen 1974, PRESS). Before, the inverse transform is a
sum over 24 points, half of them conjugates, of Talbot's contour with the constants of Trefethen,
Weideman & Schmelzer (2006): to within 4^-24, whatever the eigenvalues and the time. Each point
needs the diagonal of a resolvent and its product with the targets: products of the eigenvectors,
and of their squares, with a few columns.

The other n - 1 examples have the mean over n - 1: their flow at time t with ridge r is this one at
time t n / (n - 1) with ridge r (n - 1) / n. With a matrix-valued kernel, an example is a block of
k rows, and the quotient is a linear system of k unknowns.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.infinite_depth.solvers import Eigendecomposition, Solver

__all__ = ["check_solver", "leave_one_out_errors"]

POINTS = 24  # of the contour
LONGEST = 1e250  # a longer time is as good as this one, and would overflow

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]


def check_solver(solver: Solver, n: int) -> Eigendecomposition:
    """The solver of n examples, if one of them can be left out with it.

    Raises:
        InputError: there is only one example, or not all eigenvectors are known.
    """
    if n < 2:
        raise InputError("x_train: expected at least 2 examples to leave one out, got 1")
    if not isinstance(solver, Eigendecomposition):
        raise InputError(
            "solver: expected eigh, as leaving one out needs all eigenvectors, got krylov for "
            f'{n:,} examples; give solver="eigh", or fewer examples'
        )
    return solver


def leave_one_out_errors(
    solver: Eigendecomposition, n: int, times: Sequence[float], ridge: float, size: int = 1
) -> Array:
    """f_i - y_i at each time t >= 0 of the flow trained without example i.

    Args:
        solver: all eigenvectors of K / n, [n size, n size].
        n: examples, at least 2.
        times: of the flow on n - 1 examples; infinite only if A + r is regular.
        ridge: r of the flow on n - 1 examples.
        size: rows of K that an example has: the outputs of a matrix-valued kernel.

    Returns:
        [times, n, d_out].
    """
    return np.stack([_errors(solver, n, t, ridge, size) for t in times])


def _errors(solver: Eigendecomposition, n: int, time: float, ridge: float, size: int) -> Array:
    points, weights = _contour(time)
    scale = 1.0 if math.isinf(time) else min(time * n / (n - 1), LONGEST)
    shift = points + scale * ridge * (n - 1) / n

    def resolvent(values: Array) -> Complex:
        return 1 / (scale * values[:, None] + shift)

    components = resolvent(solver.values)[:, :, None] * solver.targets[:, None]
    applied = solver.from_eigenbasis(_as_real(components)).view(np.complex128)
    applied = applied.reshape(n, size, len(points), -1).transpose(0, 2, 1, 3)
    diagonal = solver.diagonal_blocks(lambda values: _as_real(resolvent(values)), size)
    blocks = diagonal.view(np.complex128).transpose(0, 3, 1, 2)  # [n, points, size, size]
    quotients = np.linalg.solve(blocks, applied)
    return np.einsum("p,npbc->nbc", weights, quotients).real.reshape(n, -1)


def _contour(time: float) -> tuple[Complex, Complex]:
    """Points z and weights w: the error is the real part of sum w X(z), U(z / t) = -t X(z) / z."""
    if math.isinf(time):  # the limit of p U(p) at p = 0
        return np.zeros(1, complex), -np.ones(1, complex)
    angle = np.pi * np.arange(1, POINTS, 2) / POINTS
    sine, tangent = np.sin(0.6407 * angle), np.tan(0.6407 * angle)
    z = POINTS * (0.5017 * angle / tangent - 0.6122 + 0.2645j * angle)
    slope = POINTS * (0.5017 / tangent - 0.5017 * 0.6407 * angle / sine**2 + 0.2645j)
    return z, 2j / POINTS * np.exp(z) * slope / z


def _as_real(values: Complex) -> Array:
    """[d, ...] complex -> [d, columns] with real and imaginary parts beside each other."""
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.float64)
