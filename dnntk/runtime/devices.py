"""Independent calls of one function, shared by this process's devices.

Calls go to the devices in turn, and begin before their results are needed. The results come back in
order, so that sums over them do not depend on the number of devices.

The function is compiled for every device, which takes seconds of one core: only as many devices are
used as save more time than this costs.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

__all__ = ["AHEAD", "COMPILING", "HOST_FRACTION", "Devices", "on_cpu", "worth"]

AHEAD = 2  # begun calls a device: one runs, the next waits
COMPILING = 0.5  # least seconds to compile; a first call may find the function compiled
HOST_FRACTION = 0.2  # of a call's time on the CPU, in which it leaves other cores idle

Begun = TypeVar("Begun")
Done = TypeVar("Done")


class Devices:
    """The local devices, and the time that a function takes on them.

    If the user has set a default device (``jax.default_device``), only that one is used.
    """

    def __init__(self) -> None:
        """Begin with one device."""
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
            begin: called from this thread, with the call's device as JAX's default; may return
                before its results are computed.
            finish: waits for the results. With several devices it is called from another thread,
                where JAX's settings of this thread do not hold.
            count: number of calls.
        """
        devices, done = _devices(), 0
        if len(devices) > 1:
            while done < min(count, 2):  # the first measures compiling, the second a call
                started = time.perf_counter()
                begun = begin(done)
                if done == 0:
                    self._compiling = max(self._compiling, time.perf_counter() - started)
                result = finish(done, begun)
                seconds = time.perf_counter() - started
                done += 1
                yield result
            if done < count:
                # Count earlier calls too: a matrix that is not stored is computed again and again.
                work = seconds * (self._calls + count - done)
                if on_cpu():
                    work *= HOST_FRACTION
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
    """The number of devices that finish first with ``work`` seconds of one device's work.

    m devices, compiled for in turn, take work / m + m compiling: least at sqrt(work / compiling).
    """
    return max(1, min(most, math.isqrt(int(work / compiling))))


def _devices() -> list[jax.Device]:
    chosen = jax.config.values["jax_default_device"]
    return jax.local_devices() if chosen is None else [chosen]
