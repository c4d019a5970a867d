"""Means over trials, and the sentences made of them."""

import math

import pytest

from dnntk.experiments.depth_or_width import findings
from dnntk.experiments.depth_or_width.config import NetworkSetting


def regime_rows():
    """Three C, two trials each; the third C's diverged."""
    for scale, accuracy in ((1.0, 0.9), (math.inf, 0.8), (0.5, None)):
        for trial in range(2):
            record = {"clock": "equal", "time": 2.0, "test_accuracy": accuracy, "test_loss": 0.1}
            record |= {"train_accuracy": 1.0, "train_loss": 0.1, "seconds": 1.0}
            record |= {"movement": 0.2 * trial, "alignment": 0.5}
            setting = NetworkSetting("regime", "digits", "regime", 9, scale, trial)
            row = {"width": 5, "parameters": 7, "alignment": 0.4, "halvings": trial}
            yield setting.fields() | row | {"records": [record] if accuracy else []}


def test_points_are_means_over_trials_and_what_diverged_is_left_out():
    means = findings.points(regime_rows())
    assert [(p["scale"], p["trials"], p["halvings"]) for p in means] == [
        (1.0, 2, 1),
        (math.inf, 2, 1),
    ]
    assert means[0]["movement"] == pytest.approx(0.1) == means[0]["movement_error"]
    assert means[0]["test_accuracy_error"] == 0 and means[0]["start"] == 0.4
    said = findings.statements(means, {}, {})
    assert any("from C = inf to 1 test accuracy changes by +10.0 points" in line for line in said)


def test_a_side_is_ahead_beyond_twice_the_error_only():
    def point(accuracy, error):
        return {"test_accuracy": accuracy, "test_accuracy_error": error}

    difference = findings.difference
    gap, error = difference(point(0.9, 0.01), point(0.8, None), 100)
    assert gap == pytest.approx(0.1)
    assert error == pytest.approx(math.sqrt(0.01**2 + 0.09 / 100 + 0.16 / 100))
    verdict = findings._verdict
    assert verdict([(0.1, 0.06), (-0.1, 0.06)], ("a", "b")).startswith("no difference")
    assert verdict([(0.1, 0.04), (-0.1, 0.06)], ("a", "b")).startswith("a ahead at 1 of 2")
    assert "b ahead at 2 of 2" in verdict([(-0.1, 0.01)] * 2, ("a", "b"))
