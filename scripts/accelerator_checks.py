"""What ships compiles for an H100 and a TPU, on a machine without them, and in how many launches.

XLA compiles ahead of time for a topology. Nothing runs: times and results are not checked here.
"""

import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, empirical_ntk, kernel
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.random_features import RandomFeatures
from dnntk.training import gradient_flow
from dnntk.training.gradient_flow import TrainState
from dnntk.training.placement import Batch

__all__ = ["accelerators", "launches", "missing"]

# The packages that compile for an accelerator, and how to have them.
PLUGINS = {
    "jax_plugins.xla_cuda12": "jax-cuda12-plugin",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
    "libtpu": "libtpu",
}
# openxla/xla#25919; a real card's own is written by --xla_dump_to.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NETWORKS: dict[str, tuple[Callable[[int], DeepNarrow], tuple[int, ...]]] = {
    "mlp": (lambda depth: DeepNarrowMLP(depth, 1, 5.0), (256, 2)),
    "cnn": (lambda depth: DeepNarrowCNN(depth, 1, 5.0), (512, 7, 7, 1)),
    "wide cnn": (lambda depth: DeepNarrowCNN(depth, 10, 5.0), (64, 8, 8, 3)),
}
DEPTH = 402
COUNTED_DEPTHS = (DEPTH, 1000, 20_000)
# Launches that a step may take for each layer, from depth 402 on.
MOST_LAUNCHES = {"mlp": 7.5, "cnn": 12.0}


def accelerators(folder: Path) -> dict[str, Any]:
    """Steps, outputs, kernels and solve compiled for an H100 and a TPU v5e, launches counted."""
    del folder
    if lacking := missing():
        raise InputError(
            f"checks: accelerators expected packages that compile for a GPU and a TPU, got none of "
            f"{', '.join(lacking)}; pip install {' '.join(lacking)}"
        )
    seconds = {
        f"{device}, {name}, {what}": compiled_in
        for device, mesh in (("H100", h100()), ("TPU v5e", tpu()))
        for name in NETWORKS
        for what, compiled_in in _compile_seconds(name, mesh)
    }
    counted = {
        f"{name}, depth {depth}": launches(name, depth, h100())
        for name in MOST_LAUNCHES
        for depth in COUNTED_DEPTHS
    }
    promised = f"all compile; launches a layer at most {MOST_LAUNCHES}"
    return {"compile_seconds": seconds, "launches_a_step": counted, "promised": promised}


def missing() -> list[str]:
    """The packages that `accelerators` lacks."""

    def found(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False

    return [package for module, package in PLUGINS.items() if not found(module)]


def h100() -> Mesh:
    """A mesh of one H100 that is not there."""
    found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return Mesh(np.array(found.devices[:1]), ("data",))


def tpu() -> Mesh:
    """A mesh of one core of a TPU v5e that is not there."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks a server of Google's cloud
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return Mesh(np.array(found.devices[:1]), ("data",))


class _Arguments(NamedTuple):
    """Shapes of a network's variables and data, laid out on a mesh."""

    model: DeepNarrow
    state: TrainState
    frozen: Any
    batch: Batch

    @classmethod
    def of(cls, name: str, depth: int, mesh: Mesh) -> "_Arguments":
        make, shape = NETWORKS[name]
        model, x = make(depth), cast(Any, jax.ShapeDtypeStruct(shape, jnp.float32))
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        opt_state = jax.eval_shape(gradient_flow.sgd(0.1).init, variables["params"])
        y, weight = ((shape[0], model.d_out), shape[:1])
        batch = Batch(x, x.update(shape=y), x.update(shape=weight))

        def laid_out(tree: Any, axes: P) -> Any:
            return jax.tree.map(lambda a: a.update(sharding=NamedSharding(mesh, axes)), tree)

        state = laid_out(TrainState(variables["params"], opt_state), P())
        frozen = laid_out({"initial": variables["initial"]}, P())
        return cls(model, state, frozen, laid_out(batch, P("data")))


def _step(arguments: _Arguments, mesh: Mesh) -> Any:
    step = gradient_flow.make_step(arguments.model, gradient_flow.sgd(0.1), mesh)
    return step.lower(*arguments[1:])


def _compile_seconds(name: str, mesh: Mesh) -> Iterator[tuple[str, float]]:
    """(program, seconds that it took to compile) for each program."""
    arguments = _Arguments.of(name, DEPTH, mesh)
    model, x = arguments.model, cast(Any, arguments.batch.x)
    variables = {"params": arguments.state.params, **arguments.frozen}
    few = x.update(shape=(8, *x.shape[1:]))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), arguments.frozen)
    of_solve = RandomFeatures(model, zeros)
    programs = {
        "step": lambda: _step(arguments, mesh),
        "outputs": lambda: jax.jit(model.apply).lower(variables, x),
        "empirical kernel": lambda: jax.jit(lambda v, x: empirical_ntk(model, v, x)).lower(
            variables, few
        ),
        "limit kernel": lambda: jax.jit(lambda x: kernel.limit_ntk(x, d_out=model.d_out)).lower(
            few
        ),
        "solve's kernel": lambda: jax.jit(lambda x1, x2: of_solve(x1, x2)).lower(few, few),
    }
    for what, lowered in programs.items():
        begun = time.perf_counter()
        lowered().compile()
        yield what, time.perf_counter() - begun


def launches(name: str, depth: int, mesh: Mesh) -> dict[str, float]:
    """Kernels and copies that one training step starts on a GPU, one after the other."""
    lowered = _step(_Arguments.of(name, depth, mesh), mesh)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (listed,) = Path(folder).glob("*thunk_sequence.txt")
        total = _total(listed.read_text(), compiled.as_text())
    return {"launches": total, "launches_a_layer": total / depth}


def _total(thunks: str, program: str) -> int:
    """The launches of a list of thunks, those of a loop as often as the program says."""
    turns = _trip_counts(program)
    open_loops: list[tuple[int, int]] = []  # indentation, and how often all in it happens
    total = 0
    for line in thunks.splitlines():
        found = re.match(r"( *)\d+: (k\w+)", line)
        if not found:
            continue
        indent, kind = len(found[1]), found[2]
        while open_loops and indent <= open_loops[-1][0]:
            open_loops.pop()
        times = open_loops[-1][1] if open_loops else 1
        if kind == "kWhile":
            open_loops.append((indent, times * next(turns)))
        elif kind != "kDynamicSliceFusion":  # its kernels follow
            total += times
    return total


def _trip_counts(program: str) -> Iterator[int]:
    """How often each loop of a scheduled program turns, outer ones before those in them."""
    loops: dict[str, list[tuple[str, int]]] = {}
    name = entry = ""
    for line in program.splitlines():
        if begun := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = begun[2]
            entry = name if begun[1] else entry
        elif " while(" in line:
            body = re.search(r"body=%?([\w.-]+)", line)
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            if body is None or turns is None:
                raise ValueError(f"a loop of unknown length: {line}")
            loops.setdefault(name, []).append((body[1], int(turns[1])))

    def inside(computation: str) -> Iterator[int]:
        for body, turns in loops.get(computation, []):
            yield turns
            yield from inside(body)

    return inside(entry)
