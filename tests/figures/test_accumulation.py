"""The output after every layer, and the layers' shares, for every input."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.accumulation import MOST_DRAWN, accumulation_figure, shares_figure

RNG = np.random.default_rng(0)


def found(depth=6, inputs=2):
    layers = np.arange(1, depth + 1)[:, None] / depth * np.ones(inputs)
    return SimpleNamespace(
        trained=layers + 0.25, theory=layers + 0.5, line=layers, limit=np.ones(inputs),
        shares=RNG.normal(1, 0.5, (depth, inputs)), drawn=RNG.normal(1, 0.5, (400, inputs)),
        labels=[f"class {i}" for i in range(inputs)], targets=[float(i) for i in range(inputs)],
    )  # fmt: skip


def test_the_right_panel_shows_differences_from_the_limit():
    figure = accumulation_figure(found(), "title", averaged=False)
    left, right = figure.axes
    curves = [line.get_ydata() for line in right.lines[:4]]
    np.testing.assert_allclose(curves, np.repeat([[0.25, 0.5, 0.25, 0.5]], 6, axis=0).T)
    np.testing.assert_allclose(left.lines[0].get_ydata(), found().trained[:, 0])
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[:2] == ["class 0; target 0", "class 1; target 1"] and len(named) == 5


def test_of_many_layers_some_are_drawn_with_both_ends():
    across = accumulation_figure(found(5 * MOST_DRAWN, 1), "", averaged=True).axes[0].lines[0]
    shown = across.get_xdata()
    assert len(shown) == MOST_DRAWN and (shown[0], shown[-1]) == (1, 5 * MOST_DRAWN)


def test_every_input_has_a_panel_and_each_histogram_counts_in_percent():
    figure = shares_figure(found(400, inputs=6), "title")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"class {i}" for i in range(6)]
    for axes in shown:
        heights = [bar.get_height() for bar in axes.patches[:40]]
        assert 98 < sum(heights) <= 100 + 1e-9  # without the tails
