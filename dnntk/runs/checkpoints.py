"""Checkpoints of a run by orbax: written whole or not at all, the newest intact one restored.

The last file of a checkpoint lists the sizes and SHA-256 of all others. A checkpoint without this
list was cut short; a checkpoint that differs from its list is damaged, and the one before it is
restored. The list is checked before orbax reads any file, and shapes before arrays are made. A new
checkpoint is read again at once; if that fails, an error is raised.
"""

import contextlib
import hashlib
import math
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dnntk.errors import InputError
from dnntk.runs.folder import parsed, replace_json
from dnntk.runs.paths import make_folder
from dnntk.runtime import processes

__all__ = ["CHECKSUMS", "Checkpoints", "memory_to_write"]

CHECKSUMS = "checksums.json"
# Arrays are written and read in pieces of at most this many bytes, in files of at most two pieces:
# orbax holds a file in memory before it writes it. Pieces may be smaller by `_MOST_CUTS`.
_PIECE, _MOST_CUTS = 1 << 26, 64
# Most bytes of the list of files; most bytes of arrays for each byte in files.
_MOST_CHECKSUMS, _MOST_EXPANSION = 1 << 22, 1000
# Bytes that writing takes beside the state, and keeps for the next checkpoint: per byte of the
# state, and at most with pieces of `_PIECE`. Measured on states of 20 to 1,400 MB.
_MEMORY_A_BYTE, _MOST_MEMORY = 1.5, 950_000_000
# Where Linux lists a process's open files and folders.
_OPEN_FILES = Path("/proc/self/fd")
# In a path, orbax reads the first four as a pattern, and tensorstore a backslash as a slash.
_PATTERN = frozenset("*?[]\\")


def memory_to_write(state: Any) -> int:
    """About how many bytes of memory writing a state takes, beside the state itself."""
    arrays = jax.tree.leaves(state)
    pieces = max(map(_piece_bytes, arrays)) / _PIECE
    size = sum(a.size * a.dtype.itemsize for a in arrays)
    return int(min(_MEMORY_A_BYTE * size, _MOST_MEMORY * pieces))


class Checkpoints:
    """The last ``keep`` states of a run under ``folder``; a context manager.

    A state is a pytree of arrays. Whole arrays are stored, so that a run may continue on another
    number of devices.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Open ``folder``, and make it if it is missing.

        Raises:
            InputError: the folder cannot be made, or orbax cannot use its name.
        """
        # The primary process writes; every process reads by itself.
        alone = ocp.options.MultiprocessingOptions()
        if processes.is_multiprocess():
            own = processes.index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=processes.is_primary(),
            create=False,
            multiprocessing_options=alone,
        )
        if processes.is_primary():
            make_folder("workdir", folder)
        processes.barrier("checkpoints")
        self._folder = folder.absolute()
        self._resources = contextlib.ExitStack()
        self._orbax_path = self._resources.enter_context(_without_pattern(self._folder))
        handler = ocp.PyTreeCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self._orbax_path, options=options, item_handlers=handler
        )
        self._resources.callback(self._manager.close)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder."""
        self._resources.close()

    def save(self, step: int, state: Any) -> None:
        """Write ``state`` as the checkpoint of ``step``, unless there is one.

        All processes of a job must call this method.

        Raises:
            InputError: there is no room, or the checkpoint cannot be read again; the checkpoints
                before it stay.
        """
        if step in self._manager.all_steps():
            return
        host = processes.to_host(state)
        if not processes.is_primary():
            return
        needed = sum(a.nbytes for a in jax.tree.leaves(host))
        free = shutil.disk_usage(self._folder).free
        try:
            if needed > free:
                raise OSError(f"{free / 1e6:.0f} MB are free")
            with _thread_errors_delayed():
                self._manager.save(step, args=_in_pieces(_without_empty(host)))
            _write_checksums(self._folder / str(step))
        except (OSError, ValueError) as error:  # tensorstore raises the latter
            self._discard(step)
            raise InputError(
                f"workdir: expected room for a checkpoint of {needed / 1e6:.0f} MB in "
                f"{self._folder} ({self._reason(error)}); make room and give resume=True: "
                "the checkpoint before it is kept"
            ) from None
        try:
            self._check_readable(step, _without_empty(host))
        except Exception as error:  # orbax and its backends raise many kinds
            self._discard(step)
            raise InputError(
                f"workdir: expected a folder in which checkpoints can be read again, "
                f"{self._folder} is none ({self._reason(error)}); choose another"
            ) from None

    def _reason(self, error: BaseException) -> str:
        """The first line of orbax's message, with the user's path of the folder."""
        line = str(error).strip().partition("\n")[0]
        return line.replace(str(self._orbax_path), str(self._folder))[:160]

    def _discard(self, step: int) -> None:
        with contextlib.suppress(Exception):
            self._manager.delete(step)

    def _check_readable(self, step: int, state: Any) -> None:
        """Restore the smallest array and all shapes; the checksums have read all files."""
        self._check_shapes(step, state)
        leaves, tree = jax.tree.flatten(state)
        smallest = min(range(len(leaves)), key=lambda i: leaves[i].nbytes)
        like = [ocp.PLACEHOLDER] * len(leaves)
        like[smallest] = jax.ShapeDtypeStruct(leaves[smallest].shape, leaves[smallest].dtype)
        like = jax.tree.unflatten(tree, like)
        read = jax.tree.leaves(self._manager.restore(step, args=_as_numpy(like, like)))[smallest]
        if not np.array_equal(read, leaves[smallest], equal_nan=True):
            raise ValueError(f"step {step} has other values than were written")

    def newest(self) -> Any:
        """The newest state or None: NumPy arrays in plain containers, None for an empty array.

        Raises:
            InputError: the newest checkpoint is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        size, shapes = self._verified(step), self._manager.item_metadata(step).tree
        arrays = jax.tree.leaves(shapes)
        claimed = sum(np.dtype(a.dtype).itemsize * math.prod(a.shape) for a in arrays)
        if claimed > _MOST_EXPANSION * size:
            raise InputError(f"{self._folder}: {size} bytes at step {step} claim {claimed}")
        return self._manager.restore(step, args=_as_numpy(shapes))

    def kept(self) -> bool:
        """Is there a checkpoint that was completed, intact or damaged?"""
        return any(_size(self._folder / str(s) / CHECKSUMS) >= 0 for s in self._manager.all_steps())

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest intact checkpoint; None if no checkpoint was completed.

        Newer checkpoints, which are damaged, are deleted. ``like`` is a state, or its shapes
        (`jax.ShapeDtypeStruct`).

        Raises:
            InputError: there are checkpoints, but none is intact and like ``like``.
        """
        template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        reason = ""
        unfinished: list[int] = []
        for step in steps:
            try:
                self._verified(step)
                kept = _without_empty(template)
                self._check_shapes(step, kept)
                restored = self._manager.restore(step, args=_as_numpy(kept, kept))
            except _CutShort as error:
                reason = reason or str(error)
                unfinished.append(step)
            except Exception as error:  # orbax and its backends raise many kinds on damaged files
                reason = reason or self._reason(error)
            else:
                processes.barrier("restored")
                self._delete(newer for newer in steps if newer > step)
                return step, jax.tree.map(_or_empty, template, restored)
        if unfinished == steps:  # killed while the first one was written: nothing is lost
            processes.barrier("restored")
            self._delete(steps)
            return None
        if steps:
            raise InputError(
                f"resume: no checkpoint under {self._folder} can be read ({reason}); "
                "start again in another workdir"
            )
        return None

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps if processes.is_primary() else ():
            self._manager.delete(step)

    def _verified(self, step: int) -> int:
        """Compare a checkpoint's files with their list; returns their bytes."""
        folder = self._folder / str(step)
        file_list = folder / CHECKSUMS
        if not 0 <= _size(file_list) <= _MOST_CHECKSUMS:
            raise _CutShort(f"step {step} was cut short: it has no {CHECKSUMS}")
        try:
            claimed = parsed(file_list.read_bytes())
        except ValueError:
            claimed = None
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
        if not isinstance(claimed, dict) or found - {CHECKSUMS} != set(claimed):
            raise InputError(f"step {step} has other files than were written")
        total = 0
        for name, entry in claimed.items():
            file = folder / name
            size = _size(file)
            # The size first: a file that has grown may be too long to read.
            sized = isinstance(entry, dict) and entry.get("bytes") == size >= 0
            if not sized or entry.get("sha256") != _sha(file):
                raise InputError(f"step {step}: {name} is damaged")
            total += size
        return total

    def _check_shapes(self, step: int, template: Any) -> None:
        if _shapes(self._manager.item_metadata(step).tree) != _shapes(template):
            raise InputError(f"step {step} is of another network")


