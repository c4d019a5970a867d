"""The outcome of training, without training: the infinitely deep network on a dataset.

`predict` is the library call behind ``scripts/predict.py``. It chooses rho, beta and the time on a
validation split where there are several values, follows kernel gradient flow of the limit kernel on
all training examples (Theorems 3.3 and 4.3), and compares the curve with that of a trained network
if there is one.
"""

import dataclasses
import json
import logging
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dnntk import figures
from dnntk.data.datasets import Dataset
from dnntk.data.labels import class_targets
from dnntk.data.own_data import check_same, own_dataset, record, warn_of_negative
from dnntk.errors import InputError
from dnntk.figures.attribution import Decision
from dnntk.infinite_depth.attribution import decisions
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.cross_kernel import Kernel
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.selection import (
    Selection,
    evidence_scores,
    leave_one_out_scores,
    solvable_times,
    validation_scores,
)
from dnntk.infinite_depth.trained_run import SCORES, TrainedRun, log_comparison
from dnntk.kernel import limit_ntk
from dnntk.runs import fields
from dnntk.runs.folder import SUMMARY, RunFolder, as_json, peak_memory_bytes, versions
from dnntk.runs.locks import freeing_folders
from dnntk.runs.paths import as_path
from dnntk.runtime import processes
from dnntk.runtime.log_lines import printed_lines
from dnntk.training.evaluation import (
    as_trained,
    confusion,
    described,
    mean_squared_error,
    split_scores,
)
from dnntk.training.run import load_dataset_for

__all__ = ["PredictResult", "Prediction", "predict"]

CURVE_POINTS = 41
CURVE_SPAN = 1e4  # the curve begins this factor before the last finite time
SOLVER_FACTS = ("converged", "residual", "iterations", "condition", "solver")

# Fields that a resumed run may change: they do not change its numbers.
FREE = ("solver", "block_size", "memory_gb", "gram_dir")

log = logging.getLogger("dnntk")


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """The predictions of the infinitely deep network.

    Attributes:
        rows: a dict a reported time: time, train_loss, test_loss, train_accuracy, test_accuracy,
            and facts about the solver's work.
        chosen: the row of the time that did best on the validation split, or of the last time.
        curve: scores at many times, for a picture.
        flow: the fitted flow; ``flow.predict(x, time)`` predicts at other inputs.
        summary: the content of summary.json.
    """

    rows: list[dict[str, Any]]
    chosen: dict[str, Any]
    curve: list[dict[str, Any]]
    flow: KernelFlow
    summary: dict[str, Any]

    __repr__ = fields.short_repr


@freeing_folders()
def predict(
    config: PredictConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    compare: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
    resume: bool = False,
    progress: bool = True,
    verbose: bool | None = None,
) -> PredictResult:
    """Predict what an infinitely deep network learns.

    Args:
        config: what to predict; None is the compared run's data, kernel and ridge, or without such
            a run the default, digits 0 and 1.
        workdir: folder for the configuration, curves, predictions, summary and figures; without it
            no file is written.
        compare: workdir of a run of `dnntk.train` on the same data, to compare with; its evaluation
            times are the default of the configuration's.
        dataset: examples of your own, instead of those that ``config`` names, as `dnntk.train`
            takes them; the test set may be missing.
        resume: continue the run in ``workdir``: finished choices are not made again.
        progress: show bars for what takes longer than five seconds.
        verbose: print the lines on data, solver and result, unless logging has a handler of its
            own; by default as ``progress``.

    Raises:
        InputError: the configuration, the data, a folder or the Gram matrix cannot be used.
    """
    with printed_lines(processes.is_primary() and (progress if verbose is None else verbose)):
        trained = None if compare is None else TrainedRun(compare)
        config = config or PredictConfig(**({} if trained is None else trained.predicted_fields))
        if trained is not None:
            trained.check_data(dataset)
            trained.check_fields(config)
            if config.select == "evidence":
                raise InputError(
                    "select: expected validation or loo beside compare, as evidence chooses a "
                    "ridge of its own, got evidence; choose another"
                )
            trained.warn_of_settings()
            config = trained.fill_times(config)
        own = None if dataset is None else own_dataset(dataset, config.network())
        content = config.to_json() | ({} if own is None else record(own))
        folder = None if workdir is None else RunFolder(workdir)
        if folder is not None:
            if resume and not folder.vacant:
                check_same(folder.read_config(), content, folder.path, "resume")
            folder.claim(content, resume, free=FREE)
        prediction = Prediction(config, folder, trained, progress, own)
        if folder is not None:  # only now: a command whose data cannot be read leaves no run behind
            folder.write_config("predict", content)
        return prediction.result()


