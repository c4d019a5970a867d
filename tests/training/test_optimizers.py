"""A run's optimizer, from optax."""

import numpy as np
import pytest

from dnntk.training.config import DECAYING, TrainConfig
from dnntk.training.optimizers import optimizer_of
from dnntk.training.plan import Planner


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


@pytest.mark.parametrize("decay", [0.5, None])
def test_a_rate_for_all_depths_decays_alike_at_every_depth(decay):
    params, none = {"kernel": np.array([4.0], np.float32)}, {"kernel": np.zeros(1, np.float32)}
    for depth in (4, 100):
        config = TrainConfig(
            depth=depth, optimizer="adamw", depth_rate=0.1, weight_decay=decay, steps=5
        )
        plan = Planner(config, config.model(1), 10).plan(None)
        np.testing.assert_allclose(plan.rate, 0.1 / np.sqrt(depth))
        rule = optimizer_of(config, plan.rate, 5)
        change = rule.update(none, rule.init(params), params)[0]["kernel"]
        own = 1e-4  # optax's default
        np.testing.assert_allclose(change, -0.1 * (decay or own) * 4, rtol=1e-5)
