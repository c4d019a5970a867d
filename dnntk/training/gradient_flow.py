"""Gradient flow by explicit steps: a loss, its gradient over devices, one optax update.

The thesis's loss is 1/2 E_x ||f(x) - y||^2; another of `dnntk.training.losses` may take its place,
as the mean over examples too. Kernel time
is the thesis's: it advances by ``time_step`` a step (by time_step / (1 - momentum) with momentum),
which for plain SGD means a learning rate of ``time_step`` on D in the ``ntk`` parametrization and
of time_step / (depth C^2) on the matrices in the ``standard`` one.

A batch is split over devices (`dnntk.training.placement`), and the gradient is summed once, after
the backward pass over all layers. `dnntk.training.engine` computes outputs and gradients.
"""

import functools
import math
from collections.abc import Callable
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
from dnntk.native.blocks import THREAD_STATE_BYTES
from dnntk.networks.models import DeepNarrow
from dnntk.runtime import processes
from dnntk.training import pipeline
from dnntk.training.engine import NativeEngine, PlainEngine, engine_for
from dnntk.training.losses import summed
from dnntk.training.pipeline import DATA, DEPTH
from dnntk.training.placement import Batch, put_batch, shardings

__all__ = [
    "PlainSGD",
    "TrainState",
    "learning_rate",
    "loss_and_gradient",
    "make_predict",
    "make_step",
    "make_steps",
    "sgd",
    "short_steps",
    "step_bytes",
    "time_step_of",
]

# A step on more parameters than these takes milliseconds.
SHORT_STEP_BYTES = 1 << 20
# Arrays up to this size are added up over the devices as one.
JOINED_BYTES = 1 << 16
# Most steps that the first device takes while the others wait in a collective; XLA aborts a wait
# after 40 s.
STEPS_ON_FIRST_DEVICE = 32


class TrainState(NamedTuple):
    """What a step changes: trained parameters and the optimizer's state."""

    params: Any
    opt_state: Any


class PlainSGD(optax.GradientTransformation):
    """`optax.sgd` at a constant rate, which a step may apply layer by layer on the way down."""

    rate: float


def sgd(rate: float) -> PlainSGD:
    """Plain SGD: the state is that of ``optax.sgd(rate)``."""
    made = PlainSGD(*optax.sgd(rate))
    made.rate = rate
    return made


# One or many steps: (state, frozen, batch, count) -> (state, outputs before the last step).
Steps = Callable[[TrainState, Any, Batch, jax.Array | int], tuple[TrainState, jax.Array]]


def loss_and_gradient(
    model: nn.Module, params: Any, frozen: Any, batch: Batch, devices: Any, loss: str = "squared"
) -> tuple[jax.Array, Any]:
    """The sum over a batch of weight times a loss, and its gradient by ``params``.

    ``devices`` are as in `engine_for`.
    """
    engine = engine_for(model, params, batch.x, devices, loss=loss)
    f, gradient = engine.outputs_and_gradient(params, frozen, batch)
    return summed(loss, f, batch.y, batch.weight), gradient


def learning_rate(model: DeepNarrow, time_step: float) -> float:
    """The step on ``model``'s own parameters that advances kernel time by ``time_step``."""
    return time_step * (model.parameter_scale**2 if model.parametrization == "standard" else 1.0)


def time_step_of(model: DeepNarrow, rate: float) -> float:
    """Kernel time that a raw learning rate on the thesis's matrices advances in one step.

    Raises:
        InputError: the scale is infinite, so no finite rate on the matrices means anything.
    """
    if math.isinf(model.scale):
        raise InputError("lr: a raw learning rate needs a finite scale; give time_step instead")
    return rate / model.parameter_scale**2


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_bytes: int = THREAD_STATE_BYTES,
    loss: str = "squared",
) -> Any:
    """The jitted step, (state, frozen collections, batch) -> (state, loss before the step).

    ``state`` is donated. ``frozen`` holds the collections beside ``params`` ({} or {"initial"}).
    With `sgd` and wide layers on CPU no gradient of the whole network is ever stored. On a mesh
    with an axis ``depth``, `put_state` lays out ``state`` and ``frozen``. ``state_bytes`` of
    states are what a thread of the CPU library may keep.
    """
    if pipeline.stages_of(mesh) > 1:
        return jax.jit(_pipelined(model, optimizer, mesh, loss), donate_argnums=0)
    steps = _with_loss(_steps_on(model, optimizer, mesh, state_bytes, loss), mesh, loss)
    return jax.jit(
        _over_batch(lambda state, frozen, batch: steps(state, frozen, batch, 1), mesh),
        donate_argnums=0,
    )


def make_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_bytes: int = THREAD_STATE_BYTES,
    loss: str = "squared",
) -> Any:
    """Many steps on one batch: (state, frozen, batch, count) -> (state, loss before the last step).

    Each is a step of `make_step`, and ``state`` is donated; ``count`` may be any positive
    number, it is compiled once.
    """
    if pipeline.stages_of(mesh) > 1:
        step = _pipelined(model, optimizer, mesh, loss)
        return jax.jit(
            lambda state, frozen, batch, count: _repeated(
                step, jnp.zeros((), batch.y.dtype), state, frozen, batch, count
            ),
            donate_argnums=0,
        )
    steps = _with_loss(_steps_on(model, optimizer, mesh, state_bytes, loss), mesh, loss)
    return jax.jit(_over_batch(steps, mesh, P()), donate_argnums=0)


