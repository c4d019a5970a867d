"""Depth against width, small: the wide network and its limit, alignment, rows, verdicts, script."""

import dataclasses
import json
import math

import jax
import numpy as np
import processes
import pytest

import dnntk
from dnntk import Diverged, InputError, KernelFlow, figures
from dnntk.experiments.depth_or_width import experiment as depth_or_width
from dnntk.experiments.depth_or_width import findings as depth_or_width_findings
from dnntk.experiments.depth_or_width import runs as depth_or_width_runs
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig, NetworkSetting
from dnntk.experiments.depth_or_width.experiment import compare
from dnntk.experiments.depth_or_width.runs import ImageData, deep_parameters, run
from dnntk.experiments.kernel_change import alignment, movement
from dnntk.experiments.shallow import ShallowMLP, descend, shallow_limit_ntk, shallow_ntk, width_for
from dnntk.figures.depth_or_width import regime_figure

SMALL = DepthOrWidthConfig(
    train_examples=30,
    test_examples=20,
    probe_examples=8,
    depths=(4,),
    trials=1,
    times=(0.5, 1.0),
    regime_depth=4,
    regime_time=1.0,
    regime_scales=0,
    dtype="float64",
)
FLAGS = (
    "--train_examples=30",
    "--test_examples=20",
    "--probe_examples=8",
    "--depths=4",
    "--trials=1",
    "--times=0.5,1",
    "--regime_depth=4",
    "--regime_time=1",
    "--regime_scales=0",
    "--dtype=float64",
)
BAD_FLAGS = {
    "depths not numbers": (["--depths=ten"], "depths"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--trials=3", "--workdir=out", "--resume"], "resume"),
}


def inputs(n, d_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d_in))


