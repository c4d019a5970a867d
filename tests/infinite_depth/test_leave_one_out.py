import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_kernels import kernel, matrix_kernel

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow

TIMES = (0.0, 1e-3, 3.0, 1e4, 1e8)
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(0, 1, (40, 3)), RNG.normal(size=(40, 2))
START = RNG.normal(size=(40, 2))


def rank_four(x1, x2):
    return 1 + x1 @ x2.T


def _flow(k, rows, ridge=0.0):
    options = {"initial": START[rows], "ridge": ridge, "progress": False}
    return KernelFlow(k, X[rows], Y[rows], **options)


def _retrained(k, n, times, ridge):
    """Of the flow without each example, one after the other: [times, n, d_out]."""
    found = []
    for i in range(n):
        rest = _flow(k, np.delete(np.arange(n), i), ridge)
        found.append(rest.predict(X[i : i + 1], times, initial=START[i : i + 1]))
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    ("k", "n", "ridge", "times"),
    [
        (kernel, 2, 0.0, (*TIMES, math.inf)),
        (kernel, 3, 0.01, (*TIMES, math.inf)),
        (kernel, 40, 0.0, TIMES),  # eigenvalues down to rounding
        (kernel, 40, 1e-5, (*TIMES, math.inf)),
        (matrix_kernel, 12, 1e-3, (*TIMES, math.inf)),
        (rank_four, 12, 0.0, TIMES),
    ],
)
def test_it_is_what_training_without_each_example_predicts(k, n, ridge, times):
    got = _flow(k, slice(n), ridge).leave_one_out(times)
    assert got.shape == (len(times), n, 2)
    np.testing.assert_allclose(got, _retrained(k, n, times, ridge), rtol=1e-6, atol=1e-7)


def test_duplicates():
    twice = [*range(10), *range(5)]
    flow = KernelFlow(kernel, X[twice], Y[twice], progress=False)
    rest = KernelFlow(kernel, X[twice[1:]], Y[twice[1:]], progress=False)
    for t in (5.0, 1e8):
        expected = rest.predict(X[:1], t)
        np.testing.assert_allclose(flow.leave_one_out(t)[:1], expected, rtol=1e-6, atol=1e-7)
    # The example that is left out is still known from its twin.
    np.testing.assert_allclose(flow.leave_one_out(1e8)[:5], Y[:5], atol=0.02)
    with pytest.raises(InputError, match="time: expected a finite one, or a ridge"):
        flow.leave_one_out()


def test_another_ridge_needs_no_other_flow():
    got = _flow(kernel, slice(40)).leave_one_out(ridge=0.1)
    np.testing.assert_allclose(got, _flow(kernel, slice(40), 0.1).leave_one_out(), atol=1e-12)
    assert got.shape == (40, 2)


class Features:
    """A kernel with known features, fewer than examples."""

    def count(self, shape):
        return 4

    def operations(self, shape):
        return float(shape[0])

    def features(self, x):
        return jnp.concatenate([jnp.ones((len(x), 1), x.dtype), x], 1)

    def parts(self, shape):
        return 1

    def product(self, x, vectors, part):
        phi = self.features(x)
        return phi @ (phi.T @ vectors)

    def __call__(self, x1, x2):
        return self.features(x1) @ self.features(x2).T


def test_a_kernel_with_known_features():
    flow = _flow(Features(), slice(12), 0.01)
    assert flow.solution(1.0).solver == "eigendecomposition of the features"
    for ridge, times in ((0.0, TIMES), (0.01, (2.0, math.inf))):
        expected = _flow(rank_four, slice(12)).leave_one_out(times, ridge=ridge)
        np.testing.assert_allclose(flow.leave_one_out(times, ridge=ridge), expected, atol=1e-7)


def test_what_cannot_be_left_out_is_said():
    with pytest.raises(InputError, match="x_train: expected at least 2 examples"):
        _flow(kernel, slice(1)).leave_one_out()
    krylov = functools.partial(KernelFlow, kernel, X, Y, solver="krylov", progress=False)
    with pytest.raises(InputError, match='solver: expected eigh.* give solver="eigh"'):
        krylov().leave_one_out(3.0)
    with pytest.raises(InputError, match="ridge: expected a finite number >= 0"):
        krylov().leave_one_out(3.0, ridge=-1)
    with pytest.raises(InputError, match="time: expected one or more numbers"):
        krylov().leave_one_out(-1.0)
