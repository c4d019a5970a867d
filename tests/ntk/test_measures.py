"""Measures of kernels, against NumPy's own linear algebra."""

import jax
import numpy as np
import pytest

from dnntk import InputError
from dnntk.ntk import alignment, cka, effective_dimension, kernel_movement

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(7, 4)) + 1
OTHER = np.tanh(Z[:, :3]) + 0.1 * RNG.normal(size=(7, 3))
LABELS = np.eye(3)[[0, 1, 2, 0, 1, 0, 2]]
# Over two outputs, with a trace that is no multiple of any of its parts.
ROOT = RNG.normal(size=(14, 9))
FULL = (ROOT @ ROOT.T).reshape(7, 2, 7, 2).transpose(0, 2, 1, 3)


def cosine(one, other):
    return np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2))


def centre(kernel):
    h = np.eye(len(kernel)) - 1 / len(kernel)
    return h @ kernel @ h


def test_alignment_is_the_cosine_with_the_targets(x64):
    kernel, target = Z @ Z.T, LABELS @ LABELS.T
    assert alignment(kernel, LABELS) == pytest.approx(cosine(kernel, target), abs=1e-14)
    centred = cosine(centre(kernel), centre(target))
    assert alignment(7 * kernel + 2, LABELS, centred=True) == pytest.approx(centred, abs=1e-13)
    assert alignment(5 * target + 3, LABELS, centred=True) == pytest.approx(1, abs=1e-14)
    signs = LABELS[:, 0] * 2 - 1
    assert alignment(kernel, signs) == pytest.approx(cosine(kernel, np.outer(signs, signs)))
    trace = FULL[:, :, 0, 0] + FULL[:, :, 1, 1]
    assert alignment(FULL, LABELS) == pytest.approx(cosine(trace, target), abs=1e-14)
    assert np.isnan(alignment(np.full((7, 7), 0.1), LABELS, centred=True))
    assert np.isnan(alignment(0 * kernel, LABELS)) and np.isnan(alignment(kernel, 0 * LABELS))


def test_cka_is_the_similarity_of_representations(x64):
    one, other = Z @ Z.T, OTHER @ OTHER.T
    # Kornblith et al.'s equation 4 for linear kernels: by the features' covariances.
    a, b = Z - Z.mean(0), OTHER - OTHER.mean(0)
    norm = np.linalg.norm
    expected = norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    assert 0.1 < expected < 0.9
    assert cka(one, other) == pytest.approx(expected, abs=1e-14)
    rotated = Z @ np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    assert cka(one, 3 * rotated @ rotated.T + 5) == pytest.approx(1, abs=1e-13)
    trace = FULL[:, :, 0, 0] + FULL[:, :, 1, 1]
    assert cka(FULL, other) == pytest.approx(cosine(centre(trace), centre(other)), abs=1e-13)
    assert np.isnan(cka(one, np.ones((7, 7)) / 3))


def test_the_effective_dimension_is_the_trace_of_ridge_regression_and_nearly_of_the_flow(x64):
    kernel, times = Z @ Z.T, np.array([[1e-3, 0.1], [3.0, 1e4]])
    found = effective_dimension(kernel, times)
    for t, value in zip(times.ravel(), found.ravel(), strict=True):
        smoother = kernel @ np.linalg.inv(kernel + 7 / t * np.eye(7))
        assert value == pytest.approx(np.trace(smoother), rel=1e-9)
        flow = 7 - np.sum(np.exp(-t * np.linalg.eigvalsh(kernel / 7)))
        assert value <= flow * (1 + 1e-9) <= 1.3 * value
    assert effective_dimension(kernel, 0) == 0
    assert effective_dimension(kernel, np.inf) == 4
    matrix = FULL.transpose(0, 2, 1, 3).reshape(14, 14)
    smoother = matrix @ np.linalg.inv(matrix + 7 / 0.3 * np.eye(14))
    assert effective_dimension(FULL, 0.3) == pytest.approx(np.trace(smoother), rel=1e-9)
    assert effective_dimension(np.zeros((0, 0)), [1.0]) == 0
    assert np.isnan(effective_dimension(kernel - 0.5 * np.eye(len(kernel)), times)).all()
    # d/dt of s t / (1 + s t) is s / (1 + s t)^2; equal eigenvalues and t = infinity are harmless.
    slopes = jax.grad(effective_dimension, (1, 0))
    slope, by_kernel = slopes(np.eye(5), 5.0)
    np.testing.assert_allclose(slope, 0.25, rtol=1e-12)
    np.testing.assert_allclose(by_kernel, 0.25 * np.eye(5), atol=1e-12)
    assert slopes(np.eye(5), np.inf)[0] == 0


def test_movement_is_relative_and_has_a_gradient_at_rest(x64):
    for kernel in (Z @ Z.T, Z @ Z[:2].T, FULL):
        assert kernel_movement(kernel, kernel) == 0
        assert kernel_movement(-kernel, kernel) == pytest.approx(2, abs=1e-14)
        moved = kernel + 0.1
        expected = 0.1 * np.sqrt(kernel.size) / np.linalg.norm(kernel)
        assert kernel_movement(moved, kernel) == pytest.approx(expected, rel=1e-13)
    np.testing.assert_array_equal(jax.grad(kernel_movement)(kernel, kernel), 0)
    assert kernel_movement(kernel, 0 * kernel) == np.inf


def test_measures_follow_the_dtype_under_jit_and_vmap():
    kernels = np.stack([Z @ Z.T, OTHER @ OTHER.T]).astype(np.float32)
    labels = LABELS.astype(np.float32)
    measures = (
        lambda k: alignment(k, labels),
        lambda k: cka(k, FULL),
        lambda k: effective_dimension(k, 2.0),
    )
    found = jax.jit(jax.vmap(lambda k: [measure(k) for measure in measures]))(kernels)
    for values, measure in zip(found, measures, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, [float(measure(k)) for k in kernels], rtol=1e-5)
    # Squares of these are beyond float32.
    huge = 1e25 * kernels[0]
    assert alignment(huge, labels) == pytest.approx(float(alignment(kernels[0], labels)), rel=1e-5)
    assert kernel_movement(2 * huge, huge) == pytest.approx(1)


def test_what_is_no_kernel_is_refused_in_a_line():
    kernel = Z @ Z.T
    for words, call in (
        (r"kernel: expected \[n, n\].* got shape \[7, 4\]", lambda: alignment(Z, LABELS)),
        (r"kernel1: expected \[n, n\].* got shape \[7, 7, 2\]", lambda: cka(FULL[..., 0], kernel)),
        (r"kernel: expected", lambda: effective_dimension(FULL[..., :1], 1.0)),
        (r"y: expected \[n\] or \[n, d_out\] with n = 7", lambda: alignment(kernel, LABELS[:6])),
        ("kernel2: expected a kernel of 7 examples", lambda: cka(kernel, kernel[:6, :6])),
        ("time: expected numbers >= 0, or infinity", lambda: effective_dimension(kernel, -1)),
        ("time: expected numbers >= 0", lambda: effective_dimension(kernel, [1, np.nan])),
        ("kernel_0: expected the shape", lambda: kernel_movement(kernel, kernel[:1])),
        ("kernel_t must be finite", lambda: kernel_movement(kernel * np.nan, kernel)),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
