"""How a deep narrow network computes: the affine map of a layer, the form it is in, the scan.

An architecture is an affine map (`Dense`, `Convolution`), a parametrization is a `Form`, and
`forward` scans over depth whatever the two are. Activations of O(sqrt(depth)) layers are stored;
the others are recomputed in segments on the way back.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.networks import convolution, narrow
from dnntk.networks.initializers import Layer, Layers
from dnntk.runtime.devices import on_cpu

# On accelerators, where a step is launches of small kernels: a compiler joins those of neighbours.
LAYERS_A_LOOP = 4


@dataclasses.dataclass(frozen=True)
class Dense:
    """The affine map of an MLP layer; hidden states are [units, 1, batch]."""

    window: tuple[int, ...] = ()
    mask: bool = True

    def pack(self, x: jax.Array) -> jax.Array:
        """[batch, units] -> [units, 1, batch]."""
        return x.T[:, None, :]

    def arrange(self, kernel: jax.Array) -> jax.Array:
        """The kernel as `linear` takes it: as it is."""
        return kernel

    def linear(self, h: jax.Array, kernel: jax.Array) -> jax.Array:
        """[in, 1, batch] and [in, out] -> [out, 1, batch]."""
        if kernel.size <= narrow.FEW_WEIGHTS:
            return narrow.product(h, kernel)
        return jnp.einsum("io,ipb->opb", kernel, h, precision=jax.lax.Precision.HIGHEST)

    def by_weight(self, ratio: float, q: jax.Array, g: jax.Array) -> jax.Array:
        """Gradients by every kernel and bias, an example each.

        The derivative by the bias counts ``ratio`` times:
        [in, 1, n] and [k, out, 1, n] -> [weights, k, n].
        """
        q = jnp.concatenate([q[:, 0], jnp.full((1, q.shape[2]), ratio, q.dtype)])
        products = q[:, None, None] * g[:, :, 0].swapaxes(0, 1)[None]
        return products.reshape(-1, *products.shape[2:])

    def read_out(self, h: jax.Array) -> jax.Array:
        """[k, 1, batch] -> [batch, k]."""
        return h[:, 0, :].T


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The affine map of a CNN layer; hidden states are in `convolution.RowLayout`."""

    layout: convolution.RowLayout

    @property
    def window(self) -> tuple[int, ...]:
        """The filter's shape."""
        return (self.layout.kernel_size, self.layout.kernel_size)

    @property
    def mask(self) -> np.ndarray:
        """[1, positions, 1] bool, True at the pixels."""
        return self.layout.mask[None, :, None]

    def pack(self, x: jax.Array) -> jax.Array:
        """[batch, H, W, c] -> [c, positions, batch]."""
        return self.layout.pack(x)

    def arrange(self, kernel: jax.Array) -> jax.Array:
        """[..., q, q, in, out] -> [..., q, out, q, in]."""
        return convolution.arrange(kernel)

    def linear(self, h: jax.Array, kernel: jax.Array) -> jax.Array:
        """[in, positions, batch] -> [out, positions, batch]."""
        return convolution.convolve(h, kernel, self.layout.row)

    def by_weight(self, ratio: float, q: jax.Array, g: jax.Array) -> jax.Array:
        """As `Dense.by_weight`: [in, positions, n], [k, out, positions, n] -> [weights, k, n]."""
        # A product of small matrices an example: sums over positions are slow otherwise.
        columns = jnp.stack(convolution.shifts(q, self.layout))
        columns = columns.transpose(3, 0, 1, 2).reshape(q.shape[2], -1, q.shape[1])
        rows = g.transpose(3, 2, 1, 0).reshape(q.shape[2], q.shape[1], -1)
        by_kernel = jnp.matmul(columns, rows, precision="highest")
        by_kernel = by_kernel.reshape(len(columns), -1, len(g)).transpose(1, 2, 0)
        return jnp.concatenate([by_kernel, ratio * jnp.sum(g, -2).swapaxes(0, 1)])

    def read_out(self, h: jax.Array) -> jax.Array:
        """Global average pool: [k, positions, batch] -> [batch, k]."""
        pixels = self.layout.height * self.layout.width
        return (jnp.where(self.mask, h, 0).sum(1) / pixels).T


Affine = Dense | Convolution


