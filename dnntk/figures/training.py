"""Figures of a training run and of a prediction: curves, confusion matrix, the toy task's fit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, ORANGE, log_scale, new_figure, panels_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    *("arc_figure", "closed_form_figure", "confusion_figure", "loss_figure"),
    "prediction_figure",
]

LOSS = r"loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$"
LOSSES = {"squared": LOSS, "cross_entropy": "cross-entropy"}
# Most classes for which a confusion matrix shows its counts, and the names of all classes.
NUMBERED, NAMED = 20, 25


def loss_figure(
    history: Sequence[dict[str, Any]], title: str, loss_name: str = "squared"
) -> "Figure":
    """Loss and, if known, accuracy against kernel time, or against steps if times are missing."""
    timed = all(line["time"] is not None for line in history)
    across = _numbers(history, "time" if timed else "step")
    classified = _classified(history)
    figure = panels_figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    loss, accuracy = ("train_loss", "test_loss"), ("train_accuracy", "test_accuracy")
    for axes, keys, unit in zip(panels, (loss, accuracy), (1, 100), strict=False):
        for key, split, style, color in zip(
            keys, ("training", "test"), ("-", "--"), (BLUE, ORANGE), strict=True
        ):
            if all(line[key] is None for line in history):  # no test set
                continue
            marker = "o" if len(history) == 1 else ""
            curve = {"linestyle": style, "marker": marker, "color": color, "label": split}
            axes.plot(across, _numbers(history, key, unit), **curve)
        axes.set_xlabel("kernel time $t$" if timed else "step")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel(LOSSES[loss_name])
    log_scale(panels[0], "y")
    if classified:
        panels[1].set_ylabel("accuracy (%)")
    figure.suptitle(title, wrap=True)
    return figure


def closed_form_figure(
    curve: Sequence[dict[str, Any]], history: Sequence[dict[str, Any]], title: str
) -> "Figure":
    """The flow's loss over time with the trained network in it, and the residual by iteration.

    ``history`` holds a line before the first iteration and one after each.
    """
    figure = panels_figure(2)
    left, right = figure.subplots(1, 2)
    left.plot(_numbers(curve, "time"), _numbers(curve, "train_loss"), color=BLUE)
    last, end = history[-1], curve[-1]["time"]
    when = float(last["time"])
    for key, split, mark, color in (
        ("train_loss", "training", "o", BLUE),
        ("test_loss", "test", "s", ORANGE),
    ):
        if last[key] is not None:
            label = f"network, {split}" + (r", $t = \infty$" if np.isinf(when) else "")
            left.plot(min(when, end), last[key], mark, color=color, label=label)
    log_scale(left, "x")
    log_scale(left, "y")
    left.set(xlabel="kernel time $t$", ylabel=LOSS, title="training loss of the flow")
    iterations = [line for line in history if "residual" in line]
    steps, residuals = _numbers(iterations, "step"), _numbers(iterations, "residual")
    right.plot(np.append(0, steps), np.append(1.0, residuals), "o-", color=BLACK)
    right.xaxis.get_major_locator().set_params(integer=True)
    log_scale(right, "y")
    right.set(xlabel="gradient pass", ylabel="distance of the outputs from the flow's")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, wrap=True)
    return figure


def prediction_figure(
    curve: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]], label: str, title: str
) -> "Figure":
    """The limit's loss and, if known, accuracy against time, with a trained run as open marks.

    A mark at infinite time lies at the end of the curve.
    """
    classified = _classified(curve)
    figure = panels_figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    later = [line for line in trained if line["time"] is not None and float(line["time"]) > 0]
    times = np.array([float(line["time"]) for line in later])
    if np.isinf(times).any():
        times = np.where(np.isinf(times), np.nanmax(_numbers(curve, "time")), times)
        label += r", $t = \infty$"
    loss, accuracy = ("train_loss", "test_loss"), ("train_accuracy", "test_accuracy")
    for axes, keys, unit in zip(panels, (loss, accuracy), (1, 100), strict=False):
        for key, split, style, mark, color in zip(
            keys, ("training", "test"), ("-", "--"), ("o", "s"), (BLUE, ORANGE), strict=True
        ):
            if all(line[key] is None for line in curve):  # no test set
                continue
            limit = _numbers(curve, "time"), _numbers(curve, key, unit)
            axes.plot(*limit, style, color=color, label=f"limit, {split}")
            if later:
                points = times, _numbers(later, key, unit)
                open_mark = {"marker": mark, "markerfacecolor": "none", "linestyle": "none"}
                axes.plot(*points, color=color, label=f"{label}, {split}", **open_mark)
        log_scale(axes, "x")
        axes.set_xlabel("kernel time $t$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    log_scale(panels[0], "y")
    panels[0].set_ylabel(LOSS)
    if classified:
        panels[1].set_ylabel("accuracy (%)")
    figure.suptitle(title, wrap=True)
    return figure


def _classified(lines: Sequence[dict[str, Any]]) -> bool:
    keys = ("train_accuracy", "test_accuracy")
    return any(line[key] is not None for line in lines for key in keys)


def _numbers(lines: Sequence[dict[str, Any]], key: str, unit: float = 1.0) -> np.ndarray:
    """One number per line; NaN, which is not drawn, where the number is missing or infinite."""
    values = [np.nan if line[key] is None else float(line[key]) for line in lines]
    return unit * np.where(np.isfinite(values), values, np.nan)


def confusion_figure(counts: np.ndarray, classes: Sequence[Any], title: str) -> "Figure":
    """Counts [k, k] of test examples: true class by row, predicted class by column.

    Counts are written for at most `NUMBERED` classes, and every name for at most `NAMED`.
    """
    k = len(classes)
    ticks = range(0, k, -(-k // NAMED) or 1)
    names = [plain(classes[tick], longest=16) for tick in ticks]
    longest = max(map(len, names), default=0)
    side = min(max(3.8, 1.0 + 0.28 * k), 7.0)
    crowded = len(names) * (1 + longest) > 9 * side
    figure = new_figure(side + 1.2 + 0.06 * longest, side + 0.06 * longest * crowded)
    axes = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = "medium" if k < 6 else "x-small"
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts if k <= NUMBERED else np.zeros((0, 0))):
        shade = "white" if fractions[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=size)
    size = "small" if k > NUMBERED else "medium"
    axes.set_xticks(ticks, names, fontsize=size, rotation=90 if crowded else 0)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="fraction of the true class")
    figure.suptitle(title, wrap=True)
    return figure


def arc_figure(
    x: np.ndarray, y: np.ndarray, outputs: np.ndarray, label: str, title: str
) -> "Figure":
    """The toy task's target, and the outputs (``label`` in the legend), against the angle."""
    figure = panels_figure(1)
    axes = figure.subplots()
    order = np.argsort(np.arctan2(x[:, 1], x[:, 0]))
    angle = np.arctan2(x[:, 1], x[:, 0])[order]
    axes.plot(angle, y[order, 0], color=BLACK, label="target $x_1 x_2$")
    axes.plot(angle, outputs[order, 0], "--", color=ORANGE, label=label)
    axes.set_xlabel(r"angle $\gamma$ of $x = (\cos\gamma, \sin\gamma)$ (radians)")
    axes.set_ylabel("$f(x)$")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title, wrap=True)
    return figure
