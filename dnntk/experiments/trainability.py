"""Section 5.2: very deep narrow networks train, and the same networks otherwise initialized do not.

Figure 4.2 is one depth, both architectures, every initialization at every learning rate, in the
same axes. A row of table 4.1 is one long run, beside what the thesis reports and
what the infinitely deep network would give at the same kernel time. Either takes as many steps as
fit a budget, and says what it left out.
"""

import dataclasses
import logging
import math
import os
import time
from typing import Any

from tqdm.auto import tqdm

from dnntk.checks import check_choice, check_count
from dnntk.config import ARCHITECTURES, DEFAULT_STEPS, TrainConfig
from dnntk.data import Dataset
from dnntk.errors import Diverged, InputError
from dnntk.experiments.forecast import forecast
from dnntk.experiments.predict_config import PredictConfig
from dnntk.experiments.prediction import predict
from dnntk.experiments.training import load_dataset_for, train
from dnntk.figures import save
from dnntk.figures.trainability import row_figure, trainability_figure
from dnntk.initializers import INITS
from dnntk.results import CONFIG, SUMMARY, RunFolder, as_json, peak_memory_bytes, versions

log = logging.getLogger("dnntk")

ROWS_FILE = "rows.jsonl"
FIGURE = "figure-4.2"
EVALUATIONS = 24
# Of a budget, what evaluations, compilation and the limit take.
OVERHEAD = 0.15


@dataclasses.dataclass(frozen=True)
class Preset:
    """A long run, and what the thesis reports of it (None where it is not the thesis's).

    ``train_mse`` is the mean over examples and outputs, as the published code has it: 2 / d_out
    times the loss.
    """

    config: TrainConfig
    train_mse: float | None = None
    test_accuracy: float | None = None


def _row(lr: float, d_out: int, scale: float, **fields: Any) -> TrainConfig:
    # The published gradient is 2 / d_out times the thesis's.
    step = lr * fields["depth"] * scale**2 * 2 / d_out
    return TrainConfig(dataset="mnist", scale=scale, time_step=step, **fields)


