r"""Section 5.2: very deep narrow networks train, where the same networks otherwise do not.

python scripts/trainability.py
python scripts/trainability.py --optimizer=adam --scale=1 --pool=4 --steps=300
python scripts/trainability.py --data_dir=FOLDER --budget_minutes=60
python scripts/trainability.py --preset=mlp-4000 --pool=4 --budget_minutes=120
python scripts/trainability.py --preset=cnn-1000-small-c --data_dir=FOLDER
python scripts/trainability.py --preset=cnn-20000-binary --resume
"""

import dataclasses
from pathlib import Path
from typing import Any

import command_line
from absl import flags
from command_line import words

from dnntk.data.datasets import DATASETS
from dnntk.experiments.trainability import trainability
from dnntk.experiments.trainability_config import FIGURE, PRESETS, TrainabilityConfig
from dnntk.training.config import DTYPES, OPTIMIZERS

FLAGS = flags.FLAGS
DEFAULT = TrainabilityConfig()

flags.DEFINE_enum("preset", FIGURE, (FIGURE, *PRESETS), "Figure 4.2, or a row of table 4.1.")
flags.DEFINE_enum("dataset", DEFAULT.dataset, DATASETS, "Data; digits needs no download.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: the preset's, 1 or 4.")
flags.DEFINE_integer("depth", None, "Weight layers. None: the preset's.")
flags.DEFINE_float("scale", None, "C. None: the preset's.")
flags.DEFINE_float("rho", None, "Standard deviation of the random weights. None: the preset's.")
flags.DEFINE_float("beta", None, "Standard deviation of the random biases. None: the preset's.")
flags.DEFINE_float("time_step", None, "Of a row, in kernel time. None: the preset's.")
flags.DEFINE_integer("epochs", None, "Passes over the data of a row. None: the preset's.")
flags.DEFINE_list("archs", list(DEFAULT.archs), "Architectures of the figure.")
flags.DEFINE_list("inits", list(DEFAULT.inits), "Initializations of the figure.")
flags.DEFINE_list("rates", words(DEFAULT.rates), "Learning rates of the figure.")
flags.DEFINE_enum("optimizer", DEFAULT.optimizer, OPTIMIZERS, "Of the figure's runs.")
flags.DEFINE_integer("steps", DEFAULT.steps, "Steps of each of the figure's runs.")
flags.DEFINE_integer("batch_size", None, "Examples a step; 0 is all. None: the preset's, or 512.")
flags.DEFINE_integer("shift", None, "Pixels that images are moved by, at most. None: the preset's.")
flags.DEFINE_float("budget_minutes", 0.0, "For the whole: run what fits. 0: no limit.")
flags.DEFINE_integer("limit_examples", DEFAULT.limit_examples, "Of a row's limit; 0: no limit.")
flags.DEFINE_integer("eval_examples", 0, "Of each split, at most. 0: 2048; at the end all.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Floating-point type.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of split, initialization and shuffle.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: runs/trainability-PRESET.")


def _config() -> TrainabilityConfig:
    fields = dataclasses.fields(TrainabilityConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    for name in ("archs", "inits"):
        values[name] = command_line.listed(name, str, "names")
    values["rates"] = command_line.listed("rates", float, "numbers like 1e-5,0.01,1")
    return TrainabilityConfig(**values)


def main() -> None:
    """Flags to configuration, then the experiment and a table of its runs."""
    workdir = command_line.workdir(lambda: Path(f"runs/trainability-{FLAGS.preset}"))
    found = trainability(_config(), workdir, resume=FLAGS.resume)
    for row in found.summary["rows"]:
        named = ((key, value) for key, value in row.items() if value is not None)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in named)
        print(", ".join(shown))
    print(f"results: {workdir}")


if __name__ == "__main__":
    command_line.run(main)
