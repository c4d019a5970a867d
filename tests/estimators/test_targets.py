import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dnntk import InfiniteDepthClassifier, InfiniteDepthRegressor, InputError, KernelFlow
from dnntk.kernel import limit_ntk

# Two orders of the same float64 sums; the outputs are of size 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def test_two_classes_are_one_output_decided_at_a_half(digits):
    x, y, x_test, _ = (each[digits[1][: len(each)] < 2] for each in digits)
    expected = KernelFlow(limit_ntk, x, 1.0 - y).predict(x_test, 50.0)[:, 0]
    labels = np.array(["one", "zero"])  # sorted the other way round than the digits
    found = InfiniteDepthClassifier(time=50.0).fit(x, labels[1 - y])
    assert_allclose(found.decision_function(x_test), expected - 0.5, **CLOSE)
    assert_array_equal(found.predict(x_test), np.where(expected > 0.5, "zero", "one"))


def test_predictions_have_the_shape_of_the_targets_and_are_linear_in_them(digits):
    x, y, x_test, _ = digits
    model = InfiniteDepthRegressor(time=100.0)
    flat = model.fit(x, y).predict(x_test)
    assert flat.shape == (100,)
    column = model.fit(x, -3.0 * y[:, None]).predict(x_test)
    assert column.shape == (100, 1)
    assert_allclose(column[:, 0], -3 * flat, **CLOSE)


def test_one_class_is_refused(digits):
    x, _, _, _ = digits
    with pytest.raises(InputError, match="expected two classes or more, got one class"):
        InfiniteDepthClassifier().fit(x, np.ones(len(x), int))


@pytest.mark.parametrize("estimator", [InfiniteDepthClassifier, InfiniteDepthRegressor])
def test_a_score_refuses_masked_targets_and_arrays_that_raise_are_named(estimator, digits):
    class Unreadable:
        def __array__(self, dtype=None, copy=None):
            raise OSError("gone\naway")

    x, y, _, _ = digits
    model = estimator().fit(x[:20], y[:20])
    assert isinstance(model.score(x[:20], y[:20], np.ones(20)), float)
    masked = np.ma.array(y[:20], mask=y[:20] == y[0])
    with pytest.raises(InputError, match=r"^y must have no masked entries"):
        model.score(x[:20], masked)
    with pytest.raises(InputError, match=r"^X, y: expected arrays, got one that raises .*gone"):
        model.predict(Unreadable())
