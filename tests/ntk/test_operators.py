"""The NTK as a linear operator, beside the matrix of `empirical_ntk_fn` and NumPy's `eigh`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from flax import nnx
from networks import drawn

from dnntk import DeepNarrowMLP, InputError, empirical_ntk, empirical_ntk_fn, ntk

RNG = np.random.default_rng(0)
N, K = 7, 3


def network(p, x):
    return jnp.tanh(x @ p["first"]) @ p["last"]


def as_matrix(kernel):
    return np.asarray(kernel).transpose(0, 2, 1, 3).reshape(len(kernel) * kernel.shape[2], -1)


def close(found, expected, rtol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.fixture(scope="module")
def case():
    """(operator, its matrix) in chunks of 3, 3 and 1 examples."""
    with jax.enable_x64(True):
        x = RNG.normal(size=(N, 4))
        params = {"first": RNG.normal(size=(4, 5)), "last": RNG.normal(size=(5, K))}
        matrix = as_matrix(empirical_ntk_fn(network)(params, x))
        yield ntk.operator(network, params, x, block_size=3), matrix


def test_products_equal_those_of_the_matrix(case):
    operator, matrix = case
    assert operator.shape == matrix.shape == (N * K, N * K)
    assert operator.dtype == np.float64
    v = RNG.normal(size=(N * K, 2))
    close(operator @ v, matrix @ v)
    close(operator.matvec(v[:, 1]), matrix @ v[:, 1])
    assert operator.matvec(v[:, :0]).shape == (N * K, 0)
    close(operator.diagonal(), np.diag(matrix))


def test_under_jit_vmap_and_grad(case):
    operator, matrix = case
    v = jnp.asarray(RNG.normal(size=(N * K, 2)))
    product, diagonal = jax.jit(lambda operator, v: (operator @ v, operator.diagonal()))(
        operator, v
    )
    close(product, matrix @ v)
    close(diagonal, np.diag(matrix))
    energy = lambda v: jnp.sum(v * jax.vmap(operator.matvec)(v))  # noqa: E731
    close(jax.jit(jax.grad(energy))(v.T).T, 2 * matrix @ v)


def test_leading_eigenpairs_are_those_of_the_matrix(case):
    operator, matrix = case
    expected = np.linalg.eigvalsh(matrix)[::-1]
    for count in (1, 5, N * K - 1, N * K):
        values, vectors = operator.eigsh(count)
        close(values, expected[:count])
        close(vectors.T @ vectors, np.eye(count))
        close(matrix @ vectors, vectors * values)


def test_scipys_solvers_take_it(case):
    operator, matrix = case
    y = RNG.normal(size=N * K)
    system = operator.to_scipy() + scipy.sparse.linalg.aslinearoperator(np.eye(N * K))
    solution, failed = scipy.sparse.linalg.cg(system, y, rtol=1e-10)
    assert not failed
    close(solution, np.linalg.solve(matrix + np.eye(N * K), y), 1e-8)


def test_the_trace_is_exact_from_n_k_samples_and_estimated_with_fewer(case):
    operator, matrix = case
    trace = np.trace(matrix)
    close(operator.trace(jax.random.key(0), N * K), trace)
    found = [float(operator.trace(jax.random.key(seed), 8)) for seed in (0, 1)]
    assert found[0] != found[1]
    np.testing.assert_allclose(found, trace, rtol=0.1)


def test_a_kernel_of_low_rank_has_its_trace_from_few_products(x64):
    w, x = RNG.normal(size=(3, 1)), RNG.normal(size=(N * K, 3))
    operator = ntk.operator(lambda w, x: x @ w, w, x)
    close(operator.trace(jax.random.key(0), 8), np.sum(x**2), 1e-9)
    zero = ntk.operator(lambda w, x: 0 * (x @ w), w, x)
    assert zero.trace(jax.random.key(0), 8) == 0
    assert not zero.eigsh(2)[0].any()


def test_deep_narrow_networks_have_the_scaled_kernel(x64):
    model = DeepNarrowMLP(3, 2, 6.0, parametrization="standard")
    x = RNG.uniform(0.1, 1, (4, 3))
    variables = drawn(model, x, seed=1)
    matrix = as_matrix(empirical_ntk(model, variables, x, method="jacrev"))
    close(ntk.operator(model, variables, x).matvec(np.ones(8)), matrix.sum(1))


@jax.numpy_rank_promotion("allow")  # flax itself promotes ranks
def test_nnx_modules_trees_of_inputs_and_complex_parameters():
    module, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), np.float32(RNG.normal(size=(4, 3)))
    found = ntk.operator(module, nnx.state(module), x, block_size=2) @ np.eye(8)
    close(found, np.kron(x @ x.T + 1, np.eye(2)), 1e-6)
    assert found.dtype == np.float32

    phases = lambda w, x: {"a": jnp.real(x["a"] @ w), "b": x["n"][:, None] * jnp.abs(w[:1])}  # noqa: E731
    w = np.complex64(RNG.normal(size=3) + 1j * RNG.normal(size=3))
    x = {"a": jnp.asarray(x), "n": np.arange(4)}
    found = ntk.operator(phases, w, x, block_size=3) @ np.eye(8)
    jacobian = np.zeros((4, 2, 4))  # by the real parts and the first imaginary part
    jacobian[:, 0, :3] = x["a"]
    jacobian[:, 1, [0, 3]] = x["n"][:, None] * np.array([w[0].real, w[0].imag]) / abs(w[0])
    rows = jacobian.reshape(8, 4)
    close(found, rows @ rows.T, 1e-6)


def test_chunks_are_compiled_once_and_chosen_by_what_passes_store():
    traces = []

    def apply_fn(w, x):
        traces.append(1)
        return jnp.sin(x @ w)

    w, x = np.ones((4, 2), np.float32), np.ones((7, 4), np.float32)
    operator = ntk.operator(apply_fn, w, x, block_size=3)
    operator.matvec(np.ones(14))
    count = len(traces)
    operator.matvec(np.zeros(14))
    assert len(traces) == count
    assert isinstance(operator.x, np.ndarray)
    wide = ntk.operator(lambda w, x: jnp.sin(x @ w), np.ones((4, 2**20)), np.ones((50, 4)))
    assert 1 <= wide.block_size <= 16


def test_bad_arguments_are_named(case):
    operator, _ = case
    linear, w, x = lambda w, x: x @ w, np.ones((3, 2)), np.ones((4, 3))
    assert repr(operator).startswith(f"Operator(shape=({N * K}, {N * K}), dtype=float")
    bad = {
        "v: expected": lambda: operator @ np.ones((N, K)),
        "v must be finite": lambda: operator @ np.full(N * K, np.nan),
        "count: expected at most": lambda: operator.eigsh(N * K + 1),
        "count must be": lambda: operator.eigsh(0),
        "key: expected a random key of JAX, got 0": lambda: operator.trace(0, 5),
        "samples must be": lambda: operator.trace(jax.random.key(0), 1.5),
        "block_size must be": lambda: ntk.operator(linear, w, x, block_size=0),
        "x must have at least one": lambda: ntk.operator(linear, w, x[:0]),
        "x must be finite": lambda: ntk.operator(linear, w, x * np.inf),
        "apply_fn must be": lambda: ntk.operator(3, w, x),
        "return an entry an example": lambda: ntk.operator(lambda w, x: jnp.sum(x @ w), w, x),
    }
    for words, call in bad.items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
