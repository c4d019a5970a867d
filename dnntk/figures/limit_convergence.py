"""Figures of ``scripts/limit_convergence.py``: distance from the limit, and scores, by depth."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, colors, log_scale, new_figure, panels_figure
from dnntk.figures.training import LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["limit_figure", "scores_figure"]


def limit_figure(comparisons: dict[str, Any], title: str) -> "Figure":
    """Trained networks' distance from the limit against depth, one panel per architecture.

    ``comparisons``: {architecture: `limit_convergence.Comparison`}. Each panel shows every trial,
    the fitted powers, and linear theory's values, which need no training.
    """
    figure = panels_figure(len(comparisons))
    panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, (arch, found) in zip(panels, comparisons.items(), strict=True):
        for i, color in enumerate(colors(len(found.times))):
            values = found.differences[:, :, i]
            name, fit = f"$t$ = {found.times[i]:g}", found.fits[i]
            if fit is not None:
                fitted = fit["factor"] * found.depths ** fit["exponent"]
                axes.plot(found.depths, fitted, color=color)
                name += f": $L^{{{fit['exponent']:.2f}}}$ [{fit['low']:.2f}, {fit['high']:.2f}]"
            each = np.broadcast_to(found.depths[:, None], values.shape)
            style = {"color": color, "ms": 4, "alpha": 0.5, "mec": "none"}
            axes.plot(each.ravel(), values.ravel(), "o", label=name, **style)
            axes.plot(found.depths, found.first_order[:, i], "--", color=color, linewidth=1.0)
            axes.plot(found.depths, found.linear[:, i], "+", color=color, ms=11)
        axes.plot([], [], "--", color=BLACK, linewidth=1.0, label="theory, first order")
        axes.plot([], [], "+", color=BLACK, ms=11, linestyle="", label="theory, linear networks")
        log_scale(axes, "x", "y")
        axes.set_title(arch.upper())
        axes.set_xlabel("depth $L$")
        axes.set_ylabel(r"$\|f_\theta(t) - f_t\| \,/\, \|f_t\|$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    trials = next(iter(comparisons.values())).differences.shape[1]
    figure.suptitle(f"{title}\n{trials} initializations each, 95% intervals")
    return figure


def scores_figure(comparisons: dict[str, Any], title: str) -> "Figure":
    """Training loss and held-out accuracy against depth: networks beside their limit.

    ``comparisons`` are those of `limit_figure`, a row each. A network of L layers is linear in L
    random features, so a dotted line is at the depth that is the number of training examples.
    """
    figure = new_figure(10.0, 3.6 * len(comparisons))
    rows = figure.subplots(len(comparisons), 2, squeeze=False)
    for panels, (arch, found) in zip(rows, comparisons.items(), strict=True):
        for axes, name, unit in zip(panels, ("train_loss", "test_accuracy"), (1, 100), strict=True):
            values = getattr(found, name)
            for i, color in enumerate(colors(len(found.times))):
                label = f"$t$ = {found.times[i]:g}"
                each = unit * values.trained[:, :, i]
                depths = np.broadcast_to(found.depths[:, None], each.shape)
                axes.plot(depths.ravel(), each.ravel(), "o", color=color, ms=4, label=label)
                axes.plot(found.depths, unit * values.linear[:, i], "+-", color=color, ms=9)
                axes.axhline(unit * values.limit[i], linestyle="--", color=color, linewidth=1.0)
            axes.axvline(found.examples, linestyle=":", color=BLACK, linewidth=1.0)
            axes.set_title(arch.upper())
            axes.set_xlabel("depth $L$")
            axes.grid(alpha=0.3)
            log_scale(axes, "x")
        log_scale(panels[0], "y")
        panels[0].set_ylabel(LOSS)
        panels[1].set_ylabel("held-out accuracy (%)")
        panels[0].plot([], [], "+-", color=BLACK, ms=9, label="linear networks")
        panels[0].plot([], [], "--", color=BLACK, linewidth=1.0, label="limit")
        panels[0].plot([], [], ":", color=BLACK, linewidth=1.0, label="a layer an example")
        panels[0].legend(fontsize="small")
    figure.suptitle(title)
    return figure
