"""Every trial is a point; a fitted power is a line and its exponent."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.limit_convergence import limit_figure


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
            *("$t = 1$: $L^{-0.50}$ [-0.60, -0.40]", "$t = 2$")
        ]
        for i, line in enumerate(trials):
            assert line.get_ydata().tolist() == differences[:, :, i].ravel().tolist()
        fitted = axes.lines[0]
        np.testing.assert_allclose(fitted.get_ydata(), depths**-0.5)
    assert [axes.get_title() for axes in figure.axes] == ["MLP", "CNN"]
    assert "2 initializations" in figure.get_suptitle()
