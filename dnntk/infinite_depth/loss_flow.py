"""Kernel gradient flow on other losses than squared error, by a stiff solver of SciPy's.

With A = K / N = V diag(s) V^T and g = dloss/df(f(X)), row by row, Theorem 3.2's flow is

    f(X) = f_0 + A c,    c' = -g - ridge c,    f_t(x) = f_0(x) + k(x, X) c(t) / N.

In b = diag(s)^(1/2) V^T c, whose norm is that of f - f_0 in the kernel's space (times sqrt(N)), it
is the gradient flow b' = -dF/db of the convex function

    F(b) = sum_i loss(f_i, y_i) + ridge / 2 ||b||^2,    f(X) = f_0 + V diag(s)^(1/2) b,

so that errors never grow, and an error of b bounds that of f_t(x) at every x. The solver is the BDF
method of variable order (Byrne & Hindmarsh 1975; Shampine & Reichelt 1997), its linear systems are
positive definite, and conjugate gradients solve them with the leading eigenvectors as
preconditioner: no matrix of all n k unknowns is formed.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.infinite_depth.pointwise_loss import Pointwise
from dnntk.infinite_depth.solution import Solution
from dnntk.infinite_depth.solvers import Eigendecomposition
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runtime.progress import progress_bar
from dnntk.runtime.threads import one_blas_thread

__all__ = ["LossFlow"]

log = logging.getLogger("dnntk")

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
# Local error over the tolerance of the whole flow, which takes about a thousand steps.
LOCAL = 1e-3
LEAST_LOCAL = 1e-13  # beyond which rounding decides
# Errors are relative to b at the first time that is asked for, or at this many 1 / largest rate
# if that is earlier; before LINEAR of 1 / largest eigenvalue b is proportional to time.
SHORT = 1e-3
LINEAR = 1e-14
LEADING = 400  # unknowns at most whose part of the Jacobian is diagonalized
LINEAR_TOLERANCE = 1e-2  # of a linear system in Newton's method
LINEAR_ITERATIONS = 100
MAX_STEPS = 10_000  # ten times what a smooth loss needs
ENDED = 40.0  # a flow with a ridge has ended, to exp(-40), after this many 1 / ridge


class LossFlow:
    """The flow on one loss, as a function of time, in the eigenvectors of A.

    Times in ascending order cost one integration; an earlier one begins another. Memory is an n x n
    matrix and n k^2 numbers; an evaluation takes two products of n x n and n x k.

    Attributes:
        pointwise: the loss on the training examples.
        evaluations: of the derivative so far.
    """

    def __init__(
        self,
        pointwise: Pointwise,
        start: Array,
        solver: Eigendecomposition,
        *,
        ridge: float,
        tolerance: float,
        progress: bool,
    ) -> None:
        """Take the eigenvectors of A from ``solver``.

        Args:
            pointwise: the loss.
            start: f_0 [n, k].
            solver: of A [m, m], with m = n for a scalar kernel, and n k for a matrix-valued one.
            ridge: weight decay, in units of the eigenvalues.
            tolerance: relative error of b.
            progress: show a bar after five seconds.
        """
        self.pointwise, self.evaluations = pointwise, 0
        self._solver, self._start, self._progress = solver, start, progress
        self._own = solver.values > 0
        vectors = solver.from_eigenbasis(np.eye(len(solver.values))[:, self._own])
        roots = np.sqrt(solver.values[self._own])[:, None]
        self._problem = _Problem(pointwise, start, roots, vectors, ridge)
        self._tolerance = tolerance
        self._bdf: _BDF | None = None
        self._found: dict[float, tuple[Array, float]] = {}

    def components(self, times: Sequence[float]) -> list[Array]:
        """V^T c [d, c] at each time.

        Raises:
            InputError: the loss is not finite, not convex where a step starts, or so far from
                smooth that the solver cannot go on; or a time is infinite, and the flow has no
                known end.
        """
        missing = sorted(set(times) - set(self._found))
        bar = progress_bar(
            desc="flow", unit="step", delay=PROGRESS_DELAY, disable=not self._progress
        )
        with bar, one_blas_thread():  # see `dnntk.runtime.threads`
            for time in missing:
                self._found[time] = self._at(time, bar)
        return [self._found[time][0] for time in times]

    def solution(self, time: float) -> Solution:
        """The flow at one time; errors as `components`."""
        (c,) = self.components([time])
        norm, n = float(np.linalg.norm(self._solver.apply_matrix(c))) or 1.0, len(self._start)
        rounding = EPS * float(self._solver.values[-1]) * float(np.linalg.norm(c)) / norm
        error = max(self._found[time][1], rounding)
        found = Solution(
            time=time,
            coefficients=self._solver.from_eigenbasis(c).reshape(n, -1) / n,
            converged=error <= self._tolerance,
            residual=error,
            iterations=self.evaluations,
            condition=math.nan,
            solver="BDF",
        )
        if not found.converged:
            log.warning(
                "loss: error of at most %.2g at t = %g, tolerance %.2g, %d evaluations; give a "
                "larger tolerance%s",
                *(error, time, self._tolerance, self.evaluations),
                ", add a ridge, or take a shorter time" if error == rounding else "",
            )
        return found

    def _at(self, time: float, bar: Any) -> tuple[Array, float]:
        problem, c = self._problem, np.zeros((len(self._own), self._problem.shape[1]))
        if time == 0 or not self._own.any():  # the kernel is 0 on these examples
            return c, 0.0
        if problem.ridge:
            time = min(time, ENDED / problem.ridge)
        if math.isinf(time):
            end = self.pointwise.end(self._start) if problem.is_scalar else None
            if end is None:
                raise InputError(
                    "time: expected a finite one, or a ridge, or (of one scalar kernel) smoothed "
                    "targets of loss=cross_entropy, got inf; this flow has no known end"
                )
            c[self._own] = problem.pulled(end - self._start) / problem.roots**3
            return c, 0.0
        later = max(time, LINEAR / problem.largest)
        if self._bdf is None or later < self._bdf.earliest:
            self._bdf = _BDF(problem, max(self._tolerance * LOCAL, LEAST_LOCAL), later)
        before = self._bdf.nfev
        b, error = self._bdf.at(later, bar)
        self.evaluations += self._bdf.nfev - before
        c[self._own] = b.reshape(problem.shape) / problem.roots * (time / later)
        return c, error / (float(np.linalg.norm(b)) or 1.0)


class _Problem:
    """F(b) and its derivatives; ``roots`` [d, 1] are those of the eigenvalues."""

    def __init__(
        self, pointwise: Pointwise, start: Array, roots: Array, vectors: Array, ridge: float
    ) -> None:
        self.pointwise, self.start, self.ridge = pointwise, start, ridge
        self.roots, self.vectors = roots, vectors
        self.shape = len(roots), start.size // len(vectors)
        self.is_scalar = len(vectors) == len(start)  # the kernel, which serves all outputs alike
        self.largest = float(roots[-1, 0] ** 2) + ridge if len(roots) else ridge

    def pushed(self, b: Array) -> Array:
        """V diag(s)^(1/2) b, as outputs [n, k]."""
        return (self.vectors @ (self.roots * b)).reshape(self.start.shape)

    def pulled(self, g: Array) -> Array:
        """diag(s)^(1/2) V^T g of g [n, k]: [d, c]."""
        return self.roots * (self.vectors.T @ g.reshape(len(self.vectors), -1))

    def outputs(self, b: Array) -> Array:
        """f(X) [n, k] at b [d c]."""
        return self.start + self.pushed(b.reshape(self.shape))

    def derivative(self, _: float, b: Array) -> Array:
        """db/dt [d c] at b [d c]."""
        g = self.pulled(self.pointwise.gradient(self.outputs(b)))
        return -(g + self.ridge * b.reshape(self.shape)).ravel()

    def jacobian(self, time: float, b: Array) -> "_Jacobian":
        """d(db/dt)/db at b [d c]."""
        f = self.outputs(b)
        self.pointwise.check_convex(f, time)
        return _Jacobian(self, self.pointwise.hessian(f))


class _Jacobian:
    """J = d(db/dt)/db at one b, negative semidefinite, by the loss's second derivatives [n, k, k].

    Of the leading eigenvectors of A, its part is diagonalized; of the others it is about diagonal.
    """

    __array_ufunc__ = None  # NumPy's numbers leave products with it to `__rmul__`

    def __init__(self, problem: _Problem, hessian: Array) -> None:
        self.problem, self.hessian = problem, hessian
        (d, c), (n, k) = problem.shape, problem.start.shape
        self.leading = max(1, min(d, LEADING // c))
        w = problem.vectors[:, d - self.leading :] * problem.roots[d - self.leading :, 0]
        if problem.is_scalar:
            block = np.empty((self.leading, k, self.leading, k))
            for i in range(k):
                for j in range(i + 1):
                    block[:, i, :, j] = w.T @ (hessian[:, i, j, None] * w)
                    block[:, j, :, i] = block[:, i, :, j].T
        else:
            block = w.T @ (hessian @ w.reshape(n, k, -1)).reshape(n * k, -1)
        size = self.leading * c
        self.values, self.vectors = scipy.linalg.eigh(block.reshape(size, size), driver="evd")
        mean = np.mean(np.diagonal(hessian, axis1=1, axis2=2), axis=0)
        self.rest = problem.roots[: d - self.leading] ** 2 * (
            mean if problem.is_scalar else mean.mean()
        )

    def __rmul__(self, factor: float) -> "_Shifted":
        """The matrix I - factor J; see `_BDF`."""
        return _Shifted(self, float(factor))

    def product(self, v: Array) -> Array:
        """-J v of v [d, c]."""
        p = self.problem
        return p.pulled((self.hessian @ p.pushed(v)[:, :, None])[:, :, 0]) + p.ridge * v


class _Shifted:
    """I - factor J, positive definite for a convex loss."""

    def __init__(self, jacobian: _Jacobian, factor: float) -> None:
        self.jacobian, self.factor, self.shape = jacobian, factor, jacobian.problem.shape

    def __rsub__(self, _: int) -> "_Shifted":
        return self

    def solve(self, right: Array) -> Array:
        """The solution [d c] of (I - factor J) x = right, by conjugate gradients."""
        x, r = np.zeros(right.size), right.copy()
        p = z = self._preconditioned(r)
        inner = first = r @ z
        for _ in range(LINEAR_ITERATIONS):
            if not inner > LINEAR_TOLERANCE**2 * first:  # it may be 0 from the start
                break
            image = self._product(p)
            step = inner / (p @ image)
            x += step * p
            r -= step * image
            z = self._preconditioned(r)
            inner, before = r @ z, inner
            p = z + inner / before * p
        return x

    def _product(self, v: Array) -> Array:
        return v + self.factor * self.jacobian.product(v.reshape(self.shape)).ravel()

    def _preconditioned(self, r: Array) -> Array:
        j, shift = self.jacobian, 1 + self.factor * self.jacobian.problem.ridge
        rest, leading = np.split(r.reshape(self.shape), [len(j.rest)])
        inside = (j.vectors.T @ leading.ravel()) / (shift + self.factor * j.values)
        rest = rest / (shift + self.factor * j.rest)
        return np.concatenate([rest.ravel(), j.vectors @ inside])


class _BDF(scipy.integrate.BDF):
    """SciPy's method, with linear systems of its own and an error relative to the norm of b.

    The base class forms ``I - c * J``, hands it to ``lu``, and what that returns to ``solve_lu``.
    SciPy promises none of these names; a test beside the plain method shows whether they hold.
    """

    def __init__(self, problem: _Problem, tolerance: float, time: float) -> None:
        """Start at 0; ``time`` > 0 is the first one that will be asked for."""
        b = np.zeros(math.prod(problem.shape))
        slope = problem.derivative(0.0, b)
        if not np.isfinite(slope).all():
            raise InputError("loss: expected finite derivatives at the initial outputs, got others")
        self._problem, self._tolerance = problem, tolerance
        jacobian = problem.jacobian(0.0, b)
        fastest = max(problem.largest, float(jacobian.values[-1]) + problem.ridge)
        self._shortest = min(SHORT / fastest, time)
        self._least = float(np.linalg.norm(slope)) * self._shortest
        super().__init__(
            *(problem.derivative, 0.0, b, math.inf),
            rtol=100 * EPS,  # the least that is allowed; `atol` decides
            atol=self._local_error(b) / math.sqrt(b.size),
            jac=scipy.sparse.csc_array((b.size, b.size)),
        )
        self.jac = problem.jacobian
        self.J, self.I = jacobian, 0
        self.lu, self.solve_lu = self._counted, lambda system, right: system.solve(right)
        self._error, self._steps, self._interpolant = 0.0, 0, lambda time: b

    @property
    def earliest(self) -> float:
        """The earliest time that `at` can go back to."""
        return max(self._shortest, self.t_old or 0.0)

    def at(self, time: float, bar: Any) -> tuple[Array, float]:
        """The state b [d c] at a time from `earliest` on, and a bound of its error's norm.

        Local errors add up at most, as the flow of a convex function brings solutions together.
        """
        while self.t < time:
            self._problem.pointwise.check_convex(self._problem.outputs(self.y), self.t)
            local = self._local_error(self.y)
            self.atol = local / math.sqrt(self.n)
            message = self.step()
            self._steps += 1
            if self.status == "failed" or self._steps > MAX_STEPS:
                raise InputError(
                    f"loss: expected a convex, twice differentiable one, got none that the flow "
                    f"could follow beyond t = {self.t:.3g} ({message or 'too many steps'}); stop "
                    "before, or smooth it"
                )
            self._error += local
            bar.update()
            bar.set_postfix(t=f"{self.t:.2g}", refresh=False)
            self._interpolant = self.dense_output()
        return self._interpolant(time), self._error + EPS * float(np.linalg.norm(self.y))

    def _local_error(self, b: Array) -> float:
        tiny = float(np.finfo(np.float64).tiny)
        return self._tolerance * max(float(np.linalg.norm(b)), self._least, tiny)

    def _counted(self, system: _Shifted) -> _Shifted:
        self.nlu += 1
        return system
