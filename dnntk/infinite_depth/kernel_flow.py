"""Kernel gradient flow: what an infinitely deep network is at any time, without training one.

Theorems 3.3 and 4.3: as depth grows, the trained network's outputs follow

    f_t(X) = (I - exp(-t K / N)) Y,    f_t(x) = k(x, X) K^-1 (I - exp(-t K / N)) Y

with K the limit kernel on the N training examples. `KernelFlow` computes them for any t, infinity
included, and for any kernel: `limit_ntk` for the infinitely deep network, a network's own empirical
NTK for its linearization. With a ``time_step``, and ``momentum``, they are what gradient descent in
steps of that size reaches instead: for momentum 0, (1 - eta K / N)^n in the place of exp(-t K / N).
"""

import copy
import math
import os
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnntk.checks import host_targets, host_times, not_negative
from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import Kernel
from dnntk.infinite_depth.feature_gram import Gram
from dnntk.infinite_depth.gaussian_process import GaussianProcessMixin
from dnntk.infinite_depth.kernel_system import KernelSystem
from dnntk.infinite_depth.leave_one_out import check_solver, leave_one_out_errors
from dnntk.infinite_depth.loss_flow import LossFlow
from dnntk.infinite_depth.outputs import OutputLayout
from dnntk.infinite_depth.pointwise_loss import Pointwise
from dnntk.infinite_depth.solution import Solution
from dnntk.infinite_depth.solvers import SOLVERS, Eigendecomposition, Solver, filtered
from dnntk.infinite_depth.spectral_filter import SpectralFilter, filters_at, largest_stable_step
from dnntk.training.losses import Loss

__all__ = ["SOLVERS", "KernelFlow", "Solution"]

MAX_ITERATIONS = 2000


