"""Checks that configurations share: good values pass, bad ones are named."""

import math
from types import SimpleNamespace

import pytest

from dnntk import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)


def test_good_values_pass():
    config = SimpleNamespace(one=1.5, many=(1, 2.0), none=None, zero=0)
    check_positive(config, "one", "many", "none")
    check_at_least(config, 0, "one", "none", "zero")
    check_each_once("times", (1.0, 2.0))
    check_depths("depths", (2, 100))


@pytest.mark.parametrize(
    "value", [0, -1.0, math.inf, (1.0, 0.0), (math.inf,)], ids=lambda value: str(value)
)
def test_bad_numbers_are_named(value):
    with pytest.raises(InputError, match="^step: .* above 0"):
        check_positive(SimpleNamespace(step=value), "step")


def test_bad_counts_and_repeated_values_are_named():
    for value in (-1, math.inf):
        with pytest.raises(InputError, match="^seed: "):
            check_at_least(SimpleNamespace(seed=value), 0, "seed")
    for depths in ((), (5, 5), (1, 100)):
        with pytest.raises(InputError, match="^depths: "):
            check_depths("depths", depths)