def moved(variables, seed=1):
    """Parameters anywhere, as in the middle of a training."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape), variables["params"])
    return {**variables, "params": params}


def test_the_wide_networks_kernel_is_that_of_its_jacobian(x64):
    model = ShallowMLP(7, 3, rho=0.8, beta=0.6)
    x1, x2 = inputs(4, 5), inputs(3, 5, seed=2)
    variables = model.init(jax.random.key(0), x1)
    assert not np.any(model.apply(variables, x1))
    variables = moved(variables)
    expected = dnntk.empirical_ntk_fn(model)(variables, x1, x2)
    np.testing.assert_allclose(shallow_ntk(model, variables, x1, x2), expected, atol=1e-12)


@pytest.mark.parametrize(("rho", "beta"), [(1.7, 0.4), (0.9, 0.0)])
def test_the_wide_networks_kernel_goes_to_its_limit(rho, beta, x64):
    x1, x2, width = np.abs(inputs(4, 3)), np.abs(inputs(5, 3, seed=2)), 40_000
    model = ShallowMLP(width, 2, rho=rho, beta=beta)
    ntk = np.asarray(shallow_ntk(model, model.init(jax.random.key(3), x1), x1, x2))
    limit = np.asarray(shallow_limit_ntk(x1, x2, rho=rho, beta=beta))
    # Averages over the units; a unit's share has a deviation of at most sqrt(3) (S S')^(1/2) by
    # either layer, as E[g^2 g'^2] is at most 3 S S'. Four deviations.
    sizes = [np.sqrt(rho**2 * np.sum(x**2, axis=1) / 3 + beta**2) for x in (x1, x2)]
    error = 4 * 2 * math.sqrt(3 / width) * sizes[0][:, None] * sizes[1][None, :]
    assert (np.abs(ntk[..., 0, 0] - limit) < error).all()
    assert (np.abs(ntk[..., 0, 1]) < error).all()
    assert np.abs(limit).max() > 5 * error.max()
    gram = np.asarray(shallow_limit_ntk(x1, rho=rho, beta=beta))
    np.testing.assert_allclose(gram, gram.T, atol=1e-12)
    assert np.linalg.eigvalsh(gram).min() > -1e-9


def test_a_step_is_kernel_time_and_wide_networks_follow_their_limit(x64):
    x, y, width, times = inputs(6, 3), inputs(6, 2, seed=4), 20_000, (1.0, 3.0)
    model = ShallowMLP(width, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    kernel = np.einsum("nmkk->nm", np.asarray(shallow_ntk(model, variables, x, x))) / 2
    (first,) = descend(model, variables, x, y, 1e-3, [1], "", progress=False)
    outputs = model.apply({**variables, "params": first.params}, x)
    np.testing.assert_allclose(outputs, 1e-3 * kernel @ y / 6, atol=1e-4)
    assert first.loss == pytest.approx(0.5 * np.mean(np.sum(y**2, 1)))
    limit = KernelFlow(shallow_limit_ntk, x, y, progress=False).train_predictions(times)
    stops = descend(model, variables, x, y, 0.02, [50, 150], "", progress=False)
    for stop, expected in zip(stops, limit, strict=True):
        outputs = model.apply({**variables, "params": stop.params}, x)
        # Random features are off by about 1 / sqrt(width) of the kernel, steps by half of one.
        assert np.linalg.norm(outputs - expected) < 0.03 * np.linalg.norm(expected)


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
    with pytest.raises(InputError, match="parameters"):
        width_for(10, 64, 10)


def test_alignment_and_movement_of_kernels():
    y, features = np.eye(3)[[0, 1, 2, 0, 1, 0]], inputs(6, 4)
    kernel = features @ features.T
    assert alignment(5 * y @ y.T + 3, y) == pytest.approx(1)
    value = alignment(kernel, y)
    assert 0 < value < 1
    assert alignment(7 * kernel + 2, y) == pytest.approx(value)
    order = np.random.default_rng(0).permutation(6)
    assert alignment(kernel[order][:, order], y[order]) == pytest.approx(value)
    full = kernel[:, :, None, None] * np.eye(3)
    assert alignment(full, y) == pytest.approx(value)
    assert math.isnan(alignment(np.ones((6, 6)), y))
    assert movement(kernel, kernel) == 0 and movement(kernel, -kernel) == pytest.approx(2)


def test_a_run_that_diverges_is_retried_with_half_the_step(monkeypatch):
    steps = []

    class Unstable(depth_or_width_runs._Network):
        def at_start(self):
            return {"lambda_max": 40.0}

        def train(self, time_step, progress):
            steps.append(time_step)
            if len(steps) != 3:
                raise Diverged("no", [])
            return ["a record"]

    monkeypatch.setattr(depth_or_width_runs, "_Deep", Unstable)
    setting, most = (
        NetworkSetting("regime", "digits", "regime", 4, 3.0),
        SMALL.moving_fraction * 2 / 40,
    )
    row = run(setting, None, SMALL, 2.0, progress=False)
    assert row["halvings"] == 2 and row["time_step"] == steps[2] and row["records"] == ["a record"]
    assert not row["diverged"]
    np.testing.assert_allclose(steps, [most, most / 2, most / 4], rtol=1e-9)
    steps.extend([0] * 9)
    row = run(setting, None, SMALL, 2.0, progress=False)
    assert row["diverged"] and row["records"] == []
    assert len(steps) == 12 + depth_or_width_runs.MOST_HALVINGS + 1


def test_a_network_of_infinite_scale_keeps_its_kernel():
    images, times = ImageData(SMALL, "digits"), (SMALL.regime_time,)
    row = run(
        NetworkSetting("regime", "digits", "regime", 4, math.inf),
        images,
        SMALL,
        2.0,
        progress=False,
    )
    assert tuple(record["time"] for record in row["records"]) == times
    assert row["records"][-1]["movement"] < 1e-12
    assert row["records"][-1]["alignment"] == pytest.approx(row["alignment"])


def regime_rows():
    """Three C, two trials each; the third C's diverged."""
    for scale, accuracy in ((1.0, 0.9), (math.inf, 0.8), (0.5, None)):
        for trial in range(2):
            record = {"clock": "equal", "time": 2.0, "test_accuracy": accuracy, "test_loss": 0.1}
            record |= {"train_accuracy": 1.0, "train_loss": 0.1, "seconds": 1.0}
            record |= {"movement": 0.2 * trial, "alignment": 0.5}
            setting = NetworkSetting("regime", "digits", "regime", 9, scale, trial)
            row = {"width": 5, "parameters": 7, "alignment": 0.4, "halvings": trial}
            yield setting.fields() | row | {"records": [record] if accuracy else []}


def test_points_are_means_over_trials_and_what_diverged_is_left_out(tmp_path):
    means = depth_or_width_findings.points(regime_rows())
    assert [(p["scale"], p["trials"], p["halvings"]) for p in means] == [
        (1.0, 2, 1),
        (math.inf, 2, 1),
    ]
    assert means[0]["movement"] == pytest.approx(0.1) == means[0]["movement_error"]
    assert means[0]["test_accuracy_error"] == 0 and means[0]["start"] == 0.4
    said = depth_or_width_findings.statements(means, {}, {})
    assert any("from C = inf to 1 test accuracy changes by +10.0 points" in line for line in said)
    side = {"clock": "equal", "time": 2.0, "test_accuracy": 0.7}
    limit = {"records": [side, side | {"clock": "matched"}], "alignment": 0.3}
    deep = limit | {"records": [side]}
    picture = regime_figure(means, {"deep": deep, "wide": limit}, 2.0, "title")
    labels = [tick.get_text() for tick in picture.axes[-1].get_xticklabels()]
    assert labels[-1] == r"$\infty$" and len(picture.axes) == 3
    figures.draw(tmp_path / "regime", lambda: picture)
    assert (tmp_path / "regime.pdf").exists()


