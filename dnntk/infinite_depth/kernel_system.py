"""A kernel on the training examples, and linear algebra with its Gram matrix for any targets."""

import logging
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnntk.checks import check_choice, check_count, host_examples, number_within
from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel, Kernel
from dnntk.infinite_depth.feature_gram import Gram, gram_of
from dnntk.infinite_depth.gram_matrix import usual_memory
from dnntk.infinite_depth.gram_solver import check_definite, check_steps, solver_of
from dnntk.infinite_depth.solution import Solution
from dnntk.infinite_depth.solvers import SOLVERS, Eigendecomposition, Solver
from dnntk.infinite_depth.spectral_filter import DescentFilter, SpectralFilter
from dnntk.runs.paths import as_path
from dnntk.runtime import processes

__all__ = ["KernelSystem"]

SLACK = 30  # a residual so many times a tight tolerance is not yet a failure

log = logging.getLogger("dnntk")

Array = NDArray[np.float64]


class KernelSystem:
    """The part of a `dnntk.KernelFlow` that all targets share: kernel, examples, factorization.

    Attributes:
        x: [n, ...] training examples.
        cross: the kernel.
        tolerance, block_size, memory: as in `dnntk.KernelFlow`.
    """

    def __init__(
        self,
        kernel: Kernel,
        x_train: ArrayLike,
        *,
        solver: str,
        tolerance: float,
        max_iterations: int,
        block_size: int,
        memory: float | None,
        dtype: str,
        gram: Gram | None,
        folder: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        """Check the arguments, those of `dnntk.KernelFlow`; evaluate one example at most."""
        check_choice("solver", solver, SOLVERS)
        check_choice("dtype", dtype, ("float32", "float64"))
        self.block_size = check_count("block_size", block_size)
        self._max = check_count("max_iterations", max_iterations)
        self.tolerance = number_within(
            "tolerance", tolerance, lambda t: 0 < t < 1, "a number between 0 and 1"
        )
        memory = usual_memory() if memory is None else memory
        self.memory = number_within("memory", memory, lambda m: m > 0, "bytes above 0")
        self.x = host_examples("x_train", x_train)
        self._method, self._progress = solver, progress
        self._folder, self._gram = folder if folder is None else as_path("folder", folder), gram
        self._factored: Eigendecomposition | None = None
        self.cross = CrossKernel(kernel, self.x, dtype) if gram is None else gram.cross
        own = self.x.astype(self.cross.dtype, copy=False)
        if gram is not None and not np.array_equal(gram.cross.x[: len(own)], own):
            raise InputError(
                "gram: expected the matrix of x_train, or of more examples that begin with it, got "
                "another's; leave it out"
            )

    @property
    def gram(self) -> Gram:
        """The Gram matrix, computed at its first use.

        Raises:
            InputError: the kernel is not finite or not symmetric, or the folder holds another one.
        """
        if self._gram is None:
            self._gram = gram_of(
                self.cross,
                method=self._method,
                block_size=self.block_size,
                memory=self.memory,
                folder=self._folder,
                progress=self._progress,
            )
        return self._gram

    def points(self, x: ArrayLike) -> Array:
        """New points [n', ...], of the training examples' shape."""
        points = host_examples("x", x)
        if points.shape[1:] != self.x.shape[1:]:
            raise InputError(
                f"x: expected [n, {', '.join(map(str, self.x.shape[1:]))}], as x_train has, got "
                f"shape {list(points.shape)}"
            )
        return points

    def solver_of(self, targets: Array, *, saved: bool = True) -> Solver:
        """A solver of K/n for targets [n k, c]; an eigendecomposition is computed once.

        A Krylov method saves its iterations in the folder, if they are ``saved``.
        """
        if self._factored is not None:
            return self._factored.for_targets(targets)
        solver = solver_of(
            self.gram,
            targets,
            method=self._method,
            max_iterations=self._max,
            memory=self.memory,
            folder=self._folder if saved else None,
            progress=self._progress,
        )
        if isinstance(solver, Eigendecomposition):
            self._factored = solver
        return solver

    def refine(
        self,
        solver: Solver,
        filters: Sequence[SpectralFilter],
        *,
        noisy: bool = False,
        tolerance: float | None = None,
    ) -> Solver:
        """Make a solver accurate for these filters, whose ridge is a noise if they are ``noisy``.

        ``tolerance`` is another one than the system's.

        Raises:
            InputError: the Gram matrix is not positive definite enough for them, or descent does
                not converge or overflows.
        """
        before = solver.iterations
        if any(isinstance(each, DescentFilter) for each in filters):
            solver.refine([], self.tolerance)  # the largest eigenvalue
            check_steps(filters, float(solver.values[-1]))
        solver.refine(list(filters), self.tolerance if tolerance is None else tolerance)
        if solver.iterations > before:
            log.info("solver: %d iterations", solver.iterations)
        check_definite(solver, filters, len(self.x), self.cross, noisy=noisy)
        return solver

    def solutions(
        self,
        targets: Array,
        filters: Sequence[SpectralFilter],
        *,
        noisy: bool = False,
        tolerance: float | None = None,
    ) -> list[Solution]:
        """The solution of each filter for targets [n k, c], not saved; options as `refine`."""
        solver, accepted = self.solver_of(targets, saved=False), self.tolerance
        self.refine(solver, filters, noisy=noisy, tolerance=tolerance)
        if tolerance and solver.iterations:
            accepted = min(accepted, SLACK * tolerance)
        n = len(self.x)
        return [Solution.found_by(solver, f, n, accepted, quiet=False) for f in filters]

    def product(self, points: Array, vectors: Array) -> Array:
        """k(points, X) @ vectors: [n', ...], [n k, c] -> [n' k, c].

        Each of several processes computes a part of the points, and receives all rows.
        """
        rows, columns = processes.Rows(len(points)), vectors.shape[1]
        own = self.cross.product(rows.local(points), vectors, self.block_size, self._progress)
        outputs = rows.all_gather(own.reshape(-1, self.cross.matrix_size * columns))
        return outputs.reshape(-1, columns)
