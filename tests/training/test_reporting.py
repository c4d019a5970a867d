"""What a run says of itself: whether it learned, and what may help."""

import logging

import numpy as np
import pytest

from dnntk import Dataset, TrainConfig, train
from dnntk.training.evaluation import constant_loss, least_loss
from dnntk.training.reporting import LEAST_LEARNED, verdict


def test_learned_is_better_than_the_best_constant():
    y = np.random.default_rng(0).normal(3, 1, (50, 2))
    constant = constant_loss(y, y)
    assert constant == pytest.approx(0.5 * y.var(axis=0).sum())
    for share in (0.0, 1 - 2 * LEAST_LEARNED, 1 - LEAST_LEARNED / 2, 1.0, 2.0):
        found = verdict(share * constant, y, y)
        assert found["constant_loss"] == constant and found["learned"] == (share < 0.95)
    assert verdict(0.0, np.ones((5, 1)), np.ones((5, 1)))["learned"]


def test_cross_entropy_has_learned_what_is_beyond_its_targets_entropy():
    y = np.tile([[0.95, 0.05], [0.05, 0.95]], (5, 1))
    least, constant = least_loss(y, "cross_entropy"), np.log(2)
    for share in (0.0, 1 - 2 * LEAST_LEARNED, 1 - LEAST_LEARNED / 2, 1.0):
        value = least + share * (constant - least)
        found = verdict(value, y, y, "cross_entropy")
        assert found["learned"] == (share < 0.95) and found["train_mse"] is None
        assert found["constant_loss"] == pytest.approx(constant)


def test_a_vanished_kernel_and_a_run_that_learned_nothing_are_said(caplog):
    x = np.random.default_rng(0).random((30, 3))
    data = Dataset(x_train=x, y_train=x[:, 0] > 0.5)
    with caplog.at_level(logging.WARNING, "dnntk"):
        config = TrainConfig(depth=60, steps=5, init="he_uniform")
        result = train(config, dataset=data, progress=False)
        assert not result.summary["learned"]
        said = [record.getMessage() for record in caplog.records]
        assert [line.split(":")[0] for line in said] == ["kernel", "nothing learned"]
        assert "vanished" in said[0] and all("init=deep_narrow" in line for line in said)
        caplog.clear()
        result = train(TrainConfig(depth=60, steps=30), dataset=data, progress=False)
        assert result.summary["learned"] and not caplog.records
