"""A run's learning curves as inline SVG: losses on a logarithmic axis, accuracies beside them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dnntk.report.markup import Html, joined, tag
from dnntk.report.values import number, shown, thinned

__all__ = ["course"]

POINTS = 400
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 44
LOSSES = (("train_loss", "training"), ("test_loss", "test"))
ACCURACIES = (("train_accuracy", "training"), ("test_accuracy", "test"))
Points = list[tuple[float, float]]
Scale = tuple[Callable[[float], float], list[tuple[float, str]]]


def course(lines: Sequence[dict[str, Any]]) -> Html | None:
    """Learning curves from the lines of metrics.jsonl, or None if no curve has two points."""
    in_closed_form = any("residual" in line for line in lines)
    timed = not in_closed_form and all(number(line.get("time")) is not None for line in lines)
    across = "time" if timed else "step"
    label = "kernel time t" if timed else "gradient pass" if in_closed_form else "step"
    panels = [
        _panel(_series(lines, across, LOSSES), label, "loss ½ E ‖f(x) − y‖²", log=True),
        _panel(_series(lines, across, ACCURACIES, 100), label, "accuracy (%)", log=False),
    ]
    drawn = [panel for panel in panels if panel is not None]
    return tag("div", *drawn, class_="curves") if drawn else None


def _series(
    lines: Sequence[dict[str, Any]], across: str, names: Sequence[tuple[str, str]], unit: float = 1
) -> dict[str, Points]:
    """{split: points (x, y)}, for each split with at least two points."""
    series = {}
    for name, split in names:
        pairs = [(number(line.get(across)), number(line.get(name))) for line in lines]
        points = [(x, unit * y) for x, y in pairs if x is not None and y is not None]
        if len(points) >= 2:
            series[split] = thinned(points, POINTS)
    return series


def _panel(series: dict[str, Points], xlabel: str, ylabel: str, log: bool) -> Html | None:
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    log = log and min(ys) > 0
    bottom = HEIGHT - BOTTOM
    x_at, x_ticks = _linear(xs, LEFT, WIDTH - RIGHT)
    y_at, y_ticks = (_logarithmic if log else _linear)(ys, bottom, TOP)
    middle, half = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts = [
        *(_tick(x, bottom, x, bottom + 17, text, "middle") for x, text in x_ticks),
        *(_tick(WIDTH - RIGHT, y, LEFT - 6, y + 4, text, "end") for y, text in y_ticks),
        tag("path", d=f"M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}", class_="axis"),
        _text(middle, HEIGHT - 6, xlabel, "middle"),
        _text(13, half, ylabel, "middle", transform=f"rotate(-90 13 {_at(half)})"),
    ]
    for i, (split, points) in enumerate(series.items()):
        path = "L".join(f"{_at(x_at(x))} {_at(y_at(y))}" for x, y in points)
        start = LEFT + 8 + 110 * i
        parts += [
            tag("path", d=f"M{path}", class_=split),
            tag("path", d=f"M{start} 16h26", class_=split),
            _text(start + 32, 20, split, "start"),
        ]
    ends = "; ".join(
        f"{split} from {shown('', points[0][1])} to {shown('', points[-1][1])}"
        for split, points in series.items()
    )
    words = f"{ylabel} against {xlabel}: {ends}"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words)


def _linear(values: list[float], start: float, end: float) -> Scale:
    """The map from values to pixels, and ticks at round numbers as (pixel, text)."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    spacing = next(power * f for f in (1, 2, 2.5, 5, 10, 20) if (high - low) / (power * f) <= 5)

    def at(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    first = math.ceil(low / spacing)
    marks = [i * spacing for i in range(first, first + 7) if i * spacing <= high + 1e-9 * spacing]
    return at, [(at(mark), f"{mark:.6g}") for mark in marks]


def _logarithmic(values: list[float], start: float, end: float) -> Scale:
    """As `_linear`, with ticks at powers of ten, and at 2 and 5 times powers if ticks are few."""
    low, high = math.log10(min(values)), math.log10(max(values))
    every = max(1, math.ceil((high - low) / 6))
    marks = [(e, 1) for e in range(math.ceil(low), math.floor(high) + 1, every)]
    if high - low < 2:
        exponents = range(math.floor(low), math.floor(high) + 1)
        marks = [(e, m) for e in exponents for m in (1, 2, 5) if low <= e + math.log10(m) <= high]
    if len(marks) < 2:
        return _linear(values, start, end)

    def at(logarithm: float) -> float:
        return start + (logarithm - low) / (high - low) * (end - start)

    ticks = [
        (at(e + math.log10(m)), f"{m}e{e}" if abs(e) > 3 else f"{m * 10**e:g}") for e, m in marks
    ]
    return lambda value: at(math.log10(value)), ticks


def _tick(x: float, y: float, text_x: float, text_y: float, text: str, anchor: str) -> Html:
    """A grid line from (x, y) across the panel, and the number of its tick."""
    line = f"M{_at(x)} {_at(y)}" + (f"V{TOP}" if anchor == "middle" else f"H{LEFT}")
    return joined(tag("path", d=line, class_="grid"), _text(text_x, text_y, text, anchor))


def _text(x: float, y: float, words: str, anchor: str, **more: Any) -> Html:
    return tag("text", words, x=_at(x), y=_at(y), text_anchor=anchor, **more)


def _at(pixel: float) -> str:
    return f"{pixel:.1f}"
