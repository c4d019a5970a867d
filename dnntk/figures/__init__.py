"""All figures: drawn from plain arrays, saved as PNG and PDF, readable for the colour-blind.

`drawing` holds what all figures share, `training` the figures of runs and predictions; the figures
of an experiment or a script are in the module of its name.
"""

from dnntk.figures.attribution import attribution_figure
from dnntk.figures.drawing import BLACK, BLUE, GREEN, ORANGE, draw, in_math, new_figure, plain
from dnntk.figures.training import (
    arc_figure,
    closed_form_figure,
    confusion_figure,
    loss_figure,
    prediction_figure,
)

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "arc_figure",
    "attribution_figure",
    "closed_form_figure",
    "confusion_figure",
    "draw",
    "in_math",
    "loss_figure",
    "new_figure",
    "plain",
    "prediction_figure",
]
