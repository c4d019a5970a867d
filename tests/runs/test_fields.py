"""Configurations hold Python's own values, whatever library's they were given."""

import decimal
import fractions
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from dnntk import InputError, TrainConfig, load_dataset
from dnntk.experiments.accumulation import AccumulationConfig
from dnntk.experiments.catapult_config import CatapultConfig
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig
from dnntk.experiments.errata import ErrataConfig
from dnntk.experiments.features_config import FeaturesConfig
from dnntk.experiments.initialization import InitializationConfig
from dnntk.experiments.limit_convergence_config import LimitConfig
from dnntk.experiments.ntk_convergence import ConvergenceConfig
from dnntk.experiments.regimes_config import RegimesConfig
from dnntk.experiments.trainability_config import TrainabilityConfig
from dnntk.infinite_depth.config import PredictConfig
from dnntk.runs.fields import exact

CONFIGS = (
    *(TrainConfig, PredictConfig, AccumulationConfig, DepthOrWidthConfig, ErrataConfig),
    *(CatapultConfig, FeaturesConfig, RegimesConfig),
    *(InitializationConfig, LimitConfig, ConvergenceConfig, TrainabilityConfig),
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"depth": np.int64(20)}, 20),
        ({"depth": jnp.int32(20)}, 20),
        ({"depth": np.array(20)}, 20),
        ({"seed": np.uint64(2**32 - 1)}, 2**32 - 1),
        ({"scale": np.float32(3)}, 3.0),
        ({"scale": jnp.float32("inf")}, math.inf),
        ({"scale": 3}, 3.0),
        ({"scale": decimal.Decimal("0.1")}, 0.1),
        ({"scale": fractions.Fraction(1, 3)}, 1 / 3),
        ({"arch": np.str_("mlp")}, "mlp"),
        ({"data_dir": pathlib.Path("a", "b"), "dataset": "mnist"}, "a/b"),
        ({"data_dir": b"a", "dataset": "mnist"}, "a"),
        ({"classes": np.array([3, 8])}, (3, 8)),
        ({"classes": jnp.array([3, 8])}, (3, 8)),
        ({"classes": [np.int8(3), 8]}, (3, 8)),
        ({"classes": range(3)}, (0, 1, 2)),
        ({"steps": None}, None),
    ],
)
def test_values_of_other_libraries_become_pythons_own(given, expected):
    config, name = TrainConfig(**given), next(iter(given))
    value = getattr(config, name)
    assert value == expected and type(value) is type(expected)
    assert not isinstance(value, tuple) or {type(one) for one in value} == {int}
    again = TrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


BAD_INTEGERS = (3.0, np.float64(3), "3", True, np.bool_(True), [3], np.array([3]), math.nan)
BAD_NUMBERS = ("0.1", True, math.nan, 1j, [0.1], np.array([0.1]), 10**400, np.ma.masked, b"1")


class Unreadable:
    """An array of another library's that cannot be read."""

    def __array__(self, dtype=None, copy=None):
        raise OSError("gone\naway")

    def __repr__(self):  # it names a test, the same in every worker
        return "Unreadable()"


BAD_CLASSES = (
    Unreadable(),
    "0,1",
    3,
    None,
    {0, 1},
    {0: 1},
    np.array([[0, 1]]),
    (0, "1"),
    (0.0, 1.0),
    (True, 0),
)
BAD = [("steps", value) for value in (*BAD_INTEGERS, 2**31, -1, 0)]
BAD += [("seed", value) for value in (*BAD_INTEGERS, None, 2**32, 2**63, -1)]
BAD += [("lr", value) for value in BAD_NUMBERS] + [("momentum", np.float32(1)), ("scale", 0)]
BAD += [("classes", value) for value in BAD_CLASSES]
BAD += [("arch", None), ("arch", b"mlp"), ("dataset", 3), ("data_dir", 3), ("mesh", None)]


@pytest.mark.parametrize(("name", "value"), BAD, ids=repr)
def test_what_has_no_such_value_is_refused_in_a_line_that_names_the_field(name, value):
    with pytest.raises(InputError, match=f"^{name}: expected") as caught:
        TrainConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_configuration_converts_its_fields(kind):
    assert type(kind(seed=np.int64(3)).seed) is int
    for value in (3.0, 2**63, "3", None):
        with pytest.raises(InputError, match=r"^seed: expected"):
            kind(seed=value)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (TrainConfig, {"data_dir": "x"}, "data_dir"),
        (TrainConfig, {"dataset": "toy", "data_dir": "x"}, "data_dir"),
        (TrainConfig, {"dataset": "toy", "classes": "all"}, "classes"),
        (TrainConfig, {"kernel_size": 5}, "kernel_size"),
        (TrainConfig, {"init": "he_uniform", "rho": 2.0}, "rho"),
        (PredictConfig, {"data_dir": "x"}, "data_dir"),
        (PredictConfig, {"kernel_size": 5}, "kernel_size"),
        (AccumulationConfig, {"data_dir": "x"}, "data_dir"),
        (LimitConfig, {"arch": "mlp", "kernel_size": 5}, "kernel_size"),
        (DepthOrWidthConfig, {"data_dir": "x"}, "data_dir"),
        (InitializationConfig, {"arch": "mlp", "width": 5}, "width"),
        (InitializationConfig, {"arch": "cnn", "d_in": 5}, "d_in"),
        (TrainabilityConfig, {"dataset": "digits", "data_dir": "x"}, "data_dir"),
        (TrainabilityConfig, {"epochs": 3}, "epochs"),
        (TrainabilityConfig, {"preset": "mlp-4000", "rates": (0.1,)}, "rates"),
    ],
)
def test_a_setting_that_cannot_matter_is_refused(kind, fields, name):
    with pytest.raises(InputError, match=f"^{name}: no effect .*leave it out") as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rates", [np.array([0.1, 1.0]), jnp.array([0.5]), [np.float32(0.5)]])
def test_sequences_of_numbers_become_tuples(rates):
    held = TrainabilityConfig(rates=rates).rates
    assert held == tuple(float(rate) for rate in rates) and {type(rate) for rate in held} == {float}
    assert PredictConfig(times=np.array([1, np.inf])).times == (1.0, math.inf)
    for value in (1.0, "1", {1.0}):
        with pytest.raises(InputError, match=r"^times: expected a sequence"):
            PredictConfig(times=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("pool", 2.0), ("pool", True), ("pool", "2"), ("seed", 1.5), ("seed", 2**40)),
        *(("classes", 5), ("classes", (0.0, 1.0)), ("data_dir", 3), ("data_dir", "x")),
    ],
)
def test_load_dataset_refuses_the_same_values(name, value):
    with pytest.raises(InputError, match=f"^{name}(:|=x:) expected"):
        load_dataset("digits", **{name: value})


def test_load_dataset_takes_the_same_values():
    data = load_dataset("digits", classes=np.array([3, 8]), pool=np.int64(4), seed=jnp.int32(1))
    assert data.classes == (3, 8) and data.x_train.shape[1:] == (2, 2, 1)


def test_names_of_numbers_are_short_and_no_two_are_the_same():
    close = (4.0, 0.3, 1e6, 1e6 + 1, 1 / 3, 0.1 + 0.2, math.inf, np.float64(2.5))
    named = [exact(number) for number in close]
    assert named[:3] == ["4", "0.3", "1e+06"]
    assert tuple(map(float, named)) == close
