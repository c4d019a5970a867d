r"""Speed and memory of training and of the kernels, each beside a baseline of the same run.

    python scripts/benchmark.py
    python scripts/benchmark.py --benchmarks=limit_cnn,limit_mlp --repeats=15
    python scripts/benchmark.py --benchmarks=train_cnn,train_toy
    python scripts/benchmark.py --benchmarks=train_mlp_mnist --data_dir=FOLDER_OF_MNIST
    python scripts/benchmark.py --benchmarks=cost_mlp --mlp_depths=10,100,1000 --step_seconds=20

Each benchmark writes one JSON file into --workdir as it ends; a benchmark whose file exists is not
run again. Plots and a table of all results close the run. Work and baseline take turns (A B A B
...), and a ratio compares two neighbouring turns, so that other work on the machine slows both.
The PyTorch loop needs the extra ``bench``; without it, everything else is measured.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from benchmarking import baselines, plots, training
from benchmarking.measure import (
    Call,
    Row,
    check_same,
    machine,
    measured,
    promise,
    set_baseline,
    turns,
)

from dnntk import DeepNarrowMLP, empirical_ntk, figures, to_standard
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow, Variables
from dnntk.runs.folder import RunFolder, peak_memory_bytes, versions
from dnntk.runs.locks import freeing_folders

FLAGS = flags.FLAGS

flags.DEFINE_list("benchmarks", ["all"], "Benchmarks to run, or 'all'.")
flags.DEFINE_integer("repeats", 7, "Turns of work and baseline.", lower_bound=1)
flags.DEFINE_integer("compiles", 3, "Compilations of every function.", lower_bound=1)
flags.DEFINE_list("depths", ["25", "100", "400", "1000", "10000"], "ntk: depths.")
flags.DEFINE_integer(
    "peer_depth", 400, "ntk: largest depth of the baseline, an unrolled loop.", lower_bound=0
)
flags.DEFINE_integer("points", 200, "ntk: points on the arc.", lower_bound=1)
flags.DEFINE_integer("memory_depth", 100, "ntk_memory: depth.", lower_bound=2)
flags.DEFINE_integer("memory_images", 64, "ntk_memory: images of 28 x 28.", lower_bound=1)
flags.DEFINE_integer("peer_images", 2, "ntk_memory: images of the baseline.", lower_bound=1)
flags.DEFINE_float("peer_seconds", 120.0, "ntk_memory: baseline's time limit.", lower_bound=1)
flags.DEFINE_integer("cnn_images", 512, "limit_cnn: images of 7 x 7.", lower_bound=1)
flags.DEFINE_integer("mlp_images", 10_000, "limit_mlp: images of 784 pixels.", lower_bound=1)
flags.adopt_module_key_flags(training)
flags.DEFINE_string("workdir", "runs/benchmark", "Folder for all results.")


def ntk() -> list[Row]:
    """Empirical NTK of the thesis's toy points, 4-wide MLP, float64: layerwise against unrolled."""
    rows = []
    for depth in command_line.depths("depths", 2):
        with jax.enable_x64(True):
            rows += _ntk_at(depth, FLAGS.points, unroll=depth <= FLAGS.peer_depth)
    return rows


def ntk_memory() -> list[Row]:
    """Empirical NTK of 28 x 28 images, ten outputs, float32: layerwise against the Jacobian's."""
    n, n_peer, depth = FLAGS.memory_images, FLAGS.peer_images, FLAGS.memory_depth
    own = _in_own_process(_measure_ntk, "layerwise", depth, n, FLAGS.repeats)
    baseline = _in_own_process(
        _measure_ntk, "jacrev", depth, n_peer, 1, seconds_allowed=FLAGS.peer_seconds
    )
    name = f"jacrev, n = {n_peer}"
    missing = None if baseline else f"{name}: not done in {FLAGS.peer_seconds:g} s"
    if baseline:
        m = min(n, n_peer)
        check_same(own["kernel"][:m, :m], baseline["kernel"][:m, :m], 1e-4)
    setting = f"depth {depth}, {n} images of 784, d_out 10"
    memory = measured(f"{setting}: peak resident memory", "bytes", [own["peak_bytes"]])
    a_pair = measured(f"{setting}: time a pair", "s", [s / n**2 for s in own["seconds"]])
    if baseline:
        # The baseline takes one turn, of a minute. Its time grows with the number of pairs, as a
        # block holds one example; its memory does not grow.
        set_baseline(memory, name, [baseline["peak_bytes"]])
        set_baseline(a_pair, name, [s / n_peer**2 for s in baseline["seconds"]])
    for row in (memory, a_pair):
        row["peer_missing"] = missing
    promise(memory, "under 4 GB", memory["median"] < 4e9)
    return [memory, a_pair, measured(f"{setting}: whole matrix", "s", own["seconds"])]


