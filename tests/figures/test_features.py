"""A column a case, a row a quantity, a curve a draw; trained networks are hollow points."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.features import ROWS, features_figure


def test_curves_are_the_means_and_hollow_points_the_trained_networks():
    depths = np.array([18, 66, 258])
    sizes = {name: (1 + i) / depths for i, name in enumerate(ROWS)}
    found = SimpleNamespace(
        depths=depths, mean=sizes.get, trained={66: {"sgd": np.array([0.02, 0.03])}}
    )
    figure = features_figure({"toy": {"sobol": found}, "digits_cnn": {"sobol": found}}, 0.01)
    assert len(figure.axes) == 6
    for axes, name in zip(figure.axes[::2], ROWS, strict=True):
        curve, *points = (line for line in axes.lines if line.get_marker() == "D")
        np.testing.assert_array_equal(curve.get_ydata(), sizes[name])
        shown = [[66, 66, 0.02, 0.03]] if name == "predictions" else []
        assert [[*line.get_xdata(), *line.get_ydata()] for line in points] == shown
        assert [0.01, 0.01] in [list(line.get_ydata()) for line in axes.lines]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["toy, MLP", "digits, CNN"]
