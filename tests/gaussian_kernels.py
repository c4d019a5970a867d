"""A smooth kernel of one output, and of two that are not independent."""

import jax.numpy as jnp

MIXING = jnp.asarray([[2.0, 0.5], [0.5, 1.0]])


def kernel(x1, x2):
    distances = jnp.sum((x1[:, None] - x2[None]) ** 2, -1)
    return 1 + jnp.exp(-3 * distances)


def matrix_kernel(x1, x2):
    return kernel(x1, x2)[:, :, None, None] * MIXING.astype(x1.dtype)[None, None]
