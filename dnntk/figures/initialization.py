"""Figures 3.1 and 3.2: a network's parameters as lines and boxes, one style per kind of value.

A row is a layer, with the input at the bottom. A unit is a box (MLP) or a box around the grid of a
channel's pixels (CNN). Line styles carry the meaning and colours only repeat it, so that the
figure can be printed in black and white. `dnntk.experiments.initialization` chooses the style of
each parameter from its value; this module can draw any network.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk.figures.drawing import BLACK, BLUE, GREEN, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

__all__ = ["Diagram", "Style", "initialization_figure", "rows"]

# Most weight layers that are all drawn; of more, the first `DRAWN_BELOW` and the last two.
MOST_LAYERS, DRAWN_BELOW = 7, 4
# The figure's unit of length in inches; below, lengths in this unit.
INCHES = 0.72
GAP, CELL, GRID, MARGIN, ACROSS, UP = 0.09, 0.5, 1.2, 0.14, 0.75, 0.9
LEFT, LEGEND, LEGEND_HEIGHT, BELOW, ABOVE = 1.9, 5.4, 9.6, 1.1, 1.7
DARKEST = 2.0


class Style(enum.IntEnum):
    """How a line or the edge of a box is drawn."""

    NONE = 0
    SOLID = 1
    DOUBLE = 2
    DASHED = 3
    DOUBLE_DASHED = 4


TWICE = (Style.DOUBLE, Style.DOUBLE_DASHED)
DASHES = (Style.DASHED, Style.DOUBLE_DASHED)
COLOURS = {
    Style.SOLID: BLACK,
    Style.DOUBLE: BLUE,
    Style.DASHED: GREEN,
    Style.DOUBLE_DASHED: BLUE,
}


@dataclasses.dataclass(frozen=True)
class Diagram:
    """What is drawn of a network of L weight layers.

    Attributes:
        d_in: units of the input; the units of a hidden layer are in the order [d_in | 1 | d_out].
        lines: L arrays [in, out], from the first layer on: the `Style` of every weight or filter.
        boxes: L arrays [out]: the `Style` of every bias.
        activations: L + 1 arrays [H, W, units] (MLP: [1, 1, units]) of the input, the hidden
            layers and the last layer; they shade the units.
        pooled: [d_out], the mean over the image (CNN), or None.
        title: text above the network.
        line_meanings, box_meanings: {style: its meaning}, in the legend's order.
        shade: meaning of the shades.
    """

    d_in: int
    lines: Sequence[np.ndarray]
    boxes: Sequence[np.ndarray]
    activations: Sequence[np.ndarray]
    pooled: np.ndarray | None
    title: str
    line_meanings: dict[Style, str]
    box_meanings: dict[Style, str]
    shade: str

    @property
    def depth(self) -> int:
        """L, the number of weight layers."""
        return len(self.lines)

    @property
    def columns(self) -> int:
        """Number of units of a hidden layer."""
        return len(self.boxes[0])

    def columns_of(self, layer: int) -> range:
        """Columns of a layer's units; input and output have the columns of their copies."""
        if layer == 0:
            return range(self.d_in)
        return range(self.d_in + 1 if layer == self.depth else 0, self.columns)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Lengths in a figure whose units have H x W pixels."""

    height: int
    width: int

    @property
    def single(self) -> bool:
        return self.height == self.width == 1

    @property
    def cell(self) -> float:
        return CELL if self.single else GRID / max(self.height, self.width)

    @property
    def box(self) -> tuple[float, float]:
        margin = 0 if self.single else 2 * MARGIN
        return self.width * self.cell + margin, self.height * self.cell + margin

    def centre(self, column: int, row: float) -> tuple[float, float]:
        across, up = self.box
        return column * (across + ACROSS), row * (up + UP)


def rows(depth: int) -> list[range]:
    """The layers, 0 (the input) to depth, that each row of a figure shows, from below.

    A row of several layers is an ellipsis; networks of up to `MOST_LAYERS` have no such row.
    """
    if depth <= MOST_LAYERS:
        return [range(layer, layer + 1) for layer in range(depth + 1)]
    whole = [range(layer, layer + 1) for layer in (*range(DRAWN_BELOW + 1), depth - 1, depth)]
    return [*whole[:-2], range(DRAWN_BELOW + 1, depth - 1), *whole[-2:]]


def initialization_figure(diagram: Diagram) -> "Figure":
    """The network, layer by layer, with a legend.

    Every line and box that stands for a parameter has a gid, "line SOLID" or "box DASHED".
    """
    shown = rows(diagram.depth)
    sizes = _Sizes(*diagram.activations[0].shape[:2])
    right, top = sizes.centre(diagram.columns - 1, len(shown) - 1)
    if diagram.pooled is not None:
        top += sizes.box[1] / 2 + UP
    bottom, top = -sizes.box[1] / 2 - BELOW, top + sizes.box[1] / 2 + ABOVE
    left, right = -sizes.box[0] / 2 - LEFT, right + sizes.box[0] / 2
    top = max(top, bottom + LEGEND_HEIGHT)
    across, up = right + LEGEND - left, top - bottom
    figure = new_figure(INCHES * across, INCHES * up, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(left, left + across), ylim=(bottom, top), aspect="equal")
    for row, layers in enumerate(shown):
        if row:
            _connections(axes, diagram, sizes, row, layers.start)
        _row(axes, diagram, sizes, row, layers)
    _columns(axes, diagram, sizes)
    _output(axes, diagram, sizes, len(shown) - 1)
    axes.text(left + 0.3, top - 0.25, diagram.title, va="top", fontsize=11)
    _legend(axes, diagram, right + 0.8, top - 1.5)
    return figure


def _connections(axes: "Axes", diagram: Diagram, sizes: _Sizes, row: int, layer: int) -> None:
    """Draw the weights of ``layer``, which lead to ``row``."""
    across, up = sizes.box
    above = up / 2 if layer > 1 else sizes.height * sizes.cell / 2  # the input has no boxes
    sources, targets = diagram.columns_of(layer - 1), diagram.columns_of(layer)
    for (i, j), style in np.ndenumerate(diagram.lines[layer - 1]):
        (x0, y0), (x1, y1) = sizes.centre(sources[i], row - 1), sizes.centre(targets[j], row)
        # Lines meet a box side by side: each end is shifted towards the line's other end.
        lean = 0.4 * across * (targets[j] - sources[i]) / diagram.columns
        _line(axes, (x0 + lean, y0 + above), (x1 - lean, y1 - up / 2), Style(style))


def _line(
    axes: "Axes", start: tuple[float, float], end: tuple[float, float], style: Style, gid: str = ""
) -> None:
    if style is Style.NONE:
        return
    ends = np.array([start, end])
    along = ends[1] - ends[0]
    aside = GAP / 2 * np.array([-along[1], along[0]]) / np.hypot(*along)
    segments = [ends - aside, ends + aside] if style in TWICE else [ends]
    dashes = [(0.0, (5.0, 3.0))] if style in DASHES else "solid"
    lines_style: dict[str, Any] = {
        "colors": COLOURS[style],
        "linestyles": dashes,
        "linewidths": 1.1,
        "zorder": 1,
    }
    from matplotlib.collections import LineCollection

    lines = LineCollection(segments, gid=gid or f"line {style.name}", **lines_style)
    axes.add_collection(lines, autolim=False)


def _row(axes: "Axes", diagram: Diagram, sizes: _Sizes, row: int, layers: range) -> None:
    name = "input $x$" if layers.start == 0 else f"layer {layers.start:,}"
    layer = layers.start
    if len(layers) > 1:
        name = f"layers {layers[0]:,}\nto {layers[-1]:,}{_omitted(diagram, layers)}"
    if layer == diagram.depth and diagram.pooled is None:
        name += ",\noutput $f(x)$"
    _row_name(axes, sizes, sizes.centre(0, row)[1], name)
    for unit, column in enumerate(diagram.columns_of(layer)):
        centre = sizes.centre(column, row)
        if len(layers) > 1:
            heights = centre[1] + np.array([-0.2, 0, 0.2]) * sizes.box[1]
            axes.plot([centre[0]] * 3, heights, "o", color=BLACK, markersize=2.5)
            continue
        if layer:
            _box(axes, centre, sizes.box, Style(diagram.boxes[layer - 1][unit]))
        _cells(axes, centre, sizes.cell, diagram.activations[layer][..., unit], boxed=layer > 0)


def _row_name(axes: "Axes", sizes: _Sizes, y: float, name: str) -> None:
    axes.text(-sizes.box[0] / 2 - 0.45, y, name, ha="right", va="center", fontsize=9)


def _omitted(diagram: Diagram, layers: range) -> str:
    """Text: how many omitted ``layers`` differ from the first one, whose weights are drawn."""
    first = layers[0] - 1
    other = sum(
        not (
            np.array_equal(diagram.lines[layer - 1], diagram.lines[first])
            and np.array_equal(diagram.boxes[layer - 1], diagram.boxes[first])
        )
        for layer in layers
    )
    return f"; {other:,} of\nthem differ" if other else ",\nall alike"


def _box(
    axes: "Axes",
    centre: tuple[float, float],
    size: tuple[float, float],
    style: Style,
    gid: str = "",
) -> None:
    """Draw a box whose inner edge has the ``size``; the box hides the lines under it."""
    dashes: Any = (0, (3.5, 2.0)) if style in DASHES else "solid"
    for outset in (GAP, 0.0) if style in TWICE else (0.0,):
        across, up = (side + 2 * outset for side in size)
        edge: dict[str, Any] = {"edgecolor": COLOURS[style], "linestyle": dashes, "linewidth": 1.3}
        corner = (centre[0] - across / 2, centre[1] - up / 2)
        first = outset or style not in TWICE
        name = gid or f"box {style.name}"
        axes.add_patch(_rectangle(corner, across, up, facecolor="white", zorder=2, lw=0))
        axes.add_patch(
            _rectangle(corner, across, up, fill=False, zorder=4, gid=name if first else "", **edge)
        )


def _rectangle(corner: tuple[float, float], across: float, up: float, **style: Any) -> "Patch":
    from matplotlib.patches import Rectangle

    return Rectangle(corner, across, up, **style)


def _shades() -> "Colormap":
    """Shades that are paler than the lines, which cross shaded units."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", ["white", "0.55"])


