"""Figure of ``scripts/regimes.py``: what moves in training against C, a curve a depth."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, log_scale, new_figure, viridis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ROWS", "regimes_figure"]

# Rows of panels: a label, and {quantity: line style}. A panel's title has the first's powers.
ROWS = {
    "kernel's movement": {"kernel_train": "-", "kernel_test": ":"},
    "signs that change": {"crossings": "-"},
    r"$|f_t - f_0|$ and $|f_t|$": {"output": "-", "random": "--", "distance": "-."},
    r"$A$ of $\Gamma$'s bound": {"constant": "-"},
}
LINES = {
    "-": "training; output units",
    ":": "held out",
    "--": "random units",
    "-.": "distance to kink",
}
SYMBOLS = {"depth": "L", "scale": "C"}
TITLES = {"mlp": "MLP", "cnn": "CNN"}
MARKERS = "osD^v*"
CONDITIONS = {"kernel_train": "kernel stands still", "crossings": "no sign changes"}
THEOREM = r"theorem: $C \gg L^2$"
LEAST_COUNT = 0.05  # a count's lowest mean that is shown
LEAST_WIDTH, LEGEND_WIDTH = 6.4, 1.4  # inches: of the title, and of a column of the legend


def regimes_figure(found: dict[str, Any]) -> "Figure":
    """A column an architecture, a row a quantity: geometric means over the trials, mean counts.

    ``found``: {architecture: `dnntk.experiments.regimes.Plane`}. Thin black lines are the predicted
    powers; marks at the first row's foot are at C = L^2, above which the theorems' condition holds.
    """
    columns = max(len(np.unique(plane.depths)) for plane in found.values())
    width = max(LEAST_WIDTH, LEGEND_WIDTH * columns, 0.8 + 2.8 * len(found))
    figure = new_figure(width, 0.8 + 1.9 * len(ROWS))
    panels = figure.subplots(len(ROWS), len(found), squeeze=False, sharex="col", sharey="row")
    for column, (arch, plane) in enumerate(found.items()):
        depths = np.unique(plane.depths)
        for axes, (label, quantities) in zip(panels[:, column], ROWS.items(), strict=True):
            for quantity, line in quantities.items():
                _curves(axes, plane, depths, quantity, line)
            log_scale(axes, "x", "y")
            if not any(plane.mean(quantity).any() for quantity in quantities):
                _none(axes)
            axes.grid(alpha=0.3)
            axes.set_title(TITLES[arch] + _powers(plane, next(iter(quantities))), fontsize=11)
            if not column:
                axes.set_ylabel(label, fontsize=11)
        _mark_conditions(panels[0, column], depths, plane.scales.max())
        panels[-1, column].set_xlabel("$C$", fontsize=11)
    for axes, quantities in zip(panels[:, 0], ROWS.values(), strict=True):
        if "crossings" in quantities:
            axes.set_ylim(bottom=LEAST_COUNT)
    figure.suptitle("\n".join(_finding(*item) for item in found.items()), fontsize=10)
    _legend(figure, panels[0, 0], len(depths))
    return figure


def _legend(figure: "Figure", axes: "Axes", depths: int) -> None:
    """Two rows, which matplotlib fills column by column: the depths, and the line styles."""
    upper = list(zip(*axes.get_legend_handles_labels(), strict=True))[:depths]
    lower = [(axes.plot([], [], line, color=BLACK)[0], name) for line, name in LINES.items()]
    blank = (axes.plot([], [], " ")[0], "")
    pairs = itertools.zip_longest(upper, lower, fillvalue=blank)
    handles, names = zip(*itertools.chain.from_iterable(pairs), strict=True)
    columns = max(len(upper), len(lower))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5)


def _curves(axes: "Axes", plane: Any, depths: np.ndarray, quantity: str, line: str) -> None:
    means, predicted = plane.mean(quantity), plane.predicted(quantity)
    for i, (depth, color) in enumerate(zip(depths, viridis(len(depths), 0.8), strict=True)):
        cells = plane.depths == depth
        scales, shown = plane.scales[cells], np.where(means[cells] > 0, means[cells], np.nan)
        style = {"color": color, "marker": MARKERS[i % len(MARKERS)], "ms": 4, "linewidth": 1.2}
        name = f"$L = {depth:,}$".replace(",", "{,}")
        axes.plot(scales, shown, linestyle=line, **style, label=name)
        if predicted is not None:
            axes.plot(scales, predicted[cells], "-", color=BLACK, linewidth=0.5)


def _none(axes: "Axes") -> None:
    """An axis like the other panels' for counts that are all 0, and a note."""
    axes.set_yscale("log")
    axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)


def _mark_conditions(axes: "Axes", depths: np.ndarray, largest: float) -> None:
    for depth, color in zip(depths, viridis(len(depths), 0.8), strict=True):
        if depth**2 < largest:
            axes.axvline(float(depth) ** 2, ymax=0.12, color=color, linewidth=2.0)


def _finding(arch: str, plane: Any) -> str:
    """How fast C must grow for the kernel to stand still, and for no sign to change."""
    said = []
    for quantity, what in CONDITIONS.items():
        if (power := plane.needed(quantity)) is not None:
            error = plane.needed_error(quantity)
            interval = "" if error is None else rf" \pm {error:.2f}"
            grows = rf"C \gg L^{{{power:.2f}{interval}}}" if power else r"C \to \infty"
            said.append(f"{what} if ${grows}$")
    return f"{TITLES[arch]}: {', '.join([*said, THEOREM])}"


def _powers(plane: Any, quantity: str) -> str:
    """The fitted powers with their intervals' half-widths, in mathematics."""
    if (fit := plane.fit(quantity)) is None:
        return ""
    words = []
    for name, symbol in SYMBOLS.items():
        power = fit[name]
        half = (power["high"] - power["low"]) / 2
        words.append(f"{symbol}^{{{power['exponent']:.2f} \\pm {half:.2f}}}")
    return f": ${' '.join(words)}$"
