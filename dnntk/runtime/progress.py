"""Progress bars on standard error, and durations in words.

If standard error is closed or None, nothing is drawn; if writing to it fails later (its reader has
gone), only the bar ends, never the work.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

__all__ = ["SafeStream", "duration", "progress_bar"]


def progress_bar(
    iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any
) -> tqdm:
    """A progress bar on standard error.

    Args:
        iterable: the items to iterate over; without it the caller calls ``update``.
        disable: draw nothing.
        **options: options of `tqdm.tqdm`, such as total, desc, unit, initial and delay.

    Returns:
        The bar: an iterator over ``iterable``, and a context manager.
    """
    stream = sys.stderr
    missing = stream is None or getattr(stream, "closed", False)
    file = None if missing else SafeStream(stream)
    return tqdm(iterable, disable=disable or missing, file=file, dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    """``90 s``, ``2 min`` or ``2.5 days``: in the largest unit of which there are two."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


class SafeStream:
    """A text stream that ignores everything after its first failure."""

    def __init__(self, stream: Any) -> None:
        """Write to ``stream``."""
        self._stream, self._failed = stream, False

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the stream."""
        return getattr(self._stream, name)  # encoding, fileno

    def write(self, text: str) -> None:
        """Write, unless the stream has failed before."""
        self._try("write", text)

    def flush(self) -> None:
        """As `write`."""
        self._try("flush")

    def _try(self, method: str, *text: str) -> None:
        if not self._failed:
            try:
                getattr(self._stream, method)(*text)
            except Exception:  # a stream of the user's may raise anything
                self._failed = True