@dataclasses.dataclass(frozen=True)
class Form:
    """A layer in one form: h' = max(carry h + W q + b, floor) with q = base + column h.

    ``weights(name, params, initial)`` are W and b of the layers called ``name``. By the parameters
    they have the derivatives ``slope(name, units)``: of W, by unit (a number where all have the
    same), and of b, as a multiple of it. Other constants are [units, 1, 1]; ``base`` and ``floor``
    may depend on the position and the example.
    """

    weights: Callable[[str, Layer, Layer | None], Layer]
    slope: Callable[[str, int], tuple[np.ndarray | float, float]]
    column: np.ndarray | float = 1.0
    carry: np.ndarray | float = 0.0
    base: jax.Array | float = 0.0
    floor: jax.Array | float = 0.0
    unit: np.ndarray | float = 1.0
    start: jax.Array | float = 0.0  # what the first layer adds to W x + b

    @property
    def literal(self) -> bool:
        """Are states the thesis's own, and not deviations from their initial values?"""
        return isinstance(self.carry, float)

    def read(self, h: jax.Array) -> jax.Array:
        """What the next layer's weights multiply: q."""
        return h if self.literal else self.base + jnp.asarray(self.column) * h

    def carried(self, h: jax.Array) -> jax.Array | float:
        """What the next layer takes over unmultiplied."""
        return 0.0 if self.literal else jnp.asarray(self.carry) * h


def literal_form(step: float | None) -> Form:
    """The thesis's matrices as they are (no step), or an initial matrix + D * step."""

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        if step is None:
            return params
        return jax.tree.map(lambda w, d: w + step * d, initial, params)

    def slope(name: str, units: int) -> tuple[float, float]:
        del name, units
        return (1.0 if step is None else step), 1.0

    return Form(weights, slope)


def ntk_form(
    packed: jax.Array, depth: int, d_in: int, d_out: int, scale: float, mask: np.ndarray | bool
) -> Form:
    """State (alpha, m, r) of deviations: f_in = C x + alpha, f_mid = C m, f_out = C + r.

    With q = [x + alpha/C, m, 1 + r/C] and L the depth, before the ReLUs:
    alpha' = alpha + (D_a q + d_a/C) / sqrt L, m' = u q_a + v/C + (D_m q + d_m/C) / (C sqrt L),
    r' = r + (D_r q + d_r/C) / sqrt L. What D does is never added to a number of the size of x or C,
    where float32 would lose it: over 10,000 layers the loss would add up.
    """
    root, random = math.sqrt(depth), d_in
    dtype = packed.dtype

    def slope(name: str, units: int) -> tuple[np.ndarray, float]:
        by_unit = np.full(units, 1 / root)
        if name != "last":
            by_unit[random] = 1 / (scale * root)
        # Its own inputs are of size 1, the other layers' of size C, which they are divided by.
        return (by_unit / scale, 1.0) if name == "first" else (by_unit, 1 / scale)

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        kernel, bias = params["kernel"], params["bias"]
        by_unit, ratio = slope(name, kernel.shape[-1])
        kernel = kernel * _last_axis(by_unit, kernel)
        bias = bias * _last_axis(by_unit * ratio, bias)
        if initial is not None:
            u = initial["kernel"] / scale if name == "first" else initial["kernel"]
            kernel = kernel.at[..., :d_in, random].add(u)
            bias = bias.at[..., random].add(initial["bias"])
        return {"kernel": kernel, "bias": bias}

    def by_unit(inputs: float, middle: float, outputs: float) -> np.ndarray:
        values = [inputs] * d_in + [middle] + [outputs] * d_out
        return np.array(values, dtype)[:, None, None]

    # The thesis's inputs are positive. A negative one starts below its ReLU's kink, at C x.
    ones = jnp.broadcast_to(jnp.asarray(mask, dtype), (d_out, *packed.shape[1:]))
    base = jnp.concatenate([jnp.maximum(packed, 0), jnp.zeros_like(packed[:1]), ones])
    below = jnp.where(packed < 0, packed * min(scale, float(jnp.finfo(dtype).max)), 0)
    start = jnp.concatenate([below, jnp.zeros((1 + d_out, *packed.shape[1:]), dtype)])
    return Form(
        weights,
        slope,
        column=by_unit(1 / scale, 1.0, 1 / scale),
        carry=by_unit(1.0, 0.0, 1.0),
        base=base,
        floor=jnp.where(base > 0, -scale * jnp.where(base > 0, base, 1), 0).astype(dtype),
        unit=by_unit(1.0, scale if scale <= float(jnp.finfo(dtype).max) else math.inf, 1.0),
        start=start,
    )


