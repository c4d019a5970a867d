"""Table and plots of benchmark.py's results."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarking.measure import Row
from dnntk import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_figure", "ntk_figure", "table"]

# Workers in a fixed order, each with its own color and marker.
STYLES = (
    ("dnntk", figures.BLUE, "o"),
    ("PyTorch loop", figures.ORANGE, "s"),
    ("lax.scan", figures.GREEN, "D"),
    ("unrolled", figures.BLACK, "^"),
)


def ntk_figure(rows: Sequence[Row]) -> "Figure":
    """Time against depth: runs and first calls, layerwise and its baselines."""
    lines: dict[str, dict[str, dict[int, Row]]] = {}
    for row in rows:
        found = {"layerwise": row} | ({row["peer"]["name"]: row["peer"]} if "peer" in row else {})
        for name, spread in found.items():
            lines.setdefault(name, {}).setdefault(row["kind"], {})[row["depth"]] = spread
    figure = figures.new_figure(6.4, 4.4)
    axes = figure.subplots()
    colors = (figures.BLUE, figures.ORANGE, figures.GREEN)
    for (name, kinds), color, marker in zip(lines.items(), colors, "osD", strict=False):
        for kind, style in (("first call", "--"), ("run", "-")):
            depths, spreads = zip(*sorted(kinds[kind].items()), strict=True)
            median = np.array([s["median"] for s in spreads])
            ends = np.array([s["quartiles"] for s in spreads]).T
            label = f"{name}, {'first call (compiles)' if kind == 'first call' else 'run'}"
            axes.errorbar(
                depths,
                median,
                np.abs(ends - median),
                fmt=marker + style,
                color=color,
                markerfacecolor=color if kind == "run" else "white",
                capsize=2,
                label=label,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("depth $L$")
    axes.set_ylabel("time (s): median and quartiles")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.suptitle("Empirical NTK [{0}, {0}] of a 4-wide MLP, float64".format(rows[0]["points"]))
    return figure


def cost_figure(rows: Sequence[Row], title: str) -> "Figure":
    """A training step's time and compilation (left) and its memory (right) against depth."""
    figure = figures.new_figure(10.4, 5.0)
    left, right = figure.subplots(1, 2)
    for name, color, marker in STYLES:
        style: dict[str, Any] = {"color": color, "capsize": 2, "markersize": 5}
        _against_depth(left, rows, name, "step", marker + "-", label=name, **style)
        hollow = {**style, "markerfacecolor": "white", "linewidth": 1.0}
        _against_depth(
            left, rows, name, "compilation", marker + "--", label=f"{name}: compilation", **hollow
        )
        kind = "memory beyond the parameters"
        _against_depth(right, rows, name, kind, marker + "-", label=name, unit=1e6, **style)
    for axes, power, label in ((left, 1, r"$\propto L$"), (right, 0.5, r"$\propto \sqrt{L}$")):
        line = axes.containers[0].lines[0]
        depths, values = (np.array(values, float) for values in line.get_data())
        guide = values[-1] * (depths / depths[-1]) ** power
        axes.plot(depths, guide, ":", color="gray", label=label, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("depth $L$")
        axes.grid(alpha=0.3)
    legend = {
        label: handle
        for axes in (left, right)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=5, fontsize="small"
    )
    left.set_ylabel("time of a training step (s): median, quartiles")
    right.set_ylabel("peak memory of a step beyond\nparameters and gradient (MB)")
    figure.suptitle(title)
    return figure


def _against_depth(
    axes: "Axes",
    rows: Sequence[Row],
    name: str,
    kind: str,
    fmt: str,
    unit: float = 1.0,
    **style: Any,
) -> None:
    """Plot one worker's numbers of one kind."""
    found = {}
    for row in rows:
        if row.get("kind") == kind:
            if name == "dnntk":
                found[row["depth"]] = row
            elif row.get("peer", {}).get("name") == name:
                found[row["depth"]] = row["peer"]
    if found:
        depths, spreads = zip(*sorted(found.items()), strict=True)
        median = np.array([s["median"] for s in spreads]) / unit
        ends = np.array([s["quartiles"] for s in spreads]).T / unit
        axes.errorbar(depths, median, np.abs(ends - median), fmt=fmt, **style)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A text table with a line for every row of every benchmark."""
    head = ("benchmark", "what", "median [quartiles]", "peer", "of the peer's", "promise", "met")
    lines = [head]
    for name, result in results.items():
        for row in result["rows"]:
            baseline = row.get("peer")
            beside = f"{baseline['name']}: {_shown(baseline, row['unit'])}" if baseline else "-"
            ratio = _shown(row["ratio"], "x") if baseline else "-"
            met = {True: "yes", False: "NO", None: "-"}[row["met"]]
            beside = row.get("peer_missing") or beside
            own = _shown(row, row["unit"])
            lines.append((name, row["what"], own, beside, ratio, row["promise"] or "-", met))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _shown(spread: dict[str, Any], unit: str) -> str:
    numbers = [spread["median"], *spread["quartiles"]]
    if unit == "bytes":
        numbers, unit = [number / 1e9 for number in numbers], "GB"
    if numbers[0] and len(spread["samples"]) == 1:
        return f"{numbers[0]:.3g} {unit}"
    return "{:.3g} {} [{:.3g}, {:.3g}]".format(numbers[0], unit, *numbers[1:])
