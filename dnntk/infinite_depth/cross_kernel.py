"""A kernel between rows of two host arrays, evaluated block by block as plain float64 matrices."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from dnntk.checks import brief
from dnntk.errors import InputError
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runtime.devices import Devices
from dnntk.runtime.progress import progress_bar

__all__ = ["CrossKernel", "Kernel", "balanced", "check_finite", "padded", "padded_rows"]

PROBES = 8  # examples on which the kernel of a stored matrix is compared with this one

Kernel = Callable[[jax.Array, jax.Array], jax.Array]
Pieces = list[tuple[int, int]]
Tiles = tuple[Pieces, Pieces, Iterator[NDArray[np.float64]]]


class CrossKernel:
    """Blocks of a kernel; a matrix-valued kernel's block [b1, b2, k, k] becomes [b1 k, b2 k].

    Attributes:
        kernel: the function.
        dtype: in which it is evaluated.
        x: [n, ...], the training examples in that dtype.
        matrix_size: k; 1 for a scalar kernel.
        devices: the devices that evaluate it.
    """

    def __init__(self, kernel: Kernel, x: np.ndarray, dtype: str) -> None:
        """Check the kernel's shape on one example; ``x`` is copied only to convert its dtype."""
        if not callable(kernel):
            raise InputError(
                f"kernel: expected a function of two batches, got {brief(kernel)}; for example "
                "dnntk.kernel.limit_ntk"
            )
        self.kernel, self.dtype, self.x = kernel, dtype, x.astype(dtype, copy=False)
        self.devices = Devices()
        shape = self._shape_of_one()
        if shape != (1, 1) and (len(shape) != 4 or shape[2] != shape[3]):
            raise InputError(
                f"kernel: expected [n1, n2] or [n1, n2, k, k] from [n1, ...] and [n2, ...], got "
                f"{list(shape)} from one example each; bind other arguments by functools.partial"
            )
        self.matrix_size = shape[2] if len(shape) == 4 else 1

    def block(self, x1: np.ndarray, x2: np.ndarray) -> NDArray[np.float64]:
        """[b1, ...], [b2, ...] -> [b1 k, b2 k], checked to be finite."""
        return self.as_matrix(self.evaluate_async(x1, x2), len(x1), len(x2))

    def blocks(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[NDArray[np.float64]]:
        """`block` of each pair, in order, computed on all devices of this process."""
        return self.devices.map(
            lambda i: self.evaluate_async(*pairs[i]),
            lambda i, values: self.as_matrix(values, *map(len, pairs[i])),
            len(pairs),
        )

    def product(
        self, points: np.ndarray, vectors: np.ndarray, block_size: int, progress: bool = False
    ) -> NDArray[np.float64]:
        """k(points, x[:n]) @ vectors: [n', ...], [n k, c] -> [n' k, c], a block at a time."""
        k = self.matrix_size
        rows, columns, blocks = self._tiles(points, len(vectors) // k, block_size)
        result = np.empty((len(points) * k, vectors.shape[1]))
        for a, b in progress_bar(
            rows, desc="predict", unit="block", delay=PROGRESS_DELAY, disable=not progress
        ):
            result[a * k : b * k] = sum(next(blocks) @ vectors[c * k : d * k] for c, d in columns)
        return result

    def matrix(self, points: np.ndarray, n: int, block_size: int) -> NDArray[np.float64]:
        """k(points, x[:n]): [n' k, n k], computed a block at a time."""
        rows, columns, blocks = self._tiles(points, n, block_size)
        return np.concatenate([np.concatenate([next(blocks) for _ in columns], 1) for _ in rows])

    def _tiles(self, points: np.ndarray, n: int, block_size: int) -> Tiles:
        """(start, stop) of the rows and of the columns of k(points, x[:n]), and its blocks."""
        points = points.astype(self.dtype, copy=False)
        rows, columns = balanced(len(points), block_size), balanced(n, block_size)
        pairs = [(points[a:b], self.x[c:d]) for a, b in rows for c, d in columns]
        return rows, columns, self.blocks(pairs)

    def evaluate_async(self, x1: np.ndarray, x2: np.ndarray) -> jax.Array:
        """The kernel's values on padded inputs; the device may still be computing them."""
        with jax.enable_x64(self.dtype == "float64"):
            return self.kernel(*map(jax.device_put, (padded(x1), padded(x2))))

    def as_matrix(self, values: jax.Array, rows: int, cols: int) -> NDArray[np.float64]:
        """The values of `evaluate_async` -> [rows k, cols k], checked to be finite."""
        block = np.asarray(values)[:rows, :cols].astype(np.float64, copy=False)
        if block.ndim == 4:
            block = block.transpose(0, 2, 1, 3)
            block = block.reshape(block.shape[0] * block.shape[1], -1)
        check_finite(block.sum())
        return block

    def identity(self) -> dict[str, Any]:
        """A description of these examples and this kernel only."""
        x = np.ascontiguousarray(self.x)
        probes = x[np.linspace(0, len(x) - 1, PROBES).astype(int)]
        return {
            "inputs": hashlib.sha256(x.tobytes()).hexdigest(),
            "dtype": self.dtype,
            "probes": self.block(probes, probes).ravel().tolist(),
        }

    def _shape_of_one(self) -> tuple[int, ...]:
        one = self.x[:1]
        try:
            with jax.enable_x64(self.dtype == "float64"):
                return jax.eval_shape(self.kernel, one, one).shape
        except Exception:  # a kernel that cannot be traced is called, and raises its own errors
            return self.evaluate_async(one, one)[:1, :1].shape


def check_finite(total: np.floating[Any]) -> None:
    """Refuse a sum of kernel values that is not finite."""
    if not np.isfinite(total):
        raise InputError(
            "kernel: expected finite values, got NaN or infinity; scale the inputs down, or "
            "look for a singular point of the kernel"
        )


def balanced(n: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of the fewest pieces of equal size, of at most ``most`` rows, that cover n."""
    if n == 0:
        return []
    edge = math.ceil(n / math.ceil(n / most))
    return [(a, min(a + edge, n)) for a in range(0, n, edge)]


def padded_rows(n: int) -> int:
    """Rows of a padded block: a power of two up to 128, then a multiple of 128.

    The kernel is compiled for every size of a block, so that few sizes are used.
    """
    return max(16, 1 << (n - 1).bit_length()) if n <= 128 else -(-n // 128) * 128


def padded(x: np.ndarray) -> np.ndarray:
    """The rows, and copies of the last one, `padded_rows` in all."""
    extra = padded_rows(len(x)) - len(x)
    return np.concatenate([x, np.repeat(x[-1:], extra, 0)]) if extra else x
