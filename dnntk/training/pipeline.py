"""A network's layers over several devices: stages, through which micro-batches follow one another.

The mesh axis ``depth`` splits the middle layers into stages of consecutive ones; each device holds
its own stage's parameters alone. A batch is cut into micro-batches; at tick t stage s has
micro-batch t - s, and passes its state on to the next stage (GPipe, Huang et al. 2019). The way
back is the same in reverse, by JAX's own derivative of the collective permutation. Where a stage
has no micro-batch it computes nothing: of every stages + micro-batches - 1 ticks, stages - 1.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dnntk.errors import InputError
from dnntk.networks.initializers import Layers
from dnntk.networks.layers import Network, middle_layers
from dnntk.networks.models import DeepNarrow, network_of

__all__ = [
    "DATA",
    "DEPTH",
    "make_mesh",
    "microbatch_of",
    "microbatches",
    "padded",
    "parse_mesh",
    "psum",
    "psum_gradient",
    "specs",
    "staged_outputs",
    "stages_of",
    "unpadded",
]

# The mesh's axes: of examples and of layers.
DATA, DEPTH = "data", "depth"
# Micro-batches a stage: a fifth of the time is then idle, at most.
MICRO_BATCHES = 4
# An array of more than LARGE_BYTES is added up over the devices of a CPU in parts of PART_BYTES.
PART_BYTES, LARGE_BYTES = 1 << 20, 1 << 24


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of both axes of ``data:4,depth:2``; an axis that ``text`` lacks has size 1.

    Raises:
        InputError: the text is not of that form.
    """
    sizes = {DATA: 1, DEPTH: 1}
    seen = set()
    for part in text.split(",") if text else []:
        name, colon, number = part.strip().partition(":")
        good = colon and name in sizes and name not in seen and number.isdecimal()
        if not good or len(number) > 6 or int(number) < 1:
            raise InputError(
                "mesh: expected data:N,depth:M, or one of them, with numbers from 1 on, "
                f"got {text!r}"
            )
        seen.add(name)
        sizes[name] = int(number)
    return sizes


def make_mesh(text: str) -> Mesh:
    """The mesh that `parse_mesh` reads, over the first devices of all.

    Raises:
        InputError: there are too few devices.
    """
    sizes = parse_mesh(text)
    count, devices = sizes[DATA] * sizes[DEPTH], jax.devices()
    if count > len(devices):
        raise InputError(
            f"mesh: {text} needs {count} devices, {len(devices)} are there; give another mesh, "
            "with resume=True too, or on CPU set jax_num_cpu_devices before the first use of JAX"
        )
    if jax.process_count() > 1 and count < len(devices):
        raise InputError(
            f"mesh: expected one of all {len(devices)} devices that the processes have together, "
            f"got {text}, which has {count}"
        )
    shape = (sizes[DATA], sizes[DEPTH]) if sizes[DEPTH] > 1 else (sizes[DATA],)
    names = (DATA, DEPTH) if sizes[DEPTH] > 1 else (DATA,)
    return Mesh(np.array(devices[:count]).reshape(shape), names)


def stages_of(mesh: Mesh) -> int:
    """Into how many stages ``mesh`` splits the layers."""
    return int(mesh.shape.get(DEPTH, 1))


def specs(tree: Any, mesh: Mesh) -> Any:
    """How a tree of variables, gradients or an optimizer's state is laid out.

    Arrays stacked over the middle layers are split over ``depth``; every device has all others.
    """
    if stages_of(mesh) == 1:
        return jax.tree.map(lambda _: P(), tree)
    return _over_layers(lambda _: P(DEPTH), tree, lambda _: P())


def padded(tree: Any, mesh: Mesh) -> Any:
    """``tree`` with a multiple of the stages as its number of stacked layers.

    The layers added at the end are zeros; they are skipped and have no gradient.
    """
    stages = stages_of(mesh)

    def pad(leaf: Any) -> Any:
        extra = -leaf.shape[0] % stages
        pad_by = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
        return pad_by(leaf, ((0, extra), *((0, 0),) * (leaf.ndim - 1))) if extra else leaf

    return _over_layers(pad, tree)


def unpadded(tree: Any, model: nn.Module) -> Any:
    """Undo `padded`, on ``model``'s variables or an optimizer's state."""
    if not isinstance(model, DeepNarrow):
        return tree
    return _over_layers(lambda leaf: leaf[: model.depth - 2], tree)


def _over_layers(function: Any, tree: Any, other: Any = lambda leaf: leaf) -> Any:
    """``function`` of arrays stacked over the middle layers, ``other`` of all others."""

    def mapped(path: tuple[Any, ...], leaf: Any) -> Any:
        names = {getattr(key, "key", None) for key in path}
        return function(leaf) if "middle" in names and leaf.ndim else other(leaf)

    return jax.tree_util.tree_map_with_path(mapped, tree)


def microbatches(examples: int, stages: int) -> int:
    """How many micro-batches a shard of ``examples`` examples is cut into."""
    return max(1, min(MICRO_BATCHES * stages, examples))


