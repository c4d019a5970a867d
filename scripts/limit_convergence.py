r"""Theorems 3.3 and 4.3: do deep trained networks predict what the infinitely deep one predicts?

python scripts/limit_convergence.py
python scripts/limit_convergence.py --arch=mlp --depths=30,100,300 --trials=8
python scripts/limit_convergence.py --arch=cnn --dataset=mnist --train_examples=500 --times=5,20,50
python scripts/limit_convergence.py --resume
"""

import dataclasses
from typing import Any

import command_line
from absl import flags
from command_line import words

from dnntk.data.datasets import DATASETS
from dnntk.experiments.limit_convergence import LimitConfig, converge_to_limit
from dnntk.training.config import ARCHITECTURES, DTYPES, parse_classes

FLAGS = flags.FLAGS
DEFAULT = LimitConfig()

flags.DEFINE_enum("arch", DEFAULT.arch, (*ARCHITECTURES, "both"), "Architecture.")
flags.DEFINE_enum("dataset", DEFAULT.dataset, DATASETS, "Data; digits needs no download.")
flags.DEFINE_string("classes", "0,1", "Classes to tell apart, or 'all'.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: 4 for mnist, else 1.")
flags.DEFINE_integer("train_examples", DEFAULT.train_examples, "Examples to train on, at most.")
flags.DEFINE_integer("test_examples", DEFAULT.test_examples, "Held-out examples, at most.")
flags.DEFINE_list("depths", words(DEFAULT.depths), "Depths of the networks.")
flags.DEFINE_integer("trials", DEFAULT.trials, "Independent initializations of every network.")
flags.DEFINE_list("times", words(DEFAULT.times), "Kernel times to compare at.")
flags.DEFINE_float("time_step", None, "Kernel time a step. None: from the limit kernel.")
flags.DEFINE_float("rho", DEFAULT.rho, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", DEFAULT.beta, "Standard deviation of the random biases.")
flags.DEFINE_integer("kernel_size", DEFAULT.kernel_size, "Side of the CNN's filters, odd.")
flags.DEFINE_integer("draws", DEFAULT.draws, "Linear networks a depth, for the theory.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Floating-point type of the networks.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of split, initializations and draws.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/limit-convergence", "Folder for all results.")


def _config() -> LimitConfig:
    fields = dataclasses.fields(LimitConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    values["classes"] = parse_classes(FLAGS.classes)
    values["depths"] = command_line.listed("depths", int, "whole numbers like 100,1000")
    values["times"] = command_line.listed("times", float, "numbers like 10,30")
    return LimitConfig(**values)


def main() -> None:
    """Flags to configuration, then the experiment and a table of its powers of depth."""
    found = converge_to_limit(_config(), command_line.workdir(), resume=FLAGS.resume)
    for arch, comparison in found.items():
        for time, fit in zip(comparison.times, comparison.fits, strict=True):
            if fit is not None:
                interval = f"[{fit['low']:.3f}, {fit['high']:.3f}]"
                print(f"{arch} t={time:<8g} depth^{fit['exponent']:.3f} {interval}; theory -0.5")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
