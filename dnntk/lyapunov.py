"""The quantities of section 3.3, by which Theorem 3.2 is proved, measured on real networks.

Theorem 3.2 (the kernel hardly changes) follows from two facts about training: the Lyapunov function
Gamma = Psi_2 + Psi_8 + Phi_1 + ... + Phi_8 hardly grows, and hardly any neuron's pre-activation
changes its sign. Use `measure` to check both on a network before and after training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_rows, checked_inputs
from dnntk.errors import InputError
from dnntk.networks.layers import Layer
from dnntk.networks.models import DeepNarrowMLP, Variables, network_of, to_standard

__all__ = ["Lyapunov", "measure"]

POWERS = 8


class Lyapunov(NamedTuple):
    """The result of `measure`; norms of functions are root mean squares over the inputs.

    Attributes:
        phi: [8], Phi_1 to Phi_8: sizes and changes of the layers' pre-activations, in units of C.
        psi_2: [], from the products of all runs of layers; NaN with ``psi_2=False``.
        psi_8: [], from the products of each layer and all layers after it.
        gamma: [], the sum of the above, without psi_2 if that is NaN.
        sign_changes: [], fraction of hidden pre-activations, over layers, units and inputs, that
            have changed their sign.
    """

    phi: jax.Array
    psi_2: jax.Array
    psi_8: jax.Array
    gamma: jax.Array
    sign_changes: jax.Array


def measure(
    model: DeepNarrowMLP,
    variables: Variables,
    trained: Variables,
    x: ArrayLike,
    *,
    psi_2: bool = True,
) -> Lyapunov:
    """Measure Gamma_L(t) and its terms (section 3.3) between two times of a network's training.

    Args:
        model: an MLP, either parametrization.
        variables: of ``model`` at time 0.
        trained: of ``model`` at time t; pass ``variables`` again for the values at time 0.
        x: [n, d_in], the training inputs.
        psi_2: compute Psi_2, too, in time of order n L^2 width^3 and memory n L width^2; the rest
            takes n L width^2 and n L width (d_out + 2). Psi_2 needs a finite scale.

    Returns:
        The measured quantities, in the dtype of inputs and parameters together. Pure; works under
        jit and vmap.

    Raises:
        InputError: ``model`` is no MLP, x is not [n, d_in], or the scale is infinite with Psi_2.
    """
    if not isinstance(model, DeepNarrowMLP):
        raise InputError(
            f"model: expected a DeepNarrowMLP, as in section 3.3, got {type(model).__name__}"
        )
    if psi_2 and model.scale == float("inf"):
        raise InputError(
            "scale: Psi_2 is of the literal matrices; give psi_2=False or a finite scale"
        )
    x = checked_inputs("x", x)
    check_rows("x", x)
    before, after = (_hidden_layers(model, v, x) for v in (variables, trained))
    moved = (after.states - before.states) * before.unit
    phi_terms = _norm(before.values) + _norm(moved)
    powers = jnp.arange(1, POWERS + 1, dtype=phi_terms.dtype)
    phi = jnp.mean(phi_terms[None] ** powers[:, None], axis=1)
    change = after.by_output - before.by_output
    psi_terms = sum(_root_mean_square(_operator_norm(p)) for p in (before.by_output, change))
    psi_8 = jnp.mean(psi_terms**8)
    psi, dtype = jnp.asarray(jnp.nan, phi.dtype), phi.dtype
    if psi_2:
        psi = _psi_2(model, variables, trained, before.active, after.active, dtype)
    return Lyapunov(
        phi,
        psi,
        psi_8,
        jnp.sum(phi) + psi_8 + (psi if psi_2 else 0),
        jnp.mean(before.active != after.active, dtype=dtype),
    )


class _Hidden(NamedTuple):
    """Hidden layers 1 to L - 1, [L - 1, width, n].

    Attributes:
        values: pre-activations over C.
        states: z of the network's form, whose change by 1 changes ``values`` by ``unit``.
        unit: [1, width, 1].
        active: bool, True where the ReLU passes the pre-activation on.
        by_output: [L - 1, n, k, width], the outputs' derivatives by the pre-activations, which are
            the thesis's products of layers l to L.
    """

    values: jax.Array
    states: jax.Array
    unit: jax.Array
    active: jax.Array
    by_output: jax.Array


def _hidden_layers(model: DeepNarrowMLP, variables: Variables, x: jax.Array) -> _Hidden:
    network, params, initial = network_of(model, variables, x)
    form = network.form
    first, middle, last = (
        network.weights(name, params[name], initial.get(name))
        for name in ("first", "middle", "last")
    )

    def forward(h: jax.Array, layer: Layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        z = network.middle(h, layer)
        return network.activate(z), (z, h)

    def backward(g: jax.Array, layer: tuple[jax.Array, Layer]) -> tuple[jax.Array, jax.Array]:
        return network.pull(network.middle, *layer, g), g

    z1 = network.first(first)
    h, (z, below) = lax.scan(forward, network.activate(z1), middle)
    g = network.pull(network.last, h, last, network.seeds(network.last(h, last)))
    g1, g = lax.scan(backward, g, (below, middle), reverse=True)
    z, g = jnp.concatenate([z1[None], z]), jnp.concatenate([g1[None], g])
    per_state, column = (
        jnp.broadcast_to(jnp.asarray(values, z.dtype), (z.shape[1], 1, 1))
        for values in (form.unit, form.column)
    )
    scale = model.scale if form.literal else 1.0
    return _Hidden(
        jax.vmap(form.read)(z)[:, :, 0] / scale,
        z[:, :, 0],
        (column / scale)[None, :, 0],
        jax.vmap(network.active)(z)[:, :, 0],
        (g / per_state[None, None])[:, :, :, 0].transpose(0, 3, 1, 2),
    )


def _psi_2(
    model: DeepNarrowMLP,
    variables: Variables,
    trained: Variables,
    active_before: jax.Array,
    active_after: jax.Array,
    dtype: np.dtype,
) -> jax.Array:
    """Psi_2: the products of layers i to l for all 2 <= i <= l <= L, all i at once."""
    length, width, n = active_before.shape
    layers = jnp.arange(1, length + 1, dtype=dtype)
    identity = jnp.eye(width, dtype=dtype)

    def layer(products: tuple, factors: tuple) -> tuple[tuple, jax.Array]:
        number, before, after = factors
        start = (layers == number)[:, None, None, None]
        old, new = (
            jnp.einsum("nij,lnjk->lnik", factor, jnp.where(start, identity[None, None], product))
            for factor, product in zip((before, after), products, strict=True)
        )
        size, change = (_root_mean_square(_operator_norm(p)) for p in (old, new - old))
        return (old, new), jnp.sum((size + change) ** 2) / number

    masked = [
        jnp.where(
            active.transpose(0, 2, 1)[:, :, None], _matrices(model, v).astype(dtype)[:, None], 0
        )
        for v, active in ((variables, active_before), (trained, active_after))
    ]
    zeros = jnp.zeros((length, n, width, width), dtype)
    _, rows = lax.scan(layer, (zeros, zeros), (layers, *masked))
    return jnp.sum(rows) / length


def _matrices(model: DeepNarrowMLP, variables: Variables) -> jax.Array:
    """W^2 to W^L, [L - 1, width, width]; the last has additional rows of zeros."""
    params = to_standard(model, variables)[1]["params"]
    middle, last = (params[name]["kernel"].swapaxes(-1, -2) for name in ("middle", "last"))
    padded = jnp.pad(last, ((0, last.shape[1] - last.shape[0]), (0, 0)))
    return jnp.concatenate([middle, padded[None]])


def _operator_norm(matrices: jax.Array) -> jax.Array:
    """Largest singular values: [..., k, w] -> [...]."""
    if matrices.shape[-2] == 1:
        return jnp.sqrt(jnp.sum(matrices**2, (-1, -2)))
    return jnp.linalg.norm(matrices, ord=2, axis=(-2, -1))


def _norm(values: jax.Array) -> jax.Array:
    """Root mean square over inputs of the Euclidean norm: [l, units, n] -> [l]."""
    return jnp.sqrt(jnp.mean(jnp.sum(values**2, axis=1), axis=-1))


def _root_mean_square(norms: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(norms**2, axis=-1))
