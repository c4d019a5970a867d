import numpy as np
import pytest

from dnntk import figures
from dnntk.figures.attribution import Decision, TrainingShare


@pytest.mark.parametrize("shape", [(4, 6, 1), (5, 5, 3), (3, 3, 2)])
def test_any_images_are_drawn_with_what_they_say(shape):
    image = np.random.default_rng(0).normal(size=shape)
    examples = [TrainingShare(image, "T-shirt", 0.25), TrainingShare(0 * image, 7, -0.034)]
    rows = [Decision(image, 7, "T-shirt", "$x", examples), Decision(image, 1, 2, 3, examples[:1])]
    figure = figures.attribution_figure(rows, "title")
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    texts = [axes.get_xlabel() for axes in figure.axes]
    assert texts[0] == "T-shirt\nover \\$x\n(is 7)" and texts[3] == "2 over 3\n(is 1)"
    assert texts[1] == "T-shirt\n+25.0%" and texts[2] == "7\n\N{MINUS SIGN}3.4%"
    assert texts[5] == ""
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (shape if shape[2] == 3 else shape[:2])
    assert 0 <= shown.min() < shown.max() <= 1


def test_images_of_one_grey():
    one = TrainingShare(np.ones((2, 2, 1)), 0, 1.0)
    figures.attribution_figure([Decision(np.ones((2, 2, 1)), 0, 1, 0, [one])], "")
