r"""Section 5.1: does the scaled NTK converge with depth, and does it stand still in training?

python scripts/ntk_convergence.py
python scripts/ntk_convergence.py --depths=100,1000 --trials=4 --steps=500 --sweep_depths=
python scripts/ntk_convergence.py --resume
"""

import dataclasses
from typing import Any

import command_line
from absl import flags
from command_line import words

from dnntk.experiments.ntk_convergence import ConvergenceConfig, converge
from dnntk.training.config import DTYPES

FLAGS = flags.FLAGS
DEFAULT = ConvergenceConfig()

flags.DEFINE_list("depths", words(DEFAULT.depths), "Depths of figure 4.1.")
flags.DEFINE_float("scale", DEFAULT.scale, "C at these depths. None: the thesis's, depth^2/2000.")
flags.DEFINE_integer("trials", DEFAULT.trials, "Independent initializations of every network.")
flags.DEFINE_integer("steps", DEFAULT.steps, "Full-batch steps of figure 4.1's runs.")
flags.DEFINE_float("time_step", DEFAULT.time_step, "Kernel time a step.")
flags.DEFINE_float("rho", DEFAULT.rho, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", DEFAULT.beta, "Standard deviation of the random biases.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Floating-point type.")
flags.DEFINE_list("sweep_depths", words(DEFAULT.sweep_depths), "Depths of the rates, or empty.")
flags.DEFINE_integer("sweep_steps", DEFAULT.sweep_steps, "Steps of each run of the rates.")
flags.DEFINE_float("sweep_scale", DEFAULT.sweep_scale, "C of the rates' rule of constant C.")
flags.DEFINE_integer("psi_2_depth", DEFAULT.psi_2_depth, "Psi_2 is computed up to this depth.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of the initializations.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/ntk-convergence", "Folder for all results.")


def _config() -> ConvergenceConfig:
    fields = dataclasses.fields(ConvergenceConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    for name in ("depths", "sweep_depths"):
        values[name] = command_line.listed(name, int, "whole numbers like 100,10000")
    return ConvergenceConfig(**values)


def main() -> None:
    """Flags to configuration, then the experiment and a table of its rates."""
    result = converge(_config(), command_line.workdir(), resume=FLAGS.resume)
    for rule, fits in result.fits.items():
        for quantity, fit in fits.items():
            if fit is not None:
                interval = f"[{fit['low']:.3f}, {fit['high']:.3f}]"
                print(f"{rule:8} {quantity:12} depth^{fit['exponent']:.3f} {interval}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
