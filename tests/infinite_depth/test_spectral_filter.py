import math

import numpy as np
import pytest

from dnntk.infinite_depth.spectral_filter import (
    DescentFilter,
    SpectralFilter,
    largest_stable_step,
)


def test_the_filter_is_the_time_where_the_eigenvalue_is_zero():
    found = SpectralFilter(3.0)(np.array([0.0, 1e-12, 2.0]))
    np.testing.assert_allclose(found, [3, 3, (1 - np.exp(-6)) / 2], rtol=1e-9)
    np.testing.assert_allclose(SpectralFilter(math.inf, 0.5)(np.array([1.5])), 0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.999999])
def test_descent_is_its_recursion_for_roots_of_every_kind(momentum):
    """Real, equal and complex roots, and beyond the stable step, in extended precision."""
    step, ridge, root = 0.3, 0.01, math.sqrt(momentum)
    most, double = largest_stable_step(1.0, momentum), (1 - root) ** 2
    rates = [0, double, double * (1 + 1e-15), double * (1 - 1e-7), (1 + root) ** 2, 1, most]
    s = np.concatenate([rates, np.geomspace(1e-12, 1.001 * most, 40)]) / step
    wide = s.astype(np.longdouble) + ridge
    x = v = np.zeros_like(wide)
    for count in range(1, 1002):
        v = momentum * v + wide * x - 1
        x = x - step * v
        if count in (1, 2, 7, 1001):
            time = count * step / (1 - momentum)
            found = DescentFilter(time, ridge, step, momentum)(s)
            scale = np.maximum(np.abs(x), step / max(1, step))
            assert np.abs((found - x) / scale).max() < 1e-10 * count**0.5


def test_many_steps_learn_a_small_eigenvalue():
    found = DescentFilter(1e12, time_step=1e-3)(np.array([0.0, 1e-13, 1e-11]))
    np.testing.assert_allclose(found[0], 1e12, rtol=1e-12)
    np.testing.assert_allclose(found[1:], SpectralFilter(1e12)(np.array([1e-13, 1e-11])), rtol=1e-9)
    assert DescentFilter(0.3, time_step=0.1).steps == 3
    assert DescentFilter(math.inf, time_step=0.1).steps == math.inf
