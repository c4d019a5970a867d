import functools
import pickle

import joblib
import numpy as np
import pytest
from mutations import set_entry
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from dnntk import (
    DeepNarrowClassifier,
    DeepNarrowCNN,
    DeepNarrowMLP,
    DeepNarrowRegressor,
    InputError,
    KernelFlow,
)
from dnntk.estimators import savefile
from dnntk.ntk.random_features import RandomFeatures
from dnntk.training import gradient_flow

SMALL = {"depth": 20, "scale": 1e6}  # what C is by default at depth 500
CONVOLUTIONAL = {"arch": "cnn", "image_shape": (4, 2), "kernel_size": 5, "features": "sobol"}
CONVOLUTIONAL |= {"rho": 0.7, "beta": 0.9, "random_units": 2}
# Checks of what they share with `InfiniteDepthClassifier`, each of which compiles networks of
# another size: scripts/acceptance.py runs them.
SHARED = {
    *("check_dtype_object", "check_classifier_data_not_an_array", "check_classifiers_classes"),
    *("check_estimators_dtypes", "check_pipeline_consistency", "check_fit_score_takes_y"),
    *("check_n_features_in_after_fitting", "check_estimators_overwrite_params"),
    *("check_positive_only_tag_during_fit", "check_dont_overwrite_parameters"),
    *("check_f_contiguous_array_estimator", "check_fit2d_1feature", "check_estimators_nan_inf"),
    *("check_estimators_fit_returns_self", "check_regressors_no_decision_function"),
}
# The regressor's other checks concern what it shares with the classifier.
CHECKS = [
    *(
        (estimator, check)
        for estimator, check in estimator_checks_generator(DeepNarrowClassifier(**SMALL))
        if check.func.__name__ not in SHARED
    ),
    *(
        (estimator, check)
        for estimator, check in estimator_checks_generator(DeepNarrowRegressor(**SMALL))
        if "regressor" in check.func.__name__ and check.func.__name__ not in SHARED
    ),
]


