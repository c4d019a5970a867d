r"""Figures 3.1 and 3.2: what is a deep narrow network initialized to?

python scripts/initialization.py
python scripts/initialization.py --arch=mlp --d_in=2 --d_out=1 --depth=100 --workdir=runs/deep
python scripts/initialization.py --arch=cnn --channels=3 --d_out=2 --workdir=runs/colours
python scripts/initialization.py --init=he_uniform --workdir=runs/he
"""

import dataclasses
from typing import Any

import command_line
from absl import flags

from dnntk.experiments.initialization import InitializationConfig, initialize
from dnntk.networks.initializers import INITS
from dnntk.training.config import ARCHITECTURES

FLAGS = flags.FLAGS
DEFAULT = InitializationConfig()

flags.DEFINE_enum("arch", DEFAULT.arch, (*ARCHITECTURES, "both"), "Architecture.")
flags.DEFINE_integer("d_in", DEFAULT.d_in, "Inputs of the MLP.")
flags.DEFINE_integer("d_out", DEFAULT.d_out, "Outputs. None: 2 of the MLP, 1 of the CNN.")
flags.DEFINE_integer("height", DEFAULT.height, "Height of the CNN's image, in pixels.")
flags.DEFINE_integer("width", DEFAULT.width, "Width of the CNN's image, in pixels.")
flags.DEFINE_integer("channels", DEFAULT.channels, "Channels of the CNN's image.")
flags.DEFINE_integer("kernel_size", DEFAULT.kernel_size, "Side of the CNN's filters, odd.")
flags.DEFINE_integer("depth", DEFAULT.depth, "Weight layers; of more than 7, some are dots.")
flags.DEFINE_float("scale", DEFAULT.scale, "C, other than 1. None: depth^2.2.")
flags.DEFINE_float("rho", DEFAULT.rho, "Standard deviation of the random weights.")
flags.DEFINE_float("beta", DEFAULT.beta, "Standard deviation of the random biases.")
flags.DEFINE_enum("init", DEFAULT.init, INITS, "Initialization to draw.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of the parameters and of the example.")
flags.DEFINE_bool("resume", False, "Draw the networks in the workdir again.")
flags.DEFINE_string("workdir", "runs/initialization", "Folder for all results.")


def _config() -> InitializationConfig:
    fields = dataclasses.fields(InitializationConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    return InitializationConfig(**values)


def main() -> None:
    """Flags to configuration, then the figures and a table of the styles in them."""
    found = initialize(_config(), command_line.workdir(), resume=FLAGS.resume)
    for arch, network in found.items():
        summary = network.summary()
        for kind in ("lines", "boxes"):
            for style, of in summary[kind].items():
                print(f"{arch} {kind} {style:14} {of['means']:14} {of['count']:>8,}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
