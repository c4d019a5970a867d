"""Section 5.2: very deep narrow networks train, and the same networks otherwise initialized do not.

Figure 4.2 shows both architectures at one depth, with every initialization at every learning rate,
in the same axes. A row of table 4.1 is one long run, compared with the thesis's report and with
the infinitely deep network at the same kernel time. With a time budget, both experiments take as
many steps as fit and report what they left out.
"""

import dataclasses
import logging
import math
import os
import time
from typing import Any

from dnntk.data.datasets import Dataset
from dnntk.errors import Diverged
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.trainability_config import (
    EVALUATIONS,
    FIGURE,
    PRESETS,
    Preset,
    TrainabilityConfig,
    row_of,
    runs_of,
)
from dnntk.figures.trainability import row_figure, trainability_figure
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.runs import fields
from dnntk.runs.folder import RunFolder, as_json, metrics_line
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training.config import DEFAULT_STEPS, TrainConfig
from dnntk.training.forecast import forecast_on
from dnntk.training.run import load_dataset_for, train_on

__all__ = ["TrainabilityResult", "outcome", "trainability"]

log = logging.getLogger("dnntk")

ROWS_FILE = "rows.jsonl"
# Fraction of a budget reserved for evaluations, compilation and the limit.
OVERHEAD = 0.15


@dataclasses.dataclass(frozen=True)
class TrainabilityResult:
    """The result of `trainability`.

    Attributes:
        rows: a dict per run: losses, accuracies, steps, and its ``history``.
        summary: the content of summary.json, without the histories.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    __repr__ = fields.short_repr


@freeing_folders()
def trainability(
    config: TrainabilityConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> TrainabilityResult:
    """Train the runs of figure 4.2, or of a row of table 4.1.

    Args:
        config: the experiment; None is figure 4.2.
        workdir: folder for the configuration, a line per finished run, the summary and figures;
            None writes nothing.
        resume: keep the finished runs in ``workdir`` and continue the unfinished one.
        progress: show progress bars.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used.
    """
    config = config or TrainabilityConfig()
    settings = dataclasses.asdict(config)
    folder = ExperimentFolder(
        "trainability", settings, workdir, resume=resume, free=("budget_minutes",)
    )
    return (_Figure if config.preset == FIGURE else _Row)(config, folder, progress).result()


class _Experiment:
    def __init__(
        self, config: TrainabilityConfig, folder: ExperimentFolder, progress: bool
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.left_out: list[str] = []

    def write_config(self) -> None:
        """Write config.json, but not on resuming: a resumed run may have another budget."""
        if not self.folder.resumes:
            self.folder.write_config()

    def fitted(self, name: str, config: TrainConfig, data: Dataset, seconds: float) -> TrainConfig:
        """The run; if there is a budget, with no more steps than ``seconds`` allow.

        A run in closed form is left as it is.
        """
        if not self.config.budget_minutes or config.optimizer == "kernel":
            return config
        forecast = forecast_on(config, data)
        steps = max(1, int(seconds * (1 - OVERHEAD) / forecast.step_seconds))
        if steps >= forecast.steps:
            return config
        self.left_out.append(f"{name}: {steps:,} of {forecast.steps:,} steps")
        every = max(1, steps // EVALUATIONS)
        return dataclasses.replace(config, epochs=None, steps=steps, eval_every=every)

    def write(self, rows: list[dict[str, Any]], more: dict[str, Any]) -> TrainabilityResult:
        """Write the summary, return the result."""
        shown = [{k: v for k, v in row.items() if k != "history"} for row in rows]
        summary = self.folder.finish({"rows": shown, **more, "left_out": self.left_out})
        for line in self.left_out:
            log.info("left out for the budget: %s", line)
        return TrainabilityResult(rows, summary)


class _Figure(_Experiment):
    """Figure 4.2; each finished run is saved as a line: a killed experiment loses at most one."""

    def result(self) -> TrainabilityResult:
        done = {row["name"]: row for row in self.folder.rows(ROWS_FILE)}
        for row in done.values():
            row["history"] = [metrics_line(line) for line in row["history"]]
            self.folder.begun -= row["seconds"]
        runs = runs_of(self.config)
        data, steps = self._prepared(runs)
        self.write_config()
        rows = []
        with progress_bar(runs, desc="runs", unit="run", disable=not self.progress) as bar:
            for name, config in bar:
                bar.set_postfix_str(name)
                if name not in done:
                    count = steps[config.arch]
                    every = max(1, count // EVALUATIONS)
                    run = dataclasses.replace(config, steps=count, eval_every=every)
                    done[name] = outcome(name, run, data[config.arch], self.progress)
                    self.folder.append(ROWS_FILE, done[name])
                rows.append(done[name])
        found = self.write(rows, {})
        chance = {arch: _best_constant(data[arch]) for arch in self.config.archs}
        self.folder.draw("figure_4_2", trainability_figure, rows, chance)
        return found

    def _prepared(
        self, runs: list[tuple[str, TrainConfig]]
    ) -> tuple[dict[str, Dataset], dict[str, int]]:
        """Data and steps, the same for all runs of an architecture."""
        data, steps = {}, {}
        for arch in self.config.archs:
            mine = [config for _, config in runs if config.arch == arch]
            data[arch] = load_dataset_for(mine[0])
            seconds = 60 * self.config.budget_minutes / len(runs)
            name = f"{arch}, each of {len(mine)} runs"
            fitted = self.fitted(name, mine[0], data[arch], seconds)
            steps[arch] = fitted.steps or DEFAULT_STEPS
        return data, steps


def outcome(name: str, config: TrainConfig, data: Dataset, progress: bool) -> dict[str, Any]:
    """Train one run, return its row; a diverged run's row has the evaluations until then."""
    ended, begun = "finished", time.perf_counter()
    try:
        history = train_on(config, data, progress=progress).history
    except Diverged as diverged:
        ended, history = "diverged", diverged.history
    last = history[-1]
    return {
        "name": name,
        "arch": config.arch,
        "init": config.init,
        "lr": config.lr,
        "ended": ended,
        "steps": last["step"],
        "time": last["time"],
        "train_loss": last["train_loss"] if math.isfinite(last["train_loss"]) else None,
        "test_accuracy": last["test_accuracy"],
        "seconds": round(time.perf_counter() - begun, 1),
        "history": [as_json(line) for line in history if math.isfinite(line["train_loss"])],
    }