PRESETS = {
    "mlp-4000": Preset(
        _row(1e-5, 10, 4.0, arch="mlp", depth=4000, classes="all", pool=1, epochs=1500),
        0.0055,
        0.9748,
    ),
    "cnn-4000": Preset(
        _row(1e-5, 10, 4.0, arch="cnn", depth=4000, classes="all", rho=3**-0.5, epochs=2000),
        0.014578,
        0.9402,
    ),
    "cnn-20000-binary": Preset(
        _row(1e-8, 1, 20.0, arch="cnn", depth=20_000, rho=3**-0.5, epochs=1000), 0.031257, 0.9887
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainabilityConfig:
    """Figure 4.2, or a row of table 4.1.

    Attributes:
      preset: "figure-4.2" or one of `PRESETS`.
      dataset, data_dir, pool: as in `TrainConfig`; None for ``pool`` is the preset's own, which is
        28 x 28 for the thesis's MLPs and 7 x 7 for its CNNs.
      depth, scale, rho, beta, epochs: None is the preset's own. The figure's are depth 1000, the
        table's C = 4, rho = 1 (CNN: 1/sqrt 3) and beta = 1.
      archs: of the figure.
      inits: of the figure.
      rates: learning rates of the figure, on the literal matrices; "deep_narrow" is run with the
        step that its kernel allows besides.
      steps: of each of the figure's runs.
      batch_size: examples a step.
      budget_minutes: for the whole; 0 is no limit.
      limit_examples: training examples of the limit that a row is set beside, at most; 0 leaves
        the limit out.
      eval_examples: as in `TrainConfig`.
      dtype, seed: as in `TrainConfig`.

    Raises:
      InputError: a value is not as above.
    """

    preset: str = FIGURE
    dataset: str = "mnist"
    data_dir: str | None = None
    pool: int | None = None
    depth: int | None = None
    scale: float | None = None
    rho: float | None = None
    beta: float | None = None
    epochs: int | None = None
    archs: tuple[str, ...] = ARCHITECTURES
    inits: tuple[str, ...] = INITS
    rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
    steps: int = 500
    batch_size: int = 512
    budget_minutes: float = 0.0
    limit_examples: int = 4000
    eval_examples: int = 0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check everything that needs no data."""
        check_choice("preset", self.preset, (FIGURE, *PRESETS))
        for name, values, allowed in (
            ("archs", self.archs, ARCHITECTURES),
            ("inits", self.inits, INITS),
        ):
            if not values:
                raise InputError(f"{name}: expected some of {', '.join(allowed)}, got none")
            for value in values:
                check_choice(name, value, allowed)
        if not all(0 < rate < math.inf for rate in self.rates):
            raise InputError(f"rates: expected finite numbers above 0, got {self.rates}")
        check_count("steps", self.steps)
        if self.limit_examples < 0:
            raise InputError(f"limit_examples: expected a number >= 0, got {self.limit_examples}")
        if not 0 <= self.budget_minutes < math.inf:
            raise InputError(f"budget_minutes: expected a number >= 0, got {self.budget_minutes}")
        # The runs' own checks, before anything is computed.
        _ = [config for _, config in runs_of(self)] if self.preset == FIGURE else row_of(self)

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        fields: dict[str, Any] = as_json(dataclasses.asdict(self))
        return fields


def _given(config: TrainabilityConfig, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


_SHARED = ("dataset", "data_dir", "batch_size", "eval_examples", "dtype", "seed")
_OWN = ("pool", "depth", "scale", "rho", "beta")


def row_of(config: TrainabilityConfig) -> TrainConfig:
    """The run of a row of table 4.1; another depth or C keeps the step in kernel time."""
    own = _given(config, (*_SHARED, *_OWN, "epochs"))
    return dataclasses.replace(PRESETS[config.preset].config, **own)


def runs_of(config: TrainabilityConfig) -> list[tuple[str, TrainConfig]]:
    """All runs of figure 4.2 by name, those without a rate of their own first."""
    found = []
    for arch in config.archs:
        fields: dict[str, Any] = {"depth": 1000, "scale": 4.0, "classes": "all"}
        fields |= {"rho": 3**-0.5} if arch == "cnn" else {}
        if config.pool is None and config.dataset != "digits" and arch == "mlp":
            fields["pool"] = 1
        fields |= _given(config, (*_SHARED, *_OWN)) | {"arch": arch, "steps": config.steps}
        fields["eval_every"] = max(1, config.steps // EVALUATIONS)
        if "deep_narrow" in config.inits:
            found.append((f"{arch} deep_narrow", TrainConfig(**fields)))
        for init in config.inits:
            # Matrices as they are: there is no scale, and a learning rate is one.
            form = {} if init == "deep_narrow" else {"parametrization": "standard", "scale": 1.0}
            for rate in config.rates:
                values = fields | form | {"init": init, "lr": rate}
                found.append((f"{arch} {init} lr={rate:g}", TrainConfig(**values)))
    return found


@dataclasses.dataclass(frozen=True)
class TrainabilityResult:
    """What was trained.

    Attributes:
      rows: a dict a run: losses, accuracies, steps, and its ``history``.
      summary: the content of summary.json, without the histories.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def trainability(
    config: TrainabilityConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> TrainabilityResult:
    """Figure 4.2, or a row of table 4.1.

    Args:
      config: which, and how; None is figure 4.2.
      workdir: folder for the configuration, a line a finished run, the summary and figures; None
        writes nothing.
      resume: keep the runs that are finished in ``workdir``, go on with one that is not.
      progress: show progress bars.

    Raises:
      InputError: the configuration, the data or the workdir cannot be used.
    """
    config = config or TrainabilityConfig()
    folder = None if workdir is None else RunFolder(workdir)
    if folder is not None:
        folder.claim(config.to_json(), resume, free=("budget_minutes",))
        if not resume:
            folder.write_json(CONFIG, {**config.to_json(), "versions": versions()})
    run = _Figure if config.preset == FIGURE else _Row
    return run(config, folder, progress, resume).result()


class _Experiment:
    def __init__(
        self, config: TrainabilityConfig, folder: RunFolder | None, progress: bool, resume: bool
    ) -> None:
        self.config, self.folder, self.progress, self.resume = config, folder, progress, resume
        self.begun = time.perf_counter()
        self.left_out: list[str] = []

    def fitted(self, name: str, config: TrainConfig, data: Dataset, seconds: float) -> TrainConfig:
        """The run with as many steps as its share of the budget allows."""
        if not self.config.budget_minutes:
            return config
        told = forecast(config, dataset=data)
        steps = max(1, int(seconds * (1 - OVERHEAD) / told.step_seconds))
        if steps >= told.steps:
            return config
        self.left_out.append(f"{name}: {steps:,} of {told.steps:,} steps")
        every = max(1, steps // EVALUATIONS)
        return dataclasses.replace(config, epochs=None, steps=steps, eval_every=every)

    def write(self, rows: list[dict[str, Any]], more: dict[str, Any]) -> TrainabilityResult:
        """Summary and result."""
        shown = [{k: v for k, v in row.items() if k != "history"} for row in rows]
        summary: dict[str, Any] = {
            "rows": shown,
            **more,
            "left_out": self.left_out,
            "seconds": round(time.perf_counter() - self.begun, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
        }
        if self.folder is not None:
            self.folder.write_json(SUMMARY, as_json(summary))
        for line in self.left_out:
            log.info("left out for the budget: %s", line)
        return TrainabilityResult(rows, summary)


class _Figure(_Experiment):
    """Figure 4.2: a line a finished run, so that a killed experiment loses one run at most."""

    def result(self) -> TrainabilityResult:
        held = self.folder.keep_lines(ROWS_FILE) if self.folder and self.resume else []
        done = {row["name"]: row for row in held}
        runs = runs_of(self.config)
        data, steps = self._prepared(runs)
        rows = []
        with tqdm(runs, desc="runs", unit="run", disable=not self.progress) as bar:
            for name, config in bar:
                bar.set_postfix_str(name)
                if name not in done:
                    fields = {"steps": steps[config.arch]}
                    fields["eval_every"] = max(1, fields["steps"] // EVALUATIONS)
                    run = dataclasses.replace(config, **fields)
                    done[name] = outcome(name, run, data[config.arch], self.progress)
                    if self.folder is not None:
                        self.folder.append(ROWS_FILE, done[name])
                rows.append(done[name])
        found = self.write(rows, {})
        if self.folder is not None:
            chance = {arch: _best_constant(data[arch]) for arch in self.config.archs}
            save(trainability_figure(rows, chance), self.folder.path / "figure_4_2")
        return found

    def _prepared(
        self, runs: list[tuple[str, TrainConfig]]
    ) -> tuple[dict[str, Dataset], dict[str, int]]:
        """Data and steps, the same for all runs of an architecture."""
        data, steps = {}, {}
        for arch in self.config.archs:
            mine = [config for _, config in runs if config.arch == arch]
            data[arch] = load_dataset_for(mine[0])
            share = 60 * self.config.budget_minutes / len(runs)
            name = f"{arch}, each of {len(mine)} runs"
            fitted = self.fitted(name, mine[0], data[arch], share)
            steps[arch] = fitted.steps or DEFAULT_STEPS
        return data, steps


def outcome(name: str, config: TrainConfig, data: Dataset, progress: bool) -> dict[str, Any]:
    """A finished run as a row; one that diverged has the evaluations until then."""
    ended, begun = "finished", time.perf_counter()
    try:
        history = train(config, dataset=data, progress=progress).history
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
        "train_loss": last["loss"] if math.isfinite(last["loss"]) else None,
        "test_accuracy": last["test_accuracy"],
        "seconds": round(time.perf_counter() - begun, 1),
        "history": [as_json(line) for line in history if math.isfinite(line["loss"])],
    }


def _best_constant(data: Dataset) -> float:
    """The loss of the best answer that does not look at the input."""
    return float(0.5 * data.y_train.var(axis=0).sum())


class _Row(_Experiment):
    """A row of table 4.1: the run in a folder of its own, which resumes it."""

    def result(self) -> TrainabilityResult:
        config, preset = row_of(self.config), PRESETS[self.config.preset]
        data = load_dataset_for(config)
        held = RunFolder(self.folder.path / "training") if self.folder else None
        resume = held is not None and held.holds_run
        if held is not None and resume:
            # A run keeps the length that it was begun with.
            saved = TrainConfig.from_json(held.read_config())
            run = dataclasses.replace(config, epochs=saved.epochs, steps=saved.steps)
            run = dataclasses.replace(run, eval_every=saved.eval_every)
        else:
            run = self.fitted(self.config.preset, config, data, 60 * self.config.budget_minutes)
        workdir = None if held is None else held.path
        trained = train(run, workdir, dataset=data, resume=resume, progress=self.progress)
        last, d_out = trained.summary, data.y_train.shape[1]
        rows = [
            _line("thesis", PRESETS[self.config.preset].config.depth, None, preset.train_mse,
                  preset.test_accuracy),
            _line("dnntk", config.depth, last["time"], 2 / d_out * last["train_loss"],
                  last["test_accuracy"], steps=last["steps"], seconds=last["seconds"]),
        ]  # fmt: skip
        curve = []
        if self.config.limit_examples and last["time"] is not None:
            limit = predict(self._limit(config, last["time"]), progress=self.progress)
            curve, chosen = limit.curve, limit.chosen
            rows.append(
                _line("infinitely deep", "infinite", chosen["time"], chosen["train_mse"],
                      chosen["test_accuracy"])
            )  # fmt: skip
        found = self.write(
            rows, {"preset": self.config.preset, "test_accuracy": rows[1]["test_accuracy"]}
        )
        if self.folder is not None:
            reported = preset.train_mse, preset.test_accuracy
            figure = row_figure(trained.history, curve, reported, d_out, self.config.preset)
            save(figure, self.folder.path / "row")
        return found

    def _limit(self, config: TrainConfig, at: float) -> PredictConfig:
        shared = ("arch", "kernel_size", "dataset", "classes", "data_dir", "pool", "seed")
        return PredictConfig(
            **{name: getattr(config, name) for name in shared},
            rho=(config.rho,),
            beta=(config.beta,),
            times=(at,),
            train_examples=self.config.limit_examples,
        )


def _line(
    source: str,
    depth: int | str,
    at: float | None,
    train_mse: float | None,
    test_accuracy: float | None,
    **more: Any,
) -> dict[str, Any]:
    named = {"source": source, "depth": depth, "time": at, "train_mse": train_mse}
    return named | {"test_accuracy": test_accuracy} | more
