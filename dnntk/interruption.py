"""SIGTERM between two steps: a scheduler that takes a machine back gives a few seconds' notice."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """In its block SIGTERM is noted; what it gives tells whether one has come.

    Outside of the main thread, which alone receives signals, none ever does.
    """
    come = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield come.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        come.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield come.is_set
    finally:
        # None: a handler that was not set from Python cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