# Some have inputs of size 100, at which float32 does not converge.
@pytest.mark.filterwarnings("ignore:not converged", "ignore:X. .* of the entries are negative")
@pytest.mark.parametrize(
    ("estimator", "check"), CHECKS, ids=[f"{type(e).__name__}-{c.func.__name__}" for e, c in CHECKS]
)
def test_estimators_keep_scikit_learns_conventions(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def rows():
    """Training rows [40, 8], labels of three classes, and test rows [9, 8]."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(49, 8))
    return x[:40], np.array(["a", "b", "c"])[np.argmax(x[:40, :3], 1)], x[40:]


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def fitted(request, rows):
    more = CONVOLUTIONAL if request.param == "cnn" else {}
    return DeepNarrowClassifier(**SMALL, time=50.0, random_state=3, **more).fit(*rows[:2])


def test_the_network_is_the_one_of_the_parameters(fitted):
    if fitted.image_shape_:
        units = {"rho": 0.7, "beta": 0.9, "features": "sobol", "random_units": 2}
        assert fitted.model_ == DeepNarrowCNN(20, 3, 1e6, kernel_size=5, **units)
    else:
        assert fitted.model_ == DeepNarrowMLP(20, 3, 1e6)


def test_outputs_are_the_flow_of_the_networks_own_kernel(fitted, rows):
    x, labels, x_test = (a if a.ndim == 1 else a.astype(np.float32) for a in rows)
    if fitted.image_shape_:
        x, x_test = (a.reshape(-1, 4, 2, 1) for a in (x, x_test))
    targets = np.eye(3)[np.searchsorted(fitted.classes_, labels)]
    flow = KernelFlow(RandomFeatures(fitted.model_, fitted.variables_), x, targets)
    found = fitted.decision_function(rows[2])
    assert_allclose(found, flow.predict(x_test, 50.0), atol=1e-3)
    assert fitted.converged_ and fitted.n_iter_ == fitted.report_.iterations >= 1
    assert fitted.residual_ < 1e-3


def test_a_prediction_depends_on_its_own_point_only(fitted, rows, monkeypatch):
    together = fitted.decision_function(rows[0])
    assert_array_equal(fitted.decision_function(rows[0][5:6]), together[5:6])
    monkeypatch.setattr("dnntk.estimators.deep_narrow.MOST_ROWS", 32)
    assert_array_equal(fitted.decision_function(rows[0]), together)


def test_a_random_state_seeds_networks_that_share_what_was_compiled(rows, monkeypatch):
    x, _, x_test = rows
    made, make_step = [], gradient_flow.make_step
    monkeypatch.setattr(gradient_flow, "make_step", lambda *a: made.append(a) or make_step(*a))

    def outputs(random_state):
        model = DeepNarrowRegressor(**SMALL, time=50.0, random_state=random_state)
        return model.fit(x, x[:, :3]).predict(x_test), model.fit(x, x[:, :3]).predict(x_test)

    first, again = outputs(3)
    assert_array_equal(first, again)
    drawn, next_one = outputs(np.random.RandomState(3))
    assert_array_equal(drawn, first)
    assert np.abs(next_one - first).max() > 1e-4
    np.random.seed(5)
    one, other = outputs(None)
    assert np.abs(other - one).max() > 1e-4
    assert len(made) <= 1


def test_works_in_pipelines_and_searches(rows):
    x, labels, _ = rows
    network = DeepNarrowClassifier(**SMALL, random_state=0)
    pipeline, name = make_pipeline(MinMaxScaler(), network), "deepnarrowclassifier__ridge"
    search = GridSearchCV(pipeline, {name: np.array([1e-6, 1e3])}, cv=2, error_score="raise")
    assert search.fit(x, labels).best_params_ == {name: 1e-6}
    assert search.score(x, labels) > 0.9
    assert cross_val_score(clone(network), x, labels, cv=2).mean() > 0.6


def test_negative_inputs_count_as_zero_and_a_warning_says_so(rows):
    x, labels, x_test = rows
    pipeline = make_pipeline(StandardScaler(), DeepNarrowClassifier(**SMALL, random_state=0))
    with pytest.warns(UserWarning, match=r"^X: [45].* of the entries are negative.*MinMaxScaler"):
        pipeline.fit(x, labels)
    # Only the first layer's random unit, one of depth, sees the negative numbers.
    x_test, network = pipeline[0].transform(x_test), pipeline[-1]
    found = network.decision_function(x_test)
    assert_allclose(found, network.decision_function(np.maximum(x_test, 0)), atol=0.1)


def copies(model, folder):
    """The estimator, by every way to keep one."""
    model.save(folder / "saved")
    joblib.dump(model, folder / "dumped")
    return (
        type(model).load(folder / "saved"),
        joblib.load(folder / "dumped"),
        pickle.loads(pickle.dumps(model)),
    )


def test_a_kept_classifier_is_the_same_to_the_bit(fitted, rows, tmp_path):
    changed = clone(fitted).set_params(depth=5, dtype="float64")
    for copy in (*copies(fitted, tmp_path), fitted.set_params(**changed.get_params())):
        expected = fitted.decision_function(rows[2])
        assert_array_equal(copy.decision_function(rows[2]), expected)
        assert_array_equal(copy.predict(rows[2]), fitted.predict(rows[2]))
        assert copy.report_ == fitted.report_ and copy.model_ == fitted.model_
    size = (tmp_path / "saved").stat().st_size
    kernel, bias = (fitted.variables_["params"]["middle"][name] for name in ("kernel", "bias"))
    assert size < 1.3 * (kernel.nbytes + bias.nbytes) + 4000


def test_a_kept_regressor_of_float64_is_the_same_to_the_bit(rows, tmp_path):
    x, _, x_test = rows
    model = DeepNarrowRegressor(depth=2, scale=np.inf, dtype="float64", random_state=np.int64(1))
    model.fit(x, x[:, :2])
    assert model.residual_ < 1e-8
    for copy in copies(model, tmp_path):
        assert_array_equal(copy.predict(x_test), model.predict(x_test))
        assert copy.predict(x_test).shape == (9, 2)
        assert copy.variables_["params"]["first"]["kernel"].dtype == np.float64
        assert copy.get_params() == model.get_params()


@pytest.mark.parametrize(
    "change",
    [
        set_entry("network", to=3),
        set_entry("network", "depth", to=19),
        set_entry("network", "depth", to=2**31 - 1),
        set_entry("network", "scale", to=-1.0),
        set_entry("network", "rho", to="1"),
        set_entry("network", "d_out", to=2),
        set_entry("network", "features", to="uniform"),
        set_entry("image_shape", to=[4, 2, 1]),
        set_entry("report", to={}),
        set_entry("report", "iterations", to=1.5),
        set_entry("record", "converged_", to=1),
        lambda arrays, about: arrays.pop("params/first/bias"),
        lambda arrays, about: arrays.__setitem__("params/first/more", np.ones(3)),
        lambda arrays, about: arrays.__setitem__("params/first/bias", np.full(12, np.nan)),
        lambda arrays, about: arrays.__setitem__("params/first/bias", np.zeros(12)),
    ],
)
def test_forged_networks_are_refused(change, rows, tmp_path):
    model = _forgeable(rows[0].tobytes())
    path = tmp_path / "model"
    model.save(path)
    arrays, about = savefile.read(path, "DeepNarrowRegressor")
    change(arrays, about)
    savefile.write(path, "DeepNarrowRegressor", arrays, about)
    with pytest.raises(InputError, match="expected a fitted DeepNarrowRegressor, found") as caught:
        DeepNarrowRegressor.load(path)
    assert "\n" not in str(caught.value)


@functools.cache
def _forgeable(rows):
    x = np.frombuffer(rows).reshape(40, 8)
    return DeepNarrowRegressor(**SMALL, time=50.0, random_state=3).fit(x, x[:, :3])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"depth": 1}, "depth"),
        ({"depth": 20.5}, "depth"),
        ({"depth": "deep"}, "depth"),
        ({"scale": 0.0}, "scale"),
        ({"rho": -1.0}, "rho"),
        ({"beta": np.nan}, "beta"),
        ({"time": -1.0}, "time"),
        ({"ridge": -1.0}, "ridge"),
        ({"arch": "rnn"}, "arch"),
        ({"arch": "cnn", "image_shape": (3, 3)}, "image_shape"),
        ({"arch": "cnn", "image_shape": (4, 2), "kernel_size": 2}, "kernel_size"),
        ({"arch": "cnn", "image_shape": (4, 2), "kernel_size": 11}, "kernel_size"),
        ({"features": "uniform"}, "features"),
        ({"random_units": 0}, "random_units"),
        ({"dtype": "float16"}, "dtype"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"memory": -1.0}, "memory"),
        ({"random_state": "seed"}, "random_state"),
        ({"random_state": -1}, "random_state"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(parameters, message, rows):
    with pytest.raises(InputError, match=message) as caught:
        DeepNarrowClassifier(**{**SMALL, **parameters}).fit(*rows[:2])
    assert "\n" not in str(caught.value)


def test_data_that_no_network_learns_are_said_in_one_line(rows, tmp_path):
    x, labels, _ = rows
    model = DeepNarrowClassifier(**SMALL, random_state=np.random.RandomState(0))
    with pytest.raises(InputError, match=r"X: expected numbers within float32, got 1e\+300"):
        model.fit(np.where(x > 0.9, 1e300, x), labels)
    with pytest.raises(InputError, match="expected two classes or more, got one class"):
        model.fit(x, ["a"] * len(x))
    constant = DeepNarrowRegressor(**SMALL, random_state=0).fit(x, np.full(len(x), 0.5))
    assert_allclose(constant.predict(x), 0.5, atol=1e-3)
    assert_allclose(constant.fit(x, np.zeros(len(x))).predict(x), 0.0, atol=1e-6)
    with pytest.raises(InputError, match="random_state: expected None, a number or a string"):
        model.fit(x, labels).save(tmp_path / "model")


def test_what_has_not_converged_is_said(rows, caplog):
    model = DeepNarrowRegressor(depth=20, scale=0.5, max_iterations=1, random_state=0)
    with pytest.warns(ConvergenceWarning, match="not converged: residual .*, tolerance 0.001;"):
        model.fit(rows[0], rows[0][:, 0])
    assert not model.converged_ and model.n_iter_ == 1 and model.residual_ > 1e-3
