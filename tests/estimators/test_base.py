import math
import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError

from dnntk import InputError
from dnntk.estimators.infinite_depth import InfiniteDepthClassifier, InfiniteDepthRegressor

LABELS = {
    "integers": np.array([7, -2, 2**62]),
    "unsigned": np.array([1, 2**64 - 1, 5], np.uint64),
    "floats": np.array([1.0, 2.0, 30.0], np.float32),
    "strings": np.array(["zero", "eins", "два ☃"]),
    "objects": np.array(["a", "bcd", "ef"], object),
    "bools": np.array([False, True]),
}


def _rows(labels, digits):
    """Training rows with these labels, test rows."""
    x, _, x_test, _ = digits
    return x[:16], labels[np.arange(16) % len(labels)], x_test[:8]


@pytest.mark.parametrize("kind", LABELS)
def test_a_loaded_classifier_is_the_saved_one(kind, digits, tmp_path):
    x, y, x_test = _rows(LABELS[kind], digits)
    model = InfiniteDepthClassifier(rho=np.float64(0.3), time=10.0, image_shape=(8, 8)).fit(x, y)
    model.save(tmp_path / "model")
    loaded = InfiniteDepthClassifier.load(tmp_path / "model")
    assert_array_equal(loaded.decision_function(x_test), model.decision_function(x_test))
    assert_array_equal(loaded.predict(x_test), model.predict(x_test))
    assert loaded.classes_.dtype == model.classes_.dtype
    assert loaded.get_params() == model.get_params()
    for name in ("converged_", "residual_", "n_iter_", "condition_", "n_features_in_", "kernel_"):
        assert getattr(loaded, name) == getattr(model, name)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("outputs", "arch"), [(0, "mlp"), (1, "cnn"), (3, "mlp"), (0, "cnn")])
def test_a_loaded_regressor_is_the_saved_one(outputs, arch, digits, tmp_path):
    x, y, x_test = _rows(np.random.default_rng(0).normal(size=(16, outputs or 1)), digits)
    y = y if outputs else y[:, 0]
    model = InfiniteDepthRegressor(time=math.inf, ridge=1e-3, arch=arch, kernel_size=5)
    model.fit(x, y).save(tmp_path / "model")
    loaded = InfiniteDepthRegressor.load(tmp_path / "model")
    assert_array_equal(loaded.predict(x_test), model.predict(x_test))
    assert loaded.predict(x_test).shape == ((8, outputs) if outputs else (8,))
    assert loaded.get_params() == model.get_params()


def test_feature_names_survive(digits, tmp_path):
    pandas = pytest.importorskip("pandas")
    x, y, _, _ = digits
    frame = pandas.DataFrame(x, columns=[f"pixel {i}" for i in range(64)])
    model = InfiniteDepthRegressor().fit(frame, y)
    model.save(tmp_path / "model")
    loaded = InfiniteDepthRegressor.load(tmp_path / "model")
    assert_array_equal(loaded.feature_names_in_, frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(frame.rename(columns={"pixel 0": "other"}))


def test_another_class_and_no_fit_are_refused(digits, tmp_path):
    x, y, _, _ = digits
    with pytest.raises(NotFittedError):
        InfiniteDepthRegressor().save(tmp_path / "model")
    InfiniteDepthRegressor().fit(x, y).save(tmp_path / "model")
    with pytest.raises(InputError, match="expected a saved InfiniteDepthClassifier, found a saved"):
        InfiniteDepthClassifier.load(tmp_path / "model")


def test_only_what_prediction_needs_is_kept(digits):
    x, y, x_test, _ = digits
    model = InfiniteDepthClassifier().fit(x, y)
    pickled = pickle.dumps(model)
    assert len(pickled) < x.nbytes + 8 * len(x) * 3 + 4000
    assert_array_equal(pickle.loads(pickled).predict(x_test), model.predict(x_test))
