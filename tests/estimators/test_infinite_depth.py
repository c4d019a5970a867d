import math
import pickle
from functools import partial

import numpy as np
import processes
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from dnntk import InputError
from dnntk.estimators.infinite_depth import InfiniteDepthClassifier, InfiniteDepthRegressor
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.kernel import limit_ntk

# Two orders of the same float64 sums; the outputs are of size 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@parametrize_with_checks([InfiniteDepthClassifier(), InfiniteDepthRegressor()])
def test_estimators_keep_scikit_learns_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_classifier_is_the_flow_of_one_hot_targets(arch, digits):
    n, shape = (120, [-1, 64]) if arch == "mlp" else (16, [-1, 8, 8, 1])
    x, y, x_test, y_test = (each[:n] for each in digits)
    kernel = partial(limit_ntk, rho=0.7, beta=0.5, d_out=3, kernel_size=5)
    flow = KernelFlow(kernel, x.reshape(shape), np.eye(3)[y], ridge=1e-5)
    expected = flow.predict(x_test.reshape(shape), 200.0)

    found = InfiniteDepthClassifier(
        rho=0.7, beta=0.5, time=200.0, ridge=1e-5, arch=arch, kernel_size=5
    ).fit(x, y)
    assert_allclose(found.decision_function(x_test), expected, **CLOSE)
    assert_array_equal(found.predict(x_test), expected.argmax(1))
    assert found.converged_ and found.residual_ < 1e-6 and found.n_iter_ == 0
    assert found.condition_ == pytest.approx(flow.solution(200.0).condition)
    assert found.score(x_test, y_test) > (0.9 if arch == "mlp" else 0.3)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_regressor_is_the_flow_of_its_targets(solver, digits):
    x, _, x_test, _ = digits
    y = np.stack([x.sum(1), x[:, 20] - 3], 1)
    expected = KernelFlow(partial(limit_ntk, d_out=2), x, y).predict(x_test, 100.0)
    found = InfiniteDepthRegressor(time=100.0, solver=solver, tolerance=1e-10).fit(x, y)
    assert_allclose(found.predict(x_test), expected, rtol=1e-6, atol=1e-6)
    assert (found.n_iter_ > 0) == (solver == "krylov")


def test_a_prediction_depends_on_its_own_point_only(digits, monkeypatch):
    x, y, x_test, _ = digits
    model = InfiniteDepthClassifier().fit(x, y)
    together = model.decision_function(x_test)
    assert_allclose(model.decision_function(x_test[5:6]), together[5:6], **CLOSE)
    monkeypatch.setattr("dnntk.estimators.infinite_depth.BLOCK_SIZE", 50)
    assert_allclose(model.decision_function(x_test), together, **CLOSE)


def test_parameters_set_after_fit_wait_for_the_next_fit(digits):
    x, y, x_test, _ = digits
    model = InfiniteDepthClassifier(time=10.0).fit(x, y)
    before = model.decision_function(x_test)
    model.set_params(rho=5.0, time=1.0)
    assert_array_equal(model.decision_function(x_test), before)


def test_coincident_inputs_are_averaged_and_refused_only_at_infinite_time(digits):
    x, y, x_test, _ = digits
    twice, targets = np.concatenate([x[:40]] * 2), np.concatenate([y[:40], y[:40] + 1.0])
    model = InfiniteDepthRegressor()
    both = model.fit(twice, targets).predict(x_test)
    # The mean is fitted for the same time: doubling examples leaves K/N's spectrum as it is.
    assert_allclose(both, model.fit(x[:40], y[:40] + 0.5).predict(x_test), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="set ridge to"):
        clone(model).set_params(time=math.inf).fit(twice, targets)
    clone(model).set_params(time=math.inf, ridge=1e-6).fit(twice, targets)


def test_works_in_a_pipeline_and_a_search(digits):
    x, y, x_test, y_test = digits
    pipeline = make_pipeline(StandardScaler(), MinMaxScaler(), InfiniteDepthClassifier())
    name = "infinitedepthclassifier__"
    grid = {
        name + "time": [1e-3, 1e5],
        name + "ridge": [0.0, 1e-4],
        name + "rho": [1.0, 10.0],
        name + "beta": np.array([0.1, 1.0]),
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(x, y)
    assert search.best_params_[name + "time"] == 1e5
    assert search.score(x_test, y_test) > 0.8


IN_ANOTHER_PROCESS = """
import pickle
from sklearn.model_selection import cross_val_score
from pathlib import Path
model, x, y = pickle.loads(Path("job").read_bytes())
print(*map(float, cross_val_score(model, x, y, cv=2)), float(model.predict(x)[0]))
"""


def test_scores_and_predictions_in_another_process_are_those_of_this_one(tmp_path):
    """As a search with ``n_jobs`` has its processes do."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:120], y[:120]
    model = make_pipeline(StandardScaler(), InfiniteDepthRegressor(time=100.0)).fit(x, y)
    (tmp_path / "job").write_bytes(pickle.dumps((model, x, y)))
    done = processes.outcomes("predict.py", {"": []}, tmp_path, code=IN_ANOTHER_PROCESS)[""]
    alone = cross_val_score(model, x, y, cv=2)
    found = np.array(done.stdout.split(), float)
    assert_allclose(found, [*alone, model.predict(x)[0]], rtol=1e-6, err_msg=done.stderr)
    assert alone.mean() > 0.2


def test_what_has_not_converged_is_said(digits, caplog):
    x, y, _, _ = digits
    model = InfiniteDepthRegressor(solver="krylov", max_iterations=1)
    with pytest.warns(ConvergenceWarning, match="not converged: residual .*, tolerance 1e-06;"):
        model.fit(x, y)
    assert not model.converged_ and model.n_iter_ == 1 and model.residual_ > 1e-6


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rho": -1.0}, "rho"),
        ({"rho": "wide"}, "rho"),
        ({"beta": math.nan}, "beta"),
        ({"time": -1.0}, "time"),
        ({"time": None}, "time"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": math.inf}, "ridge"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"memory": -1.0}, "memory"),
        ({"solver": "lu"}, "solver"),
        ({"arch": "rnn"}, "arch"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"kernel_size": 3.5}, "kernel_size"),
        ({"arch": "cnn", "image_shape": (8, 9)}, "image_shape"),
        ({"arch": "cnn", "image_shape": (8, -8, -1)}, "image_shape"),
        ({"arch": "cnn", "image_shape": 64}, "image_shape"),
        ({"arch": "cnn", "image_shape": (8, 4, 2), "kernel_size": 1001}, "kernel_size"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(parameters, message, digits):
    x, y, _, _ = digits
    model = InfiniteDepthClassifier(**parameters)  # stored as they are
    with pytest.raises(InputError, match=message) as caught:
        model.fit(x[:20], y[:20])
    assert "\n" not in str(caught.value)


def test_rows_that_are_no_square_images_need_a_shape(digits):
    x, y, _, _ = digits
    model = InfiniteDepthClassifier(arch="cnn")
    with pytest.raises(InputError, match="of 18 features"):
        model.fit(x[:, :18], y)
    model.set_params(image_shape=(2, 3, 3)).fit(x[:16, :18], y[:16])
    assert model.kernel_.image_shape == (2, 3, 3)
    assert model.predict(x[:5, :18]).shape == (5,)
