"""The transformer whose features' products are the limit kernel."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from dnntk import InfiniteDepthFeatures, InputError
from dnntk.estimators import features as module
from dnntk.kernel import limit_ntk

CNN = {"arch": "cnn", "image_shape": (4, 2), "kernel_size": 3}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 8))


@parametrize_with_checks([InfiniteDepthFeatures(8, features="gaussian")])
def test_the_transformer_keeps_scikit_learns_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("options", [{"d_out": 3}, CNN], ids=["mlp", "cnn"])
def test_products_of_features_are_nearly_the_limit_kernel(options, monkeypatch):
    model = InfiniteDepthFeatures(1024, 0.7, 0.4, "orthogonal", random_state=0, **options)
    phi = model.fit_transform(X)
    exact = np.asarray(model.kernel_(X, X))
    assert np.linalg.norm(phi @ phi.T - exact) < 0.02 * np.linalg.norm(exact)
    assert phi.dtype == np.float64 and phi.shape[1] == len(model.get_feature_names_out())
    if model.arch == "cnn":
        return
    # A feature depends on its own row alone, and hardly on the dtype.
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    single = model.transform(X[::-1].astype(np.float32))
    assert single.dtype == np.float32
    assert_allclose(single, phi[::-1], atol=2e-6)


def test_ridge_behind_them_is_the_infinitely_deep_network(digits):
    x, y, x_test, y_test = digits
    targets = np.eye(3)[y]
    kernel = np.asarray(limit_ntk(np.concatenate([x, x_test])), np.float64)
    exact = kernel[120:, :120] @ np.linalg.solve(kernel[:120, :120] + 1.2 * np.eye(120), targets)
    ridge = Ridge(alpha=len(x) * 1e-2, fit_intercept=False)
    model = make_pipeline(InfiniteDepthFeatures(64, random_state=0), ridge).fit(x, targets)
    assert_allclose(model.predict(x_test), exact, atol=0.02)
    assert (model.predict(x_test).argmax(1) == y_test).mean() > 0.9


def test_chunks_are_learnt_one_after_another(digits):
    x, y, x_test, y_test = digits
    features = InfiniteDepthFeatures(64, random_state=0).fit(x[:1])
    model = SGDClassifier(random_state=0)
    for start in range(0, 120, 40):
        chunk = slice(start, start + 40)
        model.partial_fit(features.transform(x[chunk]), y[chunk], classes=[0, 1, 2])
    assert model.score(features.transform(x_test), y_test) > 0.9


def test_a_draw_is_its_seeds_and_bad_parameters_are_refused_in_a_line():
    one, same, other = (InfiniteDepthFeatures(8, random_state=s).fit(X) for s in (3, 3, 4))
    assert_array_equal(one.units_["kernel"], same.units_["kernel"])
    assert np.abs(one.units_["kernel"] - other.units_["kernel"]).min() > 0
    for words, options in (
        ("count must be a positive integer, got 0", {"count": 0}),
        ("features: expected one of gaussian, orthogonal, sobol", {"features": "antithetic"}),
        ("rho, a standard deviation", {"rho": -1.0}),
        ("image_shape: expected", {"arch": "cnn"}),
        ("random_state: expected", {"random_state": "now"}),
    ):
        with pytest.raises(InputError, match=words) as caught:
            InfiniteDepthFeatures(**options).fit(X)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="NaN"):
        one.transform(X * np.nan)
