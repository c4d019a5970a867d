"""Gradient flow by explicit steps: the thesis's loss, its gradient over devices, one optax update.

The loss is 1/2 E_x ||f(x) - y||^2, the mean over examples and the sum over outputs. Kernel time
is the thesis's: it advances by ``time_step`` a step (by time_step / (1 - momentum) with momentum),
which for plain SGD means a learning rate of ``time_step`` on D in the ``ntk`` parametrization and
of time_step / (depth C^2) on the matrices in the ``standard`` one.

A batch is split over devices; every device holds all parameters and the gradient is summed once,
after the backward pass over all layers. On CPU, networks that `dnntk.native.ops` takes run on one
device with a thread a core; for other narrow ones, one host device a core is about twice as fast
as threads inside each tiny product.

`outputs` and `outputs_and_gradient` are the one place where a backend chooses its path; `apply` is
the plain code, with every transformation of JAX.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dnntk.errors import InputError
from dnntk.native import ops
from dnntk.networks.models import DeepNarrow
from dnntk.runtime import processes
from dnntk.runtime.devices import on_cpu
from dnntk.training import pipeline
from dnntk.training.pipeline import DATA, DEPTH

# Below this many examples a device, the per-layer overhead costs more than a second device saves.
MIN_EXAMPLES_PER_DEVICE = 32
# On CPU every host device would hold its own copy of the parameters, the gradient and the rest.
MAX_REPLICATED_BYTES = 1 << 28
# A step on more parameters than these takes milliseconds.
MANY_AT_ONCE_BYTES = 1 << 20
# Arrays up to this size are added up over the devices as one.
JOINED_BYTES = 1 << 16
# So many of them one device takes for all others of its process, which wait: XLA allows them 40 s.
BY_FIRST = 32


class TrainState(NamedTuple):
    """What a step changes: trained parameters and the optimizer's state."""

    params: Any
    opt_state: Any


class PlainSGD(optax.GradientTransformation):
    """`optax.sgd` at a constant rate, which `make_step` may apply while the gradient comes."""

    rate: float


def sgd(rate: float) -> PlainSGD:
    """Plain SGD: the state is that of ``optax.sgd(rate)``."""
    made = PlainSGD(*optax.sgd(rate))
    made.rate = rate
    return made


# What `ops.descent` begins with: model, params, frozen, x, factor, shift and rate.
_Descent = tuple[DeepNarrow, Any, Any, jax.Array, jax.Array, jax.Array, jax.Array]


class Batch(NamedTuple):
    """Examples split over devices; ``weight`` [n] is 1 for an example and 0 for padding."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array


def data_mesh(examples: int, parameter_bytes: int, threaded: bool = False) -> Mesh:
    """A one-axis mesh ``data`` over as many devices as ``examples`` can keep busy.

    Over one where ``threaded``: a device that uses all cores by itself, as `dnntk.native.ops` does.
    Over all of them where there are several processes.
    """
    devices = jax.devices()
    count = max(1, min(len(devices), examples // MIN_EXAMPLES_PER_DEVICE))
    if processes.is_multiprocess():
        count = len(devices)
    elif threaded or (on_cpu() and parameter_bytes > MAX_REPLICATED_BYTES):
        count = 1
    return Mesh(np.array(devices[:count]), ("data",))


def put_batch(x: np.ndarray, y: np.ndarray, mesh: Mesh) -> Batch:
    """Pad to a multiple of the devices and their micro-batches, then split over ``data``."""
    shards = mesh.shape[DATA]
    parts = pipeline.microbatches(-(-len(x) // shards), pipeline.stages_of(mesh))
    extra = -len(x) % (shards * (parts if pipeline.stages_of(mesh) > 1 else 1))
    weight = np.pad(np.ones(len(x), y.dtype), (0, extra))
    padded = (np.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)), mode="edge") for a in (x, y))
    return Batch(*processes.device_put((*padded, weight), NamedSharding(mesh, P("data"))))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """``tree`` on every device of ``mesh``; it may share memory with what it was made of."""
    return processes.device_put(tree, NamedSharding(mesh, P()))


def put_state(tree: Any, mesh: Mesh) -> Any:
    """Variables or an optimizer's state, laid out as the steps on ``mesh`` want it.

    Everything on every device, but for the middle layers where the mesh has an axis ``depth``:
    `pipeline.padded`, over its stages.
    """
    return processes.device_put(pipeline.padded(tree, mesh), shardings(tree, mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Those of `put_state`; ``tree`` may hold shapes alone."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), pipeline.specs(tree, mesh))


def apply(model: nn.Module, params: Any, frozen: Any, x: jax.Array) -> jax.Array:
    """Outputs [n, d_out] at ``params``; ``frozen`` holds the collections beside them."""
    return cast(jax.Array, model.apply({"params": params, **frozen}, x))


def outputs(model: nn.Module, params: Any, frozen: Any, x: jax.Array, devices: int) -> jax.Array:
    """As `apply`, by this backend's fastest path; not to be differentiated.

    ``devices`` of this machine work at the same time.
    """
    if ops.supports(model, params, x):
        return ops.outputs(model, params, frozen, x, ops.share(devices))
    return apply(model, params, frozen, x)


def loss_and_gradient(
    model: nn.Module, params: Any, frozen: Any, batch: Batch, devices: int
) -> tuple[jax.Array, Any]:
    """The sum over a batch of weight / 2 ||f - y||^2 and its gradient by ``params``.

    ``devices`` of this machine work at the same time.
    """
    f, gradient = outputs_and_gradient(model, params, frozen, batch, devices)
    return residual_loss(f, batch.y, batch.weight), gradient


def outputs_and_gradient(
    model: nn.Module, params: Any, frozen: Any, batch: Batch, devices: int
) -> tuple[jax.Array, Any]:
    """As `loss_and_gradient`, with the outputs f [n, d_out] instead of the loss."""
    x, y, weight = batch
    if ops.supports(model, params, x):
        shift = -weight[:, None] * y
        return ops.gradient(model, params, frozen, x, weight, shift, ops.share(devices))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        f = apply(model, params, frozen, x)
        return residual_loss(f, y, weight), f

    (_, f), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return f, gradient


def residual_loss(outputs: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over examples of 1/2 ||f - y||^2; divide by their number for the thesis's loss."""
    return 0.5 * jnp.sum(weight * jnp.sum((outputs - y) ** 2, axis=1))


