"""How good a network's outputs are: loss, accuracy, confusion."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special

from dnntk.data.datasets import Dataset
from dnntk.data.labels import decide
from dnntk.training.losses import as_targets, check_targets, mean_loss, smooth_labels

__all__ = [
    *("as_trained", "confusion", "constant_loss", "described", "inputs_as_trained"),
    *("least_loss", "mean_squared_error", "scores", "split_scores", "with_targets_of"),
]


def scores(
    outputs: np.ndarray,
    y: np.ndarray,
    labelled: bool,
    targets: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    loss: str = "squared",
) -> tuple[float, float | None]:
    """The mean loss, the thesis's 1/2 E ||f - y||^2 or another, and the accuracy if ``labelled``.

    ``targets`` is as in `decide`. Without ``targets`` or ``labels``, y decides the true classes.
    """
    value = mean_loss(loss, outputs, y)
    if not labelled:
        return value, None
    outputs = as_targets(loss, outputs)
    right = decide(y, targets) if targets is None or labels is None else labels
    return value, float(np.mean(decide(outputs, targets) == right))


def split_scores(
    split: str,
    outputs: np.ndarray,
    y: np.ndarray,
    labelled: bool,
    targets: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    loss: str = "squared",
) -> dict[str, float | None]:
    """`scores` of a split, ``train`` or ``test``, under their names in files: train_loss, ..."""
    value, accuracy = scores(outputs, y, labelled, targets, labels, loss)
    return {f"{split}_loss": value, f"{split}_accuracy": accuracy}


def mean_squared_error(loss: float, d_out: int) -> float:
    """Mean over examples and outputs, as in the thesis's table 4.1: 2 loss / d_out."""
    return 2 * loss / d_out


def described(found: Mapping[str, Any]) -> str:
    """``train loss 0.00455, test loss 0.00512, accuracy 100.00% training, 99.17% test``."""
    said = [f"train loss {found['train_loss']:.4g}"]
    if found["test_loss"] is not None:
        said.append(f"test loss {found['test_loss']:.4g}")
    if found["train_accuracy"] is not None:
        said.append(f"accuracy {100 * found['train_accuracy']:.2f}% training")
    if found["test_accuracy"] is not None:
        said.append(f"{100 * found['test_accuracy']:.2f}% test")
    return ", ".join(said)


def confusion(
    outputs: np.ndarray, labels: np.ndarray, classes: int, targets: np.ndarray | None = None
) -> np.ndarray:
    """Counts [classes, classes]: true class by row, decided class by column."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, decide(outputs, targets)), 1)
    return counts


def constant_loss(y: np.ndarray, of: np.ndarray, loss: str = "squared") -> float:
    """The loss on targets ``y`` of the constant output that is best on targets ``of``."""
    best = of.mean(axis=0, dtype=np.float64)
    if loss == "squared":
        centred = y.astype(np.float64) - best
        return float(0.5 * np.mean(np.sum(centred**2, axis=1)))
    return float(np.mean(_cross_entropy(y, best)))


def least_loss(y: np.ndarray, loss: str = "squared") -> float:
    """The loss of outputs that reproduce every target: 0, or the entropy of probabilities."""
    return 0.0 if loss == "squared" else float(np.mean(_cross_entropy(y, y)))


def _cross_entropy(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-sum y log p [n] of probabilities, one column's with their complement."""
    found = -scipy.special.xlogy(y, p)
    if y.shape[1] == 1:
        found = found - scipy.special.xlog1py(1 - y, -p)
    return found.sum(axis=1, dtype=np.float64)


def with_targets_of(dataset: Dataset, loss: str, smoothing: float) -> Dataset:
    """The dataset with the targets of a loss: those of cross-entropy are smoothed labels.

    Raises:
        InputError: the targets are not those of the loss.
    """
    for name in ("y_train", "y_test"):
        check_targets(loss, name, getattr(dataset, name))
    if not smoothing:
        return dataset
    y_train, y_test = (smooth_labels(y, smoothing) for y in (dataset.y_train, dataset.y_test))
    return dataclasses.replace(dataset, y_train=y_train, y_test=y_test)


def inputs_as_trained(x: np.ndarray, flat: bool, dtype: str) -> np.ndarray:
    """Examples in a network's dtype, images flattened for an MLP."""
    return (x.reshape(len(x), math.prod(x.shape[1:])) if flat else x).astype(dtype)


def as_trained(dataset: Dataset, flat: bool, dtype: str) -> dict[str, Any]:
    """The dataset's arrays in a network's dtype, images flattened for an MLP."""
    return {
        "x_train": inputs_as_trained(dataset.x_train, flat, dtype),
        "x_test": inputs_as_trained(dataset.x_test, flat, dtype),
        "y_train": dataset.y_train.astype(dtype),
        "y_test": dataset.y_test.astype(dtype),
    }
