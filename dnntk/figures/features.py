"""Figure of ``scripts/features.py``: distance from the limit by depth, for each draw of units."""

from typing import TYPE_CHECKING, Any

from dnntk.figures.drawing import BLACK, BLUE, GREEN, ORANGE, log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["features_figure"]

LINES = ("-", "--", ":", "-.")  # of the numbers of random units, if there are several
STYLES = {
    "gaussian": (BLACK, "o", "-", "independent"),
    "antithetic": (GREEN, "v", "--", "antithetic"),
    "orthogonal": (ORANGE, "s", "-.", "orthogonal"),
    "sobol": (BLUE, "D", "-", "Sobol"),
}
ROWS = {
    "kernel": r"$\|\Theta^L - \Theta\| \,/\, \|\Theta\|$",
    "random": "its random part",
    "predictions": r"$\|f_t^L - f_t\| \,/\, \|f_t\|$",
}
TITLES = {"toy": "toy, MLP", "digits": "digits, MLP", "digits_cnn": "digits, CNN"}


def features_figure(found: dict[str, dict[str, Any]], near: float) -> "Figure":
    """A column a case, a row a quantity: root mean squares over the trials.

    ``found``: {case: {key: `dnntk.experiments.features.Distances`}}. The dotted line is at the
    distance ``near``.
    """
    counts = sorted({one.random_units for each in found.values() for one in each.values()})
    # A column of the legend holds a number of random units; if there is one, a draw.
    columns, width = (len(counts), 2.7) if len(counts) > 1 else (len(STYLES), 1.7)
    figure = new_figure(max(1.3 + 2.1 * len(found), width * columns), 6.6)
    panels = figure.subplots(len(ROWS), len(found), squeeze=False, sharex=True, sharey="row")
    for column, (case, each) in enumerate(found.items()):
        for axes, (quantity, label) in zip(panels[:, column], ROWS.items(), strict=True):
            for distances in each.values():
                color, marker, line, name = STYLES[distances.draw]
                if len(counts) > 1:
                    line = LINES[counts.index(distances.random_units) % len(LINES)]
                    name += f", $M$ = {distances.random_units}"
                style = {"color": color, "marker": marker, "linestyle": line, "ms": 4}
                axes.plot(distances.depths, distances.mean(quantity), **style, label=name)
            axes.axhline(near, linestyle=":", color=BLACK, linewidth=1.0)
            log_scale(axes, "x", "y")
            axes.grid(alpha=0.3)
            if not column:
                axes.set_ylabel(label, fontsize="large")
        panels[0, column].set_title(TITLES[case])
        panels[-1, column].set_xlabel("depth $L$")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize="large")
    return figure
