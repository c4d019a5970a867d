r"""Depth transfer: at constant C a rate chosen at depth 30 serves every depth.

python scripts/depth_transfer.py
python scripts/depth_transfer.py --arch=mlp --deepest=100000
python scripts/depth_transfer.py --arch=mlp --depths=10,30,100,300,1000,3000,10000,30000
python scripts/depth_transfer.py --arch=mlp --features=sobol --scales=1 --baselines= --deepest=0
python scripts/depth_transfer.py --dataset=mnist --data_dir=FOLDER --pool=7
python scripts/depth_transfer.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.depth_transfer import transfer_depth
from dnntk.experiments.depth_transfer_config import IMAGES, DepthTransferConfig
from dnntk.training.config import ARCHITECTURES

FLAGS = flags.FLAGS

command_line.define(DepthTransferConfig, arch=(*ARCHITECTURES, "both"), dataset=IMAGES)
flags.DEFINE_bool("resume", False, "Go on with the networks in the workdir.")
flags.DEFINE_string("workdir", "runs/depth_transfer", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its losses, rates and powers."""
    found = transfer_depth(
        command_line.from_flags(DepthTransferConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for curves, transferred in found.values():
        for one in curves:
            print(one.described(FLAGS.tune_depth))
        if transferred is not None:
            print(transferred.described())
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
