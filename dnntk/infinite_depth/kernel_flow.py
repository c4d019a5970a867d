"""Kernel gradient flow: what an infinitely deep network is at any time, without training one.

Theorems 3.3 and 4.3: as depth grows, the trained network's outputs follow

    f_t(X) = (I - exp(-t K / N)) Y,    f_t(x) = k(x, X) K^-1 (I - exp(-t K / N)) Y

with K the limit kernel on the N training examples. `KernelFlow` computes them for any t, infinity
included, and for any kernel: `limit_ntk` for the infinitely deep network, a network's own empirical
NTK for its linearization.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnntk.checks import (
    check_choice,
    check_count,
    host_examples,
    host_numbers,
    host_targets,
    host_times,
    number_within,
)
from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel, Kernel
from dnntk.infinite_depth.feature_gram import FeatureEigendecomposition, FeatureGram, Gram, gram_of
from dnntk.infinite_depth.gram_matrix import usual_memory
from dnntk.infinite_depth.solvers import (
    BLOCK,
    SOLVERS,
    Eigendecomposition,
    Krylov,
    Solver,
    residual,
    uses_eigh,
)
from dnntk.infinite_depth.spectral_filter import SpectralFilter
from dnntk.runs.paths import as_path
from dnntk.runtime import processes

__all__ = ["SOLVERS", "KernelFlow", "Solution"]

MAX_ITERATIONS = 2000

log = logging.getLogger("dnntk")


@dataclasses.dataclass(frozen=True)
class Solution:
    """The flow at one time: f_t(x) = f_0(x) + k(x, X) coefficients.

    Attributes:
        time: t.
        coefficients: [n, d_out] float64.
        converged: is the residual within the tolerance?
        residual: relative residual of the flow's differential equation, rounding included; at
            t = infinity that of the linear system. About the relative error of f_t(X).
        iterations: products with the Gram matrix; 0 for an eigendecomposition.
        condition: effective condition, the largest over the smallest value of the filter
            (1 - exp(-t s)) / s on the eigenvalues s; at t = infinity that of the matrix.
        solver: name of the method.
    """

    time: float
    coefficients: NDArray[np.float64] = dataclasses.field(repr=False)
    converged: bool
    residual: float
    iterations: int
    condition: float
    solver: str


class KernelFlow:
    """Gradient flow of a kernel machine on the loss 1/2 mean ||f - y||^2 (Theorems 3.3 and 4.3).

    The first prediction computes the Gram matrix and factors it; every further time costs little,
    and a Krylov basis grows where a longer time needs more of it.

    Args:
        kernel: [n1, ...], [n2, ...] -> [n1, n2], times the identity over the outputs, or
            [n1, n2, d_out, d_out]; bind its parameters with `functools.partial`.
        x_train: [n, ...].
        y_train: [n, d_out], or [n] for one output.
        ridge: weight decay of the kernel's own parameters, in units of the eigenvalues of K/N:
            at t = infinity this is kernel ridge regression with K + n ridge I.
        initial: f_0 at the training examples, [n, d_out]; None is 0, as deep narrow networks
            start.
        solver: "eigh", "krylov", or "auto": the first up to 4,096 rows, the second beyond.
        tolerance: relative residual at which the Krylov method stops.
        max_iterations: most iterations of the Krylov method; memory may allow fewer.
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
        check_choice("solver", solver, SOLVERS)
        check_choice("dtype", dtype, ("float32", "float64"))
        self._block_size = check_count("block_size", block_size)
        self._max = check_count("max_iterations", max_iterations)
        self.ridge = number_within(
            "ridge", ridge, lambda r: 0 <= r < math.inf, "a finite number >= 0"
        )
        self._tolerance = number_within(
            "tolerance", tolerance, lambda t: 0 < t < 1, "a number between 0 and 1"
        )
        memory = usual_memory() if memory is None else memory
        self._memory = number_within("memory", memory, lambda m: m > 0, "bytes above 0")
        self._x = host_examples("x_train", x_train)
        self._y = host_targets("y_train", y_train, len(self._x))
        start = 0.0 if initial is None else initial
        self._residual = self._y - self._outputs_like("initial", start, len(self._x))
        self._method, self._progress = solver, progress
        self._folder, self._gram = folder if folder is None else as_path("folder", folder), gram
        self._cross = CrossKernel(kernel, self._x, dtype) if gram is None else gram.cross
        own = self._x.astype(self._cross.dtype, copy=False)
        if gram is not None and not np.array_equal(gram.cross.x[: len(own)], own):
            raise InputError(
                "gram: expected the matrix of x_train, or of more examples that begin with it, got "
                "another's; leave it out"
            )
        if self._cross.matrix_size not in (1, self._y.shape[1]):
            raise InputError(
                f"y_train: expected {self._cross.matrix_size} outputs, as the kernel has, got "
                f"{self._y.shape[1]}"
            )
        self._solver: Solver | None = None
        self._quiet = False
        self._solutions: dict[float, Solution] = {}

    def predict(
        self, x: ArrayLike, time: float | Sequence[float] = math.inf, *, initial: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """f_t at new points.

        Each of several processes computes a part of the points, and receives all outputs.

        Args:
            x: [n', ...], examples as the training ones.
            time: t >= 0, may be infinite; or several times, for little more than the cost of one.
            initial: f_0 at these points, [n', d_out].

        Returns:
            [n', d_out] float64, or [times, n', d_out]. Each row depends on its own point only.

        Raises:
            InputError: an argument is not as above; or t is infinite, there is no ridge, and the
                Gram matrix is not positive definite to working precision. A result that has not
                converged is logged as a warning, and `solution` says so.
        """
        points = host_examples("x", x)
        if points.shape[1:] != self._x.shape[1:]:
            raise InputError(
                f"x: expected [n, {', '.join(map(str, self._x.shape[1:]))}], as x_train has, got "
                f"shape {list(points.shape)}"
            )
        start = self._outputs_like("initial", initial, len(points))
        times = host_times(time)
        coefficients = np.concatenate([s.coefficients for s in self.solutions(times)], 1)
        flat, rows = self._by_kernel_row(coefficients), processes.Rows(len(points))
        own = self._cross.product(rows.local(points), flat, self._block_size, self._progress)
        outputs = rows.all_gather(own.reshape(-1, self._cross.matrix_size * flat.shape[1]))
        return self._by_time(outputs.reshape(-1, flat.shape[1]), len(times), time) + start

    def train_predictions(self, time: float | Sequence[float] = math.inf) -> NDArray[np.float64]:
        """f_t at the training examples: [n, d_out] float64, or [times, n, d_out].

        Arguments and errors are those of `predict`. No further product with the Gram matrix is
        computed.
        """
        times = host_times(time)
        solver = self._solver_for(times)
        learnt = [solver.apply_matrix(self._components(solver, t)) for t in times]
        return self._by_time(np.concatenate(learnt, 1), len(times), time) + (
            self._y - self._residual
        )

    def loss(self, time: float | Sequence[float]) -> NDArray[np.float64]:
        """The loss 1/2 mean ||f_t - y||^2 on the training examples: a number, or [times].

        Arguments and errors are those of `predict`. A time costs a few products of small vectors.
        """
        times = host_times(time)
        solver = self._solver_for(times)
        result = []
        for t in times:
            components = self._components(solver, t)
            inside = solver.targets - solver.values[:, None] * components
            total = np.sum(inside**2) + np.sum(solver.residual_part(components) ** 2)
            result.append(0.5 * total / len(self._x))
        return np.array(result if np.ndim(time) else result[0])

    def solution(self, time: float = math.inf) -> Solution:
        """The coefficients at one time, and facts about the solver's work; errors as `predict`."""
        return self.solutions([time])[0]

    def solutions(self, times: Sequence[float]) -> list[Solution]:
        """`solution` of several times, solved together."""
        times = host_times(list(times))
        missing = [t for t in times if t not in self._solutions]
        if missing:
            solver = self._solver_for(missing)
            for t in missing:
                self._solutions[t] = self._solution_at(solver, t)
        return [self._solutions[t] for t in times]

    def for_targets(self, y_train: ArrayLike, *, ridge: float) -> "KernelFlow":
        """The flow from 0 to other targets [n, d_out], by the same kernel on the same examples.

        The Gram matrix and an eigendecomposition are shared; what has not converged is not logged.
        """
        other = copy.copy(self)
        other.ridge, other._y = ridge, host_targets("y_train", y_train, len(self._x))
        other._residual, other._solutions, other._quiet = other._y, {}, True
        if isinstance(self._solver, Eigendecomposition):
            other._solver = self._solver.for_targets(other._by_kernel_row(other._y))
        else:
            other._gram, other._solver = self.gram, None
        return other

    @property
    def gram(self) -> Gram:
        """The Gram matrix, computed at its first use.

        Raises:
            InputError: the kernel is not finite or not symmetric, or the folder holds another one.
        """
        if self._gram is None:
            self._gram = gram_of(
                self._cross,
                method=self._method,
                block_size=self._block_size,
                memory=self._memory,
                folder=self._folder,
                progress=self._progress,
            )
        return self._gram

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Eigenvalues of K/N, ascending; a Krylov method finds only the outermost exactly."""
        return self._solver_for([]).values

    def _solution_at(self, solver: Solver, time: float) -> Solution:
        flow = SpectralFilter(time, self.ridge)
        coefficients = solver.from_eigenbasis(self._components(solver, time)) / len(self._x)
        size, rounding = residual(solver, flow)
        gains = flow(solver.values[[-1, 0]])
        found = Solution(
            time=time,
            coefficients=coefficients.reshape(len(self._x), -1),
            converged=max(size, rounding) <= self._tolerance,
            residual=max(size, rounding),
            iterations=solver.iterations,
            condition=float(gains[1] / gains[0]) if time > 0 else 1.0,
            solver=solver.name,
        )
        if not found.converged and not self._quiet:
            log.warning(
                "solver: not converged at t = %g: residual %.2g, tolerance %.2g, %d iterations, "
                "effective condition %.2g; add a ridge, or take a shorter time%s",
                *(time, found.residual, self._tolerance, found.iterations, found.condition),
                "" if size <= rounding else ", or allow more iterations or memory",
            )
        return found

    def _components(self, solver: Solver, time: float) -> NDArray[np.float64]:
        return SpectralFilter(time, self.ridge)(solver.values)[:, None] * solver.targets

    def _solver_for(self, times: list[float]) -> Solver:
        """The solver, accurate for these times.

        Raises:
            InputError: the Gram matrix is not positive definite enough for them.
        """
        if self._solver is None:
            self._solver = self._start()
        solver, n = self._solver, len(self._x)
        before = solver.iterations
        solver.refine([SpectralFilter(t, self.ridge) for t in times], self._tolerance)
        if solver.iterations > before:
            log.info("solver: %d iterations", solver.iterations)
        smallest, largest = solver.smallest_eigenvalue, float(solver.values[-1])
        floor = n * self._cross.matrix_size * float(np.finfo(self._cross.dtype).eps) * largest
        if smallest < -floor:
            raise InputError(
                "kernel: expected a positive semidefinite Gram matrix, got one with the eigenvalue "
                f"{smallest * n:.3g} under a largest of {largest * n:.3g}; this function is no "
                "kernel"
            )
        if math.inf in times and self.ridge == 0 and smallest <= floor:
            raise InputError(
                "time: expected a finite one, or a ridge, as the Gram matrix is not positive "
                f"definite to {self._cross.dtype} precision (smallest eigenvalue of K/N "
                f"{smallest:.2g}, largest {largest:.3g}); drop coincident inputs, set ridge to "
                f"{floor:.1g} or more, or stop at time {1 / floor:.1g}"
            )
        return solver

    def _start(self) -> Solver:
        """The solver: of the Gram matrix as a whole, or of products with it."""
        n, k = len(self._x), self._cross.matrix_size
        rows, columns = n * k, max(self._y.size // (n * k), BLOCK)
        gram, folder = self.gram, self._folder
        targets = self._by_kernel_row(self._residual)
        if isinstance(gram, FeatureGram):
            if gram.diagonalized:
                return FeatureEigendecomposition(gram, targets)
        elif uses_eigh(self._method, rows):
            log.info("solver: eigendecomposition of the %d x %d Gram matrix", rows, rows)
            return Eigendecomposition(gram.dense(rows) / n, targets)
        own = processes.Rows(rows)
        block_bytes = 8 * -(-rows // processes.count()) * columns
        left = self._memory - (gram.nbytes if gram.stored and folder is None else 0)
        most = processes.broadcast(max(1, min(self._max, int(left // block_bytes))))
        if folder is not None:
            # The name is that of this matrix and these targets.
            key = hashlib.sha256(json.dumps(gram.identity()).encode())
            key.update(np.ascontiguousarray(targets).tobytes())
            folder = folder / f"krylov-{key.hexdigest()[:16]}"
        log.info(
            "solver: block Krylov on the %d x %d Gram matrix, %s; at most %d iterations of %d "
            "vectors, %.2g GB",
            *(rows, rows, gram.where, most, columns, most * block_bytes / 1e9),
        )
        return Krylov(
            lambda v: gram.product(v, own) / n,
            targets,
            max_iterations=most,
            progress=self._progress,
            folder=folder,
        )

    def _by_kernel_row(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, c d_out]: unchanged for a scalar kernel, else [n d_out, c]."""
        k = self._cross.matrix_size
        if k == 1:
            return outputs
        return outputs.reshape(len(outputs), -1, k).transpose(0, 2, 1).reshape(len(outputs) * k, -1)

    def _by_time(
        self, values: NDArray[np.float64], count: int, time: float | Sequence[float]
    ) -> NDArray[np.float64]:
        """[n, times d_out] or [n d_out, times] -> [times, n, d_out], or one of them."""
        d_out = self._y.shape[1]
        if self._cross.matrix_size == 1:
            result = values.reshape(-1, count, d_out).transpose(1, 0, 2)
        else:
            result = values.reshape(-1, d_out, count).transpose(2, 0, 1)
        return result if np.ndim(time) else result[0]

    def _outputs_like(self, name: str, value: ArrayLike, n: int) -> NDArray[np.float64]:
        outputs = host_numbers(name, value)
        shape = (n, self._y.shape[1])
        if outputs.ndim and outputs.shape != shape:
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(outputs.shape)}")
        return np.broadcast_to(outputs, shape)
