r"""The long checks: what the README and BUILD_NOTES.md promise, measured.

    python scripts/acceptance.py --data_dir=FOLDER_OF_MNIST
    python scripts/acceptance.py --checks=precision,kill

Each check ends with a JSON file in --workdir, and is not run again if it exists; all are printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerator_checks
import command_line
import depth_checks
import jax
import jax.numpy as jnp
import ntk_checks
import numpy as np
import shooting_checks
import solve_checks
from absl import flags

from dnntk import DeepNarrowMLP, Diverged, InputError, TrainConfig, load_dataset, to_standard, train
from dnntk.data.mnist import LabelledImages, prepare, read_images
from dnntk.experiments.limit_convergence import LimitConfig, converge_to_limit
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.networks.models import DeepNarrow
from dnntk.runs.checkpoints import Checkpoints
from dnntk.runs.folder import RunFolder
from dnntk.runs.locks import freeing_folders
from dnntk.training import engine, gradient_flow, placement
from dnntk.training.losses import summed
from dnntk.training.step_size import largest_eigenvalue

FLAGS = flags.FLAGS
LEARNING_RATES = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
TRAIN = [sys.executable, str(Path(__file__).with_name("train.py"))]

flags.DEFINE_list("checks", ["all"], "Checks to run, or 'all' (prepared_mnist needs --data_dir).")
flags.DEFINE_string("data_dir", None, "Folder of MNIST. None: tensorflow-datasets' own.")
flags.DEFINE_integer("limit_examples", 6_000, "Training images of the limit kernel's prediction.")
flags.DEFINE_integer("baseline_steps", 60, "Steps of each he_uniform run.")
flags.DEFINE_string("workdir", "runs/acceptance", "Folder for all results.")

Check = Callable[[Path], dict[str, Any]]


def default_run(folder: Path) -> dict[str, Any]:
    """``scripts/train.py`` with nothing else."""
    return _run_script(folder) | {"promised": "test accuracy >= 0.99, training under 120 s"}


def deep_cnn(folder: Path) -> dict[str, Any]:
    """``scripts/train.py --depth=20000 --arch=cnn`` with nothing else."""
    measured = _run_script(folder, "--depth=20000", "--arch=cnn")
    return measured | {"promised": "under 1800 s, under 2 GB resident, test accuracy >= 0.99"}


def million_layers(folder: Path) -> dict[str, Any]:
    """``scripts/train.py --dataset=toy`` at depth 1,000,000, beside depth 1000."""
    deep = _run_script(folder, "--dataset=toy", "--depth=1000000")
    shallow = _run_script(
        folder.with_name(f"{folder.name}-depth-1000"), "--dataset=toy", "--depth=1000"
    )
    return deep | {
        "test_loss_at_depth_1000": shallow["test_loss"],
        "promised": "fit as good as at depth 1000, under 8 GB",
    }


def mnist_mlp(folder: Path) -> dict[str, Any]:
    """Ten classes at 7 x 7, depth 1000, t = 100, beside the limit kernel's accuracy."""
    config = TrainConfig(dataset="mnist", data_dir=FLAGS.data_dir, classes="all", time=100.0)
    measured = train(config, folder).summary
    return _summary(measured) | {
        "limit_accuracy": _limit_accuracy(config, FLAGS.limit_examples),
        "limit_examples": FLAGS.limit_examples,
        "promised": "test accuracy within 0.02 of the limit's",
    }


def mnist_cnn(folder: Path) -> dict[str, Any]:
    """Digits 0 and 1 at 7 x 7, depth 1000."""
    config = TrainConfig(
        arch="cnn",
        dataset="mnist",
        data_dir=FLAGS.data_dir,
        time_step=0.05,
        momentum=0.95,
        time=1500.0,
    )
    measured = _summary(train(config, folder).summary)
    return measured | {"promised": "test accuracy >= 0.95"}


def baselines(folder: Path) -> dict[str, Any]:
    """The same two networks with he_uniform at every learning rate of figure 4.2."""
    runs = []
    for arch, classes in (("mlp", "all"), ("cnn", (0, 1))):
        for lr in LEARNING_RATES:
            config = TrainConfig(
                arch=arch,
                dataset="mnist",
                data_dir=FLAGS.data_dir,
                classes=classes,
                scale=1.0,
                init="he_uniform",
                parametrization="standard",
                lr=lr,
                steps=FLAGS.baseline_steps,
                eval_every=FLAGS.baseline_steps,
            )
            run: dict[str, Any] = {"arch": arch, "lr": lr, "outcome": "finished"}
            try:
                history = train(config, folder / f"{arch}-lr{lr:g}").history
            except Diverged as error:
                history, run["outcome"] = error.history, "diverged"
            keys = ("train_loss", "train_accuracy", "test_accuracy")
            run |= {
                "first": {k: history[0][k] for k in keys},
                "last": {k: history[-1][k] for k in keys},
            }
            runs.append(run)
    return {"runs": runs, "promised": "reported as seen"}


