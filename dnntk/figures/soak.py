"""The picture of a soak: where runs were killed, and that they ended as if nothing had been."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dnntk.figures.drawing import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["soak_figure"]

MARKERS = {"SIGKILL": ("x", BLUE), "SIGTERM": ("o", ORANGE)}


def soak_figure(rows: Sequence[dict[str, Any]], steps: int) -> "Figure":
    """Every kill: the newest checkpoint that it left against the number of the run.

    Args:
        rows: as ``scripts/soak.py`` writes them.
        steps: of each run.
    """
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for kind, (marker, color) in MARKERS.items():
        kills = [
            (number, sitting["step"])
            for number, row in enumerate(rows)
            for sitting in row["sittings"]
            if sitting["killed_by"] == kind
        ]
        if kills:
            label = f"{kind} ({len(kills)})"
            axes.plot(*zip(*kills, strict=True), marker, color=color, ms=5, mfc="none", label=label)
    wrong = sum(not row["good"] for row in rows)
    axes.set_xlabel("run")
    axes.set_ylabel("newest checkpoint when killed (step)")
    axes.set_ylim(-0.03 * steps, 1.03 * steps)
    axes.set_title(f"{len(rows)} runs, {sum(row['kills'] for row in rows)} kills, {wrong} wrong")
    figure.legend(loc="outside right upper", fontsize="small")  # kills are everywhere
    axes.grid(alpha=0.3)
    return figure
