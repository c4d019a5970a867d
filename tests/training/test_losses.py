"""Losses beside optax's, and the targets that they take."""

import jax
import numpy as np
import optax
import pytest

from dnntk.errors import InputError
from dnntk.training.losses import (
    check_targets,
    cross_entropy,
    curvature,
    interpolant,
    loss_of,
    smooth_labels,
    squared,
)

RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(0, 3, (5, 3))
ONE_HOT = np.eye(3)[[0, 2, 1, 1, 0]]


def by_example(function, f, y):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(function))(f, y))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_optaxs(smoothing):
    def all_losses(f, y):
        y = optax.smooth_labels(y, smoothing)
        one = optax.sigmoid_binary_cross_entropy(f[0], y[0])
        ours = cross_entropy(f, y), cross_entropy(f[:1], y[:1]), squared(f, y)
        theirs = optax.softmax_cross_entropy(f, y), one, optax.l2_loss(f, y).sum()
        return y, ours, theirs

    with jax.enable_x64(True):
        y, ours, theirs = jax.jit(jax.vmap(all_losses))(OUTPUTS, ONE_HOT)
    np.testing.assert_allclose(smooth_labels(ONE_HOT, smoothing), y, rtol=1e-15)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_smoothing_one_column_is_that_of_two():
    one = smooth_labels(ONE_HOT[:, :1].astype(np.float32), 0.2)
    np.testing.assert_allclose(one, smooth_labels(np.hstack([ONE_HOT[:, :1]] * 2), 0.2)[:, :1])
    assert one.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "k"), [("squared", 3), ("cross_entropy", 3), ("cross_entropy", 1)]
)
def test_curvature_is_the_largest_that_occurs(name, k):
    at = np.vstack([[0.0, 0.0, -50.0], OUTPUTS])[:, :k]
    y = np.zeros_like(at)
    largest = np.linalg.eigvalsh(by_example(jax.hessian(loss_of(name)), at, y)).max(1)
    assert curvature(name, k) == pytest.approx(largest[0])
    assert largest.max() <= largest[0] + 1e-9


def test_the_derivative_vanishes_at_the_interpolant():
    y = smooth_labels(ONE_HOT, 0.1)
    for k in (1, 3):
        found = interpolant("cross_entropy", y[:, :k], OUTPUTS[:, :k])
        slope = by_example(jax.grad(cross_entropy), found, y[:, :k])
        np.testing.assert_allclose(slope, 0, atol=1e-12)
    assert interpolant("cross_entropy", ONE_HOT, OUTPUTS) is None
    assert interpolant("cross_entropy", ONE_HOT[:, :1], OUTPUTS[:, :1]) is None
    assert interpolant(squared, ONE_HOT, OUTPUTS) is None


def test_targets_are_probabilities():
    check_targets("squared", "y", -OUTPUTS)
    check_targets("cross_entropy", "y", smooth_labels(ONE_HOT, 0.3).astype(np.float32))
    check_targets("cross_entropy", "y", ONE_HOT[:0])
    for y in (ONE_HOT + 0.1, ONE_HOT - 0.1, ONE_HOT[:, :2], np.full((2, 1), np.nan)):
        with pytest.raises(InputError, match="^y: expected"):
            check_targets("cross_entropy", "y", y)
