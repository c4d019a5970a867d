"""All middle layers in one call on CPU: outputs, gradients and tangents of deep narrow networks.

A layer of a few channels on a small image is less work than the call of an operation costs, a
thousand times over. The library takes a block of examples through all layers and back before the
next one (`dnntk.native.blocks`), so no state outlives its block.

`sgd_step` changes every layer as soon as its gradient is known, which is never stored: where layers
are wide, or a core takes no more than one block of examples. `sgd_steps` takes many steps of narrow
MLPs without leaving the library: returning to JAX takes as long as twenty layers.

The results are those of `dnntk.networks.layers.forward` and its derivatives, to rounding; first and
last layer are plain JAX, except in `sgd_steps`. `dnntk.training.engine` chooses between the two.
"""

import dataclasses
from typing import Any, NamedTuple, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dnntk.native import build
from dnntk.native.blocks import Blocks, CpuBudget, is_wide
from dnntk.networks.initializers import Layer, Layers
from dnntk.networks.layers import Convolution, Dense, Network
from dnntk.networks.models import DeepNarrow, network_of

__all__ = [
    "forward",
    "gradient",
    "sgd_step",
    "sgd_steps",
    "supports",
    "supports_sgd_step",
    "supports_sgd_steps",
    "tangent",
]

# Filters that the library has code for, and the most channels: a wider convolution is at home in
# one large matrix product.
FILTER_SIDES, MAX_CHANNELS = (1, 3, 5), 256


def supports(model: nn.Module, params: Any, x: Any) -> TypeGuard[DeepNarrow]:
    """Does the CPU library take ``model`` at ``params`` on inputs like ``x``?"""
    return (
        isinstance(model, DeepNarrow)
        and model.depth > 2
        and model.random_units == 1
        and (x.ndim == 2 or x.shape[-1] + 1 + model.d_out <= MAX_CHANNELS)
        and getattr(model, "kernel_size", 1) in FILTER_SIDES
        and x.dtype in (np.float32, np.float64)
        and all(p.dtype == x.dtype for p in jax.tree.leaves(params))
        and build.available()
    )


def supports_sgd_step(model: DeepNarrow, x: Any) -> bool:
    """Does `sgd_step` save the gradient's memory on a batch like ``x``, all cores at work?

    Only if every block of examples has its own thread. Otherwise a block that finishes early must
    keep its whole gradient in memory until the next block adds to it.
    """
    budget = CpuBudget.of(1)
    return Blocks.for_batch(model, x, budget).number <= budget.threads


def supports_sgd_steps(model: DeepNarrow, x: Any) -> bool:
    """Does `sgd_steps` take ``model`` on a batch like ``x``?"""
    narrow = Blocks.for_batch(model, x, CpuBudget.of(1)).number > 0
    return x.ndim == 2 and narrow and supports_sgd_step(model, x)


def forward(
    model: DeepNarrow, params: Any, frozen: Any, x: jax.Array, budget: CpuBudget
) -> jax.Array:
    """Outputs [n, d_out] of ``model.apply``; not differentiable."""
    network, layers, initial = network_of(model, {"params": params, **frozen}, x)
    h = network.activate(_first_z(network, layers["first"], initial))
    h = _call("forward", h, _common(network, layers, initial, h, budget))
    return _last_layer(network, layers["last"], initial, h)


def gradient(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    budget: CpuBudget,
) -> tuple[jax.Array, Any]:
    """Outputs f and J^T (factor f + shift), J the outputs' Jacobian by ``params``.

    With factor = weight [n] and shift = -weight y [n, d_out] that is the gradient of the sum of
    weight / 2 ||f - y||^2, in one forward and backward pass; with factor = 0 it is J^T shift.

    Returns:
        (f [n, d_out], a tree like ``params``).
    """
    return _down("gradient", model, params, frozen, x, factor, shift, budget)


