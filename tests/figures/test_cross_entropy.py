"""Curves are the means of the networks, a smoothing each."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.cross_entropy import cross_entropy_figure


def test_curves_are_geometric_means():
    depths, times = np.array([10, 100, 1000, 9000]), np.array([1.0, 10.0])
    values = np.random.default_rng(0).uniform(0.1, 1, (4, 2, 5))
    one = SimpleNamespace(depths=depths, times=times, distance=values, movement=values**2)
    figure = cross_entropy_figure({0.0: one, 0.1: one})
    left, right = figure.axes
    mean = np.exp(np.log(values).mean(-1))
    np.testing.assert_allclose(left.lines[0].get_ydata(), mean[:, 1])
    np.testing.assert_allclose(right.lines[0].get_ydata(), mean[0] ** 2)
    assert len(right.lines) == 2 * 3 and left.get_xscale() == right.get_yscale() == "log"
    assert left.lines[0].get_linestyle() != left.lines[1].get_linestyle()
    shown = [text.get_text() for text in left.get_legend().get_texts()]
    assert shown == ["smoothing 0", "smoothing 0.1", "$L^{-1/2}$"]
