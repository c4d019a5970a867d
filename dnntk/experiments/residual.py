"""Residual networks as wide as deep narrow ones, to compare them with where rates carry over.

One layer a block, before it a ReLU (He et al. 2016), He-initialized as section 5.2's baselines:
h_{l+1} = h_l + m (W_l relu(h_l) + b_l). With m = 1 the states grow as 2^(depth / 2); with m =
1 / sqrt(depth), a constant rate of sgd and a rate of Adam that falls as 1 / sqrt(depth), this is
depth-muP (Bordelon et al. 2024; Yang et al. 2024, "Tensor Programs VI") at a constant width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["RESIDUAL", "ResidualNetwork"]

# The power of depth in m.
RESIDUAL = {"residual": 0.0, "depth_mup": -0.5}


def _layer(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.he_uniform(), name=name)


def _read(h: jax.Array) -> jax.Array:
    """What a layer multiplies: of images their 3 x 3 patches, four times faster than `nn.Conv`."""
    if h.ndim == 2:
        return h
    height, width = h.shape[1:3]
    padded = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class _Block(nn.Module):
    multiplier: float

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return h + self.multiplier * _layer(h.shape[-1], "layer")(_read(nn.relu(h))), None


class ResidualNetwork(nn.Module):
    """A residual MLP or CNN, whose inputs' rank chooses: `dnntk.DeepNarrowMLP`'s width and depth.

    Attributes:
        depth: weight layers: the first, depth - 2 blocks, the last.
        d_out: output dimension.
        power: m is depth to this power.

    Apply it to x [n, d_in] or [n, H, W, channels]; the result is [n, d_out], of images the average
    over the pixels.
    """

    depth: int
    d_out: int
    power: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs to outputs [n, d_out]."""
        h = _layer(x.shape[-1] + 1 + self.d_out, "first")(_read(x))
        if self.depth > 2:
            length = self.depth - 2
            blocks = nn.scan(_Block, {"params": 0}, split_rngs={"params": True}, length=length)
            h, _ = blocks(self.depth**self.power, name="blocks")(h, None)
        f = _layer(self.d_out, "last")(_read(nn.relu(h)))
        return f.mean((1, 2)) if x.ndim == 4 else f
