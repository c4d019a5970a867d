r"""The plane of depth and scale: what moves in training, as powers of L and of C.

python scripts/regimes.py
python scripts/regimes.py --arch=mlp --depths=1000,10000,100000 --scales=10,100,1000
python scripts/regimes.py --arch=mlp --dataset=mnist --pool=7 --offset=0
python scripts/regimes.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.regimes import QUANTITIES, measure_regimes
from dnntk.experiments.regimes_config import DATASETS, RegimesConfig
from dnntk.training.config import ARCHITECTURES

FLAGS = flags.FLAGS

command_line.define(RegimesConfig, arch=(*ARCHITECTURES, "all"), dataset=DATASETS)
flags.DEFINE_bool("resume", False, "Go on with the measurements in the workdir.")
flags.DEFINE_string("workdir", "runs/regimes", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its powers of depth and of C."""
    found = measure_regimes(
        command_line.from_flags(RegimesConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for arch, plane in found.items():
        for quantity in QUANTITIES:
            print(f"{arch:4} {quantity:13} {plane.described(quantity)}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
