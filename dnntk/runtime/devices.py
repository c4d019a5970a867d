"""Calls of one function that do not need each other, shared by this process's devices.

JAX runs a call on its default device alone, and returns before the call has ended. So calls go to
the devices in turn, a few ahead of what is asked for; the results come back in order, and whoever
adds them adds the same numbers in the same order however many devices there are.

Every device has the function compiled for itself. That takes seconds, of one core: as many devices
join as the work is worth.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

AHEAD = 2  # calls a device: one runs while the next waits for it
COMPILING = 0.5  # seconds, at least; a first call that finds itself compiled does not tell
HOST_SHARE = 0.2  # of a call on a host device; the rest keeps all cores busy by itself

Begun = TypeVar("Begun")
Done = TypeVar("Done")


class Devices:
    """The local devices, and what a function costs on them.

    A default device that the user has set (``jax.default_device``) stays the only one.
    """

    def __init__(self) -> None:
        """Nothing is known yet of the function."""
        self.used = 1
        self._compiling = COMPILING
        self._calls = 0

    def map(
        self,
        begin: Callable[[int], Begun],
        finish: Callable[[int, Begun], Done],
        count: int,
    ) -> Iterator[Done]:
        """finish(i, begin(i)) for i < count, in order.

        Args:
            begin: called from this thread, with a device of its own as JAX's default; the arrays
                that it makes of host arrays lie there. What it returns need not be there yet.
            finish: waits for that. Where there are several devices a thread calls it, so that it
                may use NumPy, but no setting of JAX's.
            count: number of calls.
        """
        devices, done = _devices(), 0
        if len(devices) > 1:
            while done < min(count, 2):  # the first tells what compiling takes, the second a call
                started = time.perf_counter()
                begun = begin(done)
                if done == 0:
                    self._compiling = max(self._compiling, time.perf_counter() - started)
                result = finish(done, begun)
                seconds = time.perf_counter() - started
                done += 1
                yield result
            if done < count:
                # What was done before will be done again: a matrix that is computed for every
                # product.
                work = seconds * (self._calls + count - done)
                if on_cpu():
                    work *= HOST_SHARE
                self.used = max(self.used, worth(work, self._compiling, len(devices)))
                self._calls += count
        if self.used == 1:
            for i in range(done, count):
                yield finish(i, begin(i))
            return
        ahead: deque[Future[Done]] = deque()
        with ThreadPoolExecutor(self.used) as pool:
            for i in range(done, count):
                with jax.default_device(devices[i % self.used]):
                    ahead.append(pool.submit(finish, i, begin(i)))
                if len(ahead) == AHEAD * self.used:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def on_cpu() -> bool:
    """Is the CPU JAX's default backend?"""
    return jax.default_backend() == "cpu"


def worth(work: float, compiling: float, most: int) -> int:
    """How many devices are soonest done with ``work`` seconds of one, each compiled for in turn.

    m of them take work / m + m compiling: least at m = sqrt(work / compiling).
    """
    return max(1, min(most, math.isqrt(int(work / compiling))))


def _devices() -> list[jax.Device]:
    chosen = jax.config.values["jax_default_device"]
    return jax.local_devices() if chosen is None else [chosen]
