"""Figure of ``scripts/catapult.py``: gradient descent at steps beyond the largest stable one."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, log_scale, new_figure, viridis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ROWS", "catapult_figure"]

LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP"
# Ratio and C of rows 1 and 2 of the thesis's table 4.1: steps of 0.128 of kernel time, and
# lambda_max of the limit kernel on 2,000 training images, 48.5 (MLP, 28 x 28) and 64.4 (CNN).
ROWS = {"mlp": ("row 1", 6.2, 4.0), "cnn": ("row 2", 8.2, 4.0)}
THEORY: dict[str, Any] = {"color": "gray", "linewidth": 4, "alpha": 0.4, "zorder": 0}
WHITE: dict[str, Any] = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
# Above the first, gradient descent with a constant kernel diverges; above the others the linear
# and the wide ReLU networks of Lewkowycz et al. (2020) do.
BOUNDS = (2.0, 4.0, 12.0)
CLOSEST = 0.08  # of the axis, between two numbers
RATIO = r"time step $\times\ \lambda_{\max}$ at the start"


def catapult_figure(config: Any, found: dict[Any, Any], powers: Any) -> "Figure":
    """Maps of the least and the largest depth; peaks and their powers of C; kernels and accuracy.

    Args:
        config: `dnntk.experiments.catapult_config.CatapultConfig`.
        found: {(depth, C): `dnntk.experiments.catapult.Runs`}; curves are medians over trials.
        powers: {depth: the power of C in the peak at each ratio, or None}.
    """
    figure = new_figure(7.4, 8.6)
    (first, last), (peaks, power), (kernels, accuracies) = figure.subplots(3, 2)
    for axes, depth in ((first, config.depths[0]), (last, config.depths[-1])):
        _map(axes, config, found, depth)
    _peaks(peaks, config, found)
    _powers(power, config, found, powers)
    ratios = np.geomspace(config.ratios[0], config.ratios[-1], 99)
    kernels.plot(ratios, np.minimum(ratios, 2), **THEORY, label="theory")
    for scale, style in zip(config.scales, _styles(len(config.scales)), strict=True):
        runs = found[config.depths[-1], scale]
        after = np.array(config.ratios)[:, None] * runs.after / runs.before
        kernels.plot(config.ratios, np.nanmedian(after, 1), **style, label=f"C = {scale:g}")
        accuracies.plot(config.ratios, 100 * np.nanmedian(runs.accuracy, 1), **style)
    kernels.set_ylabel(r"time step $\times\ \lambda_{\max}$ at the end")
    accuracies.set_ylabel(f"test accuracy after {config.steps} steps (%)")
    for axes in (peaks, power, kernels, accuracies):
        _bounds(axes, config.ratios)
        log_scale(axes, "x")
        _ticks(axes, config.ratios)
        axes.grid(alpha=0.3)
    across = kernels.get_xaxis_transform()  # data along x, the axis along y
    for bound, name in zip(BOUNDS, ("constant kernel", "linear", "ReLU"), strict=True):
        if _within(bound, config.ratios):
            kernels.text(1.04 * bound, 0.02, name, rotation=90, fontsize=7, transform=across)
    figure.legend(*kernels.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    runs = sum(one.accuracy.size for one in found.values())
    diverged = sum(int(np.isnan(one.accuracy).sum()) for one in found.values())
    figure.suptitle(f"Steps too large for the kernel: {diverged:,} of {runs:,} runs diverged")
    return figure


def _styles(count: int) -> list[dict[str, Any]]:
    marks = zip(viridis(count, 0.8), itertools.cycle(LINES), itertools.cycle(MARKERS), strict=False)
    return [{"color": c, "linestyle": line, "marker": mark, "ms": 4} for c, line, mark in marks]


def _bounds(axes: "Axes", ratios: Sequence[float]) -> None:
    """Where networks leave the catapult: a constant kernel's, linear and ReLU networks' bound."""
    for bound in BOUNDS:
        if _within(bound, ratios):
            axes.axvline(bound, color=BLACK, linestyle=":", linewidth=1)


def _within(bound: float, ratios: Sequence[float]) -> bool:
    return ratios[0] <= bound <= ratios[-1]


def _ticks(axes: "Axes", ratios: Sequence[float]) -> None:
    """A tick a ratio, and its number unless it would touch the one before."""
    labels, places = [""] * len(ratios), np.log(ratios)
    last = -np.inf
    for i, place in enumerate(places):
        if place - last >= CLOSEST * np.ptp(places):
            labels[i], last = f"{ratios[i]:g}", place
    axes.set_xlabel(RATIO)
    axes.set_xticks(ratios, labels, minor=False)
    axes.set_xticks([], minor=True)


def _map(axes: "Axes", config: Any, found: dict[Any, Any], depth: int) -> None:
    """The share of networks whose loss came back, as a shade, and the median steps to it."""
    back = np.array([found[depth, scale].back for scale in config.scales])
    share, steps = np.isfinite(back).mean(2), np.median(back, axis=2)
    axes.imshow(share, cmap="gray", vmin=-0.4, vmax=1.1, origin="lower", aspect="auto")
    for place, number in np.ndenumerate(steps):
        text = f"{number:.0f}" if np.isfinite(number) else "-"
        color = BLACK if share[place] > 0.4 else "white"
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7, color=color)
    x, y = (partial(_position, marks) for marks in (config.ratios, config.scales))
    name, ratio, scale = ROWS[config.arch]
    if np.isfinite(x(ratio) + y(scale)):
        for color, width in ((BLACK, 3.5), ("white", 1.2)):  # on light and on dark cells
            axes.plot(x(ratio), y(scale), "o", ms=21, mfc="none", mec=color, mew=width)
        axes.text(x(ratio), y(scale) + 0.52, name, ha="center", fontsize=6, **WHITE)
    if np.isfinite(x(BOUNDS[0])):
        between = np.searchsorted(config.ratios, BOUNDS[0]) - 0.5
        axes.axvline(between, color=BLACK, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(config.ratios)), [f"{ratio:g}" for ratio in config.ratios])
    axes.set_yticks(range(len(config.scales)), [f"{scale:g}" for scale in config.scales])
    axes.set_xlabel(RATIO)
    axes.set_ylabel("C")
    axes.set_title(f"depth {depth:,}: steps to come back", fontsize="medium")


def _position(marks: Sequence[float], value: float) -> float:
    """Where ``value`` stands between evenly drawn ``marks``; NaN if it is beyond them."""
    beyond = {"left": np.nan, "right": np.nan}
    return float(np.interp(np.log(value), np.log(marks), range(len(marks)), **beyond))


def _peaks(axes: "Axes", config: Any, found: dict[Any, Any]) -> None:
    """Peaks at the largest depth as curves, at the others as open marks, and at the kink."""
    ratios = np.array(config.ratios)
    for scale, style in zip(config.scales, _styles(len(config.scales)), strict=True):
        for depth in config.depths[:-1]:
            peak = np.median(found[depth, scale].peak, 1)
            axes.plot(config.ratios, peak, style["marker"], color=style["color"], ms=7, mfc="none")
        runs = found[config.depths[-1], scale]
        axes.plot(config.ratios, np.median(runs.peak, 1), **style)
        axes.plot(np.clip([2, ratios[-1]], *ratios[[0, -1]]), [runs.kink] * 2, **THEORY)
    axes.set_ylabel("largest loss over first loss")
    log_scale(axes, "y")


def _powers(axes: "Axes", config: Any, found: dict[Any, Any], powers: dict[int, Any]) -> None:
    """The power of C in the peak with its 95% interval, and that of the kink's loss."""
    if len(config.scales) > 1:
        kinks = [float(found[config.depths[-1], scale].kink) for scale in config.scales]
        (slope, _) = np.polyfit(np.log(config.scales), np.log(kinks), 1)
        first, last = config.ratios[0], config.ratios[-1]
        axes.plot(np.clip([first, 2, 2, last], first, last), [0, 0, slope, slope], **THEORY)
    for (depth, fits), style in zip(powers.items(), _styles(len(powers)), strict=True):
        points = [(r, fit) for r, fit in zip(config.ratios, fits, strict=True) if fit]
        if points:
            ratios, values = zip(*points, strict=True)
            middle = np.array([fit["exponent"] for fit in values])
            below = middle - [fit["low"] for fit in values]
            axes.errorbar(ratios, middle, below, **style, capsize=2, label=f"depth {depth:,}")
    axes.set_ylabel("power of C in the largest loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
