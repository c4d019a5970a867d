"""Every picture: drawn from plain arrays, saved as PNG and PDF, legible to all eyes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"


def loss_figure(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss, and accuracy where there is one, against kernel time (against steps without it)."""
    timed = all(line["time"] is not None for line in history)
    across = [line["time"] if timed else line["step"] for line in history]
    classified = history[0]["test_accuracy"] is not None
    figure = _figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel("kernel time $t$" if timed else "step")
        axes.grid(alpha=0.3)
    losses = panels[0]
    losses.plot(across, [line["loss"] for line in history], color=BLUE, label="training")
    losses.plot(across, [line["test_loss"] for line in history], "--", color=ORANGE, label="test")
    losses.set_ylabel(r"loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$")
    losses.set_yscale("log")
    losses.legend()
    if classified:
        for key, style, color in (("train_accuracy", "-", BLUE), ("test_accuracy", "--", ORANGE)):
            values = [100 * line[key] for line in history]
            panels[1].plot(across, values, style, color=color, label=key.split("_")[0])
        panels[1].set_ylabel("accuracy (%)")
        panels[1].legend(["training", "test"])
    figure.suptitle(title)
    return figure


def confusion_figure(counts: np.ndarray, classes: Sequence[Any], title: str) -> Figure:
    """Counts [k, k] of test examples: true class by row, predicted class by column."""
    figure = _figure(1)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade)
    axes.set_xticks(range(len(classes)), [str(c) for c in classes])
    axes.set_yticks(range(len(classes)), [str(c) for c in classes])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.suptitle(title)
    return figure


def arc_figure(x: np.ndarray, y: np.ndarray, outputs: np.ndarray, title: str) -> Figure:
    """The toy task: target and trained network against the angle of the input on the arc."""
    figure = _figure(1)
    axes = figure.subplots()
    order = np.argsort(np.arctan2(x[:, 1], x[:, 0]))
    angle = np.arctan2(x[:, 1], x[:, 0])[order]
    axes.plot(angle, y[order, 0], color=BLACK, label="target $x_1 x_2$")
    axes.plot(angle, outputs[order, 0], "--", color=ORANGE, label="trained network")
    axes.set_xlabel(r"angle $\gamma$ of $x = (\cos\gamma, \sin\gamma)$ (radians)")
    axes.set_ylabel("$f(x)$")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.pdf."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".pdf"))


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(5.0 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
