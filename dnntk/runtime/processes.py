"""Several processes, on one machine or many, that train as one.

`jax.distributed` joins the processes. What one process would decide by its clock or its signals,
they decide together; the primary process, number 0, writes the files. All functions work in a
single process too, where they communicate nothing.
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

__all__ = [
    *("Rows", "all_reduce", "any_process", "barrier", "broadcast", "count", "device_put", "index"),
    *("is_multiprocess", "is_primary", "join", "to_host"),
]

# A process without a heartbeat for this long is dead, and its job ends.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 120


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several; call it before JAX is used.

    Args:
        coordinator: host:port of process 0; None takes all three from the cluster's environment
            (SLURM, Open MPI and others that JAX knows).
        processes: their number.
        process: the index of this one, from 0 on.

    Raises:
        InputError: the arguments are wrong, or the processes cannot connect.
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


def is_multiprocess() -> bool:
    """Is this process one of several?"""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
    """Is this the process that writes?"""
    return index() == 0


def index() -> int:
    """The number of this process, from 0 to `count` - 1."""
    return jax.process_index() if is_multiprocess() else 0


def count() -> int:
    """The number of processes."""
    return jax.process_count() if is_multiprocess() else 1


def broadcast(value: int) -> int:
    """The primary process's value, in every process."""
    if not is_multiprocess():
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(flag: bool) -> bool:
    """Is the flag true in at least one process?"""
    if not is_multiprocess():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def barrier(name: str) -> None:
    """Wait until every process calls the barrier of this name."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


def all_reduce(values: np.ndarray) -> np.ndarray:
    """Sum of every process's float64 array.

    Added in process order, so that all processes get identical bits.
    """
    if not is_multiprocess():
        return values
    with jax.enable_x64(True):
        return np.asarray(multihost_utils.process_allgather(values)).sum(0)


class Rows:
    """How the rows of a long float64 array are split over the processes, in process order.

    The collective methods must be called by all processes, in the same order. A single process
    holds all rows, and nothing is copied.

    Attributes:
        total: rows of the whole array.
        start, stop: range of this process's rows.
    """

    def __init__(self, total: int) -> None:
        """Split ``total`` rows evenly."""
        self.total = total
        self._each = -(-total // count())  # the last processes may have fewer, or none
        self.start, self.stop = (min((index() + k) * self._each, total) for k in (0, 1))

    def local(self, whole: np.ndarray) -> np.ndarray:
        """This process's rows of an array [total, c] that every process holds whole."""
        return whole[self.start : self.stop]

    def all_gather(self, own: np.ndarray) -> np.ndarray:
        """The whole array [total, c], from every process's own rows."""
        if not is_multiprocess():
            return own
        padded = np.pad(own, ((0, self._each - len(own)), (0, 0)))
        with jax.enable_x64(True):
            return np.asarray(multihost_utils.process_allgather(padded, tiled=True))[: self.total]

    def reduce_scatter(self, whole: np.ndarray) -> np.ndarray:
        """This process's rows of the sum of every process's array [total, c].

        Added in process order, as in `all_reduce`; only the process's own rows are received.
        """
        if not is_multiprocess():
            return whole
        padded = np.pad(whole, ((0, self._each * count() - self.total), (0, 0)))
        parts = padded.reshape(1, count(), self._each, -1)
        with jax.enable_x64(True):
            split = jax.make_array_from_process_local_data(
                NamedSharding(_one_device_each(), P("process")), parts
            )
            received = np.asarray(_exchange()(split).addressable_data(0))
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


def to_host(tree: Any) -> Any:
    """NumPy arrays; every process gets the whole of an array that is split over processes."""

    def array(a: Any) -> np.ndarray:
        if not isinstance(a, jax.Array) or a.is_fully_addressable:
            return np.asarray(a)
        if a.is_fully_replicated:
            return np.asarray(a.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(array, tree)


def device_put(tree: Any, shardings: Any) -> Any:
    """As `jax.device_put`; each of several processes fills its own devices' shards."""
    if not is_multiprocess():
        return jax.device_put(tree, shardings)

    def put(a: Any, sharding: Any) -> jax.Array:
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        host = to_host(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda a: put(a, shardings), tree)
    return jax.tree.map(put, tree, shardings)
