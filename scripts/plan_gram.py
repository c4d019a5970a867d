r"""Plan kernel gradient flow on a cluster that is not at hand: memory, traffic and time, modelled.

python scripts/plan_gram.py
python scripts/plan_gram.py --examples=200000 --nodes=2 --iterations=312

The rates are public peak numbers of a node with eight H100s times the fractions below. None of them
was measured; the model `dnntk.infinite_depth.cost` was compared with runs on small machines.
"""

import dataclasses
import math

import command_line
from absl import flags

from dnntk.errors import InputError
from dnntk.infinite_depth.cost import Cost, Rates, Workload, cost
from dnntk.infinite_depth.prediction import CURVE_POINTS

FLAGS = flags.FLAGS

flags.DEFINE_integer("examples", 1_000_000, "Training examples.", lower_bound=1)
flags.DEFINE_integer("tests", 10_000, "Points to predict at.", lower_bound=0)
flags.DEFINE_integer("outputs", 10, "Number of outputs.", lower_bound=1)
flags.DEFINE_integer("features", 784, "Of an MLP's input.", lower_bound=1)
flags.DEFINE_integer("side", 7, "Of a CNN's image, one channel.", lower_bound=1)
flags.DEFINE_integer("iterations", 74, "Of the solver; predict.py --dry_run counts.", lower_bound=1)
flags.DEFINE_integer("block_size", 8192, "Examples along a tile's side.", lower_bound=1)
flags.DEFINE_integer("nodes", 8, "Number of nodes.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Node:
    """A node's peak rates per second, and the assumed fractions of these peaks.

    Attributes:
        devices: number of H100 SXM.
        operations: float64 operations of a device, without its tensor cores.
        device_bytes: bytes to and from a device's memory.
        device_memory: bytes of a device's memory.
        link_bytes: bytes to the host from a device, PCIe 5 x16.
        memory_bytes: bytes to and from the host's memory, 16 channels of DDR5-4800.
        memory: bytes of the host's memory.
        host_operations: float64 operations of 112 cores.
        network_bytes: bytes over the network, 400 Gb/s.
        computing, moving: assumed fractions of peak operations and of peak bytes.
        passes: passes over a tile in the host's memory until the tile is stored.
        call_seconds: seconds of Python and JAX per tile; measured here.
        upload_bytes: bytes of a tile's inputs that the tile's thread copies.
        columns: rows times vectors that are orthonormalized; measured here, on one core.
        eigh: rows cubed of eigendecompositions; measured here, on two cores.
    """

    devices: int = 8
    operations: float = 34e12
    device_bytes: float = 3.35e12
    device_memory: float = 80e9
    link_bytes: float = 64e9
    memory_bytes: float = 614e9
    memory: float = 2e12
    host_operations: float = 7e12
    network_bytes: float = 50e9
    computing: float = 0.3
    moving: float = 0.6
    passes: int = 4
    call_seconds: float = 5e-3
    upload_bytes: float = 10e9
    columns: float = 3e7
    eigh: float = 8e9


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tiles are, and how many processes a node has."""

    tiles: str  # host, device, or nowhere: recomputed
    processes: int


NAMES = {1: "MLP", 3: "CNN"}
LAYOUTS = [Layout(tiles, count) for tiles in ("host", "nowhere", "device") for count in (1, 8)]


def planned(workload: Workload, node: Node, layout: Layout) -> tuple[Workload, Cost]:
    """The workload and cost of each process in a cluster of nodes like ``node``.

    dnntk does not keep tiles on devices yet; the model lets each device read its own tiles.
    """
    count, kept = layout.processes, layout.tiles != "nowhere"
    workload = dataclasses.replace(workload, processes=workload.processes * count, stored=kept)
    moving, devices = node.moving / count, node.devices / count
    pixels = 1 if len(workload.shape) == 1 else (workload.shape[0] * workload.shape[1]) ** 2
    # Cosines, and functions of cosines, are written to the device's memory and read again.
    entry = max(
        workload.entry_operations / (node.operations * node.computing),
        pixels * 32 / (node.device_bytes * node.moving),
    )
    multiply = 16 / (
        node.device_bytes * node.moving
    )  # a tile is read for the rows and for the columns
    edge = 8 * workload.tile_entries**0.5
    inputs = 2 * edge * workload.example_size
    host = min(devices * node.link_bytes * node.moving, node.memory_bytes * moving / node.passes)
    on_device = layout.tiles == "device"
    rates = Rates(
        entries=devices / entry,
        recomputed=devices / (entry + multiply),
        product=devices * 8 / multiply if on_device else node.memory_bytes * moving,
        basis=node.memory_bytes * moving,
        columns=node.columns,
        eigh=node.eigh,
        matrix=node.host_operations * node.computing / count,
        network=node.network_bytes * moving,
        host=math.inf if on_device else host,
        tile_seconds=node.call_seconds + inputs / node.upload_bytes,
    )
    return workload, cost(workload, rates)


def row(workload: Workload, node: Node, layout: Layout) -> str:
    """A line of the table."""
    workload, found = planned(workload, node, layout)
    s, memory = found.seconds, dict(found.memory)
    tile_bytes = memory.pop("tiles") if layout.tiles == "device" else 0.0
    on_node = layout.processes * sum(memory.values())
    on_device = tile_bytes * layout.processes / node.devices
    full = on_node > node.memory or on_device > node.device_memory
    cells = (
        f"{NAMES[len(workload.shape)]:4} {layout.tiles:8} {workload.processes:9}",
        f"{on_node / 1e9:8.0f} {on_device / 1e9:9.1f}{'!' if full else ' '}",
        f"{found.traffic / 1e9:8.1f}",
        *(f"{s[stage]:8.4g}" for stage in ("kernel", "product", "network", "basis")),
        f"{s['eigenvectors']:8.3g} {s['prediction']:8.4g} {found.total_seconds:8.4g}",
        max(s, key=lambda stage: s[stage]),
    )
    return " ".join(cells)


def main() -> None:
    """Print a table of all layouts."""
    node = Node()
    sizes = {
        "d_out": FLAGS.outputs,
        "tests": FLAGS.tests,
        "times": 6 + CURVE_POINTS,
        "iterations": FLAGS.iterations,
        "block_size": FLAGS.block_size,
        "processes": FLAGS.nodes,
    }
    if FLAGS.examples < FLAGS.block_size:
        raise InputError(
            f"examples: expected at least a block, {FLAGS.block_size}, got {FLAGS.examples}"
        )
    shapes = (FLAGS.features,), (FLAGS.side, FLAGS.side, 1)
    workloads = [Workload(FLAGS.examples, shape, **sizes) for shape in shapes]
    print(
        f"modelled: {FLAGS.examples:,} examples, {FLAGS.iterations} iterations, {FLAGS.nodes} "
        f"nodes of {node.devices} H100; {node.computing:.0%} of peak arithmetic, "
        f"{node.moving:.0%} of peak bytes"
    )
    for workload in workloads:
        terabytes = workload.tile_bytes * workload.processes / 1e12
        print(
            f"{NAMES[len(workload.shape)]}: {workload.entry_operations:,.0f} operations an entry, "
            f"{terabytes:.2f} TB of tiles"
        )
    print(
        "     tiles    processes  GB/node GB/device   GB recv   kernel  product  network    basis "
        "  eigen  predict  total s  most of it"
    )
    for workload in workloads:
        for layout in LAYOUTS:
            print(row(workload, node, layout))


if __name__ == "__main__":
    command_line.run(main)
