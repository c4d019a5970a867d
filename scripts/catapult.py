r"""Gradient descent at steps that are too large for the kernel: where the loss comes back.

python scripts/catapult.py
python scripts/catapult.py --arch=cnn
python scripts/catapult.py --depths=10,30,100,300 --scales=4 --ratios=2.5,4,8 --steps=600
python scripts/catapult.py --dataset=mnist --data_dir=FOLDER --classes=all --pool=4
python scripts/catapult.py --resume
"""

from pathlib import Path

import command_line
from absl import flags

from dnntk.experiments.catapult import catapult, powers_of_scale
from dnntk.experiments.catapult_config import LABELLED, CatapultConfig

FLAGS = flags.FLAGS

command_line.define(CatapultConfig, dataset=LABELLED)
flags.DEFINE_bool("resume", False, "Go on with the runs in the workdir.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: runs/catapult-ARCH.")


def main() -> None:
    """Run the experiment that the flags describe, and print a table of its runs."""
    workdir = command_line.workdir(lambda: Path(f"runs/catapult-{FLAGS.arch}"))
    config = command_line.from_flags(CatapultConfig)
    found = catapult(config, workdir, resume=FLAGS.resume)
    for (depth, scale), runs in found.items():
        for row in runs.rows(config.ratios):
            shown = (f"{k} {v:.4g}" for k, v in row.items() if v is not None)
            print(f"depth {depth}, C {scale:g}, {', '.join(shown)}")
    for depth in config.depths:
        for ratio, fit in zip(config.ratios, powers_of_scale(config, found, depth), strict=True):
            if fit is not None:
                power = f"C^{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
                print(f"depth {depth}, ratio {ratio:g}: peak {power}")
    print(f"results: {workdir}")


if __name__ == "__main__":
    command_line.run(main)
