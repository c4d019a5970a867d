"""Maps with the thesis's row, peaks beside the kink's loss, kernels and accuracies."""

import numpy as np
import pytest

from dnntk.experiments.catapult import Runs
from dnntk.experiments.catapult_config import CatapultConfig
from dnntk.figures.catapult import ROWS, catapult_figure


def made(config):
    """Runs at two ratios: all come back at the first, two of three at the second."""
    losses = np.ones((2, 3, 4))
    losses[:, :, 1], losses[:, :, 2:] = 7.0, 0.5
    losses[1, 0, 2:] = np.nan
    after = accuracy = np.where(np.isfinite(losses[:, :, 3]), 0.5, np.nan)
    return {
        (depth, scale): Runs(losses, np.ones(3), after, accuracy, np.array(scale))
        for depth in config.depths
        for scale in config.scales
    }


@pytest.mark.parametrize("arch", ROWS)
def test_curves_are_medians_and_the_architecture_s_row_stands_on_the_maps(arch):
    config = CatapultConfig(
        arch=arch, depths=(4, 8), scales=(1.0, 4.0), ratios=(1.0, 16.0), trials=3, steps=4
    )
    found = made(config)
    fits = [None, {"exponent": 1.5, "low": 1.0, "high": 2.0}]
    figure = catapult_figure(config, found, dict.fromkeys(config.depths, fits))
    first, last, peaks, power, kernels, accuracies = figure.axes
    for axes in (first, last):
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks[::2]]
        name, ratio, _ = ROWS[arch]
        np.testing.assert_allclose(places, [(np.log(ratio) / np.log(16), 1)])  # C = 4 is second
        assert axes.texts[-1].get_text() == name
        # Two of three came back after two steps, or all.
        assert [text.get_text() for text in axes.texts][:4] == ["2"] * 4
        np.testing.assert_allclose(axes.images[0].get_array(), [[1, 2 / 3]] * 2)
    curves = {tuple(line.get_ydata()) for line in peaks.lines}
    assert {(7.0, 7.0), (1.0, 1.0), (4.0, 4.0)} <= curves
    assert any(list(line.get_ydata()) == [1.5] for line in power.lines)
    assert any(list(line.get_ydata()) == [0.5, 8.0] for line in kernels.lines)
    assert [list(line.get_ydata()) for line in accuracies.lines][:2] == [[50.0, 50.0]] * 2
    assert "4 of 24 runs diverged" in figure.get_suptitle()


def test_ticks_are_the_runs_ratios_and_a_row_beyond_them_is_not_shown():
    config = CatapultConfig(depths=(4, 8), scales=(1.0, 4.0), ratios=(1.0, 4.0), trials=3, steps=4)
    first, last, *others = catapult_figure(config, made(config), {}).axes
    assert not any(line.get_marker() == "o" for axes in (first, last) for line in axes.lines)
    assert [list(axes.get_xticks()) for axes in others] == [[1.0, 4.0]] * 4
    assert [tick.get_text() for tick in others[0].get_xticklabels()] == ["1", "4"]
    for axes in others:  # theory's bounds beyond the ratios do not stretch the axis
        low, high = axes.get_xlim()
        assert (
            0.8 < low < 1 and 4 < high < 5 and any(line.get_xdata()[0] == 2 for line in axes.lines)
        )
