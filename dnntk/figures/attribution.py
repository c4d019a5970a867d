"""Figure of the training examples that decided some test examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dnntk.figures.drawing import BLUE, ORANGE, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Decision", "TrainingShare", "attribution_figure"]

LONGEST = 11  # characters of a class's name


class TrainingShare(NamedTuple):
    """A training example's part in a decision.

    Attributes:
        image: [H, W, c].
        name: of its class.
        share: of the contributions of all training examples; below 0 if against the decision.
    """

    image: np.ndarray
    name: Any
    share: float


class Decision(NamedTuple):
    """A test example's class, and what decided it.

    Attributes:
        image: [H, W, c].
        name, decided, second: its true class, the one that was decided for, and the next best.
        examples: the training examples with the largest shares.
    """

    image: np.ndarray
    name: Any
    decided: Any
    second: Any
    examples: Sequence[TrainingShare]


def attribution_figure(decisions: Sequence[Decision], title: str) -> "Figure":
    """A row a test example: its image, and beside it the training examples that decided it."""
    columns = 1 + max(len(each.examples) for each in decisions)
    images = [each.image for each in decisions]
    images += [one.image for each in decisions for one in each.examples]
    ends = min(map(np.min, images)), max(map(np.max, images))
    figure = new_figure(1.2 * columns, 0.9 + 1.55 * len(decisions))
    panels = figure.subplots(len(decisions), columns, squeeze=False)
    for row, decision in zip(panels, decisions, strict=True):
        for axes in row:
            axes.set_axis_off()
        name, decided, second = (plain(n, LONGEST) for n in decision[1:4])
        gap = " " if len(decided) + len(second) < 6 else "\n"
        _show(row[0], decision.image, ends, f"{decided}{gap}over {second}\n(is {name})")
        for axes, one in zip(row[1:], decision.examples, strict=False):
            share = f"{100 * one.share:+.1f}%".replace("-", "\N{MINUS SIGN}")
            color = BLUE if one.share >= 0 else ORANGE
            _show(axes, one.image, ends, f"{plain(one.name, LONGEST)}\n{share}", color)
    figure.suptitle(
        f"{title}\nleft: test examples; beside them the training examples that decided,\n"
        "with their classes and shares (blue: for, orange: against)",
        fontsize="medium",
    )
    return figure


def _show(
    axes: "Axes",
    image: np.ndarray,
    ends: tuple[float, float],
    text: str,
    color: str | None = None,
) -> None:
    """The image in grey or, of three channels, in colour, with ``text`` below it."""
    low, high = ends
    shown = (image - low) / (high - low or 1.0)
    if shown.shape[-1] != 3:
        shown = shown.mean(-1)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=color or "black", linewidth=1 if color is None else 3)
    axes.set_xlabel(text, fontsize=11)
