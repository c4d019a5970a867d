"""Section 5.1 small, end to end: ensembles, records, resuming, fits, the script."""

import dataclasses
import json

import jax
import numpy as np
import processes
import pytest

from dnntk import (
    DeepNarrowCNN,
    DeepNarrowMLP,
    InputError,
    empirical_ntk,
    figures,
    kernel,
    load_dataset,
)
from dnntk.experiments import ntk_convergence, rates
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.ntk_convergence import ConvergenceConfig, arc, converge, record_steps
from dnntk.training.ensemble import Ensemble

SMALL = ConvergenceConfig(
    depths=(6,),
    scale=(20.0,),
    trials=2,
    steps=5,
    sweep_depths=(4,),
    sweep_steps=1,
    psi_2_depth=4,
)
FLAGS = (
    "--depths=6",
    "--scale=20",
    "--trials=2",
    "--steps=5",
    "--sweep_depths=4",
    "--sweep_steps=1",
    "--psi_2_depth=4",
)
BAD_FLAGS = {
    "depths not numbers": (["--depths=ten"], "depths"),
    "no depth": (["--depths="], "depths"),
    "time_step": (["--time_step=nan"], "time_step"),
    "dtype": (["--dtype=float16"], "dtype"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "no run to resume": (["--workdir=.", "--resume"], "resume"),
    "resume another": ([*FLAGS, "--trials=3", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, result) of one run."""
    folder = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        return folder, converge(SMALL, folder, progress=False)


def test_records_are_the_networks_own(small):
    _, result = small
    run = result.runs["figure-depth6"]
    assert run["step"].tolist() == [0, 1, 2, 4, 5]
    assert not run["outputs"][0].any()
    assert (run["train_loss"][-1] < run["train_loss"][0]).all() and not jax.config.jax_enable_x64
    with jax.enable_x64(True):
        x = load_dataset("toy").x_train.astype(np.float64)
        model = DeepNarrowMLP(6, 1, 20.0)
        for trial in range(2):
            key = jax.random.fold_in(jax.random.key(0), trial)
            variables = jax.jit(model.init)(key, x)
            expected = empirical_ntk(model, variables, ntk_convergence.X0, x)[0, :, 0, 0]
            np.testing.assert_allclose(run["kernel"][0, trial], expected, rtol=1e-10)
        limit = kernel.limit_ntk(ntk_convergence.X0, x)[0]
    np.testing.assert_allclose(result.limit, limit, rtol=1e-12)
    assert np.isnan(run["psi_2"]).all() and run["gamma"].all()
    psi_2 = result.runs["growing-depth4"]["psi_2"]  # at both ends of runs up to psi_2_depth
    assert psi_2.shape == (2, 2) and (psi_2 > 0).all()


def test_a_cnn_s_kernel_is_followed_on_an_arc_of_images():
    angles, x0, x, y = arc("cnn")
    assert (x > 0).all() and x.shape == (len(angles), 4, 4, 1)  # positive, as the theorems ask
    assert np.abs(x[np.abs(angles - np.pi / 4).argmin()] - x0).max() < 0.05 * x0.max()
    np.testing.assert_allclose(y[:, 0], np.sin(angles) * np.cos(angles), rtol=1e-6)
    config = ConvergenceConfig(arch="cnn", depths=(7,), scale=(9.0,), rho=0.5, sweep_depths=())
    (setting,), folder = ntk_convergence.settings(config), ExperimentFolder("", {}, None)
    run = ntk_convergence._Run(setting, config, folder, [x0, x, y], progress=False)
    assert run.model == DeepNarrowCNN(7, 1, 9.0, rho=0.5) == run.ensemble.model
    assert run.x0.shape == (1, 4, 4, 1) and config.psi_2_depth_or_default < 100


def test_a_run_that_was_cut_off_resumes_to_the_same_bits(small, tmp_path, monkeypatch):
    _, whole = small
    monkeypatch.setattr(ntk_convergence, "SECONDS_A_CHECKPOINT", 0.0)
    config = dataclasses.replace(SMALL, sweep_depths=())
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    descent = Ensemble.descent

    def cut(self, time_step):
        descend, calls = descent(self, time_step), []

        def once_more(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return descend(*args)

        return once_more

    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "descent", cut)
        with pytest.raises(KeyboardInterrupt):
            converge(config, tmp_path, progress=False)
    assert not (tmp_path / "runs" / "figure-depth6.npz").exists()
    resumed = converge(config, tmp_path, resume=True, progress=False)
    for name, values in whole.runs["figure-depth6"].items():
        np.testing.assert_array_equal(resumed.runs["figure-depth6"][name], values)


def test_a_finished_run_is_read_and_not_run_again(small, monkeypatch):
    folder, whole = small
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(Ensemble, "descent", None)
    again = converge(SMALL, folder, resume=True, progress=False)
    np.testing.assert_array_equal(again.limit, whole.limit)
    for name, values in whole.runs["figure-depth6"].items():
        np.testing.assert_array_equal(again.runs["figure-depth6"][name], values)


def test_records_are_at_powers_of_two_and_the_end():
    assert record_steps(1) == [0, 1]
    assert record_steps(8) == [0, 1, 2, 4, 8]
    assert record_steps(2000)[-2:] == [1024, 2000]


def test_c_is_one_for_all_depths_or_one_a_depth_or_a_power_of_depth():
    config = ConvergenceConfig(depths=(10, 100), sweep_depths=(100,), sweep_power=1.5)
    assert [s.scale for s in ntk_convergence.settings(config)] == [0.05, 5.0, 1000.0, 5.0]
    assert dataclasses.replace(config, scale=(7,)).scales == [7.0, 7.0]
    assert dataclasses.replace(config, scale=(7, 8)).scales == [7.0, 8.0]


def test_rates_are_fitted_by_rule_and_only_where_no_value_is_missing():
    config = ConvergenceConfig(sweep_depths=(10, 100, 1000))
    values = {}
    for setting in ntk_convergence.settings(config):
        power = {"figure": 9.0, "growing": -0.5, "constant": 0.0}[setting.rule]
        values[setting.name] = dict.fromkeys(
            rates.QUANTITIES, setting.depth**power * np.array([1.0, 1.1])
        )
    values["constant-depth100"] = values["constant-depth100"] | {"growth": np.array([0.0, 1.0])}
    fits = ntk_convergence._fits(config, values)
    assert abs(fits["growing"]["movement"]["exponent"] + 0.5) < 1e-9
    assert abs(fits["constant"]["movement"]["exponent"]) < 1e-9
    assert fits["constant"]["growth"] is None and fits["growing"]["growth"] is not None


def test_configurations_are_checked():
    for change, name in (
        ({"depths": (1, 100)}, "depths"),
        ({"sweep_depths": (5, 5)}, "sweep_depths"),
        ({"trials": 0}, "trials must be"),
        ({"steps": 0}, "steps"),
        ({"scale": (-1.0,)}, "scale"),
        ({"scale": (5.0, 6.0, 7.0)}, "scale"),
        ({"arch": "rnn"}, "arch"),
        ({"sweep_power": 0.0}, "sweep_power"),
        ({"sweep_scale": 0.0}, "sweep_scale"),
        ({"rho": -1.0}, "rho"),
        ({"psi_2_depth": -1}, "psi_2_depth"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=name):
            ConvergenceConfig(**change)


@pytest.fixture(scope="module")
def scripted(small):
    """(folder, outcome) of the script, which goes on with the small run, and of the bad flags."""
    folder = small[0].parent
    (small[0] / "summary.json").unlink()
    flags = (*FLAGS, "--resume")
    return folder, *processes.good_and_bad("ntk_convergence.py", flags, BAD_FLAGS, folder)


def test_the_script_leaves_pictures_runs_and_rates(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    for stem in ("figure_4_1", "rates"):
        assert (out / f"{stem}.png").stat().st_size > 10_000
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["fits"]["growing"]["deviation"] is None  # one depth shows no rate
    assert 0 < summary["runs"]["growing-depth4"]["deviation"] < 1
    assert len(list((out / "runs").glob("*.npz"))) == 1 + 2
    assert "results: out" in outcome.stdout


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "ntk_convergence.py", BAD_FLAGS[name][1])
