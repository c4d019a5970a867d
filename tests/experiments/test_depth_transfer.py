"""Curves are those of the literal network at b / (depth C); rates, distances, a run of the script.

Depth independence itself is in the experiment's results; here two small depths must already agree.
"""

import json

import jax
import numpy as np
import optax
import processes
import pytest

import dnntk
from dnntk import figures
from dnntk.experiments import depth_transfer
from dnntk.experiments.depth_transfer import Curves, transfer_depth
from dnntk.experiments.depth_transfer_config import DepthTransferConfig, Kind
from dnntk.experiments.experiment_folder import ExperimentFolder

SMALL = DepthTransferConfig(
    arch="mlp", scales=(0.5,), optimizers=("adam",), baselines=("depth_mup",),
    depths=(6, 9), tune_depth=6, sweep_depth=6, trial_depth=6, deepest=9, trials=2,
    examples=8, held_out=3, steps=4, depth_rates=(0.01, 0.3),
)  # fmt: skip
FLAGS = (
    *("--arch=mlp", "--scales=0.5", "--optimizers=adam", "--baselines=depth_mup"),
    *(
        "--depths=6,9",
        "--tune_depth=6",
        "--sweep_depth=6",
        "--trial_depth=6",
        "--deepest=9",
        "--trials=2",
    ),
    *("--examples=8", "--held_out=3", "--steps=4", "--depth_rates=0.01,0.3"),
)
BAD_FLAGS = {
    "optimizer": (["--optimizers=yogi"], "optimizers"),
    "tune_depth": (["--tune_depth=31"], "tune_depth"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--seed=1", "--workdir=out", "--resume"], "resume"),
}
KIND = Kind("mlp", "deep_narrow", "adam", 0.5)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("depth_transfer")
    return folder / "out", *processes.good_and_bad("depth_transfer.py", FLAGS, BAD_FLAGS, folder)


@pytest.fixture(scope="module")
def found(scripted):
    """What the script left: a finished run is read and not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        patch.setattr(depth_transfer, "_trainer", None)
        return transfer_depth(SMALL, scripted[0], resume=True, progress=False)["mlp"]


def test_the_script_leaves_a_picture_and_a_rate_for_all_depths(scripted, found):
    out, outcome, _ = scripted
    (curves, _), transferred = found
    assert (out / "depth_transfer_mlp.png").stat().st_size > 10_000
    kept = json.loads((out / "summary.json").read_text())
    assert kept[KIND.name]["rate"] == curves.tuned == transferred.rate == 0.01
    assert kept["mlp-transferred"]["losses"] == transferred.losses[:, -1].tolist()
    assert f"{KIND.name}: rate 0.01: losses" in outcome.stdout


def test_the_best_rate_of_one_depth_takes_the_next_depth_the_same_way(found):
    (curves, _), transferred = found
    assert curves.losses[6].shape == (2, 5) and curves.losses[9].shape == (1, 5)
    np.testing.assert_array_equal(transferred.losses[1], curves.losses[9][0])
    # At a rate that did not fall with depth, an entry's step would be sqrt(9 / 6) of what it is.
    np.testing.assert_allclose(curves.losses[9][0], curves.losses[6][0], rtol=0.05)
    assert curves.sweep[6][1] > 2 * curves.sweep[6][0]


def relu_network(layers, x):
    states = [x]
    for weight, bias in layers[:-1]:
        states.append(np.maximum(states[-1] @ weight + bias, 0))
    return states, states[-1] @ layers[-1][0] + layers[-1][1]


def literal_adam(layers, x, y, train, rate, steps):
    """Outputs before each step and after the last, by Adam on the thesis's matrices, in NumPy."""
    flat = [a for layer in layers for a in layer]
    first, second, outputs = ([np.zeros_like(a) for a in flat] for _ in range(2)), None, []
    first, second = first
    for t in range(1, steps + 2):
        states, f = relu_network(layers, x)
        outputs.append(f)
        delta = np.where(np.arange(len(x))[:, None] < train, f - y, 0) / train
        gradients = []
        for (weight, _), state in zip(layers[::-1], states[::-1], strict=True):
            gradients = [state.T @ delta, delta.sum(0), *gradients]
            delta = (delta @ weight.T) * (state > 0)
        for i, g in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            size = np.sqrt(second[i] / (1 - 0.999**t)) + 1e-12
            flat[i] = flat[i] - rate * first[i] / (1 - 0.9**t) / size
        layers = list(zip(flat[::2], flat[1::2], strict=True))
    return np.array(outputs)


def test_curves_are_those_of_the_literal_network_at_b_over_depth_and_scale(found):
    case = depth_transfer._Case("mlp", SMALL, ExperimentFolder("depth_transfer", {}, None))
    model = SMALL.run(KIND, 6, 0.01).model(10)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 6), 1)
    literal = dnntk.to_standard(model, model.init(key, case.x[:1]))[1]["params"]
    middle = literal["middle"]
    layers = [literal["first"], *({n: middle[n][i] for n in middle} for i in range(4))]
    layers = [
        (np.float64(layer["kernel"]), np.float64(layer["bias"]))
        for layer in [*layers, literal["last"]]
    ]
    outputs = literal_adam(layers, np.float64(case.x), case.y, 8, 0.01 / (6 * 0.5), 4)
    losses = 0.5 * np.sum((outputs - case.y)[:, :8] ** 2, axis=2).mean(axis=1)
    (curves, _), _ = found
    np.testing.assert_allclose(curves.losses[6][1], losses, rtol=2e-3)
    np.testing.assert_allclose(curves.outputs[6][1], outputs[-1, 8:], atol=2e-3)


