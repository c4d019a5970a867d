"""A picture is looked at through the artists it consists of: one for each parameter."""

import collections
import dataclasses

import numpy as np

from dnntk.figures.initialization import (
    DASHES,
    MOST_LAYERS,
    TWICE,
    Diagram,
    Style,
    initialization_figure,
    rows,
)

NONE, SOLID, DOUBLE, DASHED, DOUBLE_DASHED = Style


def diagram_of(lines, boxes, size, pooled):
    """A diagram of a network of two inputs and one output, with units of ``size`` x ``size``."""
    widths = (2, *(len(box) for box in boxes))
    shades = [np.linspace(0, 2, size**2 * n).reshape(size, size, n) for n in widths]
    named = {style: style.name.lower() for style in Style}
    boxed = {style: name for style, name in named.items() if style is not NONE}
    return Diagram(2, lines, boxes, shades, pooled, "title", named, boxed, "shade")


def random_diagram(depth, size):
    """Every style of line and box at random places."""
    rng, widths = np.random.default_rng(0), (2, *(depth - 1) * (4,), 1)
    lines = [rng.integers(0, 5, shape) for shape in zip(widths, widths[1:], strict=False)]
    boxes = [rng.integers(1, 5, width) for width in widths[1:]]
    return diagram_of(lines, boxes, size, None if size == 1 else np.ones(1))


def deep_diagram(depth):
    """All middle layers alike."""
    widths = (2, *(depth - 1) * (4,), 1)
    lines = [np.eye(*shape, dtype=int) for shape in zip(widths, widths[1:], strict=False)]
    return diagram_of(lines, [np.full(width, SOLID) for width in widths[1:]], 1, None)


def artists(diagram):
    """Everything drawn that stands for a parameter, by gid."""
    found = collections.defaultdict(list)
    for artist in initialization_figure(diagram).axes[0].get_children():
        if (artist.get_gid() or "").startswith(("line", "box")):
            found[artist.get_gid()].append(artist)
    return found


def test_every_parameter_of_a_shallow_network_is_drawn_in_its_style():
    for size in (1, 5):  # an MLP's units, and a CNN's
        diagram = random_diagram(4, size)
        lines = collections.Counter(int(s) for layer in diagram.lines for s in layer.flat)
        boxes = collections.Counter(int(s) for layer in diagram.boxes for s in layer.flat)
        found = artists(diagram)
        assert "line NONE" not in found
        for style in Style:
            drawn = found[f"line {style.name}"]
            assert len(drawn) == (lines[style] if style is not NONE else 0)
            assert len(found[f"box {style.name}"]) == boxes[style]
            assert all(len(line.get_segments()) == 1 + (style in TWICE) for line in drawn)
            dashed = [line.get_linestyle()[0][1] is not None for line in drawn]
            assert all(is_dashed == (style in DASHES) for is_dashed in dashed)
        styles = [layer.copy() for layer in diagram.lines]
        styles[2].flat[np.flatnonzero(styles[2] == SOLID)[0]] = NONE
        fewer = artists(dataclasses.replace(diagram, lines=styles))
        assert len(fewer["line SOLID"]) == lines[SOLID] - 1


def test_what_an_ellipsis_hides_is_said():
    for depth in (2, 3, MOST_LAYERS, MOST_LAYERS + 1, 1000):
        layers = [layer for row in rows(depth) for layer in row]
        assert layers == list(range(depth + 1))
        assert any(len(row) > 1 for row in rows(depth)) == (depth > MOST_LAYERS)
    diagram = deep_diagram(40)

    def texts(diagram):
        return " ".join(text.get_text() for text in initialization_figure(diagram).axes[0].texts)

    assert "layers 5\nto 38,\nall alike" in texts(diagram)
    lines = [layer.copy() for layer in diagram.lines]
    lines[20][1, 1] = DASHED
    assert "1 of\nthem differ" in texts(dataclasses.replace(diagram, lines=lines))