def table_row_3(folder: Path) -> dict[str, Any]:
    """Row 3 of the thesis's table 4.1 by the infinitely deep CNN, at both values of rho."""
    runs = {}
    for name, rho in (("thesis", 3**-0.5), ("published_code", 1 / 3)):
        config = PredictConfig(
            arch="cnn", dataset="mnist", data_dir=FLAGS.data_dir, rho=(rho,), times=(1e3, 4e3, 1e5)
        )
        runs[name] = _predicted(folder / name, config)
    return runs | {
        "table_4_1": "training MSE 0.031257, test accuracy 0.9887",
        "promised": "under 900 s each",
    }


def mnist_limit(folder: Path) -> dict[str, Any]:
    """All 60,000 digits of MNIST by the infinitely deep MLP on 28 x 28 pixels."""
    config = PredictConfig(
        dataset="mnist",
        data_dir=FLAGS.data_dir,
        pool=1,
        classes="all",
        rho=(3.0, 10.0, 30.0),
        beta=(1.0, 10.0),
        validation=10_000,
        search_examples=10_000,
        times=(1e4, 1e5, 3e5, 1e6, 3e6, 1e7),
        memory_gb=19.0,
    )
    promised = "test error <= 0.016 (aim 0.012), under 2400 s, under 20 GB"
    return _predicted(folder, config) | {"promised": promised}


def limit_depth(folder: Path) -> dict[str, Any]:
    """Trained CNNs of depth 30 to 1000 against their limit, on held-out zeros and ones."""
    config = LimitConfig(
        arch="cnn",
        dataset="mnist",
        data_dir=FLAGS.data_dir,
        train_examples=500,
        test_examples=200,
        times=(5.0, 20.0),
    )
    found = converge_to_limit(config, folder)["cnn"]
    return found.summary() | {"powers": found.fits, "promised": "about depth^-1/2"}


def precision(folder: Path) -> dict[str, Any]:
    """float32 ntk against float64 standard: toy data, depth 10,000, C = 50,000, 100 steps."""
    del folder
    data = load_dataset("toy")
    mesh = placement.data_mesh(1, 0)
    ntk = DeepNarrowMLP(10_000, 1, 50_000.0)
    start = jax.jit(ntk.init)(jax.random.key(0), data.x_train)
    time_step = 0.9 * 2 / largest_eigenvalue(ntk, start, data.x_train, mesh).value
    with jax.enable_x64(True):
        standard, literal = to_standard(ntk, jax.tree.map(lambda p: p.astype(jnp.float64), start))
        expected = _descend(standard, literal, data.x_train, data.y_train, time_step, "float64")
    found = _descend(ntk, start, data.x_train, data.y_train, time_step, "float32")
    return {
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_output": float(np.abs(expected).max()),
        "time_step": time_step,
        "promised": "outputs agree to 1e-4",
    }


def kill(folder: Path) -> dict[str, Any]:
    """A run killed by ``kill -9`` at ten random moments and resumed, against an undisturbed run."""
    options = "--depth=1000 --arch=cnn --steps=400 --checkpoint_every=5 --batch_size=128".split()
    whole, cut = folder / "whole", folder / "cut"
    subprocess.run([*TRAIN, *options, f"--workdir={whole}"], check=True, capture_output=True)
    moments = []
    for number in range(10):
        resume = (cut / "config.json").exists()
        more = ["--resume"] if resume else options
        silent: Any = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        victim = subprocess.Popen([*TRAIN, *more, f"--workdir={cut}"], **silent)
        time.sleep(random.Random(number).uniform(5, 12))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        moments.append(_last_step(cut))
    subprocess.run([*TRAIN, "--resume", f"--workdir={cut}"], check=True, capture_output=True)
    states = []
    for run in (whole, cut):
        with Checkpoints(run / "checkpoints") as checkpoints:
            states.append(checkpoints.newest())
    pairs = zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    return {
        "last_step_on_disk_at_each_kill": moments,
        "parameters_identical": same,
        "metrics_identical": _metrics(whole) == _metrics(cut),
        "promised": "both identical",
    }


