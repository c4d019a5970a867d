"""How a network's outputs and derivatives are computed: by the CPU library, or by plain JAX.

`engine_for` is the one place that chooses. A training step, a prediction or a power iteration asks
it once, when it is traced, and computes everything by the engine that it gets.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dnntk.native import ops
from dnntk.native.blocks import THREAD_STATE_BYTES, Blocks, CpuBudget
from dnntk.networks.models import DeepNarrow
from dnntk.runtime.devices import on_cpu
from dnntk.training.losses import derivative, summed
from dnntk.training.placement import Batch

__all__ = ["NativeEngine", "PlainEngine", "apply", "engine_for"]

# For the states of a part of a large batch: MNIST's 60,000 examples of 28 x 28 would take 16 GB.
PART_SCRATCH_BYTES = 1 << 32


def apply(model: nn.Module, params: Any, frozen: Any, x: jax.Array) -> jax.Array:
    """Outputs [n, d_out] at ``params``; ``frozen`` holds the collections beside them."""
    return cast(jax.Array, model.apply({"params": params, **frozen}, x))


@dataclasses.dataclass(frozen=True)
class PlainEngine:
    """JAX's own derivatives, of any module on any backend."""

    model: nn.Module
    loss: str = "squared"
    threaded = False  # does one device use all cores by itself?

    def outputs(self, params: Any, frozen: Any, x: jax.Array) -> jax.Array:
        """As `apply`; not to be differentiated."""
        return apply(self.model, params, frozen, x)

    def outputs_and_gradient(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """Outputs f [n, d_out], and the gradient of the loss (`summed`) by ``params``."""

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            f = apply(self.model, params, frozen, batch.x)
            return summed(self.loss, f, batch.y, batch.weight), f

        (_, f), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return f, gradient

    def vjp(self, params: Any, frozen: Any, x: jax.Array, v: jax.Array) -> Any:
        """J^T v of v [n, d_out], J the outputs' Jacobian by ``params``."""
        _, pull = jax.vjp(lambda params: apply(self.model, params, frozen, x), params)
        return pull(v)[0]

    def jvp(self, params: Any, frozen: Any, x: jax.Array, direction: Any) -> jax.Array:
        """J ``direction`` [n, d_out] of a tree like ``params``."""
        outputs = lambda params: apply(self.model, params, frozen, x)  # noqa: E731
        return jax.jvp(outputs, (params,), (direction,))[1]

    def recomputed(self, x: Any) -> float:
        """The fraction of the layers whose forward pass is recomputed for a gradient."""
        del x
        return 1.0

    def scratch_bytes(self, x: Any) -> int:
        """Memory on a batch like ``x`` that JAX does not know of."""
        del x
        return 0


@dataclasses.dataclass(frozen=True)
class NativeEngine(PlainEngine):
    """The CPU library (`dnntk.native.ops`), with ``budget`` of this machine's cores and caches."""

    model: DeepNarrow
    budget: CpuBudget = dataclasses.field(kw_only=True)
    threaded = True

    def alone(self) -> "NativeEngine":
        """The engine with all cores, for when no other device of this machine works."""
        return dataclasses.replace(self, budget=CpuBudget.of(1, self.budget.state_bytes))

    def outputs(self, params: Any, frozen: Any, x: jax.Array) -> jax.Array:
        """As `PlainEngine.outputs`."""
        return ops.forward(self.model, params, frozen, x, self.budget)

    def outputs_and_gradient(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """As `PlainEngine.outputs_and_gradient`."""
        return self._gradient(params, frozen, *self._affine(params, frozen, batch))

    def sgd_step(
        self, params: Any, frozen: Any, batch: Batch, rate: jax.Array, keep: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Outputs, and keep * params - rate * gradient in the memory of ``params``."""
        given = params, frozen, *self._affine(params, frozen, batch), rate
        return ops.sgd_step(self.model, *given, self.budget, keep)

    def sgd_steps(
        self, params: Any, frozen: Any, batch: Batch, rate: jax.Array, count: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        """Outputs before the last of ``count`` steps, and the parameters after it."""
        given = params, frozen, *self._affine(params, frozen, batch), rate, count
        return ops.sgd_steps(self.model, *given, self.budget)

    def vjp(self, params: Any, frozen: Any, x: jax.Array, v: jax.Array) -> Any:
        """As `PlainEngine.vjp`."""
        factor = jnp.zeros(len(x), v.dtype)
        return self._gradient(params, frozen, x, factor, v)[1]

    def jvp(self, params: Any, frozen: Any, x: jax.Array, direction: Any) -> jax.Array:
        """As `PlainEngine.jvp`."""
        return ops.tangent(self.model, params, frozen, x, direction, self.budget)

    def recomputed(self, x: Any) -> float:
        """As `PlainEngine.recomputed`."""
        layers = self.model.depth - 2
        return Blocks.for_batch(self.model, x, self.budget).recomputed(layers) / layers

    def scratch_bytes(self, x: Any) -> int:
        """As `PlainEngine.scratch_bytes`."""
        return self._whole_scratch_bytes(_first_part(x, self._parts(x)))

    def supports_sgd_step(self, x: Any) -> bool:
        """Does `sgd_step` save the gradient's memory on a batch like ``x``?"""
        return self._parts(x) == 1 and ops.supports_sgd_step(self.model, x)

    def supports_sgd_steps(self, x: Any) -> bool:
        """Does `sgd_steps` take a batch like ``x``?"""
        return self.loss == "squared" and ops.supports_sgd_steps(self.model, x)

    def _affine(
        self, params: Any, frozen: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(x, factor, shift): the loss's derivatives by the outputs f are factor f + shift.

        Those of another loss than squared error are not affine: they cost a forward pass more.
        """
        if self.loss == "squared":
            return batch.x, batch.weight, -batch.weight[:, None] * batch.y
        f = self.outputs(params, frozen, batch.x)
        return (
            batch.x,
            jnp.zeros_like(batch.weight),
            derivative(self.loss, f, batch.y, batch.weight),
        )

    def _gradient(
        self, params: Any, frozen: Any, x: jax.Array, factor: jax.Array, shift: jax.Array
    ) -> tuple[jax.Array, Any]:
        """As `ops.gradient`; of a part of the examples at a time, if memory for states is short."""
        parts = self._parts(x)
        if parts == 1:
            return ops.gradient(self.model, params, frozen, x, factor, shift, self.budget)

        def split(a: jax.Array) -> jax.Array:
            extra = -len(a) % parts  # such examples have no factor and no shift
            padded = jnp.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)))
            return padded.reshape(parts, -1, *a.shape[1:])

        def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
            x, factor, shift = part
            f, gradient = ops.gradient(self.model, params, frozen, x, factor, shift, self.budget)
            return jax.tree.map(jnp.add, total, gradient), f

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, f = jax.lax.scan(add, zeros, tuple(map(split, (x, factor, shift))))
        return f.reshape(-1, f.shape[-1])[: len(x)], total

    def _parts(self, x: Any) -> int:
        """Into how many parts a batch like ``x`` is split, one after the other, to save memory.

        Parts need the gradient two times more than a batch as a whole.
        """
        needed = self._whole_scratch_bytes(x)
        if needed <= 2 * PART_SCRATCH_BYTES:
            return 1
        return min(x.shape[0], -(-needed // PART_SCRATCH_BYTES))

    def _whole_scratch_bytes(self, x: Any) -> int:
        blocks = Blocks.for_batch(self.model, x, self.budget)
        return blocks.scratch_bytes(self.model.depth - 2, self.budget.threads)


def engine_for(
    model: nn.Module,
    params: Any,
    x: Any,
    devices: int | Mesh = 1,
    state_bytes: int = THREAD_STATE_BYTES,
    loss: str = "squared",
) -> PlainEngine:
    """The fastest engine for ``model`` at ``params`` on inputs like ``x``, by a loss.

    ``devices`` of this machine work at the same time: so many of JAX's default backend, or those of
    a mesh, which may be of devices that this machine lacks, to compile for them ahead of time.
    ``state_bytes`` is as in `CpuBudget`.
    """
    if isinstance(devices, Mesh):
        cpu, count = devices.devices.flat[0].platform == "cpu", devices.local_mesh.size
    else:
        cpu, count = on_cpu(), devices
    if cpu and ops.supports(model, params, x):
        return NativeEngine(model, loss, budget=CpuBudget.of(count, state_bytes))
    return PlainEngine(model, loss)


def _first_part(x: Any, parts: int) -> Any:
    """The shape of one of some parts of a batch."""
    return jax.ShapeDtypeStruct((-(-x.shape[0] // parts), *x.shape[1:]), x.dtype)
