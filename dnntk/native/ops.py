"""All middle layers in one call on CPU: outputs, gradients and tangents of deep narrow networks.

A layer of a few channels on a small image is less work than the call of an operation costs, a
thousand times over. `dnntk.native.build` takes a few examples at a time, which stay in a core's own
cache, through all layers and back before it takes the next ones: so no state outlives its block,
and a block keeps those of O(sqrt(depth)) layers where all of them would not fit.

Layers of an MLP from `WIDE` units on, and narrower ones on few examples, are matrix products at the
cores' peak instead, whole batches at a time; a share of the states is kept, by the parameters'
memory.

Plain gradient descent (`descent`) changes every layer as soon as its gradient is known, which is
never stored: wherever layers are wide or a core takes no more than one block of examples.
For narrow MLPs it goes on step after step without leaving the library (`descents`): what lies
between two calls takes as long as twenty layers.

This is the one place that knows of it: `supports` says whether it applies. What it computes is what
`dnntk.networks.layers.forward` and its derivatives give, to rounding; first and last layer are
plain JAX, save in `descents`.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dnntk.native import build
from dnntk.networks.initializers import Layer, Layers
from dnntk.networks.layers import Convolution, Dense, Network
from dnntk.networks.models import DeepNarrow
from dnntk.runtime.devices import on_cpu

# Filters that `dnntk.native.build` has code for.
SIDES = (1, 3, 5)
# A wider convolution is at home in one large matrix product.
MAX_CHANNELS = 256
# From here on a dense layer is three matrix products, and not a few examples' vectors.
WIDE = 128
# A narrower one too, where it has so many weights for every example: to make them ready for a few
# examples' vectors, and to add up their gradients over the lanes, then takes as long as the work.
# In deeper ones, what sums over the layers lose is kept, which only the vectors' way does.
WEIGHTS_AN_EXAMPLE, MOST_LAYERS = 14, 10_000
# Bytes of states that wide layers keep, for every byte of their parameters, and at least.
KEPT, ROOM = 0.36, 128 << 20
# What the states take of their size, as the library keeps them: 0.34 to 0.57 in training.
PACKED = 0.5
# Bytes of states that a thread may keep: more than its share of the cache is slower than computing
# them again. Beyond, segments of sqrt(depth) layers are recomputed.
BUDGET = 8 << 20

# Vectors of the library, which it fills with examples.
VECTOR = 64
# Bytes of a state that stays in a core's own cache, together with the few others of a layer.
STATE = {"dense": 128 << 10, "images": 96 << 10}


def supports(model: nn.Module, params: Any, x: Any) -> TypeGuard[DeepNarrow]:
    """Does the CPU library take ``model`` at ``params`` on inputs like ``x``?"""
    return (
        on_cpu()
        and isinstance(model, DeepNarrow)
        and model.depth > 2
        and (x.ndim == 2 or x.shape[-1] + 1 + model.d_out <= MAX_CHANNELS)
        and getattr(model, "kernel_size", 1) in SIDES
        and x.dtype in (np.float32, np.float64)
        and all(p.dtype == x.dtype for p in jax.tree.leaves(params))
        and build.available()
    )


def descends(model: nn.Module, params: Any, x: Any) -> TypeGuard[DeepNarrow]:
    """Does `descent` take ``model`` at ``params`` on inputs like ``x``, and so save memory?

    Narrow layers' blocks must all be at work at once: one that is through before another begins
    leaves its whole gradient to it.
    """
    return supports(model, params, x) and Blocks.for_batch(model, x).number <= threads(1)


def repeats(model: nn.Module, params: Any, x: Any) -> TypeGuard[DeepNarrow]:
    """Does `descents` take ``model`` at ``params`` on inputs like ``x``?"""
    return descends(model, params, x) and x.ndim == 2 and Blocks.for_batch(model, x).number > 0


class Share(NamedTuple):
    """What of this machine a call may take.

    Attributes:
        threads: at most.
        alone: does no other device of this machine work meanwhile? Then examples are split so that
            an even number of cores is busy.
    """

    threads: int
    alone: bool = True


def share(devices: int) -> Share:
    """Each one's share where so many devices of this machine work at once."""
    return Share(threads(devices), devices == 1)


