"""Settings of the search for the required depth that cannot be used are refused by name."""

import pytest

from dnntk import InputError
from dnntk.experiments.required_depth_config import PROBLEMS, RequiredDepthConfig


def test_configurations_are_checked():
    for change, name in (
        ({"datasets": ("cifar",)}, "datasets"),
        ({"datasets": ()}, "datasets"),
        ({"arch": "gru"}, "arch"),
        ({"data_dir": "here"}, "data_dir"),
        ({"pool": 0}, "pool"),
        ({"train_examples": (5, 0)}, "train_examples"),
        ({"times": (2.0, 1.0)}, "times"),
        ({"times": (0.0,)}, "times"),
        ({"epsilons": (0.0,)}, "epsilons"),
        ({"depths": (1, 18)}, "depths"),
        ({"depths": (18, 10)}, "depths"),
        ({"trials": 0}, "trials"),
        ({"samples": 0}, "samples"),
        ({"trained": -1}, "trained"),
        ({"rho": -1.0}, "rho"),
    ):
        with pytest.raises(InputError, match=rf"^{name}\b"):
            RequiredDepthConfig(**change)


def test_networks_are_of_the_problems_data():
    config = RequiredDepthConfig(datasets=("digits", "mnist_01"), data_dir="here")
    for name in config.datasets:
        network = config.network(name, 10, "sobol")
        assert (network.dataset, network.classes) == PROBLEMS[name]
        assert network.features == "sobol" and network.depth == 10
    assert network.data_dir == "here" and config.network("digits", 10, "sobol").data_dir is None
