"""Figure of ``scripts/cross_entropy.py``: networks on cross-entropy and their limit."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, colors, log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["cross_entropy_figure"]

LINES, MARKERS = ("-", "--", "-.", ":"), "osD^v"


def cross_entropy_figure(found: dict[float, Any]) -> "Figure":
    """Distance from the limit against depth, and kernel movement against time.

    ``found``: {smoothing: `dnntk.experiments.cross_entropy.Smoothed`}. Geometric means over the
    networks; the movement is that of the first, a middle and the last depth.
    """
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    ordered = list(zip(found.items(), colors(len(found)), strict=True))
    for i, ((smoothing, one), color) in enumerate(ordered):
        style = {"color": color, "linestyle": LINES[i % len(LINES)], "linewidth": 2}
        distance = np.exp(np.log(one.distance[:, -1]).mean(-1))
        mark = MARKERS[i % len(MARKERS)]
        left.plot(one.depths, distance, marker=mark, label=f"smoothing {smoothing:g}", **style)
        for place in sorted({0, len(one.depths) // 2, len(one.depths) - 1}):
            movement = np.exp(np.log(one.movement[place]).mean(-1))
            right.plot(one.times, movement, marker=mark, ms=5, **style)
            if not i:
                text = f"$L$ = {one.depths[place]:,}"
                place_of = {"xy": (one.times[-1], movement[-1]), "xytext": (0, 9), "ha": "right"}
                right.annotate(text, **place_of, textcoords="offset points", fontsize="large")
    one = ordered[0][0][1]
    guide = np.exp(np.log(one.distance[0, -1]).mean()) * (one.depths / one.depths[0]) ** -0.5
    left.plot(one.depths, guide, ":", color=BLACK, linewidth=1.5, label="$L^{-1/2}$")
    size = "x-large"
    left.set_title(f"distance from the limit, $t$ = {one.times[-1]:g}", fontsize=size)
    left.set_xlabel("depth $L$", fontsize=size)
    left.set_ylabel(r"$\|f_t^L - f_t\| \,/\, \|f_t\|$", fontsize=size)
    right.set_title("movement of the kernel", fontsize=size)
    right.set_xlabel("kernel time $t$", fontsize=size)
    right.set_ylabel(r"$\|\Theta_t^L - \Theta_0^L\| \,/\, \|\Theta_0^L\|$", fontsize=size)
    for axes in (left, right):
        log_scale(axes, "x", "y")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="large")
        axes.margins(y=0.1)
    left.legend(fontsize="large")
    return figure
