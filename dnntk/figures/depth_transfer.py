"""Figures of ``scripts/depth_transfer.py``: loss curves of many depths, best rates, distances."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, GREEN, ORANGE, log_scale, new_figure, viridis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["depth_transfer_figure"]

MARKERS = "ovsD^<>pXhP*"
COLORS = (BLUE, ORANGE, GREEN, BLACK)
LINES = ("-", "--", "-.", ":")


def depth_transfer_figure(curves: list[Any], transferred: Any) -> "Figure":
    """Four panels of one architecture; ``curves`` and ``transferred`` as `transfer_depth` gives."""
    own = [one for one in curves if one.kind.init == "deep_narrow"]
    figure = new_figure(9.6, 7.4)
    (curve_axes, sweep_axes), (distance_axes, deep_axes) = figure.subplots(2, 2)
    _curves(curve_axes, own)
    _sweep(sweep_axes, curves)
    _distances(distance_axes, own)
    if transferred is None:
        deep_axes.set_axis_off()
    else:
        _deepest(deep_axes, transferred)
    for axes in (curve_axes, sweep_axes, distance_axes, deep_axes):
        axes.grid(alpha=0.3)
    arch = own[0].kind.arch.upper()
    figure.suptitle(f"{arch} at constant $C$: rates and loss curves carry over from depth to depth")
    return figure


def _styles(own: list[Any]) -> dict[Any, dict[str, Any]]:
    """A colour for each C, a line style for each optimizer."""
    scales = list(dict.fromkeys(one.kind.scale for one in own))
    optimizers = list(dict.fromkeys(one.kind.optimizer for one in own))
    return {
        one.kind: {
            "color": COLORS[scales.index(one.kind.scale) % len(COLORS)],
            "linestyle": LINES[optimizers.index(one.kind.optimizer) % len(LINES)],
        }
        for one in own
    }


def _curves(axes: "Axes", own: list[Any]) -> None:
    """The deepest network as a line, the others as markers on it."""
    depths = list(own[0].losses)
    for kind, style in _styles(own).items():
        losses = next(one.losses for one in own if one.kind == kind)
        label = f"{kind.optimizer}, $C$ = {kind.scale:g}"
        axes.plot(losses[depths[-1]].mean(axis=0), **style, linewidth=1.2, label=label)
        for i, depth in enumerate(depths[:-1]):
            mean = losses[depth].mean(axis=0)
            steps = np.arange(i + 1, len(mean), max(1, len(mean) // 6))
            look = {"color": style["color"], "marker": MARKERS[i % len(MARKERS)], "ms": 4}
            axes.plot(steps, mean[steps], **look, linestyle="", markerfacecolor="none")
    for i, depth in enumerate(depths[:-1]):
        look = {"color": BLACK, "marker": MARKERS[i % len(MARKERS)], "ms": 4}
        axes.plot([], **look, linestyle="", markerfacecolor="none", label=f"depth {depth:,}")
    axes.set(xlabel="step", ylabel="training loss")
    axes.set_title(f"lines: depth {depths[-1]:,}")
    axes.legend(fontsize="x-small", ncols=2)


def _sweep(axes: "Axes", curves: list[Any]) -> None:
    """The last loss against the rate, for the optimizer and C of the first kinds that normalize."""
    others = [one for one in curves if one.kind.optimizer != "sgd"] or curves
    optimizer = others[0].kind.optimizer
    for init in dict.fromkeys(one.kind.init for one in curves):
        same = [c for c in curves if (c.kind.init, c.kind.optimizer) == (init, optimizer)]
        one = min(same, key=lambda c: abs(np.log(c.kind.scale)))
        shades = viridis(len(one.sweep), 0.8)
        for i, (depth, losses) in enumerate(one.sweep.items()):
            look = {"color": shades[i], "marker": MARKERS[i % len(MARKERS)], "ms": 4}
            line = "-" if init == "deep_narrow" else ":"
            label = f"depth {depth:,}" if init == "deep_narrow" else f"{init}, {depth:,}"
            axes.plot(one.rates, np.minimum(losses, 1.0), **look, linestyle=line, label=label)
    axes.set(ylabel="training loss at the end", ylim=(0, 0.8))
    name = "time_step" if optimizer == "sgd" else "depth_rate $b$, at rate $b / \\sqrt{L}$"
    axes.set_xlabel(name)
    log_scale(axes, "x")
    axes.set_title(f"{optimizer}, $C$ = {one.kind.scale:g}")
    axes.legend(fontsize="x-small", ncols=2)


def _distances(axes: "Axes", own: list[Any]) -> None:
    styles = _styles(own)
    for i, one in enumerate(own):
        found = one.distances()
        if not found:
            continue
        depths = np.array(list(found))
        means = np.sqrt([np.mean(values**2) for values in found.values()])
        fit, label = one.fit(), f"{one.kind.optimizer}, $C$ = {one.kind.scale:g}"
        if fit is not None:
            label += f": $L^{{{fit['exponent']:.2f}}}$"
        axes.plot(depths, means, **styles[one.kind], marker=MARKERS[i], ms=4, label=label)
        if not i:
            theory = 1.5 * means.max() * np.sqrt(depths[0] / depths)
    if axes.lines:
        axes.plot(depths, theory, color=BLACK, linestyle=":", label="$L^{-1/2}$")
        axes.legend(fontsize="x-small")
    log_scale(axes, "x", "y")
    axes.set(xlabel="depth $L$", ylabel=r"$\|f_t^L - f_t\| \,/\, \|f_t\|$, held-out")
    axes.set_title("distance of outputs from the deepest networks'")


def _deepest(axes: "Axes", found: Any) -> None:
    kind, (small, large) = found.kind, found.depths
    axes.plot(found.losses[1], color=BLACK, linewidth=1.2, label=f"depth {large:,}, trained once")
    steps = np.arange(0, len(found.losses[0]), max(1, len(found.losses[0]) // 20))
    look: dict[str, Any] = {"color": ORANGE, "marker": "o", "ms": 4, "linestyle": ""}
    axes.plot(steps, found.losses[0][steps], **look, label=f"depth {small:,}, best of its search")
    name = "time_step" if kind.optimizer == "sgd" else "depth_rate"
    axes.set(xlabel="step", ylabel="training loss")
    axes.set_title(f"{kind.optimizer}, $C$ = {kind.scale:g}, {name} = {found.rate:g}")
    axes.legend(fontsize="small")
