r"""When does evaluation in parallel over depth pay? Iterations measured, accelerator time modelled.

python scripts/parallel_depth.py
python scripts/parallel_depth.py --arch=cnn --dataset=digits --depths=100,1000 --inputs=64

Trains a network of every depth and C, evaluates it by `dnntk.parallel` and layer by layer, and
counts sweeps and errors, both in float32 against float64. The time on an accelerator is modelled,
not measured: a kernel takes the longer of its launch and its memory traffic. The loop is modelled
at its best, one kernel a layer that reads and writes the state. A sweep has one kernel for each
layer of a chunk, and a scan over chunks of 2 log2(chunks); they move 8 states a chunk.
"""

import json
import logging
import math
from typing import TYPE_CHECKING, Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dnntk import TrainConfig, figures, parallel, train
from dnntk.data.datasets import DATASETS
from dnntk.errors import InputError
from dnntk.runs.folder import RunFolder
from dnntk.runs.locks import freeing_folders
from dnntk.training.config import ARCHITECTURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAGS = flags.FLAGS

flags.DEFINE_enum("arch", "mlp", ARCHITECTURES, "Architecture.")
flags.DEFINE_enum("dataset", "toy", DATASETS, "Data that the networks are trained on.")
flags.DEFINE_list("depths", ["100", "1000", "10000", "100000"], "Depths of the networks.")
flags.DEFINE_list("scales", ["5", "50"], "Values of C.")
flags.DEFINE_integer("steps", 100, "Training steps before evaluation.", lower_bound=0)
flags.DEFINE_integer("inputs", 200, "Inputs evaluated.", lower_bound=1)
flags.DEFINE_integer("depth_chunks", None, "Chunks of layers; None: sqrt(depth).", lower_bound=1)
flags.DEFINE_float("launch", 3e-6, "Seconds that a kernel takes at least.", lower_bound=0)
flags.DEFINE_float("bandwidth", 3.35e12, "Bytes a second of the accelerator.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/parallel-depth", "Folder for all results.")

log = logging.getLogger("dnntk")
STATES_A_KERNEL = 8


def loop_seconds(layers: int, state_bytes: int) -> float:
    """Modelled time of the layer loop at its best."""
    return layers * max(FLAGS.launch, 2 * state_bytes / FLAGS.bandwidth)


def sweep_seconds(layers: int, chunks: int, state_bytes: int) -> float:
    """Modelled time of one sweep over ``layers`` in some chunks."""
    kernels = layers / chunks + 2 * math.ceil(math.log2(max(chunks, 2)))
    return kernels * max(FLAGS.launch, STATES_A_KERNEL * chunks * state_bytes / FLAGS.bandwidth)


def row(depth: int, scale: float) -> dict[str, Any]:
    """One trained network: sweeps, errors, modelled times."""
    config = TrainConfig(
        arch=FLAGS.arch, dataset=FLAGS.dataset, depth=depth, scale=scale, steps=max(1, FLAGS.steps)
    )
    result = train(config, progress=False)
    model, variables, x = result.model, result.variables, result.dataset.x_train[: FLAGS.inputs]
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        exact = np.asarray(jax.jit(model.apply)(double, np.asarray(x, np.float64)))
    chunks = FLAGS.depth_chunks or max(1, round(math.sqrt(depth)))
    found, report = parallel.outputs(model, variables, jnp.asarray(x), depth_chunks=chunks)
    one_by_one = jax.jit(model.apply)(variables, x)
    layers, units = depth - 2, x.shape[-1] + 1 + model.d_out
    pixels = math.prod(x.shape[1:-1]) // getattr(model, "pool", 1) ** 2
    state_bytes = 4 * units * pixels * len(x)
    sweeps = int(report.sweeps)
    loop, at_once = (
        loop_seconds(layers, state_bytes),
        sweeps * sweep_seconds(layers, chunks, state_bytes),
    )
    return {
        "depth": depth,
        "scale": scale,
        "inputs": len(x),
        "train_loss": result.summary["train_loss"],
        "sweeps": sweeps,
        "chunks": chunks,
        "by_the_loop": bool(report.sequential),
        "error": float(np.abs(found - exact).max()),
        "loop_error": float(np.abs(one_by_one - exact).max()),
        "modelled_loop_seconds": loop,
        "modelled_seconds": at_once,
        "modelled_times_faster": loop / at_once,
    }


def picture(rows: list[dict[str, Any]]) -> "Figure":
    """Modelled time against depth."""
    figure = figures.new_figure(6.0, 4.2)
    axes = figure.subplots()
    scales = sorted({r["scale"] for r in rows})
    colors = (figures.BLUE, figures.ORANGE, figures.GREEN)
    first = [r for r in rows if r["scale"] == scales[0]]
    depths = [r["depth"] for r in first]
    times = [1e3 * r["modelled_loop_seconds"] for r in first]
    axes.plot(depths, times, "s--", color=figures.BLACK, label="layer by layer, a kernel each")
    for scale, color, marker in zip(scales, colors, "oD^", strict=False):
        chosen = [r for r in rows if r["scale"] == scale]
        times = [1e3 * r["modelled_seconds"] for r in chosen]
        axes.plot(
            depths, times, marker + "-", color=color, label=f"chunks side by side, C = {scale:g}"
        )
        for r, t in zip(chosen, times, strict=True):
            if scale == scales[-1]:
                axes.annotate(
                    f"{r['sweeps']} sweeps",
                    (r["depth"], t),
                    xytext=(0, -14),
                    textcoords="offset points",
                    ha="center",
                    fontsize="x-small",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("depth $L$")
    axes.margins(0.08, 0.15)
    axes.set_ylabel("modelled accelerator time (ms)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(f"{FLAGS.arch.upper()} on {FLAGS.dataset}, {rows[0]['inputs']} inputs, float32")
    return figure


@freeing_folders()
def main() -> None:
    """Compute and write a row for every depth and C, then draw the figure."""
    depths = command_line.depths("depths", 3)
    scales = command_line.listed("scales", float, "numbers like 5,50")
    if not scales:
        raise InputError("scales: expected numbers like 5,50, got none")
    held = RunFolder(command_line.workdir())
    held.claim({}, resume=False)
    folder = held.path
    rows: list[dict[str, Any]] = []
    print("depth        C  sweeps  error (loop's)       modelled ms (loop's)   times faster")
    for depth in depths:
        for scale in scales:
            one = row(depth, scale)
            rows.append(one)
            (folder / "parallel_depth.json").write_text(json.dumps(rows, indent=1), "utf-8")
            print(
                f"{depth:<9,} {scale:>5g}  {one['sweeps']:>6}  {one['error']:.1e} "
                f"({one['loop_error']:.1e})  {1e3 * one['modelled_seconds']:>8.3g} "
                f"({1e3 * one['modelled_loop_seconds']:.3g})  {one['modelled_times_faster']:>12.3g}"
                + ("  by the loop" if one["by_the_loop"] else ""),
                flush=True,
            )
    figures.draw(folder / "parallel_depth", picture, rows)
    print(f"results: {folder}")


if __name__ == "__main__":
    command_line.run(main)
