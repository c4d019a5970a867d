"""A run's log lines, printed if logging is not set up, as in a notebook."""

import contextlib
import logging
import threading
from collections.abc import Iterator

__all__ = ["printed_lines"]

_LOGGER = logging.getLogger("dnntk")


class _Printed(logging.Filter):
    """Prints records below the user's own log level, and keeps them from handlers."""

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._blocks, self._found = threading.Lock(), 0, logging.NOTSET
        self._level = logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._level:
            return True
        with contextlib.suppress(OSError, ValueError):  # stdout is closed, or cannot encode it
            print(record.getMessage(), flush=True)
        return False

    def begin(self) -> bool:
        """Begin to print, unless a handler takes the lines; returns whether it prints."""
        with self._lock:
            if not self._blocks:
                if _LOGGER.isEnabledFor(logging.INFO) and _LOGGER.hasHandlers():
                    return False
                self._found = _LOGGER.level
                self._level = max(_LOGGER.getEffectiveLevel(), logging.INFO + 1)
                _LOGGER.addFilter(self)
                _LOGGER.setLevel(logging.INFO)
            self._blocks += 1
            return True

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                _LOGGER.removeFilter(self)
                _LOGGER.setLevel(self._found)


_PRINTED = _Printed()


@contextlib.contextmanager
def printed_lines(wanted: bool) -> Iterator[None]:
    """Within the block, print records of level INFO, unless a logging handler takes them.

    Logging's settings are restored afterwards. Warnings go where logging sends them: to standard
    error if it is not set up. Several threads may be in such blocks at the same time.
    """
    printing = wanted and _PRINTED.begin()
    try:
        yield
    finally:
        if printing:
            _PRINTED.end()
