"""What a run is said to take, against what it takes."""

import dataclasses
import json
import re

import jax
import processes
import pytest

from dnntk import TrainConfig, train
from dnntk.errors import InputError
from dnntk.native import build
from dnntk.training import forecast as forecasting
from dnntk.training.config import evaluation_steps
from dnntk.training.forecast import forecast


@pytest.mark.parametrize(
    "fields",
    [
        {"arch": "cnn", "steps": 7},
        {"dataset": "toy", "mesh": "data:2"},
        {"dataset": "toy", "mesh": "depth:2", "optimizer": "adam", "lr": 1e-3},
    ],
    ids=str,
)
def test_counts_are_those_of_the_run(fields, monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.0)
    config = TrainConfig(depth=40, **{"steps": 3, **fields})
    told = forecast(config)
    run = train(config, progress=False)
    assert told.parameters == run.summary["parameters"]
    assert told.steps == run.summary["steps"]
    assert len(evaluation_steps(config, config.steps)) == len(run.history)
    assert 0 < told.step_seconds < told.total_seconds
    assert "at the peak" in str(told)


def test_arithmetic_is_two_operations_a_weight_position_and_example(monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.0)
    told = forecast(TrainConfig(depth=300, dataset="toy", steps=3, lr=1e-3))
    once = 2 * 200 * (2 * 4 + 298 * 16 + 4)
    # Up and twice down; the plain code goes up twice.
    assert told.step_operations == once * (3 if build.available() else 4)


def test_it_needs_no_memory_for_the_depth(monkeypatch):
    """The network itself is never made: a billion layers would take 80 GB."""
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.002)
    config = TrainConfig(depth=10**9, dataset="toy", steps=10, scale=1e12, lr=1e-3)
    told = forecast(config)
    # Parameters once, since a step changes them in place, and the states of sqrt(depth) layers.
    assert 80e9 < told.memory_bytes < 120e9
    # To choose the step takes a gradient beside them.
    assert 160e9 < forecast(dataclasses.replace(config, lr=None)).memory_bytes < 200e9
    assert max(told.calibrated_at) < 10**7
    assert all(array.size < 10**8 for array in jax.live_arrays())


def test_memory_is_that_of_the_run_checkpoints_included(tmp_path):
    settings = "--depth=5000", "--steps=6", "--time_step=0.1"  # 88 MB of parameters
    run = processes.outcome("train.py", *settings, f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    told = float(re.search(r"memory: about ([0-9.]+) GB", run.stdout)[1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told == pytest.approx(summary["peak_memory_bytes"] / 1e9, rel=0.15)


def test_a_dry_run_counts_what_checkpoints_take(monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.002)
    monkeypatch.setattr(forecasting, "resident_bytes", lambda: 0)
    told = forecast(TrainConfig(depth=200_000, dataset="toy", steps=10, lr=1e-3))
    params = 4 * told.parameters
    assert told.step_bytes + params < told.memory_bytes < told.step_bytes + 2 * params


def test_steps_follow_from_the_kernel_time_of_the_shallower_network(monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.0)
    config = TrainConfig(depth=30, dataset="toy", time=20.0)
    told, run = forecast(config), train(config, progress=False)
    assert told.steps == pytest.approx(run.summary["steps"], abs=2)


def test_depths_that_are_timed_split_into_stages_as_the_runs_own(monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.0)
    told = forecast(TrainConfig(depth=1002, dataset="toy", steps=10, mesh="depth:2", lr=1e-3))
    assert all(depth < 1002 and depth % 2 == 0 for depth in told.calibrated_at)
    assert told.calibrated_at[0] < told.calibrated_at[1]
    # Stages run in the plain code, which goes up twice.
    assert told.step_operations == 4 * 2 * 200 * (2 * 4 + 1000 * 16 + 4)


def test_a_mesh_of_more_devices_than_there_are_is_told_of():
    with pytest.raises(InputError, match="64 devices, 2 are there"):
        forecast(TrainConfig(depth=66, dataset="toy", mesh="data:64"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(forecasting.processes, "is_multiprocess", lambda: True)
    with pytest.raises(InputError, match="expected one process"):
        forecast(TrainConfig(depth=10, dataset="toy"))
