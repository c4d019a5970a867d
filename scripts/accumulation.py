r"""Section 5.3, figure 5.1: how the layers of a trained network build up its output.

python scripts/accumulation.py
python scripts/accumulation.py --depth=100 --scale=5 --workdir=runs/accumulation-depth100
python scripts/accumulation.py --dataset=digits --depth=1000 --steps=300 --workdir=runs/digits
python scripts/accumulation.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.accumulation import AccumulationConfig, accumulate

FLAGS = flags.FLAGS

command_line.define(AccumulationConfig)
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/accumulation", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe."""
    accumulate(
        command_line.from_flags(AccumulationConfig), command_line.workdir(), resume=FLAGS.resume
    )
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