def learning_rate(model: DeepNarrow, time_step: float) -> float:
    """The step on ``model``'s own parameters that advances kernel time by ``time_step``."""
    return time_step * (model.step**2 if model.parametrization == "standard" else 1.0)


def time_step_of(model: DeepNarrow, rate: float) -> float:
    """Kernel time that a raw learning rate on the thesis's matrices advances in one step.

    Raises:
        InputError: the scale is infinite, so no finite rate on the matrices means anything.
    """
    if math.isinf(model.scale):
        raise InputError("lr: a raw learning rate needs a finite scale; give time_step instead")
    return rate / model.step**2


def make_step(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """The jitted step, (state, frozen collections, batch) -> (state, loss before the step).

    ``state`` is donated. ``frozen`` holds the collections beside ``params`` ({} or {"initial"}).
    With `sgd` and wide layers on CPU no gradient of the whole network is ever stored. On a mesh
    with an axis ``depth``, `put_state` lays out ``state`` and ``frozen``.
    """
    if pipeline.stages_of(mesh) > 1:
        return jax.jit(_pipelined(model, optimizer, mesh), donate_argnums=0)
    step, mean_loss = _step_on(model, optimizer, mesh), _mean_loss(mesh)

    def one(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, f = step(state, frozen, batch, 1)
        return state, mean_loss(f, batch)

    return jax.jit(_over_batch(one, mesh), donate_argnums=0)


def make_steps(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Many steps on one batch: (state, frozen, batch, count) -> (state, loss before the last step).

    Each is a step of `make_step`, and ``state`` is donated; ``count`` may be any positive
    number, it is compiled once.
    """
    if pipeline.stages_of(mesh) > 1:
        return jax.jit(_many(_pipelined(model, optimizer, mesh)), donate_argnums=0)
    step, mean_loss = _step_on(model, optimizer, mesh), _mean_loss(mesh)

    def steps(
        state: TrainState, frozen: Any, batch: Batch, count: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        state, f = step(state, frozen, batch, count)
        return state, mean_loss(f, batch)

    return jax.jit(_over_batch(steps, mesh, P()), donate_argnums=0)


def _many(step: Any) -> Any:
    def steps(
        state: TrainState, frozen: Any, batch: Batch, count: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        start = state, jnp.zeros((), batch.y.dtype)
        return jax.lax.fori_loop(0, count, lambda _, at: step(at[0], frozen, batch), start)

    return steps


def _pipelined(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """A step whose layers are split over ``depth``: (state, frozen, batch) -> (state, loss)."""
    stages = pipeline.stages_of(mesh)

    def shares(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            f, counts = pipeline.outputs(cast(DeepNarrow, model), params, frozen, batch.x, stages)
            return jnp.where(counts, residual_loss(f, batch.y, batch.weight), 0)

        value, gradient = jax.value_and_grad(loss)(params)
        examples = jax.lax.psum(batch.weight.sum(), DATA)
        gradient = jax.tree.map(lambda g: g / examples, pipeline.total(gradient))
        return jax.lax.psum(value, (DATA, DEPTH)) / examples, gradient

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        laid_out = pipeline.specs(state.params, mesh)
        sharded = jax.shard_map(
            shares,
            mesh=mesh,
            in_specs=(laid_out, pipeline.specs(frozen, mesh), P(DATA)),
            out_specs=(P(), laid_out),
            check_vma=False,
        )
        at = lambda params: sharded(params, frozen, batch)  # noqa: E731
        # Out here an optimizer sees whole arrays: norms of a layer, say.
        value, new = _updated(optimizer, state, at)
        return jax.lax.with_sharding_constraint(new, shardings(new, mesh)), value

    return step


def many_at_once(params: Any) -> bool:
    """Are steps at ``params`` so short that calling them one by one would cost as much?"""
    size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
    return size <= MANY_AT_ONCE_BYTES


def _over_batch(function: Any, mesh: Mesh, *more: P) -> Any:
    specs = (P(), P(), P("data"), *more)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False)


def _step_on(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Steps as one device of ``mesh`` takes them: to the new state and f before the last one."""
    share = ops.share(mesh.local_mesh.size)

    def one(
        state: TrainState, frozen: Any, batch: Batch, examples: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def at(params: Any) -> tuple[jax.Array, Any]:
            f, gradient = outputs_and_gradient(model, params, frozen, batch, mesh.local_mesh.size)
            return f, jax.tree.map(lambda g: g / examples, _total(gradient, mesh))

        f, new = _updated(optimizer, state, at)
        return new, f

    def in_place(
        state: TrainState, frozen: Any, batch: Batch, examples: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """A step that needs no gradient: of several devices the first one keeps the parameters."""
        keep = (jax.lax.axis_index(DATA) == 0).astype(batch.y.dtype)
        f, params = ops.descent(*given(state.params, frozen, batch, examples), share, keep)
        return TrainState(_total(params, mesh), state.opt_state), f

    def given(params: Any, frozen: Any, batch: Batch, examples: jax.Array) -> _Descent:
        x, y, weight = batch
        rate, shift = cast(PlainSGD, optimizer).rate / examples, -weight[:, None] * y
        return cast(DeepNarrow, model), params, frozen, x, weight, shift, rate

    def steps(
        state: TrainState, frozen: Any, batch: Batch, count: jax.Array | int
    ) -> tuple[TrainState, jax.Array]:
        # Once: devices that wait for each other in every step would be half of a short one.
        examples = _total(batch.weight.sum(), mesh)
        plain = isinstance(optimizer, PlainSGD)
        shape = mesh.size * len(batch.x), *batch.x.shape[1:]
        everything = jax.ShapeDtypeStruct(shape, batch.x.dtype)
        if plain and ops.repeats(model, state.params, everything):
            taken = lambda params, batch, many: ops.descents(  # noqa: E731
                *given(params, frozen, batch, examples), many, ops.share(1)
            )
            if mesh.size == 1:
                f, params = taken(state.params, batch, count)
                return TrainState(params, state.opt_state), f
            if mesh.local_mesh.size == mesh.size and many_at_once(state.params):
                f, params = _by_first(taken, state.params, batch, count, mesh)
                return TrainState(params, state.opt_state), f
        step = in_place if plain and ops.descends(model, state.params, batch.x) else one
        if isinstance(count, int) and count == 1:
            return step(state, frozen, batch, examples)
        start = state, jnp.zeros_like(batch.y)
        body = lambda _, at: step(at[0], frozen, batch, examples)  # noqa: E731
        return jax.lax.fori_loop(0, count, body, start)

    return steps


def _by_first(
    taken: Any, params: Any, batch: Batch, count: jax.Array | int, mesh: Mesh
) -> tuple[jax.Array, Any]:
    """Steps that the first device takes for all, with all cores, as if it were alone.

    Devices that share the cores gain nothing by sharing the examples: to add up their gradients
    and change every copy of the parameters takes a tenth of a short step. ``taken(params, batch,
    count)`` takes ``count`` steps on the examples of all; returned are f of this device's own
    examples, before the last step, and the new parameters.
    """
    everything = Batch(*(jax.lax.all_gather(a, DATA, tiled=True) for a in batch))
    own = jax.lax.axis_index(DATA)

    def some(k: jax.Array, at: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        many = jnp.minimum(BY_FIRST, count - k * BY_FIRST)
        first = lambda params: taken(params, everything, many)  # noqa: E731
        others = lambda params: jax.tree.map(jnp.zeros_like, (everything.y, params))  # noqa: E731
        return _total(jax.lax.cond(own == 0, first, others, at[1]), mesh)

    start = jnp.zeros_like(everything.y), params
    f, params = jax.lax.fori_loop(0, -(-count // BY_FIRST), some, start)
    return jax.lax.dynamic_slice_in_dim(f, own * len(batch.y), len(batch.y)), params


def _updated(
    optimizer: optax.GradientTransformation, state: TrainState, at: Any
) -> tuple[Any, TrainState]:
    """``at`` (params -> what the step tells, gradient) at ``state``, and the state after a step."""
    told, gradient = at(state.params)
    # For optimizers that look at more than one gradient a step, as `optax.contrib.sam` does.
    grad_fn = lambda params, _: at(params)[1]  # noqa: E731
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradient, state.opt_state, state.params, grad_fn=grad_fn
    )
    return told, TrainState(optax.apply_updates(state.params, updates), opt_state)


def _mean_loss(mesh: Mesh) -> Any:
    """(outputs of a device's share of a batch, that share) -> the batch's loss."""

    def loss(f: jax.Array, batch: Batch) -> jax.Array:
        sums = residual_loss(f, batch.y, batch.weight), batch.weight.sum()
        value, examples = _total(sums, mesh)
        return value / examples

    return loss


def _total(tree: Any, mesh: Mesh) -> Any:
    """The sum over ``mesh``; over one device it would be a copy of the whole gradient on CPU."""
    if mesh.size == 1:
        return tree
    # Devices meet once for every array, which short steps would mostly consist of; to join large
    # ones costs more than a meeting.
    leaves, treedef = jax.tree.flatten(tree)
    small = [leaf.size * leaf.dtype.itemsize <= JOINED_BYTES for leaf in leaves]
    whole, back = ravel_pytree([leaf for leaf, joined in zip(leaves, small, strict=True) if joined])
    parts = iter(back(jax.lax.psum(whole, DATA)) if any(small) else ())
    totals = [
        next(parts) if joined else pipeline.summed(leaf, DATA)
        for leaf, joined in zip(leaves, small, strict=True)
    ]
    return jax.tree.unflatten(treedef, totals)


def step_bytes(compiled: Any, model: nn.Module, params: Any, x: Any, mesh: Mesh) -> int:
    """What a compiled step of `make_step` takes on a batch like ``x``, its arguments included."""
    need, total = compiled.memory_analysis(), 0
    if need is not None:
        total = need.temp_size_in_bytes + need.argument_size_in_bytes
        total += need.output_size_in_bytes - need.alias_size_in_bytes
    total *= mesh.size
    if ops.supports(model, params, x):
        blocks = ops.Blocks.for_batch(model, x)
        total += blocks.scratch_bytes(model.depth - 2, ops.threads(1))
    return total


def make_predict(model: nn.Module, mesh: Mesh) -> Any:
    """(params, frozen, x [n, ...]) -> outputs [n, d_out] on the host, in chunks of one shape."""
    stages = pipeline.stages_of(mesh)

    def of_shard(params: Any, frozen: Any, x: jax.Array) -> jax.Array:
        if stages == 1:
            return outputs(model, params, frozen, x, mesh.local_mesh.size)
        f, counts = pipeline.outputs(cast(DeepNarrow, model), params, frozen, x, stages)
        return jax.lax.psum(jnp.where(counts, f, 0), DEPTH)

    # Every process looks at all outputs.
    everywhere = NamedSharding(mesh, P()) if processes.is_multiprocess() else None

    @functools.partial(jax.jit, out_shardings=everywhere)
    def outputs_of(params: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(pipeline.specs(params, mesh), pipeline.specs(frozen, mesh), P(DATA)),
            out_specs=P(DATA),
            check_vma=False,
        )(params, frozen, x)

    def predict(params: Any, frozen: Any, x: np.ndarray, chunk: int = 512) -> np.ndarray:
        chunk = min(chunk, len(x))
        parts = []
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            padded = np.pad(part, ((0, chunk - len(part)), *((0, 0),) * (x.ndim - 1)))
            batch = put_batch(padded, padded[:, :0].reshape(chunk, -1), mesh)
            parts.append(np.asarray(outputs_of(params, frozen, batch.x))[: len(part)])
        return np.concatenate(parts)

    return predict


def mini_batches(
    examples: int, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Indices of the mini-batch of each step from ``first_step`` on, reshuffled every epoch.

    A step's batch depends on (seed, step) alone, so a resumed run sees what it would have seen. An
    epoch leaves out the examples % batch_size last ones of its own order.
    """
    steps_per_epoch = examples // batch_size
    step = first_step
    while True:
        epoch, offset = divmod(step, steps_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(examples)
        for position in range(offset, steps_per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
            step += 1
