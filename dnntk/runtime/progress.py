"""The progress bars of everything that takes long.

A bar is drawn on standard error. Where there is none (closed, or ``sys.stderr = None``) nothing is
drawn, and one that fails later (its reader has gone) ends the bar alone, never the work.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any
) -> tqdm:
    """A progress bar on standard error.

    Args:
        iterable: what to go through; without it the caller calls ``update``.
        disable: draw nothing.
        **options: of `tqdm.tqdm`, as total, desc, unit, initial and delay.

    Returns:
        The bar: an iterator over ``iterable``, and a context manager.
    """
    stream = sys.stderr
    missing = stream is None or getattr(stream, "closed", False)
    file = None if missing else SafeStream(stream)
    return tqdm(iterable, disable=disable or missing, file=file, dynamic_ncols=True, **options)


class SafeStream:
    """A text stream that is written to until it fails for the first time."""

    def __init__(self, stream: Any) -> None:
        """Write to ``stream``."""
        self._stream, self._failed = stream, False

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)  # encoding, fileno

    def write(self, text: str) -> None:
        """Write, unless that has failed before."""
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
