"""Settings of the catapult that cannot be used are refused by name."""

import pytest

from dnntk import InputError
from dnntk.experiments.catapult_config import CatapultConfig


def test_configurations_are_checked():
    for change, name in (
        ({"dataset": "toy"}, "dataset"),
        ({"depths": (1, 18)}, "depths"),
        ({"depths": (18, 10)}, "depths"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, float("inf"))}, "scales"),
        ({"ratios": (0.0, 2.0)}, "ratios"),
        ({"ratios": (2.0, 2.0)}, "ratios"),
        ({"trials": 0}, "trials"),
        ({"examples": 0}, "examples"),
        ({"steps": 0}, "steps"),
        ({"arch": "rnn"}, "arch"),
    ):
        with pytest.raises(InputError, match=rf"^{name}\b"):
            CatapultConfig(**change)


def test_a_network_is_that_of_its_depth_and_scale():
    network = CatapultConfig(arch="cnn", rho=0.5, seed=3).network(10, 4.0)
    assert (network.arch, network.depth, network.scale) == ("cnn", 10, 4.0)
    assert (network.rho, network.seed, network.pool) == (0.5, 3, 2)