class Prediction:
    """One run of `predict`."""

    def __init__(
        self,
        config: PredictConfig,
        folder: RunFolder | None,
        trained: TrainedRun | None,
        progress: bool,
        own: Dataset | None = None,
    ) -> None:
        """Read the data, unless ``own`` holds them."""
        self.config, self.folder, self.trained = config, folder, trained
        self.progress, self.started = progress, time.perf_counter()
        gram_dir = config.gram_dir
        self.gram_dir = None if gram_dir is None else as_path("gram_dir", gram_dir)
        # Targets of the classes of own data, which need be neither 0 and 1 nor one-hot.
        self.targets = None
        if own is None:
            data = load_dataset_for(config.network())
        else:
            data = dataclasses.replace(own, description=f"own data: {own.description}")
            self.targets = class_targets(data) if data.classes else None
        self.image_shape = data.x_train.shape[1:]  # before an MLP's inputs are flattened
        self.data = _prepared(data, config)
        log.info("data: %s", self.data.description)
        self.negative = warn_of_negative(self.data)

    def result(self) -> PredictResult:
        """Choose, solve, predict, and write."""
        rho, beta, flow, best_time = self._chosen_flow()
        wanted = {*self.config.times_or_default, *([] if best_time is None else [best_time])}
        times = solvable_times(flow, sorted(wanted))
        curve_times = self._curve_times()
        all_times = times + curve_times
        if self.trained is not None:
            all_times += solvable_times(flow, [line["time"] for line in self.trained.history])
        # The kernel between test and training examples is evaluated once, for every time.
        x, d_out = self.data.x_test, self.data.y_train.shape[1]
        outputs = flow.predict(x, all_times) if len(x) else np.zeros((len(all_times), 0, d_out))
        scored = iter(self._scored(flow, all_times, outputs))
        rows, curve = ([next(scored) for _ in part] for part in (times, curve_times))
        for row, solution in zip(rows, flow.solutions(times), strict=True):
            row |= {name: getattr(solution, name) for name in SOLVER_FACTS}
        chosen = next((row for row in rows if row["time"] == best_time), rows[-1])
        summary = self._summary(rho, beta, flow, rows, chosen)
        if self.trained is not None:
            summary["compared"] = as_json(self.trained.compared(list(scored)))
        result = PredictResult(rows, chosen, curve, flow, summary)
        self._log(result)
        if self.folder is not None:
            self._write(result, outputs[: len(times)])
        return result

    def _chosen_flow(self) -> tuple[float, float, KernelFlow, float | None]:
        """rho, beta, the flow on all training examples, and the best time.

        The time is None without anything to choose by.
        """
        config, data, n = self.config, self.data, len(self.data.x_train)
        times, held_out, whole = config.times_or_default, self.held_out(), self.gram_dir
        if config.select == "validation" and not held_out:
            rho, beta = config.rho[0], config.beta[0]
            return rho, beta, self.flow(rho, beta, n, folder=whole), None
        evaluate = {
            "validation": validation_scores(data, held_out, times, self.targets),
            "loo": leave_one_out_scores(data, times, self.targets),
            "evidence": evidence_scores(data),
        }
        selection = Selection(config.select, evaluate[config.select], self.folder)
        examples, fit = min(config.search_examples, n - held_out), self.flow
        if not held_out:
            fit = partial(self.flow, solver="eigh")
        rho, beta = selection.kernel(config.rho, config.beta, fit, examples)
        if held_out:
            flow = self.flow(rho, beta, n, folder=whole)
            # They are the last examples: the others' Gram matrix is a part of the whole.
            part = partial(self.flow, folder=whole, gram=flow.gram)
            best = selection.best(rho, beta, n - held_out, part)
        else:
            best = selection.best(rho, beta, examples, fit)
            ridge = {"ridge": best["noise"] / n} if "noise" in best else {}
            flow = self.flow(rho, beta, n, folder=whole, **ridge)
        log.info(
            "chosen by %s: rho = %g, beta = %g, t = %g, ridge = %g",
            *(config.select, rho, beta, best["time"], flow.ridge),
        )
        return rho, beta, flow, best["time"]

    def held_out(self) -> int:
        """The number of training examples that are held out for choices."""
        if self.config.select != "validation":
            return 0
        n, several = len(self.data.x_train), len(self.config.rho) * len(self.config.beta) > 1
        held_out = self.config.validation or (max(1, n // 10) if several else 0)
        if held_out > n - 2:
            raise InputError(
                f"validation: expected fewer than the {n} training examples, got {held_out}; "
                "hold out fewer"
            )
        return held_out

    def kernel(self, rho: float, beta: float) -> Kernel:
        """The limit kernel of this architecture."""
        sizes = {"kernel_size": self.config.kernel_size} if self.config.arch == "cnn" else {}
        d_out = self.data.y_train.shape[1]
        kernel = partial(limit_ntk, rho=rho, beta=beta, d_out=d_out, **sizes)
        return _after_relu(kernel) if self.negative else kernel

    def flow(self, rho: float, beta: float, examples: int, **options: Any) -> KernelFlow:
        """The flow of one kernel on the first training examples, with options of `KernelFlow`."""
        config = self.config
        usual: dict[str, Any] = {
            "ridge": config.ridge,
            "solver": config.solver,
            "tolerance": config.tolerance,
            "block_size": config.block_size,
            "memory": None if config.memory_gb is None else config.memory_gb * 1e9,
            "dtype": config.dtype,
            "progress": self.progress,
        }
        x, y = self.data.x_train[:examples], self.data.y_train[:examples]
        return KernelFlow(self.kernel(rho, beta), x, y, **(usual | options))

    def _log(self, result: PredictResult) -> None:
        """Log every time once, the chosen one last; a compared run's times in one table."""
        tabled = [] if self.trained is None else self.trained.times
        for row in result.rows:
            if row is not result.chosen and row["time"] not in tabled:
                log.info("t = %g: %s", row["time"], described(row))
        if "compared" in result.summary:
            log_comparison(result.summary["compared"])
        t, seconds = result.chosen["time"], result.summary["seconds"]
        log.info("done: t = %g: %s; %.0f s", t, described(result.chosen), seconds)

    def _scored(
        self, flow: KernelFlow, times: list[float], outputs: np.ndarray
    ) -> list[dict[str, Any]]:
        """The scores at every time, with the outputs on the test examples [times, n', d_out]."""
        data, rows = self.data, []
        labelled = data.labels_train is not None
        splits = [("train", data.y_train, data.labels_train)]
        if len(data.x_test):
            splits.append(("test", data.y_test, data.labels_test))
        for t, on_train, on_test in zip(times, flow.train_predictions(times), outputs, strict=True):
            row: dict[str, Any] = {"time": t, "test_loss": None, "test_accuracy": None}
            for (split, y, labels), f in zip(splits, (on_train, on_test), strict=False):
                row |= split_scores(split, f, y, labelled, self.targets, labels)
            rows.append(row)
        return rows

    def _curve_times(self) -> list[float]:
        """Times at even distances in their logarithm, over all that are reported or compared."""
        compared = [] if self.trained is None else self.trained.times
        finite = [t for t in (*self.config.times_or_default, *compared) if math.isfinite(t)]
        # With a ridge, little changes later.
        last = max(finite, default=10 / max(self.config.ridge, 1e-4))
        first = min([last / CURVE_SPAN, *finite])
        return np.geomspace(first, last, CURVE_POINTS).tolist()

    def _summary(
        self,
        rho: float,
        beta: float,
        flow: KernelFlow,
        rows: list[dict[str, Any]],
        chosen: dict[str, Any],
    ) -> dict[str, Any]:
        summary = {
            "rho": rho,
            "beta": beta,
            "ridge": flow.ridge,
            **{name: chosen[name] for name in ("time", *SCORES)},
            "train_mse": mean_squared_error(chosen["train_loss"], self.data.y_train.shape[1]),
            "lambda_max": float(flow.eigenvalues[-1]),
            "times": rows,
            "data": self.data.description,
            "seconds": round(time.perf_counter() - self.started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
        }
        return as_json(summary)

    def _write(self, result: PredictResult, outputs: np.ndarray) -> None:
        """Write everything but the configuration; ``outputs`` [times, n', d_out] of the rows."""
        assert self.folder is not None
        path, times = self.folder.path, [row["time"] for row in result.rows]
        coefficients = np.stack([s.coefficients for s in result.flow.solutions(times)])
        test_outputs = outputs[times.index(result.chosen["time"])]
        t = result.chosen["time"]
        shown = {"shape": self.image_shape, "outputs": test_outputs, "targets": self.targets}
        attributed = decisions(result.flow, t, self.data, **shown)
        if not processes.is_primary():
            return
        np.savez(
            path / "predictions.npz", times=times, test_outputs=outputs, coefficients=coefficients
        )
        lines = "".join(json.dumps(line) + "\n" for line in result.curve)
        (path / "curve.jsonl").write_text(lines, encoding="utf-8")
        self.folder.write_json(SUMMARY, result.summary)
        self._draw(path, result, test_outputs, attributed)

    def _draw(
        self, path: Path, result: PredictResult, outputs: np.ndarray, attributed: list[Decision]
    ) -> None:
        """All pictures; ``outputs`` [n', d_out] at the chosen time."""
        data, config, trained = self.data, self.config, self.trained
        title = f"infinitely deep {config.arch.upper()}, {figures.plain(data.name)}"
        history = trained.history if trained else []
        label = f"trained, {trained.config.depth:,} layers" if trained else ""
        figures.draw(path / "curve", figures.prediction_figure, result.curve, history, label, title)
        if not len(data.x_test):
            return
        t = result.chosen["time"]
        named = f"{title}: test set, $t = {figures.in_math(t)}$"
        if data.labels_test is not None:
            counts = confusion(outputs, data.labels_test, len(data.classes), self.targets)
            figures.draw(path / "confusion", figures.confusion_figure, counts, data.classes, named)
        if attributed:
            figures.draw(path / "attribution", figures.attribution_figure, attributed, named)
        if config.dataset == "toy":
            arc = data.x_test, data.y_test, outputs
            figures.draw(path / "fit", figures.arc_figure, *arc, "limit", named)


def _after_relu(kernel: Kernel) -> Kernel:
    """The limit of networks on inputs of any sign: their first ReLU keeps the positive part."""
    return lambda x1, x2: kernel(jnp.maximum(x1, 0), jnp.maximum(x2, 0))


def _prepared(data: Dataset, config: PredictConfig) -> Dataset:
    """The dataset in random order, so that its last examples are a fair validation split."""
    n = config.train_examples or len(data.x_train)
    if n > len(data.x_train):
        raise InputError(
            f"train_examples: expected at most {len(data.x_train)}, as {data.name} has, got {n}"
        )
    order = np.random.default_rng(config.seed).permutation(len(data.x_train))[:n]
    labels = data.labels_train
    note = f"; {n} of them for training" if config.train_examples else ""
    data = dataclasses.replace(
        data,
        description=data.description + note,
        x_train=data.x_train[order],
        y_train=data.y_train[order],
        labels_train=None if labels is None else labels[order],
    )
    return dataclasses.replace(data, **as_trained(data, config.arch == "mlp", config.dtype))
