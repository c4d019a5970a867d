"""Baselines of benchmark.py: what a competent user would write in plain JAX instead of `dnntk`.

Each baseline is the definition or the printed formula, jitted, in the fastest form found. The only
shared code is `dnntk.kernel.gram.blockwise`, so that both sides work in bounded memory.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dnntk.kernel.gram import blockwise
from dnntk.networks.initializers import Layer, Layers

__all__ = ["limit_cnn", "product", "unrolled_ntk", "unstacked"]

# Covariances at a time in `limit_cnn`: on 2 cores, 2^16 and 2^20 were slower.
ELEMENTS = 2**18


def unstacked(params: Layers) -> list[Layer]:
    """The literal matrices of `dnntk.to_standard` as a list of layers."""
    depth = len(params["middle"]["bias"])
    middle = [{name: p[i] for name, p in params["middle"].items()} for i in range(depth)]
    return [params["first"], *middle, params["last"]]


@partial(jax.jit, static_argnames="join")
def unrolled_ntk(layers: Sequence[Layer], x: jax.Array, join: bool = False) -> jax.Array:
    """J(x) J(x)^T of an MLP, a Python loop over its layers: [n, n, d_out, d_out].

    The Jacobians are contracted leaf by leaf, as in libraries for general networks, or with
    ``join`` concatenated first.
    """

    def outputs(layers: Sequence[Layer], h: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
        return h @ layers[-1]["kernel"] + layers[-1]["bias"]

    jacobians = jax.vmap(jax.jacrev(outputs), (None, 0))(layers, x)
    rows = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobians)]
    rows = [jnp.concatenate(rows, -1)] if join else rows
    products = [jnp.einsum("nkp,mlp->nmkl", row, row, precision="highest") for row in rows]
    return sum(products[1:], start=products[0])


@partial(jax.jit, static_argnames="kernel_size")
def limit_cnn(x1: jax.Array, x2: jax.Array | None = None, kernel_size: int = 3) -> jax.Array:
    """The CNN's limit kernel [n1, n2] of NHWC images by its formula, at rho = beta = d_out = 1."""
    height, width = x1.shape[1:3]
    shared = jnp.asarray(_shared_windows(height, width, kernel_size), x1.dtype)

    def pair(x1: jax.Array, x2: jax.Array) -> jax.Array:
        patches1, patches2 = _patches(x1, kernel_size), _patches(x2, kernel_size)
        variance1, variance2 = (jnp.sum(p**2, -1) + 1 for p in (patches1, patches2))
        columns = patches2.swapaxes(1, 2)

        def position(total: jax.Array, row: tuple) -> tuple[jax.Array, None]:
            patch, variance, weight = row
            covariance = jnp.matmul(patch, columns, precision="highest") + 1
            expected = _expected_relus(variance[:, None], variance2[:, None], covariance)
            return total + jnp.sum(weight[:, None, None] * expected, 0), None

        start = jnp.zeros((len(x1), len(x2)), x1.dtype)
        total, _ = lax.scan(position, start, (patches1, variance1, shared))
        pixels1, pixels2 = (x.reshape(len(x), height * width, -1) for x in (x1, x2))
        sums = jnp.einsum("npc,pq->nqc", pixels1, shared, precision="highest")
        total += jnp.einsum("nqc,mqc->nm", sums, pixels2, precision="highest")
        return (total + jnp.sum(shared)) / (height * width) ** 2

    return blockwise(pair, x1, x2, max(1, ELEMENTS // (height * width)))


@jax.jit
def product(x1: jax.Array, x2: jax.Array) -> jax.Array:
    """x1 x2^T."""
    return jnp.matmul(x1, x2.T, precision="highest")


def _expected_relus(variance1: jax.Array, variance2: jax.Array, covariance: jax.Array) -> jax.Array:
    """E[relu relu] as Cho & Saul (2009) print it."""
    root = jnp.sqrt(jnp.maximum(variance1 * variance2 - covariance**2, 0))
    return (root + (jnp.pi - jnp.arctan2(root, covariance)) * covariance) / (2 * jnp.pi)


def _patches(x: jax.Array, kernel_size: int) -> jax.Array:
    """Zero-padded patches around every position: [HW, n, c kernel_size^2]."""
    window, names = (kernel_size, kernel_size), ("NHWC", "HWIO", "NHWC")
    patches = lax.conv_general_dilated_patches(
        x, window, (1, 1), "SAME", dimension_numbers=names, precision=lax.Precision.HIGHEST
    )
    return patches.reshape(len(x), -1, patches.shape[-1]).swapaxes(0, 1)


def _shared_windows(height: int, width: int, kernel_size: int) -> np.ndarray:
    """Number of filter shifts that keep both of two positions inside the image: [HW, HW]."""
    shifts = range(-(kernel_size // 2), kernel_size // 2 + 1)
    rows, columns = (
        np.array([[0 <= i + shift < size for shift in shifts] for i in range(size)])
        for size in (height, width)
    )
    members = np.kron(rows, columns).astype(float)
    return members @ members.T
