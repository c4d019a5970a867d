"""The quantities of section 3.3, by which Theorem 3.2 is proved, measured on real networks.

Theorem 3.2 (the kernel hardly changes) follows from two facts about training: the Lyapunov function
Gamma = Psi_2 + Psi_8 + Phi_1 + ... + Phi_8 hardly grows, and hardly any neuron's pre-activation
changes its sign. Theorem 4.2 says the same of a CNN, whose pre-activations are images: a norm is
then a mean over pixels too, and the output is the average over them. Use `measure` to check both on
a network before and after training.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_rows, checked_inputs
from dnntk.errors import InputError
from dnntk.networks.layers import Layer
from dnntk.networks.models import DeepNarrow, Variables, network_of, to_standard

__all__ = ["UNITS", "Lyapunov", "measure"]

POWERS = 8
UNITS = ("input", "random", "output")


class Lyapunov(NamedTuple):
    """The result of `measure`; norms of functions are root mean squares over the inputs.

    Attributes:
        phi: [8], Phi_1 to Phi_8: sizes and changes of the layers' pre-activations, in units of C.
        psi_2: [], from the products of all runs of layers; NaN with ``psi_2=False``.
        psi_8: [], from the products of each layer and all layers after it.
        gamma: [], the sum of the above, without psi_2 if that is NaN.
        sign_changes: [], fraction of hidden pre-activations, over layers, units and inputs (and
            pixels), that have changed their sign.
        movement: [3], largest |f_t - f_0| of any pre-activation of the input, random and output
            units (`UNITS`).
        distance: [3], least |f_t| of the same, the distance from the ReLU's kink at time t.
    """

    phi: jax.Array
    psi_2: jax.Array
    psi_8: jax.Array
    gamma: jax.Array
    sign_changes: jax.Array
    movement: jax.Array
    distance: jax.Array


def measure(
    model: DeepNarrow,
    variables: Variables,
    trained: Variables,
    x: ArrayLike,
    *,
    psi_2: bool = True,
) -> Lyapunov:
    """Measure Gamma_L(t) and its terms (section 3.3) between two times of a network's training.

    Args:
        model: an MLP or a CNN, either parametrization.
        variables: of ``model`` at time 0.
        trained: of ``model`` at time t; pass ``variables`` again for the values at time 0.
        x: [n, d_in] or images [n, H, W, c], the training inputs.
        psi_2: compute Psi_2, too, in time of order n L^2 width^3 and memory n L width^2; the rest
            takes n L width^2 and n L width (d_out + 2). Psi_2 needs a finite scale. The width of a
            CNN is its channels times its pixels here: leave Psi_2 out but for small images.

    Returns:
        The measured quantities, in the dtype of inputs and parameters together. Pure; works under
        jit and vmap.

    Raises:
        InputError: ``model`` is no deep narrow network, x has another shape, or the scale is
            infinite with Psi_2.
    """
    if not isinstance(model, DeepNarrow):
        raise InputError(
            "model: expected a DeepNarrowMLP or DeepNarrowCNN, as in sections 3.3 and 4, got "
            f"{type(model).__name__}"
        )
    if psi_2 and model.scale == float("inf"):
        raise InputError(
            "scale: Psi_2 is of the literal matrices; give psi_2=False or a finite scale"
        )
    x = checked_inputs("x", x)
    check_rows("x", x)
    return _measure(model, variables, trained, x, psi_2)


@partial(jax.jit, static_argnums=(0, 4))
def _measure(
    model: DeepNarrow, variables: Variables, trained: Variables, x: jax.Array, psi_2: bool
) -> Lyapunov:
    before, after = (_hidden_layers(model, v, x) for v in (variables, trained))
    moved = after.states - before.states
    moved = jnp.where(moved == 0, 0, moved * before.unit)  # a unit may be infinite
    root = math.sqrt(before.pixels)
    phi_terms = (_norm(before.values) + _norm(moved / model.scale)) / root
    powers = jnp.arange(1, POWERS + 1, dtype=phi_terms.dtype)
    phi = jnp.mean(phi_terms[None] ** powers[:, None], axis=1)
    change = after.by_output - before.by_output
    psi_terms = sum(_root_mean_square(_operator_norm(p)) for p in (before.by_output, change)) * root
    psi_8 = jnp.mean(psi_terms**8)
    psi, dtype = jnp.asarray(jnp.nan, phi.dtype), phi.dtype
    if psi_2:
        psi = _psi_2(model, (variables, trained), x, (before.active, after.active))
    return Lyapunov(
        phi,
        psi,
        psi_8,
        jnp.sum(phi) + psi_8 + (psi if psi_2 else 0),
        jnp.mean(before.active != after.active, dtype=dtype),
        before.by_kind(jnp.max, jnp.abs(moved)),
        before.by_kind(jnp.min, jnp.abs(after.values)) * model.scale,
    )


class _Hidden(NamedTuple):
    """Hidden layers 1 to L - 1, [L - 1, units, n]; a CNN's units are those of every pixel.

    Attributes:
        values: pre-activations over C.
        states: z of the network's form, whose change by 1 changes the pre-activation by ``unit``.
        unit: [1, units, 1].
        active: bool, True where the ReLU passes the pre-activation on.
        by_output: [L - 1, n, k, units], the outputs' derivatives by the pre-activations, which are
            the thesis's products of layers l to L.
        channels: sizes of the blocks of input, random and output units of one pixel.
    """

    values: jax.Array
    states: jax.Array
    unit: jax.Array
    active: jax.Array
    by_output: jax.Array
    channels: tuple[int, int, int]

    @property
    def pixels(self) -> int:
        """Pixels of an image, 1 for an MLP."""
        return self.unit.shape[1] // sum(self.channels)

    def by_kind(self, extreme: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
        """[3], the extreme of ``values`` [L - 1, units, n] among the units of each kind."""
        ends = np.cumsum(self.channels)[:-1] * self.pixels
        return jnp.stack([extreme(block) for block in jnp.split(values, ends, axis=1)])


def _hidden_layers(model: DeepNarrow, variables: Variables, x: jax.Array) -> _Hidden:
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
    unit = jnp.broadcast_to(jnp.asarray(form.unit, z.dtype), (z.shape[1], z.shape[2], 1))

    def flat(values: jax.Array) -> jax.Array:
        """[..., channels, positions, n] -> [..., units, n]."""
        pixels = values[..., np.flatnonzero(network.affine.mask), :]
        return pixels.reshape(*values.shape[:-3], -1, values.shape[-1])

    scale = model.scale if form.literal else 1.0
    return _Hidden(
        flat(jax.vmap(form.read)(z)) / scale,
        flat(z),
        flat(unit)[None],
        flat(jax.vmap(network.active)(z)),
        (flat(g) / flat(unit)[None, None]).transpose(0, 3, 1, 2),
        (x.shape[-1], model.random_units, model.d_out),
    )


def _psi_2(
    model: DeepNarrow,
    times: tuple[Variables, Variables],
    x: jax.Array,
    active: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Psi_2: the products of layers i to l for all 2 <= i <= l <= L, all i at once."""
    masked = [
        jnp.where(passed.transpose(0, 2, 1)[:, :, None], _matrices(model, variables, x)[:, None], 0)
        for variables, passed in zip(times, active, strict=True)
    ]
    length, n, width, _ = masked[0].shape
    dtype = masked[0].dtype
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

    zeros = jnp.zeros((length, n, width, width), dtype)
    _, rows = lax.scan(layer, (zeros, zeros), (layers, *masked))
    return jnp.sum(rows) / length


def _matrices(model: DeepNarrow, variables: Variables, x: jax.Array) -> jax.Array:
    """W^2 to W^L, [L - 1, units, units]; the last has additional rows of zeros.

    A CNN's last layer includes the average over pixels, whose norm as one over a mean is 1.
    """
    network, params, _ = network_of(*to_standard(model, variables), x)
    middle, last = (network.weights(name, params[name], None) for name in ("middle", "last"))
    positions = np.flatnonzero(network.affine.mask)
    channels, pixels = params["last"]["kernel"].shape[-2], len(positions)
    # One example for every unit, at which it is 1 and the others are 0.
    basis = np.zeros((channels, network.packed.shape[1], channels * pixels))
    basis[:, positions] = np.eye(channels * pixels).reshape(channels, pixels, -1)
    products = partial(network.affine.linear, jnp.asarray(basis, last["kernel"].dtype))
    of_middle = jax.vmap(products)(middle["kernel"])[:, :, positions]
    of_last = math.sqrt(pixels) * network.affine.read_out(products(last["kernel"])).T
    padded = jnp.pad(of_last, ((0, channels * pixels - len(of_last)), (0, 0)))
    return jnp.concatenate([of_middle.reshape(-1, *padded.shape), padded[None]])


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
