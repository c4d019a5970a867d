"""The NTK of a deep narrow network, layer by layer: one way up the network, one down, no Jacobian.

With A a layer's inputs and B the outputs' derivatives by its pre-activations, the layer adds
(A A'^T + 1) * (B B'^T) to the kernel. `plan` says how many layers are held at a time, `layerwise`
goes through them. `dnntk.ntk.empirical.empirical_ntk` is the way in.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dnntk.networks.layers import Layer, Network, in_segments
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, Variables, network_of

Outputs = Literal["full", "trace", "diagonal"]

# Up to this many weights a layer, one product over all weights of a segment is faster than two
# products and a multiplication of n1 n2 entries a layer.
FEW_WEIGHTS = 400
# How an [n1, n2] factor meets the layouts of `_products`.
NEW_AXES: dict[str, tuple[int, ...]] = {"full": (0, 2), "trace": (), "diagonal": (0,)}


class Plan(NamedTuple):
    """How the layers are gone through: ``segment`` at a time, ``elements`` held an example."""

    segment: int
    elements: int
    features: bool


def plan(model: DeepNarrow, shape: tuple[int, ...]) -> Plan:
    """The segment that takes the least memory: state at its starts, and what it needs inside."""
    if isinstance(model, DeepNarrowCNN):
        positions = math.prod(shape[:2]) // model.pool**2
        window = model.kernel_size**2
    else:
        positions = window = 1
    width = shape[-1] + 1 + model.d_out
    state, weights = width * positions, (window * width + 1) * width
    features = isinstance(model, DeepNarrowCNN) or weights <= FEW_WEIGHTS
    inside = state * (2 + 2 * model.d_out) + (weights * model.d_out if features else 0)
    segment = model.segment or max(1, round(math.sqrt(model.depth * state / inside)))
    return Plan(segment, state * (model.depth // segment + 1) + inside * segment, features)


def layerwise(
    model: DeepNarrow,
    outputs: Outputs,
    held: Plan,
    variables: Variables,
    x1: jax.Array,
    x2: jax.Array,
) -> jax.Array:
    """The scaled NTK of a pair of blocks: up through the network, and down again."""
    same = x1 is x2
    x = x1 if same else jnp.concatenate([x1, x2])
    network, params, initial = network_of(model, variables, x)
    scale = model.parameter_scale if model.parametrization == "standard" else 1.0
    add = partial(_add_layers, network, held.features, outputs, scale, slice(len(x1)))
    add = partial(add, slice(None) if same else slice(len(x1), None))
    first, last = (
        network.weights(name, params[name], initial.get(name)) for name in ("first", "last")
    )
    blocks, rest = in_segments((params["middle"], initial.get("middle")), held.segment)

    def up(h: jax.Array, weights: Layer) -> tuple[jax.Array, jax.Array]:
        return network.activate(network.middle(h, weights)), h

    def up_segment(h: jax.Array, layers: Any) -> tuple[jax.Array, jax.Array]:
        return lax.scan(up, h, network.weights("middle", *layers))[0], h

    def down(g: jax.Array, layer: tuple[jax.Array, Layer]) -> tuple[jax.Array, jax.Array]:
        return network.pull(network.middle, *layer, g), g

    def down_segment(carry: Any, block: Any) -> tuple[Any, None]:
        (g, total), (start, layers) = carry, block
        weights = network.weights("middle", *layers)
        _, states = lax.scan(up, start, weights)
        below, g = lax.scan(down, g, (states, weights), reverse=True)
        return (below, add(total, "middle", jax.vmap(network.form.read)(states), g)), None

    h = network.activate(network.first(first))
    starts = None
    if blocks is not None:
        h, starts = lax.scan(up_segment, h, blocks)
    if rest is not None:
        h, rest_start = up_segment(h, rest)

    g = network.seeds(network.last(h, last))
    k, n1, n2 = len(g), len(x1), len(x2)
    shape = {"full": (k, n1, k, n2), "trace": (n1, n2), "diagonal": (k, n1, n2)}[outputs]
    total = add(jnp.zeros(shape, g.dtype), "last", network.form.read(h)[None], g[None])
    g = network.pull(network.last, h, last, g)
    if rest is not None:
        (g, total), _ = down_segment((g, total), (rest_start, rest))
    if blocks is not None:
        (g, total), _ = lax.scan(down_segment, (g, total), (starts, blocks), reverse=True)
    total = add(total, "first", network.packed[None], g[None])
    return total.transpose({"full": (1, 3, 0, 2), "trace": (0, 1), "diagonal": (1, 2, 0)}[outputs])


def _add_layers(
    network: Network,
    features: bool,
    outputs: Outputs,
    scale: float,
    left: slice,
    right: slice,
    total: jax.Array,
    name: str,
    q: jax.Array,
    g: jax.Array,
) -> jax.Array:
    """Add the share of some layers: q [s, in, positions, n], g [s, k, out, positions, n]."""
    slope, ratio = network.form.slope(name, g.shape[2])
    by_unit = jnp.broadcast_to(jnp.asarray(scale * slope, g.dtype), g.shape[2])
    g = g * by_unit[None, None, :, None, None]
    if features:
        by_weight = jax.vmap(partial(network.affine.by_weight, ratio))(q, g)
        rows = by_weight.reshape(-1, *by_weight.shape[-2:])
        return total + _products(rows[..., left], rows[..., right], outputs)

    def layer(total: jax.Array, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, g = arrays[0][:, 0], arrays[1][:, :, 0].swapaxes(0, 1)
        inputs = jnp.einsum("pn,pm->nm", q[:, left], q[:, right], precision="highest") + ratio**2
        by_shift = _products(g[..., left], g[..., right], outputs)
        inputs = jnp.expand_dims(inputs, NEW_AXES[outputs])
        return total + inputs * by_shift, None

    return lax.scan(layer, total, (q, g))[0]


def _products(left: jax.Array, right: jax.Array, outputs: Outputs) -> jax.Array:
    """[p, k, n1], [p, k, n2] -> [k, n1, k, n2], [n1, n2] or [k, n1, n2]: sums over p."""
    indices = {"full": "knlm", "trace": "nm", "diagonal": "knm"}[outputs]
    row = "l" if outputs == "full" else "k"
    return jnp.einsum(f"pkn,p{row}m->{indices}", left, right, precision=lax.Precision.HIGHEST)
