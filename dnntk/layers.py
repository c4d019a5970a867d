"""How a deep narrow network computes: the affine map of a layer, the form it is in, the scan.

An architecture is an affine map (`Dense`, `Convolution`), a parametrization is a `Form`, and
`forward` scans over depth whatever the two are. Activations of O(sqrt(depth)) layers are stored;
the others are recomputed in segments on the way back.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dnntk import convolution
from dnntk.initializers import Layer, Layers


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
        return jnp.einsum("io,ipb->opb", kernel, h, precision=jax.lax.Precision.HIGHEST)

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

    def read_out(self, h: jax.Array) -> jax.Array:
        """Global average pool: [k, positions, batch] -> [batch, k]."""
        pixels = self.layout.height * self.layout.width
        return (jnp.where(self.mask, h, 0).sum(1) / pixels).T


Affine = Dense | Convolution


@dataclasses.dataclass(frozen=True)
class Form:
    """A layer in one form: h' = max(carry h + W q + b, floor) with q = base + column h.

    ``weights(name, params, initial)`` are W and b of the layers called ``name``. Constants are
    [units, 1, 1]; ``base`` and ``floor`` may depend on the position and the example.
    """

    weights: Callable[[str, Layer, Layer | None], Layer]
    column: np.ndarray | float = 1.0
    carry: np.ndarray | float = 0.0
    base: jax.Array | float = 0.0
    floor: jax.Array | float = 0.0
    start: jax.Array | float = 0.0  # what the first layer adds to W x + b

    def read(self, h: jax.Array) -> jax.Array:
        """What the next layer's weights multiply: q."""
        return h if isinstance(self.base, float) else self.base + self.column * h

    def carried(self, h: jax.Array) -> jax.Array | float:
        """What the next layer takes over unmultiplied."""
        return 0.0 if isinstance(self.carry, float) else jnp.asarray(self.carry) * h


def literal_form(step: float) -> Form:
    """The thesis's matrices as they are, or an initial matrix + D * step."""

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        if initial is None:
            return params
        return jax.tree.map(lambda w, d: w + step * d, initial, params)

    return Form(weights)


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

    def weights(name: str, params: Layer, initial: Layer | None) -> Layer:
        kernel, bias = params["kernel"], params["bias"]
        row = np.full(kernel.shape[-1], 1 / root)
        if name != "last":
            row[random] = 1 / (scale * root)
        kernel = kernel * _last_axis(row / scale if name == "first" else row, kernel)
        bias = bias * _last_axis(row / scale, bias)
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
        column=by_unit(1 / scale, 1.0, 1 / scale),
        carry=by_unit(1.0, 0.0, 1.0),
        base=base,
        floor=jnp.where(base > 0, -scale * jnp.where(base > 0, base, 1), 0).astype(dtype),
        start=start,
    )


def _last_axis(values: np.ndarray, like: jax.Array) -> np.ndarray:
    """[units] as [1, ..., 1, units] in ``like``'s rank and dtype."""
    return values.astype(like.dtype).reshape((1,) * (like.ndim - 1) + values.shape)


def forward(
    affine: Affine,
    form: Form,
    params: Layers,
    initial: Layers,
    packed: jax.Array,
    segment: int,
) -> jax.Array:
    """Packed input -> [batch, d_out]."""

    def weights(name: str, layer: Layer, start: Layer | None) -> Layer:
        layer = form.weights(name, layer, start)
        return {"kernel": affine.arrange(layer["kernel"]), "bias": layer["bias"]}

    def linear(q: jax.Array, layer: Layer) -> jax.Array:
        return affine.linear(q, layer["kernel"]) + layer["bias"][:, None, None]

    def activate(z: jax.Array) -> jax.Array:
        return jnp.where(affine.mask & (z > form.floor), z, form.floor)

    def step(h: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return activate(linear(form.read(h), layer) + form.carried(h)), None

    @jax.checkpoint
    def run(h: jax.Array, layers: tuple[Layer, Layer | None]) -> jax.Array:
        return jax.lax.scan(step, h, weights("middle", *layers))[0]

    first = weights("first", params["first"], initial.get("first"))
    h = activate(linear(packed, first) + form.start)
    middle = (params["middle"], initial.get("middle"))
    length = params["middle"]["bias"].shape[0]
    full = length // segment * segment
    if full:
        blocks = jax.tree.map(lambda p: p[:full].reshape(-1, segment, *p.shape[1:]), middle)
        h, _ = jax.lax.scan(lambda h, block: (run(h, block), None), h, blocks)
    if length > full:
        h = run(h, jax.tree.map(lambda p: p[full:], middle))
    last = weights("last", params["last"], initial.get("last"))
    out = linear(form.read(h), last)
    outputs = h[h.shape[0] - out.shape[0] :]
    return affine.read_out(out if isinstance(form.carry, float) else out + outputs)
