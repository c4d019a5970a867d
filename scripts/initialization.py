r"""Figures 3.1 and 3.2: what is a deep narrow network initialized to?

python scripts/initialization.py
python scripts/initialization.py --arch=mlp --d_in=2 --d_out=1 --depth=100 --workdir=runs/deep
python scripts/initialization.py --arch=cnn --channels=3 --d_out=2 --workdir=runs/colours
python scripts/initialization.py --init=he_uniform --workdir=runs/he
"""

import command_line
from absl import flags

from dnntk.experiments.initialization import InitializationConfig, initialize
from dnntk.training.config import ARCHITECTURES

FLAGS = flags.FLAGS

command_line.define(InitializationConfig, arch=(*ARCHITECTURES, "both"))
flags.DEFINE_bool("resume", False, "Draw the networks in the workdir again.")
flags.DEFINE_string("workdir", "runs/initialization", "Folder for all results.")


def main() -> None:
    """Draw the figures that the flags describe, and print a table of their styles."""
    found = initialize(
        command_line.from_flags(InitializationConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for arch, network in found.items():
        summary = network.summary()
        for kind in ("lines", "boxes"):
            for style, of in summary[kind].items():
                print(f"{arch} {kind} {style:14} {of['means']:14} {of['count']:>8,}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
