"""Figure of the errata: printed, corrected and measured kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dnntk.figures.drawing import BLACK, BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["errata_figure"]


def errata_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """One line per statement: the printed, the corrected, and the measured value with its error."""
    figure = new_figure(7.6, 1.2 + 0.9 * len(rows))
    axes = figure.subplots()
    heights = range(len(rows))[::-1]
    across = {name: [row[name] for row in rows] for name in ("printed", "corrected", "measured")}
    axes.plot(across["printed"], heights, "X", ms=9, color=ORANGE, label="as printed")
    axes.plot(across["corrected"], heights, "|", ms=15, mew=3, color=BLUE, label="corrected")
    axes.errorbar(
        across["measured"],
        heights,
        xerr=[3 * row["standard_error"] for row in rows],
        fmt="o",
        ms=5,
        capsize=4,
        color=BLACK,
        label=f"networks of depth {rows[0]['depth']:,}, 3 standard errors",
    )
    for row, height in zip(rows, heights, strict=True):
        text = f"{row['statement']}\n{row['setting']}"
        axes.annotate(
            text,
            (0.01, height + 0.42),
            xycoords=("axes fraction", "data"),
            va="top",
            fontsize="small",
        )
    axes.set_xscale("log")
    axes.set_ylim(-0.5, len(rows) - 0.45)
    axes.set_yticks([])
    axes.set_xlabel(r"scaled NTK $\tilde\Theta(x, x)$")
    axes.grid(alpha=0.3, axis="x", which="both")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure
