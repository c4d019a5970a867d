"""Checkpoints of a run by orbax: written whole or not at all, the newest intact one restored.

Beside what orbax writes lie the sizes and SHA-256 of its files, written last. A checkpoint without
them was cut short; one that differs from them is damaged, and gives way to the one before it.
Nothing of a checkpoint is read before that, and no array made before its shape is the run's own.
A checkpoint that cannot be read again as it was just written is an error at once.
"""

import contextlib
import hashlib
import json
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
from dnntk.runs.folder import parsed
from dnntk.runtime import processes

CHECKSUMS = "checksums.json"
# Larger arrays are written and read in pieces of so many bytes, and with them go files of twice as
# many, which is what orbax holds in memory before it writes.
_PIECE = 1 << 26
# Of the list of files, in bytes; and of arrays for each byte in files where no shapes are known.
_MOST_CHECKSUMS, _MOST_EXPANSION, _CHUNK = 1 << 22, 1000, 1 << 20
# What writing takes in memory beside the state, and keeps for the next time, for each of its bytes
# and at most: pieces on their way into files. Measured on 20 to 1,400 MB (BUILD_NOTES.md).
_MEMORY_A_BYTE, _MOST_MEMORY = 1.5, 950_000_000
# Where Linux shows a process its open files, folders among them.
_OPEN_FILES = Path("/proc/self/fd")
# orbax looks for its files by a pattern with the folder's path in it; tensorstore takes a backslash
# for a slash.
_PATTERN = frozenset("*?[]\\")


def memory_to_write(state_bytes: int) -> int:
    """Bytes that writing a state of so many takes beside it, about."""
    return int(min(_MEMORY_A_BYTE * state_bytes, _MOST_MEMORY))


class Checkpoints:
    """The last ``keep`` states of a run under ``folder``; a context manager.

    States are pytrees of arrays, kept on the host's side, so that a run may go on with another
    number of devices.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Open ``folder``, making it where it is missing.

        Raises:
            InputError: orbax cannot work with its name.
        """
        # Of several processes the first one writes; each reads by itself.
        alone = ocp.options.MultiprocessingOptions()
        if processes.is_multiprocess():
            own = jax.process_index()
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
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"workdir: expected a folder that can be made, got {folder} ({error.strerror})"
                ) from None
        processes.barrier("checkpoints")
        self._folder = folder.absolute()
        self._resources = contextlib.ExitStack()
        self._place = self._resources.enter_context(_plainly_named(self._folder))
        handler = ocp.PyTreeCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._place, options=options, item_handlers=handler)
        self._resources.callback(self._manager.close)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder."""
        self._resources.close()

    def save(self, step: int, state: Any) -> None:
        """Write ``state`` under ``step``; a state already kept under it stays.

        Of several processes all must call it.

        Raises:
            InputError: there is no room for it, or it cannot be read again; those already kept
                stay.
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
            with _threads_held_back():
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
        """The first line of what orbax says, about the folder as the user knows it."""
        line = str(error).strip().partition("\n")[0]
        return line.replace(str(self._place), str(self._folder))[:160]

    def _discard(self, step: int) -> None:
        with contextlib.suppress(Exception):
            self._manager.delete(step)

    def _check_readable(self, step: int, state: Any) -> None:
        """By the way that restores it: all shapes, and the values of the smallest array.

        The checksums have read the files themselves.
        """
        self._check_shapes(step, state)
        leaves, tree = jax.tree.flatten(state)
        place = min(range(len(leaves)), key=lambda i: leaves[i].nbytes)
        like = [ocp.PLACEHOLDER] * len(leaves)
        like[place] = jax.ShapeDtypeStruct(leaves[place].shape, leaves[place].dtype)
        like = jax.tree.unflatten(tree, like)
        read = jax.tree.leaves(self._manager.restore(step, args=_as_numpy(like, like)))[place]
        if not np.array_equal(read, leaves[place], equal_nan=True):
            raise ValueError(f"step {step} has other values than were written")

    def newest(self) -> Any:
        """The newest state, NumPy arrays in plain containers, None for an empty one; or None.

        Raises:
            InputError: it is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        size = self._verified(step)
        claimed = jax.tree.leaves(self._manager.item_metadata(step).tree)
        expected = sum(np.dtype(a.dtype).itemsize * math.prod(a.shape) for a in claimed)
        if expected > _MOST_EXPANSION * size:
            raise InputError(f"{self._folder}: {size} bytes at step {step} claim {expected}")
        return self._manager.restore(step, args=_as_numpy(self._manager.item_metadata(step).tree))

    def kept(self) -> bool:
        """Is there a checkpoint, intact or damaged, that was written to its end?"""
        return any(_is_file(self._folder / str(s) / CHECKSUMS) for s in self._manager.all_steps())

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest intact checkpoint, or None where there is none.

        ``like`` may hold shapes alone (`jax.ShapeDtypeStruct`).

        Raises:
            InputError: checkpoints exist and not one of them can be read as ``like``.
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
        if unfinished == steps:  # killed in the middle of its first one: nothing is lost
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
        """Bytes of a checkpoint whose files are those that were written."""
        folder = self._folder / str(step)
        list_of_files = folder / CHECKSUMS
        if not _is_file(list_of_files) or list_of_files.stat().st_size > _MOST_CHECKSUMS:
            raise _CutShort(f"step {step} was cut short: it has no {CHECKSUMS}")
        try:
            claimed = parsed(list_of_files.read_bytes())
        except ValueError:
            claimed = None
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
        if not isinstance(claimed, dict) or found - {CHECKSUMS} != set(claimed):
            raise InputError(f"step {step} has other files than were written")
        total = 0
        for name, entry in claimed.items():
            file = folder / name
            size = file.stat().st_size if _is_file(file) else -1
            # By size first: a file may have grown.
            sized = isinstance(entry, dict) and entry.get("bytes") == size >= 0
            if not sized or entry.get("sha256") != _sha(file):
                raise InputError(f"step {step}: {name} is damaged")
            total += size
        return total

    def _check_shapes(self, step: int, template: Any) -> None:
        if _shapes(self._manager.item_metadata(step).tree) != _shapes(template):
            raise InputError(f"step {step} is of another network")


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """A name of ``folder`` that is its own whatever characters its path has.

    Raises:
        InputError: the system gives none, and the path would be taken for another.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        place = _OPEN_FILES / str(descriptor)
        if not place.is_dir():
            place = folder
            if found := _PATTERN & set(str(folder)):
                raise InputError(
                    f"workdir: expected a path without {' '.join(sorted(found))}, got {folder}; "
                    "choose another"
                )
        yield place
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _threads_held_back() -> Iterator[None]:
    """What fails in a thread is reported afterwards, unless the block raises it: once is enough."""
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
    """A checkpoint whose writing did not come to its end."""


