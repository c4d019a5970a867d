"""Stride-1 convolution with zero padding, written as two bilinear primitives.

A deep narrow CNN applies thousands of tiny convolutions (a few channels, a small image) one after
another. Library convolutions are slow at this size: on a CPU, inside a loop above all, and their
gradients more so. Here a batch of images is kept in *row layout*, ``[channels, positions,
batch]``: the rows of an image one after another, each followed by ``kernel_size // 2`` zero
columns, the batch innermost. A shift of the image is then a shift along ``positions``, and

    convolve(h, w)   = sum over dy of shift_dy(w[dy] @ [shift_dx(h) for every dx])
    correlate(g, h)  = [shift_-dy(g) for every dy] @ [shift_dx(h) for every dx]^T

are one matrix product each. The derivative of either is the other, so forward mode, reverse mode
and any composition of the two run at the same speed.

Arrays must be zero at the padding positions, where `RowLayout.mask` is False; `convolve` leaves
arbitrary values at them, which the caller masks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dnntk.networks import narrow

__all__ = [
    *("RowLayout", "arrange", "average_pool", "convolve", "correlate", "shifts"),
    "transpose_filter",
    "unfused",
]


# Up to this many weights, a GPU computes a filter's products as a sum.
FEW_WEIGHTS = 256


def average_pool(x: jax.Array, side: int) -> jax.Array:
    """Means of [n, H, W, c] over squares of ``side`` x ``side`` pixels; H and W are multiples."""
    if side == 1:
        return x
    square = (1, side, side, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, square, square, "VALID") / side**2


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Where the pixels of an image of ``height`` x ``width`` lie along ``positions``."""

    height: int
    width: int
    kernel_size: int

    @property
    def row(self) -> int:
        """Positions from one image row to the next."""
        return self.width + self.kernel_size // 2

    @property
    def positions(self) -> int:
        """Positions an image takes, padding included."""
        return self.height * self.row

    @property
    def mask(self) -> np.ndarray:
        """[positions] bool, True at the pixels."""
        rows = np.pad(
            np.ones((self.height, self.width), bool), ((0, 0), (0, self.row - self.width))
        )
        return rows.reshape(-1)

    def pack(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [channels, positions, batch]."""
        rows = jnp.pad(images, ((0, 0), (0, 0), (0, self.row - self.width), (0, 0)))
        return rows.reshape(images.shape[0], self.positions, images.shape[3]).transpose(2, 1, 0)


def arrange(kernel: jax.Array) -> jax.Array:
    """Flax's [..., q, q, in, out] -> [..., q, out, q, in], the layout of `convolve`."""
    return jnp.moveaxis(kernel, -1, -3)


def convolve(h: jax.Array, w: jax.Array, row: int) -> jax.Array:
    """Cross-correlation (as in flax.linen.Conv) in row layout.

    Args:
        h: [c, positions, batch], zero at the padding positions.
        w: [q, out, q, c] filter in `arrange`'s layout; q odd.
        row: `RowLayout.row`.

    Returns:
        [out, positions, batch]; the padding positions hold no meaningful value.
    """
    return _convolve_p.bind(h, w, row=row, kernel_size=w.shape[0])


def correlate(g: jax.Array, h: jax.Array, row: int, kernel_size: int) -> jax.Array:
    """Gradient [q, out, q, c] of ``<g, convolve(h, w)>`` by w; g has the convolution's shape."""
    return _correlate_p.bind(g, h, row=row, kernel_size=kernel_size)


def transpose_filter(w: jax.Array) -> jax.Array:
    """[q, out, q, c] -> [q, c, q, out], turned by 180 degrees: the adjoint convolution's filter."""
    return w[::-1, :, ::-1].transpose(0, 3, 2, 1)


def shifts(h: jax.Array, layout: RowLayout) -> list[jax.Array]:
    """``h`` shifted to the position that each of the filter's q^2 entries reads, row by row."""
    reach = range(-(layout.kernel_size // 2), layout.kernel_size // 2 + 1)
    return [_shift(h, dy * layout.row + dx) for dy in reach for dx in reach]


def unfused(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands of a matrix product, for the compiler to have ready before it.

    XLA for GPUs joins a product with the reshapes and shifts before it in one Triton kernel, and
    finds none where an axis that is no power of two is split ("Couldn't find output tile sizes").
    """
    return jax.lax.optimization_barrier(operands)


def _shift(h: jax.Array, offset: int) -> jax.Array:
    """``out[:, p] = h[:, p + offset]``, zero beyond the ends."""
    if offset == 0:
        return h
    if offset > 0:
        return jnp.pad(h[:, offset:], ((0, 0), (0, min(offset, h.shape[1])), (0, 0)))
    return jnp.pad(h[:, :offset], ((0, 0), (min(-offset, h.shape[1]), 0), (0, 0)))


def _shifts(h: jax.Array, offsets: range) -> jax.Array:
    """[len(offsets) * channels, positions * batch]."""
    copies = jnp.concatenate([_shift(h, offset) for offset in offsets])
    return copies.reshape(len(offsets) * h.shape[0], -1)


def _convolve(
    h: jax.Array, w: jax.Array, *, row: int, kernel_size: int, gpu: bool = False
) -> jax.Array:
    _, out, _, channels = w.shape
    reach = kernel_size // 2
    if gpu and w.size <= FEW_WEIGHTS:  # one kernel instead of five
        around = range(-reach, reach + 1)
        pairs = [
            (_shift(h, dy * row + dx), w[dy + reach, :, dx + reach])
            for dy in around
            for dx in around
        ]
        return functools.reduce(jnp.add, (narrow.product(h, w.T) for h, w in pairs))
    columns = _shifts(h, range(-reach, reach + 1))
    rows = w.reshape(kernel_size * out, kernel_size * channels)
    if gpu:
        rows, columns = unfused(rows, columns)
    product = jnp.matmul(rows, columns, precision=jax.lax.Precision.HIGHEST)
    product = product.reshape(kernel_size, out, *h.shape[1:])
    # One expression, so that XLA fuses the shifts, the sum and the activation after it.
    total = product[reach]
    for dy in range(1, reach + 1):
        total = (
            total + _shift(product[reach - dy], -dy * row) + _shift(product[reach + dy], dy * row)
        )
    return total


def _correlate(g: jax.Array, h: jax.Array, *, row: int, kernel_size: int) -> jax.Array:
    reach = kernel_size // 2
    columns = _shifts(h, range(-reach, reach + 1))
    rows = _shifts(g, range(reach * row, -reach * row - 1, -row))
    product = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(kernel_size, g.shape[0], kernel_size, h.shape[0])


def _batched(function: Any, primitive: Primitive) -> Any:
    """A batching rule: images join the batch; for several filters, `jax.vmap` of ``function``."""

    def rule(args: tuple[jax.Array, jax.Array], dims: tuple[Any, Any], **static: int) -> Any:
        if primitive is _convolve_p and dims[1] is None:
            h = jnp.moveaxis(args[0], dims[0], -2)
            out = primitive.bind(h.reshape(*h.shape[:2], -1), args[1], **static)
            return jnp.moveaxis(out.reshape(*out.shape[:2], *h.shape[2:]), -2, 0), 0
        in_axes = tuple(None if d is None else d for d in dims)
        return jax.vmap(functools.partial(function, **static), in_axes)(*args), 0

    return rule


_convolve_p = Primitive("row_convolve")
_correlate_p = Primitive("row_correlate")

_convolve_p.def_impl(jax.jit(_convolve, static_argnames=("row", "kernel_size")))
_correlate_p.def_impl(jax.jit(_correlate, static_argnames=("row", "kernel_size")))
_convolve_p.def_abstract_eval(
    lambda h, w, row, kernel_size: ShapedArray((w.shape[1], *h.shape[1:]), h.dtype)
)
_correlate_p.def_abstract_eval(
    lambda g, h, row, kernel_size: ShapedArray(
        (kernel_size, g.shape[0], kernel_size, h.shape[0]), g.dtype
    )
)
mlir.register_lowering(_convolve_p, mlir.lower_fun(_convolve, multiple_results=False))
for _platform in ("cuda", "rocm"):
    _on_gpu = mlir.lower_fun(functools.partial(_convolve, gpu=True), multiple_results=False)
    mlir.register_lowering(_convolve_p, _on_gpu, platform=_platform)
mlir.register_lowering(_correlate_p, mlir.lower_fun(_correlate, multiple_results=False))
batching.primitive_batchers[_convolve_p] = _batched(_convolve, _convolve_p)
batching.primitive_batchers[_correlate_p] = _batched(_correlate, _correlate_p)


ad.defbilinear(
    _convolve_p,
    lambda ct, h, w, row, kernel_size: convolve(ct, transpose_filter(w), row),
    lambda ct, h, w, row, kernel_size: correlate(ct, h, row, kernel_size),
)
ad.defbilinear(
    _correlate_p,
    lambda ct, g, h, row, kernel_size: convolve(h, ct, row),
    lambda ct, g, h, row, kernel_size: convolve(g, transpose_filter(ct), row),
)
