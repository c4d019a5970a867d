import math

import numpy as np
import pytest

from dnntk.infinite_depth.solvers import Eigendecomposition, Krylov, residual
from dnntk.infinite_depth.spectral_filter import SpectralFilter

M, TOLERANCE = 60, 1e-9
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(M, M)))[0]
MATRIX = (BASIS * np.geomspace(1e-3, 1, M)) @ BASIS.T
TARGETS = RNG.normal(size=(M, 2))


def _krylov(targets=TARGETS, most=100):
    return Krylov(lambda v: MATRIX @ v, targets, max_iterations=most, progress=False)


def _learnt(solver, flow):
    """phi(A) B, and A phi(A) B."""
    solver.refine([flow], TOLERANCE)
    components = flow(solver.values)[:, None] * solver.targets
    return solver.from_eigenbasis(components), solver.apply_matrix(components)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_both_solvers_find_the_functions_of_the_matrix(ridge):
    grown = _krylov()
    for time in (0.0, 2.0, 1e3, math.inf):
        flow = SpectralFilter(time, ridge)
        expected = (BASIS * flow(np.geomspace(1e-3, 1, M))) @ BASIS.T @ TARGETS
        for solver in (grown, Eigendecomposition(MATRIX.copy(), TARGETS)):
            found, applied = _learnt(solver, flow)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(applied, MATRIX @ expected, rtol=0, atol=1e-8)


def test_the_residual_is_that_of_the_linear_system():
    early, flow = _krylov(most=4), SpectralFilter(math.inf)
    found, _ = _learnt(early, flow)
    true = np.linalg.norm(TARGETS - MATRIX @ found) / np.linalg.norm(TARGETS)
    assert residual(early, flow)[0] == pytest.approx(true, rel=1e-6)
    assert early.iterations == 4 and true > TOLERANCE


def test_longer_times_go_on_from_the_basis_that_is_there():
    solver = _krylov()
    _learnt(solver, SpectralFilter(1.0))
    few = solver.iterations
    _learnt(solver, SpectralFilter(1.0))
    assert solver.iterations == few
    _learnt(solver, SpectralFilter(1e6))
    assert solver.iterations > few and residual(solver, SpectralFilter(1e6))[0] <= TOLERANCE


def test_targets_that_are_zero_or_dependent():
    flow = SpectralFilter(3.0)
    assert not _learnt(_krylov(np.zeros((M, 2))), flow)[0].any()
    doubled = _learnt(_krylov(np.concatenate([TARGETS, TARGETS], 1)), flow)[0]
    expected = _learnt(_krylov(), flow)[0]
    np.testing.assert_allclose(doubled, np.concatenate([expected, expected], 1), rtol=0, atol=1e-9)
