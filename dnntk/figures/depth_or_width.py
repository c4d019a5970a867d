"""Figures of `dnntk.experiments.depth_or_width`: depth against width, and leaving the regime."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, GREEN, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["regime_figure", "size_figure"]

Point = dict[str, Any]

# {(rule, clock): (colour, marker, line style)}.
SERIES = {
    ("theorem", "equal"): (BLUE, "o", "-"),
    ("small", "equal"): (ORANGE, "s", "-"),
    ("wide", "equal"): (GREEN, "^", "-"),
    ("wide", "matched"): (GREEN, "v", ":"),
}
LIMITS = {
    ("deep", "equal"): (BLUE, "--", "limit of depth"),
    ("wide", "equal"): (GREEN, "--", "limit of width, same $t$"),
    ("wide", "matched"): (GREEN, ":", "limit of width, matched"),
}


def size_figure(
    points: Sequence[Point], limits: dict[str, dict[str, Any]], time: float, small_scale: float
) -> "Figure":
    """One row per dataset: accuracy and kernel movement against parameters, accuracy against t.

    Args:
        points: means over trials, from `dnntk.experiments.depth_or_width.findings.points`.
        limits: by dataset, as in `dnntk.experiments.depth_or_width.experiment.DepthOrWidth`.
        time: kernel time t of the first two columns.
        small_scale: C of the deep networks' second rule.
    """
    figure = new_figure(13.0, 3.7 * len(limits) + 0.8)
    names = {
        ("theorem", "equal"): "deep, $C = L^{2.2}$",
        ("small", "equal"): f"deep, $C = {small_scale:g}$",
        ("wide", "equal"): "wide, same $t$",
        ("wide", "matched"): "wide, matched clock",
    }
    panels = figure.subplots(len(limits), 3, squeeze=False)
    for (accuracy, movement, course), (dataset, limit) in zip(panels, limits.items(), strict=True):
        mine = [p for p in points if p["part"] == "size" and p["dataset"] == dataset]
        at_end = [p for p in mine if p["time"] == time]
        _against_size(accuracy, at_end, "test_accuracy", 100, names)
        for (side, clock), (color, line, name) in LIMITS.items():
            reached = _reached(limit, side, time, clock)
            style = {"color": color, "linestyle": line, "linewidth": 1.2, "label": name}
            accuracy.axhline(100 * reached["test_accuracy"], **style)
        accuracy.set_ylabel("test accuracy (%)")
        accuracy.set_title(f"{dataset}, $t = {time:g}$", fontsize="medium")
        _against_size(movement, at_end, "movement", 100, names)
        movement.set_yscale("log")
        movement.set_ylabel(r"$\|\Theta_t - \Theta_0\|_F \,/\, \|\Theta_0\|_F$ (%)")
        movement.set_title(f"{dataset}, $t = {time:g}$", fontsize="medium")
        _over_time(course, mine, limit)
        most = max((p["depth"] for p in mine), default=0)
        course.set_title(f"{dataset}, the largest ($L = {most}$)", fontsize="medium")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _reached(limit: dict[str, Any], side: str, time: float, clock: str) -> Point:
    records = limit[side]["records"]
    return next(p for p in records if (p["time"], p["clock"]) == (time, clock))


def _against_size(
    axes: "Axes", points: Sequence[Point], quantity: str, unit: float, names: dict[Any, str]
) -> None:
    for key, (color, marker, line) in SERIES.items():
        mine = [p for p in points if (p["rule"], p["clock"]) == key and quantity in p]
        mine = sorted(mine, key=lambda p: p["parameters"])
        axes.errorbar(
            [p["parameters"] for p in mine],
            [unit * p[quantity] for p in mine],
            [unit * (p[f"{quantity}_error"] or 0.0) for p in mine],
            **_style(color, marker, line),
            label=names[key],
        )
    sizes = {p["parameters"]: p["depth"] for p in points if p["rule"] != "wide"}
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{_short(n)}\n$L = {depth}$" for n, depth in sizes.items()])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters, and depth of the deep networks")
    axes.grid(alpha=0.3)


def _short(count: int) -> str:
    return f"{count / 1e6:.2g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def _over_time(axes: "Axes", points: Sequence[Point], limit: dict[str, Any]) -> None:
    """Test accuracy against t: the limits as whole curves, the largest networks as marks."""
    for side, color, line in (("deep", BLUE, "--"), ("wide", GREEN, "--"), ("linear", BLACK, ":")):
        curve = limit[side]["curve"]
        times, percent = [p["time"] for p in curve], [100 * p["test_accuracy"] for p in curve]
        name = "linear control" if side == "linear" else None
        axes.plot(times, percent, line, color=color, linewidth=1.2, label=name)
    most = max((p["depth"] for p in points), default=0)
    for key, (color, marker, _) in SERIES.items():
        mine = [p for p in points if (p["rule"], p["clock"]) == key and p["depth"] == most]
        factor = limit["ratio"] if key[1] == "matched" else 1.0
        axes.plot(
            [factor * p["time"] for p in mine],
            [100 * p["test_accuracy"] for p in mine],
            **_style(color, marker, ""),
        )
    axes.set_xscale("log")
    axes.set_xlabel("kernel time $t$")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")


def regime_figure(
    points: Sequence[Point], limit: dict[str, Any], time: float, title: str
) -> "Figure":
    """Test accuracy, kernel movement and alignment against C, with infinity at the right end.

    Args:
        points: means over trials of the experiment's second part, where C varies.
        limit: limits of the second part's dataset.
        time: kernel time t of all points.
        title: title of the figure.
    """
    figure = new_figure(6.4, 9.0)
    ended = sorted((p for p in points if p["time"] == time), key=lambda p: p["scale"])
    finite = [p["scale"] for p in ended if np.isfinite(p["scale"])]
    end = max(finite) * 30
    accuracy, moved, aligned = figure.subplots(3, 1, sharex=True)
    _against_scale(accuracy, ended, end, "test_accuracy", 100, BLUE, "o", "network")
    _against_scale(moved, ended, end, "movement", 100, BLUE, "o", "network")
    _against_scale(aligned, ended, end, "start", 1, ORANGE, "s", "before training", ":")
    _against_scale(aligned, ended, end, "alignment", 1, BLUE, "o", "after training")
    for side, color, line, name in (
        ("deep", BLACK, "--", "limit of depth"),
        ("wide", GREEN, "-.", "limit of width, matched clock"),
    ):
        reached = _reached(limit, side, time, "equal" if side == "deep" else "matched")
        style = {"color": color, "linestyle": line, "linewidth": 1.4}
        accuracy.axhline(100 * reached["test_accuracy"], **style, label=name)
        aligned.axhline(limit[side]["alignment"], **style, label=name.split(",")[0])
    accuracy.set_ylabel("test accuracy (%)")
    moved.set_ylabel(r"$\|\Theta_t - \Theta_0\|_F \,/\, \|\Theta_0\|_F$ (%)")
    moved.set_yscale("log")
    exact = [p["movement"] for p in ended if np.isinf(p["scale"])]
    if exact == [0.0]:
        moved.annotate("0", (end, 0.04), xycoords=("data", "axes fraction"), ha="center")
    aligned.set_ylabel("alignment of kernel and labels")
    aligned.set_xscale("log")
    aligned.set_xlabel("scaling factor $C$")
    powers = np.arange(0, np.floor(np.log10(max(finite))) + 1)
    ticks = [f"$10^{{{int(power)}}}$" for power in powers]
    aligned.set_xticks([*10.0**powers, end], [*ticks, r"$\infty$"])
    aligned.set_xticks([], minor=True)
    for axes in (accuracy, moved, aligned):
        axes.axvline(np.sqrt(end * max(finite)), color="gray", linewidth=0.8, linestyle=(0, (2, 3)))
        axes.grid(alpha=0.3)
    for axes in (accuracy, aligned):
        axes.legend(fontsize="small")
    figure.suptitle(title, wrap=True)
    return figure


def _against_scale(
    axes: "Axes",
    points: Sequence[Point],
    end: float,
    quantity: str,
    unit: float,
    color: str,
    marker: str,
    label: str,
    line: str = "-",
) -> None:
    """Draw a line through all points of finite C, and a separate mark for infinite C at ``end``."""
    for infinite in (False, True):
        mine = [p for p in points if np.isinf(p["scale"]) == infinite]
        axes.errorbar(
            [end if infinite else p["scale"] for p in mine],
            [unit * p[quantity] for p in mine],
            [unit * (p.get(f"{quantity}_error") or 0.0) for p in mine],
            **_style(color, marker, "" if infinite else line),
            label=None if infinite else label,
        )


def _style(color: str, marker: str, line: str) -> dict[str, Any]:
    """Open marks, so that one series does not hide another."""
    return {
        "color": color,
        "marker": marker,
        "linestyle": line,
        "markerfacecolor": "none",
        "markersize": 6,
        "linewidth": 1.4,
    }
