"""A residual network is what its formula says, in NumPy and SciPy, with He's initial values."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from dnntk.experiments.residual import RESIDUAL, ResidualNetwork


@pytest.mark.parametrize("init", RESIDUAL)
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5, 2)], ids=["mlp", "cnn"])
def test_outputs_are_those_of_the_formula(init, shape):
    model = ResidualNetwork(6, 3, RESIDUAL[init])
    x = np.random.default_rng(0).normal(size=shape)
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda p: np.asarray(p) + 0.1, model.init(jax.random.key(0), x)["params"]
        )
        outputs = model.apply({"params": params}, x)

    def layer(h, kernel, bias):
        if h.ndim == 2:
            return h @ kernel + bias
        kernel = kernel.reshape(3, 3, h.shape[-1], -1)
        maps = [
            sum(
                ndimage.correlate(image[..., i], kernel[..., i, o], mode="constant")
                for i in range(kernel.shape[2])
            )
            for image in h
            for o in range(kernel.shape[3])
        ]
        return np.stack(maps, -1).reshape(*h.shape[1:3], len(h), -1).transpose(2, 0, 1, 3) + bias

    h, m = layer(x, **params["first"]), {"residual": 1, "depth_mup": 6**-0.5}[init]
    blocks = params["blocks"]["layer"]
    for kernel, bias in zip(blocks["kernel"], blocks["bias"], strict=True):
        h = h + m * layer(np.maximum(h, 0), kernel, bias)
    expected = layer(np.maximum(h, 0), **params["last"]).reshape(shape[0], -1, 3).mean(1)
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)


def test_blocks_are_drawn_apart_by_he_with_zero_biases():
    params = ResidualNetwork(500, 2, 0.0).init(jax.random.key(0), np.ones((2, 5), np.float32))
    blocks = params["params"]["blocks"]["layer"]
    assert blocks["kernel"].shape == (498, 8, 8) and not blocks["bias"].any()
    np.testing.assert_allclose(np.var(blocks["kernel"]), 2 / 8, rtol=0.02)
    assert len(np.unique(blocks["kernel"][:, 0, 0])) == 498


def test_two_layers_have_no_block():
    model, x = ResidualNetwork(2, 3, 0.0), np.ones((2, 5), np.float32)
    assert model.init_with_output(jax.random.key(0), x)[0].shape == (2, 3)
