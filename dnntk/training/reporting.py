"""The log lines, the verdict and the figures of a run of `dnntk.train`."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from dnntk import figures
from dnntk.data.datasets import Dataset
from dnntk.training.config import TrainConfig
from dnntk.training.evaluation import (
    confusion,
    constant_loss,
    described,
    least_loss,
    mean_squared_error,
)
from dnntk.training.losses import as_targets
from dnntk.training.plan import Plan
from dnntk.training.step_size import Eigenvalue

__all__ = ["draw_run", "say_done", "say_network", "verdict", "warn_of_vanished"]

log = logging.getLogger("dnntk")

# A network has learned if its training loss is below the best constant's by this fraction, which
# is that of the targets' variance that it explains. Smaller ones may be rounding or chance.
LEAST_LEARNED = 0.05
# Fraction of the largest eigenvalue that float32 cannot tell from 0.
VANISHED = 1e-7


def verdict(
    value: float, y: np.ndarray, y_train: np.ndarray, loss: str = "squared"
) -> dict[str, Any]:
    """Mean squared error, the best constant's loss on ``y``, and is ``value`` clearly lower?"""
    constant, least = constant_loss(y, y_train, loss), least_loss(y, loss)
    # If all targets are equal, the constant is all there is to learn.
    same = constant - least <= 1e-9 * float(np.mean(np.square(y, dtype=np.float64)))
    learned = same or value - least < (1 - LEAST_LEARNED) * (constant - least)
    mse = mean_squared_error(value, y.shape[1]) if loss == "squared" else None
    return {"train_mse": mse, "constant_loss": constant, "learned": learned}


def say_network(config: TrainConfig, width: int, parameters: int) -> None:
    """The run's first line."""
    drawn = "" if config.features == "gaussian" else f", {config.features} units"
    log.info(
        "network: %d-layer %s of width %d, %s initialization%s, %s form, C = %.4g, rho = %g, "
        "beta = %g; %s parameters",
        *(config.depth, config.arch.upper(), width, config.init, drawn, config.parametrization),
        *(config.scale_or_default, config.rho, config.beta, f"{parameters:,}"),
    )


def warn_of_vanished(config: TrainConfig, plan: Plan, found: Eigenvalue) -> None:
    """Warn if the network can learn little but a constant in the run's time t.

    With a constant kernel it learns at most the fraction 1 - exp(-rate t) of the targets' deviation
    from their mean, see `Eigenvalue`.
    """
    if found.targets_rate is None or plan.time_per_step is None or config.loss != "squared":
        return
    fraction = -math.expm1(-found.targets_rate * plan.time_per_step * plan.steps)
    if 2 * fraction < LEAST_LEARNED:  # the loss is a square
        gone = found.targets_rate < VANISHED * found.value
        start = "" if config.init == "deep_narrow" else "init=deep_narrow, "
        log.warning(
            "kernel: it %s its constant part: %d steps of %.3g learn at most %.2g%% of what tells "
            "the examples apart; give %s%s",
            "has vanished but for" if gone else "is small beyond",
            *(plan.steps, plan.time_step, 100 * fraction, start),
            "fewer layers or another lr" if gone else "more steps or momentum",
        )


def say_done(summary: dict[str, Any], config: TrainConfig) -> None:
    """The run's last lines."""
    if not summary["learned"]:
        larger = "a larger step or momentum" if config.optimizer == "sgd" else "another rate"
        if config.optimizer == "kernel":
            larger = "less ridge"
        start = "" if config.init == "deep_narrow" else ", and init=deep_narrow"
        log.warning(
            "nothing learned: the training loss %.4g is no better than the best constant's, %.4g; "
            "more time (steps, epochs), %s%s may help",
            *(summary["train_loss"], summary["constant_loss"], larger, start),
        )
    log.info("done: %s; %.0f s", described(summary), summary["seconds"])


def draw_run(
    path: Path,
    config: TrainConfig,
    history: list[dict[str, Any]],
    data: Dataset,
    outputs: np.ndarray,
    targets: np.ndarray | None,
    curve: list[dict[str, float]],
) -> None:
    """Draw all figures of a run into its folder ``path``.

    ``outputs`` are those of the first test examples, perhaps none; ``targets`` are the classes', as
    in `dnntk.data.labels.decide`.
    """
    title = f"{config.depth:,}-layer {config.arch.upper()}, {figures.plain(data.name)}"
    if curve:
        figures.draw(path / "loss", figures.closed_form_figure, curve, history, title)
    else:
        figures.draw(path / "loss", figures.loss_figure, history, title, config.loss)
    count = len(outputs)
    if data.name == "toy" and data.x_test.shape[1:] == (2,) and count:
        x, y = data.x_test[:count], data.y_test[:count]
        figures.draw(path / "fit", figures.arc_figure, x, y, outputs, "trained network", title)
    if data.labels_test is not None and count:
        outputs = as_targets(config.loss, outputs)
        counts = confusion(outputs, data.labels_test[:count], len(data.classes), targets)
        part = "" if count == len(data.x_test) else f", {count:,} images"
        named = f"{title}: test set{part}"
        figures.draw(path / "confusion", figures.confusion_figure, counts, data.classes, named)