def test_a_network_with_skips_takes_steps_of_adam_at_b_over_root_depth(found):
    _, skips = found[0]
    assert skips.kind.init == "depth_mup" and list(skips.losses) == [6]
    case = depth_transfer._Case("mlp", SMALL, ExperimentFolder("depth_transfer", {}, None))
    model = SMALL.network(skips.kind, 6, 10)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 6), 0)
    params, rule = model.init(key, case.x[:1]), optax.adam(skips.tuned / np.sqrt(6))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        errors = model.apply(params, case.x[:8]) - case.y[:8]
        return 0.5 * (errors**2).sum(axis=1).mean()

    state, losses = rule.init(params), []
    for _ in range(5):
        value, gradient = loss(params)
        updates, state = rule.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    np.testing.assert_allclose(skips.losses[6][0], losses, rtol=1e-3)


def test_a_diverged_network_has_an_infinite_loss_and_no_best_rate():
    losses = {10: np.array([[1.0, np.inf]]), 30: np.array([[1.0, np.inf]])}
    sweep, outputs = {10: np.full(2, np.inf)}, {10: np.full((1, 3, 2), np.nan)}
    curves = Curves(KIND, 0.01, np.array([0.01, 0.02]), sweep, losses, outputs)
    assert np.isnan(curves.best(10)) and curves.spread(10) == np.inf
    summary = curves.summary(10)
    assert summary["best_rate"] == {10: None} and summary["best_loss"] == {10: np.inf}


def test_best_rates_distances_and_differences():
    logs = np.log([0.01, 0.02, 0.04])
    sweep = {6: (logs - np.log(0.017)) ** 2, 9: np.array([0.3, 0.2, np.inf])}
    rng = np.random.default_rng(0)
    deep = 1 + rng.normal(size=(4, 3, 2)) * 1e-9
    outputs = {d: 1 + rng.normal(size=(4, 3, 2)) / np.sqrt(d) for d in (10, 100, 1000)}
    outputs |= {10_000: deep, 30_000: deep[:1] + 1}
    losses = {10: np.array([[5.0, 5.0]]), 30: np.ones((2, 2)), 90: np.array([[1.0, 0.7]])}
    curves = Curves(KIND, 0.02, np.exp(logs), sweep, losses, outputs)
    np.testing.assert_allclose([curves.best(6), curves.best(9)], [0.017, 0.02])
    distances = curves.distances()
    assert list(distances) == [10, 100, 1000]
    expected = np.linalg.norm(outputs[100][2] - 1) / np.sqrt(6)
    np.testing.assert_allclose(distances[100][2], expected, rtol=1e-6)
    fit = curves.fit()
    assert fit["low"] < -0.5 < fit["high"]
    np.testing.assert_allclose(curves.spread(30), 0.3)


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "depth_transfer.py", BAD_FLAGS[name][1])
