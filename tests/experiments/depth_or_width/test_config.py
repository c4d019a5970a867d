"""Settings of the comparison that cannot be used are refused by name."""

import math

import pytest

from dnntk import InputError
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig


def test_configurations_are_checked():
    for change, name in (
        ({"datasets": ()}, "datasets"),
        ({"depths": (1,)}, "depth"),
        ({"fraction": 1.5}, "fraction"),
        ({"least_scale": 1e9}, "least_scale"),
        ({"times": (2.0, 1.0)}, "times"),
        ({"times": (2.0, 3.0)}, "times"),
        ({"datasets": ("toy",)}, "datasets"),
        ({"regime_scales": 1}, "regime_scales"),
        ({"regime_time": math.inf}, "regime_time"),
        ({"trials": 0}, "trials"),
        ({"probe_examples": 2}, "probe_examples"),
        ({"train_examples": 0}, "train_examples"),
        ({"small_scale": 0.0}, "small_scale"),
        ({"moving_fraction": 0.0}, "moving_fraction"),
        ({"dtype": "float16"}, "dtype"),
        ({"rho": -1.0}, "rho"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=name):
            DepthOrWidthConfig(**change)
