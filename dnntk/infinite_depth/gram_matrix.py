"""A Gram matrix too large to hold twice: its upper triangle, tile by tile, in float64.

A Krylov method needs the matrix only for products with a few vectors. `SymmetricGram` computes them
from half of the entries: 60,000 examples take 14.4 GB. The tiles are kept in memory, or in a file
that a later run loads, or evaluated again for every product where they fit in neither.

With n processes (`dnntk.runtime.processes`), each stores every n-th tile; only vectors are
exchanged. The devices of one process take its tiles in turn (`dnntk.runtime.devices`).
"""

import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel, balanced, check_finite
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runs.folder import parsed, replace_json
from dnntk.runs.paths import make_folder
from dnntk.runtime import processes
from dnntk.runtime.devices import on_cpu
from dnntk.runtime.progress import progress_bar
from dnntk.runtime.threads import cores, on_cores, one_blas_thread

__all__ = ["SymmetricGram", "UnusableTiles", "keeps_tiles", "usual_memory"]

TILES, PROGRESS = "gram.npy", "gram.json"
BASIS_FRACTION = 0.2  # of the memory stays free for the Krylov basis

log = logging.getLogger("dnntk")


class UnusableTiles(InputError):
    """A folder's tiles are damaged, or those of another matrix."""


class SymmetricGram:
    """The Gram matrix [m, m] of a kernel on n examples; m = n k for values that are [k, k].

    Several processes must all construct it, and call its methods in the same order.

    Attributes:
        cross: the kernel and its examples.
        shape: (m, m).
        stored: are the tiles kept, or evaluated for every product?
        where: its size and place, for the log.
    """

    def __init__(
        self,
        cross: CrossKernel,
        *,
        block_size: int,
        stored: bool = True,
        folder: Path | None = None,
        progress: bool = True,
    ) -> None:
        """Evaluate the tiles, or load the ones that ``folder`` holds.

        Raises:
            InputError: the kernel is not finite or not symmetric, or the folder holds another one.
        """
        self.cross, self.progress, self.stored = cross, progress, stored
        n, k = len(cross.x), cross.matrix_size
        self._examples = [slice(*piece) for piece in balanced(n, block_size)]
        self._sides = [slice(piece.start * k, piece.stop * k) for piece in self._examples]
        pairs = [(i, j) for i in range(len(self._sides)) for j in range(i + 1)]
        self._pairs = pairs[processes.index() :: processes.count()]
        sizes = [math.prod(self._tile_shape(number)) for number in range(len(self._pairs))]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.shape = (n * k, n * k)
        self._data: np.ndarray | None = None
        gigabytes = f"{8 * int(self._starts[-1]) / 1e9:.2g} GB of it"
        self.where = f"{gigabytes} evaluated for every product, as memory is short"
        if stored:
            self.where = f"{gigabytes} in {folder or 'memory'}"
            self._store(folder)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's tiles, stored or not."""
        return 8 * int(self._starts[-1])

    def product(self, vectors: np.ndarray, rows: processes.Rows | None = None) -> np.ndarray:
        """The leading m' rows and columns of the matrix times vectors: [m', c] -> [m', c].

        With several processes, ``rows`` splits the m' rows; each passes and receives its own.
        """
        rows = processes.Rows(len(vectors)) if rows is None else rows
        return rows.reduce_scatter(self._local_product(rows.all_gather(vectors)))

    def _local_product(self, vectors: np.ndarray) -> np.ndarray:
        """The contribution of this process's tiles to a product."""
        count = self._tiles_within(len(vectors))
        if not self.stored:
            return self._recomputed_product(count, vectors)
        # Each of t threads multiplies every t-th tile. Threads that split one small product would
        # wait for each other, for very long on a busy machine.
        threads = min(cores(), count)

        def part(first: int) -> np.ndarray:
            result = np.zeros(vectors.shape)
            for number in range(first, count, threads):
                self._add(result, number, self._tile_products(number, self._tile(number), vectors))
            return result

        return sum(on_cores(part, range(threads)), np.zeros(vectors.shape))

    def _recomputed_product(self, count: int, vectors: np.ndarray) -> np.ndarray:
        """The contribution of the first ``count`` tiles, added in their order."""

        def begin(number: int) -> Any:
            i, j = self._pairs[number]
            values = self.cross.evaluate_async(*self._inputs(number))
            if i == j or not _device_multiplies():  # the host checks the diagonal's symmetry
                return values
            padded = []
            for side, length in zip((i, j), values.shape, strict=False):
                own = vectors[self._sides[side]]
                missing = length * self.cross.matrix_size - len(own)
                padded.append(np.pad(own, ((0, missing), (0, 0))))
            with jax.enable_x64(True):
                return _multiply(values, *map(jnp.asarray, padded))

        def finish(number: int, values: Any) -> list[np.ndarray]:
            if isinstance(values, tuple):
                return [np.asarray(product) for product in values]
            tile = self.cross.as_matrix(values, *map(len, self._inputs(number)))
            tile = _symmetric(*self._pairs[number], tile)
            return self._tile_products(number, tile, vectors)

        result = np.zeros(vectors.shape)
        with one_blas_thread():  # the cores may be the devices
            parts = self.cross.devices.map(begin, finish, count)
            for number, products in zip(self._with_bar(count, "product"), parts, strict=True):
                self._add(result, number, products)
        check_finite(result.sum())
        return result

    def _tile_products(
        self, number: int, tile: np.ndarray, vectors: np.ndarray
    ) -> list[np.ndarray]:
        """The tile times the vectors of its columns; off the diagonal, its transpose's too."""
        i, j = self._pairs[number]
        rows, cols = vectors[self._sides[i]], vectors[self._sides[j]]
        tile = tile[: len(rows), : len(cols)]
        return [tile @ cols] if i == j else [tile @ cols, tile.T @ rows]

    def _add(self, result: np.ndarray, number: int, products: Sequence[np.ndarray]) -> None:
        for side, product in zip(self._pairs[number], products, strict=False):
            target = result[self._sides[side]]
            target += product[: len(target)]

    def dense(self, size: int | None = None) -> NDArray[np.float64]:
        """The leading ``size`` rows and columns as one array; all if ``size`` is None."""
        size = self.shape[0] if size is None else size
        full = np.zeros((size, size)) if processes.is_multiprocess() else np.empty((size, size))
        numbers = range(self._tiles_within(size))
        tiles = map(self._tile, numbers) if self.stored else self._evaluated(numbers)
        for (i, j), tile in zip(self._pairs, tiles, strict=False):
            rows, cols = self._sides[i], self._sides[j]
            target = full[rows, cols]
            target[:] = tile[: target.shape[0], : target.shape[1]]
            full[cols, rows] = target.T
        return processes.all_reduce(full)

    def identity(self) -> dict[str, Any]:
        """A description of this matrix only: inputs, the kernel on a few examples, tiling."""
        tiles = [piece.stop - piece.start for piece in self._examples]
        identity = {**self.cross.identity(), "shape": list(self.shape), "tiles": tiles}
        if processes.is_multiprocess():
            identity["process"] = [processes.index(), processes.count()]
        return identity

    def _tiles_within(self, size: int) -> int:
        """The number of tiles that have rows among the leading ``size``: the first tiles."""
        return sum(1 for i, _ in self._pairs if self._sides[i].start < size)

    def _tile_shape(self, number: int) -> tuple[int, ...]:
        sides = (self._sides[side] for side in self._pairs[number])
        return tuple(side.stop - side.start for side in sides)

    def _inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        i, j = self._pairs[number]
        return self.cross.x[self._examples[i]], self.cross.x[self._examples[j]]

    def _tile(self, number: int) -> np.ndarray:
        """A stored tile."""
        assert self._data is not None
        flat = self._data[self._starts[number] : self._starts[number + 1]]
        return flat.reshape(self._tile_shape(number))

    def _evaluated(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Tiles in their order, evaluated on all devices."""
        blocks = self.cross.blocks([self._inputs(number) for number in numbers])
        return (
            _symmetric(*self._pairs[k], block) for k, block in zip(numbers, blocks, strict=True)
        )

    def _with_bar(self, stop: int, what: str, start: int = 0) -> Iterable[int]:
        """The numbers of tiles from ``start`` to ``stop``, with a progress bar."""
        return progress_bar(
            range(start, stop),
            desc=what,
            unit="tile",
            delay=PROGRESS_DELAY,
            initial=start,
            total=stop,
            disable=not self.progress,
        )

    def _store(self, folder: Path | None) -> None:
        """Evaluate the tiles, in order, into memory or a file."""
        shape = (int(self._starts[-1]),)
        if folder is None:
            self._data = np.empty(shape)
            for number, tile in self._missing_tiles(0):
                self._tile(number)[:] = tile
            return
        if processes.is_multiprocess():
            folder = folder / f"process-{processes.index()}-of-{processes.count()}"
        file, note = folder / TILES, folder / PROGRESS
        identity = self.identity()
        sums = self._load_checksums(file, note, identity)
        if sums:
            self._data = data = np.load(file, mmap_mode="r+", allow_pickle=False)
            log.info("gram: %d of %d tiles taken from %s", len(sums), len(self._pairs), file)
            if self._repair(sums):
                data.flush()
                replace_json(note, {**identity, "checksums": sums})
        else:
            self._data = data = np.lib.format.open_memmap(file, "w+", np.float64, shape)
        for number, tile in self._missing_tiles(len(sums)):
            self._tile(number)[:] = tile
            sums.append(_checksum(tile))
            following = self._pairs[number + 1 : number + 2]
            if not following or following[0][0] > self._pairs[number][0]:  # the row is complete
                data.flush()
                replace_json(note, {**identity, "checksums": sums})

    def _missing_tiles(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        numbers = range(start, len(self._pairs))
        return zip(
            self._with_bar(len(self._pairs), "kernel", start), self._evaluated(numbers), strict=True
        )

    def _repair(self, sums: list[int]) -> bool:
        """Evaluate every tile with a wrong checksum again; was any wrong?"""
        numbers = self._with_bar(len(sums), "check")
        damaged = [k for k in numbers if _checksum(self._tile(k)) != sums[k]]
        for number, tile in zip(damaged, self._evaluated(damaged), strict=True):
            self._tile(number)[:] = tile
            sums[number] = _checksum(tile)  # another device may round otherwise
        if damaged:
            log.warning(
                "gram: %d of %d tiles were damaged: evaluated again", len(damaged), len(sums)
            )
        return bool(damaged)

    def _load_checksums(self, file: Path, note: Path, identity: dict[str, Any]) -> list[int]:
        """The checksums of the tiles that ``file`` holds, in their order; none without a file.

        Raises:
            InputError: the file holds another matrix, or is damaged.
        """
        folder = file.parent
        make_folder("folder", folder)
        if not file.exists() or not note.exists():
            return []
        advice = "remove both files, or give another folder"
        damaged = UnusableTiles(
            f"gram: expected a stored matrix in {folder}, found damage; {advice}"
        )
        try:
            content = parsed(note.read_bytes())
            probes = np.array(content.pop("probes"), np.float64)
            sums = content.pop("checksums", None)
            done = content.pop("done", None)  # files of early versions have no checksums
            held = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception:  # NumPy parses a header with Python's parser, which may raise anything
            raise damaged from None
        expected = {name: value for name, value in identity.items() if name != "probes"}
        if held.shape != (int(self._starts[-1]),) or held.dtype != np.float64:
            raise damaged
        if sums is None and type(done) is int and 0 <= done <= len(self._pairs):
            tiles = (held[self._starts[k] : self._starts[k + 1]] for k in range(done))
            sums = [_checksum(tile) for tile in tiles]
        valid = type(sums) is list and all(type(one) is int for one in sums)
        if not valid or len(sums) > len(self._pairs):
            raise damaged
        own = np.array(identity["probes"])
        same = probes.shape == own.shape and np.allclose(probes, own, rtol=1e-6, atol=0)
        if content != expected or not same:
            raise UnusableTiles(
                f"gram: expected the matrix of these inputs and this kernel in {folder}, found "
                f"another; {advice}"
            )
        return sums


def _symmetric(i: int, j: int, tile: np.ndarray) -> np.ndarray:
    """Tile (i, j); on the diagonal, made exactly symmetric."""
    if i != j:
        return tile
    gap = np.abs(tile - tile.T).max()
    # Each entry is a sum of rounded terms: allow the rounding of float32 sums.
    if gap > 1e-5 * np.abs(tile).max():
        raise InputError(
            f"kernel: expected k(x, x') = k(x', x), got entries {gap:.3g} apart; "
            "check that it treats its two arguments alike"
        )
    return (tile + tile.T) / 2


def keeps_tiles(rows: int, side: int, memory: float) -> bool:
    """Do the tiles, of ``side`` rows, fit into each process's memory beside the Krylov basis?"""
    return 4 * rows * (rows + side) / processes.count() <= (1 - BASIS_FRACTION) * memory


def usual_memory() -> float:
    """The default number of bytes for the Gram matrix and the Krylov basis."""
    return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_multiplies() -> bool:
    """Are recomputed tiles multiplied on their device, as on a GPU?"""
    return not on_cpu()


@jax.jit
def _multiply(values: jax.Array, rows: jax.Array, cols: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A tile [b1, b2] or [b1, b2, k, k] times [b2 k, c], and its transpose times [b1 k, c]."""
    tile = values.astype(jnp.float64)
    if tile.ndim == 4:
        tile = tile.transpose(0, 2, 1, 3).reshape(len(rows), len(cols))
    precise = partial(jnp.matmul, precision="highest")
    return precise(tile, cols), precise(tile.T, rows)


def _checksum(tile: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tile).data)
