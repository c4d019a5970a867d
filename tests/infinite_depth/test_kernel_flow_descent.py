"""`KernelFlow` with a time step against thousands of plain steps on the parameters."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow

N, M, FEATURES = 30, 7, 45
RNG = np.random.default_rng(0)
X, NEW = RNG.normal(size=(N, 4)), RNG.normal(size=(M, 4))
WEIGHTS = RNG.normal(size=(4, FEATURES))
Y = np.stack([np.sin(X.sum(1)), X[:, 0] * X[:, 1], np.abs(X[:, 2])], 1)
INITIAL = 0.1 * np.ones((N, 3))


def _features(x, xp=np):
    return xp.tanh(x @ WEIGHTS) + 1


def _kernel(a, b):
    return _features(a, jnp) @ _features(b, jnp).T


@functools.cache
def _flow(solver="eigh", outputs=3, ridge=0.0):
    y, start = (Y, INITIAL) if outputs == 3 else (Y[:, 0], None)
    options = {"initial": start, "solver": solver, "ridge": ridge, "progress": False}
    return KernelFlow(_kernel, X, y, tolerance=1e-9, **options)


def _descended(counts, step, momentum, outputs, ridge):
    """Outputs at X and NEW after numbers of steps, as optax.sgd takes them."""
    phi, y = _features(X), Y - INITIAL if outputs == 3 else Y[:, :1]
    params = np.zeros((FEATURES, outputs))
    trace, found = np.zeros_like(params), []
    for count in range(max(counts) + 1):
        if count in counts:
            found.append((phi @ params + Y[:, :outputs] - y, _features(NEW) @ params))
        gradient = phi.T @ (phi @ params - y) / N + ridge * params
        trace = momentum * trace + gradient
        params = params - step * trace
    return [np.array(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
@pytest.mark.parametrize(
    ("momentum", "outputs", "ridge"), [(0.0, 3, 0.0), (0.5, 1, 0.1), (0.9, 3, 0.01), (0.99, 1, 0.0)]
)
def test_it_is_where_thousands_of_steps_end(solver, momentum, outputs, ridge):
    flow, counts = _flow(solver, outputs, ridge), (0, 1, 2, 37, 3000)
    for fraction in (0.03, 0.6, 0.98):
        step = fraction * flow.max_time_step(momentum)
        times = np.array(counts) * step / (1 - momentum)
        train, new = _descended(counts, step, momentum, outputs, ridge)
        got = flow.train_predictions(times, step, momentum)
        np.testing.assert_allclose(got, train, rtol=0, atol=1e-7)
        np.testing.assert_allclose(flow.predict(NEW, times, step, momentum), new, rtol=0, atol=1e-6)
        losses = 0.5 * np.mean(np.sum((train - Y[:, :outputs]) ** 2, 2), 1)
        np.testing.assert_allclose(flow.loss(times, step, momentum), losses, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_largest_stable_step_is_sharp(momentum):
    flow, steps = _flow(ridge=0.1), 1000
    limit = flow.max_time_step(momentum)
    below, above = (
        flow.loss([0, steps * c * limit / (1 - momentum)], c * limit, momentum)
        for c in (0.99, 1.01)
    )
    assert below[1] < 0.5 * below[0] and above[1] > 1e6 * above[0]
    # Beyond it the outputs are those of the steps, too.
    step = 1.05 * limit
    train, _ = _descended([40], step, momentum, 3, 0.1)
    for solver in ("eigh", "krylov"):
        got = _flow(solver, 3, 0.1).train_predictions(40 * step / (1 - momentum), step, momentum)
        np.testing.assert_allclose(got, train[0], atol=1e-8 * np.abs(train).max())


def test_descent_ends_where_the_flow_does_and_small_steps_follow_it():
    flow = _flow(ridge=0.1)
    step = 0.9 * flow.max_time_step(0.9)
    np.testing.assert_array_equal(flow.predict(NEW, math.inf, step, 0.9), flow.predict(NEW))
    np.testing.assert_allclose(flow.predict(NEW, 3.0, 1e-7), flow.predict(NEW, 3.0), atol=1e-5)
    assert flow.solution(step * 10, step, 0.9).time == pytest.approx(step * 10)


@pytest.mark.parametrize(
    ("time", "step", "momentum", "message"),
    [
        (1.0, 0.3, 0.0, r"time: expected a whole number.*= 0.3, got 1, 3.33.*0.9 and 1.2"),
        (1.0, None, 0.9, "momentum: expected 0 for gradient flow, got 0.9; give a time_step"),
        (1.0, 0.1, 1.0, "momentum: expected a number at least 0 and below 1, got 1.0"),
        (1.0, 0.1, math.nan, "momentum: expected"),
        (1.0, 0.0, 0.0, "time_step: expected a finite number above 0"),
        (1.0, "fast", 0.0, "time_step: expected"),
        (math.inf, 5.0, 0.0, "time_step: expected less than max_time_step.*does not converge"),
        (1e5, 5.0, 0.0, r"time_step: expected descent within float64, got 5.*overflows before"),
    ],
)
def test_steps_that_cannot_be_taken_are_explained(time, step, momentum, message):
    for solver in ("eigh", "krylov"):
        with pytest.raises(InputError, match=message):
            _flow(solver).predict(NEW, time, step, momentum)
