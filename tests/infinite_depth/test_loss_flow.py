"""The flow on other losses, beside SciPy's Radau method on the same equation, written plainly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.loss_flow import _BDF, _Problem, _Shifted
from dnntk.infinite_depth.pointwise_loss import Pointwise
from dnntk.training.losses import squared

N, M = 18, 4
TIMES = (0.0, 0.3, 40.0, 900.0)
RNG = np.random.default_rng(0)
X, NEW = RNG.uniform(0, 1, (N, 3)), RNG.uniform(0, 1, (M, 3))
CLASSES = (X @ [1.0, -2.0, 1.5] > 0.3).astype(int) + (X[:, 1] > 0.6)
START = RNG.normal(size=(N, 3))
TARGETS = {1: 0.9 * (CLASSES[:, None] > 0) + 0.05, 3: np.eye(3)[CLASSES]}


def kernel(x1, x2):
    """A kernel of wide spectrum, without a compiler's help."""
    return 1 + 5 * x1 @ x2.T + jnp.exp(-((x1[:, None] - x2[None]) ** 2).sum(-1))


def matrix_kernel(x1, x2):
    """One that couples the outputs."""
    mixing = jnp.array([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 0.5]])
    return jnp.einsum("ij,op->ijop", kernel(x1, x2), mixing)


def huber_like(outputs, target):
    return jnp.sum(jnp.sqrt(1 + (outputs - target) ** 2))


def derivative(loss, f, y):
    if loss is huber_like:
        return (f - y) / np.sqrt(1 + (f - y) ** 2)
    return (scipy.special.expit(f) if y.shape[1] == 1 else scipy.special.softmax(f, 1)) - y


def mean_loss(loss, f, y):
    if loss is huber_like:
        return np.mean(np.sum(np.sqrt(1 + (f - y) ** 2), 1))
    if y.shape[1] == 1:
        return np.mean(np.logaddexp(0, f) - y * f)
    return np.mean(-np.sum(y * scipy.special.log_softmax(f, 1), 1))


def blocks(kernel, x1, x2, k):
    """The kernel between two sets as a matrix on flattened outputs [n k]."""
    with jax.enable_x64(True):
        found = np.asarray(kernel(jnp.asarray(x1), jnp.asarray(x2)))
    if found.ndim == 2:
        found = found[:, :, None, None] * np.eye(k)
    return found.transpose(0, 2, 1, 3).reshape(len(x1) * k, len(x2) * k)


def plainly(kernel, loss, y, start, ridge):
    """(f_t(X), f_t(NEW) - f_0(NEW)) at `TIMES`: a' = -dloss/df / N - ridge a."""
    k = y.shape[1]
    gram = blocks(kernel, X, X, k)

    def slope(_, a):
        f = start + (gram @ a).reshape(N, k)
        return -derivative(loss, f, y).ravel() / N - ridge * a

    found = scipy.integrate.solve_ivp(
        slope, (0, TIMES[-1]), np.zeros(N * k), "Radau", TIMES, rtol=1e-9, atol=1e-11
    )
    of_new = blocks(kernel, NEW, X, k)
    return [(start + (gram @ a).reshape(N, k), (of_new @ a).reshape(M, k)) for a in found.y.T]


CASES = {
    "sigmoid": (kernel, "cross_entropy", 1, False, 0.0),
    "softmax": (kernel, "cross_entropy", 3, True, 0.0),
    "matrix kernel, ridge": (matrix_kernel, "cross_entropy", 3, False, 0.01),
    "function": (kernel, huber_like, 3, False, 0.0),
}


