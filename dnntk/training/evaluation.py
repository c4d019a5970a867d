"""How good a network's outputs are: loss, accuracy, confusion."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.data.labels import decide

__all__ = [
    *("as_trained", "confusion", "constant_loss", "described"),
    *("inputs_as_trained", "mean_squared_error", "scores", "split_scores"),
]


def scores(
    outputs: np.ndarray,
    y: np.ndarray,
    labelled: bool,
    targets: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> tuple[float, float | None]:
    """The thesis's loss 1/2 E ||f - y||^2, and the accuracy if ``labelled``.

    ``targets`` is as in `decide`. Without ``targets`` or ``labels``, y decides the true classes.
    """
    loss = 0.5 * np.mean(np.sum((outputs - y).astype(np.float64) ** 2, axis=1))
    if not labelled:
        return float(loss), None
    right = decide(y, targets) if targets is None or labels is None else labels
    return float(loss), float(np.mean(decide(outputs, targets) == right))


def split_scores(
    split: str,
    outputs: np.ndarray,
    y: np.ndarray,
    labelled: bool,
    targets: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, float | None]:
    """`scores` of a split, ``train`` or ``test``, under their names in files: train_loss, ..."""
    loss, accuracy = scores(outputs, y, labelled, targets, labels)
    return {f"{split}_loss": loss, f"{split}_accuracy": accuracy}


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


def constant_loss(y: np.ndarray, of: np.ndarray) -> float:
    """The loss on targets ``y`` of the constant output that is best on targets ``of``."""
    centred = y.astype(np.float64) - of.mean(axis=0, dtype=np.float64)
    return float(0.5 * np.mean(np.sum(centred**2, axis=1)))


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
