"""The scan over depth: segments, program and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn, moved

from dnntk import DeepNarrowCNN, DeepNarrowMLP

CASES = {"mlp": (DeepNarrowMLP, (7, 5)), "cnn": (DeepNarrowCNN, (3, 5, 5, 1))}


@pytest.mark.parametrize(("case", "segment"), [("mlp", 4), ("mlp", 100), ("cnn", 4)])
def test_the_segment_changes_memory_alone(case, segment, x64):
    kind, shape = CASES[case]
    model = kind(8, 3, 7.0)
    x = np.random.default_rng(1).uniform(0.1, 1.0, shape)
    variables = moved(drawn(model, x))

    def value_and_grad(model):
        loss = lambda p: jnp.sum(model.apply({**variables, "params": p}, x) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    value, gradient = value_and_grad(model.clone(segment=segment))
    expected, expected_gradient = value_and_grad(model)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("case", CASES)
def test_depth_does_not_grow_the_program(case):
    kind, shape = CASES[case]

    def program(depth):
        model, x = kind(depth, 3, 7.0, segment=2), np.ones(shape, np.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        loss = lambda v, x: jnp.sum(model.apply(v, x))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(variables, x)).count(" = ")

    assert program(102) == program(20002)


@pytest.mark.parametrize("case", CASES)
def test_memory_of_a_gradient_grows_as_the_root_of_depth(case):
    kind, shape = CASES[case]

    def activation_bytes(depth):
        model, x = kind(depth, 1, 7.0), np.ones((256, *shape[1:]), np.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        loss = lambda v, x: jnp.sum(model.apply(v, x))  # noqa: E731
        need = jax.jit(jax.grad(loss)).lower(variables, x).compile().memory_analysis()
        parameters = sum(p.size for p in jax.tree.leaves(variables)) * 4
        return need.temp_size_in_bytes - 2 * parameters

    assert activation_bytes(6400) < 6 * activation_bytes(400)