def limit_cnn() -> list[Row]:
    """Limit Gram matrix at 7 x 7 x 1, 3 x 3 filters, float32: against its formula in plain JAX."""
    n = FLAGS.cnn_images
    rows = []
    for name, x1, x2 in _image_pairs((n, 7, 7, 1)):
        pairs = n * n if x2 is not None else n * (n + 1) // 2
        calls = partial(limit_ntk, x1, x2), partial(baselines.limit_cnn, x1, x2)
        difference = check_same(calls[0](), calls[1](), 1e-5)
        own, baseline = np.array(turns(FLAGS.repeats, *calls)) / pairs * 1e6
        row = measured(f"{n} x {n} images, {name}: time a distinct pair", "us", own)
        set_baseline(row, "arctan2 and sqrt", baseline)
        row["difference"] = difference
        rows.append(promise(row, "at most 3 us", row["median"] <= 3))
    return rows


def limit_mlp() -> list[Row]:
    """Limit Gram matrix of 784 pixels, float32: against the matrix product that it contains."""
    n = FLAGS.mlp_images
    rows = []
    for name, x1, x2 in _image_pairs((n, 784)):
        other = x1 if x2 is None else x2
        calls = partial(limit_ntk, x1, x2), partial(baselines.product, x1, other)
        turns(1, *calls)
        own, product = turns(FLAGS.repeats, *calls)
        row = set_baseline(
            measured(f"{n} x {n} images, {name}", "s", own), "x1 x2^T alone", product
        )
        words = "at most 1.5 times the product"
        rows.append(promise(row, words, row["ratio"]["median"] <= 1.5))
    return rows


KERNELS: dict[str, Callable[[], list[Row]]] = {
    "ntk": ntk,
    "ntk_memory": ntk_memory,
    "limit_cnn": limit_cnn,
    "limit_mlp": limit_mlp,
}
BENCHMARKS: dict[str, Callable[..., list[Row]]] = {**training.BENCHMARKS, **KERNELS}
COST = {
    "cost_mlp": "4-wide MLP, {examples} inputs, float32",
    "cost_cnn": "CNN with 3 channels, {examples} images of 7 x 7, float32",
}


def _image_pairs(shape: tuple[int, ...]) -> list[tuple[str, jax.Array, jax.Array | None]]:
    x1, x2 = (jax.random.uniform(jax.random.key(seed), shape) for seed in (0, 1))
    return [("x1 with x2", x1, x2), ("x1 with itself", x1, None)]


# ---- the empirical NTK


def _ntk_at(depth: int, points: int, unroll: bool) -> list[Row]:
    """Rows of first calls, which compile, and of later calls, at one depth."""
    angles = np.linspace(0, np.pi / 2, points + 20)[10:-10]
    x = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1))
    model, variables = _network(depth, 1, x)
    layers = baselines.unstacked(to_standard(model, variables)[1]["params"]) if unroll else []
    calls: dict[str, Call] = {"layerwise": lambda: empirical_ntk(model, variables, x)}
    if unroll:
        scale = model.parameter_scale**2
        calls["unrolled, leaf by leaf"] = lambda: scale * baselines.unrolled_ntk(layers, x)
        calls["unrolled, joined"] = lambda: scale * baselines.unrolled_ntk(layers, x, join=True)
    first = turns(FLAGS.compiles, *calls.values(), forget=True)
    values = [np.asarray(call()) for call in calls.values()]
    differences = [check_same(values[0], value, 1e-9) for value in values[1:]]
    later = turns(FLAGS.repeats, *calls.values())
    rows = []
    for kind, (own, *others) in (("first call", first), ("run", later)):
        row = measured(f"depth {depth}, {points} x {points}: {kind}", "s", own)
        row |= {"depth": depth, "points": points, "kind": kind}
        beside = [
            set_baseline(row | {"difference": difference}, name, samples)
            for name, difference, samples in zip(list(calls)[1:], differences, others, strict=True)
        ]
        named, *more = beside or [row]
        rows += [_promise_ntk(named), *more]
    return rows