def _best_constant(data: Dataset) -> float:
    """The loss of the best constant prediction."""
    return float(0.5 * data.y_train.var(axis=0).sum())


class _Row(_Experiment):
    """A row of table 4.1; its run is saved in a folder of its own and can be resumed."""

    def result(self) -> TrainabilityResult:
        name = self.config.preset
        config, preset = row_of(self.config), PRESETS[name]
        data = load_dataset_for(config)
        self.write_config()
        (own, history), d_out = self._trained(config, data), data.y_train.shape[1]
        rows, curve = [], []
        if preset.test_accuracy is not None:
            rows.append(_line("thesis", preset.config.depth, preset))
        reached = Preset(config, 2 / d_out * own["train_loss"], own["test_accuracy"])
        taken = {key: own[key] for key in ("time", "steps", "seconds", "ended")}
        rows.append(_line("dnntk", config.depth, reached) | taken)
        if self.config.limit_examples and own["time"]:
            limit = predict(self._limit(config, own["time"], data), progress=self.progress)
            curve, chosen = limit.curve, limit.chosen
            predicted = Preset(config, limit.summary["train_mse"], chosen["test_accuracy"])
            rows.append(_line("infinitely deep", "infinite", predicted) | {"time": chosen["time"]})
        found = self.write(
            rows, {"preset": name} | {key: own[key] for key in ("steps", "test_accuracy")}
        )
        reported = preset.train_mse, preset.test_accuracy
        self.folder.draw("row", row_figure, history, curve, reported, d_out, name)
        return found

    def _trained(
        self, config: TrainConfig, data: Dataset
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(final results, evaluations) of the network; if it diverged, from before it diverged."""
        workdir, resume = self.folder.training()
        if workdir is not None and resume:
            # A resumed run keeps the length that it was started with.
            saved = TrainConfig.from_json(RunFolder(workdir).read_config())
            lengths = ("epochs", "steps", "eval_every")
            kept: dict[str, Any] = {key: getattr(saved, key) for key in lengths}
            config = dataclasses.replace(config, **kept)
        else:
            seconds = 60 * self.config.budget_minutes
            config = self.fitted(self.config.preset, config, data, seconds)
        try:
            found = train_on(config, data, workdir, resume=resume, progress=self.progress)
        except Diverged as diverged:
            log.warning("%s", diverged)
            history = [line for line in diverged.history if math.isfinite(line["train_loss"])]
            last = history[-1]
            own = {key: last[key] for key in ("test_accuracy", "time", "seconds")}
            own |= {"train_loss": last["train_loss"], "steps": last["step"], "ended": "diverged"}
            return own, history
        if resume:
            self.folder.begun -= max(
                0.0, found.summary["seconds"] - found.summary["sitting_seconds"]
            )
        return {**found.summary, "ended": "finished"}, found.history

    def _limit(self, config: TrainConfig, at: float, data: Dataset) -> PredictConfig:
        shared = ("arch", "kernel_size", "dataset", "classes", "data_dir", "pool", "seed")
        examples = self.config.limit_examples
        return PredictConfig(
            **{name: getattr(config, name) for name in shared},
            rho=(config.rho,),
            beta=(config.beta,),
            times=(at,),
            train_examples=0 if examples >= len(data.x_train) else examples,
        )


def _line(source: str, depth: int | str, found: Preset) -> dict[str, Any]:
    return {
        "source": source,
        "depth": depth,
        "train_mse": found.train_mse,
        "test_accuracy": found.test_accuracy,
    }
