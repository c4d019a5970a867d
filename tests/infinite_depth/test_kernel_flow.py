import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import dnntk
from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.kernel import limit_ntk

N, M, D_OUT = 60, 9, 2
TIMES = (0.0, 0.3, 7.0, 400.0)


def _points(n, *shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (n, *shape))


X, NEW = _points(N, 5), _points(M, 5, seed=1)
Y = np.stack([np.sin(X.sum(1)), X[:, 0] * X[:, 1] - 0.3], 1)
KERNEL = functools.partial(limit_ntk, d_out=D_OUT, rho=2.0)


def _flow(kernel=KERNEL, x=X, y=Y, **options):
    options = {"block_size": 32, "tolerance": 1e-9, "progress": False} | options
    return KernelFlow(kernel, x, y, **options)


@functools.cache
def _matrices():
    with jax.enable_x64(True):
        return np.asarray(KERNEL(X)), np.asarray(KERNEL(NEW, X))


@functools.cache
def _of(solver, ridge=0.0):
    return _flow(solver=solver, ridge=ridge)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_closed_form_at_any_time(solver, ridge):
    gram, cross = _matrices()
    a = gram / N + ridge * np.eye(N)
    for t in TIMES:
        learnt = np.linalg.solve(a, Y - scipy.linalg.expm(-t * a) @ Y) / N
        got = _of(solver, ridge).predict(NEW, t)
        np.testing.assert_allclose(got, cross @ learnt, rtol=0, atol=1e-8)
        train = _of(solver, ridge).train_predictions(t)
        np.testing.assert_allclose(train, gram @ learnt, rtol=0, atol=1e-8)
    at_end = cross @ np.linalg.solve(N * a, Y)
    np.testing.assert_allclose(_of(solver, ridge).predict(NEW), at_end, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_starts_at_zero_and_ends_at_the_targets(solver):
    assert not _of(solver).predict(NEW, 0).any()
    assert not _of(solver).train_predictions(0).any()
    np.testing.assert_allclose(_of(solver).train_predictions(), Y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_loss_is_that_of_the_training_predictions(solver):
    flow = _of(solver)
    expected = [0.5 * np.mean(np.sum((f - Y) ** 2, 1)) for f in flow.train_predictions(TIMES)]
    np.testing.assert_allclose(flow.loss(TIMES), expected, rtol=1e-9)
    assert flow.loss(7.0) == pytest.approx(expected[2], rel=1e-9)
    assert np.all(np.diff(expected) < 0)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_two_composed_times_are_their_sum(solver):
    first = _of(solver)
    start, start_new = first.train_predictions(2.0), first.predict(NEW, 2.0)
    then = _flow(solver=solver, initial=start)
    for more in (5.0, math.inf):
        whole = first.predict(NEW, 2.0 + more)
        got = then.predict(NEW, more, initial=start_new)
        np.testing.assert_allclose(got, whole, rtol=0, atol=1e-7)
        train = then.train_predictions(more)
        np.testing.assert_allclose(train, first.train_predictions(2.0 + more), rtol=0, atol=1e-8)


def test_solvers_agree_within_what_they_report():
    for tolerance in (1e-3, 1e-6):
        loose = _flow(solver="krylov", tolerance=tolerance)
        for t in (50.0, math.inf):
            gap = loose.train_predictions(t) - _of("eigh").train_predictions(t)
            solution = loose.solution(t)
            assert solution.converged and 0 < solution.iterations < N / 2
            assert np.linalg.norm(gap) <= 1.01 * solution.residual * np.linalg.norm(Y)


def test_what_has_not_converged_is_said(caplog):
    with caplog.at_level(logging.WARNING, "dnntk"):
        assert np.isfinite(_flow(solver="krylov", max_iterations=2).predict(NEW, 1e4)).all()
    assert "not converged at t = 10000" in caplog.text and "2 iterations" in caplog.text


def test_condition_is_that_of_the_filter():
    values = np.linalg.eigvalsh(_matrices()[0] / N)
    assert _flow(solver="krylov").eigenvalues[-1] == pytest.approx(values[-1], rel=1e-12)
    assert _of("eigh").solution().condition == pytest.approx(values[-1] / values[0], rel=1e-3)
    # At a short time every eigenvalue that matters is within 1/t of the others.
    assert _of("eigh").solution(1e-6).condition == pytest.approx(1, rel=1e-4)
    assert _of("eigh", 0.01).solution().condition < values[-1] / 0.01 + 2


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_blocks_and_order_do_not_matter(solver):
    order = np.random.default_rng(2).permutation(N)
    whole = _of(solver).predict(NEW, (7.0, math.inf))
    for options in ({"block_size": 7}, {"block_size": 1000}, {"x": X[order], "y": Y[order]}):
        got = _flow(solver=solver, **options).predict(NEW[::-1], (7.0, math.inf))
        np.testing.assert_allclose(got[:, ::-1], whole, rtol=0, atol=1e-7)
    np.testing.assert_allclose(_of(solver).predict(NEW[3:4], 7.0), whole[0, 3:4], atol=1e-12)


def test_several_times_are_the_single_ones():
    flow = _of("eigh")
    together = flow.predict(NEW, TIMES)
    assert together.shape == (len(TIMES), M, D_OUT) and together.dtype == np.float64
    for t, each in zip(TIMES, together, strict=True):
        np.testing.assert_allclose(flow.predict(NEW, t), each, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_a_matrix_valued_kernel_is_one_for_all_outputs(solver):
    mixing = np.array([[2.0, 0.5], [0.5, 1.0]])

    def kernel(x1, x2):
        return KERNEL(x1, x2)[:, :, None, None] * jnp.asarray(mixing, x1.dtype)[None, None]

    gram, cross = (np.kron(k, mixing) for k in _matrices())
    values, vectors = np.linalg.eigh(gram / N)
    learnt = vectors @ (-np.expm1(-7.0 * values) / values * (vectors.T @ Y.ravel())) / N
    flow = _flow(kernel, solver=solver)
    got = flow.predict(NEW, (7.0, 0.0))
    np.testing.assert_allclose(got[0], (cross @ learnt).reshape(M, D_OUT), rtol=0, atol=1e-8)
    train = flow.train_predictions((7.0, 0.0))
    np.testing.assert_allclose(train[0], (gram @ learnt).reshape(N, D_OUT), rtol=0, atol=1e-8)
    assert not got[1].any() and train.shape == (2, N, D_OUT)


def test_thousands_of_descent_steps_of_a_linearized_network(x64):
    """Gradient descent is Euler's method for the flow: it differs by O(1 / steps)."""
    net, time = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(D_OUT)]), 20.0
    jax.config.update("jax_numpy_rank_promotion", "allow")  # flax's own broadcasting
    try:
        x, y = jnp.asarray(X[:20]), jnp.asarray(Y[:20])
        variables = jax.jit(net.init)(jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, x.dtype), variables)
        kernel = functools.partial(dnntk.empirical_ntk_fn(net), variables)

        def linear(params, inputs):
            value, change = jax.jvp(lambda p: net.apply(p, inputs), (variables,), (params,))
            return value + change

        @jax.jit
        def descended(steps):
            def step(_, params):
                loss = lambda p: 0.5 * jnp.mean(jnp.sum((linear(p, x) - y) ** 2, 1))  # noqa: E731
                gradient = jax.grad(loss)(params)
                return jax.tree.map(lambda p, g: p - time / steps * g, params, gradient)

            start = jax.tree.map(jnp.zeros_like, variables)
            return linear(jax.lax.fori_loop(0, steps, step, start), jnp.asarray(NEW))

        outputs = net.apply(variables, x)
        flow = _flow(kernel, X[:20], Y[:20], initial=outputs)
        predicted = flow.predict(NEW, time, initial=net.apply(variables, NEW))
        # Richardson: what is left of Euler's error after its leading term is O(1 / steps^2).
        coarse, fine = descended(2000), descended(4000)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")
    first = np.abs(fine - predicted).max()
    assert first < 5e-3
    assert np.abs(2 * fine - coarse - predicted).max() < 1e-2 * first + 1e-9


