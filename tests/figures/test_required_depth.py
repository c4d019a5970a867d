"""A column a problem: predicted curves, and points where a depth was measured."""

from types import SimpleNamespace

import numpy as np

from dnntk.figures.required_depth import required_depth_figure


def test_curves_are_predicted_and_points_measured_within_the_depths():
    measured = np.array([[4.0, 30.0, np.inf], [4.0, 20.0, 90.0], [6.0, np.inf, np.inf]])
    trained = SimpleNamespace(depth=40, time=100.0, epsilon=0.01, distance=lambda _: [0.02])
    each = SimpleNamespace(
        times=np.array([1.0, 10.0, 100.0]),
        epsilons=np.array([0.01, 0.1]),
        predicted=np.array([[3, 40, 5000], [2, 2, 50]]),
        depths=np.array([4, 100]),
        measured=lambda draw, epsilon: measured,
        decided=lambda draw: measured,
        trained=[trained],
    )
    alone = required_depth_figure({"own": {120: each}})
    alone.draw_without_rendering()
    box = alone.get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= alone.get_figwidth()
    figure = required_depth_figure({"digits": {120: each}, "own": {120: each}})
    top, _, bottom, _ = figure.axes
    finding = ":\n1% takes 3 to 5,000 layers"
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == [f"digits, ten classes{finding}", f"own{finding}"]
    lines = [list(line.get_ydata()) for line in top.lines]
    assert [3, 40, 5000] in lines and [2, 2, 50] in lines
    assert [40] in lines and "2%" in [text.get_text() for text in top.texts]  # as trained
    for axes, sets in ((top, 4), (bottom, 2)):
        assert len(axes.containers) == sets
        for points, _, (bars,) in axes.containers:
            np.testing.assert_array_equal(points.get_xydata(), [[10, 30]])
            np.testing.assert_array_equal(bars.get_segments()[0][:, 1], [20, 100])
    assert [3, 40, 5000] in [list(line.get_ydata()) for line in bottom.lines]
