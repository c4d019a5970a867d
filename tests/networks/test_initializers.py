import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk import DeepNarrowCNN, DeepNarrowMLP


def literal(model, shape):
    return jax.jit(model.clone(parametrization="standard").init)(
        jax.random.key(3), np.ones(shape, np.float32)
    )["params"]


def test_mlp_blocks_are_section_3_1s():
    c, d_in, d_out = 50.0, 3, 2
    params = literal(DeepNarrowMLP(6, d_out, c), (1, d_in))
    first, middle, last = params["first"], params["middle"], params["last"]
    eye = np.eye(d_in + 1 + d_out)
    np.testing.assert_array_equal(first["kernel"][:, :d_in], c * eye[:d_in, :d_in])
    np.testing.assert_array_equal(first["kernel"][:, d_in + 1 :], 0)
    np.testing.assert_array_equal(first["bias"][:d_in], 0)
    np.testing.assert_array_equal(first["bias"][d_in + 1 :], c)
    assert np.all(first["kernel"][:, d_in] != 0) and first["bias"][d_in] != 0
    for kernel, bias in zip(middle["kernel"], middle["bias"], strict=True):
        expected = eye.copy()
        expected[:, d_in] = 0
        expected[:d_in, d_in] = kernel[:d_in, d_in]
        np.testing.assert_array_equal(kernel, expected)
        assert np.all(kernel[:d_in, d_in] != 0)
        np.testing.assert_array_equal(np.delete(bias, d_in), 0)
    np.testing.assert_array_equal(last["kernel"], eye[:, d_in + 1 :])
    np.testing.assert_array_equal(last["bias"], -c)


def test_cnn_blocks_are_section_4_0_1s():
    c = 20.0
    params = literal(DeepNarrowCNN(4, 1, c), (1, 5, 5, 1))
    delta = np.zeros((3, 3))
    delta[1, 1] = 1
    np.testing.assert_array_equal(params["first"]["kernel"][:, :, 0, 0], c * delta)
    np.testing.assert_array_equal(params["first"]["kernel"][:, :, 0, 2], 0)
    for kernel in params["middle"]["kernel"]:
        np.testing.assert_array_equal(kernel[:, :, 0, 0], delta)
        np.testing.assert_array_equal(kernel[:, :, 2, 2], delta)
        assert np.all(kernel[:, :, 0, 1] != 0)
        for i, o in ((1, 0), (2, 0), (1, 1), (2, 1), (0, 2), (1, 2)):
            np.testing.assert_array_equal(kernel[:, :, i, o], 0)
    np.testing.assert_array_equal(
        params["last"]["kernel"][:, :, :, 0], np.stack([0 * delta, 0 * delta, delta], -1)
    )
    np.testing.assert_array_equal(params["last"]["bias"], -c)


def test_gaussians_have_the_stated_deviations():
    c, rho, beta, depth = 30.0, 0.5, 0.7, 20000
    mlp = literal(DeepNarrowMLP(depth, 1, c, rho, beta), (1, 4))["middle"]
    cnn = literal(DeepNarrowCNN(depth, 1, c, rho, beta), (1, 3, 3, 2))["middle"]
    for values, expected in (
        (mlp["kernel"][:, :4, 4], rho / 2),
        (mlp["bias"][:, 4], c * beta),
        (cnn["kernel"][:, :, :, :2, 2], rho),
        (cnn["bias"][:, 2], c * beta),
    ):
        # Five standard errors of a deviation estimated from so many normal values.
        error = 5 / np.sqrt(2 * values.size)
        assert abs(np.std(values) / expected - 1) < error
        assert abs(np.mean(values) / expected) < 5 / np.sqrt(values.size)


@pytest.mark.parametrize(
    ("init", "gain", "model"),
    [
        ("he_uniform", np.sqrt(2), DeepNarrowMLP(2000, 1, 1.0)),
        ("he_uniform", np.sqrt(2), DeepNarrowCNN(2000, 1, 1.0)),
        ("torch_default", np.sqrt(1 / 3), DeepNarrowCNN(2000, 1, 1.0)),
    ],
)
def test_baselines_have_the_stated_gain(init, gain, model):
    shape = (1, 9) if isinstance(model, DeepNarrowMLP) else (1, 4, 4, 1)
    params = literal(model.clone(initialization=init), shape)
    kernel = params["middle"]["kernel"]
    fan_in = np.prod(kernel.shape[1:-1])
    bound = gain * np.sqrt(3 / fan_in)
    assert bound * 0.999 < np.abs(kernel).max() <= bound
    assert abs(np.std(kernel) / (gain / np.sqrt(fan_in)) - 1) < 5 / np.sqrt(kernel.size)
    biases = np.abs(params["middle"]["bias"])
    assert (biases.max() == 0) if init == "he_uniform" else (0.99 * bound < biases.max() <= bound)


def test_a_seed_gives_one_initialization_and_layers_differ():
    model, x = DeepNarrowMLP(50, 1, 2.0), jnp.ones((1, 3))
    init = jax.jit(model.init)
    once, again = (init(jax.random.key(5), x) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert len(np.unique(once["initial"]["middle"]["bias"])) == 48
