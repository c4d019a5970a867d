"""Schedules: what the steps are multiplied by, and the kernel time that they add up to."""

import jax
import numpy as np
import pytest

import dnntk
from dnntk.training.config import DECAYING, SCHEDULES, TrainConfig
from dnntk.training.optimizers import optimizer_of
from dnntk.training.plan import Job, Plan, kernel_times, schedule_of


def factors(steps, **fields):
    schedule = schedule_of(TrainConfig(**fields), steps)
    return np.array([schedule(step) for step in range(steps)], float)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4, 50])
def test_factors_rise_to_one_and_then_fall(schedule, warmup):
    found = factors(20, schedule=schedule, warmup=warmup)
    top = min(warmup, 19)
    assert (found > 0).all() and (found <= 1).all()
    assert (np.diff(found[: top + 1]) > 0).all() and (np.diff(found[top:]) <= 0).all()
    if warmup < 20:
        assert found[top] == 1
        assert (found[-1] < 0.2) == (schedule != "constant")


def test_steps_of_a_schedule_move_a_linear_network_as_its_kernel_says():
    config = TrainConfig(
        depth=12, scale=np.inf, schedule="linear", warmup=3, steps=8, time_step=0.05, batch_size=0,
        dtype="float64", eval_every=1,
    )  # fmt: skip
    result = dnntk.train(config, progress=False)
    x, y = result.dataset.x_train, result.dataset.y_train
    with jax.enable_x64(True):
        start = jax.jit(result.model.init)(jax.random.key(config.seed), x[:1])
        kernel = np.asarray(dnntk.empirical_ntk(result.model, start, x)[:, :, 0, 0])
        outputs = np.asarray(jax.jit(result.model.apply)(result.variables, x))
    rest = y
    steps = 0.05 * np.asarray(schedule_of(config, 8)(np.arange(8)), float)
    for step in steps:
        rest = rest - step * kernel @ rest / len(x)
    np.testing.assert_allclose(y - outputs, rest, atol=1e-6)
    times = [line["time"] for line in result.history]
    np.testing.assert_allclose(times, np.append(0, steps.cumsum()), rtol=1e-6)


def test_equal_steps_are_multiples_of_one():
    plan = Plan(7, 0.1, 0.1, 0.1, None, "")
    assert list(kernel_times(TrainConfig(), plan)) == [0.1 * k for k in range(8)]
    assert kernel_times(TrainConfig(), Plan(7, 0.1, None, None, None, "")) is None


def test_a_schedule_keeps_its_length():
    config = TrainConfig(schedule="cosine", steps=30)
    held = {"steps": 20, "rate": 1.0, "time_step": 1.0, "time_per_step": 1.0, "lambda_max": None}
    job = Job(config, config.model(1), 100, 100)
    with pytest.raises(dnntk.InputError, match="steps: expected 20"):
        job.resumed(held | {"reason": ""})
    with pytest.raises(dnntk.InputError, match="time: expected schedule=constant"):
        TrainConfig(schedule="cosine", time=3.0)


@pytest.mark.parametrize("optimizer", DECAYING)
def test_weight_decay_takes_its_share_of_the_parameters(optimizer):
    params = {"kernel": np.array([1.0, -2.0, 4.0], np.float32)}

    def step(weight_decay):
        config = TrainConfig(optimizer=optimizer, lr=0.1, weight_decay=weight_decay)
        rule = optimizer_of(config, 0.1, steps=5)
        gradient = {"kernel": np.array([0.3, 0.1, -0.2], np.float32)}
        return np.asarray(rule.update(gradient, rule.init(params), params)[0]["kernel"])

    change = step(0.5) - step(0.0)
    if optimizer == "lamb":  # it scales the whole step to the parameters
        assert change @ params["kernel"] < 0
    else:
        np.testing.assert_allclose(change, -0.1 * 0.5 * params["kernel"], rtol=1e-5)


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
