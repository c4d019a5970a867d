r"""Train a deep narrow network of any depth.

python scripts/train.py
python scripts/train.py --depth=20000 --arch=cnn
python scripts/train.py --mesh=data:2,depth:4 --depth=1002
python scripts/train.py --depth=1000000 --dataset=toy --dry_run
python scripts/train.py --dataset=mnist --classes=all --depth=1000 --time=100
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import command_line
from absl import flags

from dnntk import InputError, TrainConfig, train
from dnntk.data.datasets import DATASETS
from dnntk.data.own_data import check_resumed
from dnntk.networks.initializers import INITS
from dnntk.networks.models import PARAMETRIZATIONS
from dnntk.runs.folder import CONFIG, RunFolder
from dnntk.runtime import processes
from dnntk.training.config import ARCHITECTURES, DTYPES, OPTIMIZERS, SCHEDULES, parse_classes
from dnntk.training.forecast import forecast

FLAGS = flags.FLAGS

flags.DEFINE_enum("arch", "mlp", ARCHITECTURES, "Architecture.")
flags.DEFINE_integer("depth", 1000, "Weight layers, at least 2.")
flags.DEFINE_integer("kernel_size", 3, "Side of the CNN's filters, odd.")
flags.DEFINE_enum("dataset", "digits", DATASETS, "Data; digits needs no download.")
flags.DEFINE_string("classes", "0,1", "Classes to tell apart, or 'all'.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: 4 for mnist, else 1.")
flags.DEFINE_float("scale", None, "C, may be inf. None: depth^2.2.")
flags.DEFINE_float("rho", 1.0, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", 1.0, "Standard deviation of the random biases.")
flags.DEFINE_enum("init", "deep_narrow", INITS, "Initialization.")
flags.DEFINE_enum("parametrization", "ntk", PARAMETRIZATIONS, "Form to compute in.")
flags.DEFINE_enum("optimizer", "sgd", OPTIMIZERS, "Optimizer; all but sgd need --lr.")
flags.DEFINE_float("momentum", 0.0, "Momentum of sgd, in [0, 1).")
flags.DEFINE_float("weight_decay", None, "Of adamw, nadamw, lamb, lion. None: optax's own.")
flags.DEFINE_float("sam_radius", 0.0, "Of sharpness-aware minimization; 0 is without it.")
flags.DEFINE_float("time_step", None, "Kernel time a step. None: from the kernel.")
flags.DEFINE_float("lr", None, "Raw learning rate, instead of --time_step.")
flags.DEFINE_enum("schedule", "constant", SCHEDULES, "How the step changes during the run.")
flags.DEFINE_integer("warmup", 0, "Steps over which the step rises to its full size.")
flags.DEFINE_integer("steps", None, "Steps to train. None: 300, unless --epochs or --time.")
flags.DEFINE_integer("epochs", None, "Passes over the data, instead of --steps.")
flags.DEFINE_float("time", None, "Kernel time to train for, instead of --steps.")
flags.DEFINE_integer("batch_size", 512, "Examples a step, at most; 0 is all.")
flags.DEFINE_integer("shift", 0, "Pixels by which a step's images are moved at random, at most.")
flags.DEFINE_integer("eval_every", 0, "Steps between evaluations; 0 is 20 a run.")
flags.DEFINE_integer("checkpoint_every", 0, "Steps between checkpoints; 0 is 20 a run.")
flags.DEFINE_integer("eval_examples", 0, "Of each split, at most. 0: 2048; at the end all.")
flags.DEFINE_enum("dtype", "float32", DTYPES, "Floating-point type.")
flags.DEFINE_integer("seed", 0, "Seed of split, initialization and shuffle.")
flags.DEFINE_string("mesh", "", "Devices, as data:4,depth:2. Empty: what the batch keeps busy.")
command_line.define_processes()
flags.DEFINE_bool("dry_run", False, "Say what the run would take, and end.")
flags.DEFINE_bool("resume", False, "Go on from the workdir's last good checkpoint.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: a new one under runs/.")


def _values() -> dict[str, Any]:
    values: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(TrainConfig)}
    return values | {"classes": parse_classes(FLAGS.classes)}


def _config() -> TrainConfig:
    return TrainConfig(**_values())


def _resumed_config(workdir: Path) -> TrainConfig:
    """The saved run's configuration, with the flags that were really given laid over it."""
    held = RunFolder(workdir).read_config()
    check_resumed(held, {}, workdir)
    saved = TrainConfig.from_json(held)
    given = {f.name for f in dataclasses.fields(TrainConfig) if FLAGS[f.name].present}
    changes = {name: value for name, value in _values().items() if name in given}
    lengths = {"steps", "epochs", "time"}
    if given & lengths:
        changes = {**dict.fromkeys(lengths), **changes}
    return dataclasses.replace(saved, **changes)


def _new_workdir() -> Path:
    stem = f"{FLAGS.arch}-{FLAGS.dataset}-depth{FLAGS.depth}"
    names = (Path("runs") / (stem + suffix) for suffix in _suffixes())
    return next(name for name in names if not name.exists())


def _newest_workdir() -> Path:
    """That of the run under runs/ that was started last, of those that are not at their end."""
    found = Path("runs").glob(f"*/{CONFIG}")
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):  # an experiment's, or a damaged one
            TrainConfig.from_json(RunFolder(file.parent).read_config())
            if not RunFolder(file.parent).ended:
                if processes.is_primary():
                    print(f"resume: {file.parent}, the newest run under runs/ not at its end")
                return file.parent
    raise InputError(
        "resume: expected a run under runs/ that neither is finished nor diverged, found none; "
        "give its --workdir"
    )


def _suffixes() -> itertools.chain[str]:
    return itertools.chain([""], (f"-{n}" for n in itertools.count(2)))


def main() -> None:
    """Flags to configuration, then train."""
    if FLAGS.resume:
        workdir = command_line.workdir(_newest_workdir)
        config = _config() if RunFolder(workdir).vacant else _resumed_config(workdir)
    else:
        config = _config()
        workdir = command_line.workdir(_new_workdir)
    if FLAGS.dry_run:
        print(forecast(config))
        return
    result = train(config, workdir, resume=FLAGS.resume)
    if processes.is_primary():
        print(f"results: {workdir} ({len(result.history)} evaluations)")


if __name__ == "__main__":
    command_line.run(main)
