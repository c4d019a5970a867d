"""Losses: one function of an example's outputs and target each, for training and its limit alike.

A training loss is the mean over examples. Everything else about a loss follows from its function:
the derivative by the outputs, its curvature, and what targets it takes.
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from dnntk.checks import brief
from dnntk.errors import InputError

__all__ = [
    *("LOSSES", "Loss", "check_targets", "curvature", "cross_entropy", "interpolant"),
    *("as_targets", "derivative", "loss_of", "mean_loss", "smooth_labels", "squared", "summed"),
]

LOSSES = ("squared", "cross_entropy")
SUM_TOLERANCE = 1e-5  # of a target's probabilities, which may be float32

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def squared(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """The thesis's loss 1/2 ||f - y||^2 of outputs f [k] and target y [k]: a number."""
    return 0.5 * jnp.sum((outputs - target) ** 2)


def cross_entropy(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """-sum_i y_i log p_i of logits f [k] and probabilities y [k] that add up to 1: a number.

    p is the softmax of f; with one output it is the sigmoid, and y in [0, 1] is the probability of
    the second class.
    """
    if outputs.shape[-1] == 1:
        return jnp.sum(jax.nn.softplus(outputs) - target * outputs)
    return jax.nn.logsumexp(outputs) - jnp.sum(target * outputs)


def loss_of(loss: str | Loss) -> Loss:
    """The function of a loss by its name; a function is its own.

    Raises:
        InputError: it is neither.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(
            f"loss: expected {', '.join(LOSSES)} or a function (outputs [k], target [k]) -> "
            f"number, got {brief(loss)}"
        )
    return squared if loss == "squared" else cross_entropy


def summed(loss: str, outputs: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over examples of weight [n] times the loss of outputs and targets [n, k]."""
    return jnp.sum(weight * jax.vmap(loss_of(loss))(outputs, y))


def derivative(loss: str, outputs: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """The derivative [n, k] of `summed` by the outputs."""
    return cast(jax.Array, jax.grad(summed, argnums=1)(loss, outputs, y, weight))


def mean_loss(loss: str, outputs: np.ndarray, y: np.ndarray) -> float:
    """The mean over examples of the loss of outputs and targets [n, k], on the host in float64."""
    # `loss_of` again, in NumPy: JAX compiles a program for every shape, and rounds otherwise.
    f = outputs.astype(np.float64)
    if loss == "squared":
        return float(0.5 * np.mean(np.sum((outputs - y).astype(np.float64) ** 2, axis=1)))
    if f.shape[1] == 1:
        return float(np.mean(np.logaddexp(0, f) - y * f))
    return float(np.mean(scipy.special.logsumexp(f, 1) - np.sum(y * f, 1)))


def as_targets(loss: str, outputs: np.ndarray) -> np.ndarray:
    """Outputs [n, k] as what targets are: of cross-entropy the probabilities of these logits."""
    if loss == "squared":
        return outputs
    with np.errstate(all="ignore"):
        several = outputs.shape[1] > 1
        return scipy.special.softmax(outputs, 1) if several else scipy.special.expit(outputs)


def check_targets(loss: str | Loss, name: str, y: np.ndarray) -> None:
    """Refuse targets [n, k] that are no probabilities, where the loss is cross-entropy.

    Raises:
        InputError: an entry is outside of [0, 1], or a row of several does not add up to 1.
    """
    if loss != "cross_entropy" or not y.size:
        return
    wrong = (y < 0) | (y > 1) | ~np.isfinite(y)
    if wrong.any():
        raise InputError(
            f"{name}: expected probabilities in [0, 1] for loss=cross_entropy, got "
            f"{y[wrong][0]:g}; give one-hot rows, or one column of 0 and 1"
        )
    sums = y.sum(axis=1, dtype=np.float64)
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if y.shape[1] > 1 and off.any():
        raise InputError(
            f"{name}: expected rows that add up to 1 for loss=cross_entropy, got the sum "
            f"{sums[off][0]:g}; give one-hot rows, or one column of 0 and 1 for two classes"
        )


def curvature(loss: str, outputs: int) -> float:
    """The largest eigenvalue that the loss's second derivative by the outputs [k] can have.

    1 for squared error; 1/4 for one logit and 1/2 for several (Boehning 1992). Gradient descent is
    stable up to the step 2 / (curvature lambda_max(K / N)).
    """
    if loss == "squared":
        return 1.0
    return 0.25 if outputs == 1 else 0.5


def smooth_labels(y: np.ndarray, smoothing: float) -> np.ndarray:
    """(1 - s) y + s / k for one-hot rows [n, k], as `optax.smooth_labels`; k = 2 for one column.

    Szegedy et al. (2016). ``smoothing`` s is in [0, 1).
    """
    return ((1 - smoothing) * y + smoothing / max(y.shape[1], 2)).astype(y.dtype)


def interpolant(loss: str | Loss, y: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """The outputs [n, k] where the loss's derivative is 0 and that gradient flow approaches.

    Cross-entropy's derivatives add up to 0 over several outputs, so that their sum stays what it
    was at ``start`` [n, k]. None if no such outputs are known: cross-entropy of targets that hold a
    0 falls for ever, and of another function they are not looked for.
    """
    if loss == "squared":
        return y
    if loss != "cross_entropy" or y.min(initial=1) <= 0 or (y.shape[1] == 1 and y.max() >= 1):
        return None
    if y.shape[1] == 1:
        return np.log(y) - np.log1p(-y)
    logits = np.log(y)
    return logits + np.mean(start - logits, axis=1, keepdims=True)
