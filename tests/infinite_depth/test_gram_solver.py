import functools
import math

import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.gram_matrix import SymmetricGram
from dnntk.infinite_depth.gram_solver import check_definite, solver_of
from dnntk.infinite_depth.solvers import Eigendecomposition, Krylov
from dnntk.infinite_depth.spectral_filter import SpectralFilter

X = np.random.default_rng(0).normal(size=(12, 20))


@functools.cache
def _gram(sign=1.0):
    cross = CrossKernel(lambda a, b: sign * (a @ b.T), X, "float64")
    return SymmetricGram(cross, block_size=5, progress=False)


def _solver(method, rows=12, memory=1e9, sign=1.0):
    return solver_of(
        _gram(sign),
        np.eye(rows)[:, :1],
        method=method,
        max_iterations=50,
        memory=memory,
        folder=None,
        progress=False,
    )


def test_the_method_chooses_and_leading_examples_have_their_own_matrix():
    matrix = X[:7] @ X[:7].T / 7
    for method, kind in (("auto", Eigendecomposition), ("krylov", Krylov)):
        solver = _solver(method, rows=7)
        solver.refine([SpectralFilter(math.inf)], 1e-12)
        assert isinstance(solver, kind)
        np.testing.assert_allclose(solver.values, np.linalg.eigvalsh(matrix), rtol=1e-9)


def test_memory_limits_the_iterations():
    solver = _solver("krylov", memory=_gram().nbytes + 1)
    solver.refine([SpectralFilter(math.inf)], 1e-12)
    assert solver.iterations == 1


def test_what_no_time_or_not_infinity_can_be_solved_with_is_refused():
    cross, endless = _gram().cross, [SpectralFilter(math.inf)]
    check_definite(_solver("eigh"), endless, 12, cross)
    with pytest.raises(InputError, match="positive semidefinite.*eigenvalue -"):
        check_definite(_solver("eigh", sign=-1.0), [SpectralFilter(1.0)], 12, cross)
    singular = Eigendecomposition(np.diag(np.arange(12.0)), np.eye(12)[:, :1])
    check_definite(singular, [SpectralFilter(1e9), SpectralFilter(math.inf, 0.1)], 12, cross)
    with pytest.raises(InputError, match="not positive definite.*drop coincident"):
        check_definite(singular, endless, 12, cross)
