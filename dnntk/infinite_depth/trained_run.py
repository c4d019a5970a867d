"""The run of `dnntk.train` that a prediction is compared with, read from its workdir."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.data.own_data import check_same, own_dataset, record
from dnntk.errors import InputError
from dnntk.infinite_depth.config import DATA_FIELDS, PredictConfig
from dnntk.runs.folder import METRICS, RunFolder, metrics_line, parsed
from dnntk.runs.paths import as_path
from dnntk.training.config import TrainConfig

__all__ = ["SCORES", "TrainedRun", "log_comparison"]

# The names in every file of the quantities that are compared.
SCORES = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
LOGGED_ROWS = 8  # of the comparison; summary.json has all rows

log = logging.getLogger("dnntk")


class TrainedRun:
    """A run's configuration, and its evaluations against kernel time.

    Attributes:
        workdir: folder of the run.
        config: its configuration, with the default dataset if it was trained on own data.
        history: a dict an evaluation, in the order of time and each time once: time, and `SCORES`,
            None where a score is missing.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Read a run's workdir.

        Raises:
            InputError: the folder holds no run of `dnntk.train`, or one without kernel times.
        """
        self.workdir = as_path("compare", workdir)
        content = RunFolder(self.workdir).read_config("compare")
        self._saved = dict(content)
        if content.pop("own", None) is not None:
            content |= {"dataset": TrainConfig.dataset, "classes": TrainConfig.classes}
        try:
            self.config = TrainConfig.from_json(content)
        except InputError as error:
            raise InputError(
                f"compare: expected a run of train.py in {self.workdir}, found another's ({error})"
            ) from None
        if self.config.loss != "squared":
            raise InputError(
                f"compare: expected a run of loss=squared, {self.workdir} has "
                f"{self.config.loss}; its limit is dnntk.KernelFlow(..., loss={self.config.loss!r})"
            )
        self.history = self._evaluations()

    @property
    def times(self) -> list[float]:
        """Kernel times of the evaluations after the first step."""
        return [line["time"] for line in self.history if line["time"] > 0]

    @property
    def predicted_fields(self) -> dict[str, Any]:
        """Fields of `PredictConfig` that the run determines: its data, kernel and ridge."""
        config = self.config
        kernel = {"rho": (config.rho,), "beta": (config.beta,), "ridge": config.ridge}
        return {name: getattr(config, name) for name in DATA_FIELDS} | kernel

    def fill_times(self, config: PredictConfig) -> PredictConfig:
        """The same configuration, with the run's own times where it has none."""
        if config.times is not None or not self.times:
            return config
        return dataclasses.replace(config, times=tuple(self.times))

    def check_fields(self, config: PredictConfig) -> None:
        """Refuse a `PredictConfig` of other data, another kernel or another ridge.

        Raises:
            InputError: a field differs; the message names it.
        """
        for name, value in self.predicted_fields.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"compare: {self.workdir} was trained with {name}={value}, got "
                    f"{getattr(config, name)}; give the same, or leave {name} out of the command"
                )

    def check_data(self, dataset: Dataset | None) -> None:
        """Refuse own data that are not those of the run.

        Raises:
            InputError: they differ, or only one of the two has own data.
        """
        recorded = {} if dataset is None else record(own_dataset(dataset, self.config))
        check_same(self._saved, recorded, self.workdir, "compare")

    def warn_of_settings(self) -> None:
        """Log the settings of the run that its limit does not have."""
        for name in ("init", "shift"):
            if (value := getattr(self.config, name)) != getattr(TrainConfig, name):
                log.warning(
                    "compare: %s was trained with %s=%s, which its limit does not have",
                    *(self.workdir, name, value),
                )

    def compared(self, predicted: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The run's scores, their predictions, and the differences.

        Args:
            predicted: scores of the limit at the times of ``history``, without an infinite one if
                it cannot be predicted.

        Returns:
            ``rows``, a dict a time with trained_, predicted_ and difference_ of every score;
            ``largest_difference`` of the training losses, and the run's depth and workdir.
        """
        rows = []
        for line, limit in zip(self.history, predicted, strict=False):  # the last may be infinite
            row = {"time": line["time"]}
            for name in SCORES:
                one, other = line[name], limit[name]
                both = one is not None and other is not None
                row |= {f"trained_{name}": one, f"predicted_{name}": other}
                row[f"difference_{name}"] = one - other if both else None
            rows.append(row)
        largest = max(abs(row["difference_train_loss"]) for row in rows)
        run = {"workdir": str(self.workdir), "depth": self.config.depth}
        return run | {"largest_difference": largest, "rows": rows}

    def _evaluations(self) -> list[dict[str, Any]]:
        file = self.workdir / METRICS
        try:
            texts = file.read_bytes().splitlines()
        except OSError as error:
            raise InputError(
                f"compare: expected a run's evaluations in {file}, got {error.strerror}; give a "
                "run that has begun to train"
            ) from None
        found: dict[float, dict[str, Any]] = {}
        for text in texts:
            try:
                line = parsed(text)
            except ValueError:  # cut short, by a full disk or the end of the process
                continue
            held = metrics_line(line) if isinstance(line, dict) else {}
            line = {name: _finite(held.get(name)) for name in ("time", *SCORES)}
            if held.get("time") == math.inf:  # a run in closed form to the end
                line["time"] = math.inf
            if line["time"] is not None and line["train_loss"] is not None and line["time"] >= 0:
                found[line["time"]] = line
        if not found:
            raise InputError(
                f"compare: expected lines with a kernel time and a loss in {file}, found none; "
                "give the workdir of a run with optimizer=sgd, as adam follows no kernel"
            )
        return [found[time] for time in sorted(found)]


def log_comparison(compared: dict[str, Any]) -> None:
    """Log a few of the times, even in their logarithm, with the first and the last."""
    rows = [row for row in compared["rows"] if float(row["time"]) > 0] or compared["rows"]
    times = np.array([float(row["time"]) for row in rows])
    chosen = set(range(len(rows)))
    if len(rows) > LOGGED_ROWS:
        logs = np.log(times)
        wanted = np.linspace(logs[0], logs[-1], LOGGED_ROWS)
        chosen = {int(np.argmin(np.abs(logs - one))) for one in wanted}
    log.info("train loss of %s layers, and as predicted:", f"{compared['depth']:,}")
    heads = ("kernel time", "trained", "predicted", "difference")
    log.info("%12s %12s %12s %12s", *heads)
    for row in (rows[i] for i in sorted(chosen)):
        numbers = (row[f"{kind}_train_loss"] for kind in heads[1:])
        log.info("%12.6g %12.4g %12.4g %+12.2g", float(row["time"]), *numbers)


def _finite(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None
