"""Figure of ``scripts/depth_transfer.py``: loss curves of many depths, best rates, distances."""

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
HIGHEST = 1.6  # largest loss shown, over the one before the first step


def depth_transfer_figure(curves: list[Any], transferred: Any) -> "Figure":
    """A column for each of two optimizers: loss curves, losses by rate; below, all distances.

    ``curves`` and ``transferred`` are one architecture's, as `transfer_depth` returns them.
    """
    own = [one for one in curves if one.kind.init == "deep_narrow"]
    figure = new_figure(9.6, 10.4)
    panels = figure.subplots(3, 2)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    optimizers = list(dict.fromkeys(one.kind.optimizer for one in own))[:2]
    for column, optimizer in enumerate(optimizers):
        of_it = [one for one in own if one.kind.optimizer == optimizer]
        _curves(panels[0, column], of_it)
        _sweep(panels[1, column], [one for one in curves if one.kind.optimizer == optimizer])
    for axes in panels[:2, len(optimizers) :].flat:
        axes.set_axis_off()
    _distances(panels[2, 0], own)
    if transferred is None:
        panels[2, 1].set_axis_off()
    else:
        _deepest(panels[2, 1], transferred)
    figure.suptitle(_title([one for one in own if one.kind.optimizer == optimizers[-1]]))
    return figure


def _title(own: list[Any]) -> str:
    """The largest change of one optimizer's best rate between depths, of all C."""
    depths, kind = list(own[0].sweep), own[0].kind
    best = [[one.best(depth) for depth in depths] for one in own]
    ratio = max(max(rates) / min(rates) for rates in best)
    name = "time_step" if kind.optimizer == "sgd" else "depth_rate"
    return (
        f"{kind.arch.upper()} at constant $C$, depths {depths[0]:,} to {depths[-1]:,}: "
        f"the best {name} of {kind.optimizer} changes by a factor of {ratio:.2g} at most"
    )


def _curves(axes: "Axes", own: list[Any]) -> None:
    """The deepest network as a line, the others as markers on it."""
    *depths, deepest = own[0].losses
    hollow: dict[str, Any] = {"ms": 4, "linestyle": "", "markerfacecolor": "none"}
    for one, color, line in zip(own, COLORS, LINES, strict=False):
        label = f"$C$ = {one.kind.scale:g}"
        last = one.losses[deepest].mean(axis=0)
        axes.plot(last, color=color, linestyle=line, linewidth=1.2, label=label)
        for i, depth in enumerate(depths):
            mean = one.losses[depth].mean(axis=0)
            steps = np.arange(2 * i + 1, len(mean), 2 * len(depths) + 2)
            axes.plot(steps, mean[steps], color=color, marker=MARKERS[i], **hollow)
    for i, depth in enumerate(depths):
        axes.plot([], color=BLACK, marker=MARKERS[i], **hollow, label=f"depth {depth:,}")
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, HIGHEST * last[0]))
    axes.set_title(f"{own[0].kind.optimizer}, lines: depth {deepest:,}")
    axes.legend(fontsize="x-small", ncols=3)


def _sweep(axes: "Axes", curves: list[Any]) -> None:
    """The last loss against the rate, at the C nearest to 1."""
    names: list[tuple[str, str]] = []
    for init, line in zip(dict.fromkeys(one.kind.init for one in curves), LINES, strict=False):
        same = (one for one in curves if one.kind.init == init)
        one = min(same, key=lambda each: abs(np.log(each.kind.scale)))
        shades = viridis(len(one.sweep), 0.8)
        for i, (depth, losses) in enumerate(one.sweep.items()):
            look: dict[str, Any] = {"color": shades[i], "marker": MARKERS[i], "ms": 4}
            (curve,) = axes.plot(one.rates, losses, linestyle=line, **look)
            if not names:
                curve.set_label(f"depth {depth:,}")
        names.append((line, init.replace("_", " ")))
    first = next(iter(curves[0].losses.values()))[0, 0]
    axes.set(ylabel="training loss at the end", ylim=(0, HIGHEST * first))
    sgd = one.kind.optimizer == "sgd"
    axes.set_xlabel("time_step" if sgd else "depth_rate $b$: learning rate $b / \\sqrt{L}$")
    log_scale(axes, "x")
    axes.set_xticks(one.rates, [f"{rate:.3g}" for rate in one.rates])
    axes.minorticks_off()
    for line, name in names:
        axes.plot([], [], color=BLACK, linestyle=line, label=name)
    axes.set_title(f"{one.kind.optimizer}, $C$ = {one.kind.scale:g}")
    axes.legend(fontsize="x-small", ncols=2)


def _distances(axes: "Axes", own: list[Any]) -> None:
    scales = list(dict.fromkeys(one.kind.scale for one in own))
    optimizers = list(dict.fromkeys(one.kind.optimizer for one in own))
    largest = 0.0
    for i, one in enumerate(own):
        if not (found := one.distances()):
            continue
        depths = np.array(list(found))
        means = np.sqrt([np.mean(values**2) for values in found.values()])
        fit, label = one.fit(), f"{one.kind.optimizer}, $C$ = {one.kind.scale:g}"
        if fit is not None:
            label += f": $L^{{{fit['exponent']:.2f}}}$"
        color = COLORS[scales.index(one.kind.scale) % len(COLORS)]
        line = LINES[optimizers.index(one.kind.optimizer) % len(LINES)]
        look: dict[str, Any] = {
            "color": color,
            "linestyle": line,
            "marker": MARKERS[i % len(MARKERS)],
            "ms": 4,
        }
        axes.plot(depths, means, **look, label=label)
        largest = max(largest, means.max())
    if not largest:
        axes.set_axis_off()
        return
    theory = largest / 4 * np.sqrt(depths[0] / depths)
    axes.plot(depths, theory, color=BLACK, linestyle=":", label="$L^{-1/2}$")
    axes.legend(fontsize="x-small", ncols=2, loc="upper center")
    log_scale(axes, "x", "y")
    axes.set_ylim(top=60 * largest)  # room for the legend
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.minorticks_off()
    axes.set(xlabel="depth $L$", ylabel=r"$\|f_t^L - f_t\| \,/\, \|f_t\|$, held-out")
    axes.set_title("distance from the deepest networks")


def _deepest(axes: "Axes", found: Any) -> None:
    kind, (small, large), steps = found.kind, found.depths, len(found.losses[0])
    axes.plot(found.losses[1], color=BLACK, linewidth=1.2, label=f"depth {large:,}, trained once")
    shown = np.arange(0, steps, max(1, steps // 20))
    look: dict[str, Any] = {"color": ORANGE, "marker": "o", "ms": 4, "linestyle": ""}
    axes.plot(shown, found.losses[0][shown], **look, label=f"depth {small:,}, best of its search")
    name = "time_step" if kind.optimizer == "sgd" else "depth_rate"
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axes.set_title(f"{kind.optimizer}, $C$ = {kind.scale:g}, {name} = {found.rate:g}")
    axes.legend(fontsize="small")
