"""All figures: drawn from plain arrays, saved as PNG and PDF, readable for the colour-blind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    draw,
    log_scale,
    new_figure,
    plain,
    viridis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "arc_figure",
    "confusion_figure",
    "convergence_figure",
    "draw",
    "limit_figure",
    "loss_figure",
    "new_figure",
    "plain",
    "prediction_figure",
    "rates_figure",
]

LOSS = r"loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$"
# Most classes for which a confusion matrix shows its counts, and the names of all classes.
NUMBERED, NAMED = 20, 25


def loss_figure(history: Sequence[dict[str, Any]], title: str) -> "Figure":
    """Loss and, if known, accuracy against kernel time, or against steps if times are missing."""
    timed = all(line["time"] is not None for line in history)
    across = _numbers(history, "time" if timed else "step")
    classified = _classified(history)
    figure = _figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    loss, accuracy = ("train_loss", "test_loss"), ("train_accuracy", "test_accuracy")
    for axes, keys, unit in zip(panels, (loss, accuracy), (1, 100), strict=False):
        for key, split, style, color in zip(
            keys, ("training", "test"), ("-", "--"), (BLUE, ORANGE), strict=True
        ):
            if all(line[key] is None for line in history):  # no test set
                continue
            marker = "o" if len(history) == 1 else ""
            curve = {"linestyle": style, "marker": marker, "color": color, "label": split}
            axes.plot(across, _numbers(history, key, unit), **curve)
        axes.set_xlabel("kernel time $t$" if timed else "step")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel(LOSS)
    log_scale(panels[0], "y")
    if classified:
        panels[1].set_ylabel("accuracy (%)")
    figure.suptitle(title, wrap=True)
    return figure


def prediction_figure(
    curve: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]], label: str, title: str
) -> "Figure":
    """The limit's loss and, if known, accuracy against time, with a trained run as open marks."""
    classified = _classified(curve)
    figure = _figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    later = [line for line in trained if line["time"] is not None and float(line["time"]) > 0]
    loss, accuracy = ("train_loss", "test_loss"), ("train_accuracy", "test_accuracy")
    for axes, keys, unit in zip(panels, (loss, accuracy), (1, 100), strict=False):
        for key, split, style, mark, color in zip(
            keys, ("training", "test"), ("-", "--"), ("o", "s"), (BLUE, ORANGE), strict=True
        ):
            if all(line[key] is None for line in curve):  # no test set
                continue
            limit = _numbers(curve, "time"), _numbers(curve, key, unit)
            axes.plot(*limit, style, color=color, label=f"limit, {split}")
            if later:
                points = _numbers(later, "time"), _numbers(later, key, unit)
                open_mark = {"marker": mark, "markerfacecolor": "none", "linestyle": "none"}
                axes.plot(*points, color=color, label=f"{label}, {split}", **open_mark)
        log_scale(axes, "x")
        axes.set_xlabel("kernel time $t$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    log_scale(panels[0], "y")
    panels[0].set_ylabel(LOSS)
    if classified:
        panels[1].set_ylabel("accuracy (%)")
    figure.suptitle(title, wrap=True)
    return figure


def _classified(lines: Sequence[dict[str, Any]]) -> bool:
    keys = ("train_accuracy", "test_accuracy")
    return any(line[key] is not None for line in lines for key in keys)


def _numbers(lines: Sequence[dict[str, Any]], key: str, unit: float = 1.0) -> np.ndarray:
    """One number per line; NaN, which is not drawn, where the number is missing or infinite."""
    values = [np.nan if line[key] is None else float(line[key]) for line in lines]
    return unit * np.where(np.isfinite(values), values, np.nan)


def confusion_figure(counts: np.ndarray, classes: Sequence[Any], title: str) -> "Figure":
    """Counts [k, k] of test examples: true class by row, predicted class by column.

    Counts are written for at most `NUMBERED` classes, and every name for at most `NAMED`.
    """
    k = len(classes)
    ticks = range(0, k, -(-k // NAMED) or 1)
    names = [plain(classes[tick], longest=16) for tick in ticks]
    longest = max(map(len, names), default=0)
    side = min(max(3.8, 1.0 + 0.28 * k), 7.0)
    crowded = len(names) * (1 + longest) > 9 * side
    figure = new_figure(side + 1.2 + 0.06 * longest, side + 0.06 * longest * crowded)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = "medium" if k < 6 else "x-small"
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts if k <= NUMBERED else np.zeros((0, 0))):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=size)
    size = "small" if k > NUMBERED else "medium"
    axes.set_xticks(ticks, names, fontsize=size, rotation=90 if crowded else 0)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.suptitle(title, wrap=True)
    return figure


def arc_figure(
    x: np.ndarray, y: np.ndarray, outputs: np.ndarray, label: str, title: str
) -> "Figure":
    """The toy task's target, and the outputs (``label`` in the legend), against the angle."""
    figure = _figure(1)
    axes = figure.subplots()
    order = np.argsort(np.arctan2(x[:, 1], x[:, 0]))
    angle = np.arctan2(x[:, 1], x[:, 0])[order]
    axes.plot(angle, y[order, 0], color=BLACK, label="target $x_1 x_2$")
    axes.plot(angle, outputs[order, 0], "--", color=ORANGE, label=label)
    axes.set_xlabel(r"angle $\gamma$ of $x = (\cos\gamma, \sin\gamma)$ (radians)")
    axes.set_ylabel("$f(x)$")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title, wrap=True)
    return figure


