r"""Section 5.2: very deep narrow networks train, where the same networks otherwise do not.

python scripts/trainability.py
python scripts/trainability.py --optimizer=adam --scale=1 --pool=4 --steps=300
python scripts/trainability.py --data_dir=FOLDER --budget_minutes=60
python scripts/trainability.py --preset=mlp-4000 --pool=4 --budget_minutes=120
python scripts/trainability.py --preset=cnn-1000-small-c --data_dir=FOLDER
python scripts/trainability.py --preset=cnn-12000-binary --limit_examples=12665
python scripts/trainability.py --preset=cnn-20000-binary --resume
"""

from pathlib import Path

import command_line
from absl import flags

from dnntk.experiments.trainability import trainability
from dnntk.experiments.trainability_config import FIGURE, PRESETS, TrainabilityConfig
from dnntk.training.config import DESCENTS

FLAGS = flags.FLAGS

command_line.define(TrainabilityConfig, preset=(FIGURE, *PRESETS), optimizer=DESCENTS)
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: runs/trainability-PRESET.")


def main() -> None:
    """Run the experiment that the flags describe, and print a table of its runs."""
    workdir = command_line.workdir(lambda: Path(f"runs/trainability-{FLAGS.preset}"))
    found = trainability(command_line.from_flags(TrainabilityConfig), workdir, resume=FLAGS.resume)
    for row in found.summary["rows"]:
        named = ((key, value) for key, value in row.items() if value is not None)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in named)
        print(", ".join(shown))
    print(f"results: {workdir}")


if __name__ == "__main__":
    command_line.run(main)
