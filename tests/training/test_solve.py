"""Networks trained in closed form, against their own kernel and against gradient descent."""

import jax
import numpy as np
import pytest
from networks import drawn, outputs

import dnntk
from dnntk import DeepNarrowMLP, solve
from dnntk.ntk.random_features import RandomFeatures
from dnntk.training.gradient_flow import TrainState, make_steps, sgd
from dnntk.training.placement import data_mesh, put_batch


def problem(model, shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.1, 1, shape).astype(dtype)
    y = rng.normal(size=(len(x), model.d_out)).astype(dtype)
    return x, y, drawn(model, x, seed)


def flow_of_its_own_kernel(model, variables, x, y, time, ridge):
    """f_t(X) by the dense kernel, which tests/ntk/test_random_features.py compares."""
    matrix = np.asarray(RandomFeatures(model, variables)(x, x)) / len(x)
    values, vectors = np.linalg.eigh(matrix)
    s = np.maximum(values, 0) + ridge
    gain = np.maximum(values, 0) * -np.expm1(-time * s) / s
    return vectors @ (gain[:, None] * (vectors.T @ y))


@pytest.mark.parametrize(("time", "ridge"), [(np.inf, 1e-3), (1e3, 0.0)])
def test_outputs_are_those_of_the_flow_after_a_few_passes(time, ridge, x64):
    model = DeepNarrowMLP(60, 2, np.inf)  # the estimators' tests have a CNN
    x, y, variables = problem(model, (12, 3))
    trained, report = solve(model, variables, x, y, time=time, ridge=ridge, progress=False)
    expected = flow_of_its_own_kernel(model, variables, x, y, time, ridge)
    error = np.linalg.norm(outputs(model, trained, x) - expected) / np.linalg.norm(y)
    assert error < 1e-4 and report.converged and report.iterations <= 3


def test_weights_are_those_of_gradient_descent_by_small_steps():
    model = DeepNarrowMLP(40, 1, 40**2.2)
    x, y, variables = problem(model, (16, 2), dtype=np.float32)
    trained, _ = solve(model, variables, x, y, time=6.0, progress=False)
    mesh, steps = data_mesh(len(x), 0, threaded=True), 600
    optimizer = sgd(6.0 / steps)
    params = jax.tree.map(np.array, variables["params"])
    state = TrainState(params, optimizer.init(params))
    frozen = {"initial": variables["initial"]}
    step = make_steps(model, optimizer, mesh)
    descended, _ = step(state, frozen, put_batch(x, y, mesh), np.int32(steps))
    ended = jax.device_get((trained["params"], descended.params))
    for found, expected in zip(*map(jax.tree.leaves, ended), strict=True):
        assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)
    others = np.random.default_rng(1).uniform(0.1, 1, (9, 2)).astype(np.float32)
    ends = (trained, {"params": descended.params, **frozen})
    found, expected = (np.asarray(outputs(model, v, others)) for v in ends)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_a_network_that_is_not_linear_is_brought_to_the_flow_by_more_passes():
    model = DeepNarrowMLP(30, 1, 2.0)
    x, y, variables = problem(model, (12, 3), dtype=np.float32)
    trained, report = solve(model, variables, x, y / 4, time=5.0, tolerance=1e-3, progress=False)
    assert report.converged and 1 < report.iterations <= 30
    assert report.history[0]["residual"] > 10 * report.residual
    flow = dnntk.KernelFlow(RandomFeatures(model, variables), x, y / 4)
    expected = flow.train_predictions(5.0)
    assert np.linalg.norm(outputs(model, trained, x) - expected) < 2e-3 * np.linalg.norm(y / 4)


def test_at_time_zero_the_network_is_the_initial_one():
    model = DeepNarrowMLP(30, 1, np.inf)
    x, y, variables = problem(model, (10, 3), dtype=np.float32)
    trained, report = solve(model, variables, x, y, time=0.0, progress=False)
    assert report.converged and report.iterations == 0
    jax.tree.map(np.testing.assert_array_equal, trained["params"], variables["params"])


def test_another_form_is_refused_in_one_line():
    model = DeepNarrowMLP(5, 1, 30.0, parametrization="standard")
    x, y, variables = problem(model, (4, 2), dtype=np.float32)
    with pytest.raises(dnntk.InputError, match="model: expected a deep_narrow"):
        solve(model, variables, x, y)


def test_training_goes_on_from_trained_weights():
    model = DeepNarrowMLP(30, 1, np.inf)
    x, y, variables = problem(model, (10, 3), dtype=np.float32)
    once, _ = solve(model, variables, x, y, time=8.0, progress=False)
    half, _ = solve(model, variables, x, y, time=4.0, progress=False)
    twice, _ = solve(model, half, x, y, time=4.0, progress=False)
    np.testing.assert_allclose(outputs(model, once, x), outputs(model, twice, x), atol=1e-4)
    np.testing.assert_array_equal(variables["params"]["last"]["bias"], 0)  # the caller's own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y": np.ones(3)}, "y:"),
        ({"time": -1.0}, "time:"),
        ({"ridge": -1.0}, "ridge:"),
        ({"tolerance": 0.0}, "tolerance:"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"x": np.full((4, 2), np.nan)}, "x:"),
        ({"x": np.full((4, 2), 1e39)}, "^x: expected numbers within float32"),
        ({"y": np.ones((4, 2))}, "^y: expected 1 outputs"),
        ({"ridge": "a"}, "^ridge:"),
        ({"variables": None}, "^variables:"),
        ({"variables": {"initial": {}}}, "^variables: expected the collection 'initial'"),
        ({"model": None}, "^model: expected a DeepNarrowMLP"),
    ],
)
def test_a_bad_argument_is_named(change, said):
    model = DeepNarrowMLP(5, 1, 30.0)
    x, y, variables = problem(model, (4, 2), dtype=np.float32)
    given = {"model": model, "variables": variables, "x": x, "y": y} | change
    first = [given.pop(name) for name in ("model", "variables", "x", "y")]
    with pytest.raises(dnntk.InputError, match=said):
        solve(*first, progress=False, **given)


def test_a_parameter_that_is_no_number_is_refused():
    model = DeepNarrowMLP(5, 1, 30.0)
    x, y, variables = problem(model, (4, 2), dtype=np.float32)
    with pytest.raises(dnntk.InputError, match="^variables: expected the collection 'params'"):
        solve(model, {"initial": variables["initial"]}, x, y, progress=False)
    variables = jax.tree.map(lambda p: np.full_like(p, np.nan), variables)
    with pytest.raises(dnntk.InputError, match="^variables: expected finite numbers"):
        solve(model, variables, x, y, progress=False)
