"""A Gram matrix too large to hold twice: its upper triangle, tile by tile, in float64.

What a Krylov method needs of a matrix is its product with a few vectors. `SymmetricGram` gives it,
from half of the entries: 60,000 examples take 14.4 GB. The tiles are kept in memory, or in a file
that a later run takes up again, or computed anew for every product where neither holds them.

Several processes (`dnntk.runtime.processes`) store every n-th tile each, n being their number; only
vectors are exchanged. The
devices of one process compute its tiles in turn (`dnntk.runtime.devices`).
"""

import hashlib
import logging
import math
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dnntk.checks import brief
from dnntk.errors import InputError
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runs.folder import parsed, replace_json
from dnntk.runtime import processes
from dnntk.runtime.devices import Devices, on_cpu
from dnntk.runtime.progress import progress_bar
from dnntk.runtime.threads import cores, on_cores, one_blas_thread

Kernel = Callable[[jax.Array, jax.Array], jax.Array]
TILES, PROGRESS = "gram.npy", "gram.json"
PROBES = 8  # entries along a side of the block by which a stored matrix is known again

log = logging.getLogger("dnntk")


class CrossKernel:
    """A kernel between rows of two host arrays, block by block, as plain matrices.

    A matrix-valued kernel's block [b1, b2, k, k] becomes [b1 k, b2 k], outputs innermost.
    """

    def __init__(self, kernel: Kernel, x: np.ndarray, dtype: str) -> None:
        """Learn from one example's shape how many outputs ``kernel`` has.

        ``x`` is kept, and copied only where ``dtype`` is another.
        """
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
        self.outputs = shape[2] if len(shape) == 4 else 1

    def block(self, x1: np.ndarray, x2: np.ndarray) -> NDArray[np.float64]:
        """[b1, ...], [b2, ...] -> [b1 k, b2 k], checked to be finite."""
        return self.plain(self.begun(x1, x2), len(x1), len(x2))

    def blocks(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[NDArray[np.float64]]:
        """`block` of each pair, in order, computed on all devices of this process."""
        return self.devices.map(
            lambda i: self.begun(*pairs[i]),
            lambda i, values: self.plain(values, *map(len, pairs[i])),
            len(pairs),
        )

    def begun(self, x1: np.ndarray, x2: np.ndarray) -> jax.Array:
        """The kernel's own values, padded, perhaps still being computed.

        In blocks of few different sizes, as each is compiled.
        """
        with jax.enable_x64(self.dtype == "float64"):
            return self.kernel(jnp.asarray(_padded(x1)), jnp.asarray(_padded(x2)))

    def plain(self, values: jax.Array, rows: int, cols: int) -> NDArray[np.float64]:
        """Values as `begun` returns them -> [rows k, cols k], checked to be finite."""
        block = np.asarray(values)[:rows, :cols].astype(np.float64, copy=False)
        if block.ndim == 4:
            block = block.transpose(0, 2, 1, 3)
            block = block.reshape(block.shape[0] * block.shape[1], -1)
        _check_finite(block.sum())
        return block

    def _shape_of_one(self) -> tuple[int, ...]:
        one = self.x[:1]
        try:
            with jax.enable_x64(self.dtype == "float64"):
                return jax.eval_shape(self.kernel, one, one).shape
        except Exception:  # not every kernel can be traced; what is wrong with it, it says itself
            return self.begun(one, one)[:1, :1].shape


class SymmetricGram:
    """The Gram matrix [m, m] of a kernel on n examples; m = n k for k outputs.

    Of several processes all must make it, and call its methods in the same order.

    Attributes:
        shape: (m, m).
        nbytes: of this process's tiles.
        stored: are the tiles kept, or computed for every product?
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
        """Compute the tiles, or take those in ``folder`` up again.

        Raises:
            InputError: the kernel is not finite or not symmetric, or the folder holds another one.
        """
        self.cross, self.progress, self.stored = cross, progress, stored
        n, k = len(cross.x), cross.outputs
        self._examples = balanced(n, block_size)
        self._bounds = [(a * k, b * k) for a, b in self._examples]
        pairs = [(i, j) for i in range(len(self._bounds)) for j in range(i + 1)]
        self._pairs = pairs[processes.index() :: processes.count()]
        sizes = [self._rows(i) * self._rows(j) for i, j in self._pairs]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.shape = (n * k, n * k)
        self._data: np.ndarray | None = None
        if stored:
            self._store(folder)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's tiles, whether they are stored or not."""
        return 8 * int(self._starts[-1])

    def product(self, vectors: np.ndarray, rows: processes.Rows | None = None) -> np.ndarray:
        """[m', c] -> [m', c] with the leading m' rows and columns of the matrix, m' <= m.

        Of several processes each gives and gets those of the m' ``rows`` that it has.
        """
        rows = processes.Rows(len(vectors)) if rows is None else rows
        return rows.reduce_scatter(self._own_product(rows.all_gather(vectors)))

    def _own_product(self, vectors: np.ndarray) -> np.ndarray:
        """What this process's tiles contribute to it."""
        used = len(vectors)
        count = sum(1 for i, _ in self._pairs if self._bounds[i][0] < used)
        if not self.stored:
            return self._recomputed_product(count, vectors)
        # A core takes every so-manieth tile: threads that share one small product wait for each
        # other, for ever on a busy machine.
        shares = min(cores(), count)
        part = lambda first: self._part(range(first, count, shares), vectors)  # noqa: E731
        return sum(on_cores(part, range(shares)), np.zeros(vectors.shape))

    def _part(self, numbers: Iterable[int], vectors: np.ndarray) -> np.ndarray:
        """What some of the stored tiles contribute to a product."""
        result = np.zeros(vectors.shape)
        for number in numbers:
            self._add(result, number, self._halves(number, self._tile(number), vectors))
        return result

    def _recomputed_product(self, count: int, vectors: np.ndarray) -> np.ndarray:
        """What the first tiles contribute, added in their order."""

        def begin(number: int) -> Any:
            i, j = self._pairs[number]
            values = self.cross.begun(*self._inputs(number))
            if i == j or not _multiplies_there():  # the diagonal is looked at here
                return values
            sizes = [size * self.cross.outputs for size in values.shape[:2]]
            rows, cols = (
                _filled(vectors[slice(*self._bounds[e])], size)
                for e, size in zip((i, j), sizes, strict=True)
            )
            with jax.enable_x64(True):
                return _multiplied(values, jnp.asarray(rows), jnp.asarray(cols))

        def finish(number: int, begun: Any) -> list[np.ndarray]:
            if isinstance(begun, tuple):
                return [np.asarray(half) for half in begun]
            rows, cols = self._inputs(number)
            tile = self._checked(number, self.cross.plain(begun, len(rows), len(cols)))
            return self._halves(number, tile, vectors)

        result = np.zeros(vectors.shape)
        # One thread, as above: and the cores may be the devices.
        with one_blas_thread():
            parts = self.cross.devices.map(begin, finish, count)
            for number, halves in zip(self._shown(count, "product"), parts, strict=True):
                self._add(result, number, halves)
        _check_finite(result.sum())
        return result

    def _halves(self, number: int, tile: np.ndarray, vectors: np.ndarray) -> list[np.ndarray]:
        """A tile times its columns' vectors, and its transpose times its rows' where it has one."""
        i, j = self._pairs[number]
        (r, r_end), (c, c_end) = self._bounds[i], self._bounds[j]
        tile = tile[: len(vectors) - r, : len(vectors) - c]
        own = tile @ vectors[c:c_end]
        return [own] if i == j else [own, tile.T @ vectors[r:r_end]]

    def _add(self, result: np.ndarray, number: int, halves: Sequence[np.ndarray]) -> None:
        for e, half in zip(self._pairs[number], halves, strict=False):
            into = result[slice(*self._bounds[e])]
            into += half[: len(into)]

    def dense(self, size: int | None = None) -> NDArray[np.float64]:
        """The leading ``size`` rows and columns, all of them where None, as one array."""
        size = self.shape[0] if size is None else size
        full = np.zeros((size, size)) if processes.is_multiprocess() else np.empty((size, size))
        count = sum(1 for i, _ in self._pairs if self._bounds[i][0] < size)
        tiles = map(self._tile, range(count)) if self.stored else self._computed(range(count))
        for (i, j), whole in zip(self._pairs, tiles, strict=False):
            (r, r_end), (c, c_end) = self._bounds[i], self._bounds[j]
            tile = whole[: size - r, : size - c]
            full[r:r_end, c:c_end] = tile
            full[c:c_end, r:r_end] = tile.T
        return processes.all_reduce(full)

    def identity(self) -> dict[str, Any]:
        """What tells one matrix from another: inputs, tiling, and the kernel on a few of them."""
        x = np.ascontiguousarray(self.cross.x)
        probes = x[np.linspace(0, len(x) - 1, PROBES).astype(int)]
        identity = {
            "inputs": hashlib.sha256(x.tobytes()).hexdigest(),
            "shape": list(self.shape),
            "tiles": [b - a for a, b in self._examples],
            "dtype": self.cross.dtype,
            "probes": self.cross.block(probes, probes).ravel().tolist(),
        }
        if processes.is_multiprocess():
            identity["process"] = [processes.index(), processes.count()]
        return identity

    def _rows(self, i: int) -> int:
        return self._bounds[i][1] - self._bounds[i][0]

    def _inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        i, j = self._pairs[number]
        return self.cross.x[slice(*self._examples[i])], self.cross.x[slice(*self._examples[j])]

    def _tile(self, number: int) -> np.ndarray:
        """A stored one."""
        assert self._data is not None
        i, j = self._pairs[number]
        flat = self._data[self._starts[number] : self._starts[number + 1]]
        return flat.reshape(self._rows(i), self._rows(j))

    def _computed(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Tiles in their order, on all devices."""
        blocks = self.cross.blocks([self._inputs(number) for number in numbers])
        return map(self._checked, numbers, blocks)

    def _checked(self, number: int, tile: np.ndarray) -> np.ndarray:
        """The tile; where it lies on the diagonal, exactly symmetric."""
        i, j = self._pairs[number]
        if i != j:
            return tile
        gap = np.abs(tile - tile.T).max()
        # Each entry is a sum of rounded terms: allow what float32 sums of them differ by.
        if gap > 1e-5 * np.abs(tile).max():
            raise InputError(
                f"kernel: expected k(x, x') = k(x', x), got entries {gap:.3g} apart; "
                "check that it treats its two arguments alike"
            )
        return (tile + tile.T) / 2

    def _shown(self, stop: int, what: str, start: int = 0) -> Iterable[int]:
        """Numbers of tiles, with a bar."""
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
        """Fill the tiles in the order of the triangle, so that a count says what is there."""
        size = int(self._starts[-1])
        sums: list[int] = []
        if folder is None:
            self._data = np.empty(size)
        else:
            if processes.is_multiprocess():
                folder = folder / f"process-{processes.index()}-of-{processes.count()}"
            file, note = folder / TILES, folder / PROGRESS
            identity = self.identity()
            sums = self._known(file, note, identity)
            self._data = (
                np.load(file, mmap_mode="r+", allow_pickle=False)
                if sums
                else np.lib.format.open_memmap(file, mode="w+", dtype=np.float64, shape=(size,))
            )
            if sums:
                log.info("gram: %d of %d tiles taken from %s", len(sums), len(self._pairs), file)
                if self._mend(sums):
                    replace_json(note, {**identity, "checksums": sums})
        done = len(sums)
        missing = self._shown(len(self._pairs), "kernel", done)
        tiles = self._computed(range(done, len(self._pairs)))
        for number, tile in zip(missing, tiles, strict=True):
            self._tile(number)[:] = tile
            if folder is None:
                continue
            sums.append(_checksum(tile))
            last = number + 1 == len(self._pairs)
            if last or self._pairs[number + 1][0] > self._pairs[number][0]:
                _flush(self._data)  # what there is of a row of tiles is whole
                replace_json(note, {**identity, "checksums": sums})

    def _mend(self, sums: list[int]) -> bool:
        """Compute those of the first tiles again that are no longer what was written, if any."""
        numbers = self._shown(len(sums), "check")
        damaged = [k for k in numbers if _checksum(self._tile(k)) != sums[k]]
        for number, tile in zip(damaged, self._computed(damaged), strict=True):
            self._tile(number)[:] = tile
            sums[number] = _checksum(tile)  # another device may round otherwise
        if damaged:
            assert self._data is not None
            _flush(self._data)
            log.warning("gram: %d of %d tiles were damaged: mended", len(damaged), len(sums))
        return bool(damaged)

    def _known(self, file: Path, note: Path, identity: dict[str, Any]) -> list[int]:
        """Checksums of the tiles of this very matrix that ``file`` holds, in their order.

        Raises:
            InputError: it holds another matrix, or is damaged.
        """
        folder = file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"folder: expected a folder that can be made, got {folder} ({error.strerror}); "
                "give another"
            ) from None
        if not file.exists() or not note.exists():
            return []
        advice = "remove both files, or give another folder"
        damaged = InputError(f"gram: expected a stored matrix in {folder}, found damage; {advice}")
        try:
            content = parsed(note.read_bytes())
            probes = np.array(content.pop("probes"), np.float64)
            sums = content.pop("checksums", None)
            done = content.pop("done", None)  # of a matrix stored before there were checksums
            held = np.load(file, mmap_mode="r", allow_pickle=False)
        except _UNREADABLE:
            raise damaged from None
        expected = {name: value for name, value in identity.items() if name != "probes"}
        if held.shape != (int(self._starts[-1]),) or held.dtype != np.float64:
            raise damaged
        if sums is None and type(done) is int and 0 <= done <= len(self._pairs):
            tiles = (held[self._starts[k] : self._starts[k + 1]] for k in range(done))
            sums = [_checksum(tile) for tile in tiles]
        if type(sums) is not list or len(sums) > len(self._pairs):
            raise damaged
        if not all(type(one) is int for one in sums):
            raise damaged
        own = np.array(identity["probes"])
        same = probes.shape == own.shape and np.allclose(probes, own, rtol=1e-6, atol=0)
        if content != expected or not same:
            raise InputError(
                f"gram: expected the matrix of these inputs and this kernel in {folder}, found "
                f"another; {advice}"
            )
        return sums


# NumPy takes a header apart as Python's own parser would, and lets through what that raises.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(SyntaxError, tokenize.TokenError, MemoryError, RecursionError),
)


def padded_rows(n: int) -> int:
    """As many as `CrossKernel` computes: a power of two up to 128, then a multiple of 128."""
    return max(16, 1 << (n - 1).bit_length()) if n <= 128 else -(-n // 128) * 128


def _padded(x: np.ndarray) -> np.ndarray:
    """With its last row repeated up to `padded_rows`."""
    n = len(x)
    rows = padded_rows(n)
    return x if rows == n else np.concatenate([x, np.repeat(x[-1:], rows - n, 0)])


def _filled(vectors: np.ndarray, rows: int) -> np.ndarray:
    """With zeros below, where `_padded` repeats a row."""
    return np.pad(vectors, ((0, rows - len(vectors)), (0, 0)))


def _multiplies_there() -> bool:
    """Does a device multiply what it has computed? Where its memory is its own, vectors travel."""
    return not on_cpu()


@jax.jit
def _multiplied(values: jax.Array, rows: jax.Array, cols: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A tile [b1, b2] or [b1, b2, k, k] times [b2 k, c], and its transpose times [b1 k, c]."""
    tile = values.astype(jnp.float64)
    if tile.ndim == 4:
        tile = tile.transpose(0, 2, 1, 3).reshape(len(rows), len(cols))
    precise = partial(jnp.matmul, precision="highest")
    return precise(tile, cols), precise(tile.T, rows)


def _check_finite(total: np.floating[Any]) -> None:
    """A sum over values is finite where they are."""
    if not np.isfinite(total):
        raise InputError(
            "kernel: expected finite values, got NaN or infinity; scale the inputs down, or "
            "look for a singular point of the kernel"
        )


def balanced(n: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of pieces of n rows: as few as ``most`` rows each allow, and of one size."""
    edge = math.ceil(n / math.ceil(n / most))
    return [(a, min(a + edge, n)) for a in range(0, n, edge)]


def _checksum(tile: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tile).data)


def _flush(data: np.ndarray) -> None:
    if isinstance(data, np.memmap):
        data.flush()
