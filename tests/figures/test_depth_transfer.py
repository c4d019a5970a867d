"""Curves and losses by rate of each optimizer, all distances, and the deepest network."""

from types import SimpleNamespace

import numpy as np

from dnntk.experiments.depth_transfer_config import Kind
from dnntk.figures.depth_transfer import depth_transfer_figure

DEPTHS = (10, 30, 100)


def curves(optimizer, scale, init="deep_narrow"):
    distances = {depth: np.full(2, scale / depth) for depth in DEPTHS[:2]}
    return SimpleNamespace(
        kind=Kind("mlp", init, optimizer, scale),
        rates=np.array([0.01, 0.02]),
        sweep={depth: np.array([0.2, np.inf]) for depth in DEPTHS[:2]},
        losses={depth: np.full((1, 5), scale) for depth in DEPTHS},
        distances=lambda: distances,
        fit=lambda: {"exponent": -1.0},
        best=lambda depth: scale + depth,
    )


def test_panels_show_every_depth_every_rate_and_the_power():
    kinds = [curves("sgd", 0.3), curves("adam", 0.3), curves("adam", 1.0)]
    deepest = SimpleNamespace(
        kind=kinds[1].kind, rate=0.01, depths=(30, 1000), losses=np.ones((2, 5))
    )
    figure = depth_transfer_figure([*kinds, curves("adam", 1.0, "he_uniform")], deepest)
    _, loss, _, sweep, distance, last = figure.axes
    assert figure.get_suptitle().endswith("of adam changes by a factor of 2.9 at most")  # 30.3/10.3
    lines = [line for line in loss.lines if line.get_linestyle() != "None"]
    assert [line.get_ydata()[0] for line in lines] == [0.3, 1.0]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2
    labels = [text.get_text() for text in sweep.get_legend().get_texts()]
    assert labels == ["depth 10", "depth 30", "deep narrow", "he uniform"]
    assert "adam" in sweep.get_title() and "$C$ = 1" in sweep.get_title()
    np.testing.assert_allclose(distance.lines[2].get_ydata(), [0.1, 1 / 30])
    assert any("-1.00" in text.get_text() for text in distance.get_legend().get_texts())
    assert "depth_rate = 0.01" in last.get_title()


def test_a_run_of_one_optimizer_without_a_deepest_network_has_three_panels():
    figure = depth_transfer_figure([curves("sgd", 1.0)], None)
    assert [axes.axison for axes in figure.axes] == [True, False, True, False, True, False]
    assert "time_step" in figure.axes[2].get_xlabel()
    single = curves("sgd", 1.0)
    single.distances = dict
    assert not depth_transfer_figure([single], None).axes[4].axison
