"""Settings of the comparison of draws that cannot be used are refused by name."""

import pytest

from dnntk import InputError
from dnntk.experiments.features_config import CASES, FeaturesConfig
from dnntk.networks.random_units import FEATURES


def test_configurations_are_checked():
    for change, name in (
        ({"case": "mnist"}, "case"),
        ({"features": "halton"}, "features"),
        ({"depths": (2, 18)}, "depths"),
        ({"depths": (18, 10)}, "depths"),
        ({"depths": ()}, "depths"),
        ({"trained_depths": (2,)}, "trained_depths"),
        ({"trained": 3, "trials": 2}, "trained"),
        ({"trials": 0}, "trials"),
        ({"random_units": (1, 0)}, "random_units"),
        ({"random_units": (4, 4)}, "random_units"),
        ({"examples": 0}, "examples"),
        ({"time": 0.0}, "time"),
    ):
        with pytest.raises(InputError, match=rf"^{name}\b"):
            FeaturesConfig(**change)


def test_all_are_all_and_one_is_one():
    assert FeaturesConfig().cases == tuple(CASES) and FeaturesConfig().draws == FEATURES
    one = FeaturesConfig(case="toy", features="sobol", trained_depths=())
    assert (one.cases, one.draws, one.trained_depths) == (("toy",), ("sobol",), ())
