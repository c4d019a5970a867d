"""The NTK of a deep narrow network by one forward and one backward pass, without its Jacobian.

With A a layer's inputs and B the outputs' derivatives by its pre-activations, the layer adds
(A A'^T + 1) * (B B'^T) to the kernel. `choose_segments` says how many layers are in memory at a
time, `layerwise` computes the kernel. Users call `dnntk.empirical_ntk`.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dnntk.networks.layers import Layer, Network, in_segments
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, Variables, network_of

__all__ = ["Outputs", "Segments", "choose_segments", "layerwise"]

Outputs = Literal["full", "trace", "diagonal"]

# Up to this many weights per layer, one product over all weights of a segment is faster than two
# products and a multiplication of n1 n2 entries for each layer.
FEW_WEIGHTS = 400
# Axes by which an [n1, n2] factor is broadcast to the layouts of `_products`.
NEW_AXES: dict[str, tuple[int, ...]] = {"full": (0, 2), "trace": (), "diagonal": (0,)}


class Segments(NamedTuple):
    """How the passes are divided.

    Attributes:
        layers: layers in a segment.
        elements: array elements in memory for each example.
        by_weight: True to multiply gradients by every weight, False to multiply B and A apart.
    """

    layers: int
    elements: int
    by_weight: bool


def choose_segments(model: DeepNarrow, shape: tuple[int, ...]) -> Segments:
    """The segments that take the least memory: states between them, and all arrays of one."""
    if isinstance(model, DeepNarrowCNN):
        positions = math.prod(shape[:2]) // model.pool**2
        window = model.kernel_size**2
    else:
        positions = window = 1
    width = shape[-1] + model.random_units + model.d_out
    state, weights = width * positions, (window * width + 1) * width
    by_weight = isinstance(model, DeepNarrowCNN) or weights <= FEW_WEIGHTS
    inside = state * (2 + 2 * model.d_out) + (weights * model.d_out if by_weight else 0)
    layers = model.segment or max(1, round(math.sqrt(model.depth * state / inside)))
    return Segments(layers, state * (model.depth // layers + 1) + inside * layers, by_weight)


def layerwise(
    model: DeepNarrow,
    outputs: Outputs,
    segments: Segments,
    variables: Variables,
    x1: jax.Array,
    x2: jax.Array,
) -> jax.Array:
    """The scaled NTK of a pair of blocks of examples."""
    same = x1 is x2
    x = x1 if same else jnp.concatenate([x1, x2])
    network, params, initial = network_of(model, variables, x)
    scale = model.parameter_scale if model.parametrization == "standard" else 1.0
    add = partial(_add_layers, network, segments.by_weight, outputs, scale, slice(len(x1)))
    add = partial(add, slice(None) if same else slice(len(x1), None))
    first, last = (
        network.weights(name, params[name], initial.get(name)) for name in ("first", "last")
    )
    blocks, rest = in_segments((params["middle"], initial.get("middle")), segments.layers)

    def forward(h: jax.Array, weights: Layer) -> tuple[jax.Array, jax.Array]:
        return network.activate(network.middle(h, weights)), h

    def forward_segment(h: jax.Array, layers: Any) -> tuple[jax.Array, jax.Array]:
        return lax.scan(forward, h, network.weights("middle", *layers))[0], h

    def backward(g: jax.Array, layer: tuple[jax.Array, Layer]) -> tuple[jax.Array, jax.Array]:
        return network.pull(network.middle, *layer, g), g

    def backward_segment(carry: Any, block: Any) -> tuple[Any, None]:
        (g, total), (start, layers) = carry, block
        weights = network.weights("middle", *layers)
        _, states = lax.scan(forward, start, weights)
        below, g = lax.scan(backward, g, (states, weights), reverse=True)
        return (below, add(total, "middle", jax.vmap(network.form.read)(states), g)), None

    h = network.activate(network.first(first))
    starts = None
    if blocks is not None:
        h, starts = lax.scan(forward_segment, h, blocks)
    if rest is not None:
        h, rest_start = forward_segment(h, rest)

    g = network.seeds(network.last(h, last))
    k, n1, n2 = len(g), len(x1), len(x2)
    shape = {"full": (k, n1, k, n2), "trace": (n1, n2), "diagonal": (k, n1, n2)}[outputs]
    total = add(jnp.zeros(shape, g.dtype), "last", network.form.read(h)[None], g[None])
    g = network.pull(network.last, h, last, g)
    if rest is not None:
        (g, total), _ = backward_segment((g, total), (rest_start, rest))
    if blocks is not None:
        (g, total), _ = lax.scan(backward_segment, (g, total), (starts, blocks), reverse=True)
    total = add(total, "first", network.packed[None], g[None])
    return total.transpose({"full": (1, 3, 0, 2), "trace": (0, 1), "diagonal": (1, 2, 0)}[outputs])


def _add_layers(
    network: Network,
    by_weight: bool,
    outputs: Outputs,
    scale: float,
    left: slice,
    right: slice,
    total: jax.Array,
    name: str,
    q: jax.Array,
    g: jax.Array,
) -> jax.Array:
    """Add the terms of some layers: q [s, in, positions, n], g [s, k, out, positions, n]."""
    slope, ratio = network.form.slope(name, g.shape[2])
    by_unit = jnp.broadcast_to(jnp.asarray(scale * slope, g.dtype), g.shape[2])
    g = g * by_unit[None, None, :, None, None]
    if by_weight:
        gradients = jax.vmap(partial(network.affine.by_weight, ratio))(q, g)
        rows = gradients.reshape(-1, *gradients.shape[-2:])
        return total + _products(rows[..., left], rows[..., right], outputs)

    def layer(total: jax.Array, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, g = arrays[0][:, 0], arrays[1][:, :, 0].swapaxes(0, 1)
        inputs = jnp.einsum("pn,pm->nm", q[:, left], q[:, right], precision="highest") + ratio**2
        derivatives = _products(g[..., left], g[..., right], outputs)
        return total + jnp.expand_dims(inputs, NEW_AXES[outputs]) * derivatives, None

    return lax.scan(layer, total, (q, g))[0]


def _products(left: jax.Array, right: jax.Array, outputs: Outputs) -> jax.Array:
    """[p, k, n1], [p, k, n2] -> [k, n1, k, n2], [n1, n2] or [k, n1, n2]: sums over p."""
    indices = {"full": "knlm", "trace": "nm", "diagonal": "knm"}[outputs]
    row = "l" if outputs == "full" else "k"
    return jnp.einsum(f"pkn,p{row}m->{indices}", left, right, precision=lax.Precision.HIGHEST)
