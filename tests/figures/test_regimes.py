"""A column an architecture, a row a quantity, a curve a depth beside its predicted power."""

import numpy as np

from dnntk.experiments.regimes import PREDICTED, Plane
from dnntk.figures.regimes import LEAST_COUNT, ROWS, regimes_figure


def made(depths, scales):
    """Networks that obey the predicted powers exactly, two trials."""
    depths, scales = (a.ravel() for a in np.meshgrid(depths, scales))
    values = {
        name: np.tile((depths**p * scales**q)[:, None], 2) for name, (p, q) in PREDICTED.items()
    }
    return Plane(depths, scales, values, 1.0)


def test_curves_are_the_means_beside_the_predicted_powers_and_the_title_says_what_is_needed():
    plane = made([10.0, 20, 30], [1.0, 10, 1000])
    depths, values = plane.depths, plane.values
    figure = regimes_figure({"mlp": plane})
    assert len(figure.axes) == len(ROWS)
    for axes, quantities in zip(figure.axes, ROWS.values(), strict=True):
        drawn = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 3]
        assert len(drawn) == 2 * 3 * len(quantities)  # measured and predicted
        for name in quantities:
            expected = values[name][depths == 20, 0]
            assert sum(np.allclose(curve, expected, rtol=1e-6) for curve in drawn) >= 2
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert marks == [100, 400, 900]  # C = L^2
    assert figure.axes[1].get_ylim()[0] == LEAST_COUNT
    assert "C^{-1.00" in figure.axes[0].get_title()
    said = figure.get_suptitle()
    assert (
        "stands still if $C \\to \\infty$" in said
        and "no sign changes if $C \\gg L^{0.50 \\pm 0.00}" in said
    )


def test_one_column_has_room_for_the_legend_and_says_that_no_sign_changes():
    plane = made([10.0, 20, 30, 40, 50, 60_000], [1.0, 10, 1000])
    plane.values["crossings"][:] = 0
    figure = regimes_figure({"cnn": plane})
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
    counts = figure.axes[1]
    assert counts.get_yscale() == "log" and [text.get_text() for text in counts.texts] == ["none"]
    assert not any(axes.texts for axes in figure.axes[2:])
