"""Figures of section 5.2: figure 4.2, and a row of table 4.1 beside its limit."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, ORANGE, log_scale, new_figure, viridis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["row_figure", "trainability_figure"]

# Line styles show initializations; colours and markers show learning rates.
LINES = "-", "--", ":", "-."
MARKERS = "osD^vP"
# Top of the figure, in losses of the best constant answer; diverging losses go beyond.
HIGHEST = 3.0


def trainability_figure(rows: Sequence[dict[str, Any]], chance: dict[str, float]) -> "Figure":
    """Figure 4.2: training loss of every run against steps, one panel per architecture.

    Args:
        rows: rows of the runs, from `dnntk.experiments.trainability`.
        chance: {architecture: loss of the best constant answer}.
    """
    figure = new_figure(5.6 * len(chance), 5.4)
    lines = dict(zip(dict.fromkeys(row["init"] for row in rows), itertools.cycle(LINES)))
    rates = sorted({row["lr"] for row in rows if row["lr"] is not None})
    shades = dict(zip(rates, viridis(len(rates), 0.92), strict=True))
    for axes, (arch, constant) in zip(
        figure.subplots(1, len(chance), squeeze=False)[0], chance.items(), strict=True
    ):
        mine = [row for row in rows if row["arch"] == arch and row["history"]]
        for row in mine:
            _run(axes, row, lines, shades, rates)
        axes.axhline(constant, color="gray", linewidth=0.8, zorder=0)
        axes.annotate(
            "best constant answer",
            (1, constant),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize="x-small",
            color="dimgray",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            zorder=5,
        )
        losses = [line["train_loss"] for row in mine for line in row["history"]]
        lowest = min((loss for loss in losses if 0 < loss < np.inf), default=constant)
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(lowest, constant), HIGHEST * constant)
        axes.set_xlabel("step")
        axes.set_ylabel(r"training loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$")
        axes.set_title(arch.upper())
        axes.grid(alpha=0.3)
    _legend(figure, rows, lines, shades, rates)
    return figure


def _run(
    axes: "Axes",
    row: dict[str, Any],
    lines: dict[str, str],
    shades: dict[float, Any],
    rates: list[float],
) -> None:
    steps = [line["step"] for line in row["history"]]
    losses = [line["train_loss"] for line in row["history"]]
    style: dict[str, Any] = {"linestyle": lines[row["init"]], "linewidth": 1.1}
    if row["lr"] is None:
        style |= {"color": BLACK, "linewidth": 2.4, "zorder": 3}
    else:
        marker = MARKERS[rates.index(row["lr"]) % len(MARKERS)]
        style |= {"color": shades[row["lr"]], "marker": marker, "ms": 4}
        style["markevery"] = max(1, len(steps) // 5)
    axes.plot(steps, losses, **style)
    if row["ended"] == "diverged":
        # A cross at the top, where the loss left the figure.
        mark = {"color": style["color"], "ms": 8, "mew": 2, "clip_on": False, "zorder": 4}
        axes.plot(steps[-1:], [1.0], "x", transform=axes.get_xaxis_transform(), **mark)


def _legend(
    figure: "Figure",
    rows: Sequence[dict[str, Any]],
    lines: dict[str, str],
    shades: dict[float, Any],
    rates: list[float],
) -> None:
    """Draw one legend for all panels: lines of initializations, marks of learning rates."""
    axes = figure.axes[0]
    handles = []
    if any(row["lr"] is None for row in rows):
        named = "deep_narrow, step from its kernel"
        handles += axes.plot([], [], "-", color=BLACK, linewidth=2.4, label=named)
    for init, line in lines.items():
        if any(row["init"] == init and row["lr"] is not None for row in rows):
            handles += axes.plot([], [], line, color="gray", label=init)
    for i, rate in enumerate(rates):
        marker = MARKERS[i % len(MARKERS)]
        handles += axes.plot([], [], marker, color=shades[rate], ms=5, label=f"rate {rate:g}")
    if any(row["ended"] == "diverged" for row in rows):
        handles += axes.plot([], [], "x", color="gray", ms=7, mew=2, label="diverged")
    columns = 3 if len(figure.axes) == 1 else 4  # not wider than the panels
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small")


def row_figure(
    history: Sequence[dict[str, Any]],
    curve: Sequence[dict[str, Any]],
    thesis: tuple[float | None, float | None],
    d_out: int,
    title: str,
) -> "Figure":
    """A row of table 4.1: mean squared error and test accuracy against kernel time.

    Args:
        history: evaluations of the trained network, as in metrics.jsonl.
        curve: evaluations of the limit; empty if there is no limit.
        thesis: training error and test accuracy in the thesis, None where it has no number.
        d_out: number of outputs; the thesis's error is a mean over outputs.
        title: title of the figure.
    """
    figure = new_figure(10.0, 4.0)
    timed = all(line["time"] is not None for line in history)
    panels = figure.subplots(1, 2)
    for axes, key, unit, reported in zip(
        panels, ("train_loss", "test_accuracy"), (2 / d_out, 100), thesis, strict=True
    ):
        later = [line for line in history if line["step"] > 0]
        across = [line["time"] if timed else line["step"] for line in later]
        values = [unit * line[key] for line in later]
        axes.plot(across, values, "o-", ms=4, color=BLUE, label="dnntk, trained")
        if curve:
            values = [unit * line[key] for line in curve]
            axes.plot([p["time"] for p in curve], values, "--", color=ORANGE, label="limit")
        if reported is not None:
            shown = reported * (100 if key == "test_accuracy" else 1)
            axes.axhline(shown, color=BLACK, linestyle=":", label="thesis, at the end")
        axes.set_xlabel("kernel time $t$" if timed else "step")
        log_scale(axes, "x")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    log_scale(panels[0], "y")
    panels[0].set_ylabel("training error, mean over examples and outputs")
    panels[1].set_ylabel("test accuracy (%)")
    figure.suptitle(title, wrap=True)
    return figure