def _repeated(
    step: Any, value: jax.Array, state: TrainState, frozen: Any, batch: Batch, count: Any
) -> tuple[TrainState, jax.Array]:
    """``step``, (state, frozen, batch) -> (state, another ``value``), ``count`` times over."""
    body = lambda _, carry: step(carry[0], frozen, batch)  # noqa: E731
    return jax.lax.fori_loop(0, count, body, (state, value))


def _pipelined(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, loss: str
) -> Any:
    """A step whose layers are split over ``depth``: (state, frozen, batch) -> (state, loss)."""
    stages = pipeline.stages_of(mesh)

    def mean_loss_and_gradient(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        def stage_loss(params: Any) -> jax.Array:
            f, is_last = pipeline.staged_outputs(
                cast(DeepNarrow, model), params, frozen, batch.x, stages
            )
            return jnp.where(is_last, summed(loss, f, batch.y, batch.weight), 0)

        value, gradient = jax.value_and_grad(stage_loss)(params)
        examples = jax.lax.psum(batch.weight.sum(), DATA)
        gradient = jax.tree.map(lambda g: g / examples, pipeline.psum_gradient(gradient))
        return jax.lax.psum(value, (DATA, DEPTH)) / examples, gradient

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        laid_out = pipeline.specs(state.params, mesh)
        sharded = jax.shard_map(
            mean_loss_and_gradient,
            mesh=mesh,
            in_specs=(laid_out, pipeline.specs(frozen, mesh), P(DATA)),
            out_specs=(P(), laid_out),
            check_vma=False,
        )
        value_and_grad_fn = lambda params: sharded(params, frozen, batch)  # noqa: E731
        # Outside of `shard_map` an optimizer sees whole arrays: norms of a layer, say.
        value, new = _updated(optimizer, state, value_and_grad_fn)
        return jax.lax.with_sharding_constraint(new, shardings(new, mesh)), value

    return step


def short_steps(params: Any) -> bool:
    """Are steps at ``params`` so short that calling them one by one would cost as much?"""
    size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
    return size <= SHORT_STEP_BYTES


def _over_batch(function: Any, mesh: Mesh, *more: P) -> Any:
    specs = (P(), P(), P(DATA), *more)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False)


def _steps_on(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_bytes: int,
    loss: str,
) -> Steps:
    """Steps as one device of ``mesh`` takes them, on its own examples."""
    devices = mesh.local_mesh.size

    def steps(
        state: TrainState, frozen: Any, batch: Batch, count: jax.Array | int
    ) -> tuple[TrainState, jax.Array]:
        engine = engine_for(model, state.params, batch.x, mesh, state_bytes, loss)
        # Once: devices that wait for each other in every step would be half of a short one.
        examples = _psum(batch.weight.sum(), mesh)
        step = _optimizer_step(engine, optimizer, examples, mesh)
        if isinstance(optimizer, PlainSGD) and isinstance(engine, NativeEngine):
            shape = mesh.size * len(batch.x), *batch.x.shape[1:]
            everything = jax.ShapeDtypeStruct(shape, batch.x.dtype)
            one_process = devices == mesh.size and short_steps(state.params)
            if engine.supports_sgd_steps(everything) and (mesh.size == 1 or one_process):
                rate, alone = optimizer.rate / examples, engine.alone()
                sgd_steps = lambda params, batch, many: alone.sgd_steps(  # noqa: E731
                    params, frozen, batch, rate, many
                )
                if mesh.size == 1:
                    f, params = sgd_steps(state.params, batch, count)
                else:
                    f, params = _on_first(sgd_steps, mesh, state.params, batch, count)
                return TrainState(params, state.opt_state), f
            if engine.supports_sgd_step(batch.x):
                step = _sgd_step_in_place(engine, optimizer.rate / examples, mesh)
        if isinstance(count, int) and count == 1:
            return step(state, frozen, batch)
        return _repeated(step, jnp.zeros_like(batch.y), state, frozen, batch, count)

    return steps


def _optimizer_step(
    engine: PlainEngine, optimizer: optax.GradientTransformation, examples: jax.Array, mesh: Mesh
) -> Any:
    """A step by any optimizer, whose gradient is the mean over ``examples`` of all devices."""

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        def value_and_grad_fn(params: Any) -> tuple[jax.Array, Any]:
            f, gradient = engine.outputs_and_gradient(params, frozen, batch)
            return f, jax.tree.map(lambda g: g / examples, _psum(gradient, mesh))

        f, new = _updated(optimizer, state, value_and_grad_fn)
        return new, f

    return step


