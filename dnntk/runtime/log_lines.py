"""The lines of a run's log, printed where logging is not set up: in a notebook."""

import contextlib
import logging
import threading
from collections.abc import Iterator

_LOGGER = logging.getLogger("dnntk")


class _Printed(logging.Filter):
    """Prints what lies below the level that logging was set to, and keeps it from handlers."""

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._blocks, self._found = threading.Lock(), 0, logging.NOTSET
        self._level = logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._level:
            return True
        with contextlib.suppress(OSError, ValueError):  # stdout is gone, or of another encoding
            print(record.getMessage(), flush=True)
        return False

    def begin(self) -> bool:
        """Whether lines are printed from now on, and not taken by a handler."""
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
    """Within the block, lines of level INFO are printed unless a handler of logging's takes them.

    Afterwards logging is as it was. Warnings go where logging sends them, which is standard error
    where it is not set up. Threads may be in such blocks together.
    """
    printing = wanted and _PRINTED.begin()
    try:
        yield
    finally:
        if printing:
            _PRINTED.end()
