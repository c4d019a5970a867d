r"""Predict what an infinitely deep network learns, without training one.

python scripts/predict.py
python scripts/predict.py --compare=runs/mlp-digits-depth1000
python scripts/predict.py --dataset=mnist --arch=cnn --rho=0.57735 --times=4000
python scripts/predict.py --dataset=mnist --pool=1 --classes=all --dry_run
"""

import command_line
from absl import flags

from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.forecast import forecast
from dnntk.infinite_depth.prediction import predict
from dnntk.infinite_depth.trained_run import TrainedRun
from dnntk.runtime import processes

FLAGS = flags.FLAGS

command_line.define(PredictConfig)
flags.DEFINE_string("compare", None, "Workdir of a trained run: its data, kernel and curve.")
command_line.define_processes()
flags.DEFINE_bool("dry_run", False, "Print the memory and time that the run would take, and end.")
flags.DEFINE_bool("resume", False, "Go on with the run in the workdir.")
flags.DEFINE_string("workdir", None, "Folder for all results. None: a new one under runs/.")


def _config() -> PredictConfig:
    values = command_line.values(PredictConfig)
    if FLAGS.compare is None:
        return PredictConfig(**values)
    trained = TrainedRun(FLAGS.compare)
    trained.check_data(None)
    settled = trained.predicted_fields
    values |= {name: value for name, value in settled.items() if not FLAGS[name].present}
    return trained.fill_times(PredictConfig(**values))


def main() -> None:
    """Predict as the flags describe."""
    if FLAGS.resume and FLAGS.workdir is None:
        raise InputError("resume: expected the --workdir to go on with, got none; give it")
    config = _config()
    if FLAGS.dry_run:
        report = forecast(config)
        if processes.is_primary():
            print(report)
        return
    stem = f"predict-{config.arch}-{config.dataset}"
    workdir = command_line.workdir(lambda: command_line.new_workdir(stem))
    predict(config, workdir, compare=FLAGS.compare, resume=FLAGS.resume)
    if processes.is_primary():
        print(f"results: {workdir}")


if __name__ == "__main__":
    command_line.run(main)
