"""The figure of ``scripts/limit_convergence.py``: distance from the limit against depth."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, colors, log_scale, panels_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["limit_figure"]


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
            name, fit = f"$t = {found.times[i]:g}$", found.fits[i]
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
