"""The solver for a Gram matrix: which one it is, and which times the matrix allows."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.feature_gram import FeatureEigendecomposition, FeatureGram, Gram
from dnntk.infinite_depth.solvers import BLOCK, Eigendecomposition, Krylov, Solver, uses_eigh
from dnntk.infinite_depth.spectral_filter import DescentFilter, SpectralFilter, largest_stable_step
from dnntk.runtime import processes

__all__ = ["check_definite", "check_steps", "solver_of"]

LARGEST = 1e150  # state of descent, whose square is within float64

log = logging.getLogger("dnntk")


def solver_of(
    gram: Gram,
    targets: NDArray[np.float64],
    *,
    method: str,
    max_iterations: int,
    memory: float,
    folder: Path | None,
    progress: bool,
) -> Solver:
    """The solver for K/n and targets: of the matrix as a whole, or of products with it.

    Args:
        gram: the Gram matrix, whose leading rows and columns are K.
        targets: [n k, c], with k the kernel's matrix size.
        method: "eigh", "krylov" or "auto", as in `dnntk.KernelFlow`; so are the other arguments.
        max_iterations: most iterations of a Krylov method; memory may allow fewer.
        memory: bytes for the Gram matrix and the Krylov basis.
        folder: where the Krylov iterations are saved.
        progress: show bars.
    """
    rows, n = len(targets), len(targets) // gram.cross.matrix_size
    if isinstance(gram, FeatureGram):
        if gram.diagonalized:
            return FeatureEigendecomposition(gram, targets)
    elif uses_eigh(method, rows):
        log.info("solver: eigendecomposition of the %d x %d Gram matrix", rows, rows)
        return Eigendecomposition(gram.dense(rows) / n, targets)
    own, columns = processes.Rows(rows), max(targets.shape[1], BLOCK)
    block_bytes = 8 * -(-rows // processes.count()) * columns
    left = memory - (gram.nbytes if gram.stored and folder is None else 0)
    most = processes.broadcast(max(1, min(max_iterations, int(left // block_bytes))))
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
        progress=progress,
        folder=folder,
    )


def check_steps(filters: Sequence[SpectralFilter], largest: float) -> None:
    """Refuse descent that does not converge, or overflows, at the ``largest`` eigenvalue.

    Raises:
        InputError: a time is infinite and its step not stable; or the state is beyond float64.
    """
    for each in filters:
        if not isinstance(each, DescentFilter):
            continue
        most = largest_stable_step(largest + each.ridge, each.momentum)
        if math.isinf(each.time) and each.time_step >= most:
            raise InputError(
                f"time_step: expected less than max_time_step(momentum={each.momentum:g}) = "
                f"{most:.6g} for an infinite time, got {each.time_step:g}; descent does not "
                "converge: take a smaller step, or a finite time"
            )
        if not np.abs(each(np.array([largest]))).max() < LARGEST:
            raise InputError(
                f"time_step: expected descent within float64, got {each.time_step:g}, with which "
                f"it overflows before t = {each.time:g}; take less than max_time_step(momentum="
                f"{each.momentum:g}) = {most:.6g}, or a shorter time"
            )


def check_definite(
    solver: Solver,
    filters: Sequence[SpectralFilter],
    n: int,
    cross: CrossKernel,
    *,
    noisy: bool = False,
) -> None:
    """Refuse a matrix that is not positive definite enough for these filters.

    ``n`` is the number of examples of the kernel ``cross``; ``noisy`` is whether the filters' ridge
    is a Gaussian process's noise over n.

    Raises:
        InputError: an eigenvalue is negative beyond rounding; or it is about 0, a filter's time is
            infinite, and there is no ridge.
    """
    smallest, largest = solver.smallest_eigenvalue, float(solver.values[-1])
    floor = n * cross.matrix_size * float(np.finfo(cross.dtype).eps) * largest
    if smallest < -floor:
        raise InputError(
            "kernel: expected a positive semidefinite Gram matrix, got one with the eigenvalue "
            f"{smallest * n:.3g} under a largest of {largest * n:.3g}; this function is no "
            "kernel"
        )
    # A noise below the eigenvalues' rounding errors is none.
    least = floor / (n * cross.matrix_size) if noisy else 0.0
    unbounded = any(math.isinf(each.time) and each.ridge <= least for each in filters)
    if unbounded and smallest <= floor:
        expected, advice = (
            "time: expected a finite one, or a ridge",
            f"set ridge to {floor:.1g} or more, or stop at time {1 / floor:.1g}",
        )
        if noisy:
            expected = f"noise: expected more than {n * least:.1g}"
            advice = f"or set noise to {n * floor:.1g}"
        raise InputError(
            f"{expected}, as the Gram matrix is not positive definite to {cross.dtype} precision "
            f"(smallest eigenvalue of K/N {smallest:.2g}, largest {largest:.3g}); drop coincident "
            f"inputs, {advice}"
        )
