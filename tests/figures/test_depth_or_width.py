"""Networks' points stand beside the limits of depth and width."""

import math

from dnntk.figures.depth_or_width import regime_figure


def test_infinite_scale_stands_at_the_right_end():
    side = {"clock": "equal", "time": 2.0, "test_accuracy": 0.7}
    limit = {"records": [side, side | {"clock": "matched"}], "alignment": 0.3}
    point = side | {"movement": 0.1, "movement_error": 0.1, "alignment": 0.5, "start": 0.4}
    means = [point | {"scale": scale, "test_accuracy_error": None} for scale in (1.0, math.inf)]
    limits = {"deep": limit | {"records": [side]}, "wide": limit}
    figure = regime_figure(means, limits, 2.0, "title")
    labels = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert labels[-1] == r"$\infty$" and len(figure.axes) == 3
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
