"""Features whose products are the limit kernel: linear memory for a million examples.

The limit kernel is an average over random units (u, v), and relu(g) = g/2 + |g|/2. So

    E[relu(g) relu(g')] = E[g g'] / 4 + E[|g| |g'|] / 4,    g = u x + v,

whose first term is bilinear in the inputs, like the rest of the kernel: exact features hold both.
Only the second term is an average over drawn units (Rahimi & Recht 2007, "Random features for
large-scale kernel machines"; Cho & Saul 2009). Its error is a half to a fifth of that of features
relu(g), as g/2 times |g'|/2, which is 0 on average, does not occur. It falls as 1/sqrt(m) with m
independent units, and in few dimensions as 1/m with m points of a Sobol sequence.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from dnntk.networks.initializers import Layer
from dnntk.networks.random_units import units_up_to_sign
from dnntk.ntk.random_features import Batch

__all__ = ["draw_units", "limit_features"]


Number = float | jax.Array


@partial(jax.jit, static_argnums=(1, 2, 3, 6))
def draw_units(
    key: jax.Array,
    features: str,
    count: int,
    shape: tuple[int, ...],
    rho: Number,
    beta: Number,
    dtype: jnp.dtype,
) -> Layer:
    """Random units of the limit: u in ``kernel`` [count, *shape], v in ``bias`` [count].

    Args:
        key: of the draw.
        features: one of `dnntk.networks.random_units.EVEN_FEATURES`.
        count: of the units.
        shape: what a unit reads: (d_in,) in an MLP, (q, q, c) in a CNN.
        rho: standard deviation of u, in an MLP times sqrt(d_in).
        beta: standard deviation of v.
        dtype: of the units.

    Raises:
        InputError: ``features="sobol"``, and a unit has more numbers than the sequence.
    """
    points = units_up_to_sign(key, features, count, math.prod(shape) + 1, dtype)
    deviation = rho / (math.sqrt(shape[0]) if len(shape) == 1 else 1.0)
    kernel = deviation * points[:, 1:].reshape(count, *shape)
    return {"kernel": kernel, "bias": beta * points[:, 0]}


def limit_features(
    x: jax.Array, units: Layer, rho: Number, beta: Number, d_out: int = 1
) -> jax.Array:
    """Phi(x) with Phi(x) Phi(x')^T = `dnntk.kernel.limit_ntk` in the mean over the units.

    Args:
        x: [n, d_in], or NHWC images [n, H, W, c]; of any sign, as `limit_ntk` takes them.
        units: m units of `draw_units`; those of a CNN know its filter's side q.
        rho: with which the units were drawn.
        beta: likewise.
        d_out: output dimension of the network.

    Returns:
        [n, d_in + 1 + m]: the inputs, a constant, and |u x + v| / (2 sqrt(m)). For images
        [n, q^2 (c + q^2 c + m) + 1]: for each shift of the filter, means over the image of what the
        shift leaves inside, of the inputs, patches and units; and a constant.
    """
    kernel, count = units["kernel"], len(units["bias"])
    batch = Batch.of(x, kernel.shape[1])
    random = batch.units(units, jnp.abs) / (2 * math.sqrt(count))
    constant = jnp.sqrt((d_out + beta**2 / 4) * jnp.sum(batch.ones()[:1] ** 2))
    if x.ndim == 2:
        linear = [jnp.sqrt(1 + rho**2 / (4 * x.shape[1])) * x]
    else:
        linear = [batch.inputs(), batch.means(rho / 2 * batch.patches[:, :, :-1])]
    constant = jnp.broadcast_to(constant.astype(x.dtype), (len(x), 1))
    return jnp.concatenate([*linear, constant, random], 1)
