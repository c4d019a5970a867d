"""Networks beside their limit, and rates that say what they leave out."""

import numpy as np

from dnntk.figures.ntk_convergence import RATE_PANELS, convergence_figure, rates_figure


def test_every_initialization_is_a_curve_before_and_after_training():
    angles, limit = np.linspace(0, 1, 5), np.full(5, 2.0)
    runs = {
        depth: {"outputs": np.full((3, 2, 5), depth), "kernel": np.full((3, 2, 5), 1.0 / depth)}
        for depth in (100, 10)
    }
    left, right = convergence_figure(angles, angles**2, limit, runs).axes
    curves = [line.get_ydata()[0] for line in left.lines if len(line.get_xdata()) == 5]
    assert curves == [10, 10, 100, 100, 0]  # two networks each, and the target
    assert sum(len(line.get_xdata()) == 5 for line in right.lines) == 2 * 4 + 1
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names[:2] == ["$L = 10$, $t = 0$", "$L = 10$, trained"] and "infty" in names[-1]


def test_the_legend_counts_what_a_logarithmic_axis_cannot_show():
    values = dict.fromkeys(RATE_PANELS, np.array([0.1, 0.2]))
    flawed = values | {"growth": np.array([0.0, np.inf])}
    points = [
        (rule, depth, flawed if (rule, depth) == ("constant", 30) else values)
        for rule in ("growing", "constant")
        for depth in (10, 30)
    ]
    fit = {"factor": 1.0, "exponent": -0.5, "low": -0.6, "high": -0.4}
    fits = {rule: dict.fromkeys(RATE_PANELS, fit) for rule in ("growing", "constant")}
    fits["constant"] = fits["constant"] | {"growth": None}
    figure = rates_figure(points, fits, (2.2, 5.0), 100)
    names = {
        quantity: [text.get_text() for text in axes.get_legend().get_texts()]
        for quantity, axes in zip(RATE_PANELS, figure.axes, strict=True)
    }
    assert names["growth"] == [
        *("$C = L^{2.2}$: $L^{-0.50}$ [-0.60, -0.40]", "$C = 5$; 1 at 0; 1 diverged")
    ]
    assert [len(names[quantity]) for quantity in RATE_PANELS] == [3, 2, 2, 2]  # theory's once
