"""Figure 5.1: the output after every layer, and histograms of the layers' shares in the output."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, GREEN, ORANGE, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accumulation_figure", "shares_figure"]

# The colours of `drawing`, and two more by Okabe and Ito.
COLOURS, MARKERS = (BLUE, ORANGE, GREEN, "#D55E00", "#CC79A7"), "osD^vPX"
# Most layers drawn, evenly spaced: more are not visible in print, and the PDF would be large.
MOST_DRAWN = 500
WIDE = 3.0
BINS = 40
COLUMNS = 5
# Fraction of the shares that a histogram leaves out at each end.
TAIL = 0.001


def accumulation_figure(found: Any, title: str, averaged: bool) -> "Figure":
    """The output neuron after every layer (left), and its difference from the limit (right).

    ``found`` is an `accumulation.Accumulation`. The trained network's curve is wide and pale,
    linear theory's curve lies over it. With ``averaged``, values are means over an image.
    """
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    depth = len(found.trained)
    shown = np.unique(np.linspace(0, depth - 1, min(depth, MOST_DRAWN)).astype(int))
    for i in range(len(found.labels)):
        color = COLOURS[i % len(COLOURS)]
        marker = {"marker": MARKERS[i % len(MARKERS)], "markevery": 0.1, "ms": 5}
        name = f"{plain(found.labels[i])}; target {found.targets[i]:.3g}"
        for axes, base in ((left, 0 * found.line), (right, found.line)):
            trained, theory = (a[shown, i] - base[shown, i] for a in (found.trained, found.theory))
            wide = {"color": color, "linewidth": WIDE, "alpha": 0.45}
            axes.plot(shown + 1, trained, **wide, **marker, mec="none", label=name)
            axes.plot(shown + 1, theory, "--", color=color, linewidth=1.1)
    left.plot(shown + 1, found.line[shown], ":", color=BLACK, linewidth=0.9)
    right.axhline(0, linestyle=":", color=BLACK, linewidth=0.9)
    what = r"$\sigma(f^{(l)}(x))_{d_{in}+1+d_{out}} - C$;  $f^{(L)}(x)$ at $l = L$"
    if averaged:
        what = r"image's mean of $\sigma(f^{(l)}(x))_{c+1+k} - C$;  $f^{(L)}(x)$ at $l = L$"
    left.set_ylabel(what)
    right.set_ylabel(r"the same $-\ (l/L)\,f_t(x)$ of the limit")
    for axes in (left, right):
        axes.set_xlabel("layer $l$")
        axes.grid(alpha=0.3)
    styles = [
        left.plot([], [], color=BLACK, linewidth=WIDE, alpha=0.45, label="trained network")[0],
        left.plot([], [], "--", color=BLACK, linewidth=1.1, label="linear theory, same network")[0],
        left.plot([], [], ":", color=BLACK, linewidth=0.9, label=r"limit, $(l/L)\,f_t(x)$")[0],
    ]
    inputs = [line for line in left.lines if "target" in str(line.get_label())]
    figure.legend(handles=[*inputs, *styles], loc="outside lower center", ncols=3, fontsize="small")
    figure.set_figheight(4.2 + 0.2 * math.ceil((len(inputs) + len(styles)) / 3))
    figure.suptitle(title, wrap=True)
    return figure


def shares_figure(found: Any, title: str) -> "Figure":
    """Measured and predicted histograms of depth times a layer's share, one panel per input."""
    count = len(found.labels)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(max(2.6 * columns, 5.0), 2.9 * rows + 0.7)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    for i, axes in enumerate(panels.flat[:count]):
        _histograms(axes, found.shares[:, i], found.drawn[:, i], found.limit[i])
        axes.set_title(plain(found.labels[i]), fontsize="small")
        axes.set_xlabel(r"$L \cdot$ share of a layer")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("layers in a bin (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title, wrap=True)
    return figure


def _histograms(axes: "Axes", measured: np.ndarray, predicted: np.ndarray, mean: float) -> None:
    """Both histograms in percent of layers, with the same bins, and the predicted mean."""
    low, high = np.quantile(np.concatenate([measured, predicted]), [TAIL, 1 - TAIL])
    bins = np.linspace(low, high, BINS + 1).tolist()

    def percent(values: np.ndarray) -> np.ndarray:
        return np.full(len(values), 100 / len(values))

    axes.hist(
        measured,
        bins,
        weights=percent(measured),
        color=BLUE,
        alpha=0.45,
        label="trained network",
    )
    axes.hist(
        predicted,
        bins,
        weights=percent(predicted),
        histtype="step",
        color=BLACK,
        linestyle="--",
        label="linear theory, random units drawn",
    )
    name = "predicted mean, $f_t(x)$ of the limit"
    axes.axvline(mean, color=ORANGE, linestyle="-.", linewidth=1.2, label=name)
    axes.set_yscale("log")
