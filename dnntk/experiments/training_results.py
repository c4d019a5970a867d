"""What a finished run of `dnntk.train` says: summary.json's verdicts, the last line, pictures."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from dnntk import figures
from dnntk.config import TrainConfig
from dnntk.data import Dataset
from dnntk.evaluation import confusion, constant_loss

log = logging.getLogger("dnntk")

# A network has learned something if its training loss is below the best constant's by this share:
# it then explains as much of the targets' variance. Below, rounding and chance decide.
LEAST_LEARNED = 0.05


def verdict(loss: float, y: np.ndarray, y_train: np.ndarray) -> dict[str, Any]:
    """Of a training loss on targets ``y``: the best constant's, and whether it is better."""
    constant = constant_loss(y, y_train)
    # Targets that are all the same leave nothing but the constant to learn.
    same = constant <= 1e-9 * float(np.mean(np.square(y, dtype=np.float64)))
    return {"constant_loss": constant, "learned": same or loss < (1 - LEAST_LEARNED) * constant}


def say_done(summary: dict[str, Any], config: TrainConfig) -> None:
    """The run's last lines."""
    if not summary["learned"]:
        larger = "a larger step or momentum" if config.optimizer == "sgd" else "another lr"
        start = "" if config.init == "deep_narrow" else ", and init=deep_narrow"
        log.warning(
            "nothing learned: the training loss %.4g is no better than the best constant's, %.4g; "
            "more time (steps, epochs), %s%s may help",
            *(summary["train_loss"], summary["constant_loss"], larger, start),
        )
    log.info(
        "done: loss %.3g, accuracy %s training, %s test; %.0f s",
        summary["train_loss"],
        _percent(summary["train_accuracy"]),
        _percent(summary["test_accuracy"]),
        summary["seconds"],
    )


def draw_run(
    path: Path,
    config: TrainConfig,
    history: list[dict[str, Any]],
    data: Dataset,
    outputs: np.ndarray,
    targets: np.ndarray | None,
) -> None:
    """All pictures of a run.

    Args:
        path: the run's folder.
        config: the run's.
        history: its evaluations.
        data: what it was trained on.
        outputs: of the first test examples, perhaps none.
        targets: of the classes, as in `dnntk.evaluation.decide`.
    """
    title = f"{config.depth:,}-layer {config.arch.upper()}, {figures.plain(data.name)}"
    figures.draw(path / "loss", figures.loss_figure, history, title)
    count = len(outputs)
    if data.name == "toy" and data.x_test.shape[1:] == (2,) and count:
        x, y = data.x_test[:count], data.y_test[:count]
        figures.draw(path / "fit", figures.arc_figure, x, y, outputs, "trained network", title)
    if data.labels_test is not None and count:
        counts = confusion(outputs, data.labels_test[:count], len(data.classes), targets)
        part = "" if count == len(data.x_test) else f", {count:,} images"
        named = f"{title}: test set{part}"
        figures.draw(path / "confusion", figures.confusion_figure, counts, data.classes, named)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