def microbatch_of(stage: Any, tick: Any) -> Any:
    """The micro-batch that a stage has at a tick; none if it is negative or too large."""
    return tick - stage


def psum_gradient(gradient: Layers) -> Layers:
    """The sum over a mesh with stages of each device's summand of a gradient."""
    axes = {name: DATA if name == "middle" else (DATA, DEPTH) for name in gradient}
    return {name: psum(g, axes[name]) for name, g in gradient.items()}


def psum(tree: Any, axes: str | tuple[str, ...]) -> Any:
    """As `jax.lax.psum`, the sum over the devices along ``axes``.

    Large arrays are added up in parts on CPU, where their sum in one piece would take memory for
    all of them once more, and several times as long.
    """
    if jax.lax.axis_size(axes) == 1:
        return tree
    return jax.tree.map(lambda array: _psum(array, axes), tree)


def _psum(array: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    whole = functools.partial(jax.lax.psum, axis_name=axes)
    if array.nbytes <= LARGE_BYTES:
        return whole(array)
    in_parts = functools.partial(_psum_in_parts, axes=axes)
    return jax.lax.platform_dependent(array, cpu=in_parts, default=whole)


def _psum_in_parts(array: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    part = PART_BYTES // array.dtype.itemsize

    def with_sum(array: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(array, start, size)
        return jax.lax.dynamic_update_slice_in_dim(array, jax.lax.psum(own, axes), start, 0)

    count, rest = divmod(array.size, part)
    flat = jax.lax.fori_loop(0, count, lambda k, a: with_sum(a, k * part, part), array.ravel())
    return (with_sum(flat, count * part, rest) if rest else flat).reshape(array.shape)


def staged_outputs(
    model: DeepNarrow, params: Layers, frozen: Any, x: jax.Array, stages: int
) -> tuple[jax.Array, jax.Array]:
    """One device's part of the network on a mesh with the axis ``depth``.

    Only the last stage's outputs are the network's. A function of them that other stages replace
    by 0 may be differentiated: the derivatives are those of its sum over all devices.

    Args:
        model: the network.
        params: its parameters; of the `padded` middle layers, this stage's.
        frozen: the collections beside them, laid out likewise.
        x: this data shard's examples, a multiple of `microbatches`.
        stages: devices along ``depth``.

    Returns:
        (outputs [n, d_out], is this the last stage?).
    """
    count, stage = microbatches(len(x), stages), jax.lax.axis_index(DEPTH)
    parts = x.reshape(count, len(x) // count, *x.shape[1:])
    layers, own = model.depth - 2, jax.tree.leaves(params["middle"])[0].shape[0]
    present = stage * own + jnp.arange(own) < layers if own * stages > layers else None
    last = stage == stages - 1
    onward = [(s, s + 1) for s in range(stages - 1)]

    def tick(above: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = microbatch_of(stage, t)
        part = jax.lax.dynamic_index_in_dim(parts, jnp.clip(number, 0, count - 1), keepdims=False)

        def work(above: jax.Array) -> tuple[jax.Array, jax.Array]:
            network, first, held, end = _pieces(model, params, frozen, part)
            h = jnp.where(stage == 0, network.activate(network.first(first)), above)
            h = middle_layers(network, h, held, model.layers_a_segment, present)
            return h, network.affine.read_out(network.last(h, end))

        shapes = jax.eval_shape(work, above)
        idle = lambda above: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)  # noqa: E731
        h, f = jax.lax.cond((number >= 0) & (number < count), work, idle, above)
        return jax.lax.ppermute(h, DEPTH, onward), f

    start = jax.eval_shape(lambda: _state(model, params, frozen, parts[0]))
    ticks = jnp.arange(stages + count - 1)
    _, found = jax.lax.scan(tick, jnp.zeros(start.shape, start.dtype), ticks)
    return found[stages - 1 :].reshape(len(x), -1), last


def _state(model: DeepNarrow, params: Layers, frozen: Any, x: jax.Array) -> jax.Array:
    network, first, _, _ = _pieces(model, params, frozen, x)
    return network.first(first)


def _pieces(
    model: DeepNarrow, params: Layers, frozen: Any, x: jax.Array
) -> tuple[Network, Any, Any, Any]:
    """The network on x; weights of its first layer, this stage's middle layers and the last one."""

    def complete(tree: Layers) -> Layers:
        # The module needs arrays of all layers. No result depends on these: they are never made.
        layers = model.depth - 2
        stand_in = jax.tree.map(
            lambda a: jnp.zeros((layers, *a.shape[1:]), a.dtype), tree["middle"]
        )
        return {**tree, "middle": stand_in}

    collections = {name: complete(tree) for name, tree in frozen.items()}
    variables = {"params": complete(params), **collections}
    network, held, initial = network_of(model, variables, x)
    own = jax.tree.map(lambda a, like: a.astype(like.dtype), params["middle"], held["middle"])
    start = frozen.get("initial", {}).get("middle")
    if start is not None:
        start = jax.tree.map(lambda a, like: a.astype(like.dtype), start, initial["middle"])
    ends = (network.weights(name, held[name], initial.get(name)) for name in ("first", "last"))
    first, last = ends
    return network, first, (own, start), last
