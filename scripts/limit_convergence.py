r"""Theorems 3.3 and 4.3: do deep trained networks predict what the infinitely deep one predicts?

python scripts/limit_convergence.py
python scripts/limit_convergence.py --arch=mlp --depths=30,100,300 --trials=8
python scripts/limit_convergence.py --arch=cnn --dataset=mnist --train_examples=500 --times=5,20,50
python scripts/limit_convergence.py --optimizer=kernel --times=100,1e4
python scripts/limit_convergence.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.limit_convergence import LimitConfig, converge_to_limit
from dnntk.training.config import ARCHITECTURES

FLAGS = flags.FLAGS

command_line.define(LimitConfig, arch=(*ARCHITECTURES, "both"), optimizer=("sgd", "kernel"))
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/limit-convergence", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its powers of depth."""
    found = converge_to_limit(
        command_line.from_flags(LimitConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for arch, comparison in found.items():
        for time, fit in zip(comparison.times, comparison.fits, strict=True):
            if fit is not None:
                interval = f"[{fit['low']:.3f}, {fit['high']:.3f}]"
                print(f"{arch} t={time:<8g} depth^{fit['exponent']:.3f} {interval}; theory -0.5")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
