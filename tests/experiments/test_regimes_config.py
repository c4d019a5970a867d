"""Settings of the (L, C) plane that cannot be used are refused by name."""

import pytest

from dnntk import InputError
from dnntk.experiments.regimes_config import RegimesConfig


def test_configurations_are_checked():
    for change, name in (
        ({"arch": "rnn"}, "arch"),
        ({"depths": ()}, "depths"),
        ({"depths": (2, 100)}, "depths"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 1.0)}, "scales"),
        ({"scales": (0.0,)}, "scales"),
        ({"power": -1.0}, "power"),
        ({"trials": 0}, "trials"),
        ({"examples": 0}, "examples"),
        ({"records": 0}, "records"),
        ({"time": 0.0}, "time"),
        ({"offset": 1.0}, "offset"),
        ({"dataset": "toy"}, "dataset"),
        ({"pool": 0}, "pool"),
        ({"fit_from": 0.0}, "fit_from"),
        ({"beta": -1.0}, "beta"),
    ):
        with pytest.raises(InputError, match=rf"^{name}\b"):
            RegimesConfig(**change)


def test_a_depth_has_the_given_scales_below_its_largest_and_the_largest():
    config = RegimesConfig(arch="cnn", depths=(10, 100), scales=(1, 50, 1e4), power=1.5)
    expected = [(10, 1.0), (10, 10**1.5), (100, 1.0), (100, 50.0), (100, 1000.0)]
    assert [depth for depth, _ in config.cells] == [depth for depth, _ in expected]
    assert [c for _, c in config.cells] == pytest.approx([c for _, c in expected])
    assert config.archs == ("cnn",) and RegimesConfig().archs == ("mlp", "cnn")
