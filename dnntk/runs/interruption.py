"""SIGTERM and Ctrl-C between two steps: what is under way is finished, and a checkpoint written.

A scheduler that takes a machine back gives a few seconds' notice by SIGTERM; a user sends SIGINT.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], int]]:
    """Within the block SIGTERM and a first SIGINT only set a flag.

    A second SIGINT does not wait: it ends a script at once, within a step too, and raises
    KeyboardInterrupt in an interactive session. Outside of the main thread, which alone receives
    signals, the flag is never set.

    Yields:
        A function that returns the number of the first signal that came, 0 if none did.
    """
    come: list[int] = []
    first = lambda: come[0] if come else 0  # noqa: E731
    if threading.current_thread() is not threading.main_thread():
        yield first
        return

    def note(number: int, frame: FrameType | None) -> None:
        come.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number] if hasattr(sys, "ps1") else signal.SIG_DFL)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        numbers.append(signal.SIGINT)
    # None: a handler that was not set from Python cannot be put back.
    before: dict[int, Any] = {n: signal.getsignal(n) or signal.SIG_DFL for n in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield first
    finally:
        for number in numbers:
            signal.signal(number, before[number])