def _write_checksums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    found = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha(p)} for p in files
    }
    partial = folder / f".{CHECKSUMS}.partial"
    with partial.open("w") as stream:
        stream.write(json.dumps(found, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / CHECKSUMS)


def _sha(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_file(path: Path) -> bool:
    """Is it a file of its own: no link out of the folder, no pipe that would be waited for?"""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _in_pieces(state: Any) -> ocp.args.PyTreeSave:
    """How to write ``state`` without a second copy of it in memory."""
    cpu = jax.local_devices(backend="cpu")[0]

    def shared(a: Any) -> Any:
        # Of NumPy arrays orbax makes copies of its own; a small one's is no matter.
        if a.nbytes <= _PIECE or jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype:
            return a
        return jax.device_put(a, cpu, may_alias=True)

    return ocp.args.PyTreeSave(
        jax.tree.map(shared, state),
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), state),
        ocdbt_target_data_file_size=2 * _PIECE,
    )


def _as_numpy(arrays: Any, like: Any = None) -> ocp.args.PyTreeRestore:
    """How to read ``arrays``, in containers ``like`` those of a state or in plain ones."""
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
    return ocp.args.PyTreeRestore(like, restore_args=wanted)


def _without_empty(state: Any) -> Any:
    """None for empty arrays, which orbax refuses: the middle of a network of two layers."""
    return jax.tree.map(lambda a: a if a.size else None, state)


def _or_empty(like: Any, read: Any) -> Any:
    """What was read, or in place of `_without_empty`'s None the empty array that it stands for."""
    return np.zeros(like.shape, like.dtype) if read is None else read


def _shapes(state: Any) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """By the way to each array, whatever the containers on it are."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(a.shape), np.dtype(a.dtype))
        for path, a in jax.tree_util.tree_flatten_with_path(state)[0]
    }
