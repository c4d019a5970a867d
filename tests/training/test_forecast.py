"""What a run is predicted to take, against what it takes."""

import json
import re

import jax
import numpy as np
import processes
import pytest

from dnntk import Dataset, TrainConfig, train
from dnntk.errors import InputError
from dnntk.native import build
from dnntk.training import forecast as forecasting
from dnntk.training.forecast import forecast
from dnntk.training.plan import evaluation_steps

RNG = np.random.default_rng(0)
IMAGES = Dataset(x_train=RNG.random((40, 4, 4, 1)), y_train=RNG.random((40, 1)))


@pytest.fixture
def soon(monkeypatch):
    """Depths so small are timed that nothing takes long."""
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("fields", "dataset"),
    [
        ({"arch": "cnn", "steps": 7, "batch_size": 8, "mesh": "data:2"}, IMAGES),
        ({"dataset": "toy", "time": 20.0}, None),
    ],
    ids=["cnn", "time"],
)
def test_counts_are_those_of_the_run(fields, dataset, soon):
    config = TrainConfig(depth=20, **fields)
    found, run = forecast(config, dataset=dataset), train(config, dataset=dataset, progress=False)
    assert found.parameters == run.summary["parameters"]
    # With a kernel time the steps follow from an eigenvalue on other examples.
    assert found.steps == pytest.approx(run.summary["steps"], abs=2 if config.time else 0)
    assert len(evaluation_steps(config, run.summary["steps"])) == len(run.history)
    assert 0 < found.step_seconds < found.total_seconds
    assert "at the peak" in str(found)


def test_depths_that_are_timed_split_into_stages_as_the_runs_own(soon):
    found = forecast(TrainConfig(depth=70, dataset="toy", steps=3, mesh="depth:2", lr=1e-3))
    first, second = found.calibrated_at
    assert first < second < 70 and first % 2 == second % 2 == 0
    assert found.steps == 3
    # Stages run in the plain code, which goes up twice.
    assert found.step_operations == 4 * 2 * 200 * (2 * 4 + 68 * 16 + 4)


def test_arithmetic_is_two_operations_a_weight_and_checkpoints_take_memory(soon, monkeypatch):
    monkeypatch.setattr(forecasting, "resident_bytes", lambda: 0)
    found = forecast(TrainConfig(depth=300, dataset="toy", steps=3, lr=1e-3))
    once = 2 * 200 * (2 * 4 + 298 * 16 + 4)
    # Up and twice down; the plain code goes up twice.
    assert found.step_operations == once * (3 if build.available() else 4)
    params = 4 * found.parameters
    assert found.step_bytes + params < found.memory_bytes < found.step_bytes + 2 * params


def test_it_needs_no_memory_for_the_depth(monkeypatch):
    """The network itself is never made: a billion layers would take 80 GB."""
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.002)
    found = forecast(TrainConfig(depth=10**9, dataset="toy", steps=10, scale=1e12))
    # Parameters once, since a step changes them in place, and the states of sqrt(depth) layers.
    assert 80e9 < found.step_bytes < 120e9
    # To choose the step takes a gradient beside them.
    assert 160e9 < found.memory_bytes < 200e9
    assert max(found.calibrated_at) < 10**7
    assert all(array.size < 10**8 for array in jax.live_arrays())


def test_memory_is_that_of_the_run_checkpoints_included(tmp_path):
    settings = ("--depth=5000", "--time_step=0.1", "--workdir=run")  # 88 MB of parameters
    few = ("--steps=3", "--checkpoint_every=1", "--eval_examples=60")
    run = processes.outcome("train.py", *settings, *few, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    expected = float(re.search(r"memory: about ([0-9.]+) GB", run.stdout)[1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert expected == pytest.approx(summary["peak_memory_bytes"] / 1e9, rel=0.15)


def test_a_mesh_of_more_devices_than_there_are_is_an_error():
    with pytest.raises(InputError, match="64 devices, 2 are there"):
        forecast(TrainConfig(depth=66, dataset="toy", mesh="data:64"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(forecasting.processes, "is_multiprocess", lambda: True)
    with pytest.raises(InputError, match="expected one process"):
        forecast(TrainConfig(depth=10, dataset="toy"))
