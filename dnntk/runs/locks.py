"""One run at a time in a folder: a second is told who is at work; a dead one holds nothing."""

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dnntk.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks: nothing is refused
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class FolderLock:
    """This process's hold on a folder, for as long as the object lives.

    The system releases it when the process ends, however that may be. What the process itself
    claims again is shared: in a notebook, a run that failed is held by its traceback.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()) -> None:
        """Hold ``folder``, which exists.

        Args:
            folder: to be held.
            made: folders that were made for it, itself first; those that are empty when it is
                released go again.

        Raises:
            InputError: another process holds it, or no file can be written there.
        """
        self._file, self._made = folder.resolve() / LOCK, [f.absolute() for f in made]
        if _claims.lists:
            _claims.lists[-1].append(self)
        self._held = False
        with _guard:
            if self._file not in _streams:
                _streams[self._file] = [_locked(self._file), 0]
            _streams[self._file][1] += 1
            self._held = True

    def release(self) -> None:
        """Let go; the last of this process's holds frees the folder."""
        with _guard:
            if not self._held or self._file not in _streams:
                return
            self._held = False
            entry = _streams[self._file]
            entry[1] -= 1
            if entry[1] == 0:
                del _streams[self._file]
                # While it is still locked: whoever opens it from now on makes another.
                with contextlib.suppress(OSError):
                    self._file.unlink()
                entry[0].close()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def __del__(self) -> None:
        """As `release`."""
        self.release()


class _Claims(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[FolderLock]] = []


_claims = _Claims()


class freeing_folders(contextlib.ContextDecorator):  # noqa: N801
    """As a decorator of what runs an experiment: what it has claimed is free when it ends."""

    def __enter__(self) -> None:
        """Begin a list of claims."""
        _claims.lists.append([])

    def __exit__(self, *_: object) -> None:
        """Release those on it."""
        for lock in _claims.lists.pop():
            lock.release()


# Of this process, by lock file: [the open file, how many hold it].
_streams: dict[Path, list[Any]] = {}
_guard = threading.RLock()


def _forget() -> None:
    """In a fork, which holds nothing: the locks are its parent's."""
    global _guard
    _guard = threading.RLock()
    for stream, _ in _streams.values():
        stream.close()
    _streams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _locked(file: Path) -> TextIO:
    while True:
        try:
            stream = file.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"workdir: expected a folder that can be written to, got {file.parent} "
                f"({error.strerror})"
            ) from None
        if fcntl is None:
            return stream
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read(200).strip() or "another process"
            stream.close()
            raise InputError(
                f"workdir: expected one that no run is using, {file.parent} is used by {holder}; "
                "wait for it to end, or choose another"
            ) from None
        except OSError:  # a file system without locks
            return stream
        # The one that was opened may have been removed by its holder meanwhile.
        with contextlib.suppress(OSError):
            if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                stream.flush()
                return stream
        stream.close()