def prepared_mnist(folder: Path) -> dict[str, Any]:
    """MNIST's published files, prepared for tensorflow-datasets, read back example by example."""

    def counted(images: LabelledImages) -> Counter[tuple[str, bytes, int]]:
        examples: Counter[tuple[str, bytes, int]] = Counter()
        for split in ("train", "test"):
            x, labels = (getattr(images, f"{kind}_{split}") for kind in ("x", "labels"))
            examples.update((split, p.tobytes(), int(n)) for p, n in zip(x, labels, strict=True))
        return examples

    begun = time.perf_counter()
    directory = prepare("mnist", folder, FLAGS.data_dir)
    seconds = time.perf_counter() - begun
    raw, found = (counted(read_images("mnist", where)) for where in (FLAGS.data_dir, directory))
    return {
        "examples": raw.total(),
        "examples_that_differ": ((raw - found) + (found - raw)).total(),
        "seconds_to_prepare": seconds,
        "promised": "none differs",
    }


CHECKS: dict[str, Check] = {
    "default": default_run,
    "precision": precision,
    "estimators": solve_checks.estimators,
    "solve": solve_checks.solved,
    "accelerators": accelerator_checks.accelerators,
    "depth_chunks": shooting_checks.depth_chunks,
    "solve_many": lambda folder: solve_checks.many_examples(folder, FLAGS.data_dir),
    "factors": ntk_checks.factors,
    "operator": ntk_checks.operator,
    "kill": kill,
    "mnist_mlp": mnist_mlp,
    "baselines": baselines,
    "mnist_cnn": mnist_cnn,
    "deep_cnn": deep_cnn,
    "million_layers": million_layers,
    "ten_million_layers": depth_checks.ten_million_layers,
    "table_row_3": table_row_3,
    "mnist_limit": mnist_limit,
    "limit_depth": limit_depth,
    "prepared_mnist": prepared_mnist,
}


def _summary(summary: dict[str, Any]) -> dict[str, Any]:
    keys = "train_loss test_loss train_accuracy test_accuracy steps time time_step seconds"
    more = ("steps_per_second", "compile_seconds", "peak_memory_bytes")
    return {key: summary[key] for key in (*keys.split(), *more)}


def _run_script(folder: Path, *options: str) -> dict[str, Any]:
    begun = time.perf_counter()
    subprocess.run([*TRAIN, *options, f"--workdir={folder}"], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    return _summary(json.loads((folder / "summary.json").read_bytes())) | {"process_seconds": wall}


def _limit_accuracy(config: TrainConfig, examples: int) -> float:
    """Test accuracy at ``config.time`` of kernel gradient flow with the limit kernel."""
    assert config.time is not None
    limit = PredictConfig(
        dataset=config.dataset,
        classes=config.classes,
        data_dir=config.data_dir,
        times=(config.time,),
        train_examples=examples,
    )
    return predict(limit).chosen["test_accuracy"]


def _predicted(folder: Path, config: PredictConfig) -> dict[str, Any]:
    summary = predict(config, folder).summary
    keys = "rho beta time train_mse train_accuracy test_accuracy times seconds peak_memory_bytes"
    return {key: summary[key] for key in keys.split()}


def _descend(
    model: DeepNarrow, variables: Any, x: np.ndarray, y: np.ndarray, time_step: float, dtype: str
) -> np.ndarray:
    x, y, rate = x.astype(dtype), y.astype(dtype), gradient_flow.learning_rate(model, time_step)
    frozen = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: Any, frozen: Any) -> jax.Array:
        outputs = engine.apply(model, params, frozen, jnp.asarray(x))
        return summed("squared", outputs, jnp.asarray(y), jnp.ones(len(x), dtype)) / len(x)

    @jax.jit
    def update(params: Any, frozen: Any) -> Any:
        return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, frozen))

    params = variables["params"]
    for _ in range(100):
        params = update(params, frozen)
    return np.asarray(jax.jit(model.apply)({"params": params, **frozen}, x), np.float64)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def _last_step(folder: Path) -> int:
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


@freeing_folders()
def main() -> None:
    """Run the checks that have no result yet, then show all results."""
    without = [] if FLAGS.data_dir else ["prepared_mnist"]
    without += ["accelerators"] if accelerator_checks.missing() else []
    names = command_line.chosen("checks", CHECKS, without)
    if "prepared_mnist" in names and not FLAGS.data_dir:
        raise InputError(
            "data_dir: prepared_mnist expects MNIST's four published files, got none; "
            "give their folder as --data_dir=FOLDER"
        )
    folder = RunFolder(command_line.workdir())
    folder.claim({}, resume=False)
    for name in names:
        file = folder.path / f"{name}.json"
        if not file.exists():
            print(f"--- {name}: {CHECKS[name].__doc__}", flush=True)
            folder.write_json(file.name, CHECKS[name](folder.path / f"{name}-{os.getpid()}"))
        print(name, file.read_text(), flush=True)


if __name__ == "__main__":
    command_line.run(main)
