"""One run at a time in a folder: a second run is refused, with the name of the first one's process.

The lock is `flock` on a file in the folder. The system frees it when the process ends, kill -9
included, so that no leftover file ever blocks a run.
"""

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
except ImportError:  # a system without `flock`: no run is refused
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "FolderLock", "freeing_folders"]

LOCK = ".lock"


class FolderLock:
    """This process's lock on a folder, until `release` or the end of this object.

    Locks of one process on the same folder are shared: in a notebook, the traceback of a failed run
    keeps that run's lock alive while the next run starts.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()) -> None:
        """Lock ``folder``, which exists.

        Args:
            folder: the folder.
            made: folders that were made for the run, ``folder`` first; the empty ones are removed
                at the end.

        Raises:
            InputError: another process has the lock, or the folder cannot be written to.
        """
        self._file, self._made = folder.resolve() / LOCK, [f.absolute() for f in made]
        self._held = False
        if claims := _claims():
            claims[-1].append(self)
        with _guard:
            if self._file not in _streams:
                _streams[self._file] = [_locked(self._file), 0]
            _streams[self._file][1] += 1
            self._held = True

    def release(self) -> None:
        """Free the folder, unless this process has other locks on it."""
        with _guard:
            if not self._held or self._file not in _streams:
                return
            self._held = False
            entry = _streams[self._file]
            entry[1] -= 1
            if entry[1] == 0:
                del _streams[self._file]
                # Removed while locked: a process that opens the path later makes a new file.
                with contextlib.suppress(OSError):
                    self._file.unlink()
                entry[0].close()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def __del__(self) -> None:
        """As `release`."""
        self.release()


class freeing_folders(contextlib.ContextDecorator):  # noqa: N801
    """Release, at the end of the block, the locks that this thread took within it."""

    def __enter__(self) -> None:
        """Begin a list of locks."""
        _claims().append([])

    def __exit__(self, *_: object) -> None:
        """Release the locks of this block."""
        for lock in _claims().pop():
            lock.release()


_local = threading.local()
# {lock file: [open file, number of this process's locks on it]}.
_streams: dict[Path, list[Any]] = {}
_guard = threading.RLock()


def _claims() -> list[list[FolderLock]]:
    """This thread's lists of locks, one for each `freeing_folders` that it is in."""
    return _local.__dict__.setdefault("claims", [])


def _forget() -> None:
    """Forget the parent's locks in a forked child, which does not have them."""
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
        # The file's owner may have removed it between the opening and the locking.
        with contextlib.suppress(OSError):
            if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                stream.flush()
                return stream
        stream.close()
