"""The largest eigenvalue of the network's own kernel, which bounds the step; never formed.

Gradient descent with step eta on the thesis's loss is stable while eta < 2 / lambda_max(K / N), K
the tangent kernel on the N training points. Power iteration in function space needs K only as
v -> J (J^T v), one vector-Jacobian and one Jacobian-vector product over the whole network.
"""

import functools
from typing import Any, NamedTuple, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dnntk.native.blocks import THREAD_STATE_BYTES
from dnntk.networks.models import DeepNarrow
from dnntk.training import pipeline
from dnntk.training.engine import engine_for
from dnntk.training.pipeline import DATA, DEPTH
from dnntk.training.placement import put_batch, put_state

__all__ = [
    *("Eigenvalue", "kernel_product", "largest_eigenvalue"),
]


class Eigenvalue(NamedTuple):
    """A power iteration's result: the eigenvalue, whether it converged, and its iterations.

    ``targets_rate`` is v^T (K/N) v, v the targets less their mean, at norm 1: the rate at which
    gradient flow begins to learn more than a constant. With a constant kernel at least the fraction
    exp(-targets_rate t) of v is left at time t (Jensen's inequality).
    """

    value: float
    converged: bool
    iterations: int
    targets_rate: float | None = None


def largest_eigenvalue(
    model: nn.Module,
    variables: dict[str, Any],
    x: np.ndarray,
    mesh: Mesh,
    *,
    y: np.ndarray | None = None,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_iterations: int = 50,
    state_bytes: int = THREAD_STATE_BYTES,
) -> Eigenvalue:
    """lambda_max(J J^T / N) by power iteration, J the outputs' Jacobian by ``params``.

    Args:
        model: a flax module; for a deep narrow network in the ntk form J J^T is the scaled NTK.
        variables: its collections, ``params`` among them.
        x: [N, ...] inputs.
        mesh: devices; its axis ``data`` splits the inputs, and an axis ``depth`` the layers of a
            deep narrow network.
        y: [N, d_out] targets, for ``targets_rate``.
        seed: seed of the random starting vector, which is positive.
        tolerance: stop at this relative change of the estimate, which grows to the eigenvalue.
        max_iterations: most iterations; each costs about two training steps on these inputs.
        state_bytes: of states that a thread of the CPU library may keep.

    Returns:
        The eigenvalue of K / N, in units of 1 / kernel time; 0 where the kernel vanishes.
    """
    frozen, params = put_state(flax.core.pop(variables, "params"), mesh)
    whole = jax.eval_shape(lambda held: pipeline.unpadded(held, model), variables)
    outputs = jax.eval_shape(model.apply, whole, x[:1])
    vector = np.abs(np.random.default_rng(seed).standard_normal((len(x), outputs.shape[1])))
    batch = put_batch(x, vector.astype(outputs.dtype), mesh)
    apply_kernel = kernel_product(model, params, frozen, mesh, state_bytes)
    image, previous = batch.y, 0.0
    for iteration in range(1, max_iterations + 1):
        image, value = apply_kernel(params, frozen, batch.x, image, batch.weight)
        value = float(value)
        converged = not value > 0 or abs(value - previous) <= tolerance * value
        if converged or iteration == max_iterations:
            break
        previous = value
    rate = None
    if y is not None and (centred := y - y.mean(axis=0)).any():
        beyond = put_batch(x, centred.astype(outputs.dtype), mesh)
        rate = float(apply_kernel(params, frozen, beyond.x, beyond.y, beyond.weight)[1])
    return Eigenvalue(value, converged and value > 0, iteration, rate)


def kernel_product(
    model: nn.Module,
    params: Any,
    frozen: Any,
    mesh: Mesh,
    state_bytes: int = THREAD_STATE_BYTES,
) -> Any:
    """One power iteration: (params, frozen, x, v, weight) -> (K v, v^T K v / N).

    ``params`` and ``frozen`` may be shapes alone. v is first set to 0 where weight is 0, and
    divided by its norm.
    """
    if pipeline.stages_of(mesh) > 1:
        products = functools.partial(_staged_products, model, mesh)
    else:
        products = functools.partial(_products, model, mesh, state_bytes)

    def product(params: Any, frozen: Any, x: jax.Array, v: jax.Array, weight: jax.Array) -> Any:
        v = v * weight[:, None]
        v = v / jnp.sqrt(jax.lax.psum(jnp.sum(v**2), DATA))
        image, square = products(params, frozen, x, v)
        # v^T K v = |J^T v|^2: the Rayleigh quotient, from below.
        return image, square / jax.lax.psum(weight.sum(), DATA)

    data = P(DATA)
    held = pipeline.specs(params, mesh), pipeline.specs(frozen, mesh)
    return jax.jit(
        jax.shard_map(
            product,
            mesh=mesh,
            in_specs=(*held, data, data, data),
            out_specs=(data, P()),
            check_vma=False,
        )
    )


def _products(
    model: nn.Module,
    mesh: Mesh,
    state_bytes: int,
    params: Any,
    frozen: Any,
    x: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """J (J^T v) at a device's own inputs, and |J^T v|^2; v has norm 1 on all devices together."""
    engine = engine_for(model, params, x, mesh, state_bytes)
    gradient = pipeline.psum(engine.vjp(params, frozen, x, v), DATA)
    image = engine.jvp(params, frozen, x, gradient)
    return image, _square(gradient)


def _staged_products(
    model: nn.Module, mesh: Mesh, params: Any, frozen: Any, x: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_products` where each device has the layers of its stage alone."""

    def outputs_at(params: Any) -> jax.Array:
        stages = pipeline.stages_of(mesh)
        f, is_last = pipeline.staged_outputs(cast(DeepNarrow, model), params, frozen, x, stages)
        return jnp.where(is_last, f, 0)

    _, pull_back = jax.vjp(outputs_at, params)
    gradient = pipeline.psum_gradient(*pull_back(v))
    _, image = jax.jvp(outputs_at, (params,), (gradient,))
    ends = {name: g for name, g in gradient.items() if name != "middle"}
    square = _square(ends) + jax.lax.psum(_square(gradient["middle"]), DEPTH)
    return jax.lax.psum(image, DEPTH), square


def _square(tree: Any) -> jax.Array:
    return jnp.asarray(sum(jnp.sum(g**2) for g in jax.tree.leaves(tree)))
