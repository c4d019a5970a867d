"""Map the value of each parameter to its style in figures 3.1 and 3.2.

Values are compared exactly, without a tolerance: a network with another initialization, or a
trained one, is drawn with other styles.
"""

from typing import Any

import numpy as np

from dnntk.figures.initialization import Style

__all__ = ["bias_styles", "filter_styles", "network_styles", "weight_styles"]


def filter_styles(kernel: np.ndarray, scale: float) -> np.ndarray:
    """Styles of filters: 0 none, centred identity solid, C times it double, any other dashed.

    Args:
        kernel: [..., q, q, in, out], q odd.
        scale: C, rounded to the kernel's dtype before comparing.

    Returns:
        [..., in, out] of `Style`.
    """
    middle = kernel.shape[-3] // 2
    centre = kernel[..., middle, middle, :, :]
    nonzeros = np.count_nonzero(kernel, axis=(-4, -3))
    centred = nonzeros == (centre != 0)
    cases = {
        Style.NONE: nonzeros == 0,
        Style.SOLID: centred & (centre == 1),
        Style.DOUBLE: centred & (centre == np.asarray(scale, kernel.dtype)),
    }
    return np.select(list(cases.values()), [int(style) for style in cases], int(Style.DASHED))


def weight_styles(kernel: np.ndarray, scale: float) -> np.ndarray:
    """Styles of weights [..., in, out], as `filter_styles`: 0 none, 1 solid, C double, dashed."""
    return filter_styles(kernel[..., None, None, :, :], scale)


def bias_styles(bias: np.ndarray, scale: float) -> np.ndarray:
    """Styles of boxes [..., out]: 0 solid, C double, -C double-dashed, any other dashed."""
    c = np.asarray(scale, bias.dtype)
    cases = {Style.SOLID: bias == 0, Style.DOUBLE: bias == c, Style.DOUBLE_DASHED: bias == -c}
    return np.select(list(cases.values()), [int(style) for style in cases], int(Style.DASHED))


def network_styles(
    params: dict[str, Any], scale: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Styles of all layers: L arrays [in, out] of lines, L arrays [out] of boxes.

    ``params`` are literal, from `dnntk.to_standard`.
    """
    filters = np.ndim(params["first"]["kernel"]) == 4
    styles = filter_styles if filters else weight_styles
    lines, boxes = [], []
    for name in ("first", "middle", "last"):
        layer = {part: np.asarray(value) for part, value in params[name].items()}
        found = styles(layer["kernel"], scale), bias_styles(layer["bias"], scale)
        lines += list(found[0]) if name == "middle" else [found[0]]
        boxes += list(found[1]) if name == "middle" else [found[1]]
    return lines, boxes
