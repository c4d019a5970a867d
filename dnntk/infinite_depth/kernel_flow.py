"""Kernel gradient flow: what an infinitely deep network is at any time, without training one.

Theorems 3.3 and 4.3: as depth grows, the trained network's outputs follow

    f_t(X) = (I - exp(-t K / N)) Y,    f_t(x) = k(x, X) K^-1 (I - exp(-t K / N)) Y

with K the limit kernel on the N training examples. `KernelFlow` gives them for any t, infinity
included, and for any kernel: `limit_ntk` for the infinitely deep network, a network's own empirical
NTK for its linearization.
"""

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
from dnntk.infinite_depth.gram_matrix import CrossKernel, Kernel, SymmetricGram, balanced
from dnntk.infinite_depth.solvers import (
    BLOCK,
    EPS,
    Eigendecomposition,
    Filter,
    Krylov,
    Solver,
    residual,
)
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runs.paths import as_path
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar

SOLVERS = ("auto", "eigh", "krylov")
MOST_ROWS_FOR_EIGH = 4096
MOST_ITERATIONS = 2000
BASIS_SHARE = 0.2  # of the memory, that is left to the Krylov basis

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
        solver: which method it was.
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

    The first question computes the Gram matrix and factors it; every further time costs little, and
    a Krylov basis grows where a longer time needs more of it.
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
        max_iterations: int = MOST_ITERATIONS,
        block_size: int = 1024,
        memory: float | None = None,
        dtype: str = "float64",
        gram: SymmetricGram | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        """Check the arguments; nothing is computed yet but the kernel of one example.

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
            block_size: examples along a side of a block of the Gram matrix.
            memory: bytes for the Gram matrix and the Krylov basis; None is 3/4 of this machine's.
                Where half the Gram matrix does not fit, it is computed anew for every product,
                unless a folder keeps it.
            dtype: type in which the kernel is evaluated; everything after it is float64. "float32"
                costs half the time and adds an error of 1e-7 to every entry, which is of no
                consequence for times up to about 1e6 / k(x, x).
            gram: the ``gram`` of another flow of the same kernel, whose first n examples are these.
            folder: where the Gram matrix and the Krylov iterations are kept, and found by a later
                process, which goes on where this one stopped.
            progress: show bars on standard error for what takes longer than five seconds.

        Raises:
            InputError: an argument has the wrong shape, type or range.
        """
        check_choice("solver", solver, SOLVERS)
        check_choice("dtype", dtype, ("float32", "float64"))
        self._block_size = check_count("block_size", block_size)
        self._most = check_count("max_iterations", max_iterations)
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
        self._residual = self._y
        if initial is not None:
            self._residual = self._y - self._outputs_like("initial", initial, len(self._x))
        self._chosen, self._progress = solver, progress
        self._folder = None if folder is None else as_path("folder", folder)
        self._gram = gram
        self._cross = CrossKernel(kernel, self._x, dtype) if gram is None else gram.cross
        if gram is not None and not np.array_equal(
            gram.cross.x[: len(self._x)], self._x.astype(gram.cross.dtype, copy=False)
        ):
            raise InputError(
                "gram: expected the matrix of x_train, or of more examples that begin with it, got "
                "another's; leave it out"
            )
        if self._cross.outputs not in (1, self._y.shape[1]):
            raise InputError(
                f"y_train: expected {self._cross.outputs} outputs, as the kernel has, got "
                f"{self._y.shape[1]}"
            )
        self._solver: Solver | None = None
        self._solutions: dict[float, Solution] = {}

    def predict(
        self, x: ArrayLike, time: float | Sequence[float] = math.inf, *, initial: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """f_t at new points.

        Of several processes each computes its share of the points, and all get all of them.

        Args:
            x: [n', ...], examples as the training ones.
            time: t >= 0, may be infinite; or several, at little more than the price of one.
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
        flat = self._flat(np.concatenate([s.coefficients for s in self.solutions(times)], 1))
        k, dtype = self._cross.outputs, self._cross.dtype
        train = self._x.astype(dtype, copy=False)
        shared = processes.Rows(len(points))
        points = shared.local(points).astype(dtype, copy=False)
        result = np.empty((len(points) * k, flat.shape[1]))
        columns = balanced(len(train), self._block_size)
        rows = balanced(len(points), self._block_size) if len(points) else []
        blocks = self._cross.blocks(
            [(points[a:b], train[c:d]) for a, b in rows for c, d in columns]
        )
        for a, b in progress_bar(
            rows,
            desc="predict",
            unit="block",
            delay=PROGRESS_DELAY,
            disable=not self._progress,
        ):
            result[a * k : b * k] = sum(next(blocks) @ flat[c * k : d * k] for c, d in columns)
        whole = shared.all_gather(result.reshape(len(points), k * flat.shape[1]))
        return self._shaped(whole.reshape(-1, flat.shape[1]), len(times), time) + start

    def train_predictions(self, time: float | Sequence[float] = math.inf) -> NDArray[np.float64]:
        """f_t at the training examples.

        Args:
            time: as for `predict`.

        Returns:
            [n, d_out] float64, or [times, n, d_out], without another product with the Gram matrix.

        Raises:
            InputError: as for `predict`.
        """
        times = host_times(time)
        solver = self._reach(times)
        applied = np.concatenate([solver.applied(self._components(t)) for t in times], 1)
        return self._shaped(applied, len(times), time) + (self._y - self._residual)

    def loss(self, time: float | Sequence[float]) -> NDArray[np.float64]:
        """The loss 1/2 mean ||f_t - y||^2 on the training examples.

        Args:
            time: as for `predict`.

        Returns:
            A number, or [times], for the price of a few small vectors each.

        Raises:
            InputError: as for `predict`.
        """
        times = host_times(time)
        solver = self._reach(times)
        result = []
        for t in times:
            components = self._components(t)
            inside = solver.targets - solver.values[:, None] * components
            total = np.sum(inside**2) + np.sum(solver.outside(components) ** 2)
            result.append(0.5 * total / len(self._x))
        return np.array(result if np.ndim(time) else result[0])

    def solution(self, time: float = math.inf) -> Solution:
        """The coefficients at one time, and how they were found.

        Raises:
            InputError: as for `predict`.
        """
        return self.solutions([time])[0]

    def solutions(self, times: Sequence[float]) -> list[Solution]:
        """`solution` of several times, found together."""
        times = host_times(list(times))
        missing = [t for t in times if t not in self._solutions]
        if missing:
            solver = self._reach(missing)
            for t in missing:
                self._solutions[t] = self._solved(solver, t)
        return [self._solutions[t] for t in times]

    @property
    def gram(self) -> SymmetricGram:
        """The Gram matrix, computed when it is first asked for.

        Raises:
            InputError: the kernel is not finite or not symmetric, or the folder holds another one.
        """
        if self._gram is None:
            rows = len(self._x) * self._cross.outputs
            half = 4 * rows * (rows + self._block_size * self._cross.outputs) / processes.count()
            stored = self._direct or fits(half, self._memory) or self._folder is not None
            self._gram = SymmetricGram(
                self._cross,
                block_size=self._block_size,
                stored=stored,
                folder=self._folder,
                progress=self._progress,
            )
        return self._gram

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Eigenvalues of K/N, ascending; only the outer ones are right of a Krylov method's."""
        return self._reach([]).values

    def _solved(self, solver: Solver, time: float) -> Solution:
        flow = Filter(time, self.ridge)
        coefficients = solver.expand(self._components(time)) / len(self._x)
        defect, rounding = residual(solver, flow)
        gains = flow(solver.values[[-1, 0]])
        found = Solution(
            time=time,
            coefficients=coefficients.reshape(len(self._x), -1),
            converged=max(defect, rounding) <= self._tolerance,
            residual=max(defect, rounding),
            iterations=solver.iterations,
            condition=float(gains[1] / gains[0]) if time > 0 else 1.0,
            solver=solver.name,
        )
        if not found.converged:
            log.warning(
                "solver: not converged at t = %g: residual %.2g, tolerance %.2g, %d iterations, "
                "effective condition %.2g; add a ridge, or take a shorter time%s",
                *(time, found.residual, self._tolerance, found.iterations, found.condition),
                "" if defect <= rounding else ", or allow more iterations or memory",
            )
        return found

    def _components(self, time: float) -> NDArray[np.float64]:
        assert self._solver is not None
        return Filter(time, self.ridge)(self._solver.values)[:, None] * self._solver.targets

    def _reach(self, times: list[float]) -> Solver:
        """The solver, right for these times.

        Raises:
            InputError: the Gram matrix is not positive definite enough for them.
        """
        if self._solver is None:
            self._solver = self._start()
        solver, n = self._solver, len(self._x)
        before = solver.iterations
        solver.reach([Filter(t, self.ridge) for t in times], self._tolerance)
        if solver.iterations > before:
            log.info("solver: %d iterations", solver.iterations)
        rows, largest = n * self._cross.outputs, float(solver.values[-1])
        precision = EPS if self._cross.dtype == "float64" else float(np.finfo(np.float32).eps)
        floor = rows * precision * largest
        if solver.least < -floor:
            raise InputError(
                "kernel: expected a positive semidefinite Gram matrix, got one with the eigenvalue "
                f"{solver.least * n:.3g} under a largest of {largest * n:.3g}; this kernel is none"
            )
        if math.inf in times and self.ridge == 0 and solver.least <= floor:
            raise InputError(
                "time: expected a finite one, or a ridge, as the Gram matrix is not positive "
                f"definite to {self._cross.dtype} precision (least eigenvalue of K/N "
                f"{solver.least:.2g}, largest {largest:.3g}); drop coincident inputs, set ridge to "
                f"{floor:.1g} or more, or stop at time {1 / floor:.1g}"
            )
        return solver

    def _start(self) -> Solver:
        """Gram matrix and solver, chosen by size."""
        n, k = len(self._x), self._cross.outputs
        rows, columns = n * k, max(self._y.size // (n * k), BLOCK)
        gram = self.gram
        targets = self._flat(self._residual)
        if self._direct:
            log.info("solver: eigendecomposition of the %d x %d Gram matrix", rows, rows)
            return Eigendecomposition(gram.dense(rows) / n, targets)
        held = gram.nbytes if gram.stored and self._folder is None else 0
        own = processes.Rows(rows)
        basis_bytes = 8 * -(-rows // processes.count()) * columns
        left = self._memory - held
        most = processes.broadcast(max(1, min(self._most, int(left // basis_bytes))))
        where = "in memory" if gram.stored else "computed for every product, as memory is short"
        if self._folder is not None:
            where = f"in {self._folder}"
        log.info(
            "solver: block Krylov on the %d x %d Gram matrix, %.2g GB of it %s; at most %d "
            "iterations of %d vectors, %.2g GB",
            *(rows, rows, gram.nbytes / 1e9),
            where,
            *(most, columns, most * basis_bytes / 1e9),
        )
        product, folder = gram.product, self._folder
        if folder is not None:
            # Found again by the same matrix and the same targets.
            key = hashlib.sha256(json.dumps(gram.identity()).encode())
            key.update(np.ascontiguousarray(targets).tobytes())
            folder = folder / f"krylov-{key.hexdigest()[:16]}"
        return Krylov(
            lambda v: product(v, own) / n,
            targets,
            most=most,
            progress=self._progress,
            folder=folder,
        )

    @property
    def _direct(self) -> bool:
        rows = len(self._x) * self._cross.outputs
        return self._chosen == "eigh" or (self._chosen == "auto" and rows <= MOST_ROWS_FOR_EIGH)

    def _flat(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, d_out x c] -> [n, d_out c] for a scalar kernel, [n d_out, c] for a matrix's."""
        k = self._cross.outputs
        if k == 1:
            return outputs
        return outputs.reshape(len(outputs), -1, k).transpose(0, 2, 1).reshape(len(outputs) * k, -1)

    def _shaped(
        self, values: NDArray[np.float64], count: int, time: float | Sequence[float]
    ) -> NDArray[np.float64]:
        """[n, times d_out] or [n d_out, times] -> [times, n, d_out], or one of them."""
        d_out = self._y.shape[1]
        rows = len(values) // self._cross.outputs
        if self._cross.outputs == 1:
            result = values.reshape(rows, count, d_out).transpose(1, 0, 2)
        else:
            result = values.reshape(rows, d_out, count).transpose(2, 0, 1)
        return result if np.ndim(time) else result[0]

    def _outputs_like(self, name: str, value: ArrayLike, n: int) -> NDArray[np.float64]:
        outputs = host_numbers(name, value)
        shape = (n, self._y.shape[1])
        if outputs.ndim and outputs.shape != shape:
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(outputs.shape)}")
        return np.broadcast_to(outputs, shape)


def fits(tiles: float, memory: float) -> bool:
    """Are so many bytes of tiles kept, where this is left for them and the Krylov basis?"""
    return tiles <= (1 - BASIS_SHARE) * memory


def usual_memory() -> float:
    """Bytes for both where nobody says."""
    return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
