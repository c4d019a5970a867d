"""Initial values of a deep narrow network: deterministic blocks around its random units.

Everything here is in flax's shapes, ``kernel`` [in, out] or [q, q, in, out] and ``bias`` [out],
hidden units in the thesis's order [d_in | 1 | d_out], with M random units [d_in | M | d_out].
Middle layers are stacked on a leading axis of ``depth - 2``. Sources: thesis sections 3.1
(MLP) and 4.0.1 (CNN); He et al. 2015 for ``he_uniform``.
"""

import math

import jax
import jax.numpy as jnp

from dnntk.checks import brief
from dnntk.errors import InputError

__all__ = [
    "INITS",
    "Layer",
    "Layers",
    "baseline",
    "check_init",
    "deep_narrow",
    "layer_shapes",
    "zeros",
]

Layer = dict[str, jax.Array]
Layers = dict[str, Layer]
# Of a baseline's uniform weights: three times the squared gain.
BASELINES = {"he_uniform": 6.0, "torch_default": 1.0}
INITS = ("deep_narrow", *BASELINES)


def layer_shapes(
    depth: int, d_in: int, d_out: int, window: tuple[int, ...], random_units: int = 1
) -> dict[str, tuple]:
    """Kernel shapes of the first, the stacked middle and the last layer.

    ``window`` is () for an MLP and (q, q) for a CNN, where d_in counts channels.
    """
    width = d_in + random_units + d_out
    return {
        "first": (*window, d_in, width),
        "middle": (depth - 2, *window, width, width),
        "last": (*window, width, d_out),
    }


def zeros(shapes: dict[str, tuple], dtype: jnp.dtype) -> Layers:
    """Kernels and biases of zeros: the initial D of the ``ntk`` parametrization."""
    return {
        name: {
            "kernel": jnp.zeros(shape, dtype),
            "bias": jnp.zeros((*shape[:1], shape[-1]) if name == "middle" else shape[-1:], dtype),
        }
        for name, shape in shapes.items()
    }


def identity_filter(size: int, window: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """[(q, q,) size, size]: the identity map, for a CNN a filter that changes no image."""
    eye = jnp.eye(size, dtype=dtype)
    if not window:
        return eye
    return jnp.zeros((*window, size, size), dtype).at[window[0] // 2, window[1] // 2].set(eye)


def deep_narrow(
    units: Layers, depth: int, d_in: int, d_out: int, window: tuple[int, ...], scale: float
) -> Layers:
    """The thesis's literal matrices, from the random units u and v / C of `random_units`."""
    dtype = units["first"]["kernel"].dtype
    count = units["first"]["bias"].size
    layers = zeros(layer_shapes(depth, d_in, d_out, window, count), dtype)
    identity = identity_filter(d_in + count + d_out, window, dtype)
    random, output_units = slice(d_in, d_in + count), slice(d_in + count, None)
    # Each layer computes the random units anew from the input copy, so their identity is cleared.
    middle = jnp.broadcast_to(
        identity.at[..., random, random].set(0.0), layers["middle"]["kernel"].shape
    )
    first, last = layers["first"], layers["last"]
    return {
        "first": {
            "kernel": first["kernel"]
            .at[..., :d_in]
            .set(scale * identity[..., :d_in, :d_in])
            .at[..., random]
            .set(units["first"]["kernel"].reshape(*window, d_in, count)),
            "bias": first["bias"]
            .at[random]
            .set(scale * units["first"]["bias"])
            .at[output_units]
            .set(scale),
        },
        "middle": {
            "kernel": middle.at[..., :d_in, random].set(
                units["middle"]["kernel"].reshape(depth - 2, *window, d_in, count)
            ),
            "bias": layers["middle"]["bias"]
            .at[:, random]
            .set(scale * units["middle"]["bias"].reshape(depth - 2, count)),
        },
        "last": {
            "kernel": last["kernel"]
            .at[..., output_units, :]
            .set(identity[..., output_units, output_units]),
            "bias": last["bias"] - scale,
        },
    }


def baseline(key: jax.Array, shapes: dict[str, tuple], init: str, dtype: jnp.dtype) -> Layers:
    """The comparisons of section 5.2, by fan-in.

    ``he_uniform``: gain sqrt(2), zero biases (He et al. 2015). ``torch_default``: PyTorch's own
    default for linear and convolutional layers, gain 1/sqrt(3), biases uniform too; the "Kaiming"
    runs of the thesis's published code used this one.
    """
    layers = zeros(shapes, dtype)
    for name, layer_key in zip(shapes, jax.random.split(key, 3), strict=True):
        key_kernel, key_bias = jax.random.split(layer_key)
        shape = shapes[name]
        fan_in = math.prod(shape[1:-1] if name == "middle" else shape[:-1])
        bound = math.sqrt(BASELINES[init] / fan_in)
        layers[name]["kernel"] = jax.random.uniform(key_kernel, shape, dtype, -bound, bound)
        if init == "torch_default":
            layers[name]["bias"] = jax.random.uniform(
                key_bias, layers[name]["bias"].shape, dtype, -bound, bound
            )
    return layers


def check_init(init: str, scale: float, parametrization: str) -> None:
    """Raise `InputError` for an initialization that the parametrization cannot represent."""
    if not isinstance(init, str) or init not in INITS:
        raise InputError(f"init: expected one of {', '.join(INITS)}, got {brief(init)}")
    if math.isinf(scale) and (parametrization == "standard" or init != "deep_narrow"):
        raise InputError(
            "scale: infinity needs init='deep_narrow' in parametrization='ntk', got "
            f"init={init!r}, parametrization={parametrization!r}; give a finite scale"
        )
