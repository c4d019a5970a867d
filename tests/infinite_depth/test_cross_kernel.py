import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel, balanced, padded_rows

X = np.random.default_rng(0).uniform(0, 1, (23, 4))


def inner(x1, x2):
    return x1 @ x2.T


def mixed(x1, x2):
    return inner(x1, x2)[:, :, None, None] * np.array([[2.0, 0.5], [0.5, 1.0]])[None, None]


@pytest.mark.parametrize(("kernel", "mixing"), [(inner, np.eye(1)), (mixed, [[2, 0.5], [0.5, 1]])])
def test_products_are_those_of_the_whole_matrix(kernel, mixing):
    cross, k = CrossKernel(kernel, X, "float64"), len(mixing)
    assert cross.matrix_size == k
    vectors = np.random.default_rng(1).normal(size=(17 * k, 3))
    expected = np.kron(X[:9] @ X[:17].T, mixing) @ vectors
    np.testing.assert_allclose(cross.product(X[:9], vectors, block_size=5), expected, rtol=1e-12)
    assert cross.product(X[:0], vectors, block_size=5).shape == (0, 3)


def test_pieces_are_few_and_of_one_size():
    assert balanced(23, 10) == [(0, 8), (8, 16), (16, 23)]
    assert balanced(5, 10) == [(0, 5)] and balanced(0, 10) == []
    assert [padded_rows(n) for n in (1, 16, 17, 128, 129)] == [16, 16, 32, 128, 256]


def test_a_kernel_that_is_no_function_is_refused():
    for kernel in (5, "limit"):
        with pytest.raises(InputError, match=r"^kernel: expected a function of two batches, got"):
            CrossKernel(kernel, np.ones((2, 3)), "float64")
