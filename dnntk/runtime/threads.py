"""NumPy's and SciPy's products on a thread pool of this package.

BLAS's own threads spin for some 20 ms after a product, and take a core from whatever comes next: a
product with 0.4 GB of tiles on two cores took 1.7 times as long right after one of BLAS's. Here a
product is split over threads that sleep between products, one a core, and BLAS uses only the
calling thread.
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

__all__ = ["by_rows", "cores", "on_cores", "one_blas_thread"]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block BLAS uses only the calling thread.

    BLAS has one number of threads for the whole process: of several threads in such blocks, the
    first to enter sets it, and the last to leave restores it.
    """
    _one.enter()
    try:
        yield
    finally:
        _one.leave()


class _OneThread:
    """The number of threads in `one_blas_thread`, and BLAS's earlier setting."""

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
        """Restore BLAS in a forked child, where the parent's other threads do not exist."""
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
    """``work`` on all ``items`` in parallel, one a core; ``work`` must not call this function."""
    with one_blas_thread():
        return list(_pool(os.getpid()).map(work, items))


def by_rows(m: int, work: Callable[[slice], Part]) -> list[Part]:
    """``work`` on each core's slice of ``m`` rows; results in the slices' order."""
    count = min(cores(), max(1, m // ROWS_A_CORE))
    ends = [m * i // count for i in range(count + 1)]
    return on_cores(work, [slice(*pair) for pair in zip(ends, ends[1:], strict=False)])


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The pool of one process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(cores(), f"products-{process}")


@cache
def _blas() -> ThreadpoolController:
    """NumPy's and SciPy's BLAS, found once: a search takes 5 ms."""
    assert scipy.linalg.blas
    return ThreadpoolController().select(user_api="blas")
