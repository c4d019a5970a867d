"""Settings of the comparison of depths: checked by name, and an architecture's own where None."""

import pytest

from dnntk import InputError
from dnntk.experiments.depth_transfer_config import OWN, DepthTransferConfig


def test_configurations_are_checked():
    for change, name in (
        ({"arch": "rnn"}, "arch"),
        ({"optimizers": ("yogi",)}, "optimizers"),
        ({"optimizers": ()}, "optimizers"),
        ({"baselines": ("deep_narrow",)}, "baselines"),
        ({"baselines": ("he_uniform", "he_uniform")}, "baselines"),
        ({"dataset": "toy"}, "dataset"),
        ({"deepest": 1}, "deepest"),
        ({"scales": (1.0, 1.0)}, "scales"),
        ({"scales": (-1.0,)}, "scales"),
        ({"depths": (30, 10)}, "depths"),
        ({"depths": (10, 100)}, "tune_depth"),
        ({"tune_depth": 3000, "arch": "mlp"}, "tune_depth"),
        ({"depth_rates": (0.0,)}, "depth_rates"),
        ({"steps": 0}, "steps"),
        ({"trials": 0}, "trials"),
        ({"features": "halton"}, "features"),
        ({"rho": -1.0}, "rho"),
    ):
        with pytest.raises(InputError, match=rf"^{name}\b"):
            DepthTransferConfig(**change)


def test_an_architecture_has_its_own_and_what_is_given():
    config = DepthTransferConfig(steps=7)
    assert [config.of(arch)["steps"] for arch in config.archs] == [7, 7]
    assert config.of("cnn")["depths"] == OWN["cnn"]["depths"] != config.of("mlp")["depths"]
    kinds = DepthTransferConfig(arch="cnn").kinds("cnn")
    assert [kind.name for kind in kinds][::3] == [
        *("cnn-deep_narrow-sgd-C0.3", "cnn-deep_narrow-adam-C0.3", "cnn-he_uniform-sgd-C1"),
        "cnn-residual-adam-C1",
    ]
    large = DepthTransferConfig(arch="cnn", scales=(1e6, 1e6 + 1)).kinds("cnn")
    names = {kind.name for kind in large if kind.scale > 1 and kind.optimizer == "sgd"}
    assert names == {"cnn-deep_narrow-sgd-C1e+06", "cnn-deep_narrow-sgd-C1000001.0"}
    networks = [config.network(kind, 9, 3) for kind in kinds[-6::2]]
    assert [type(model).__name__ for model in networks] == [
        *("DeepNarrowCNN", "ResidualNetwork", "ResidualNetwork")
    ]
    assert networks[0].initialization == "he_uniform"
    assert [(model.depth, model.power) for model in networks[1:]] == [(9, 0.0), (9, -0.5)]
    sgd, adam = (config.run(kind, 50, 0.02) for kind in config.kinds("cnn")[:4:3])
    assert (sgd.time_step, sgd.rho, adam.depth_rate, adam.scale) == (0.02, 5.0, 0.02, 0.3)
