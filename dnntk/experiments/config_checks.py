"""Checks that the configurations of several experiments share."""

import math
from collections.abc import Sequence
from typing import Any

from dnntk.errors import InputError

__all__ = ["check_at_least", "check_depths", "check_each_once", "check_positive"]


def check_each_once(name: str, values: Sequence[Any]) -> None:
    """Require at least one value, and no value twice."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name}: expected at least one, each once, got {values}")


def check_depths(name: str, depths: Sequence[int]) -> None:
    """Require at least one depth, each once, and none below 2."""
    check_each_once(name, depths)
    if min(depths) < 2:
        raise InputError(f"{name}: expected whole numbers of at least 2, got {depths}")


def check_positive(config: Any, *names: str) -> None:
    """Require finite numbers above 0, tuples of such numbers, or None."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number is None or 0 < number < math.inf for number in numbers):
            raise InputError(f"{name}: expected finite numbers above 0, got {value}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Require finite numbers of at least ``least``, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{name}: expected a number of at least {least}, got {value}")