def _sgd_step_in_place(engine: NativeEngine, rate: jax.Array, mesh: Mesh) -> Any:
    """A step that stores no gradient: the first of several devices keeps the parameters."""

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        keep = (jax.lax.axis_index(DATA) == 0).astype(batch.y.dtype)
        f, params = engine.sgd_step(state.params, frozen, batch, rate, keep)
        return TrainState(_psum(params, mesh), state.opt_state), f

    return step


def _on_first(
    sgd_steps: Any, mesh: Mesh, params: Any, batch: Batch, count: jax.Array | int
) -> tuple[jax.Array, Any]:
    """Steps that the first device takes for all, on the examples of all.

    Devices that share the cores gain nothing by sharing the examples: to add up their gradients
    and change every copy of the parameters takes a tenth of a short step.

    Args:
        sgd_steps: (params, batch, count) -> (outputs before the last step, new params).
        mesh: of the devices.
        params: on every device.
        batch: this device's own examples.
        count: of steps.

    Returns:
        What ``sgd_steps`` returns; the outputs are those of this device's own examples.
    """
    everything = Batch(*(jax.lax.all_gather(a, DATA, tiled=True) for a in batch))
    own = jax.lax.axis_index(DATA)

    def some(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        many = jnp.minimum(STEPS_ON_FIRST_DEVICE, count - k * STEPS_ON_FIRST_DEVICE)
        first = lambda params: sgd_steps(params, everything, many)  # noqa: E731
        others = lambda params: jax.tree.map(jnp.zeros_like, (everything.y, params))  # noqa: E731
        return _psum(jax.lax.cond(own == 0, first, others, carry[1]), mesh)

    start = jnp.zeros_like(everything.y), params
    f, params = jax.lax.fori_loop(0, -(-count // STEPS_ON_FIRST_DEVICE), some, start)
    return jax.lax.dynamic_slice_in_dim(f, own * len(batch.y), len(batch.y)), params


def _updated(
    optimizer: optax.GradientTransformation, state: TrainState, value_and_grad_fn: Any
) -> tuple[Any, TrainState]:
    """Evaluate value_and_grad_fn(params) -> (aux, gradient), apply the optimizer: (aux, state)."""
    aux, gradient = value_and_grad_fn(state.params)
    # For optimizers that need more than one gradient a step, as `optax.contrib.sam` does.
    grad_fn = lambda params, _: value_and_grad_fn(params)[1]  # noqa: E731
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradient, state.opt_state, state.params, grad_fn=grad_fn
    )
    return aux, TrainState(optax.apply_updates(state.params, updates), opt_state)


def _with_loss(steps: Steps, mesh: Mesh, loss: str) -> Any:
    """``steps`` that return the loss of the whole batch instead of a device's own outputs."""

    def with_loss(
        state: TrainState, frozen: Any, batch: Batch, count: jax.Array | int
    ) -> tuple[TrainState, jax.Array]:
        state, f = steps(state, frozen, batch, count)
        sums = summed(loss, f, batch.y, batch.weight), batch.weight.sum()
        value, examples = _psum(sums, mesh)
        return state, value / examples

    return with_loss


def _psum(tree: Any, mesh: Mesh) -> Any:
    """The sum of ``tree`` over all devices of ``mesh``."""
    if mesh.size == 1:  # `psum` would copy the whole gradient on CPU
        return tree
    # One collective an array would be most of a short step; to join large arrays costs more than
    # a collective.
    leaves, treedef = jax.tree.flatten(tree)
    small = [leaf.size * leaf.dtype.itemsize <= JOINED_BYTES for leaf in leaves]
    whole, back = ravel_pytree([leaf for leaf, joined in zip(leaves, small, strict=True) if joined])
    parts = iter(back(jax.lax.psum(whole, DATA)) if any(small) else ())
    totals = [
        next(parts) if joined else pipeline.psum(leaf, DATA)
        for leaf, joined in zip(leaves, small, strict=True)
    ]
    return jax.tree.unflatten(treedef, totals)


def step_bytes(compiled: Any, model: nn.Module, params: Any, x: Any, mesh: Mesh) -> int:
    """Memory of a compiled step of `make_step` on a batch like ``x``, its arguments included."""
    need, total = compiled.memory_analysis(), 0
    if need is not None:
        total = need.temp_size_in_bytes + need.argument_size_in_bytes
        total += need.output_size_in_bytes - need.alias_size_in_bytes
    total *= mesh.size
    return total + engine_for(model, params, x, mesh).scratch_bytes(x)


def make_predict(model: nn.Module, mesh: Mesh, state_bytes: int = THREAD_STATE_BYTES) -> Any:
    """(params, frozen, x [n, ...]) -> outputs [n, d_out] on the host, in chunks of one shape."""
    stages = pipeline.stages_of(mesh)

    def of_shard(params: Any, frozen: Any, x: jax.Array) -> jax.Array:
        if stages == 1:
            engine = engine_for(model, params, x, mesh, state_bytes)
            return engine.outputs(params, frozen, x)
        f, is_last = pipeline.staged_outputs(cast(DeepNarrow, model), params, frozen, x, stages)
        return jax.lax.psum(jnp.where(is_last, f, 0), DEPTH)

    # Every process needs all outputs.
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
