"""Large steps are those of the literal network; the peak, the return and the power of C."""

import json

import jax
import numpy as np
import processes
import pytest

from dnntk import figures, to_standard
from dnntk.experiments import catapult as module
from dnntk.experiments.catapult import Runs, catapult, powers_of_scale
from dnntk.experiments.catapult_config import CatapultConfig
from dnntk.training.run import load_dataset_for

NAMES = ("first", "middle", "last")
SMALL = CatapultConfig(
    depths=(4,), scales=(2.0,), ratios=(1.5, 4.0), trials=2, examples=6, steps=8, pool=4
)
FLAGS = (
    *("--depths=4", "--scales=2", "--ratios=1.5,4", "--trials=2", "--examples=6"),
    *("--steps=8", "--pool=4"),
)
BAD_FLAGS = {
    "ratios": (["--ratios=4,2"], "ratios"),
    "no classes": (["--dataset=toy"], "dataset"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--seed=1", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("catapult")
    return folder / "out", *processes.good_and_bad("catapult.py", FLAGS, BAD_FLAGS, folder)


@pytest.fixture(scope="module")
def found(scripted):
    """The runs that the script left: a finished run is read and not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        patch.setattr(module, "Ensemble", None)
        return catapult(SMALL, scripted[0], resume=True, progress=False)[4, 2.0]


def literal(trial, x):
    """Weights and biases of the thesis's matrices."""
    model = SMALL.network(4, 2.0).model(1)
    variables = model.init(jax.random.fold_in(jax.random.key(SMALL.seed), trial), x[:1])
    params = jax.tree.map(np.float64, to_standard(model, variables)[1]["params"])
    first, middle, last = ((params[n]["kernel"], params[n]["bias"]) for n in NAMES)
    return [first, *zip(*middle, strict=True), last]


def gradients(layers, x, seed):
    """Outputs, and for the outputs' derivatives ``seed(outputs)`` those by all weights."""
    inputs = [x]
    for weights, bias in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ weights + bias, 0))
    outputs = inputs[-1] @ layers[-1][0] + layers[-1][1]
    back, found = seed(outputs), []
    for (weights, _), h in zip(layers[::-1], inputs[::-1], strict=True):
        found.append((h.T @ back, back.sum(0)))
        back = (back @ weights.T) * (h > 0)
    return outputs, found[::-1]


def largest(layers, x):
    """lambda_max(K / N) of the scaled NTK, by the Jacobian."""
    rows = [gradients(layers, x, lambda _, e=e: e[:, None])[1] for e in np.eye(len(x))]
    jacobian = [np.concatenate([a.ravel() for layer in row for a in layer]) for row in rows]
    return np.linalg.norm(jacobian, 2) ** 2 / (len(layers) * 2.0**2 * len(x))


def test_large_steps_are_those_of_the_literal_network_in_float64(found):
    data = load_dataset_for(SMALL.network(4, 2.0))
    every = -(-len(data.x_train) // SMALL.examples)
    x, y = data.x_train[::every].reshape(-1, 4), data.y_train[::every]
    for trial in range(SMALL.trials):
        start = literal(trial, x)
        np.testing.assert_allclose(found.before[trial], largest(start, x), rtol=1e-5)
        for i, ratio in enumerate(SMALL.ratios):
            layers, losses = start, []
            rate = ratio / largest(start, x) / (4 * 2.0**2)
            for _ in range(SMALL.steps):
                f, gradient = gradients(layers, x, lambda f: (f - y) / len(x))
                losses.append(0.5 * np.mean((f - y) ** 2))
                layers = [
                    (w - rate * dw, b - rate * db)
                    for (w, b), (dw, db) in zip(layers, gradient, strict=True)
                ]
            np.testing.assert_allclose(found.losses[i, trial], losses, rtol=1e-3)
            np.testing.assert_allclose(found.after[i, trial], largest(layers, x), rtol=1e-3)
    np.testing.assert_allclose(found.kink, np.mean((2 + y) ** 2) / np.mean(y**2), rtol=1e-6)


def test_the_loss_rises_above_2_and_not_below(found):
    assert (found.peak[0] == 1).all() and (found.peak[1] > 2).all()


def test_the_script_leaves_a_picture_and_medians(scripted, found):
    out, outcome, _ = scripted
    assert (out / "catapult.png").stat().st_size > 10_000
    row = json.loads((out / "summary.json").read_text())["rows"][1]
    assert row["ratio"] == 4 and row["peak"] == np.median(found.peak[1])
    assert row["test_accuracy"] == np.median(found.accuracy[1])
    assert "depth 4, C 2, ratio 4, peak" in outcome.stdout


def test_peaks_returns_and_powers():
    losses = np.array([[1, 9, 0.5, 2, 0.1], [1, 0.5, 0.4, 0.3, 2], [1, 4, np.inf, np.nan, np.nan]])
    blank = np.array([[0.5, 0.5, np.nan]])
    runs = Runs(losses[None], blank[0], blank, blank, np.array(3.0))
    np.testing.assert_array_equal(runs.peak, [[9, 2, np.inf]])
    np.testing.assert_array_equal(runs.back, [[4, np.inf, np.inf]])
    assert (
        runs.rows((4.0,))[0]["came_back"] == 1 / 3 and runs.rows((4.0,))[0]["lambda_ratio"] is None
    )
    config = CatapultConfig(depths=(4,), scales=(1.0, 2.0, 4.0), ratios=(1.0, 4.0), trials=2)
    peaks = {c: np.array([[1, 1], [2 * c**2, 3 * c**2]]) for c in config.scales}
    two_steps = lambda peak: np.stack([np.ones_like(peak), peak], 2)  # noqa: E731
    found = {(4, c): Runs(two_steps(p), blank[0], blank, blank, p) for c, p in peaks.items()}
    below, above = powers_of_scale(config, found, 4)
    np.testing.assert_allclose([below["exponent"], below["low"]], 0, atol=1e-9)
    assert np.isclose(above["exponent"], 2) and above["low"] < 2 < above["high"]


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "catapult.py", BAD_FLAGS[name][1])
