"""Networks that many tests begin with, initialized once."""

import functools
import math

import jax
import numpy as np

from dnntk.networks.initializers import layer_shapes


def initialized(model, x, seed=0):
    """Variables of a model by the key of ``seed``; of x only the shape matters."""
    return _initialized(model, x.shape, np.dtype(x.dtype), seed, jax.config.jax_enable_x64)


@functools.cache
def _initialized(model, shape, dtype, seed, x64):
    return jax.jit(model.init)(jax.random.key(seed), np.ones(shape, dtype))


def drawn(model, x, seed=0):
    """Variables as ``model.init`` distributes them, drawn by NumPy: nothing is compiled.

    But for the literal matrices of ``deep_narrow``, which the model builds.
    """
    if model.parametrization == "standard" and model.initialization == "deep_narrow":
        return jax.device_get(initialized(model, x))
    rng, d_in = np.random.default_rng(seed), x.shape[-1]
    window = (model.kernel_size,) * 2 if x.ndim == 4 else ()
    shapes = layer_shapes(model.depth, d_in, model.d_out, window, model.random_units)

    def layers(draw):
        return {
            name: {
                "kernel": draw("kernel", name, shape),
                "bias": draw("bias", name, (*shape[:1], shape[-1])[name != "middle" :]),
            }
            for name, shape in shapes.items()
        }

    def baseline(kind, name, shape):
        fan_in = math.prod(shapes[name][name == "middle" : -1])
        he = model.initialization == "he_uniform"
        bound = math.sqrt((6 if he else 1) / fan_in)
        return rng.uniform(-bound, bound, shape) * (kind == "kernel" or not he)

    def units(lead):
        each = (model.random_units,) * (model.random_units > 1)
        size = np.array([model.rho / (1 if window else math.sqrt(d_in)), model.beta])
        size /= math.sqrt(model.random_units)
        kernel = size[0] * rng.standard_normal((*lead, *window, d_in, *each))
        return {"kernel": kernel, "bias": np.asarray(size[1] * rng.standard_normal((*lead, *each)))}

    made = {"params": layers(lambda kind, name, shape: np.zeros(shape))}
    if model.parametrization == "standard":
        made = {"params": layers(baseline)}
    elif model.initialization == "deep_narrow":
        made["initial"] = {"first": units(()), "middle": units((model.depth - 2,))}
    else:
        made["initial"] = layers(baseline)
    return jax.tree.map(lambda a: a.astype(jax.dtypes.canonicalize_dtype(x.dtype)), made)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables, x):
    """As ``model.apply``, whose operations would be compiled one by one."""
    return model.apply(variables, x)


def moved(variables, size=3.0):
    """Variables as training might leave them: every D far from 0."""
    rng = np.random.default_rng(7)
    noisy = lambda p: (np.asarray(p) + size * rng.standard_normal(p.shape)).astype(p.dtype)  # noqa: E731
    return {**variables, "params": jax.tree.map(noisy, variables["params"])}
