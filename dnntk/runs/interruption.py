"""SIGTERM and Ctrl-C between two steps: the current step is finished and a checkpoint written.

A scheduler that takes a machine back gives a few seconds' notice by SIGTERM; a user sends SIGINT.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from dnntk.errors import Stopped

__all__ = ["raise_on_sigterm", "termination_flag"]

AGAIN_AFTER = 0.05  # seconds


def raise_on_sigterm(message: Callable[[], str]) -> None:
    """Have SIGTERM raise `Stopped` with this message, wherever the main thread is.

    A signal may come within a callback of Python's, as a weak reference's, whose exceptions are
    reported and ignored. A `Stopped` or KeyboardInterrupt that ends so is raised again soon after.
    """

    def stopped(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(message())

    def not_ignored(unraisable: Any) -> None:
        lost = unraisable.exc_value
        if not isinstance(lost, Stopped | KeyboardInterrupt) or not hasattr(signal, "setitimer"):
            report(unraisable)
            return

        def again(number: int, frame: FrameType | None) -> NoReturn:
            raise lost

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)

    report, sys.unraisablehook = sys.unraisablehook, not_ignored
    signal.signal(signal.SIGTERM, stopped)


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
