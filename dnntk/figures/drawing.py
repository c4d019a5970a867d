"""Drawing and saving of figures, with fixed settings; a failure is a warning, never an error.

A run draws its figures last: no setting of matplotlib, full disk or class name may make the run
fail. `draw` writes all files. It imports matplotlib for the first figure, and restores the user's
global ``rcParams`` after each. pyplot is not used, because it would load the backend that
``MPLBACKEND`` names.
"""

import contextlib
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    *("colors", "draw", "in_math", "log_scale", "new_figure", "panels_figure", "plain"),
    "viridis",
]

log = logging.getLogger("dnntk")

# Okabe and Ito's colours, distinct for the colour-blind.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
LONGEST_REASON = 300
_ONE_AT_A_TIME = threading.RLock()  # all threads share rcParams


def draw(stem: Path, make_figure: Callable[..., "Figure"], *args: Any) -> None:
    """Write ``make_figure(*args)`` as ``stem``.png and ``stem``.pdf.

    If that fails, for any reason, the reason is logged as a warning. An older file is replaced
    only by a complete new one.
    """
    try:
        with _own_settings():
            figure = make_figure(*args)
            for kind in ("png", "pdf"):
                _write(figure, stem.with_name(f"{stem.name}.{kind}"), kind)
                figure.set_layout_engine("none")  # laid out once, for both files
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
        log.warning("the picture %s could not be drawn (%s); all else is kept", stem, reason)


def new_figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    """An empty figure of ``width`` x ``height`` inches."""
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panels_figure(count: int) -> "Figure":
    """An empty figure with room for ``count`` panels of the usual size beside each other."""
    return new_figure(5.0 * count, 3.8)


def colors(count: int) -> list[Any]:
    """``count`` colours in a fixed order, distinct for the colour-blind."""
    few = [BLUE, ORANGE, GREEN]
    return few[:count] if count <= len(few) else viridis(count)


def viridis(count: int, end: float = 0.9) -> list[Any]:
    """``count`` colours of matplotlib's viridis, dark to light."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, end, count)))


def log_scale(axes: "Axes", *sides: str) -> None:
    """Make axis "x" or "y" logarithmic if it shows a positive number: otherwise that would fail."""
    for side in sides:
        if np.isfinite(getattr(axes.dataLim, f"minpos{side}")):
            getattr(axes, f"set_{side}scale")("log")


def in_math(number: float) -> str:
    """A number for matplotlib's mathematics: 1e+06 is 10 to the power of 6."""
    if math.isinf(number):
        return r"\infty"
    mantissa, _, exponent = f"{number:g}".partition("e")
    if not exponent:
        return mantissa
    power = f"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


def plain(text: Any, longest: int = 40) -> str:
    """A user's text on one line, cut to ``longest`` characters, with every $ escaped."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return line.replace("$", r"\$")


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Within the block matplotlib has its default settings, and warnings are off."""
    with _ONE_AT_A_TIME, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # for example of a glyph that the font lacks
        matplotlib = _matplotlib()
        defaults = dict(matplotlib.rcParamsDefault)
        with matplotlib.rc_context({k: v for k, v in defaults.items() if k[:7] != "backend"}):
            yield


def _matplotlib() -> Any:
    """Import matplotlib, even if ``MPLBACKEND`` names a backend that matplotlib does not know."""
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def _write(figure: "Figure", file: Path, kind: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        figure.savefig(partial, format=kind, dpi=150)
        partial.replace(file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
