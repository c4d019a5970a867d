"""How a deep narrow network computes: the affine map of a layer, the form it is in, the scan.

An architecture is an affine map (`Dense`, `Convolution`), a parametrization is a `Form`, and
`forward` scans over depth for any pair of the two. Activations of O(sqrt(depth)) layers are stored;
the backward pass recomputes the others, a segment at a time.

This is the reference. On CPU the C++ of `dnntk.native` does most of the same, so that a change here
shows only with ``DNNTK_NATIVE=0``, until it is made there too (``native/cpp/problem.h``).
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

__all__ = [
    "LAYERS_TO_UNROLL",
    "Affine",
    "Convolution",
    "Dense",
    "Form",
    "Network",
    "forward",
    "in_segments",
    "literal_form",
    "middle_layers",
    "ntk_form",
    "scan_layers",
]

# Layers that one iteration of the loop computes on an accelerator: the compiler joins their small
# kernels, whose launches cost more than their arithmetic. In loops over fewer layers it is not
# worth the second program that is traced for it.
LAYERS_PER_ITERATION, LAYERS_TO_UNROLL = 4, 16


@dataclasses.dataclass(frozen=True)
class Dense:
    """The affine map of an MLP layer; hidden states are [units, 1, batch]."""

    window: tuple[int, ...] = ()
    mask: bool = True

    def pack(self, x: jax.Array) -> jax.Array:
        """[batch, units] -> [units, 1, batch]."""
        return x.T[:, None, :]

    def arrange(self, kernel: jax.Array) -> jax.Array:
        """The kernel in the layout of `linear`, which is flax's."""
        return kernel

    def linear(self, h: jax.Array, kernel: jax.Array) -> jax.Array:
        """[in, 1, batch] and [in, out] -> [out, 1, batch]."""
        if kernel.size <= narrow.FEW_WEIGHTS:
            return narrow.product(h, kernel)
        return jnp.einsum("io,ipb->opb", kernel, h, precision=jax.lax.Precision.HIGHEST)

    def by_weight(self, ratio: float, q: jax.Array, g: jax.Array) -> jax.Array:
        """Gradients of every example by the kernel and the bias.

        With inputs q [in, 1, n] and derivatives g [k, out, 1, n] by the outputs: [weights, k, n].
        The derivatives by the bias are multiplied by ``ratio``.
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
        # One product of small matrices an example: other sums over positions are slow.
        columns = jnp.stack(convolution.shifts(q, self.layout))
        columns = columns.transpose(3, 0, 1, 2).reshape(q.shape[2], -1, q.shape[1])
        rows = g.transpose(3, 2, 1, 0).reshape(q.shape[2], q.shape[1], -1)
        columns, rows = convolution.unfused(columns, rows)
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

    With f the thesis's pre-activations (section 3) and units [d_in | 1 | d_out] (or M for the 1):

    ========  =============  ==========================  ==========================================
    field     literal form   ntk form                    meaning
    ========  =============  ==========================  ==========================================
    carry     0              1, 0, 1                     part of h that the next layer keeps
    column    1              1 / C, 1, 1 / C             factor of h in the inputs q
    base      0              max(x, 0), 0, 1             q at initialization; 0 for the random unit
    floor     0              -C base                     the ReLU's kink: h where f is 0
    unit      1              1, C, 1                     df / dh
    start     0              min(C x, 0), 0, 0           added to W x + b in the first layer
    ========  =============  ==========================  ==========================================

    Constants are numbers or [units, 1, 1]; ``base``, ``floor`` and ``start`` may depend on position
    and example.

    Attributes:
        weights: (name, params, initial) -> W and b of the layers ``name``: "first", "middle" or
            "last".
        slope: (name, units) -> derivative of W by its parameters, for each unit (a number if it is
            the same for all), and the derivative of b, as a multiple of W's.
    """

    weights: Callable[[str, Layer, Layer | None], Layer]
    slope: Callable[[str, int], tuple[np.ndarray | float, float]]
    column: np.ndarray | float = 1.0
    carry: np.ndarray | float = 0.0
    base: jax.Array | float = 0.0
    floor: jax.Array | float = 0.0
    unit: np.ndarray | float = 1.0
    start: jax.Array | float = 0.0

    @property
    def literal(self) -> bool:
        """True if states are the thesis's own, False if deviations from initial values."""
        return isinstance(self.carry, float)

    def read(self, h: jax.Array) -> jax.Array:
        """The inputs q that the next layer's weights multiply."""
        return h if self.literal else self.base + jnp.asarray(self.column) * h

    def carried(self, h: jax.Array) -> jax.Array | float:
        """The part of h that the next layer adds to W q + b."""
        return 0.0 if self.literal else jnp.asarray(self.carry) * h