def flow(kernel=kernel, loss="cross_entropy", outputs=3, y=None, **options):
    y = TARGETS[outputs] if y is None else y
    return KernelFlow(kernel, X[: len(y)], y, loss=loss, progress=False, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_flow_is_that_of_a_plain_integration(case):
    kernel, loss, k, started, ridge = CASES[case]
    y = TARGETS[k]
    start = START[:, :k] if started else np.zeros((N, k))
    got = flow(kernel, loss, k, ridge=ridge, initial=start)
    for at, expected in enumerate(plainly(kernel, loss, y, start, ridge)):
        np.testing.assert_allclose(got.train_predictions(TIMES)[at], expected[0], atol=1e-6)
        np.testing.assert_allclose(got.predict(NEW, TIMES)[at], expected[1], atol=1e-6)
        assert got.loss(TIMES)[at] == pytest.approx(mean_loss(loss, expected[0], y), abs=1e-7)
        found = got.solution(TIMES[at])
        assert found.converged and found.residual <= 1e-6 and found.solver == "BDF"


def test_squared_error_is_the_closed_form_in_any_order_of_times():
    y, closed = TARGETS[3], KernelFlow(kernel, X, TARGETS[3], progress=False)
    got = flow(loss=squared)
    for t in (900.0, 0.01, 30.0):
        np.testing.assert_allclose(got.predict(NEW, t), closed.predict(NEW, t), atol=1e-6)
    assert got.loss(30.0) == pytest.approx(closed.loss(30.0), abs=1e-7)
    np.testing.assert_allclose(flow(loss=squared, initial=y).predict(NEW, 5.0), 0, atol=1e-15)


def test_errors_at_short_times_are_relative_to_these(caplog):
    got, slope = flow(), -derivative("", np.zeros((N, 3)), TARGETS[3])
    start = blocks(kernel, NEW, X, 3) @ slope.ravel() / N
    for t in (1e-300, 1e-13, 1e-9, 300.0, 1e-11):
        found = got.predict(NEW, t)
        if t < 1:
            np.testing.assert_allclose(found.ravel() / t, start, rtol=0, atol=1e-7)
            assert got.solution(t).residual < 1e-7
    assert not caplog.records


def test_the_solver_takes_the_steps_of_scipys_with_a_dense_jacobian(monkeypatch):
    """Names inside SciPy's class on which `_BDF` rests."""
    solved = []
    solve = _Shifted.solve
    monkeypatch.setattr(_Shifted, "solve", lambda *each: solved.append(1) or solve(*each))
    values, vectors = np.linalg.eigh(blocks(kernel, X, X, 1) / N)
    values, vectors = values[-8:], vectors[:, -8:]
    roots, y = np.sqrt(values)[:, None], TARGETS[3]
    problem = _Problem(Pointwise("cross_entropy", y), np.zeros((N, 3)), roots, vectors, 0.01)
    pushed = np.kron(vectors * roots[:, 0], np.eye(3))

    def jacobian(_, b):
        p = scipy.special.softmax((pushed @ b).reshape(N, 3), 1)
        hessian = scipy.linalg.block_diag(*(np.diag(row) - np.outer(row, row) for row in p))
        return -pushed.T @ hessian @ pushed - 0.01 * np.eye(len(b))

    ours = _BDF(problem, 0.1, 1.0)
    options = {"rtol": ours.rtol, "atol": ours.atol, "jac": jacobian}
    plain = scipy.integrate.BDF(problem.derivative, 0.0, np.zeros(24), math.inf, **options)
    for _ in range(110):
        ours.step()
        plain.step()
    assert ours.t > 100 and plain.njev > 1
    assert (ours.nlu, ours.nfev) == (plain.nlu, plain.nfev) and len(solved) >= ours.nlu
    np.testing.assert_allclose(ours.t, plain.t, rtol=1e-6)
    np.testing.assert_allclose(ours.y, plain.y, atol=1e-8)


def test_the_flow_ends_where_its_derivative_is_zero():
    smooth = 0.9 * TARGETS[3] + 0.1 / 3
    end = flow(y=smooth, initial=START).train_predictions()
    np.testing.assert_allclose(scipy.special.softmax(end, 1), smooth, rtol=1e-9)
    np.testing.assert_allclose(end.sum(1), START.sum(1), atol=1e-9)
    decayed = flow(ridge=0.03)
    f, c = decayed.train_predictions(), N * decayed.solution().coefficients
    np.testing.assert_allclose(0.03 * c, -derivative("", f, TARGETS[3]), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "time: expected a finite one"),
        ({"y": 2 * TARGETS[3]}, r"y_train: expected probabilities in \[0, 1\].*got 2"),
        ({"y": 0.5 * TARGETS[3]}, "y_train: expected rows that add up to 1.*got the sum 0.5"),
        ({"solver": "krylov"}, "solver: expected auto or eigh"),
        ({"loss": "hinge"}, "loss: expected squared, cross_entropy or a function"),
        ({"loss": lambda f, y: f - y}, r"loss: .*got an array of shape \[3\]"),
        ({"loss": lambda f, y: float(f)}, "loss: .*that JAX can trace"),
        (
            {"loss": lambda f, y: np.sum(np.asarray(f) - y)},
            "got TracerArrayConversionError: The numpy.ndarray conversion .* with jax.numpy$",
        ),
        ({"loss": lambda f, y: -jnp.sum((f - y) ** 2)}, "loss: expected a convex.* at t = 0;"),
        ({"loss": lambda f, y: jnp.sum(jnp.sqrt(f - 1) * y)}, "loss: expected finite derivatives"),
    ],
)
def test_bad_input_is_one_line(given, message):
    with pytest.raises(InputError, match=message) as error:
        flow(**given).predict(NEW, math.inf if not given else 1.0)
    assert "\n" not in str(error.value)


def test_what_has_a_closed_form_for_squared_error_alone_says_so():
    other = flow(outputs=1)
    calls = (
        lambda: other.predict(NEW, 1.0, time_step=0.1),
        lambda: other.leave_one_out(1.0),
        lambda: other.influence(NEW, 1.0),
        lambda: other.max_time_step(),
        lambda: other.posterior(NEW, 0.1),
        lambda: other.log_marginal_likelihood(0.1),
        lambda: other.for_targets(TARGETS[1], ridge=0.0),
    )
    for call in calls:
        with pytest.raises(InputError, match="expected a flow of loss=squared"):
            call()
