"""Outputs [n, d_out] as the rows of a kernel matrix, and back."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnntk.checks import host_numbers
from dnntk.errors import InputError

__all__ = ["OutputLayout"]

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class OutputLayout:
    """Where a kernel matrix has an example's outputs.

    A scalar kernel serves all outputs alike: they are columns. A matrix-valued one, with
    matrix_size = d_out, has a row for each example and output.

    Attributes:
        d_out: number of outputs.
        matrix_size: 1 for a scalar kernel, else d_out.
    """

    d_out: int
    matrix_size: int

    def by_kernel_row(self, outputs: Array) -> Array:
        """[n, c d_out]: unchanged for a scalar kernel, else [n d_out, c]."""
        k = self.matrix_size
        if k == 1:
            return outputs
        return outputs.reshape(len(outputs), -1, k).transpose(0, 2, 1).reshape(len(outputs) * k, -1)

    def by_time(self, values: Array, count: int, time: float | Sequence[float]) -> Array:
        """[n, times d_out] or [n d_out, times] -> [times, n, d_out], or one of them."""
        if self.matrix_size == 1:
            result = values.reshape(-1, count, self.d_out).transpose(1, 0, 2)
        else:
            result = values.reshape(-1, self.d_out, count).transpose(2, 0, 1)
        return result if np.ndim(time) else result[0]

    def checked(self, name: str, value: ArrayLike, n: int) -> Array:
        """A number or [n, d_out] -> [n, d_out].

        Raises:
            InputError: the shape is another one, or an entry is not finite.
        """
        outputs = host_numbers(name, value)
        shape = (n, self.d_out)
        if outputs.ndim and outputs.shape != shape:
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(outputs.shape)}")
        return np.broadcast_to(outputs, shape)
