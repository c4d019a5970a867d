r"""Where the thesis's printed theorems are wrong: printed, corrected and measured kernels.

python scripts/errata.py
python scripts/errata.py --depth=4000 --networks=20
"""

import dataclasses
from typing import Any

import command_line
from absl import flags

from dnntk.experiments.errata import ErrataConfig, errata

FLAGS = flags.FLAGS
DEFAULT = ErrataConfig()

flags.DEFINE_integer("depth", DEFAULT.depth, "Weight layers of the measured networks.")
flags.DEFINE_integer("networks", DEFAULT.networks, "Initializations a statement.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of inputs and initializations.")
flags.DEFINE_string("workdir", "runs/errata", "Folder for all results.")


def main() -> None:
    """Flags to configuration, then a line a statement."""
    fields = dataclasses.fields(ErrataConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    rows = errata(ErrataConfig(**values), command_line.workdir())
    for row in rows:
        print(
            f"{row['statement']} ({row['setting']}): printed {row['printed']:.4g}, corrected "
            f"{row['corrected']:.4g}, measured {row['measured']:.4g} +- {row['standard_error']:.2g}"
        )
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
