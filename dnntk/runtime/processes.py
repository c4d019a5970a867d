"""Several processes, on one machine or many, that train as one.

`jax.distributed` joins them. They agree on what each alone would decide by its own clock or its own
signals, and the first one writes.
"""

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dnntk.errors import InputError

# A process that is not heard of for so long is gone, and the job with it.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 120


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several, before anything else is asked of JAX.

    Args:
        coordinator: host:port of the first process; None is what the cluster's environment says
            (SLURM, Open MPI and others, as JAX finds them).
        processes: how many there are; None likewise.
        process: which of them this is, from 0 on; None likewise.

    Raises:
        InputError: they do not find together.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise InputError(f"coordinator: expected host:port like 10.0.0.1:7000, got {coordinator!r}")
    if processes is not None and not 0 <= (process or 0) < processes:
        raise InputError(f"process: expected a number from 0 to {processes - 1}, got {process}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"coordinator: expected {processes or 'the'} processes to meet at "
            f"{coordinator or 'what the environment names'} ({str(error).splitlines()[0]:.120})"
        ) from None


def several() -> bool:
    """Is this process one of several?"""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Is it the one that writes?"""
    return not several() or jax.process_index() == 0


def agreed(value: int) -> int:
    """The first process's value, in all of them."""
    if not several():
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_of(flag: bool) -> bool:
    """Is it so in one process or more?"""
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag)))) if several() else flag


def wait(name: str) -> None:
    """Until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def summed(values: np.ndarray) -> np.ndarray:
    """The sum of all processes' float64 arrays, in the order of their numbers: to the bit alike."""
    if not several():
        return values
    with jax.enable_x64(True):
        return np.asarray(multihost_utils.process_allgather(values)).sum(0)


class Rows:
    """The rows that this process has of a long float64 array, in the order of the processes.

    All processes must call the methods, in the same order. Of one process, it has all of them and
    nothing is copied.

    Attributes:
        total: rows of the whole array.
        start, stop: of this process's rows.
    """

    def __init__(self, total: int) -> None:
        """Split ``total`` rows evenly."""
        self.total = total
        self._each = -(-total // count())  # the last processes may have fewer, or none
        self.start, self.stop = (min((number() + k) * self._each, total) for k in (0, 1))

    def of(self, whole: np.ndarray) -> np.ndarray:
        """This process's rows of an array [total, c] that it has the whole of."""
        return whole[self.start : self.stop]

    def gathered(self, own: np.ndarray) -> np.ndarray:
        """The whole array [total, c], of everyone's rows."""
        if not several():
            return own
        padded = np.pad(own, ((0, self._each - len(own)), (0, 0)))
        with jax.enable_x64(True):
            return np.asarray(multihost_utils.process_allgather(padded, tiled=True))[: self.total]

    def of_sum(self, whole: np.ndarray) -> np.ndarray:
        """This process's rows of the sum of all processes' arrays [total, c].

        Added in the order of the processes, as `summed` does; the other rows do not come here.
        """
        if not several():
            return whole
        padded = np.pad(whole, ((0, self._each * count() - self.total), (0, 0)))
        parts = padded.reshape(1, count(), self._each, -1)
        with jax.enable_x64(True):
            placed = jax.make_array_from_process_local_data(
                NamedSharding(_one_device_each(), P("process")), parts
            )
            received = np.asarray(_exchange()(placed).addressable_data(0))
        return received[:, 0].sum(0)[: self.stop - self.start]


@functools.cache
def _one_device_each() -> Mesh:
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([first[process] for process in range(count())]), ("process",))


@functools.cache
def _exchange() -> Any:
    """[from, to, ...], split over senders -> the same, split over receivers."""
    swap = lambda parts: jax.lax.all_to_all(parts, "process", 1, 0)  # noqa: E731
    specs = P("process"), P(None, "process")
    return jax.jit(
        jax.shard_map(swap, mesh=_one_device_each(), in_specs=specs[0], out_specs=specs[1])
    )


def number() -> int:
    """Which of `count` processes this one is."""
    return jax.process_index() if several() else 0


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if several() else 1


def whole(tree: Any) -> Any:
    """As NumPy arrays; of arrays that are split over processes, all of each in every process."""

    def array(a: Any) -> np.ndarray:
        if not isinstance(a, jax.Array) or a.is_fully_addressable:
            return np.asarray(a)
        if a.is_fully_replicated:
            return np.asarray(a.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(array, tree)


def placed(tree: Any, shardings: Any) -> Any:
    """As `jax.device_put`; over several processes, each gives its own devices their part."""
    if not several():
        return jax.device_put(tree, shardings)

    def put(a: Any, sharding: Any) -> jax.Array:
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        host = whole(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda a: put(a, shardings), tree)
    return jax.tree.map(put, tree, shardings)
