"""Every trial is a point; a fitted power is a line and its exponent."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.limit_convergence import limit_figure, scores_figure


def test_trials_fits_and_theory_are_drawn_per_time():
    depths, times = np.array([10.0, 100.0, 1000.0]), np.array([1.0, 2.0])
    differences = depths[:, None, None] ** -0.5 * np.array([1.0, 1.1])[None, :, None] * times
    theory = depths[:, None] ** -0.5 * times
    fit = {"factor": 1.0, "exponent": -0.5, "low": -0.6, "high": -0.4}
    found = SimpleNamespace(
        depths=depths, times=times, differences=differences, first_order=theory, linear=2 * theory,
        fits=[fit, None],
    )  # fmt: skip
    figure = limit_figure({"mlp": found, "cnn": found}, "title")
    for axes in figure.axes:
        trials = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_label() for line in trials] == [
            *("$t$ = 1: $L^{-0.50}$ [-0.60, -0.40]", "$t$ = 2")
        ]
        for i, line in enumerate(trials):
            assert line.get_ydata().tolist() == differences[:, :, i].ravel().tolist()
        fitted = axes.lines[0]
        np.testing.assert_allclose(fitted.get_ydata(), depths**-0.5)
    assert [axes.get_title() for axes in figure.axes] == ["MLP", "CNN"]
    assert "2 initializations" in figure.get_suptitle()


def test_scores_are_drawn_by_depth_beside_the_limit_and_the_number_of_examples():
    depths, times = np.array([10.0, 100.0, 1000.0]), np.array([1.0, 2.0])
    trained = depths[:, None, None] ** -0.5 * np.array([1.0, 1.1])[None, :, None] * times
    values = SimpleNamespace(trained=trained, linear=trained[:, 0], limit=0.01 * times)
    found = SimpleNamespace(
        depths=depths, times=times, train_loss=values, test_accuracy=values, examples=50
    )
    figure = scores_figure({"mlp": found, "cnn": found}, "title")
    assert [axes.get_title() for axes in figure.axes] == ["MLP", "MLP", "CNN", "CNN"]
    for axes, unit in zip(figure.axes, (1, 100, 1, 100), strict=True):
        points = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
        for i, drawn in enumerate(points):
            np.testing.assert_allclose(drawn, unit * trained[:, :, i].ravel())
        assert [50, 50] in [list(line.get_xdata()) for line in axes.lines]
        levels = [
            y for line in axes.lines if line.get_linestyle() == "--" for y in line.get_ydata()
        ]
        assert set(unit * values.limit) <= set(levels)