def literal_form(factor: float | None) -> Form:
    """The thesis's matrices as they are (``factor`` None), or initial matrices + ``factor`` D."""

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        if factor is None:
            return params
        return jax.tree.map(lambda w, d: w + factor * d, initial, params)

    def slope(name: str, units: int) -> tuple[float, float]:
        del name, units
        return (1.0 if factor is None else factor), 1.0

    return Form(weights, slope)


def ntk_form(
    packed: jax.Array,
    depth: int,
    d_in: int,
    d_out: int,
    scale: float,
    mask: np.ndarray | bool,
    random_units: int = 1,
) -> Form:
    """State (alpha, m, r) of deviations: f_in = C x + alpha, f_mid = C m, f_out = C + r.

    With q = [x + alpha/C, m, 1 + r/C] and L the depth, before the ReLUs:
    alpha' = alpha + (D_a q + d_a/C) / sqrt L, m' = u q_a + v/C + (D_m q + d_m/C) / (C sqrt L),
    r' = r + (D_r q + d_r/C) / sqrt L. No effect of D is added to a number of the size of x or C,
    where float32 would round it away: over 10,000 layers these errors would add up.
    """
    root, random = math.sqrt(depth), slice(d_in, d_in + random_units)
    dtype = packed.dtype

    def slope(name: str, units: int) -> tuple[np.ndarray, float]:
        by_unit = np.full(units, 1 / root)
        if name != "last":
            by_unit[random] = 1 / (scale * root)
        # The first layer's inputs are of size 1; the others' are of size C and divided by it.
        return (by_unit / scale, 1.0) if name == "first" else (by_unit, 1 / scale)

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        kernel, bias = params["kernel"], params["bias"]
        by_unit, ratio = slope(name, kernel.shape[-1])
        kernel = kernel * _last_axis(by_unit, kernel)
        bias = bias * _last_axis(by_unit * ratio, bias)
        if initial is not None:
            u = initial["kernel"] / scale if name == "first" else initial["kernel"]
            u = u.reshape(*kernel.shape[:-2], d_in, random_units)
            kernel = kernel.at[..., :d_in, random].add(u)
            v = initial["bias"].reshape(*bias.shape[:-1], random_units)
            bias = bias.at[..., random].add(v)
        return {"kernel": kernel, "bias": bias}

    def by_unit(inputs: float, middle: float, outputs: float) -> np.ndarray:
        values = [inputs] * d_in + [middle] * random_units + [outputs] * d_out
        return np.array(values, dtype)[:, None, None]

    # The thesis assumes positive inputs. A negative one starts below its ReLU's kink, at C x.
    ones = jnp.broadcast_to(jnp.asarray(mask, dtype), (d_out, *packed.shape[1:]))
    zeros = jnp.zeros((random_units, *packed.shape[1:]), dtype)
    base = jnp.concatenate([jnp.maximum(packed, 0), zeros, ones])
    below = jnp.where(packed < 0, packed * min(scale, float(jnp.finfo(dtype).max)), 0)
    start = jnp.concatenate([below, zeros, jnp.zeros_like(ones)])
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
    """A network on one packed input, layer by layer, forward and backward.

    `first`, `middle` and `last` compute one layer each, from the weights that `weights` makes of
    its parameters. z is a ReLU's input, a state h its output.
    """

    affine: Affine
    form: Form
    packed: jax.Array

    def weights(self, name: str, params: Layer, initial: Layer | None) -> Layer:
        """Weights of the layers ``name``, stacked if their parameters are."""
        layer = self.form.weights(name, params, initial)
        return {"kernel": self.affine.arrange(layer["kernel"]), "bias": layer["bias"]}

    def first(self, layer: Layer) -> jax.Array:
        """The first layer's z."""
        return self._linear(self.packed, layer) + self.form.start

    def middle(self, h: jax.Array, layer: Layer) -> jax.Array:
        """From a state to the z of the middle layer after it."""
        return self.added(h, layer) + self.form.carried(h)

    def added(self, h: jax.Array, layer: Layer) -> jax.Array:
        """The part of `middle` that the layer's weights make."""
        return self._linear(self.form.read(h), layer)

    def last(self, h: jax.Array, layer: Layer) -> jax.Array:
        """From a state to the last layer's z [d_out, positions, batch]."""
        out = self._linear(self.form.read(h), layer)
        outputs = h[h.shape[0] - out.shape[0] :]
        return out if self.form.literal else out + outputs

    def activate(self, z: jax.Array) -> jax.Array:
        """From z to the state."""
        return jnp.where(self.active(z), z, self.form.floor)

    def active(self, z: jax.Array) -> jax.Array:
        """True where the ReLU passes z on."""
        return jnp.asarray(self.affine.mask) & (z > self.form.floor)

    def seeds(self, z: jax.Array) -> jax.Array:
        """Derivatives [k, ...] of the outputs by the last layer's ``z``."""
        _, pull = jax.vjp(self.affine.read_out, z)
        one = jnp.eye(len(z), dtype=z.dtype)[:, None]
        return jax.vmap(pull)(jnp.repeat(one, z.shape[2], 1))[0]

    def pull(
        self, layer: Callable[[jax.Array, Layer], jax.Array], h: jax.Array, w: Layer, g: jax.Array
    ) -> jax.Array:
        """Derivatives [k, ...] by the z of ``layer`` -> those by the pre-activation of ``h``."""
        _, pull = jax.vjp(lambda h: layer(h, w), h)
        return jnp.where(self.active(h)[None], jax.vmap(pull)(g)[0], 0)

    def _linear(self, q: jax.Array, layer: Layer) -> jax.Array:
        return self.affine.linear(q, layer["kernel"]) + layer["bias"][:, None, None]