def _promise_ntk(row: Row) -> Row:
    if row["kind"] == "first call":
        return promise(row, "under 5 s at every depth", row["median"] < 5)
    if row["depth"] >= 400 and "peer" in row:
        return promise(row, "10 times faster than the peer", row["ratio"]["median"] <= 0.1)
    if row["depth"] == 10_000:
        return promise(row, "under 1 s", row["median"] < 1)
    return row


def _network(depth: int, d_out: int, x: jax.Array) -> tuple[DeepNarrow, Variables]:
    model = DeepNarrowMLP(depth, d_out, float(depth) ** 2.2)
    return model, jax.jit(model.init)(jax.random.key(0), x)


def _measure_ntk(method: Any, depth: int, images: int, repeats: int) -> dict[str, Any]:
    x = jax.random.uniform(jax.random.key(1), (images, 784))
    model, variables = _network(depth, 10, x)
    kernel = np.asarray(empirical_ntk(model, variables, x, method=method))
    seconds = turns(repeats, lambda: empirical_ntk(model, variables, x, method=method))[0]
    return {"kernel": kernel, "seconds": seconds, "peak_bytes": peak_memory_bytes()}


def _in_own_process(
    work: Callable[..., Any], *args: Any, seconds_allowed: float | None = None
) -> Any:
    """The result of ``work`` in its own process; None if it takes over ``seconds_allowed``."""
    # On Linux a spawned process inherits this process's memory as its peak. A child of a fork
    # server starts from a small process.
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        try:
            return pool.apply_async(work, args).get(seconds_allowed)
        except multiprocessing.TimeoutError:
            return None


@freeing_folders()
def main() -> None:
    """Run the benchmarks that have no result yet, then show all results."""
    without = () if FLAGS.data_dir else ("train_mlp_mnist",)
    names = command_line.chosen("benchmarks", BENCHMARKS, without)
    command_line.depths("depths", 2)
    training.check_flags()
    # A cache on disk would look like fast compilation. A process must not reserve a GPU's memory,
    # which the next process needs.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    folder = RunFolder(command_line.workdir())
    folder.claim({}, resume=False)
    results = {}
    for name in names:
        file = folder.path / f"{name}.json"
        if file.exists():
            print(f"--- {name}: kept from {file}; delete it to measure again", flush=True)
        else:
            print(f"--- {name}: {BENCHMARKS[name].__doc__}", flush=True)
            folder.write_json(file.name, _result(name, folder.path))
        results[name] = json.loads(file.read_bytes())
    if "ntk" in results:
        figures.draw(folder.path / "ntk", plots.ntk_figure, results["ntk"]["rows"])
    for name, title in COST.items():
        if name in results:
            rows = results[name]["rows"]
            shown = (rows, title.format(**rows[0]["task"]))
            figures.draw(folder.path / name, plots.cost_figure, *shown)
    print(plots.table(results))


def _result(name: str, folder: Path) -> dict[str, Any]:
    settings = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module("__main__")}
    before = machine()
    begun = time.perf_counter()
    rows = KERNELS[name]() if name in KERNELS else BENCHMARKS[name](folder)
    return {
        "benchmark": name,
        "description": BENCHMARKS[name].__doc__,
        "settings": settings,
        "machine": before,
        "versions": versions(),
        "seconds": time.perf_counter() - begun,
        "rows": rows,
    }


if __name__ == "__main__":
    command_line.run(main)
