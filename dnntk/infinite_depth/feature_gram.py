"""The Gram matrix of a kernel whose features are known, K = Phi Phi^T, without forming it.

A kernel of m features (`dnntk.ntk.random_features` has about one a layer) needs O(n^2 m) operations
for the n^2 entries of K. `FeatureGram` needs O(n), in one of two ways:

`FeatureEigendecomposition`  With fewer features than examples, Phi^T Phi [m, m] is diagonalized
    instead: O(n m^2) operations, and any time is exact to rounding.
`FeatureGram.product`  With more, a Krylov method takes products Phi (Phi^T v), of a block of
    features at a time: O(n m) operations each, of which it needs 10 to 20.

`choose` counts operations.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from numpy.typing import NDArray

from dnntk.infinite_depth.cross_kernel import CrossKernel, balanced, check_finite, padded
from dnntk.infinite_depth.gram_matrix import SymmetricGram, keeps_tiles
from dnntk.infinite_depth.solvers import (
    BLOCK,
    MAX_EIGH_ROWS,
    Eigendecomposition,
    diagonal_blocks,
    uses_eigh,
)
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar

__all__ = [
    *("Choice", "FeatureEigendecomposition", "FeatureGram", "FeatureKernel", "Gram", "choose"),
    "gram_of",
]

EXPECTED_PRODUCTS = 20  # of a Krylov method
WAYS = {
    "matrix": "formed",
    "products": "multiplied with by its features",
    "features": "its features diagonalized instead",
}
BLOCK_ROWS = 1024  # whose features are evaluated together
HELD_BYTES = 1 << 30  # of all features, which then are evaluated once

log = logging.getLogger("dnntk")

Array = NDArray[np.float64]


@runtime_checkable
class FeatureKernel(Protocol):
    """A kernel with known features, as `dnntk.ntk.random_features.RandomFeatures`."""

    def count(self, shape: tuple[int, ...]) -> int:
        """The features m of an example, for a batch of this shape."""

    def operations(self, shape: tuple[int, ...]) -> float:
        """Arithmetic operations for all features of a batch of this shape."""

    def features(self, x: np.ndarray) -> jax.Array:
        """Phi(x) [n, m]."""

    def parts(self, shape: tuple[int, ...]) -> int:
        """The number of terms of `product` for a batch of this shape."""

    def product(self, x: np.ndarray, vectors: np.ndarray, part: int) -> jax.Array:
        """A term of K(x, x) @ vectors, in their dtype."""


class FeatureGram:
    """The Gram matrix [n, n] of a kernel with known features; see the module's docstring.

    Several processes must all construct it, and call its methods in the same order.

    Attributes:
        cross: the kernel and its examples.
        shape: (n, n).
        stored, nbytes, where: False, 0 and a word for the log, as no entry is kept.
        diagonalized: is it solved by a `FeatureEigendecomposition`?
    """

    stored, nbytes, where = False, 0, "by its features"

    def __init__(
        self, cross: CrossKernel, kernel: FeatureKernel, *, diagonalized: bool, progress: bool
    ) -> None:
        """Compute nothing yet; ``kernel`` is that of ``cross``."""
        self.cross, self.progress, self.diagonalized = cross, progress, diagonalized
        self._kernel = kernel
        self.shape = (len(cross.x), len(cross.x))
        self._held: dict[tuple[int, int], Array] = {}

    def product(self, vectors: Array, rows: processes.Rows | None = None) -> Array:
        """The leading n' rows and columns of the matrix times vectors: [n', c] -> [n', c].

        With several processes, ``rows`` splits the n' rows; each passes and receives its own, and
        adds up the products of its own parts of the layers.
        """
        rows = processes.Rows(len(vectors)) if rows is None else rows
        whole = rows.all_gather(vectors)
        x = self.cross.x[: len(whole)]
        parts = range(self._kernel.parts(x.shape))[processes.index() :: processes.count()]

        def begin(number: int) -> jax.Array:
            with jax.enable_x64(True):
                return self._kernel.product(x, whole, parts[number])

        terms = self.cross.devices.map(begin, lambda _, term: np.asarray(term), len(parts))
        bar = progress_bar(
            terms,
            desc="product",
            unit="part",
            delay=PROGRESS_DELAY,
            total=len(parts),
            disable=not self.progress,
        )
        result = sum(bar, np.zeros(whole.shape))
        check_finite(result.sum())
        return rows.reduce_scatter(result)

    def products_of_features(self, n: int) -> Array:
        """Phi^T Phi [m, m] of the leading n rows."""
        own = sum(features.T @ features for _, features in self._blocks(processes.Rows(n)))
        total = processes.all_reduce(np.broadcast_to(own, 2 * (self._count,)))
        check_finite(total.sum())
        return total

    def identity(self) -> dict[str, Any]:
        """A description of this matrix only."""
        return self.cross.identity()

    def features_times(self, coordinates: Array, n: int) -> Array:
        """The leading n rows of Phi times [m, c]: [n, c]."""
        rows, none = processes.Rows(n), np.zeros((0, coordinates.shape[1]))
        own = [features @ coordinates for _, features in self._blocks(rows)]
        return rows.all_gather(np.concatenate([none, *own]))

    def transpose_times(self, vectors: Array) -> Array:
        """The transpose of the leading n rows of Phi times [n, c]: [m, c]."""
        blocks = self._blocks(processes.Rows(len(vectors)))
        own = sum(features.T @ vectors[rows] for rows, features in blocks)
        return processes.all_reduce(np.broadcast_to(own, (self._count, vectors.shape[1])))

    @property
    def _count(self) -> int:
        return self._kernel.count(self.cross.x.shape)

    def _blocks(self, rows: processes.Rows) -> Iterator[tuple[slice, Array]]:
        """The features of this process's rows, a block of rows at a time."""
        hold = 8 * len(self.cross.x) * self._count <= HELD_BYTES
        for start, stop in balanced(rows.stop - rows.start, BLOCK_ROWS):
            block = rows.start + start, rows.start + stop
            features = self._held.get(block)
            if features is None:
                with jax.enable_x64(True):
                    x = padded(self.cross.x[slice(*block)]).astype(np.float64)
                    features = np.asarray(self._kernel.features(x))[: stop - start]
                if hold:
                    self._held[block] = features
            yield slice(*block), features


class FeatureEigendecomposition(Eigendecomposition):
    """All eigenvectors of A = K / n with fewer features than rows: from those of Phi^T Phi / n.

    With V of the eigenvalues s > 0 of that matrix, A's eigenvectors are Phi V / sqrt(n s). Beside
    them is the part of the targets outside of Phi's range, of eigenvalue 0.

    Attributes and methods are those of `Eigendecomposition`.
    """

    def __init__(self, gram: FeatureGram, targets: Array) -> None:
        """Diagonalize the leading rows and columns of ``gram`` for ``targets`` [n, k]."""
        n = len(targets)
        matrix = gram.products_of_features(n) / n
        super().__init__(matrix, np.zeros((len(matrix), 0)))
        self.name = "eigendecomposition of the features"
        kept = self.values > len(matrix) * np.finfo(np.float64).eps * self.values[-1]
        self._gram, self._range = gram, self.values[kept]
        self._vectors = self._vectors[:, kept] / np.sqrt(n * self._range)
        self.smallest_eigenvalue = 0.0
        self._take(targets)

    def for_targets(self, targets: Array) -> "FeatureEigendecomposition":
        """The same eigenvectors for other targets."""
        other = copy.copy(self)
        other._take(targets)
        return other

    def diagonal_blocks(self, function: Callable[[Array], Array], size: int = 1) -> Array:
        """The diagonal blocks of some functions of A: [n / size, size, size, c]."""
        elsewhere = function(np.zeros(1))  # their values outside of the range
        vectors = self._gram.features_times(self._vectors, len(self._outside))
        inside = diagonal_blocks(vectors, function(self._range) - elsewhere, size)
        return inside + np.eye(size)[:, :, None] * elsewhere

    def _take(self, targets: Array) -> None:
        inside = self._vectors.T @ self._gram.transpose_times(targets)
        rest = targets - self._gram.features_times(self._vectors @ inside, len(targets))
        self._outside, coordinates = np.linalg.qr(rest)
        self.values = np.concatenate([np.zeros(len(coordinates)), self._range])
        self.targets = np.concatenate([coordinates, inside])

    def from_eigenbasis(self, components: Array) -> Array:
        """[d, c] by eigenvector -> [n, c]."""
        outside, inside = np.split(components, [self._outside.shape[1]])
        inside = self._gram.features_times(self._vectors @ inside, len(self._outside))
        return self._outside @ outside + inside

    def apply_matrix(self, components: Array) -> Array:
        """A times ``from_eigenbasis(components)``."""
        return self.from_eigenbasis(self.values[:, None] * components)


class Choice(NamedTuple):
    """How the flow of a kernel with known features is solved.

    Attributes:
        way: "matrix", which is formed; "products" of features, for a Krylov method; "features",
            whose products with each other are diagonalized.
        operations: of this way, without those of an eigendecomposition.
        of_matrix: operations that form the matrix.
    """

    way: str
    operations: float
    of_matrix: float


def choose(
    kernel: FeatureKernel,
    shape: tuple[int, ...],
    method: str = "auto",
    block_size: int = 1024,
    fits: bool = True,
) -> Choice:
    """The way of the fewest operations for examples of this shape.

    Other arguments are as in `KernelFlow`; ``fits`` is whether the matrix fits into memory.
    """
    rows, m, features = shape[0], kernel.count(shape), kernel.operations(shape)
    # A tile of the matrix needs the features of its rows and of its columns.
    of_matrix = float(rows) ** 2 * m + (1 + rows / block_size) * features
    if method != "krylov" and m < min(rows, MAX_EIGH_ROWS + 1):
        return Choice("features", features + float(rows) * m**2, of_matrix)
    products = EXPECTED_PRODUCTS * (features + 4.0 * rows * m * BLOCK)
    if not uses_eigh(method, rows) and (products < of_matrix or not fits):
        return Choice("products", products, of_matrix)
    return Choice("matrix", of_matrix, of_matrix)


Gram = SymmetricGram | FeatureGram


def gram_of(
    cross: CrossKernel,
    *,
    method: str,
    block_size: int,
    memory: float,
    folder: Path | None,
    progress: bool,
) -> Gram:
    """The Gram matrix in the form that `choose` says; arguments are as in `KernelFlow`.

    A kernel without known features has a `SymmetricGram`, in ``folder`` if one is given.
    """
    shape, kernel = cross.x.shape, cross.kernel
    rows, side = (count * cross.matrix_size for count in (shape[0], block_size))
    fits = folder is not None or keeps_tiles(rows, side, memory)
    if isinstance(kernel, FeatureKernel):
        choice = choose(kernel, shape, method, block_size, fits)
        log.info(
            "gram: %s, %.2g operations; the matrix of %d examples with %d features takes %.2g%s",
            *(WAYS[choice.way], choice.operations, rows, kernel.count(shape), choice.of_matrix),
            "" if fits else " and does not fit into memory",
        )
        if choice.way != "matrix":
            diagonalized = choice.way == "features"
            return FeatureGram(cross, kernel, diagonalized=diagonalized, progress=progress)
    return SymmetricGram(
        cross,
        block_size=block_size,
        stored=fits or uses_eigh(method, rows),
        folder=folder,
        progress=progress,
    )
