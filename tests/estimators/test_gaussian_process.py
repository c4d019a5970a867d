"""The limit kernel as a scikit-learn kernel: values, derivatives, and fits of rho and beta."""

import pickle

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel

from dnntk import InfiniteDepthKernel, InputError
from dnntk.kernel import limit_ntk

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8))
X[3] = X[0]  # coincident inputs, where the kernel has its kink
CNN = {"arch": "cnn", "image_shape": (2, 4), "kernel_size": 3, "beta_bounds": "fixed"}


@pytest.mark.parametrize("options", [{"d_out": 3}, CNN], ids=["mlp", "cnn"])
def test_values_and_derivatives_are_those_of_the_limit(options, x64):
    kernel = InfiniteDepthKernel(0.7, 0.4, **options)
    shape = [-1, 2, 4, 1] if "arch" in options else [-1, 8]
    expected = limit_ntk(
        X.reshape(shape), rho=0.7, beta=0.4, d_out=options.get("d_out", 1), kernel_size=3
    )
    assert_allclose(kernel(X), expected, rtol=1e-14)
    if kernel.arch == "mlp":
        assert_allclose(kernel(X, X[::-1]), expected[:, ::-1], rtol=1e-13)
    assert_allclose(kernel.diag(X), np.diag(expected), rtol=1e-13)
    values, slopes = kernel(X, eval_gradient=True)
    assert_array_equal(values, kernel(X))
    assert_allclose(kernel.theta, np.log([0.4, 0.7])[-slopes.shape[2] :])
    for i, h in enumerate(
        1e-4 * np.eye(slopes.shape[2])
    ):  # the differences' errors: h^2, and rounding over h
        ends = [kernel.clone_with_theta(kernel.theta + step)(X) for step in (h, -h)]
        assert_allclose(slopes[:, :, i], (ends[0] - ends[1]) / 2e-4, rtol=1e-6, atol=1e-7)


def test_gaussian_processes_find_rho_and_beta():
    x = RNG.normal(size=(50, 2))
    true = InfiniteDepthKernel(rho=3.0, beta=0.5)
    noise = 1e-4
    y = RNG.multivariate_normal(np.zeros(50), true(x) + noise * np.eye(50), size=4).T
    start = InfiniteDepthKernel(beta_bounds=(1e-2, 1e2)) + WhiteKernel(noise, "fixed")
    model = GaussianProcessRegressor(start).fit(x, y)
    limit = model.kernel_.k1
    assert limit.rho == pytest.approx(3, rel=0.2) and limit.beta == pytest.approx(0.5, rel=0.5)
    best = model.log_marginal_likelihood_value_
    assert best > model.log_marginal_likelihood(start.theta) + 10
    assert (
        best
        > GaussianProcessRegressor(true + WhiteKernel(noise), optimizer=None)
        .fit(x, y)
        .log_marginal_likelihood()
        - 1e-6
    )
    mean, deviation = model.predict(x, return_std=True)
    assert_allclose(mean, y, atol=0.05)
    assert (deviation < 0.05).all()


def test_kernels_keep_scikit_learns_conventions():
    kernel = InfiniteDepthKernel(2.0, 0.0, **CNN)
    assert kernel.theta == np.log(2) and kernel.bounds.shape == (1, 2)
    assert not kernel.is_stationary() and repr(kernel) == "InfiniteDepthKernel(rho=2, beta=0)"
    values, slopes = kernel(X, eval_gradient=True)
    assert values.dtype == np.float64 and slopes.shape == (6, 6, 1)
    for other in (clone(kernel), pickle.loads(pickle.dumps(kernel))):
        assert other == kernel and (other(X) == values).all()
    fixed = kernel.set_params(rho_bounds="fixed")
    assert fixed(X, eval_gradient=True)[1].shape == (6, 6, 0)
    product = 2.0 * fixed * fixed + WhiteKernel(0.5)
    assert_allclose(product(X), 2 * values**2 + 0.5 * np.eye(6), rtol=1e-13)


def test_what_the_kernel_cannot_take_is_refused_in_a_line():
    for words, call in (
        ("eval_gradient: expected False", lambda: InfiniteDepthKernel()(X, X, True)),
        ("rho, a standard deviation", lambda: InfiniteDepthKernel(-1.0)(X)),
        ("arch: expected one of", lambda: InfiniteDepthKernel(arch="rnn")(X)),
        ("image_shape: expected", lambda: InfiniteDepthKernel(arch="cnn").diag(X)),
        ("rho_bounds: expected .least, largest", lambda: InfiniteDepthKernel(rho_bounds=3).bounds),
        ("beta: expected a number above 0", lambda: InfiniteDepthKernel(beta=0.0).theta),
        ("X: expected finite numbers", lambda: InfiniteDepthKernel()(X * np.nan)),
        ("x2 must hold inputs of shape", lambda: InfiniteDepthKernel()(X, X[:, :3])),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
