"""The flow, or descent, at one time, and how well it was solved for."""

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray

from dnntk.infinite_depth.solvers import Solver, filtered, residual
from dnntk.infinite_depth.spectral_filter import SpectralFilter

__all__ = ["Solution"]

log = logging.getLogger("dnntk")


@dataclasses.dataclass(frozen=True)
class Solution:
    """The flow at one time: f_t(x) = f_0(x) + k(x, X) coefficients.

    Attributes:
        time: t.
        coefficients: [n, d_out] float64.
        converged: is the residual within the tolerance?
        residual: relative residual of the flow's differential equation, rounding included; at
            t = infinity that of the linear system, for descent that of its last step. About the
            relative error of f_t(X).
        iterations: products with the Gram matrix; 0 for an eigendecomposition. Of a flow on another
            loss than squared error, evaluations of its derivative so far, for all times together.
        condition: effective condition, the largest over the smallest size of the filter, for the
            flow (1 - exp(-t s)) / s, on the eigenvalues s; at t = infinity that of the matrix.
        solver: name of the method.
    """

    time: float
    coefficients: NDArray[np.float64] = dataclasses.field(repr=False)
    converged: bool
    residual: float
    iterations: int
    condition: float
    solver: str

    @classmethod
    def found_by(
        cls, solver: Solver, flow: SpectralFilter, n: int, tolerance: float, *, quiet: bool
    ) -> "Solution":
        """The solution of ``flow`` in ``solver``'s basis; unless ``quiet``, its failure is logged.

        ``n`` is the number of examples.
        """
        coefficients = solver.from_eigenbasis(filtered(solver, flow)) / n
        size, rounding = residual(solver, flow)
        gains = np.abs(flow(solver.values))
        with np.errstate(divide="ignore"):  # a step may undo the one before
            condition = float(gains.max() / gains.min()) if flow.time > 0 else 1.0
        found = cls(
            time=flow.time,
            coefficients=coefficients.reshape(n, -1),
            converged=max(size, rounding) <= tolerance,
            residual=max(size, rounding),
            iterations=solver.iterations,
            condition=condition,
            solver=solver.name,
        )
        if not found.converged and not quiet:
            log.warning(
                "solver: not converged at t = %g: residual %.2g, tolerance %.2g, %d iterations, "
                "effective condition %.2g; add a ridge, or take a shorter time%s",
                *(found.time, found.residual, tolerance, found.iterations, found.condition),
                "" if size <= rounding else ", or allow more iterations or memory",
            )
        return found
