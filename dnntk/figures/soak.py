"""Figure of ``scripts/soak.py``: at which step runs were killed, and how many ended wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dnntk.figures.drawing import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["soak_figure"]

MARKERS = {"SIGKILL": ("x", BLUE), "SIGTERM": ("o", ORANGE)}


def soak_figure(rows: Sequence[dict[str, Any]], steps: int) -> "Figure":
    """The newest checkpoint at every kill, against the number of the killed run.

    Args:
        rows: lines of the file that ``scripts/soak.py`` writes.
        steps: number of steps of each run.
    """
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for kind, (marker, color) in MARKERS.items():
        kills = [
            (number, session["step"])
            for number, row in enumerate(rows)
            for session in row["sittings"]
            if session["killed_by"] == kind
        ]
        if kills:
            label = f"{kind} ({len(kills)})"
            axes.plot(*zip(*kills, strict=True), marker, color=color, ms=5, mfc="none", label=label)
    wrong = sum(not row["good"] for row in rows)
    axes.set_xlabel("run")
    axes.set_ylabel("newest checkpoint when killed (step)")
    axes.set_ylim(-0.03 * steps, 1.03 * steps)
    axes.set_title(f"{len(rows)} runs, {sum(row['kills'] for row in rows)} kills, {wrong} wrong")
    figure.legend(loc="outside right upper", fontsize="small")  # inside it would hide marks
    axes.grid(alpha=0.3)
    return figure
