r"""Train a deep narrow network of any depth.

python scripts/train.py
python scripts/train.py --depth=20000 --arch=cnn
python scripts/train.py --optimizer=adam --depth_rate=0.02 --scale=1 --classes=all
python scripts/train.py --optimizer=kernel --depth=20000 --arch=cnn --time=10000
python scripts/train.py --mesh=data:2,depth:4 --depth=1002
python scripts/train.py --depth=1000000 --dataset=toy --dry_run
python scripts/train.py --dataset=mnist --classes=all --depth=1000 --time=100
"""

import contextlib
import dataclasses
from pathlib import Path

import command_line
from absl import flags

from dnntk import InputError, TrainConfig, train
from dnntk.data.own_data import check_same
from dnntk.runs.folder import CONFIG, RunFolder
from dnntk.runtime import processes
from dnntk.training.forecast import forecast

FLAGS = flags.FLAGS

command_line.define(TrainConfig)
command_line.define_processes()
flags.DEFINE_bool("dry_run", False, "Say what the run would take, and end.")
flags.DEFINE_bool("resume", False, "Go on from the workdir's last good checkpoint.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: a new one under runs/.")


def _resumed_config(workdir: Path) -> TrainConfig:
    """The saved run's configuration, changed by the flags on the command line."""
    held = RunFolder(workdir).read_config()
    check_same(held, {}, workdir, "resume")
    saved = TrainConfig.from_json(held)
    values = command_line.values(TrainConfig)
    changes = {name: value for name, value in values.items() if FLAGS[name].present}
    lengths = {"steps", "epochs", "time"}
    if changes.keys() & lengths:
        changes = {**dict.fromkeys(lengths), **changes}
    return dataclasses.replace(saved, **changes)


def _newest_workdir() -> Path:
    """The folder under runs/ of the newest run that has neither finished nor diverged."""
    found = Path("runs").glob(f"*/{CONFIG}")
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):  # an experiment, or a damaged run
            TrainConfig.from_json(RunFolder(file.parent).read_config())
            if not RunFolder(file.parent).ended:
                if processes.is_primary():
                    print(f"resume: {file.parent}, the newest run under runs/ not at its end")
                return file.parent
    raise InputError(
        "resume: expected a run under runs/ that neither is finished nor diverged, found none; "
        "give its --workdir"
    )


def main() -> None:
    """Train as the flags describe."""
    if FLAGS.resume:
        workdir = command_line.workdir(_newest_workdir)
        new = RunFolder(workdir).vacant
        config = command_line.from_flags(TrainConfig) if new else _resumed_config(workdir)
    else:
        config = command_line.from_flags(TrainConfig)
        stem = f"{config.arch}-{config.dataset}-depth{config.depth}"
        workdir = command_line.workdir(lambda: command_line.new_workdir(stem))
    if FLAGS.dry_run:
        print(forecast(config))
        return
    result = train(config, workdir, resume=FLAGS.resume)
    if processes.is_primary():
        print(f"results: {workdir} ({len(result.history)} evaluations)")


if __name__ == "__main__":
    command_line.run(main)
