"""Every picture: drawn from plain arrays, saved as PNG and PDF, legible to all eyes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"


def loss_figure(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss, and accuracy where there is one, against kernel time (against steps without it)."""
    timed = all(line["time"] is not None for line in history)
    across = [line["time"] if timed else line["step"] for line in history]
    classified = history[0]["test_accuracy"] is not None
    figure = _figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel("kernel time $t$" if timed else "step")
        axes.grid(alpha=0.3)
    losses = panels[0]
    losses.plot(across, [line["loss"] for line in history], color=BLUE, label="training")
    losses.plot(across, [line["test_loss"] for line in history], "--", color=ORANGE, label="test")
    losses.set_ylabel(r"loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$")
    losses.set_yscale("log")
    losses.legend()
    if classified:
        for key, style, color in (("train_accuracy", "-", BLUE), ("test_accuracy", "--", ORANGE)):
            values = [100 * line[key] for line in history]
            panels[1].plot(across, values, style, color=color, label=key.split("_")[0])
        panels[1].set_ylabel("accuracy (%)")
        panels[1].legend(["training", "test"])
    figure.suptitle(title)
    return figure


def prediction_figure(
    curve: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]], label: str, title: str
) -> Figure:
    """Loss, and accuracy where there is one, of the limit against time; a trained run over it."""
    classified = curve[0]["test_accuracy"] is not None
    figure = _figure(2 if classified else 1)
    panels = figure.subplots(1, 2 if classified else 1, squeeze=False)[0]
    loss, accuracy = ("loss", "test_loss"), ("train_accuracy", "test_accuracy")
    for axes, keys, unit in zip(panels, (loss, accuracy), (1, 100), strict=False):
        for key, split, style, mark, color in zip(
            keys, ("training", "test"), ("-", "--"), ("o", "s"), (BLUE, ORANGE), strict=True
        ):
            times, values = [line["time"] for line in curve], [unit * line[key] for line in curve]
            axes.plot(times, values, style, color=color, label=f"limit, {split}")
            later = [line for line in trained if line["time"] > 0]
            if later:
                times, values = [p["time"] for p in later], [unit * p[key] for p in later]
                open_mark = {"marker": mark, "markerfacecolor": "none", "linestyle": "none"}
                axes.plot(times, values, color=color, label=f"{label}, {split}", **open_mark)
        axes.set_xscale("log")
        axes.set_xlabel("kernel time $t$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].set_yscale("log")
    panels[0].set_ylabel(r"loss $\frac{1}{2}\,E\,\|f(x) - y\|^2$")
    if classified:
        panels[1].set_ylabel("accuracy (%)")
    figure.suptitle(title)
    return figure


def confusion_figure(counts: np.ndarray, classes: Sequence[Any], title: str) -> Figure:
    """Counts [k, k] of test examples: true class by row, predicted class by column."""
    figure = _figure(1)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = "medium" if len(classes) < 6 else "x-small"
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=size)
    axes.set_xticks(range(len(classes)), [str(c) for c in classes])
    axes.set_yticks(range(len(classes)), [str(c) for c in classes])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.suptitle(title)
    return figure


def arc_figure(x: np.ndarray, y: np.ndarray, outputs: np.ndarray, label: str, title: str) -> Figure:
    """The toy task: target, and outputs named by ``label``, against the angle on the arc."""
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
    figure.suptitle(title)
    return figure


def convergence_figure(
    angles: np.ndarray, target: np.ndarray, limit: np.ndarray, runs: dict[int, dict[str, Any]]
) -> Figure:
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
) -> Figure:
    """Against depth, for both rules of the scale: every trial, the fitted powers, the theory's.

    ``points`` are (rule, depth, values [trials] by quantity); ``fits`` by rule and quantity.
    """
    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
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


def limit_figure(comparisons: dict[str, Any], title: str) -> Figure:
    """Trained networks' distance from the limit against depth, a panel an architecture.

    ``comparisons`` by architecture, as `limit_convergence.Comparison`: every trial, the fitted
    powers, and what linear theory says without training.
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
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(arch.upper())
        axes.set_xlabel("depth $L$")
        axes.set_ylabel(r"$\|f_\theta(t) - f_t\| \,/\, \|f_t\|$")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    trials = next(iter(comparisons.values())).differences.shape[1]
    figure.suptitle(f"{title}\n{trials} initializations each, 95% intervals")
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.pdf."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".pdf"))


def _colours(count: int) -> list[Any]:
    """Colours in a fixed order, told apart with any colour vision."""
    few = [BLUE, ORANGE, GREEN]
    return (
        few[:count] if count <= len(few) else list(colormaps["viridis"](np.linspace(0, 0.9, count)))
    )


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(5.0 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
