"""NumPy's and SciPy's products on threads of our own.

BLAS has a pool of threads for each of the two. Once woken they look out for more to do for some 20
ms, and meanwhile take a core from whatever comes next: a product with 0.4 GB of tiles on two cores
took 1.7 times as long right after one of BLAS's own. So what goes on in turns with such products
has threads that sleep meanwhile, a core each, and BLAS has the calling thread alone.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import scipy.linalg.blas
import threadpoolctl
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Part = TypeVar("Part")
ROWS_A_CORE = 1024  # at least


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context in which BLAS takes the calling thread alone, whichever thread that is.

    BLAS has one number of threads for the whole process. So of several threads in this context at
    the same time the first sets it, and the last restores what the first found.
    """
    _one.enter()
    try:
        yield
    finally:
        _one.leave()


class _OneThread:
    """How many threads are in `one_blas_thread`, and how to undo it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = _blas().limit(limits=1)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def forked(self) -> None:
        """None of a process's other threads is in its child, which has BLAS as they left it."""
        if self._inside:
            self._restore()
        self._lock, self._inside = threading.Lock(), 0

    def _restore(self) -> None:
        # In newer versions of threadpoolctl only the thread that set a limit can undo it.
        clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
        if clear:
            clear(force=True)
        self._limit.restore_original_limits()
        if clear:
            clear(force=True)


_one = _OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one.forked)


def on_cores(work: Callable[[Item], Part], items: Sequence[Item]) -> list[Part]:
    """``work`` on all ``items`` at the same time, one a core. Not from within itself."""
    with one_blas_thread():
        return list(_pool(os.getpid()).map(work, items))


def by_rows(m: int, work: Callable[[slice], Part]) -> list[Part]:
    """``work`` on each core's share of ``m`` rows, in their order."""
    shares = min(cores(), max(1, m // ROWS_A_CORE))
    ends = [m * share // shares for share in range(shares + 1)]
    return on_cores(work, [slice(*pair) for pair in zip(ends, ends[1:], strict=False)])


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of a process: a forked one has none of the threads of the first."""
    return ThreadPoolExecutor(cores(), f"products-{process}")


@cache
def _blas() -> ThreadpoolController:
    """Both, once they are loaded: to look for them takes 5 ms."""
    assert scipy.linalg.blas
    return ThreadpoolController().select(user_api="blas")
