"""The plane of depth and scale: a cell against NumPy's own descent, laws that are found again."""

import dataclasses
import json

import jax
import numpy as np
import processes
import pytest

from dnntk import figures
from dnntk.experiments import regimes
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.regimes import PREDICTED, QUANTITIES, Plane, measure_regimes, quantities
from dnntk.experiments.regimes_config import RegimesConfig

# One cell, of depth 4 and C = 4 ** 0.5.
SMALL = RegimesConfig(
    arch="mlp", depths=(4,), scales=(9.0,), power=0.5, trials=2, examples=3, time=2.0,
    records=2, pool=4, fit_from=1.0,
)  # fmt: skip
FLAGS = (
    *("--arch=mlp", "--depths=4", "--scales=9", "--power=0.5", "--trials=2", "--examples=3"),
    *("--time=2", "--records=2", "--pool=4", "--fit_from=1"),
)
BAD_FLAGS = {
    "depths": (["--depths=2"], "depths"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--seed=1", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("regimes")
    return folder / "out", *processes.good_and_bad("regimes.py", FLAGS, BAD_FLAGS, folder)


@pytest.fixture(scope="module")
def networks():
    """The small configuration's networks, without a folder."""
    dataset = regimes.load_dataset_for(SMALL.data)
    with jax.enable_x64(True):
        arrays = regimes.as_trained(dataset, True, "float64")
        return regimes._Networks("mlp", SMALL, ExperimentFolder("regimes", {}, None), arrays)


def passes(layers, x):
    """Pre-activations of every layer, and the Jacobian of the output by all parameters, [n, p]."""
    f, h = [], [x]
    for weight, bias in layers:
        f.append(h[-1] @ weight.T + bias)
        h.append(np.maximum(f[-1], 0))
    jacobian, g = [], np.ones((len(x), 1))
    for i in reversed(range(len(layers))):
        jacobian = [np.einsum("no,ni->noi", g, h[i]).reshape(len(x), -1), g, *jacobian]
        g = (g @ layers[i][0]) * (f[i - 1] > 0) if i else g
    return f, np.concatenate(jacobian, axis=1)


def section_3(units, depth, scale, d_in):
    """The thesis's matrices and biases, with the units' rows u and biases v / C."""
    eye, width = np.eye(d_in), d_in + 2
    layers = []
    for u, v in units:
        weight, bias = np.zeros((width, width)), np.zeros(width)
        weight[:d_in, :d_in], weight[-1, -1] = eye, 1.0
        weight[d_in, :d_in], bias[d_in] = u, scale * v
        layers.append((weight, bias))
    first = layers[0][0][:, :d_in].copy()
    first[:d_in] *= scale
    layers[0][1][-1] = scale
    last = np.zeros((1, width))
    last[0, -1] = 1.0
    assert len(layers) == depth - 1
    return [(first, layers[0][1]), *layers[1:], (last, np.array([-scale]))]


def descended(layers, x, y, rate, steps):
    """The layers after full-batch descent on 1/2 mean (f - y)^2."""
    for _ in range(steps):
        f, jacobian = passes(layers, x)
        gradient, begin, moved = jacobian.T @ (f[-1] - y)[:, 0] / len(x), 0, []
        for weight, bias in layers:
            ends = np.cumsum([begin, weight.size, bias.size])
            parts = (gradient[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
            own = zip((weight, bias), parts, strict=True)
            moved.append([a - rate * part.reshape(a.shape) for a, part in own])
            begin = ends[-1]
        layers = moved
    return layers


def test_a_cell_is_what_numpy_s_own_forward_and_backward_passes_measure(scripted, networks):
    depth, scale = SMALL.cells[0]
    (file,) = (scripted[0] / "runs").iterdir()
    with np.load(file) as saved:
        run = dict(saved)
    with jax.enable_x64(True):
        initial = networks._start(depth)[1]["initial"]
    x, y, every = networks.x, networks.y, np.concatenate([networks.x, networks.held_out])
    d_in, steps = x.shape[1], networks.steps_a_record
    rate = SMALL.time / SMALL.records / steps / (depth * scale**2)
    kinds, counts = np.split(np.arange(d_in + 2), [d_in, d_in + 1]), []
    for trial in range(SMALL.trials):
        first, middle = ({k: a[trial] for k, a in initial[name].items()} for name in initial)
        units = [(first["kernel"], first["bias"])]
        units += zip(middle["kernel"], middle["bias"], strict=True)
        layers = section_3(units, depth, scale, d_in)
        start = np.array(passes(layers, x)[0][:-1])
        for record in range(SMALL.records + 1):
            layers = descended(layers, x, y, rate, steps if record else 0)
            now, jacobian = np.array(passes(layers, x)[0][:-1]), passes(layers, every)[1]
            kernel = jacobian @ jacobian.T / (depth * scale**2)
            np.testing.assert_allclose(run["kernel"][record, trial], kernel, rtol=1e-9)
            moved = [np.abs(now - start)[..., kind].max() for kind in kinds]
            np.testing.assert_allclose(run["movement"][record, trial], moved, rtol=1e-6, atol=1e-12)
            least = [np.abs(now)[..., kind].min() for kind in kinds]
            np.testing.assert_allclose(run["distance"][record, trial], least, rtol=1e-9)
        counts.append(np.sum((now > 0) != (start > 0)))
    assert run["hidden"] == now.size
    np.testing.assert_allclose(run["sign_changes"][-1] * run["hidden"], counts, atol=1e-9)


def test_the_script_leaves_a_picture_and_means_and_reads_what_is_finished(scripted, monkeypatch):
    out, outcome, _ = scripted
    assert (out / "regimes.png").stat().st_size > 10_000
    assert "mlp  kernel_train" in outcome.stdout and "no fit" in outcome.stdout  # one depth, one C
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(regimes, "Ensemble", None)
    config = dataclasses.replace(SMALL, fit_from=2.0)  # may change: nothing is measured anew
    plane = measure_regimes(config, out, resume=True, progress=False)["mlp"]
    (cell,) = json.loads((out / "summary.json").read_text())["mlp"]["cells"]
    assert cell["depth"] == 4 and cell["scale"] == 2.0
    for name in QUANTITIES:
        np.testing.assert_allclose(cell[name], plane.mean(name)[0])


def test_quantities_are_the_largest_over_times():
    eye = np.eye(3)  # two training examples and a held-out one; two trials
    run = {
        "kernel": np.stack([[eye, eye], [eye * 1.5, eye], [eye, np.diag([1, 1, 3.0])]]),
        "gamma": np.array([[1.0, 2.0], [2.0, 2.5], [3.0, 2.5]]),
        "sign_changes": np.array([[0, 0], [0.2, 0], [0.1, 0.3]]),
        "movement": np.arange(18.0).reshape(3, 2, 3),
        "distance": np.arange(18.0, 0, -1).reshape(3, 2, 3),
        "time": np.array([0.0, 1.0, 2.0]),
        "held_out": np.array(1),
        "hidden": np.array(10),
    }
    found = quantities(run, depth=8, scale=2.0)
    assert set(found) == set(QUANTITIES) == set(PREDICTED)
    np.testing.assert_allclose(found["kernel_train"], [0.5, 0])
    np.testing.assert_allclose(found["kernel_test"], [0.5, 2])
    np.testing.assert_allclose(found["crossings"], [2, 3])
    np.testing.assert_allclose(found["random"], [13, 16])
    # At C = 1e16 a movement of 13 is one of the state's last digits.
    np.testing.assert_array_equal(quantities(run, 8, 1e16)["random"], [np.nan, np.nan])
    np.testing.assert_allclose(quantities(run, 8, 1e16)["input"], [12, 15])
    np.testing.assert_allclose(found["distance"], [4, 1])
    np.testing.assert_allclose(found["gamma"], [2, 0.25])
    # Integrals of Gamma^4 by trapezoids: 8.5, then 57 for the first network.
    areas = (16 + 2.5**4) / 2
    np.testing.assert_allclose(found["constant"], [max(1 / 8.5, 2 / 57) / 4, 0.5 / areas / 4])


def test_powers_are_found_again_and_say_how_fast_c_must_grow():
    depths, scales = (a.ravel() for a in np.meshgrid([100.0, 500, 2000], [1.0, 10, 30, 100]))
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((12, 5)))
    law = {name: depths**p * scales**q for name, (p, q) in PREDICTED.items()}
    values = {name: law[name][:, None] * noise for name in PREDICTED}
    values["kernel_train"][scales < 3] *= 100  # not fitted
    values["crossings"] = np.random.default_rng(1).poisson(law["crossings"][:, None] * np.ones(5))
    values["gamma"][-1, 0] = np.inf
    plane = Plane(depths, scales, values, 3.0)
    for name, (by_depth, by_scale) in PREDICTED.items():
        fit = plane.fit(name)
        for at, power in (("depth", by_depth), ("scale", by_scale)):
            assert fit[at]["low"] - 0.01 < power < fit[at]["high"] + 0.01, (name, fit)
    assert plane.needed("kernel_train") == 0 and abs(plane.needed("crossings") - 0.5) < 0.2
    error = plane.needed_error("crossings")
    assert abs(plane.needed("crossings") - 0.5) < error < 0.5
    assert plane.needed_error("kernel_train") is None
    assert plane.needed("output") is None and plane.needed("distance") is None
    assert plane.fitted("gamma").sum() == 8 and plane.fitted("crossings").sum() == 9
    np.testing.assert_allclose(plane.predicted("kernel_train"), 1 / scales, rtol=0.02)
    np.testing.assert_allclose(plane.predicted("crossings") / law["crossings"], 1, rtol=0.3)
    assert "vanishes if C -> infinity" in plane.described("kernel_train")
    assert "vanishes if C grows faster than L^0." in plane.described("crossings")
    one = dataclasses.replace(plane, values={"crossings": values["crossings"][:, :1]})
    assert one.needed_error("crossings") is None and "+-" not in one.described("crossings")
    falling = dataclasses.replace(plane, values={"gamma": (depths**-0.1 / scales)[:, None] * noise})
    assert falling.needed("gamma") == 0  # its power of depth is below 0
    none = dataclasses.replace(plane, values={"crossings": np.zeros((12, 5))})
    assert none.predicted("crossings") is None and "no fit" in none.described("crossings")


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "regimes.py", BAD_FLAGS[name][1])
