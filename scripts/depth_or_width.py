r"""Depth or width? Deep narrow networks, wide shallow ones and their limits on the same images.

python scripts/depth_or_width.py
python scripts/depth_or_width.py --datasets=digits,mnist --data_dir=FOLDER
python scripts/depth_or_width.py --depths=30,100 --trials=2 --regime_scales=0
python scripts/depth_or_width.py --least_scale=0.1 --regime_time=300 --workdir=runs/regime
python scripts/depth_or_width.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.depth_or_width.experiment import DepthOrWidthConfig, compare

FLAGS = flags.FLAGS

command_line.define(DepthOrWidthConfig)
flags.DEFINE_bool("resume", False, "Keep the networks in the workdir and go on with the rest.")
flags.DEFINE_string("workdir", "runs/depth-or-width", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its findings."""
    found = compare(
        command_line.from_flags(DepthOrWidthConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for statement in found.statements:
        print(statement)
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
