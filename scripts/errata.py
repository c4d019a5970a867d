r"""Where the thesis's printed theorems are wrong: printed, corrected and measured kernels.

python scripts/errata.py
python scripts/errata.py --depth=4000 --networks=20
"""

import command_line
from absl import flags

from dnntk.experiments.errata import ErrataConfig, errata

FLAGS = flags.FLAGS

command_line.define(ErrataConfig)
flags.DEFINE_string("workdir", "runs/errata", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print one line per statement."""
    rows = errata(command_line.from_flags(ErrataConfig), command_line.workdir())
    for row in rows:
        print(
            f"{row['statement']} ({row['setting']}): printed {row['printed']:.4g}, corrected "
            f"{row['corrected']:.4g}, measured {row['measured']:.4g} +- {row['standard_error']:.2g}"
        )
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)
