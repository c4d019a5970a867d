"""The layerwise NTK: independent of its segments, and small in memory and program."""

import jax
import numpy as np
import pytest
from networks import drawn, moved

from dnntk import DeepNarrowMLP, empirical_ntk
from dnntk.ntk import layerwise


@pytest.mark.parametrize("segment", [3, 9])
def test_the_segment_does_not_change_the_kernel(segment, x64):
    model = DeepNarrowMLP(6, 3, 6.0)
    x = np.random.default_rng(0).uniform(0.1, 1, (5, 4))
    variables = moved(drawn(model, x), 4.0)
    expected = np.asarray(empirical_ntk(model, variables, x))
    found = empirical_ntk(model.clone(segment=segment), variables, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14 * np.abs(expected).max())


def test_the_program_does_not_grow_with_depth():
    sizes = []
    x = np.ones((5, 4), np.float32)
    for depth in (400, 10_000):
        model = DeepNarrowMLP(depth, 3, 6.0)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        lowered = jax.jit(lambda v, x, m=model: empirical_ntk(m, v, x)).lower(variables, x)
        sizes.append(len(lowered.as_text()))
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


def test_no_jacobian_is_formed():
    """Memory beside the result: of the order of a few layers' arrays, not of all parameters'."""
    model = DeepNarrowMLP(100, 10, 100**2.2)
    x = np.ones((8, 100), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    lowered = jax.jit(lambda v: empirical_ntk(model, v, x)).lower(variables)
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    parameters = sum(p.size for p in jax.tree.leaves(variables["params"]))
    assert used < 4 * parameters * len(x) * 10 / 20


def test_segments_take_few_elements_per_example():
    deep = DeepNarrowMLP(1_000_000, 1, 1e9)
    assert layerwise.choose_segments(deep, (2,)).elements < 100_000
