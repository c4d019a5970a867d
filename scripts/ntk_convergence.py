r"""Section 5.1: does the scaled NTK converge with depth, and does it stand still in training?

python scripts/ntk_convergence.py
python scripts/ntk_convergence.py --depths=100,1000 --trials=4 --steps=500 --sweep_depths=
python scripts/ntk_convergence.py --arch=cnn --depths=100,1000 --steps=60 --sweep_steps=20 \
    --sweep_depths=10,32,100,316,1000
python scripts/ntk_convergence.py --depths=100,1000 --scale=5,500 --sweep_power=1.5
python scripts/ntk_convergence.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.ntk_convergence import ConvergenceConfig, converge

FLAGS = flags.FLAGS

command_line.define(ConvergenceConfig)
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/ntk-convergence", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print a table of its rates."""
    result = converge(
        command_line.from_flags(ConvergenceConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for rule, fits in result.fits.items():
        for quantity, fit in fits.items():
            if fit is not None:
                interval = f"[{fit['low']:.3f}, {fit['high']:.3f}]"
                print(f"{rule:8} {quantity:12} depth^{fit['exponent']:.3f} {interval}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
