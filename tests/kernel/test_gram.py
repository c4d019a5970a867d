from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.kernel import gram as gram_module
from dnntk.kernel import limit_ntk
from dnntk.kernel.gram import blockwise, check_positive_definite, gram


def numbered(n, width=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def lopsided(x, y):
    """A kernel whose rounding depends on the order of its arguments, as a long sum's does."""
    return (x @ y.T) * (1 + 1e-6 * jnp.sum(x**2, 1)[:, None])


def matrix_valued(x, y):
    """[n1, n2, 2, 2] with K(x, y) = K(y, x)^T, not symmetric for a single pair."""
    features = [jnp.stack([z[:, 0], z[:, 1] ** 2], 1) for z in (x, y)]
    return features[0][:, None, :, None] * features[1][None, :, None, :]


@pytest.mark.parametrize(
    ("n1", "n2", "area"),
    [(1, 1, 1), (11, 4, 1), (1, 30, 7), (30, 1, 7), (23, 24, 30), (23, 24, 1000)],
)
def test_blockwise_is_the_kernel(n1, n2, area):
    x1, x2 = jnp.arange(n1, dtype=jnp.float32), jnp.arange(n2, dtype=jnp.float32)
    calls = []

    def pair_fn(a, b):
        calls.append((len(a), len(b)))
        return a[:, None] * 100 + b[None, :]

    value = blockwise(pair_fn, x1, x2, area)
    np.testing.assert_array_equal(value, np.arange(n1)[:, None] * 100 + np.arange(n2)[None, :])
    assert all(rows * cols <= area for rows, cols in calls)


@pytest.mark.parametrize(("n", "area"), [(2, 1), (23, 1), (23, 30), (23, 1000)])
def test_blockwise_symmetric_is_exactly_symmetric(n, area):
    x = jnp.asarray(numbered(n))
    value = np.asarray(jax.jit(partial(blockwise, lopsided, x2=None, area=area))(x1=x))
    np.testing.assert_array_equal(value, value.T)
    np.testing.assert_allclose(value, x @ x.T, rtol=1e-4, atol=1e-5)


def test_blockwise_computes_a_pair_once():
    blocks = []

    def pair_fn(a, b):
        jax.debug.callback(lambda i, j: blocks.append((int(i), int(j))), a[0], b[0])
        return a[:, None] * b[None, :]

    # 20 inputs in blocks of 4 are 5 x 5 blocks, of which 15 hold all pairs.
    jax.block_until_ready(blockwise(pair_fn, jnp.arange(20), None, 16))
    jax.effects_barrier()
    assert len(blocks) == 15
    assert {frozenset(pair) for pair in blocks} == {
        frozenset((i, j)) for i in range(0, 20, 4) for j in range(i, 20, 4)
    }


@pytest.mark.parametrize("block_size", [7, 100])
def test_gram_is_independent_of_the_block_size(block_size):
    x1, x2 = numbered(19), numbered(8, seed=1)
    np.testing.assert_allclose(
        gram(limit_ntk, x1, x2, block_size=block_size), limit_ntk(x1, x2), rtol=1e-6
    )
    for function in (limit_ntk, lopsided):
        value = gram(function, x1, block_size=block_size)
        np.testing.assert_array_equal(value, value.T)
        np.testing.assert_allclose(value, function(x1, x1), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(value, gram(function, x1, x1, block_size=block_size))


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_gram_of_a_matrix_valued_kernel(block_size):
    x = numbered(8)
    value = gram(matrix_valued, x, block_size=block_size)
    np.testing.assert_array_equal(value, matrix_valued(x, x))
    np.testing.assert_array_equal(value, value.transpose(1, 0, 3, 2))


def test_gram_computes_a_pair_once_in_one_shape():
    shapes = []

    def kernel_fn(a, b):
        shapes.append((a.shape, b.shape))
        return a @ b.T

    gram(kernel_fn, numbered(19), block_size=4)
    assert shapes == [((4, 2), (4, 2))] * 15


def test_gram_follows_the_dtype(x64):
    assert gram(limit_ntk, numbered(3)).dtype == np.float32
    assert gram(limit_ntk, numbered(3).astype(np.float64)).dtype == np.float64


def test_gram_writes_into_a_memory_map(tmp_path):
    x = numbered(9)
    out = np.lib.format.open_memmap(tmp_path / "gram.npy", "w+", np.float32, (9, 9))
    assert gram(limit_ntk, x, block_size=4, out=out) is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "gram.npy"), gram(limit_ntk, x, block_size=4))


def test_progress_shows_only_where_it_is_long(monkeypatch, capsys):
    x = numbered(9)
    gram(limit_ntk, x, block_size=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(gram_module, "PROGRESS_DELAY", 0.0)
    gram(limit_ntk, x, block_size=4)
    assert "6/6" in capsys.readouterr().err
    gram(limit_ntk, x, block_size=4, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 0}, ("block_size", "0")),
        ({"block_size": 2.0}, ("block_size", "2.0")),
        ({"x1": np.zeros((0, 2))}, ("x1", "(0, 2)")),
        ({"x2": np.float32(1)}, ("x2", "()")),
        ({"out": np.zeros((3, 2), np.float32)}, ("out", "(3, 3)", "(3, 2)")),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {"x1": numbered(3), **change}
    with pytest.raises(InputError) as caught:
        gram(limit_ntk, **arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.ones((3, 3)), "positive definite"),
        (np.diag([1.0, -1e-3]), "-0.001"),
        (np.array([[2.0, 1.0], [0.0, 2.0]]), "symmetric"),
        (np.ones((2, 3)), "square"),
        (np.diag([1.0, np.nan]), "finite"),
    ],
)
def test_a_gram_matrix_that_is_not_positive_definite_is_refused_by_name(matrix, words):
    with pytest.raises(InputError, match=words) as caught:
        check_positive_definite("k_train_train", matrix)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("k_train_train")


def test_a_gram_matrix_of_distinct_inputs_is_accepted_and_its_ridge_mends_a_singular_one():
    x = np.random.default_rng(0).uniform(size=(6, 3)).astype(np.float32)
    check_positive_definite("gram", limit_ntk(x))
    singular = np.asarray(limit_ntk(np.concatenate([x, x])))
    with pytest.raises(InputError, match="ridge of at least") as caught:
        check_positive_definite("gram", singular)
    ridge = float(str(caught.value).split("at least ")[1].split()[0])
    check_positive_definite("gram", singular + 4 * ridge * np.eye(12, dtype=np.float32))


def test_a_kernel_in_half_precision_is_kept_in_single():
    half = gram(lambda a, b: (a @ b.T).astype(jnp.float16), np.ones((3, 2), np.float32))
    assert half.dtype == np.float32 and (half == 2).all()
