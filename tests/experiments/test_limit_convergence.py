"""Trained networks against their limit, small, end to end: groups, resuming, fits, the script."""

import dataclasses
import json

import jax
import numpy as np
import processes
import pytest

from dnntk import KernelFlow, figures, kernel, load_dataset
from dnntk.experiments.compared_networks import ComparedNetworks
from dnntk.experiments.limit_convergence import LimitConfig, converge_to_limit
from dnntk.training.ensemble import Ensemble

SMALL = LimitConfig(
    arch="mlp",
    dataset="toy",
    train_examples=6,
    test_examples=4,
    depths=(4, 12, 40),
    trials=3,
    times=(1.0, 2.51),
    time_step=0.02,
    draws=5,
    dtype="float64",
)
FLAGS = (
    "--arch=cnn",  # the rest of this file trains MLPs
    "--train_examples=5",
    "--test_examples=4",
    "--depths=6",
    "--trials=2",
    "--times=0.5,1",
    "--draws=3",
)
BAD_FLAGS = {
    "depths not numbers": (["--depths=ten"], "depths"),
    "times not numbers": (["--times=soon"], "times"),
    "unstable": ([*FLAGS, "--time_step=5", "--workdir=new"], "time_step"),
    "arch": (["--arch=rnn"], "arch"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--trials=3", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, comparison) of one run."""
    folder = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        return folder, converge_to_limit(SMALL, folder, progress=False)["mlp"]


def test_the_difference_is_from_the_limit_at_equal_times(small):
    _, found = small
    data = load_dataset("toy")
    flow = KernelFlow(kernel.limit_ntk, data.x_train[:6], data.y_train[:6], progress=False)
    np.testing.assert_allclose(found.times, [1.0, 2.5], rtol=1e-12)  # whole numbers of steps
    limit = flow.predict(data.x_test[:4], found.times.tolist())
    np.testing.assert_allclose(found.limit, limit, rtol=1e-9)
    assert found.outputs.shape == (3, 3, 2, 4, 1)
    difference = np.linalg.norm(found.outputs[1, 2, 0] - limit[0]) / np.linalg.norm(limit[0])
    np.testing.assert_allclose(found.differences[1, 2, 0], difference, rtol=1e-9)
    assert found.time_step == 0.02 and not jax.config.jax_enable_x64
    assert (found.discretization < 0.5 * found.first_order[-1]).all()


def test_differences_fall_with_depth_as_the_theory_says(small):
    _, found = small
    measured = np.sqrt(np.mean(found.differences**2, axis=1))
    # At the largest depth: 3 trials, chi-square with 3 degrees of freedom beside 5 draws' own.
    ratio = measured[-1] / found.first_order[-1]
    assert 0.2 < ratio.min() and ratio.max() < 2.5
    assert (0.3 < found.linear[-1] / found.first_order[-1]).all()
    expected = np.sqrt(12 / 40)  # the two deepest; less the first layers' share
    np.testing.assert_allclose(found.first_order[2] / found.first_order[1], expected, rtol=0.1)
    assert all(fit["low"] < -0.5 < fit["high"] and fit["exponent"] < 0 for fit in found.fits)


def test_scores_are_those_of_the_outputs_and_of_linear_networks_without_noise(small):
    _, found = small
    assert found.train_loss.trained.shape == (3, 3, 2) and found.examples == 6
    data = load_dataset("toy")
    flow = KernelFlow(kernel.limit_ntk, data.x_train[:6], data.y_train[:6], progress=False)
    np.testing.assert_allclose(found.train_loss.limit, flow.loss(found.times.tolist()), rtol=1e-6)
    # Networks of depth 40 are near their limit; linear ones are as near.
    for values in (found.train_loss.trained[-1].mean(0), found.train_loss.linear[-1]):
        np.testing.assert_allclose(values, found.train_loss.limit, rtol=0.5)
    assert np.isnan(found.test_accuracy.limit).all()  # no classes


def test_a_run_that_was_cut_off_keeps_its_finished_networks(small, tmp_path, monkeypatch):
    _, whole = small
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    config = dataclasses.replace(SMALL, depths=(4,))
    descent, calls = Ensemble.descent, []

    def cut(self, time_step):
        calls.append(self.trials)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return descent(self, time_step)

    # A group of two networks and one of one: a trial does not depend on the group it is in.
    monkeypatch.setattr(ComparedNetworks, "at_once", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "descent", cut)
        with pytest.raises(KeyboardInterrupt):
            converge_to_limit(config, tmp_path, progress=False)
    kept = list((tmp_path / "runs").iterdir())
    assert [file.name for file in kept] == ["mlp-depth4-trials0-1.npz"] and calls == [2, 1]
    written = kept[0].stat().st_mtime_ns
    resumed = converge_to_limit(config, tmp_path, resume=True, progress=False)["mlp"]
    np.testing.assert_allclose(resumed.outputs, whole.outputs[:1], rtol=1e-9)
    assert kept[0].stat().st_mtime_ns == written
    assert resumed.fits == [None, None]  # one depth shows no rate


def test_networks_in_closed_form_are_those_of_descent_and_reach_any_time(small):
    _, found = small
    config = dataclasses.replace(
        SMALL, optimizer="kernel", depths=(40,), trials=1, times=(1.0, 2.5, 1e4), time_step=None
    )
    solved = converge_to_limit(config, progress=False)["mlp"]
    assert solved.times.tolist() == [1.0, 2.5, 1e4] and not solved.discretization.any()
    error = np.abs(solved.outputs[0, 0, :2] - found.outputs[2, 0])
    # Descent's own error is that of its steps.
    assert error.max() < 3 * (found.discretization * np.abs(found.limit).max((1, 2))).max()
    assert solved.differences[0, 0, 2] < 5 * solved.linear[0, 2]


def test_a_finished_run_is_read_and_not_run_again(small, monkeypatch):
    folder, whole = small
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(Ensemble, "descent", None)
    again = converge_to_limit(SMALL, folder, resume=True, progress=False)["mlp"]
    np.testing.assert_array_equal(again.outputs, whole.outputs)
    assert again.fits == whole.fits


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("script")
    return folder, *processes.good_and_bad("limit_convergence.py", FLAGS, BAD_FLAGS, folder)


def test_the_script_leaves_a_picture_runs_and_powers(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    assert (out / "limit_convergence.png").stat().st_size > 10_000
    assert (out / "limit_convergence.pdf").read_bytes().startswith(b"%PDF")
    summary = json.loads((out / "summary.json").read_text())
    kept = summary["cnn"]["comparisons"]
    assert [round(line["time"], 9) for line in kept][0] == 0.5
    assert 0 < kept[0]["measured"]["6"] and 0 < kept[0]["linear"]["6"]
    assert "cnn depth 6: relative difference" in outcome.stdout
    assert len(list((out / "runs").glob("*.npz"))) == 1


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "limit_convergence.py", BAD_FLAGS[name][1])
