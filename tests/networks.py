"""Networks that many tests begin with, initialized once."""

import functools

import jax
import numpy as np


def initialized(model, x, seed=0):
    """Variables of a model by the key of ``seed``; of x only the shape matters."""
    return _initialized(model, x.shape, np.dtype(x.dtype), seed, jax.config.jax_enable_x64)


@functools.cache
def _initialized(model, shape, dtype, seed, x64):
    return jax.jit(model.init)(jax.random.key(seed), np.ones(shape, dtype))


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables, x):
    """As ``model.apply``, whose operations would be compiled one by one."""
    return model.apply(variables, x)


def moved(variables, size=3.0):
    """Variables as training might leave them: every D far from 0."""
    rng = np.random.default_rng(7)
    noisy = lambda p: (np.asarray(p) + size * rng.standard_normal(p.shape)).astype(p.dtype)  # noqa: E731
    return {**variables, "params": jax.tree.map(noisy, variables["params"])}