def _cells(
    axes: "Axes", centre: tuple[float, float], cell: float, values: np.ndarray, boxed: bool
) -> None:
    """Draw a unit's pixels, the image's first row on top; an MLP's input is drawn as circles."""
    height, width = values.shape
    if values.size == 1 and not boxed:
        from matplotlib.patches import Circle

        shade = _shades()(min(max(float(values[0, 0]), 0.0) / DARKEST, 1.0))
        axes.add_patch(Circle(centre, cell / 2, facecolor=shade, edgecolor="0.35", lw=0.7))
        return
    across = centre[0] + cell * (np.arange(width + 1) - width / 2)
    up = centre[1] - cell * (np.arange(height + 1) - height / 2)
    edge = "none" if values.size == 1 else "0.35"
    mesh = axes.pcolormesh(across, up, values, cmap=_shades(), vmin=0.0, vmax=DARKEST, zorder=3)
    mesh.set(edgecolors=edge, linewidth=0.4)


def _columns(axes: "Axes", diagram: Diagram, sizes: _Sizes) -> None:
    """Name the three blocks of a hidden layer, below the input."""
    blocks = {"inputs": (0, diagram.d_in), "random": (diagram.d_in, diagram.d_in + 1)}
    blocks["outputs"] = (diagram.d_in + 1, diagram.columns)
    for name, (first, end) in blocks.items():
        (x0, y), (x1, _) = sizes.centre(first, 0), sizes.centre(end - 1, 0)
        y -= sizes.box[1] / 2 + 0.3
        half = sizes.box[0] / 2
        axes.plot([x0 - half, x1 + half], [y, y], color="0.35", linewidth=0.7)
        axes.text((x0 + x1) / 2, y - 0.12, f"{name}\n({end - first})", **_CENTRED, va="top")


