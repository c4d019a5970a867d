"""One network of the comparison: its size, its step, and what a diverged run leaves."""

import math

import jax
import numpy as np
import pytest

from dnntk import Diverged
from dnntk.experiments.depth_or_width import runs
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig, NetworkSetting
from dnntk.experiments.depth_or_width.runs import ImageData, deep_parameters, run
from dnntk.experiments.shallow import ShallowMLP, width_for

CONFIG = DepthOrWidthConfig(
    train_examples=30,
    test_examples=20,
    probe_examples=8,
    depths=(4,),
    regime_time=1.0,
    dtype="float64",
)


def test_a_wide_network_has_as_many_parameters_as_the_deep_one():
    for depth, d_in, d_out in ((30, 64, 10), (300, 49, 10), (5, 6, 3)):
        model = DepthOrWidthConfig().network(
            NetworkSetting("size", "digits", "theorem", depth, 1.0)
        )
        deep = jax.eval_shape(model.model(d_out).init, jax.random.key(0), np.zeros((1, d_in)))
        count = sum(p.size for p in jax.tree.leaves(deep["params"]))
        assert deep_parameters(depth, d_in, d_out) == count
        wide = ShallowMLP(width_for(count, d_in, d_out), d_out)
        shapes = jax.eval_shape(wide.init, jax.random.key(0), np.zeros((1, d_in), np.float32))
        size = sum(p.size for p in jax.tree.leaves(shapes["params"]))
        assert abs(size / count - 1) < (0.01 if depth > 5 else 0.05)


def test_a_run_that_diverges_is_retried_with_half_the_step(monkeypatch):
    steps = []

    class Unstable(runs._Network):
        def at_start(self):
            return {"lambda_max": 40.0}

        def train(self, time_step, progress):
            steps.append(time_step)
            if len(steps) != 3:
                raise Diverged("no", [])
            return ["a record"]

    monkeypatch.setattr(runs, "_Deep", Unstable)
    setting, most = (
        NetworkSetting("regime", "digits", "regime", 4, 3.0),
        CONFIG.moving_fraction * 2 / 40,
    )
    row = run(setting, None, CONFIG, 2.0, progress=False)
    assert row["halvings"] == 2 and row["time_step"] == steps[2] and row["records"] == ["a record"]
    assert not row["diverged"]
    np.testing.assert_allclose(steps, [most, most / 2, most / 4], rtol=1e-9)
    steps.extend([0] * 9)
    row = run(setting, None, CONFIG, 2.0, progress=False)
    assert row["diverged"] and row["records"] == []
    assert len(steps) == 12 + runs.MOST_HALVINGS + 1


def test_a_network_of_infinite_scale_keeps_its_kernel():
    images, times = ImageData(CONFIG, "digits"), (CONFIG.regime_time,)
    row = run(
        NetworkSetting("regime", "digits", "regime", 4, math.inf),
        images,
        CONFIG,
        2.0,
        progress=False,
    )
    assert tuple(record["time"] for record in row["records"]) == times
    assert row["records"][-1]["movement"] < 1e-12
    assert row["records"][-1]["alignment"] == pytest.approx(row["alignment"])
