"""The curves of a run as SVG: inside their frame, and only where there is something to draw."""

import itertools
import re

import pytest
from report_pages import history

from dnntk.report import curves


def test_a_run_without_a_picture_of_its_losses_has_a_curve(made):
    _, page = made
    labels = [svg["aria-label"] for svg in page.all("svg")]
    # Two of mlp-depth200, two of the one cut off less its accuracy with a single point; none of
    # mlp-depth1000, which has loss.png.
    assert len(labels) == 4
    assert "training from 0.5 to 0.0625; test from 0.6 to 0.075" in labels[-2]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.1, 0.01],
        [3.0, 3.0],
        [0.0, 0.0],
        [-1.0, 2.0, 1e-9],
        [1e299, -1e299],
        [5e-324, 1e299],
        [1.0, float("nan"), 1.0 + 1e-15],
        [10**400, 1, "2", None, 4.0],
        list(range(5000)),
    ],
)
def test_curves_stay_inside_their_frame(losses):
    lines = [{"step": i, "time": None, "train_loss": loss} for i, loss in enumerate(losses)]
    svg = curves.course(lines)
    paths = re.findall(r'<path d="([^"]*)"', svg)
    assert len(paths) > 4  # grid lines, axes, curve and legend
    for path in paths:
        assert re.fullmatch(r"[MLHVh\d. -]+", path)
    curve = re.search(r'd="M([^"]*)" class="training"', svg)[1]
    points = [tuple(map(float, point.split())) for point in curve.split("L")]
    assert 2 <= len(points) <= curves.POINTS
    for x, y in points:
        assert curves.LEFT <= x <= curves.WIDTH and curves.TOP <= y <= curves.HEIGHT
    assert all(a[0] < b[0] for a, b in itertools.pairwise(points))


def test_a_single_evaluation_is_no_curve():
    assert curves.course(history(1)) is None and curves.course([]) is None
