r"""Depth or width? Deep narrow networks, wide shallow ones and their limits on the same images.

python scripts/depth_or_width.py
python scripts/depth_or_width.py --datasets=digits,mnist --data_dir=FOLDER
python scripts/depth_or_width.py --depths=30,100 --trials=2 --regime_scales=0
python scripts/depth_or_width.py --least_scale=0.1 --regime_time=300 --workdir=runs/regime
python scripts/depth_or_width.py --resume
"""

import dataclasses
from typing import Any

import command_line
from absl import flags
from command_line import words

from dnntk.experiments.depth_or_width.figure import DepthOrWidthConfig, compare
from dnntk.training.config import DTYPES

FLAGS = flags.FLAGS
DEFAULT = DepthOrWidthConfig()

flags.DEFINE_list("datasets", list(DEFAULT.datasets), "digits, mnist, fashion_mnist; ten classes.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: 4 for mnist, else 1.")
flags.DEFINE_integer("train_examples", None, "To train on, at most. None: 1000 digits, 2000 mnist.")
flags.DEFINE_integer("test_examples", DEFAULT.test_examples, "To test on, at most.")
flags.DEFINE_integer("probe_examples", DEFAULT.probe_examples, "Test images to see kernels on.")
flags.DEFINE_list("depths", words(DEFAULT.depths), "Deep networks; a wide one as large for each.")
flags.DEFINE_integer("trials", DEFAULT.trials, "Initializations of every network of part one.")
flags.DEFINE_integer("single_from", DEFAULT.single_from, "One initialization from this depth on.")
flags.DEFINE_list("times", words(DEFAULT.times), "Kernel times, multiples of the first.")
flags.DEFINE_float("small_scale", DEFAULT.small_scale, "C of the second rule; first: depth^2.2.")
flags.DEFINE_float("fraction", DEFAULT.fraction, "Step over 2/lambda_max: C = depth^2.2, wide.")
flags.DEFINE_float("moving_fraction", DEFAULT.moving_fraction, "The same where kernels may grow.")
flags.DEFINE_integer("regime_depth", DEFAULT.regime_depth, "Depth of part two.")
flags.DEFINE_float("regime_time", DEFAULT.regime_time, "Kernel time of part two.")
flags.DEFINE_integer("regime_batch_size", DEFAULT.regime_batch_size, "Its batches; 0: everything.")
flags.DEFINE_integer("regime_scales", DEFAULT.regime_scales, "C of part two; 0 leaves it out.")
flags.DEFINE_float("least_scale", DEFAULT.least_scale, "The smallest C of part two.")
flags.DEFINE_integer("regime_trials", DEFAULT.regime_trials, "Initializations of part two.")
flags.DEFINE_float("rho", DEFAULT.rho, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", DEFAULT.beta, "Standard deviation of the random biases.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Floating-point type of the networks.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of the split and of the first initialization.")
flags.DEFINE_bool("resume", False, "Keep the networks in the workdir and go on with the rest.")
flags.DEFINE_string("workdir", "runs/depth-or-width", "Folder for all results.")


def _config() -> DepthOrWidthConfig:
    fields = dataclasses.fields(DepthOrWidthConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    values["datasets"] = command_line.listed("datasets", str, "names like digits,mnist")
    values["depths"] = command_line.listed("depths", int, "whole numbers like 30,100")
    values["times"] = command_line.listed("times", float, "numbers like 1,2,10")
    return DepthOrWidthConfig(**values)


def main() -> None:
    """Flags to configuration, then the experiment and what it says."""
    found = compare(_config(), command_line.workdir(), resume=FLAGS.resume)
    for statement in found.statements:
        print(statement)
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