def threads(devices: int) -> int:
    """How many threads each one has where so many devices of this machine work at once."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, cores // devices)


@contextlib.contextmanager
def budget(size: float) -> Iterator[None]:
    """Another `BUDGET` for what is traced meanwhile."""
    global BUDGET
    before, BUDGET = BUDGET, int(size)
    try:
        yield
    finally:
        BUDGET = before


def outputs(model: DeepNarrow, params: Any, frozen: Any, x: jax.Array, share: Share) -> jax.Array:
    """Outputs [n, d_out] of ``model.apply``; not differentiable."""
    network, layers, initial = _pieces(model, params, frozen, x)
    h = _enter(network, layers["first"], initial)
    h = _call("forward", h, _common(network, layers, initial, h, share))
    return _leave(network, layers["last"], initial, h)


def gradient(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    share: Share,
) -> tuple[jax.Array, Any]:
    """Outputs f and the gradient by ``params`` whose cotangent is factor f + shift.

    With factor = weight [n] and shift = -weight y [n, d_out] that is the gradient of the sum of
    weight / 2 ||f - y||^2, in one way up and down; with factor = 0 it is J^T shift.

    Returns:
        (f [n, d_out], a tree like ``params``).
    """
    return _down("gradient", model, params, frozen, x, factor, shift, share)


def descent(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    rate: jax.Array,
    share: Share,
    keep: jax.Array | float = 1.0,
) -> tuple[jax.Array, Any]:
    """Outputs f and keep * params - rate * gradient, the one that `gradient` returns.

    In place where ``params`` are donated, without memory for the gradient of the middle layers;
    only for what `descends` says.

    Returns:
        (f [n, d_out], a tree like ``params``).
    """
    rates = jnp.stack([jnp.asarray(r, x.dtype) for r in (rate, keep)])
    f, found = _down("descent", model, params, frozen, x, factor, shift, share, rates)
    for name in ("first", "last"):
        change = lambda p, g: rates[1] * p - rates[0] * g  # noqa: E731
        found[name] = jax.tree.map(change, params[name], found[name])
    return f, found


def descents(
    model: DeepNarrow,
    params: Any,
    frozen: Any,
    x: jax.Array,
    factor: jax.Array,
    shift: jax.Array,
    rate: jax.Array,
    count: jax.Array | int,
    share: Share,
) -> tuple[jax.Array, Any]:
    """`descent`, ``count`` times over, in one call; only for what `repeats` says.

    Returns:
        (f [n, d_out] before the last step, a tree like ``params``).
    """
    network, layers, initial = _pieces(model, params, frozen, x)
    # The first and the last layer are affine in what is trained of them.
    nothing = jax.tree.map(jnp.zeros_like, {name: layers[name] for name in ("first", "last")})
    start = _below(network, nothing["first"], initial)
    head, offset = _head(network, nothing["last"], initial, start)

    def end(name: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
        kernel, bias = layers[name]["kernel"], layers[name]["bias"]
        slope, ratio = network.form.slope(name, len(bias))
        slopes = [np.broadcast_to(s, len(bias)) for s in (slope, np.multiply(slope, ratio))]
        return kernel, bias, np.array(slopes, x.dtype)

    names = ("middle", "first", "last")
    like = offset, *(layers[name][kind] for name in names for kind in ("kernel", "bias"))
    operands = (
        *(network.packed, *end("first"), *end("last"), head, offset, factor, shift),
        *(jnp.asarray(rate, x.dtype), jnp.asarray(count, jnp.int32)),
    )
    common = _common(network, layers, initial, start, share)
    aliases = {1: 1, 2: 2, 9: 3, 10: 4, 12: 5, 13: 6}
    f, *found = _call("steps", like, common, *operands, aliases=aliases)
    pairs = zip(names, found[::2], found[1::2], strict=True)
    return f, {name: {"kernel": kernel, "bias": bias} for name, kernel, bias in pairs}


def tangent(
    model: DeepNarrow, params: Any, frozen: Any, x: jax.Array, direction: Any, share: Share
) -> jax.Array:
    """Derivative [n, d_out] of the outputs along ``direction``, a tree like ``params``."""
    network, layers, initial = _pieces(model, params, frozen, x)
    enter = lambda layer: _enter(network, layer, initial)  # noqa: E731
    h0, dh0 = jax.jvp(enter, (layers["first"],), (direction["first"],))
    common = _common(network, layers, initial, h0, share)
    along = direction["middle"]["kernel"], direction["middle"]["bias"], dh0
    h, dh = _call("tangent", (h0, h0), common, *along)
    leave = lambda layer, h: _leave(network, layer, initial, h)  # noqa: E731
    return jax.jvp(leave, (layers["last"], h), (direction["last"], dh))[1]


class Blocks(NamedTuple):
    """How a call splits examples and layers.

    It depends on shapes alone, and on whether several devices share the machine, so that results do
    not change with the number of threads.

    Attributes:
        number: of blocks of examples that go up and down one by one; 0 for wide layers.
        segment: layers that are recomputed together on the way down.
        state_bytes: of a block's state; of the whole batch's for wide layers.
        kept: last layers, of wide ones, whose states are all kept; more where they take fewer
            bytes.
    """

    number: int
    segment: int
    state_bytes: int
    kept: int = 0

    @classmethod
    def of(
        cls,
        layers: int,
        units: int,
        positions: int,
        examples: int,
        itemsize: int,
        wide: bool,
        alone: bool = True,
    ) -> "Blocks":
        """For ``layers`` layers of ``units`` x ``positions`` numbers an example."""
        vectors = -(-examples * itemsize // VECTOR)
        if wide:
            state = vectors * units * VECTOR
            held = max(ROOM, BUDGET + KEPT * layers * units**2 * itemsize)
            kept = min(layers, max(1, int(held / state)))
            return cls(0, max(1, round(math.sqrt(layers - kept))), state, kept)
        a_vector = units * positions * VECTOR
        if positions == 1:
            most = min(max(STATE["dense"] // a_vector, 7), 64)
        else:
            # Images that go together share what it costs to prepare a layer.
            fit = STATE["images"] // a_vector
            most = min(max(fit, 1), max(fit // 4, 2), 4)
        count = -(-vectors // most)
        if alone and count % 2 and vectors > count:
            count += 1  # for an even number of cores
        state_bytes = -(-vectors // count) * a_vector
        # A multiple, so that where segments begin changes no bit.
        segment = -(-round(math.sqrt(layers)) // build.SETTLE) * build.SETTLE
        if (layers + 1) * state_bytes <= BUDGET:
            segment = layers
        return cls(count, min(layers, segment), state_bytes)

    @classmethod
    def for_batch(cls, model: DeepNarrow, x: Any) -> "Blocks":
        """Those of ``model`` on inputs like ``x``."""
        positions = 1
        if x.ndim == 4:
            pool = getattr(model, "pool", 1)
            reach = getattr(model, "kernel_size", 1) // 2
            positions = x.shape[1] // pool * (x.shape[2] // pool + reach)
        units = _units(model, x)
        layers = model.depth - 2
        wide = x.ndim == 2 and _wide(layers, units, len(x))
        return cls.of(layers, units, positions, len(x), x.dtype.itemsize, wide)

    def group(self, layers: int) -> int:
        """Wide layers between two barriers on the way down: as many as fit a part of a cache."""
        return min(layers, _GROUP, max(1, _GROUP_BYTES // self.state_bytes))

    def recomputed(self, layers: int) -> int:
        """How many of ``layers`` layers are gone through twice on the way to a gradient.

        Of wide ones about as many: it depends on the states.
        """
        return max(0, layers - (self.segment if self.number else round(self.kept / PACKED)))

    def scratch_bytes(self, layers: int, threads: int) -> int:
        """What ``threads`` threads keep of states, at most."""
        if not self.number:
            below = layers - self.kept
            packed = max(self.kept, min(self.segment, below)) * (1 + 1 / VECTOR)
            states = math.ceil(packed) + 3 + -(-below // self.segment)
            return (states + _WIDE_STATES + 4 * (self.group(layers) - 1)) * self.state_bytes
        states = self.segment + 1 + 2 * -(-layers // self.segment)
        return min(threads, self.number) * states * self.state_bytes


# Of the whole batch, that wide layers need beside those kept, at most: two constants, sums, q twice
# for each of the two ways, g three times and derivatives twice.
_WIDE_STATES = 12
_GROUP, _GROUP_BYTES = 64, 1 << 20


class _Common(NamedTuple):
    """What every function of the library takes: `Settings` and the first operands of `ffi.cc`."""

    settings: dict[str, Any]
    operands: tuple[Any, ...]


def _common(
    network: Network, params: Layers, initial: Layers, h0: jax.Array, share: Share
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
    wide = isinstance(network.affine, Dense) and _wide(layers, channels, examples)
    shapes = layers, channels, positions, examples, h0.dtype.itemsize
    blocks = Blocks.of(*shapes, wide, share.alone)
    numbers = {
        **{"side": side, "rows": rows, "columns": columns, "inputs": len(network.packed)},
        **{"threads": share.threads, "blocks": blocks.number, "segment": blocks.segment},
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
    share: Share,
    *more: jax.Array,
) -> tuple[jax.Array, dict[str, Layer]]:
    """Outputs and the gradient, where the middle layers hold what the function ``name`` gives."""
    network, layers, initial = _pieces(model, params, frozen, x)
    z0, pull_first = jax.vjp(lambda layer: _below(network, layer, initial), layers["first"])
    h0 = network.activate(z0)
    head, offset = _head(network, layers["last"], initial, h0)
    middle = layers["middle"]
    h, by_h0, kernel, bias = _call(
        name,
        (h0, h0, middle["kernel"], middle["bias"]),
        _common(network, layers, initial, h0, share),
        *(head, offset, factor, shift, *more),
        aliases={1: 2, 2: 3} if name == "descent" else None,
    )
    f, pull_last = jax.vjp(lambda layer: _leave(network, layer, initial, h), layers["last"])
    (last,) = pull_last(factor[:, None] * f + shift)
    # Told from h0, and not from z0, which then need not be stored.
    (first,) = pull_first(jnp.where(network.active(h0), by_h0, 0))
    return f, {"first": first, "middle": {"kernel": kernel, "bias": bias}, "last": last}


def _units(model: DeepNarrow, x: Any) -> int:
    return x.shape[-1] + 1 + model.d_out


def _wide(layers: int, units: int, examples: int) -> bool:
    few = units**2 >= WEIGHTS_AN_EXAMPLE * examples
    return units >= WIDE or (few and layers <= MOST_LAYERS)


def _pieces(
    model: DeepNarrow, params: Any, frozen: Any, x: jax.Array
) -> tuple[Network, Layers, Layers]:
    variables = {"params": params, **frozen}
    return cast(Any, model.apply(variables, x, method="network"))


def _below(network: Network, layer: Layer, initial: Layers) -> jax.Array:
    """Z of the first layer."""
    return network.enter(network.weights("first", layer, initial.get("first")))


def _enter(network: Network, layer: Layer, initial: Layers) -> jax.Array:
    """The state above the first layer."""
    return network.activate(_below(network, layer, initial))


def _leave(network: Network, layer: Layer, initial: Layers, h: jax.Array) -> jax.Array:
    """Outputs from the state below the last layer."""
    z = network.leave(h, network.weights("last", layer, initial.get("last")))
    return network.affine.read_out(z)


def _head(
    network: Network, layer: Layer, initial: Layers, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last layer as outputs = head h + offset: [d_out, units, positions] and [n, d_out]."""
    nothing = jnp.zeros_like(like)
    offset = _leave(network, layer, initial, nothing)
    # The matrix is that of any example.
    single = nothing[..., :1]
    form = dataclasses.replace(network.form, base=single, floor=single, start=single)
    one = dataclasses.replace(network, form=form, packed=network.packed[..., :1])
    head = jax.jacrev(lambda h: _leave(one, layer, initial, h)[0])(single)
    return head[..., 0], offset
