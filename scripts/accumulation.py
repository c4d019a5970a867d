r"""Section 5.3, figure 5.1: how the layers of a trained network build up its output.

python scripts/accumulation.py
python scripts/accumulation.py --depth=100 --scale=5 --workdir=runs/accumulation-depth100
python scripts/accumulation.py --dataset=digits --depth=1000 --steps=300 --workdir=runs/digits
python scripts/accumulation.py --resume
"""

import dataclasses
from typing import Any

import command_line
from absl import flags

from dnntk.data.datasets import DATASETS
from dnntk.experiments.accumulation import AccumulationConfig, accumulate
from dnntk.training.config import ARCHITECTURES, DTYPES, parse_classes

FLAGS = flags.FLAGS
DEFAULT = AccumulationConfig()

flags.DEFINE_enum("arch", DEFAULT.arch, ARCHITECTURES, "Architecture.")
flags.DEFINE_integer("depth", DEFAULT.depth, "Weight layers, at least 2.")
flags.DEFINE_float("scale", None, "C, may be inf. None: the thesis's, depth^2/2000.")
flags.DEFINE_enum("dataset", DEFAULT.dataset, DATASETS, "Data; toy and digits need no download.")
flags.DEFINE_string("classes", "0,1", "Classes to tell apart, or 'all'.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: 4 for mnist, else 1.")
flags.DEFINE_integer("train_examples", DEFAULT.train_examples, "Examples to train on, at most.")
flags.DEFINE_integer("steps", DEFAULT.steps, "Full-batch steps.")
flags.DEFINE_float("time_step", None, "Kernel time a step. None: 0.5 for toy, else of the kernel.")
flags.DEFINE_float("rho", DEFAULT.rho, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", DEFAULT.beta, "Standard deviation of the random biases.")
flags.DEFINE_integer("kernel_size", DEFAULT.kernel_size, "Side of the CNN's filters, odd.")
flags.DEFINE_integer("points", DEFAULT.points, "Held-out inputs to follow through the layers.")
flags.DEFINE_integer("output", DEFAULT.output, "Which output, from 0; -1 is the rightmost neuron.")
flags.DEFINE_integer("draws", DEFAULT.draws, "Random units, for the predicted distribution.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Floating-point type of training.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of split, initialization and draws.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", "runs/accumulation", "Folder for all results.")


def _config() -> AccumulationConfig:
    fields = dataclasses.fields(AccumulationConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    values["classes"] = parse_classes(FLAGS.classes)
    return AccumulationConfig(**values)


def main() -> None:
    """Flags to configuration, then the experiment."""
    accumulate(_config(), command_line.workdir(), resume=FLAGS.resume)
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
