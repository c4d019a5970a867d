r"""How deep is infinitely deep? The depth at which networks are within epsilon of their limit.

python scripts/required_depth.py
python scripts/required_depth.py --arch=cnn --times=1,10,100,1000 --train_examples=60,240
python scripts/required_depth.py --datasets=mnist_01,mnist --data_dir=FOLDER --epsilons=0.01,0.05
python scripts/required_depth.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.required_depth import required_depths
from dnntk.experiments.required_depth_config import RequiredDepthConfig

FLAGS = flags.FLAGS

command_line.define(RequiredDepthConfig)
flags.DEFINE_bool("resume", False, "Go on with the measurements in the workdir.")
flags.DEFINE_string("workdir", "runs/required-depth", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print the depths."""
    found = required_depths(
        command_line.from_flags(RequiredDepthConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for name, by_count in found.items():
        for count, requirement in by_count.items():
            for line in requirement.described():
                print(f"{name} n={count:<6} {line}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