def test_one_output_is_a_column():
    flow, column = _flow(y=Y[:, 0]), _flow(y=Y[:, :1])
    assert flow.predict(NEW, 5.0).shape == (M, 1)
    np.testing.assert_array_equal(column.train_predictions(5.0), flow.train_predictions(5.0))


def test_a_networks_own_ntk_predicts_its_linearization():
    """A finite deep network's kernel is within O(1 / sqrt(depth)) of the limit."""
    depth = 400
    model = dnntk.DeepNarrowMLP(depth, 1, depth**2.2, rho=2.0)
    variables = jax.jit(model.init)(jax.random.key(0), X[:1].astype(np.float32))
    kernel = functools.partial(dnntk.empirical_ntk, model, variables)
    own = _flow(kernel, y=Y[:, :1], dtype="float32", block_size=N).train_predictions(5.0)
    limit = _flow(functools.partial(limit_ntk, rho=2.0), y=Y[:, :1]).train_predictions(5.0)
    assert 1e-4 < np.abs(own - limit).max() < 0.1


def test_memory_decides_how_the_gram_matrix_is_kept(caplog, tmp_path):
    with caplog.at_level(logging.INFO, "dnntk"):
        flow = _flow(solver="krylov", memory=20_000, max_iterations=3, tolerance=0.5)
        solution = flow.solution(0.1)
    assert "evaluated for every product" in caplog.text
    assert not flow.gram.stored and solution.iterations <= 3
    kept = _flow(solver="krylov", max_iterations=3, tolerance=0.5).solution(0.1)
    np.testing.assert_allclose(solution.coefficients, kept.coefficients, rtol=1e-9)
    disk = _flow(solver="krylov", memory=20_000, tolerance=0.5, folder=tmp_path)
    np.testing.assert_allclose(
        disk.solution(0.1).coefficients, kept.coefficients, rtol=1e-9, atol=1e-12
    )
    assert disk.gram.stored


