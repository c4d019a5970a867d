"""The configuration of a training run: its checks, and its form in JSON."""

import json

import pytest

import dnntk
from dnntk import TrainConfig


@pytest.mark.parametrize("value", ["0.1", None, float("inf"), 2.5])
def test_configurations_survive_json(value):
    config = TrainConfig(scale=None if value == "0.1" else value, classes=(3, 8))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_runs_of_earlier_versions_have_a_gaussian_unit_a_layer():
    content = TrainConfig(depth=7).to_json()
    for name in ("features", "random_units", "depth_rate", "loss", "label_smoothing"):
        del content[name]
    earlier = TrainConfig(depth=7, features="gaussian", random_units=1)
    assert TrainConfig.from_json(content) == earlier


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_decay": 0.1},
        {"optimizer": "adam", "lr": 0.1, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 0.1, "weight_decay": -0.1},
        {"optimizer": "adamw", "lr": 0.1, "weight_decay": float("nan")},
    ],
)
def test_weight_decay_is_for_those_who_have_it(fields):
    with pytest.raises(dnntk.InputError, match="^weight_decay") as error:
        TrainConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sam_radius": 0.1},
        {"optimizer": "adam", "lr": 0.1, "sam_radius": -0.1},
        {"optimizer": "adam", "lr": 0.1, "sam_radius": float("inf")},
    ],
)
def test_a_sharpness_radius_is_a_length_and_not_for_kernel_time(fields):
    with pytest.raises(dnntk.InputError, match="^sam_radius") as error:
        TrainConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "^depth_rate: .*adam.*got sgd; give time_step"),
        ({"optimizer": "yogi"}, "^depth_rate: .*got yogi; give lr"),
        ({"optimizer": "adam", "lr": 0.1}, "^lr, depth_rate: expected at most one"),
        ({"optimizer": "adam", "time_step": 0.1}, "^time_step, depth_rate: expected at most one"),
        ({"optimizer": "adam", "parametrization": "standard"}, "^depth_rate: .*parametrization"),
        ({"optimizer": "adam", "depth_rate": float("inf")}, "^depth_rate: .*finite"),
        ({"optimizer": "kernel"}, "^depth_rate: no effect on optimizer=kernel"),
    ],
)
def test_a_rate_for_all_depths_is_for_normalized_gradients(fields, message):
    with pytest.raises(dnntk.InputError, match=message) as error:
        TrainConfig(**{"depth_rate": 0.01} | fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "hinge"}, "^loss: expected one of squared, cross_entropy, got 'hinge'"),
        ({"label_smoothing": 0.1}, "^label_smoothing: no effect on loss=squared"),
        ({"loss": "cross_entropy", "label_smoothing": 1.0}, r"^label_smoothing: .*\[0, 1\)"),
        ({"loss": "cross_entropy", "dataset": "toy"}, "^loss: toy has no classes"),
        ({"loss": "cross_entropy", "optimizer": "kernel"}, "^loss: optimizer=kernel needs squared"),
    ],
)
def test_a_loss_is_one_that_the_rest_allows(fields, message):
    with pytest.raises(dnntk.InputError, match=message):
        TrainConfig(**fields)
