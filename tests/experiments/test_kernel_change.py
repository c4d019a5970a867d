"""How far a kernel moved, and how well it agrees with the labels."""

import math

import numpy as np
import pytest

from dnntk.experiments.kernel_change import alignment, movement


def test_alignment_and_movement_of_kernels():
    y, features = np.eye(3)[[0, 1, 2, 0, 1, 0]], np.random.default_rng(0).normal(size=(6, 4))
    kernel = features @ features.T
    assert alignment(5 * y @ y.T + 3, y) == pytest.approx(1)
    value = alignment(kernel, y)
    assert 0 < value < 1
    assert alignment(7 * kernel + 2, y) == pytest.approx(value)
    order = np.random.default_rng(0).permutation(6)
    assert alignment(kernel[order][:, order], y[order]) == pytest.approx(value)
    full = kernel[:, :, None, None] * np.eye(3)
    assert alignment(full, y) == pytest.approx(value)
    assert math.isnan(alignment(np.ones((6, 6)), y))
    assert movement(kernel, kernel) == 0 and movement(kernel, -kernel) == pytest.approx(2)