def forward(network: Network, params: Layers, initial: Layers, segment: int) -> jax.Array:
    """Outputs [batch, d_out]; the backward pass recomputes ``segment`` layers at a time."""
    z = network.first(network.weights("first", params["first"], initial.get("first")))
    layers = params["middle"], initial.get("middle")
    h = middle_layers(network, network.activate(z), layers, segment)
    z = network.last(h, network.weights("last", params["last"], initial.get("last")))
    return network.affine.read_out(z)


def middle_layers(
    network: Network,
    h: jax.Array,
    layers: tuple[Layer, Layer | None],
    segment: int,
    present: jax.Array | None = None,
) -> jax.Array:
    """The state after some middle layers, given as stacked (parameters, initial values).

    Layers that are not ``present`` [layers] leave the state as it is; None means all are.
    """

    def one_layer(h: jax.Array, layer: tuple[Layer, jax.Array | None]) -> tuple[jax.Array, None]:
        weights, present = layer
        above = network.activate(network.middle(h, weights))
        return (above if present is None else jnp.where(present, above, h)), None

    @jax.checkpoint
    def run(h: jax.Array, block: Any) -> jax.Array:
        layers, present = block
        return scan_layers(one_layer, h, (network.weights("middle", *layers), present))

    blocks, rest = in_segments((layers, present), segment)
    if blocks is not None:
        h, _ = jax.lax.scan(lambda h, block: (run(h, block), None), h, blocks)
    if rest is not None:
        h = run(h, rest)
    return h


def scan_layers(one_layer: Callable[[Any, Any], tuple[Any, None]], carry: Any, layers: Any) -> Any:
    """The carry of a scan over stacked ``layers``, several a turn on an accelerator."""

    def loop(unroll: int) -> Callable[[Any, Any], Any]:
        return lambda carry, layers: jax.lax.scan(one_layer, carry, layers, unroll=unroll)[0]

    if jax.tree.leaves(layers)[0].shape[0] < LAYERS_TO_UNROLL:
        return loop(1)(carry, layers)
    unrolled = loop(LAYERS_PER_ITERATION)
    return jax.lax.platform_dependent(carry, layers, cpu=loop(1), default=unrolled)


def in_segments(layers: Any, segment: int) -> tuple[Any, Any]:
    """Stacked layers as [blocks, segment, ...] and the remaining ones, each None if empty."""
    length = jax.tree.leaves(layers)[0].shape[0]
    full = length // segment * segment
    blocks = jax.tree.map(lambda p: p[:full].reshape(-1, segment, *p.shape[1:]), layers)
    rest = jax.tree.map(lambda p: p[full:], layers)
    return (blocks if full else None), (rest if length > full else None)