def convergence_figure(
    angles: np.ndarray, target: np.ndarray, limit: np.ndarray, runs: dict[int, dict[str, Any]]
) -> "Figure":
    """Figure 4.1: trained networks (left) and their kernels before and after training (right).

    ``runs`` by depth, as in `ntk_convergence.ConvergenceResult`; ``limit`` is the limit kernel.
    """
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    for (depth, run), color in zip(sorted(runs.items()), _colours(len(runs)), strict=True):
        many = {"color": color, "linewidth": 0.8, "alpha": 0.8}
        named = {"label": f"$L = {depth:,}$".replace(",", "{,}")}
        left.plot(angles, run["outputs"][-1].T, **many)
        right.plot(angles, run["kernel"][0].T, linestyle=":", **many)
        right.plot(angles, run["kernel"][-1].T, **many)
        left.plot([], [], color=color, **named)
        right.plot([], [], color=color, linestyle=":", label=named["label"] + ", $t = 0$")
        right.plot([], [], color=color, label=named["label"] + ", trained")
    left.plot(angles, target, "--", color=BLACK, label="target $x_1 x_2$")
    right.plot(angles, limit, "--", color=BLACK, linewidth=1.8, label=r"limit $L = \infty$")
    left.set_ylabel("$f(x)$")
    right.set_ylabel(r"scaled NTK $\tilde\Theta^L(x_0, x)$")
    for axes in (left, right):
        axes.set_xlabel(r"angle $\gamma$ of $x = (\cos\gamma, \sin\gamma)$ (radians)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    trials = next(iter(runs.values()))["kernel"].shape[1]
    figure.suptitle(f"{trials} initializations each; $x_0$ at $\\pi/4$")
    return figure


RATE_PANELS = {
    "deviation": r"relative distance from the limit at $t = 0$",
    "movement": "largest relative movement in training",
    "sign_changes": "fraction of neurons that changed sign",
    "growth": r"$\Gamma(T)/\Gamma(0) - 1$",
}


def rates_figure(
    points: Sequence[tuple[str, int, dict[str, np.ndarray]]],
    fits: dict[str, dict[str, Any]],
    constant: float,
    psi_2_depth: int,
) -> "Figure":
    """Rates against depth for both rules of C: every trial, the fitted powers, theory's power.

    ``points``: (rule, depth, {quantity: values [trials]}); ``fits``: {rule: {quantity: fit}}.
    """
    figure = new_figure(10.0, 7.6)
    styles = {
        "growing": (BLUE, "o", "$C = L^{2.2}$"),
        "constant": (ORANGE, "s", f"$C = {constant:g}$"),
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


def limit_figure(comparisons: dict[str, Any], title: str) -> "Figure":
    """Trained networks' distance from the limit against depth, one panel per architecture.

    ``comparisons``: {architecture: `limit_convergence.Comparison`}. Each panel shows every trial,
    the fitted powers, and linear theory's values, which need no training.
    """
    figure = _figure(len(comparisons))
    panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, (arch, found) in zip(panels, comparisons.items(), strict=True):
        for i, color in enumerate(_colours(len(found.times))):
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


def _colours(count: int) -> list[Any]:
    """Colours in a fixed order, distinct for the colour-blind."""
    few = [BLUE, ORANGE, GREEN]
    return few[:count] if count <= len(few) else viridis(count)


def _figure(panels: int) -> "Figure":
    return new_figure(5.0 * panels, 3.8)
