"""Networks that are compared with their limit: how many fit, and both ways to train them."""

import numpy as np

from dnntk.experiments.compared_networks import ComparedNetworks
from dnntk.experiments.limit_convergence_config import LimitConfig


def test_networks_side_by_side_fit_into_memory():
    config = LimitConfig()
    x = np.zeros((1, 784), np.float32)
    wide = config.network("mlp", 1000).model(10)
    assert ComparedNetworks(wide, x, x[:, :1], x, seed=0).at_once == 1
    narrow = config.network("mlp", 1000).model(1)
    assert ComparedNetworks(narrow, x[:, :4], x[:, :1], x[:, :4], seed=0).at_once > 1000


def test_closed_form_and_small_steps_train_the_same_networks(x64):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.1, 1, (5, 2)), rng.normal(size=(5, 1))
    model = LimitConfig().network("mlp", 12).model(1)
    networks = ComparedNetworks(model, x, y, np.concatenate([x, x + 0.1]), seed=3)
    trials, label = range(1, 3), "test"
    descended = networks.train(trials, 0.01, [100, 200], label, progress=False)
    solved = networks.solve(trials, [1.0, 2.0], label, progress=False)
    assert solved.shape == descended.shape == (2, 2, 10, 1)
    np.testing.assert_allclose(solved, descended, atol=0.01 * np.abs(descended).max())
    assert np.abs(solved[0] - solved[1]).max() > 0.01  # other trials, other networks
