"""Gram matrices block by block: in bounded memory, and each pair of a symmetric one once.

`blockwise` works inside `jit` and is what the closed-form kernels use. `gram` works on the host,
for matrices that fill memory or a disk: it drives any kernel function, compiles one block shape,
and writes into a NumPy array, which may be a memory map.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_rows, checked_array
from dnntk.errors import InputError
from dnntk.runtime.progress import progress_bar

__all__ = ["blockwise", "check_positive_definite", "gram"]

PROGRESS_DELAY = 5.0  # seconds of work before a progress bar appears


def blockwise(
    pair_fn: Callable[[Any, Any], jax.Array],
    x1: Any,
    x2: Any,
    area: int,
    most: int | None = None,
) -> jax.Array:
    """Compute a Gram matrix in blocks of one shape; works under jit, vmap and grad.

    Args:
        pair_fn: [b1, ...], [b2, ...] -> [b1, b2], or [b1, b2, k, k] or [b1, b2, k] for the values
            of a matrix-valued kernel; the kernel of a block, symmetric where x2 is None.
        x1: [n1, ...], or a tree of such arrays.
        x2: [n2, ...], likewise; None for the symmetric matrix of x1, whose pairs are computed
            once.
        area: largest number of entries in a block; static. The last blocks along an axis overlap.
        most: largest number of rows, and of columns, in a block; None sets no such limit.

    Returns:
        [n1, n2, ...], exactly symmetric where x2 is None. Memory beyond the result: one block's;
        reverse-mode differentiation recomputes the blocks, and adds up to twice the result.
    """
    symmetric = x2 is None
    x2 = x1 if symmetric else x2
    n1, n2 = (len(jax.tree.leaves(x)[0]) for x in (x1, x2))
    if n1 == 0 or n2 == 0:
        example = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype)  # noqa: E731
        one = jax.eval_shape(pair_fn, *jax.tree.map(example, (x1, x2)))
        return jnp.zeros((n1, n2, *one.shape[2:]), one.dtype)
    side = max(1, math.isqrt(area))
    most = most or max(n1, n2)
    cols = _balanced(n2, min(most, side if symmetric else max(side, area // n1)))
    rows = _balanced(n1, min(most, side if symmetric else max(side, area // cols)))
    if (rows, cols) == (n1, n2):
        return _mirror(pair_fn(x1, x2)) if symmetric else pair_fn(x1, x2)
    return _in_blocks(pair_fn, x1, x2, _starts(n1, rows), _starts(n2, cols), rows, cols, symmetric)


def _in_blocks(
    pair_fn: Callable[[Any, Any], jax.Array],
    x1: Any,
    x2: Any,
    row_starts: list[int],
    col_starts: list[int],
    rows: int,
    cols: int,
    symmetric: bool,
) -> jax.Array:
    """`blockwise`, as loops over blocks of ``rows`` x ``cols``."""

    @jax.checkpoint
    def block(start: jax.Array) -> jax.Array:
        left = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start[0], rows), x1)
        right = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start[1], cols), x2)
        return pair_fn(left, right)

    def put(result: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
        start = jnp.pad(start, (0, result.ndim - 2))
        return lax.dynamic_update_slice(result, values, tuple(start))

    def write(result: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return put(result, block(start), start), None

    def write_both(result: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        values = block(start)
        return put(put(result, values, start), _swap(values), start[::-1]), None

    def write_diagonal(result: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return put(result, _mirror(block(start)), start), None

    one = jax.eval_shape(block, jax.ShapeDtypeStruct((2,), jnp.int32))
    ends = row_starts[-1] + rows, col_starts[-1] + cols
    result = jnp.zeros((*ends, *one.shape[2:]), one.dtype)
    if not symmetric:
        pairs = [(i, j) for i in row_starts for j in col_starts]
        return lax.scan(write, result, jnp.array(pairs, jnp.int32))[0]
    # The diagonal comes last: an entry that an overlapping block holds together with its mirror
    # image lies in a diagonal block.
    pairs = [(i, j) for k, i in enumerate(row_starts) for j in row_starts[k + 1 :]]
    result, _ = lax.scan(write_both, result, jnp.array(pairs, jnp.int32))
    return lax.scan(write_diagonal, result, jnp.array([(i, i) for i in row_starts], jnp.int32))[0]


def gram(
    kernel_fn: Callable[[ArrayLike, ArrayLike], jax.Array],
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    block_size: int = 1024,
    progress: bool = True,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Compute a large Gram matrix on the host, block by block.

    Args:
        kernel_fn: [b1, ...], [b2, ...] -> [b1, b2], or [b1, b2, k, k] for a matrix-valued kernel;
            for example `limit_ntk`, or `functools.partial(limit_ntk, rho=0.5)`.
        x1: [n1, ...]; ``kernel_fn`` gets floats, whatever numbers these are.
        x2: [n2, ...]; None means x1, and then each pair is computed once.
        block_size: most rows and columns in a block.
        progress: show a bar on standard error once the work has taken five seconds.
        out: array to write into, for example an `np.memmap`; None allocates one.

    Returns:
        [n1, n2] or [n1, n2, k, k], exactly symmetric where x2 is None; `out` where that was given.
        Independent of the block size up to rounding. Memory beyond the result: two blocks.

    Raises:
        InputError: block_size is not a positive integer, an input has no rows or is not of finite
            real numbers, or `out` has the wrong shape.
    """
    block_size = check_count("block_size", block_size)
    symmetric = x2 is None or x2 is x1
    left = checked_array("x1", x1)
    right = left if x2 is None or symmetric else checked_array("x2", x2)
    check_rows("x1", left)
    check_rows("x2", right)
    rows, cols = (_balanced(len(x), block_size) for x in (left, right))
    blocks = [
        (r, c)
        for r in range(0, len(left), rows)
        for c in range(r if symmetric else 0, len(right), cols)
    ]
    for r, c in progress_bar(
        blocks, desc="kernel", unit="block", delay=PROGRESS_DELAY, disable=not progress
    ):
        # All blocks have one shape: the last ones overlap their neighbours, which own the overlap.
        row, col = min(r, len(left) - rows), min(c, len(right) - cols)
        block1 = lax.dynamic_slice_in_dim(left, row, rows)
        block2 = lax.dynamic_slice_in_dim(right, col, cols)
        values = np.asarray(kernel_fn(block1, block2))
        if values.dtype.itemsize == 2:  # half precision
            values = values.astype(np.float32)
        out = _checked_out(out, (len(left), len(right), *values.shape[2:]), values.dtype)
        if symmetric and r == c:
            values = np.where(_upper(rows, values.ndim), values, _swap(values))
        owned = values[r - row :, c - col :]
        out[r : row + rows, c : col + cols] = owned
        if symmetric and r != c:
            out[c : col + cols, r : row + rows] = _swap(owned)
    assert out is not None
    return out


