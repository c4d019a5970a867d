"""Figure of ``scripts/required_depth.py``: the depth near the limit against kernel time."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, colors, log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["required_depth_figure"]

LINES = ("-", "--", ":", "-.")
TITLES = {
    "digits_01": "digits, 0 and 1",
    "digits": "digits, ten classes",
    "mnist_01": "MNIST, 0 and 1",
    "mnist": "MNIST, ten classes",
    "fashion_mnist_01": "Fashion-MNIST, 0 and 1",
    "fashion_mnist": "Fashion-MNIST, ten classes",
}
MARKERS = {"gaussian": ("o", 7.0, "independent units"), "sobol": ("D", 4.0, "Sobol units")}
ENDS: dict[str, Any] = {"color": BLACK, "linewidth": 0.8, "linestyle": (0, (1, 4))}
LEAST_WIDTH = 6.6  # inches: of the legend
STEP = 1.25  # times the kernel time, from one number of examples to the next: points lie apart


def required_depth_figure(found: dict[str, dict[int, Any]]) -> "Figure":
    """A column a problem; above, the depth of each epsilon, below, that of 99% of the decisions.

    ``found``: {problem: {number of training examples: `required_depth.Requirement`}}. Curves are
    predictions, and points are measured, with 95% intervals.
    """
    figure = new_figure(max(LEAST_WIDTH, 1.0 + 3.2 * len(found)), 6.4)
    panels = figure.subplots(2, len(found), squeeze=False, sharex="col", sharey="row")
    for column, (name, by_count) in zip(panels.T, found.items(), strict=True):
        shades, middle = colors(len(by_count)), (len(by_count) - 1) / 2
        for i, (count, each) in enumerate(by_count.items()):
            color, line = shades[i], LINES[i % len(LINES)]
            label, times = f"$n$ = {count:,}", each.times * STEP ** (i - middle)
            for epsilon, depths in zip(each.epsilons, each.predicted, strict=True):
                column[0].plot(each.times, depths, line, color=color, label=label)
                label = "_"
                for draw in MARKERS:
                    _points(column[0], times, each, each.measured(draw, epsilon), draw, color)
            for draw in MARKERS:
                _points(column[1], times, each, each.decided(draw), draw, color)
            for one in each.trained:
                column[0].plot(one.time, one.depth, "x", color=BLACK, ms=8, mew=1.5, zorder=5)
                column[0].annotate(
                    f"{100 * one.distance('gaussian')[0]:.2g}%",
                    (one.time, one.depth),
                    (-6, 3),
                    textcoords="offset points",
                    ha="right",
                    fontsize="small",
                )
        last = list(by_count.values())[-1]
        for axes, epsilons in ((column[0], last.epsilons), (column[1], last.epsilons[:1])):
            for epsilon, depths in zip(epsilons, last.predicted, strict=False):
                axes.annotate(
                    f"{100 * epsilon:g}%",
                    (last.times[-1], depths[-1]),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                )
        column[1].plot(last.times, last.predicted[0], color=BLACK, linewidth=1.0)
        least, most = last.predicted[0].min(), last.predicted[0].max()
        finding = f"{100 * last.epsilons[0]:g}% takes {least:,} to {most:,} layers"
        column[0].set_title(f"{TITLES.get(name, name)}:\n{finding}", fontsize="medium")
        column[1].set_xlabel("kernel time $t$")
        for axes in column:
            for depth in (last.depths[0], last.depths[-1]):
                axes.axhline(depth, **ENDS)
            log_scale(axes, "x", "y")
            axes.margins(x=0.12)
            axes.grid(alpha=0.3)
        column[0].legend(fontsize="small")
    panels[0, 0].set_ylabel(r"depth at distance $\epsilon$ from the limit")
    panels[1, 0].set_ylabel("depth at which 99% of the\ndecisions are the limit's")
    _legend(figure, panels[1, 0])
    return figure


def _points(
    axes: "Axes", times: np.ndarray, each: Any, measured: np.ndarray, draw: str, color: Any
) -> None:
    """Measured depths [3, T] between the first depth and the last, with their intervals."""
    kept = (measured[0] > each.depths[0]) & (measured[0] <= each.depths[-1])
    depth, low, high = np.minimum(measured[:, kept], each.depths[-1])
    marker, size, _ = MARKERS[draw]
    axes.errorbar(
        *(times[kept], depth, [depth - low, high - depth]),
        fmt=marker,
        **{"color": color, "ms": size, "elinewidth": 0.8, "capsize": 0},
        mfc="none" if draw == "gaussian" else color,
    )


def _legend(figure: "Figure", axes: "Axes") -> None:
    for draw, (marker, size, label) in MARKERS.items():
        filled = "none" if draw == "gaussian" else BLACK
        axes.plot([], [], marker, color=BLACK, mfc=filled, ms=size, label=f"measured, {label}")
    label = "trained in closed form, with their distance"
    axes.plot([], [], "x", color=BLACK, ms=8, mew=1.5, label=label)
    axes.plot([], [], color=BLACK, linewidth=1.0, label="predicted (above: for each $n$)")
    axes.plot([], [], **ENDS, label="least and largest depth measured")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize="medium")
