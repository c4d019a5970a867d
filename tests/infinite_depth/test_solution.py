import logging
import math

import numpy as np
import pytest

from dnntk.infinite_depth.solution import Solution
from dnntk.infinite_depth.solvers import Eigendecomposition, Krylov
from dnntk.infinite_depth.spectral_filter import SpectralFilter

N = 30
VALUES = np.geomspace(1e-3, 1, N)
BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
MATRIX, TARGETS = (BASIS * VALUES) @ BASIS.T, np.random.default_rng(1).normal(size=(N, 2))


def test_coefficients_and_facts_are_those_of_the_filter():
    solver, flow = Eigendecomposition(MATRIX.copy(), TARGETS), SpectralFilter(math.inf, 0.1)
    found = Solution.found_by(solver, flow, N, 1e-9, quiet=False)
    expected = np.linalg.solve(MATRIX + 0.1 * np.eye(N), TARGETS) / N
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-9)
    assert found.converged and found.iterations == 0 and found.time == math.inf
    assert found.condition == pytest.approx(1.1 / 0.101)


@pytest.mark.parametrize("quiet", [True, False])
def test_what_has_not_converged_is_logged_unless_quiet(quiet, caplog):
    solver = Krylov(lambda v: MATRIX @ v, TARGETS, max_iterations=2, progress=False)
    flow = SpectralFilter(1e4)
    solver.refine([flow], 1e-9)
    with caplog.at_level(logging.WARNING, "dnntk"):
        assert not Solution.found_by(solver, flow, N, 1e-9, quiet=quiet).converged
    assert ("not converged at t = 10000" in caplog.text) != quiet