def _checked_out(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    out = np.empty(shape, dtype) if out is None else out
    if out.shape != shape:
        raise InputError(f"out must have shape {shape}, got {out.shape}")
    return out


def check_positive_definite(name: str, matrix: ArrayLike) -> None:
    """Refuse a Gram matrix that no system can be solved with.

    A kernel's Gram matrix is positive semidefinite, but coincident inputs make it singular, and
    rounding may push its small eigenvalues below 0, by about n eps times the largest.

    Args:
        name: what the message calls the matrix.
        matrix: [n, n], floating point.

    Raises:
        InputError: the matrix is not square, not finite, not symmetric, or not positive definite to
            the working precision; the message says by how much, and what helps.
    """
    values = np.asarray(checked_array(name, matrix))
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise InputError(f"{name} must be a square matrix [n, n], got shape {values.shape}")
    asymmetry = float(np.abs(values - values.T).max())
    eps = float(np.finfo(values.dtype).eps)
    if asymmetry > 64 * eps * float(np.abs(values).max()):
        raise InputError(
            f"{name} must be symmetric, got entries {asymmetry:.3g} from their mirror images; "
            "leave x2 out to have each pair computed once"
        )
    eigenvalues = np.linalg.eigvalsh(values)
    least = len(values) * eps * float(eigenvalues[-1])
    if eigenvalues[0] <= least:
        raise InputError(
            f"{name} must be positive definite to {values.dtype} precision, got a least eigenvalue "
            f"of {eigenvalues[0]:.3g} under a largest of {eigenvalues[-1]:.3g}; drop coincident "
            f"inputs, add a ridge of at least {least:.1g} to the diagonal, or use float64"
        )


def _balanced(n: int, block_size: int) -> int:
    """The smallest block size that needs no more blocks than ``block_size``."""
    return math.ceil(n / math.ceil(n / block_size))


def _starts(n: int, size: int) -> list[int]:
    """First rows of the blocks; the last block ends at n, and may overlap the one before."""
    return [min(start, n - size) for start in range(0, n, size)]


def _mirror(block: jax.Array) -> jax.Array:
    """A diagonal block made exactly symmetric, from its upper half."""
    upper = jnp.where(_upper(len(block), block.ndim), block, _swap(block))
    if block.ndim < 4:
        return upper
    # An input's own matrix lies on both sides of the diagonal.
    own = np.eye(len(block), dtype=bool)[:, :, None, None]
    return jnp.where(own, (block + _swap(block)) / 2, upper)


def _upper(n: int, ndim: int) -> np.ndarray:
    """[n, n, 1, ...] bool, True on and above the diagonal."""
    return np.triu(np.ones((n, n), bool)).reshape((n, n) + (1,) * (ndim - 2))


def _swap(values: Any) -> Any:
    """K(x', x) from K(x, x'): a matrix-valued kernel is transposed in its outputs as well."""
    return values.transpose(1, 0, *range(values.ndim - 1, 1, -1))
