"""Where examples, parameters and an optimizer's state lie: batches over devices, all else on each.

A batch is split over the mesh's axis ``data``. Every device holds all parameters, unless the axis
``depth`` splits the middle layers into stages (`dnntk.training.pipeline`). On CPU, networks that
the CPU library takes run on one device with a thread a core; for other narrow ones, one host device
a core is about twice as fast as threads inside each tiny product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dnntk.runtime import processes
from dnntk.runtime.devices import on_cpu
from dnntk.training import pipeline
from dnntk.training.pipeline import DATA

__all__ = [
    "Batch",
    "data_mesh",
    "mini_batches",
    "put_batch",
    "put_replicated",
    "put_state",
    "shardings",
]

# Below this many examples a device, the per-layer overhead costs more than a second device saves.
MIN_EXAMPLES_PER_DEVICE = 32
# On CPU every host device would hold its own copy of the parameters, the gradient and the rest.
MAX_REPLICATED_BYTES = 1 << 28


class Batch(NamedTuple):
    """Examples split over devices; ``weight`` [n] is 1 for an example and 0 for padding."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array


def data_mesh(examples: int, parameter_bytes: int, threaded: bool = False) -> Mesh:
    """A one-axis mesh ``data`` over as many devices as ``examples`` can keep busy.

    Over one where ``threaded``: a device that uses all cores by itself, as the CPU library does.
    Over all of them where there are several processes.
    """
    devices = jax.devices()
    count = max(1, min(len(devices), examples // MIN_EXAMPLES_PER_DEVICE))
    if processes.is_multiprocess():
        count = len(devices)
    elif threaded or (on_cpu() and parameter_bytes > MAX_REPLICATED_BYTES):
        count = 1
    return Mesh(np.array(devices[:count]), (DATA,))


def put_batch(x: np.ndarray, y: np.ndarray, mesh: Mesh) -> Batch:
    """Pad to a multiple of the devices and their micro-batches, then split over ``data``."""
    shards = mesh.shape[DATA]
    parts = pipeline.microbatches(-(-len(x) // shards), pipeline.stages_of(mesh))
    extra = -len(x) % (shards * (parts if pipeline.stages_of(mesh) > 1 else 1))
    weight = np.pad(np.ones(len(x), y.dtype), (0, extra))
    padded = (np.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)), mode="edge") for a in (x, y))
    return Batch(*processes.device_put((*padded, weight), NamedSharding(mesh, P(DATA))))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """``tree`` on every device of ``mesh``; it may share memory with what it was made of."""
    return processes.device_put(tree, NamedSharding(mesh, P()))


def put_state(tree: Any, mesh: Mesh) -> Any:
    """Variables or an optimizer's state, laid out as the steps on ``mesh`` want it.

    Everything on every device, but for the middle layers where the mesh has an axis ``depth``:
    `pipeline.padded`, over its stages.
    """
    return processes.device_put(pipeline.padded(tree, mesh), shardings(tree, mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Those of `put_state`; ``tree`` may hold shapes alone."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), pipeline.specs(tree, mesh))


def mini_batches(
    examples: int, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Indices of the mini-batch of each step from ``first_step`` on, reshuffled every epoch.

    A step's batch depends on (seed, step) alone, so a resumed run sees what it would have seen. An
    epoch leaves out the examples % batch_size last ones of its own order.
    """
    steps_per_epoch = examples // batch_size
    step = first_step
    while True:
        epoch, offset = divmod(step, steps_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(examples)
        for position in range(offset, steps_per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
            step += 1