@contextlib.contextmanager
def _without_pattern(folder: Path) -> Iterator[Path]:
    """A path of ``folder`` without characters that orbax would misread.

    Raises:
        InputError: the folder's own path has such characters, and the system offers no other.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        path = _OPEN_FILES / str(descriptor)
        if not path.is_dir():
            path = folder
            if found := _PATTERN & set(str(folder)):
                raise InputError(
                    f"workdir: expected a path without {' '.join(sorted(found))}, got {folder}; "
                    "choose another"
                )
        yield path
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _thread_errors_delayed() -> Iterator[None]:
    """Report failures of threads after the block; if the block raises, report only its error."""
    before = threading.excepthook
    failures: list[threading.ExceptHookArgs] = []
    threading.excepthook = failures.append
    try:
        yield
    finally:
        threading.excepthook = before
    for failure in failures:
        before(failure)


class _CutShort(InputError):
    """A checkpoint that was not completed."""


def _write_checksums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {str(p.relative_to(folder)): {"bytes": _size(p), "sha256": _sha(p)} for p in files}
    replace_json(folder / CHECKSUMS, entries)


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    """Bytes of a regular file; -1 for anything else, such as a link or a pipe."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _in_pieces(state: Any) -> ocp.args.PyTreeSave:
    """Orbax's arguments to write ``state`` without a second copy of it in memory."""
    cpu = jax.local_devices(backend="cpu")[0]

    def shared(a: Any) -> Any:
        # orbax copies NumPy arrays, but not JAX's; a copy of a small one does no harm.
        if a.nbytes <= _PIECE or jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype:
            return a
        return jax.device_put(a, cpu, may_alias=True)

    pieces = jax.tree.map(_piece_bytes, state)
    return ocp.args.PyTreeSave(
        jax.tree.map(shared, state),
        save_args=jax.tree.map(lambda size: ocp.SaveArgs(chunk_byte_size=size), pieces),
        ocdbt_target_data_file_size=2 * max(jax.tree.leaves(pieces)),
    )


def _piece_bytes(a: Any) -> int:
    """Most bytes of a piece of an array: `_PIECE`, or more if its longest axis cannot be cut so.

    Orbax cuts an axis into equal parts only: 9,999,998 = 2 x 4,999,999 layers, given `_PIECE`, into
    4,999,999 pieces, which take 20 GB to write. Two are better than pieces of a few bytes.
    """
    size = a.size * a.dtype.itemsize
    fewest = max(1, math.ceil(size / _PIECE))
    counts = *range(fewest, _MOST_CUTS * fewest), *range(fewest, 0, -1)
    count = next(count for count in counts if max(a.shape, default=1) % count == 0)
    return max(_PIECE, int(size // count))


def _as_numpy(arrays: Any, like: Any = None) -> ocp.args.PyTreeRestore:
    """Orbax's arguments to read ``arrays``, in the containers of ``like`` or in plain ones."""
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
    return ocp.args.PyTreeRestore(like, restore_args=wanted)


def _without_empty(state: Any) -> Any:
    """``state`` with None for empty arrays, which orbax refuses.

    The middle layers of a network of two layers are such arrays.
    """
    return jax.tree.map(lambda a: a if a.size else None, state)


def _or_empty(like: Any, read: Any) -> Any:
    """The array ``read``, or the empty one that `_without_empty` replaced by None."""
    return np.zeros(like.shape, like.dtype) if read is None else read


def _shapes(state: Any) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """{path to each array: (shape, dtype)}, ignoring the container types."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(a.shape), np.dtype(a.dtype))
        for path, a in jax.tree_util.tree_flatten_with_path(state)[0]
    }