def _last_axis(values: np.ndarray, like: jax.Array) -> np.ndarray:
    """[units] as [1, ..., 1, units] in ``like``'s rank and dtype."""
    return values.astype(like.dtype).reshape((1,) * (like.ndim - 1) + values.shape)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network on one packed input, layer by layer, up and down.

    ``enter``, ``step`` and ``leave`` are the first layer, a middle one and the last; each takes
    what `weights` made of its parameters. A state is what comes out of a ReLU, z what goes in.
    """

    affine: Affine
    form: Form
    packed: jax.Array

    def weights(self, name: str, params: Layer, initial: Layer | None) -> Layer:
        """Weights of the layers called ``name``, stacked where these are."""
        layer = self.form.weights(name, params, initial)
        return {"kernel": self.affine.arrange(layer["kernel"]), "bias": layer["bias"]}

    def enter(self, layer: Layer) -> jax.Array:
        """Z of the first layer."""
        return self._linear(self.packed, layer) + self.form.start

    def step(self, h: jax.Array, layer: Layer) -> jax.Array:
        """State to z of the next layer."""
        return self._linear(self.form.read(h), layer) + self.form.carried(h)

    def leave(self, h: jax.Array, layer: Layer) -> jax.Array:
        """State to the last layer's z [d_out, positions, batch]."""
        out = self._linear(self.form.read(h), layer)
        outputs = h[h.shape[0] - out.shape[0] :]
        return out if self.form.literal else out + outputs

    def activate(self, z: jax.Array) -> jax.Array:
        """Z to state."""
        return jnp.where(self.active(z), z, self.form.floor)

    def active(self, z: jax.Array) -> jax.Array:
        """Where the ReLU lets z through."""
        return jnp.asarray(self.affine.mask) & (z > self.form.floor)

    def seeds(self, z: jax.Array) -> jax.Array:
        """Derivatives [k, ...] of the outputs by the last layer's ``z``."""
        _, pull = jax.vjp(self.affine.read_out, z)
        one = jnp.eye(len(z), dtype=z.dtype)[:, None]
        return jax.vmap(pull)(jnp.repeat(one, z.shape[2], 1))[0]

    def pull(
        self, layer: Callable[[jax.Array, Layer], jax.Array], h: jax.Array, w: Layer, g: jax.Array
    ) -> jax.Array:
        """From derivatives [k, ...] by the z of ``layer`` to those by the z that became ``h``."""
        _, pull = jax.vjp(lambda h: layer(h, w), h)
        return jnp.where(self.active(h)[None], jax.vmap(pull)(g)[0], 0)

    def _linear(self, q: jax.Array, layer: Layer) -> jax.Array:
        return self.affine.linear(q, layer["kernel"]) + layer["bias"][:, None, None]


def forward(network: Network, params: Layers, initial: Layers, segment: int) -> jax.Array:
    """Outputs [batch, d_out]; ``segment`` layers at a time are recomputed on the way back."""
    z = network.enter(network.weights("first", params["first"], initial.get("first")))
    layers = params["middle"], initial.get("middle")
    h = middle(network, network.activate(z), layers, segment)
    z = network.leave(h, network.weights("last", params["last"], initial.get("last")))
    return network.affine.read_out(z)


def middle(
    network: Network,
    h: jax.Array,
    layers: tuple[Layer, Layer | None],
    segment: int,
    there: jax.Array | None = None,
) -> jax.Array:
    """The state behind some middle layers, (parameters, initial values), stacked.

    Those that are not ``there`` [layers] are passed by; None is all of them.
    """

    def step(h: jax.Array, layer: tuple[Layer, jax.Array | None]) -> tuple[jax.Array, None]:
        weights, there = layer
        above = network.activate(network.step(h, weights))
        return (above if there is None else jnp.where(there, above, h)), None

    @jax.checkpoint
    def run(h: jax.Array, block: Any) -> jax.Array:
        layers, there = block
        unroll = 1 if on_cpu() else LAYERS_A_LOOP
        weights = network.weights("middle", *layers)
        return jax.lax.scan(step, h, (weights, there), unroll=unroll)[0]

    blocks, rest = in_segments((layers, there), segment)
    if blocks is not None:
        h, _ = jax.lax.scan(lambda h, block: (run(h, block), None), h, blocks)
    if rest is not None:
        h = run(h, rest)
    return h


def in_segments(layers: Any, segment: int) -> tuple[Any, Any]:
    """Stacked layers as [blocks, segment, ...] and those left over, each None where empty."""
    length = jax.tree.leaves(layers)[0].shape[0]
    full = length // segment * segment
    blocks = jax.tree.map(lambda p: p[:full].reshape(-1, segment, *p.shape[1:]), layers)
    rest = jax.tree.map(lambda p: p[full:], layers)
    return (blocks if full else None), (rest if length > full else None)
