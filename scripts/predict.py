r"""Predict what an infinitely deep network learns, without training one.

python scripts/predict.py
python scripts/predict.py --compare=runs/mlp-digits-depth1000
python scripts/predict.py --dataset=mnist --arch=cnn --rho=0.57735 --times=4000
python scripts/predict.py --dataset=mnist --pool=1 --classes=all --dry_run
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import command_line
from absl import flags
from command_line import words

from dnntk.data.datasets import DATASETS
from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.forecast import forecast
from dnntk.infinite_depth.kernel_flow import SOLVERS
from dnntk.infinite_depth.prediction import predict
from dnntk.infinite_depth.trained_run import TrainedRun
from dnntk.runtime import processes
from dnntk.training.config import ARCHITECTURES, DTYPES, parse_classes

FLAGS = flags.FLAGS
DEFAULT = PredictConfig()

flags.DEFINE_enum("arch", DEFAULT.arch, ARCHITECTURES, "Architecture.")
flags.DEFINE_integer("kernel_size", DEFAULT.kernel_size, "Side of the CNN's filters, odd.")
flags.DEFINE_enum("dataset", DEFAULT.dataset, DATASETS, "Data; digits needs no download.")
flags.DEFINE_string("classes", "0,1", "Classes to tell apart, or 'all'.")
flags.DEFINE_string("data_dir", None, "Folder of raw IDX files or of prepared tfds sets.")
flags.DEFINE_integer("pool", None, "Side of the average pool. None: 4 for mnist, else 1.")
flags.DEFINE_list("rho", words(DEFAULT.rho), "Deviations of the weights; the best is chosen.")
flags.DEFINE_list("beta", words(DEFAULT.beta), "Deviations of the biases; the best is chosen.")
flags.DEFINE_list(
    "times", None, "Kernel times to report, like 1,inf. None: 1 to 1e5, or the run's."
)
flags.DEFINE_float("ridge", DEFAULT.ridge, "Weight decay, in units of eigenvalues of K/N.")
flags.DEFINE_integer("validation", 0, "Examples held out to choose by. 0: a tenth if needed.")
flags.DEFINE_integer("search_examples", DEFAULT.search_examples, "Most to choose rho, beta with.")
flags.DEFINE_integer("train_examples", 0, "Training examples; 0 is all.")
flags.DEFINE_enum("solver", DEFAULT.solver, SOLVERS, "How the Gram matrix is worked with.")
flags.DEFINE_float("tolerance", DEFAULT.tolerance, "Of the solver's relative residual.")
flags.DEFINE_integer("block_size", DEFAULT.block_size, "Examples along a block's side.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, DTYPES, "Type in which the kernel is evaluated.")
flags.DEFINE_float("memory_gb", None, "For Gram matrix and basis. None: 3/4 of the machine's.")
flags.DEFINE_string("gram_dir", None, "Folder where the Gram matrix is kept and found again.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Seed of the splits.")
flags.DEFINE_string("compare", None, "Workdir of a trained run: its data, kernel and curve.")
command_line.define_processes()
flags.DEFINE_bool("dry_run", False, "Say what the run would take, and end.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: a new one under runs/.")


def _config() -> PredictConfig:
    fields = dataclasses.fields(PredictConfig)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    for name in ("rho", "beta", *["times"] * FLAGS["times"].present):
        values[name] = command_line.listed(name, float, "numbers like 1,100")
    values["classes"] = parse_classes(FLAGS.classes)
    if FLAGS.compare is None:
        return PredictConfig(**values)
    trained = TrainedRun(FLAGS.compare)
    trained.check_data(None)
    settled = trained.predicted_fields
    values |= {name: value for name, value in settled.items() if not FLAGS[name].present}
    return trained.fill_times(PredictConfig(**values))


def _new_workdir(config: PredictConfig) -> Path:
    stem = f"predict-{config.arch}-{config.dataset}"
    suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    names = (Path("runs") / (stem + suffix) for suffix in suffixes)
    return next(name for name in names if not name.exists())


def main() -> None:
    """Flags to configuration, then predict."""
    if FLAGS.resume and FLAGS.workdir is None:
        raise InputError("resume: expected the --workdir to go on with, got none; give it")
    config = _config()
    if FLAGS.dry_run:
        told = forecast(config)
        if processes.is_primary():
            print(told)
        return
    workdir = command_line.workdir(lambda: _new_workdir(config))
    predict(config, workdir, compare=FLAGS.compare, resume=FLAGS.resume)
    if processes.is_primary():
        print(f"results: {workdir}")


if __name__ == "__main__":
    command_line.run(main)
