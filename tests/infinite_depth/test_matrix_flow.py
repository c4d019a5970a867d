"""The flow of a kernel in memory, and its derivative by the kernel."""

import math

import numpy as np
import pytest
from scipy.linalg import expm

from dnntk.infinite_depth import matrix_flow
from dnntk.infinite_depth.matrix_flow import MatrixFlow

TRAIN = 6


@pytest.mark.parametrize("time", [0.01, 1.0, 50.0])
def test_divided_differences_are_those_of_opitz(time):
    values = np.array([0.0, 1e-9, 0.01, 0.01 + 1e-13, 2.0, 15.0])
    found = matrix_flow._divided(values, time)
    np.testing.assert_array_equal(found, found.T)
    # phi_t of [[l, 1], [0, m]] holds the difference in its corner, and is itself the corner block
    # of the exponential of [[-t matrix, t], [0, 0]].
    low, high = np.triu_indices(6)
    whole = np.zeros((len(low), 4, 4))
    whole[:, 0, 0], whole[:, 1, 1] = -time * values[low], -time * values[high]
    whole[:, 0, 1] = -time
    whole[:, 0, 2] = whole[:, 1, 3] = time
    np.testing.assert_allclose(found[low, high], expm(whole)[:, 0, 3], rtol=1e-9)


@pytest.mark.parametrize("time", [20.0, math.inf])
def test_a_change_is_the_derivative_by_the_kernel(time):
    rng = np.random.default_rng(0)
    features, g = rng.uniform(0, 1, (9, 20)), rng.uniform(0, 1, (9, 2, 4))  # two units, four shifts
    kernel, y = features @ features[:TRAIN].T, rng.standard_normal((TRAIN, 2))
    flow = MatrixFlow(kernel, y)
    filters = flow.filters(time)
    found = flow.changes(g, filters)
    assert found.shape == (2, 3, 2)
    for unit, each in enumerate(found):
        change, size = g[:, unit] @ g[:TRAIN, unit].T, 1e-5
        ends = [MatrixFlow(kernel + s * change, y).predict(time) for s in (size, -size)]
        derivative = (ends[0] - ends[1]) / (2 * size)
        np.testing.assert_allclose(
            each, derivative, atol=1e-5 * np.abs(derivative).max(), rtol=1e-4
        )
        np.testing.assert_allclose(flow.change(change, filters), each, rtol=1e-8)
