"""Runs in closed form: what they leave on disk, how they go on, what they refuse."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from networks import outputs

import dnntk
from dnntk import InputError, TrainConfig, train
from dnntk.infinite_depth import feature_gram
from dnntk.training.forecast import forecast
from dnntk.training.solve import KernelSolver

SMALL = TrainConfig(depth=20, optimizer="kernel", time=20.0, scale=2.0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(workdir, result) of a run of several iterations, which keeps its kernel's tiles."""
    workdir = tmp_path_factory.mktemp("kernel") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_gram, "MAX_EIGH_ROWS", 0)
        yield workdir, train(SMALL, workdir, progress=False)


def test_a_run_leaves_what_other_runs_leave(whole_run):
    workdir, result = whole_run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) > 2
    assert [line["time"] for line in lines] == [0.0] + [20.0] * (len(lines) - 1)
    assert lines[-1]["residual"] <= 1e-4 < lines[1]["residual"]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["converged"] and summary["steps"] == len(lines) - 1
    assert summary["train_loss"] == lines[-1]["train_loss"] == result.history[-1]["train_loss"]
    names = {path.name for path in workdir.iterdir()}
    assert {"loss.png", "confusion.png", "curve.jsonl", "checkpoints"} <= names
    assert "kernel" not in names
    curve = [json.loads(line) for line in (workdir / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["train_loss"] == pytest.approx(lines[-1]["train_loss"], rel=1e-3)


def test_the_weights_are_those_of_solve(whole_run):
    result = whole_run[1]
    x, y = result.dataset.x_train, result.dataset.y_train
    variables = jax.jit(result.model.init)(jax.random.key(SMALL.seed), x[:1])
    solved, report = dnntk.solve(result.model, variables, x, y, time=20.0, progress=False)
    assert report.iterations == result.summary["steps"]
    jax.tree.map(np.testing.assert_array_equal, solved, result.variables)


def test_a_killed_run_goes_on_to_the_same_bits(whole_run, tmp_path, monkeypatch):
    calls, iterate = [], KernelSolver.iterate

    def killed(solver, begun):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(iterate(solver, begun))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KernelSolver, "iterate", killed)
        train(SMALL, tmp_path / "run", progress=False)
    assert (tmp_path / "run/kernel").exists()
    resumed = train(SMALL, tmp_path / "run", resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole_run[1].variables)
    without = lambda lines: [{**line, "seconds": 0} for line in lines]  # noqa: E731
    assert without(resumed.history) == without(whole_run[1].history)


def test_a_finished_run_is_not_solved_again(whole_run, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole_run[0], tmp_path / "copy")
    monkeypatch.delattr(KernelSolver, "prepare")
    again = train(SMALL, workdir, resume=True, progress=False)
    assert again.summary == json.loads((whole_run[0] / "summary.json").read_text())
    with pytest.raises(InputError, match="time=20"):
        train(dataclasses.replace(SMALL, time=30.0), workdir, resume=True, progress=False)


def test_a_refused_time_is_mended_in_the_same_folder(tmp_path):
    endless = dataclasses.replace(SMALL, depth=4, time=math.inf)
    with pytest.raises(InputError, match="^time: expected a finite one, or a ridge"):
        train(endless, tmp_path, progress=False)
    mended = dataclasses.replace(endless, ridge=1e-2)
    summary = train(mended, tmp_path, resume=True, progress=False).summary
    assert summary["time"] == "inf" and summary["seconds"] > summary["kernel_seconds"]
    assert TrainConfig.from_json(json.loads((tmp_path / "config.json").read_text())) == mended


def test_damaged_files_of_a_stopped_run_do_no_harm(whole_run, tmp_path, monkeypatch):
    calls, iterate = [], KernelSolver.iterate

    def killed(solver, begun):
        calls.append(iterate(solver, begun))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KernelSolver, "iterate", killed)
        train(SMALL, tmp_path, progress=False)
    (tmp_path / "kernel/gram.json").write_bytes(b"\0damaged")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{damaged", *lines[2:]]) + "\n")
    resumed = train(SMALL, tmp_path, resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole_run[1].variables)
    assert resumed.summary["steps"] == whole_run[1].summary["steps"]


def test_several_devices_give_the_same_network(whole_run):
    config = dataclasses.replace(SMALL, mesh="data:2")
    found, expected = train(config, progress=False), whole_run[1]
    x = expected.dataset.x_test
    both = [np.asarray(outputs(r.model, r.variables, x)) for r in (found, expected)]
    np.testing.assert_allclose(*both, atol=1e-3)


def test_the_default_time_is_infinite_with_a_ridge_only():
    config = TrainConfig(optimizer="kernel", ridge=1e-3, depth=20)
    assert config.time_or_default == math.inf
    assert TrainConfig(optimizer="kernel").time_or_default == 1e4
    endless = dataclasses.replace(config, time=math.inf)
    assert TrainConfig.from_json(json.loads(json.dumps(endless.to_json()))) == endless


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.1}, "^lr: no effect on optimizer=kernel"),
        ({"momentum": 0.5}, "^momentum: no effect"),
        ({"steps": 5}, "^steps: no effect"),
        ({"shift": 1}, "^shift: no effect"),
        ({"init": "he_uniform"}, "^init: optimizer=kernel needs deep_narrow"),
        ({"parametrization": "standard"}, "^parametrization: optimizer=kernel needs ntk"),
        ({"ridge": -1.0}, "^ridge: expected a finite number"),
        ({"time": 0.0}, "^time: expected a number above 0"),
        ({"optimizer": "sgd", "ridge": 0.1}, "^ridge: no effect on optimizer=sgd"),
        ({"optimizer": "sgd", "time": math.inf}, "^time: expected a finite number"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**{"optimizer": "kernel", **changes})


def test_a_forecast_counts_the_kernel():
    found = forecast(dataclasses.replace(SMALL, scale=None))
    assert found.steps == 2 and 0 < found.step_seconds < found.total_seconds