_CENTRED: dict[str, Any] = {"ha": "center", "fontsize": 9}


def _output(axes: "Axes", diagram: Diagram, sizes: _Sizes, row: int) -> None:
    """Write the output's values above the units (MLP) or above the units' averages (CNN)."""
    columns = diagram.columns_of(diagram.depth)
    above = sizes.box[1] / 2 + GAP
    values = diagram.activations[-1][0, 0] if diagram.pooled is None else diagram.pooled
    for column, value in zip(columns, values, strict=True):
        x, y = sizes.centre(column, row)
        y += above
        if diagram.pooled is not None:
            corner = (x - CELL / 2, y + UP - CELL / 2)
            arrow = {"arrowstyle": "-|>", "color": "0.35", "lw": 0.8}
            axes.annotate("", (x, corner[1]), (x, y), arrowprops=arrow)
            axes.text(x + 0.12, (y + corner[1]) / 2, "average", va="center", fontsize=8)
            axes.add_patch(_rectangle(corner, CELL, CELL, facecolor="w", edgecolor="0.35", lw=0.7))
            y += UP + CELL / 2
        axes.text(x, y + 0.12, f"{value:.3g}", **_CENTRED, va="bottom")
    if diagram.pooled is not None:
        _row_name(axes, sizes, sizes.centre(0, row)[1] + above + UP, "output $f(x)$")


def _legend(axes: "Axes", diagram: Diagram, x: float, y: float) -> None:
    """Explain lines, boxes and shades, from ``y`` downwards."""

    def write(text: str, indent: float = 0.0, weight: str = "normal") -> None:
        axes.text(x + indent, y, text, va="center", fontsize=9, weight=weight)

    write("Lines: weights" if diagram.pooled is None else "Lines: filters", weight="bold")
    for style, meaning in diagram.line_meanings.items():
        y -= 0.5
        _line(axes, (x, y), (x + 0.9, y), style, gid="legend")
        write(meaning if style is not Style.NONE else f"no line: {meaning}", 1.15)
    y -= 0.8
    write("Boxes: biases", weight="bold")
    for style, meaning in diagram.box_meanings.items():
        y -= 0.65
        _box(axes, (x + 0.45, y), (0.5, 0.32), style, gid="legend")
        write(meaning, 1.15)
    y -= 0.55
    write("thin or no box: no bias", 1.15)
    y -= 0.8
    write(diagram.shade, weight="bold")
    y -= 0.6
    values, wide = np.linspace(0, DARKEST, 5), 0.6
    _cells(axes, (x + 2.5 * wide, y), wide, values[None], boxed=True)
    for place, value in enumerate(values):
        text = rf"$\geq${value:g}" if value == DARKEST else f"{value:g}"
        axes.text(x + (place + 0.5) * wide, y - 0.52, text, **_CENTRED, va="center")
