"""A column a case, a row a quantity, a curve a draw."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.features import ROWS, features_figure


def test_curves_are_the_means_beside_the_distance_that_is_near():
    depths = np.array([18, 66, 258])
    sizes = {name: (1 + i) / depths for i, name in enumerate(ROWS)}
    found = SimpleNamespace(draw="sobol", random_units=1, depths=depths, mean=sizes.get)
    figure = features_figure({"toy": {"sobol": found}, "digits_cnn": {"sobol": found}}, 0.01)
    assert len(figure.axes) == 6
    for axes, name in zip(figure.axes[::2], ROWS, strict=True):
        (curve,) = (line for line in axes.lines if line.get_marker() == "D")
        np.testing.assert_array_equal(curve.get_ydata(), sizes[name])
        assert [0.01, 0.01] in [list(line.get_ydata()) for line in axes.lines]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["toy, MLP", "digits, CNN"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Sobol"]
    more = SimpleNamespace(**{**vars(found), "random_units": 16})
    both = features_figure({"toy": {"sobol": found, "sobol-16": more}}, 0.01)
    names = [text.get_text() for text in both.legends[0].get_texts()]
    assert names == ["Sobol, $M$ = 1", "Sobol, $M$ = 16"]
    assert len({line.get_linestyle() for line in both.axes[0].lines[:2]}) == 2
    for each in (both, features_figure({"toy": {"sobol": found}}, 0.01)):
        each.draw_without_rendering()
        box = each.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= each.get_figwidth()