def sgd_step(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    rate: jax.Array,
    budget: CpuBudget,
    keep: jax.Array | float = 1.0,
) -> tuple[jax.Array, Any]:
    """Outputs f and keep * params - rate * gradient, the one that `gradient` returns.

    In place where ``params`` are donated. Where `supports_sgd_step`, the gradient of the middle
    layers takes no memory.

    Returns:
        (f [n, d_out], a tree like ``params``).
    """
    rates = jnp.stack([jnp.asarray(r, x.dtype) for r in (rate, keep)])
    f, found = _down("sgd_step", model, params, frozen, x, factor, shift, budget, rates)
    for name in ("first", "last"):
        change = lambda p, g: rates[1] * p - rates[0] * g  # noqa: E731
        found[name] = jax.tree.map(change, params[name], found[name])
    return f, found


def sgd_steps(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    rate: jax.Array,
    count: jax.Array | int,
    budget: CpuBudget,
) -> tuple[jax.Array, Any]:
    """`sgd_step`, ``count`` times over, in one call; only where `supports_sgd_steps`.

    Returns:
        (f [n, d_out] before the last step, a tree like ``params``).
    """
    network, layers, initial = network_of(model, {"params": params, **frozen}, x)
    # The first and the last layer are affine in what is trained of them.
    untrained = jax.tree.map(jnp.zeros_like, {name: layers[name] for name in ("first", "last")})
    start = _first_z(network, untrained["first"], initial)
    head, offset = _head(network, untrained["last"], initial, start)

    def end_layer(name: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
        kernel, bias = layers[name]["kernel"], layers[name]["bias"]
        slope, ratio = network.form.slope(name, len(bias))
        slopes = [np.broadcast_to(s, len(bias)) for s in (slope, np.multiply(slope, ratio))]
        return kernel, bias, np.array(slopes, x.dtype)

    names = ("middle", "first", "last")
    like = offset, *(layers[name][kind] for name in names for kind in ("kernel", "bias"))
    operands = (
        *(network.packed, *end_layer("first"), *end_layer("last"), head, offset, factor, shift),
        *(jnp.asarray(rate, x.dtype), jnp.asarray(count, jnp.int32)),
    )
    common = _common(network, layers, initial, start, budget)
    aliases = {1: 1, 2: 2, 9: 3, 10: 4, 12: 5, 13: 6}
    f, *found = _call("sgd_steps", like, common, *operands, aliases=aliases)
    pairs = zip(names, found[::2], found[1::2], strict=True)
    return f, {name: {"kernel": kernel, "bias": bias} for name, kernel, bias in pairs}


def tangent(
    model: DeepNarrow, params: Any, frozen: Any, x: jax.Array, direction: Any, budget: CpuBudget
) -> jax.Array:
    """Derivative [n, d_out] of the outputs along ``direction``, a tree like ``params``."""
    network, layers, initial = network_of(model, {"params": params, **frozen}, x)
    first = lambda layer: network.activate(_first_z(network, layer, initial))  # noqa: E731
    h0, dh0 = jax.jvp(first, (layers["first"],), (direction["first"],))
    common = _common(network, layers, initial, h0, budget)
    along = direction["middle"]["kernel"], direction["middle"]["bias"], dh0
    h, dh = _call("tangent", (h0, h0), common, *along)
    last = lambda layer, h: _last_layer(network, layer, initial, h)  # noqa: E731
    return jax.jvp(last, (layers["last"], h), (direction["last"], dh))[1]


class _Common(NamedTuple):
    """What every function of the library takes: `Settings` and the first operands of `ffi.cc`."""

    settings: dict[str, Any]
    operands: tuple[Any, ...]


def _common(
    network: Network, params: Layers, initial: Layers, h0: jax.Array, budget: CpuBudget
) -> _Common:
    middle, form, channels = params["middle"], network.form, len(h0)
    slope, ratio = form.slope("middle", channels)
    constants = [
        np.broadcast_to(np.asarray(constant, h0.dtype).reshape(-1), channels)
        for constant in (slope, np.multiply(slope, ratio), form.column, form.carry)
    ]
    start = initial.get("middle")
    if start is None:
        kind, start = "none", {name: jnp.zeros(1, h0.dtype) for name in ("kernel", "bias")}
    else:
        kind = "matrices" if start["kernel"].shape == middle["kernel"].shape else "features"
    side = rows = columns = 1
    if isinstance(network.affine, Convolution):
        layout = network.affine.layout
        side, rows, columns = layout.kernel_size, layout.height, layout.width
    layers, (_, positions, examples) = len(middle["bias"]), h0.shape
    wide = isinstance(network.affine, Dense) and is_wide(layers, channels, examples)
    blocks = Blocks.of(layers, channels, positions, examples, h0.dtype.itemsize, wide, budget)
    numbers = {
        **{"side": side, "rows": rows, "columns": columns, "inputs": len(network.packed)},
        **{"threads": budget.threads, "blocks": blocks.number, "segment": blocks.segment},
        **{"kept": blocks.kept, "group": blocks.group(layers)},
    }
    operands = (
        *(np.stack(constants), middle["kernel"], middle["bias"], start["kernel"], start["bias"]),
        jnp.broadcast_to(jnp.asarray(form.base, h0.dtype), h0.shape),
        jnp.broadcast_to(jnp.asarray(form.floor, h0.dtype), h0.shape),
        h0,
    )
    settings = {name: np.int64(number) for name, number in numbers.items()}
    return _Common(settings | {"wide": np.bool_(wide), "initial": kind}, operands)


def _call(
    name: str, like: Any, common: _Common, *own: Any, aliases: dict[int, int] | None = None
) -> Any:
    """The library's function, whose results have shapes and dtypes ``like`` those arrays."""
    results = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    # Of many networks under `jax.vmap`, one after another: each fills the machine.
    function = jax.ffi.ffi_call(
        f"dnntk_{name}", results, vmap_method="sequential", input_output_aliases=aliases
    )
    return function(*common.operands, *own, **common.settings)


def _down(
    name: str,
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    budget: CpuBudget,
    *more: jax.Array,
) -> tuple[jax.Array, dict[str, Layer]]:
    """Outputs and the gradient, but for the middle layers what the function ``name`` returns."""
    network, layers, initial = network_of(model, {"params": params, **frozen}, x)
    z0, pull_first = jax.vjp(lambda layer: _first_z(network, layer, initial), layers["first"])
    h0 = network.activate(z0)
    head, offset = _head(network, layers["last"], initial, h0)
    middle = layers["middle"]
    h, by_h0, kernel, bias = _call(
        name,
        (h0, h0, middle["kernel"], middle["bias"]),
        _common(network, layers, initial, h0, budget),
        *(head, offset, factor, shift, *more),
        aliases={1: 2, 2: 3} if name == "sgd_step" else None,
    )
    f, pull_last = jax.vjp(lambda layer: _last_layer(network, layer, initial, h), layers["last"])
    (last,) = pull_last(factor[:, None] * f + shift)
    # The mask comes from h0: from z0 it would be the same, but z0 would have to be stored.
    (first,) = pull_first(jnp.where(network.active(h0), by_h0, 0))
    return f, {"first": first, "middle": {"kernel": kernel, "bias": bias}, "last": last}


def _first_z(network: Network, layer: Layer, initial: Layers) -> jax.Array:
    """Z of the first layer."""
    return network.first(network.weights("first", layer, initial.get("first")))


def _last_layer(network: Network, layer: Layer, initial: Layers, h: jax.Array) -> jax.Array:
    """Outputs from the state below the last layer."""
    z = network.last(h, network.weights("last", layer, initial.get("last")))
    return network.affine.read_out(z)


def _head(
    network: Network, layer: Layer, initial: Layers, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last layer as outputs = head h + offset: [d_out, units, positions] and [n, d_out]."""
    zeros = jnp.zeros_like(like)
    offset = _last_layer(network, layer, initial, zeros)
    # The matrix is that of any example.
    single = zeros[..., :1]
    form = dataclasses.replace(network.form, base=single, floor=single, start=single)
    one = dataclasses.replace(network, form=form, packed=network.packed[..., :1])
    head = jax.jacrev(lambda h: _last_layer(one, layer, initial, h)[0])(single)
    return head[..., 0], offset
