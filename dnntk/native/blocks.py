"""How a call of the CPU library is split: blocks of examples, segments of layers, matrix products.

Layers of up to `WIDE_UNITS` units take a few examples at a time through all layers and back, which
stay in a core's own cache. Wider layers of an MLP are matrix products, whole batches at a time.
"""

import math
import os
from typing import Any, NamedTuple

from dnntk.native import build
from dnntk.networks.models import DeepNarrow

__all__ = ["THREAD_STATE_BYTES", "Blocks", "CpuBudget", "is_wide", "threads"]

# From here on a dense layer is three matrix products, and not a few examples' vectors.
WIDE_UNITS = 128
# A narrower one too, if it has at least so many weights for every example: preparing them, and
# summing their gradients over SIMD lanes, then costs as much as the products. Not in deeper
# networks: only vectors compensate the rounding of sums over layers.
WEIGHTS_PER_EXAMPLE, MATRIX_PRODUCT_LAYERS = 14, 10_000
# Bytes of states that wide layers keep for every byte of their parameters, and at least.
STATE_BYTES_PER_PARAMETER_BYTE, LEAST_STATE_BYTES = 0.36, 128 << 20
# Bytes of a state after the library has packed it, for every byte before: 0.34 to 0.57 in training.
PACKED_SHARE = 0.5
# Bytes of states that a thread may keep: more than its part of the cache is slower than computing
# them again. Beyond, segments of sqrt(depth) layers are recomputed.
THREAD_STATE_BYTES = 8 << 20

# Bytes of a vector of examples, as the library counts them.
VECTOR_BYTES = 64
# Bytes of a block's state that stays in a core's own cache, together with the layer's others.
DENSE_BLOCK_BYTES, IMAGE_BLOCK_BYTES = 128 << 10, 96 << 10
# Wide layers between two barriers on the way down, and the bytes of their states, at most.
GROUP_LAYERS, GROUP_BYTES = 64, 1 << 20
# States of the whole batch that wide layers need beside those kept, at most: two constants, sums, q
# twice for each of the two ways, g three times and derivatives twice.
WIDE_STATES = 12


def threads(devices: int) -> int:
    """How many threads each of ``devices`` devices has that work on this machine at once."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, cores // devices)


class CpuBudget(NamedTuple):
    """What of this machine a call may take.

    Attributes:
        threads: at most.
        alone: does no other device of this machine work meanwhile? Then examples are split so that
            an even number of cores is busy.
        state_bytes: of states that a thread may keep.
    """

    threads: int
    alone: bool = True
    state_bytes: int = THREAD_STATE_BYTES

    @classmethod
    def of(cls, devices: int, state_bytes: int = THREAD_STATE_BYTES) -> "CpuBudget":
        """The budget of one of ``devices`` devices that work at the same time."""
        return cls(threads(devices), devices == 1, state_bytes)


def is_wide(layers: int, units: int, examples: int) -> bool:
    """Are dense layers matrix products, or a few examples' vectors?"""
    many_weights = units**2 >= WEIGHTS_PER_EXAMPLE * examples
    return units >= WIDE_UNITS or (many_weights and layers <= MATRIX_PRODUCT_LAYERS)


class Blocks(NamedTuple):
    """How a call splits examples and layers.

    It depends on shapes, on `CpuBudget.state_bytes` and on whether several devices share the
    machine, so that results do not change with the number of threads.

    Attributes:
        number: of blocks of examples that go up and down one by one; 0 for wide layers.
        segment: layers that are recomputed together on the way down.
        state_bytes: of a block's state; of the whole batch's for wide layers.
        kept: last layers, of wide ones, whose states are all kept; more where they take fewer
            bytes.
    """

    number: int
    segment: int
    state_bytes: int
    kept: int = 0

    @classmethod
    def of(
        cls,
        layers: int,
        units: int,
        positions: int,
        examples: int,
        itemsize: int,
        wide: bool,
        budget: CpuBudget,
    ) -> "Blocks":
        """For ``layers`` layers of ``units`` x ``positions`` numbers an example."""
        vectors = -(-examples * itemsize // VECTOR_BYTES)
        if wide:
            state = vectors * units * VECTOR_BYTES
            parameters = layers * units**2 * itemsize
            held = budget.state_bytes + STATE_BYTES_PER_PARAMETER_BYTE * parameters
            kept = min(layers, max(1, int(max(LEAST_STATE_BYTES, held) / state)))
            return cls(0, max(1, round(math.sqrt(layers - kept))), state, kept)
        vector_state = units * positions * VECTOR_BYTES
        if positions == 1:
            most = min(max(DENSE_BLOCK_BYTES // vector_state, 7), 64)
        else:
            # Images that go together share what it costs to prepare a layer.
            fit = IMAGE_BLOCK_BYTES // vector_state
            most = min(max(fit, 1), max(fit // 4, 2), 4)
        count = -(-vectors // most)
        if budget.alone and count % 2 and vectors > count:
            count += 1  # for an even number of cores
        state_bytes = -(-vectors // count) * vector_state
        # A multiple, so that where segments begin changes no bit.
        segment = -(-round(math.sqrt(layers)) // build.SETTLE_LAYERS) * build.SETTLE_LAYERS
        if (layers + 1) * state_bytes <= budget.state_bytes:
            segment = layers
        return cls(count, min(layers, segment), state_bytes)

    @classmethod
    def for_batch(cls, model: DeepNarrow, x: Any, budget: CpuBudget) -> "Blocks":
        """Those of ``model`` on inputs like ``x``."""
        positions = 1
        if x.ndim == 4:
            pool = getattr(model, "pool", 1)
            padding = getattr(model, "kernel_size", 1) // 2
            positions = x.shape[1] // pool * (x.shape[2] // pool + padding)
        units, layers = x.shape[-1] + 1 + model.d_out, model.depth - 2
        wide = x.ndim == 2 and is_wide(layers, units, len(x))
        return cls.of(layers, units, positions, len(x), x.dtype.itemsize, wide, budget)

    def group(self, layers: int) -> int:
        """Wide layers between two barriers on the way down: as many as fit a part of a cache."""
        return min(layers, GROUP_LAYERS, max(1, GROUP_BYTES // self.state_bytes))

    def recomputed(self, layers: int) -> int:
        """How many of ``layers`` layers are gone through twice on the way to a gradient.

        Of wide ones about as many: it depends on the states.
        """
        kept = self.segment if self.number else round(self.kept / PACKED_SHARE)
        return max(0, layers - kept)

    def scratch_bytes(self, layers: int, threads: int) -> int:
        """Bytes of states that ``threads`` threads keep, at most."""
        if not self.number:
            below = layers - self.kept
            packed = max(self.kept, min(self.segment, below)) * (1 + 1 / VECTOR_BYTES)
            states = math.ceil(packed) + 3 + -(-below // self.segment)
            return (states + WIDE_STATES + 4 * (self.group(layers) - 1)) * self.state_bytes
        states = self.segment + 1 + 2 * -(-layers // self.segment)
        return min(threads, self.number) * states * self.state_bytes