class KernelFlow(GaussianProcessMixin):
    """Gradient flow of a kernel machine: df/dt = -(1/N) K dloss/df (Theorems 3.2, 3.3 and 4.3).

    On squared error the first prediction computes the Gram matrix and factors it; every further
    time costs little, and a Krylov basis grows where a longer time needs more of it. Other losses
    are integrated in time, see `dnntk.infinite_depth.loss_flow`.

    Args:
        kernel: [n1, ...], [n2, ...] -> [n1, n2], times the identity over the outputs, or
            [n1, n2, d_out, d_out]; bind its parameters with `functools.partial`.
        x_train: [n, ...].
        y_train: [n, d_out], or [n] for one output.
        loss: of an example; the training loss is the mean over examples. "squared" is 1/2 ||f -
            y||^2. "cross_entropy" takes outputs as logits, and targets as probabilities: rows that
            add up to 1 (softmax), or one column in [0, 1] (sigmoid). Or a function (outputs [k],
            target [k]) -> number, convex and twice differentiable by JAX. A flow on another loss
            than squared error takes eigenvectors at any n, and n^2 d_out operations or so for each
            of about a thousand evaluations: with 3 outputs to t = 1,000, besides the eigenvectors,
            3 s of processor time for 1,000 examples, 15 s for 2,000, and, by the square, 6 minutes
            for 10,000.
        ridge: weight decay of the kernel's own parameters, in units of the eigenvalues of K/N:
            at t = infinity this is kernel ridge regression with K + n ridge I.
        initial: f_0 at the training examples, [n, d_out]; None is 0, as deep narrow networks
            start.
        solver: "eigh", "krylov", or "auto": the first up to 4,096 rows, the second beyond. Losses
            other than squared error need the first at any size.
        tolerance: relative residual at which the Krylov method stops; of other losses than squared
            error, the relative error of f_t.
        max_iterations: most iterations of the Krylov method; memory may allow fewer. Of no effect
            on other losses than squared error.
        block_size: examples along a side of a tile of the Gram matrix.
        memory: bytes for the Gram matrix and the Krylov basis; None is 3/4 of this machine's.
            If half the Gram matrix does not fit, it is evaluated again for every product,
            unless it is saved in a folder. A kernel with known features needs neither where
            `dnntk.infinite_depth.feature_gram` finds products by features faster.
        dtype: type in which the kernel is evaluated; everything after it is float64. "float32"
            costs half the time and adds an error of 1e-7 to every entry, too small to matter for
            times up to about 1e6 / k(x, x).
        gram: the ``gram`` of another flow of the same kernel, whose first n examples are these.
        folder: where the Gram matrix and the Krylov iterations are saved; a later process loads
            them, and continues where this one stopped.
        progress: show bars on standard error for what takes longer than five seconds.

    Raises:
        InputError: an argument has the wrong shape, type or range.
    """

    def __init__(
        self,
        kernel: Kernel,
        x_train: ArrayLike,
        y_train: ArrayLike,
        *,
        loss: str | Loss = "squared",
        ridge: float = 0.0,
        initial: ArrayLike | None = None,
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = MAX_ITERATIONS,
        block_size: int = 1024,
        memory: float | None = None,
        dtype: str = "float64",
        gram: Gram | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        """Check the arguments; of the kernel no more than one example is evaluated."""
        is_squared = isinstance(loss, str) and loss == "squared"
        if not is_squared and solver == "krylov":
            raise InputError("solver: expected auto or eigh for this loss, got krylov")
        self._system = KernelSystem(
            kernel,
            x_train,
            solver="eigh" if not is_squared and solver == "auto" else solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            block_size=block_size,
            memory=memory,
            dtype=dtype,
            gram=gram,
            folder=folder,
            progress=progress,
        )
        self._n, size = len(self._system.x), self._system.cross.matrix_size
        self.ridge = not_negative("ridge", ridge)
        self._y = host_targets("y_train", y_train, self._n)
        if size not in (1, self._y.shape[1]):
            raise InputError(
                f"y_train: expected {size} outputs, as the kernel has, got {self._y.shape[1]}"
            )
        self._layout = OutputLayout(self._y.shape[1], size)
        start = 0.0 if initial is None else initial
        self._residual = self._y - self._layout.checked("initial", start, self._n)
        self._pointwise = None if is_squared else Pointwise(loss, self._y)
        self._solver: Solver | None = None
        self._quiet, self._progress = False, progress
        self._loss_flow: LossFlow | None = None
        self._solutions: dict[SpectralFilter, Solution] = {}

    def predict(
        self,
        x: ArrayLike,
        time: float | Sequence[float] = math.inf,
        time_step: float | None = None,
        momentum: float = 0.0,
        *,
        initial: ArrayLike = 0.0,
    ) -> NDArray[np.float64]:
        """f_t at new points.

        Each of several processes computes a part of the points, and receives all outputs.

        Args:
            x: [n', ...], examples as the training ones.
            time: t >= 0, may be infinite; or several times, for little more than the cost of one.
            time_step: eta of full-batch gradient descent, in units of kernel time, which is then
                followed instead of the flow, exactly; None is the flow. A time must be a whole
                number of steps, each of which counts time_step / (1 - momentum). Of squared error
                only, as momentum is.
            momentum: mu of the heavy ball, as optax.sgd(time_step, momentum) has it; 0 <= mu < 1.
            initial: f_0 at these points, [n', d_out].

        Returns:
            [n', d_out] float64, or [times, n', d_out]. Each row depends on its own point only.

        Raises:
            InputError: an argument is not as above; t is infinite, there is no ridge, and the Gram
                matrix is not positive definite to working precision; t is infinite, and the step
                not below `max_time_step`; a larger step has grown beyond float64 by the time t; or
                the loss is not convex on the way. A result that has not converged is logged as a
                warning, and `solution` says so.
        """
        points = self._system.points(x)
        start = self._layout.checked("initial", initial, len(points))
        times = host_times(time)
        solutions = self.solutions(times, time_step, momentum)
        coefficients = np.concatenate([s.coefficients for s in solutions], 1)
        outputs = self._system.product(points, self._layout.by_kernel_row(coefficients))
        return self._layout.by_time(outputs, len(times), time) + start

    def train_predictions(
        self,
        time: float | Sequence[float] = math.inf,
        time_step: float | None = None,
        momentum: float = 0.0,
    ) -> NDArray[np.float64]:
        """f_t at the training examples: [n, d_out] float64, or [times, n, d_out].

        Arguments and errors are those of `predict`. No further product with the Gram matrix is
        computed.
        """
        filters = self._filters(host_times(time), time_step, momentum)
        solver = self._solver_for(filters)
        if self._loss_flow is None:
            components = [filtered(solver, each) for each in filters]
        else:
            components = self._loss_flow.components([each.time for each in filters])
        learnt = [solver.apply_matrix(each) for each in components]
        outputs = self._layout.by_time(np.concatenate(learnt, 1), len(filters), time)
        return outputs + (self._y - self._residual)

    def loss(
        self, time: float | Sequence[float], time_step: float | None = None, momentum: float = 0.0
    ) -> NDArray[np.float64]:
        """The mean loss on the training examples, without a ridge's: a number, or [times].

        Arguments and errors are those of `predict`. A time costs a few products of small vectors.
        """
        filters = self._filters(host_times(time), time_step, momentum)
        if self._pointwise is not None:
            outputs = self.train_predictions(np.atleast_1d(np.asarray(time, float)).tolist())
            values = np.array([self._pointwise.value(f) for f in outputs])
            return values if np.ndim(time) else values[0]
        solver = self._solver_for(filters)
        result = []
        for each in filters:
            components = filtered(solver, each)
            inside = solver.targets - solver.values[:, None] * components
            total = np.sum(inside**2) + np.sum(solver.residual_part(components) ** 2)
            result.append(0.5 * total / self._n)
        return np.array(result if np.ndim(time) else result[0])

    def solution(
        self, time: float = math.inf, time_step: float | None = None, momentum: float = 0.0
    ) -> Solution:
        """The coefficients at one time, and facts about the solver's work; errors as `predict`."""
        return self.solutions([time], time_step, momentum)[0]

    def solutions(
        self, times: Sequence[float], time_step: float | None = None, momentum: float = 0.0
    ) -> list[Solution]:
        """`solution` of several times, solved together."""
        filters = self._filters(host_times(list(times)), time_step, momentum)
        missing = [each for each in filters if each not in self._solutions]
        if missing:
            solver = self._solver_for(missing)
            if self._loss_flow is not None:
                self._loss_flow.components([each.time for each in missing])
            for each in missing:
                if self._loss_flow is not None:
                    self._solutions[each] = self._loss_flow.solution(each.time)
                    continue
                self._solutions[each] = Solution.found_by(
                    solver, each, self._n, self._system.tolerance, quiet=self._quiet
                )
        return [self._solutions[each] for each in filters]

    def leave_one_out(
        self, time: float | Sequence[float] = math.inf, *, ridge: float | None = None
    ) -> NDArray[np.float64]:
        """f_t at each training example, of the flow trained on the other n - 1 examples.

        All of them cost one eigendecomposition; see `dnntk.infinite_depth.leave_one_out`.

        Args:
            time: t >= 0, may be infinite; or several times.
            ridge: another ridge than the flow's.

        Returns:
            [n, d_out] float64, or [times, n, d_out]: row i is what ``predict(x_train[i], time)``
            of the flow without example i is, to about 1e-8 of the targets.

        Raises:
            InputError: as `predict`; there is only one example; or the solver is a Krylov one, so
                that eigenvectors are missing: give ``solver="eigh"``.
        """
        self._check_squared("leave_one_out")
        times = host_times(time)
        r = self.ridge if ridge is None else not_negative("ridge", ridge)
        solver = check_solver(self._started(), self._n)
        self._system.refine(solver, filters_at(times, r))
        errors = leave_one_out_errors(solver, self._n, times, r, self._layout.matrix_size)
        return self._y + (errors if np.ndim(time) else errors[0])

    def influence(
        self, x: ArrayLike, time: float | Sequence[float] = math.inf
    ) -> NDArray[np.float64]:
        """The derivative of f_t(x) by every training target: which examples made a prediction.

        k(x, X) K^-1 (I - exp(-t K / N)), so that f_t(x) = f_0(x) + influence (y - f_0(X)): exactly
        what training with other targets would change. What TRAK (Park et al. 2023) estimates for
        a network of finite width.

        Args:
            x: [n', ...], examples as the training ones.
            time: t >= 0, may be infinite; or several times.

        Returns:
            [n', n] float64, one matrix for all outputs, or [times, n', n]. Of a matrix-valued
            kernel [n', d_out, n, d_out]: an output by its example's outputs.

        Raises:
            InputError: as `predict`.
        """
        self._check_squared("influence")
        points, n, k = self._system.points(x), self._n, self._layout.matrix_size
        filters = filters_at(host_times(time), self.ridge)
        cross = self._system.cross.matrix(points, n, self._system.block_size)
        # A residual R of the solver changes the entries by at most phi(0) |R| / n.
        factor = max(float(f(np.zeros(1))[0]) for f in filters) * float(np.linalg.norm(cross)) / n
        tolerance = self._system.tolerance * min(1.0, 1 / factor if factor else 1.0)
        found = self._system.solutions(cross.T, filters, tolerance=tolerance)
        by_time = np.stack([each.coefficients for each in found])
        result = by_time.reshape(len(found), n, k, len(points), k).transpose(0, 3, 4, 1, 2)
        result = result[:, :, 0, :, 0] if k == 1 else result
        return result if np.ndim(time) else result[0]

    def for_targets(self, y_train: ArrayLike, *, ridge: float) -> "KernelFlow":
        """The flow from 0 to other targets [n, d_out], by the same kernel on the same examples.

        The Gram matrix and an eigendecomposition are shared; what has not converged is not logged.

        Raises:
            InputError: an argument has the wrong shape, type or range.
        """
        self._check_squared("for_targets")
        other = copy.copy(self)
        targets = host_targets("y_train", y_train, self._n)
        other._y = self._layout.checked("y_train", targets, self._n)
        other.ridge = not_negative("ridge", ridge)
        other._residual, other._solutions, other._quiet = other._y, {}, True
        other._solver = None
        return other

    @property
    def gram(self) -> Gram:
        """The Gram matrix, computed at its first use; see `KernelSystem.gram` for errors."""
        return self._system.gram

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Eigenvalues of K/N, ascending; a Krylov method finds only the outermost exactly."""
        return self._solver_for([]).values

    def max_time_step(self, momentum: float = 0.0) -> float:
        """The largest stable step of full-batch gradient descent: 2 (1 + momentum) / (s + ridge).

        s is the largest eigenvalue of K/N, for the loss 1/2 mean ||f - y||^2, and for no other; in
        units of kernel time, before it is divided by 1 - momentum. Any larger step grows in the end
        (Polyak, 1964).
        """
        self._check_squared("max_time_step", "; use the flow, which needs no step")
        return largest_stable_step(float(self.eigenvalues[-1]) + self.ridge, momentum)

    def _filters(
        self, times: Sequence[float], time_step: float | None, momentum: float
    ) -> list[SpectralFilter]:
        if time_step is not None:
            way_out = "; leave time_step out for the flow, or take small steps by dnntk.train"
            self._check_squared("time_step", way_out)
        return filters_at(times, self.ridge, time_step, momentum)

    def _check_squared(self, name: str, way_out: str = "") -> None:
        """Refuse another loss, for what has a closed form only for squared error."""
        if self._pointwise is not None:
            raise InputError(
                f"{name}: expected a flow of loss=squared, got another loss's{way_out}"
            )

    def _solver_for(self, filters: Sequence[SpectralFilter]) -> Solver:
        """The solver, accurate for these filters; errors as `KernelSystem.refine`."""
        return self._system.refine(self._started(), filters)

    def _started(self) -> Solver:
        if self._solver is None:
            self._solver = self._system.solver_of(self._layout.by_kernel_row(self._residual))
            if self._pointwise is not None:
                self._loss_flow = LossFlow(
                    self._pointwise,
                    self._y - self._residual,
                    cast(Eigendecomposition, self._solver),
                    ridge=self.ridge,
                    tolerance=self._system.tolerance,
                    progress=self._progress,
                )
        return self._solver
