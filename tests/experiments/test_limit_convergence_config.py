"""Settings of the comparison with the limit that cannot be used are refused by name."""

import math

import pytest

from dnntk import InputError
from dnntk.experiments.limit_convergence_config import LimitConfig


def test_configurations_are_checked():
    for change, name in (
        ({"kernel_size": 2}, "kernel_size"),
        ({"time_step": 0.0}, "time_step"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"optimizer": "kernel", "time_step": 0.1}, "time_step"),
        ({"seed": -1}, "seed"),
        ({"depths": (1, 100)}, "depths"),
        ({"depths": (5, 5)}, "depths"),
        ({"times": (30.0, 10.0)}, "times"),
        ({"draws": 0}, "draws"),
        ({"pool": 0}, "pool"),
        ({"trials": 0}, "trials"),
        ({"times": (math.inf,)}, "times"),
        ({"depths": ()}, "depths"),
        ({"dataset": "toy"}, "dataset"),
    ):
        with pytest.raises(InputError, match=name):
            LimitConfig(**change)
