"""Figures of ``scripts/ntk_convergence.py``: figure 4.1, and the rates of section 5.1."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, ORANGE, colors, new_figure, panels_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence_figure", "rates_figure"]

RATE_PANELS = {
    "deviation": r"relative distance from the limit at $t = 0$",
    "movement": "largest relative movement in training",
    "sign_changes": "fraction of neurons that changed sign",
    "growth": r"$\Gamma(T)/\Gamma(0) - 1$",
}


def convergence_figure(
    angles: np.ndarray, target: np.ndarray, limit: np.ndarray, runs: dict[int, dict[str, Any]]
) -> "Figure":
    """Figure 4.1: trained networks (left) and their kernels before and after training (right).

    ``runs`` by depth, as in `ntk_convergence.ConvergenceResult`; ``limit`` is the limit kernel.
    """
    figure = panels_figure(2)
    left, right = figure.subplots(1, 2)
    for (depth, run), color in zip(sorted(runs.items()), colors(len(runs)), strict=True):
        many = {"color": color, "linewidth": 0.8, "alpha": 0.8}
        named = {"label": f"$L = {depth:,}$".replace(",", "{,}")}
        left.plot(angles, run["outputs"][-1].T, **many)
        right.plot(angles, run["kernel"][0].T, linestyle=":", **many)
        right.plot(angles, run["kernel"][-1].T, **many)
        left.plot([], [], color=color, **named)
        right.plot([], [], color=color, linestyle=":", label=named["label"] + ", $t = 0$")
        right.plot([], [], color=color, label=named["label"] + ", trained")
    left.plot(angles, target, "--", color=BLACK, label=r"target $\cos\gamma\,\sin\gamma$")
    right.plot(angles, limit, "--", color=BLACK, linewidth=1.8, label=r"limit $L = \infty$")
    left.set_ylabel("$f(x)$")
    right.set_ylabel(r"scaled NTK $\tilde\Theta^L(x_0, x)$")
    for axes in (left, right):
        axes.set_xlabel(r"angle $\gamma$ of $x$ on the arc (radians)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    trials = next(iter(runs.values()))["kernel"].shape[1]
    figure.suptitle(f"{trials} initializations each; $x_0$ at $\\pi/4$")
    return figure


def rates_figure(
    points: Sequence[tuple[str, int, dict[str, np.ndarray]]],
    fits: dict[str, dict[str, Any]],
    rules: tuple[float, float],
    psi_2_depth: int,
) -> "Figure":
    """Rates against depth for both rules of C: every trial, the fitted powers, theory's power.

    ``points``: (rule, depth, {quantity: values [trials]}); ``fits``: {rule: {quantity: fit}};
    ``rules``: the power of depth that C is by the first rule, and C by the second.
    """
    figure = new_figure(10.0, 7.6)
    styles = {
        "growing": (BLUE, "o", f"$C = L^{{{rules[0]:g}}}$"),
        "constant": (ORANGE, "s", f"$C = {rules[1]:g}$"),
    }
    for axes, (quantity, label) in zip(
        figure.subplots(2, 2).flat, RATE_PANELS.items(), strict=True
    ):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for rule, (color, marker, name) in styles.items():
            mine = [(depth, values[quantity]) for kind, depth, values in points if kind == rule]
            depths = np.array([depth for depth, values in mine for _ in values], float)
            sizes = np.concatenate([values for _, values in mine])
            drawn = (sizes > 0) & np.isfinite(sizes)
            kinds = {"at 0": sizes <= 0, "diverged": ~np.isfinite(sizes)}
            counts = {kind: int(np.sum(which)) for kind, which in kinds.items()}
            left_out = "".join(f"; {count} {kind}" for kind, count in counts.items() if count)
            fit = fits[rule][quantity]
            if fit is not None:
                ends = np.array([depths.min(), depths.max()])
                axes.plot(ends, fit["factor"] * ends ** fit["exponent"], color=color)
                name += f": $L^{{{fit['exponent']:.2f}}}$ [{fit['low']:.2f}, {fit['high']:.2f}]"
            axes.plot(
                *(depths[drawn], sizes[drawn], marker),
                **{"color": color, "ms": 4, "alpha": 0.5, "mec": "none"},
                label=name + left_out,
            )
        if quantity == "deviation":
            ends = np.array(axes.get_xlim())
            anchor = np.sqrt(ends[0]) * np.nanmax([v[quantity].max() for _, _, v in points])
            axes.plot(ends, anchor / np.sqrt(ends), ":", color=BLACK, label="theory: $L^{-1/2}$")
            axes.set_xlim(*ends)
        axes.set_ylabel(label)
        axes.set_xlabel("depth $L$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(rf"$\Gamma$ includes $\Psi_2$ up to $L = {psi_2_depth}$; 95% intervals")
    return figure