def test_a_side_is_ahead_beyond_twice_the_error_only():
    def point(accuracy, error):
        return {"test_accuracy": accuracy, "test_accuracy_error": error}

    difference = depth_or_width_findings.difference
    gap, error = difference(point(0.9, 0.01), point(0.8, None), 100)
    assert gap == pytest.approx(0.1)
    assert error == pytest.approx(math.sqrt(0.01**2 + 0.09 / 100 + 0.16 / 100))
    verdict = depth_or_width_findings._verdict
    assert verdict([(0.1, 0.06), (-0.1, 0.06)], ("a", "b")).startswith("no difference")
    assert verdict([(0.1, 0.04), (-0.1, 0.06)], ("a", "b")).startswith("a ahead at 1 of 2")
    assert "b ahead at 2 of 2" in verdict([(-0.1, 0.01)] * 2, ("a", "b"))


def test_configurations_are_checked():
    for change, name in (
        ({"datasets": ()}, "datasets"),
        ({"depths": (1,)}, "depth"),
        ({"fraction": 1.5}, "fraction"),
        ({"least_scale": 1e9}, "least_scale"),
        ({"times": (2.0, 1.0)}, "times"),
        ({"times": (2.0, 3.0)}, "times"),
        ({"datasets": ("toy",)}, "datasets"),
        ({"regime_scales": 1}, "regime_scales"),
        ({"regime_time": math.inf}, "regime_time"),
        ({"trials": 0}, "trials"),
        ({"probe_examples": 2}, "probe_examples"),
        ({"train_examples": 0}, "train_examples"),
        ({"small_scale": 0.0}, "small_scale"),
        ({"moving_fraction": 0.0}, "moving_fraction"),
        ({"dtype": "float16"}, "dtype"),
        ({"rho": -1.0}, "rho"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=name):
            DepthOrWidthConfig(**change)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("script")
    return folder, *processes.good_and_bad("depth_or_width.py", FLAGS, BAD_FLAGS, folder)


def test_the_script_leaves_rows_sentences_and_pictures(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    assert (out / "depth-or-width.png").stat().st_size > 10_000
    assert (out / "depth-or-width.pdf").read_bytes().startswith(b"%PDF")
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [setting.name for setting in SMALL.network_settings()]
    theorem, small, wide = rows
    assert abs(wide["parameters"] / theorem["parameters"] - 1) < 0.01
    assert [(r["clock"], r["time"]) for r in wide["records"]] == [
        *(("equal", 0.5), ("equal", 1.0), ("matched", 0.5), ("matched", 1.0))
    ]
    for row in rows:
        bound = 2 / row["lambda_max"]
        assert 0 < row["time_step"] <= SMALL.fraction * bound * (1 + 1e-9)
        losses = [r["train_loss"] for r in row["records"]]
        assert 0.5 > losses[0] > losses[-1] > 0
    moved = [row["records"][-1]["movement"] for row in rows]
    assert 0 < 3 * moved[0] < moved[1]  # C = 4^2.2 and 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["statements"] and all(line in outcome.stdout for line in summary["statements"])
    assert summary["rows"] == rows


def test_networks_that_are_done_are_kept_and_the_others_made(scripted, tmp_path, monkeypatch):
    source = scripted[0] / "out"
    lines = (source / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])  # cut off
    calls, real = [], depth_or_width.run

    def counted(setting, *args):
        calls.append(setting.name)
        return real(setting, *args)

    limits = json.loads((source / "summary.json").read_text())["limits"]
    monkeypatch.setattr(depth_or_width, "run", counted)
    monkeypatch.setattr(depth_or_width, "_limits", lambda *_: limits["digits"])
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    found = compare(SMALL, tmp_path, resume=True, progress=False)
    assert calls == [SMALL.network_settings()[-1].name]
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    whole = json.loads(lines[-1])
    assert len(again) == 3 and again[0] == json.loads(lines[0])
    losses = [[r["test_loss"] for r in row["records"]] for row in (again[-1], whole)]
    np.testing.assert_allclose(*losses, rtol=1e-9)
    assert found.limits == limits
    limits = limits["digits"]
    diagonals = [limits[side]["mean_diagonal"] for side in ("deep", "wide")]
    assert limits["ratio"] == pytest.approx(diagonals[0] / diagonals[1])
    # Some 250 units: 10% of the kernel, and the steps.
    wide = [r["train_loss"] for r in limits["wide"]["records"]]
    np.testing.assert_allclose([r["train_loss"] for r in whole["records"]], wide, rtol=0.3)
    with pytest.raises(InputError, match="resume"):
        compare(dataclasses.replace(SMALL, seed=1), tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    outcome = scripted[2][name]
    assert outcome.returncode == 2, outcome.stderr
    line = outcome.stderr.strip()
    assert "\n" not in line and BAD_FLAGS[name][1] in line
    assert line.startswith("depth_or_width.py")
