"""Posterior and evidence against scikit-learn's, which solves by a dense Cholesky factor."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel

from dnntk.errors import InputError
from dnntk.infinite_depth.gaussian_process import draw, parameters_of
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.kernel import limit_ntk

N, M = 30, 6
RNG = np.random.default_rng(0)
X, NEW, Y = RNG.uniform(size=(N, 4)), RNG.uniform(size=(M, 4)), RNG.normal(size=(N, 3))
IMAGES = RNG.uniform(size=(9, 3, 4, 2))
MIXING = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.5]])
NOISE = 0.07


class Wrapped(Kernel):
    """A kernel function for scikit-learn, without hyperparameters."""

    def __init__(self, function, shape):
        self.function, self.shape = function, shape

    def __call__(self, x, y=None, eval_gradient=False):
        x = x.reshape(-1, *self.shape)
        with jax.enable_x64(True):
            return np.array(self.function(x, x if y is None else y.reshape(-1, *self.shape)))

    def diag(self, x):
        return np.diag(self(x))

    def is_stationary(self):
        return False


def _peer(kernel, x, y, noise):
    wrapped = Wrapped(kernel, x.shape[1:])
    regressor = GaussianProcessRegressor(wrapped, alpha=noise, optimizer=None)
    return regressor.fit(x.reshape(len(x), -1), y)


def _kernel(**options):
    return functools.partial(limit_ntk, **({"rho": 2.0, "beta": 0.7} | options))


def _flow(kernel, x=X, y=Y, **options):
    return KernelFlow(kernel, x, y, block_size=16, progress=False, **options)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_mean_and_covariance_are_scikit_learns(solver, outputs):
    flow = _flow(_kernel(), y=Y[:, :outputs], solver=solver, tolerance=1e-10)
    mean, covariance = flow.posterior(NEW, NOISE)
    peer = _peer(_kernel(), X, Y[:, :outputs], NOISE)
    expected, expected_covariance = peer.predict(NEW, return_cov=True)
    np.testing.assert_allclose(mean, np.reshape(expected, (M, outputs)), rtol=1e-7, atol=1e-8)
    expected_covariance = np.reshape(expected_covariance, (M, M, -1))[:, :, 0]
    np.testing.assert_allclose(covariance, expected_covariance, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(covariance, covariance.T)


def test_a_krylov_methods_covariance_is_as_precise_as_the_noise(caplog):
    x, y = RNG.uniform(size=(250, 4)), RNG.normal(size=(250, 1))
    expected = _flow(_kernel(), x, y, solver="eigh").posterior(NEW, 1e-3)
    krylov = functools.partial(_flow, _kernel(), x, y, solver="krylov")
    with caplog.at_level(logging.WARNING, "dnntk"):
        mean, covariance = krylov().posterior(NEW, 1e-3)
        assert not caplog.text
        krylov(max_iterations=4).posterior(NEW, 1e-3)
    np.testing.assert_allclose(mean, expected[0], atol=1e-6)
    np.testing.assert_allclose(covariance, expected[1], rtol=0, atol=1e-9)
    assert "not converged at t = inf" in caplog.text


def test_the_mean_is_the_flow_at_infinity_with_its_ridge_and_begins_at_f_0():
    flow = _flow(_kernel(), ridge=0.01, initial=0.3 * Y)
    mean, covariance = flow.posterior(NEW, initial=2.0)
    np.testing.assert_allclose(mean, flow.predict(NEW, initial=2.0), rtol=1e-9)
    for got, same in zip(flow.posterior(NEW, N * 0.01), (mean - 2, covariance), strict=True):
        np.testing.assert_allclose(got, same, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_evidence_is_scikit_learns(outputs):
    flow, peer = _flow(_kernel(), y=Y[:, :outputs]), _peer(_kernel(), X, Y[:, :outputs], NOISE)
    expected = peer.log_marginal_likelihood()
    assert flow.log_marginal_likelihood(NOISE) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("x", [X, np.concatenate([X[:12], X[:3]]), IMAGES])
def test_its_gradient_is_that_of_finite_differences(x):
    """Also for coincident inputs, and for images."""
    y, at, width = Y[: len(x), :2], {"noise": NOISE, "rho": 2.0, "beta": 0.7}, 1e-5

    def evidence(noise, **parameters):
        return _peer(_kernel(**parameters), x, y, noise).log_marginal_likelihood()

    value, gradient = _flow(_kernel(), x, y).log_marginal_likelihood(NOISE, eval_gradient=True)
    assert value == pytest.approx(evidence(**at), rel=1e-9) and set(gradient) == set(at)
    for name, middle in at.items():
        above, below = (evidence(**at | {name: middle + d}) for d in (width, -width))
        assert gradient[name] == pytest.approx((above - below) / (2 * width), rel=1e-6, abs=1e-6)


def test_parameters_are_float_keywords():
    assert parameters_of(limit_ntk) == {"rho": 1.0, "beta": 1.0}
    assert parameters_of(functools.partial(limit_ntk, rho=3, d_out=2)) == {"rho": 3, "beta": 1.0}
    assert parameters_of(lambda a, b: a @ b.T) == {}
    bound = functools.partial(lambda a, b, width, name: a, width=np.float32(0.5), name="rbf")
    assert parameters_of(bound) == {"width": 0.5}


def test_a_matrix_valued_kernel_joins_the_outputs():
    def kernel(a, b, *, scale=0.5):
        return scale * _kernel()(a, b)[:, :, None, None] * jnp.asarray(MIXING, a.dtype)[None, None]

    flow = _flow(kernel)
    mean, covariance = flow.posterior(NEW, NOISE)
    with jax.enable_x64(True):
        gram, cross, prior = (
            np.kron(0.5 * np.asarray(_kernel()(a, b)), MIXING)
            for a, b in ((X, X), (NEW, X), (NEW, NEW))
        )
    shifted = gram + NOISE * np.eye(3 * N)
    np.testing.assert_allclose(mean.ravel(), cross @ np.linalg.solve(shifted, Y.ravel()), atol=1e-9)
    expected = prior - cross @ np.linalg.solve(shifted, cross.T)
    np.testing.assert_allclose(covariance.reshape(3 * M, 3 * M), expected, atol=1e-9)
    assert covariance.shape == (M, 3, M, 3)
    value, gradient = flow.log_marginal_likelihood(NOISE, eval_gradient=True)
    fit = Y.ravel() @ np.linalg.solve(shifted, Y.ravel())
    expected = -0.5 * (fit + np.linalg.slogdet(2 * math.pi * shifted)[1])
    assert value == pytest.approx(expected, rel=1e-10)
    weights, inverse = np.linalg.solve(shifted, Y.ravel()), np.linalg.inv(shifted)
    by_scale = 0.5 * (weights @ gram @ weights - np.sum(inverse * gram)) / 0.5
    assert gradient["scale"] == pytest.approx(by_scale, rel=1e-8)
    assert flow.sample(jax.random.key(0), NEW, NOISE, 4).shape == (4, M, 3)


class FewFeatures:
    """A kernel of four features, which `KernelFlow` diagonalizes instead of the Gram matrix."""

    def __call__(self, a, b):
        return self.features(a) @ self.features(b).T

    def features(self, x):
        return jnp.tanh(3 * jnp.asarray(x))

    def count(self, shape):
        return 4

    def operations(self, shape):
        return 8.0 * shape[0]

    def parts(self, shape):
        return 1

    def product(self, x, vectors, part):
        return self.features(x) @ (self.features(x).T @ vectors)


def test_a_kernel_of_few_features_has_an_evidence_too():
    flow = _flow(FewFeatures())
    value, gradient = flow.log_marginal_likelihood(NOISE, eval_gradient=True)
    assert flow.solution(1.0).solver == "eigendecomposition of the features"
    evidence = lambda noise: _peer(FewFeatures(), X, Y, noise).log_marginal_likelihood()  # noqa: E731
    assert value == pytest.approx(evidence(NOISE), rel=1e-9)
    slope = (evidence(NOISE + 1e-6) - evidence(NOISE - 1e-6)) / 2e-6
    assert gradient == {"noise": pytest.approx(slope, rel=1e-6)}
    mean, covariance = flow.posterior(NEW, NOISE)
    expected = _peer(FewFeatures(), X, Y, NOISE).predict(NEW, return_cov=True)
    np.testing.assert_allclose(mean, expected[0], atol=1e-8)
    np.testing.assert_allclose(covariance, expected[1][:, :, 0], atol=1e-8)


def test_samples_have_the_posteriors_moments():
    flow, count = _flow(_kernel(), y=Y[:, :2]), 20_000
    mean, covariance = flow.posterior(NEW, NOISE)
    drawn = flow.sample(jax.random.key(1), NEW, NOISE, count)
    assert drawn.shape == (count, M, 2) and drawn.dtype == np.float64
    error = np.sqrt(np.diag(covariance) / count)
    assert (np.abs(drawn.mean(0) - mean) < 5 * error[:, None]).all()
    for output in range(2):
        found = np.cov(drawn[:, :, output].T)
        np.testing.assert_allclose(found, covariance, rtol=0, atol=0.05 * covariance.max())
    outputs = np.corrcoef(drawn[:, 0].T)
    assert abs(outputs[0, 1]) < 0.05
    again = draw(jax.random.key(1), mean, covariance, count)
    np.testing.assert_array_equal(again, drawn)


def test_without_noise_it_knows_the_training_values_unless_the_matrix_is_singular():
    flow = _flow(_kernel())
    mean, covariance = flow.posterior(X[:4])
    np.testing.assert_allclose(mean, Y[:4], rtol=1e-6)
    np.testing.assert_allclose(covariance, 0, atol=1e-9)
    twice = _flow(_kernel(), np.concatenate([X, X[:1]]), np.concatenate([Y, Y[:1]]))
    posterior, sample = twice.posterior, functools.partial(twice.sample, jax.random.key(0))
    for noise in (0.0, 1e-18):  # the second is less than the eigenvalues' rounding errors
        for call in (
            twice.log_marginal_likelihood,
            *(functools.partial(f, NEW) for f in (posterior, sample)),
        ):
            with pytest.raises(InputError, match="noise: expected more than .*set noise to"):
                call(noise)
    assert np.isfinite(twice.log_marginal_likelihood(1e-9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow: flow.posterior(NEW, -1.0), "noise: expected a finite number >= 0, got -1"),
        (lambda flow: flow.posterior(NEW[:, :2], 1.0), r"x: expected \[n, 4\]"),
        (lambda flow: flow.posterior(NEW, 1.0, initial=Y), r"initial: expected shape \[6, 3\]"),
        (lambda flow: flow.sample("seed", NEW, 1.0), "key: expected a random key of JAX"),
        (lambda flow: flow.sample(jax.random.key(0), NEW, 1.0, 0), "samples must be a positive"),
        (lambda flow: flow.log_marginal_likelihood(math.nan), "noise: expected"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(_flow(_kernel()))


def test_what_does_not_fit_or_cannot_be_had_is_said(caplog):
    small = _flow(_kernel(), solver="krylov", memory=20_000)
    with caplog.at_level(logging.WARNING, "dnntk"):
        with pytest.raises(InputError, match="x: expected points whose covariance fits.*GB"):
            small.posterior(np.repeat(NEW, 20, 0), 1.0)
        with pytest.raises(InputError, match="solver: expected eigh, as the evidence needs"):
            small.log_marginal_likelihood(1.0)

    def stepped(a, b, *, scale=1.0):
        return a @ b.T * float(scale)

    with pytest.raises(InputError, match="kernel: expected one that JAX differentiates by scale"):
        _flow(stepped).log_marginal_likelihood(1.0, eval_gradient=True)
