"""Steps and their number, schedules, and the kernel time that the steps add up to."""

import jax
import numpy as np
import pytest
from networks import initialized
from networks import outputs as apply

import dnntk
from dnntk.training.config import SCHEDULES, TrainConfig
from dnntk.training.plan import Plan, Planner, kernel_times, schedule_of
from dnntk.training.step_size import Eigenvalue


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
        start = initialized(result.model, x[:1], config.seed)
        kernel = np.asarray(dnntk.empirical_ntk(result.model, start, x)[:, :, 0, 0])
        outputs = np.asarray(apply(result.model, result.variables, x))
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
    planner = Planner(config, config.model(1), 100)
    with pytest.raises(dnntk.InputError, match="steps: expected 20"):
        planner.resume(held | {"reason": ""})
    with pytest.raises(dnntk.InputError, match="time: expected schedule=constant"):
        TrainConfig(schedule="cosine", time=3.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_time_is_reached_exactly_by_steps_below_the_limit(momentum):
    config = TrainConfig(depth=10, time=3.0, momentum=momentum)
    plan = Planner(config, config.model(1), 100).plan(lambda: Eigenvalue(7.3, True, 5))
    assert kernel_times(config, plan)[-1] == pytest.approx(3.0, rel=1e-9)
    assert 0.5 * 2 / 7.3 < plan.time_step < 2 / 7.3


@pytest.mark.parametrize(("outputs", "factor"), [(1, 4), (3, 2)])
def test_steps_on_cross_entropy_are_as_much_longer_as_it_is_flatter(outputs, factor, caplog):
    plans = []
    for loss in ("squared", "cross_entropy"):
        config = TrainConfig(depth=10, loss=loss)
        planner = Planner(config, config.model(outputs), 100)
        plans.append(planner.plan(lambda: Eigenvalue(7.3, True, 5)))
    assert plans[1].time_step == pytest.approx(factor * plans[0].time_step)
    assert f"2 / ({1 / factor:g} lambda_max)" in plans[1].reason


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TrainConfig(time=1e300, depth=5), "time"),
        (TrainConfig(epochs=2**31 - 1, batch_size=9), "epochs"),
    ],
)
def test_more_steps_than_can_be_counted_are_refused(config, name):
    planner = Planner(config, config.model(1), 100)
    with pytest.raises(dnntk.InputError, match=f"^{name}: expected at most"):
        planner.plan(lambda: Eigenvalue(1.0, True, 5))