def test_one_gram_matrix_serves_its_leading_examples():
    whole = _flow()
    whole.solution(1.0)
    for solver in ("eigh", "krylov"):
        part = _flow(x=X[:37], y=Y[:37], gram=whole.gram, solver=solver)
        alone = _flow(x=X[:37], y=Y[:37])
        np.testing.assert_allclose(part.predict(NEW), alone.predict(NEW), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_coincident_inputs_are_explained_and_finite_times_go(solver):
    x, y = np.concatenate([X, X[:5]]), np.concatenate([Y, Y[:5] + 1])
    flow = _flow(x=x, y=y, solver=solver)
    with pytest.raises(InputError, match="not positive definite.*drop coincident"):
        flow.predict(NEW)
    assert np.isfinite(flow.predict(NEW, 1e5)).all()
    assert np.isfinite(_flow(x=x, y=y, solver=solver, ridge=1e-6).predict(NEW)).all()
    # Two targets of one input are met half way.
    middle = flow.train_predictions(1e5)[:5]
    np.testing.assert_allclose(middle, flow.train_predictions(1e5)[-5:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda a, b: -KERNEL(a, b), "positive semidefinite.*eigenvalue -"),
        (lambda a, b: KERNEL(a, b) * jnp.nan, "expected finite values, got NaN"),
        (lambda a, b: KERNEL(a, b) + a[:, :1], "k\\(x, x'\\) = k\\(x', x\\)"),
        (lambda a, b: KERNEL(a, b)[:, :, None], "expected \\[n1, n2\\]"),
    ],
)
@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_what_is_no_kernel_is_refused(kernel, message, solver):
    with pytest.raises(InputError, match=message):
        _flow(kernel, solver=solver).predict(NEW, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": Y[:-1]}, "y_train: expected \\[n, d_out\\] with n = 60"),
        ({"y": Y * np.nan}, "y_train: expected finite numbers, got nan"),
        ({"x": X[:, 0]}, "x_train: expected examples"),
        ({"x": np.full_like(X, np.inf)}, "x_train: expected finite"),
        ({"ridge": -1.0}, "ridge: expected"),
        ({"ridge": math.nan}, "ridge: expected"),
        ({"solver": "svd"}, "solver: expected one of"),
        ({"tolerance": 0.0}, "tolerance: expected"),
        ({"memory": 0.0}, "memory: expected"),
        ({"block_size": 0}, "block_size must be"),
        ({"dtype": "float16"}, "dtype: expected one of"),
        ({"initial": Y[:3]}, "initial: expected shape"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InputError, match=message):
        _flow(**change)


@pytest.mark.parametrize(
    ("y", "ridge", "words"),
    [(Y[:, :1], 0.0, "y_train: expected shape"), (Y, -1.0, "ridge: expected"), (Y, "a", "ridge:")],
)
def test_other_targets_are_checked_as_the_first_ones(y, ridge, words):
    with pytest.raises(InputError, match=words):
        _flow().for_targets(y, ridge=ridge)


def test_another_flows_matrix_is_refused():
    with pytest.raises(InputError, match="gram: expected the matrix of x_train"):
        _flow(gram=_flow(x=NEW, y=Y[:M]).gram)


@pytest.mark.parametrize("time", [-1.0, math.nan, "soon", []])
def test_bad_times(time):
    with pytest.raises(InputError, match="time: expected"):
        _of("eigh").predict(NEW, time)


def test_points_of_another_shape():
    with pytest.raises(InputError, match="x: expected \\[n, 5\\]"):
        _of("eigh").predict(NEW[:, :4])


def test_a_killed_solve_goes_on_where_it_was(tmp_path):
    """Products are counted by the kernel: a second process needs none for what was done."""
    options = {"solver": "krylov", "folder": tmp_path, "block_size": 20}
    short = _flow(max_iterations=3, **options).solution()
    assert not short.converged and short.iterations == 3
    again = _flow(**options)
    again.solution(0.0)
    products = []
    product = again.gram.product
    again._solver._product = lambda v: products.append(1) or product(v) / N
    whole = again.solution()
    assert whole.iterations == len(products) + 3
    np.testing.assert_array_equal(whole.coefficients, _flow(**options).solution().coefficients)
    np.testing.assert_allclose(again.predict(NEW), _of("eigh").predict(NEW), rtol=0, atol=1e-7)
    for file in list(tmp_path.glob("krylov-*/*.npz"))[1:]:
        file.write_bytes(file.read_bytes()[:-50])  # cut short: iterated again
    np.testing.assert_array_equal(whole.coefficients, _flow(**options).solution().coefficients)
    other = _flow(y=Y[:, ::-1], **options).predict(NEW)
    np.testing.assert_allclose(other, again.predict(NEW)[:, ::-1], rtol=0, atol=1e-7)
