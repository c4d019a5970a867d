import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_system import KernelSystem
from dnntk.infinite_depth.solvers import Krylov
from dnntk.infinite_depth.spectral_filter import DescentFilter, SpectralFilter

RNG = np.random.default_rng(0)
X, NEW, TARGETS = RNG.normal(size=(15, 20)), RNG.normal(size=(4, 20)), RNG.normal(size=(2, 15, 1))
OPTIONS = {"tolerance": 1e-9, "max_iterations": 50, "block_size": 6, "memory": None}
OPTIONS |= {"dtype": "float64", "gram": None, "folder": None, "progress": False}


def _system(solver="auto", calls=None):
    def kernel(a, b):
        if calls is not None:
            calls.append(1)
        return a @ b.T

    return KernelSystem(kernel, X, solver=solver, **OPTIONS)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_targets_share_the_matrix_and_its_eigenvectors(solver):
    calls = []
    system = _system(solver, calls)
    for targets in TARGETS:
        found = system.refine(system.solver_of(targets), [SpectralFilter(np.inf, 0.1)])
        components = SpectralFilter(np.inf, 0.1)(found.values)[:, None] * found.targets
        expected = np.linalg.solve(X @ X.T / 15 + 0.1 * np.eye(15), targets)
        np.testing.assert_allclose(found.from_eigenbasis(components), expected, rtol=1e-7)
        assert len(calls) == 1 + 6  # of one example, and six tiles
    assert isinstance(found, Krylov) == (solver == "krylov")


def test_products_are_with_the_kernel_of_new_points():
    found = _system().product(NEW, TARGETS[0])
    np.testing.assert_allclose(found, NEW @ X.T @ TARGETS[0], rtol=1e-12)


def test_points_of_another_shape_and_steps_too_large_are_refused():
    system = _system()
    with pytest.raises(InputError, match=r"x: expected \[n, 20\], as x_train has, got shape"):
        system.points(NEW[:, :3])
    with pytest.raises(InputError, match="time_step: expected less than max_time_step"):
        system.refine(system.solver_of(TARGETS[0]), [DescentFilter(np.inf, 0.0, 9.0)])
