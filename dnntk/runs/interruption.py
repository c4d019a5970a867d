"""SIGTERM and Ctrl-C between two steps: the current step is finished and a checkpoint written.

A scheduler that takes a machine back gives a few seconds' notice by SIGTERM; a user sends SIGINT.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["termination_flag"]


@contextlib.contextmanager
def termination_flag() -> Iterator[Callable[[], int]]:
    """Within the block SIGTERM and a first SIGINT only set a flag.

    A second SIGINT ends a script at once, even within a step, and raises KeyboardInterrupt in an
    interactive session. Only the main thread receives signals: in other threads the flag is never
    set.

    Yields:
        A function that returns the number of the first signal that came, 0 if none did.
    """
    received: list[int] = []
    termination_requested = lambda: received[0] if received else 0  # noqa: E731
    if threading.current_thread() is not threading.main_thread():
        yield termination_requested
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number] if hasattr(sys, "ps1") else signal.SIG_DFL)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in background jobs
        numbers.append(signal.SIGINT)
    # None: a handler that was not set from Python cannot be restored.
    before: dict[int, Any] = {n: signal.getsignal(n) or signal.SIG_DFL for n in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield termination_requested
    finally:
        for number in numbers:
            signal.signal(number, before[number])
