"""A parameter's style follows its exact value."""

import jax
import numpy as np
import pytest

from dnntk import DeepNarrowMLP, to_standard
from dnntk.experiments.parameter_styles import (
    bias_styles,
    filter_styles,
    network_styles,
    weight_styles,
)
from dnntk.figures.initialization import Style

NONE, SOLID, DOUBLE, DASHED, DOUBLE_DASHED = Style


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_changed_number_changes_one_style(dtype):
    c = 5**2.2  # not a float32
    for size in (1, 3, 5):
        kernel, middle = np.zeros((2, size, size, 3, 4), dtype), size // 2
        kernel[0, middle, middle] = np.eye(3, 4)
        kernel[1, middle, middle] = c * np.eye(3, 4)
        before = filter_styles(kernel, c)
        np.testing.assert_array_equal(before[0], np.where(np.eye(3, 4, dtype=bool), SOLID, NONE))
        np.testing.assert_array_equal(before[1], np.where(np.eye(3, 4, dtype=bool), DOUBLE, NONE))
        rng = np.random.default_rng(size)
        for new in (np.nextafter(dtype(1), dtype(2)), -1.0, 1e-20, c * (1 + 1e-6), np.nan):
            where = tuple(int(rng.integers(n)) for n in kernel.shape)
            changed = kernel.copy()
            changed[where] = new
            after = filter_styles(changed, c)
            assert after[where[0], where[3], where[4]] == DASHED
            assert np.sum(after != before) == 1
    # A 1 beside the centre is no identity, nor is a 1 at the centre with company.
    shifted, crowded = np.zeros((2, 3, 3, 1, 1), dtype)
    shifted[0, 1] = crowded[1, 1] = crowded[2, 2] = 1
    assert filter_styles(shifted, c) == filter_styles(crowded, c) == DASHED
    weights = np.array([[0, 1, c, -c, 0.3]], dtype)
    assert weight_styles(weights, c).tolist() == [[NONE, SOLID, DOUBLE, DASHED, DASHED]]
    styles = [SOLID, DASHED, DOUBLE, DOUBLE_DASHED, DASHED]
    assert bias_styles(weights[0], c).tolist() == styles


def test_a_trained_weight_of_the_ntk_form_loses_its_style():
    model, x = DeepNarrowMLP(4, 2, 50.0), np.ones((1, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    literal = jax.jit(lambda variables: to_standard(model, variables)[1]["params"])
    before = network_styles(literal(variables), 50.0)
    middle = variables["params"]["middle"]
    middle = {"kernel": middle["kernel"].at[1, 0, 4].set(2), "bias": middle["bias"].at[1, 5].set(1)}
    trained = variables | {"params": variables["params"] | {"middle": middle}}
    after = network_styles(literal(trained), 50.0)
    for kind, where, was in ((0, [0, 4], NONE), (1, [5], SOLID)):
        changed = [
            np.argwhere(a != b).tolist() for a, b in zip(after[kind], before[kind], strict=True)
        ]
        assert changed == [[], [], [where], []]
        assert before[kind][2][*where] == was and after[kind][2][*where] == DASHED
