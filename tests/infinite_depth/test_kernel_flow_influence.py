import math

import numpy as np
import pytest
from gaussian_kernels import kernel, matrix_kernel

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow

TIMES = (0.0, 2.0, math.inf)
RNG = np.random.default_rng(0)
X, NEW, Y = RNG.uniform(0, 1, (30, 3)), RNG.uniform(0, 1, (4, 3)), RNG.normal(size=(30, 2))
START = RNG.normal(size=(30, 2))


def _flow(k=kernel, y=Y, **options):
    options = {"ridge": 1e-3, "block_size": 16, "tolerance": 1e-10, "progress": False} | options
    return KernelFlow(k, X, y, **options)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_it_is_what_another_target_changes(solver):
    flow = _flow(solver=solver)
    influence = flow.influence(NEW, TIMES)
    assert influence.shape == (3, 4, 30) and not influence[0].any()
    other = Y.copy()
    other[7] += [1.0, -2.0]
    change = _flow(y=other).predict(NEW, TIMES) - _flow().predict(NEW, TIMES)
    expected = influence[:, :, 7, None] * np.array([1.0, -2.0])
    np.testing.assert_allclose(change, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(flow.influence(NEW), influence[2], rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [kernel, matrix_kernel])
def test_predictions_are_made_of_it(k):
    flow = _flow(k, initial=START)
    influence, learnt = flow.influence(NEW, 5.0), flow.predict(NEW, 5.0)
    if k is kernel:
        np.testing.assert_allclose(influence @ (Y - START), learnt, atol=1e-9)
    else:
        assert influence.shape == (4, 2, 30, 2)
        made = np.einsum("xanb,nb->xa", influence, Y - START)
        np.testing.assert_allclose(made, learnt, atol=1e-9)


def test_a_krylov_method_finds_small_entries_of_long_times():
    """Kernel values at the points are far larger than the entries, and hide their errors."""
    x = RNG.uniform(0, 1, (250, 3))
    exact, found = (
        KernelFlow(
            lambda a, b: 100 * kernel(a, b), x, x[:, :1], solver=solver, progress=False
        ).influence(NEW, 1e4)
        for solver in ("eigh", "krylov")
    )
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


def test_bad_points_are_said():
    with pytest.raises(InputError, match=r"x: expected \[n, 3\], as x_train has"):
        _flow().influence(NEW[:, :2])
