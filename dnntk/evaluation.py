"""How good a network's outputs are: loss, accuracy, confusion."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dnntk.data import Dataset


def decide(outputs: np.ndarray) -> np.ndarray:
    """Class indices [n]: the largest of several outputs, or one output's side of 1/2."""
    return np.argmax(outputs, axis=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0.5).astype(int)


def scores(outputs: np.ndarray, y: np.ndarray, labelled: bool) -> tuple[float, float | None]:
    """The thesis's loss 1/2 E ||f - y||^2, and the share of right decisions where y are classes."""
    loss = 0.5 * np.mean(np.sum((outputs - y).astype(np.float64) ** 2, axis=1))
    right = float(np.mean(decide(outputs) == decide(y))) if labelled else None
    return float(loss), right


def split_scores(
    split: str, outputs: np.ndarray, y: np.ndarray, labelled: bool
) -> dict[str, float | None]:
    """The two of a split, ``train`` or ``test``, named as in every file: train_loss, ..."""
    loss, accuracy = scores(outputs, y, labelled)
    return {f"{split}_loss": loss, f"{split}_accuracy": accuracy}


def mean_squared_error(loss: float, d_out: int) -> float:
    """The thesis's table 4.1 quotes the mean over outputs too, without the half: 2 loss / d_out."""
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


def confusion(outputs: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes]: true class by row, decided class by column."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, decide(outputs)), 1)
    return counts


def inputs_as_trained(x: np.ndarray, flat: bool, dtype: str) -> np.ndarray:
    """Examples in a network's dtype, images flattened for an MLP."""
    return (x.reshape(len(x), -1) if flat else x).astype(dtype)


def as_trained(dataset: Dataset, flat: bool, dtype: str) -> dict[str, Any]:
    """The dataset's arrays in a network's dtype, images flattened for an MLP."""
    return {
        "x_train": inputs_as_trained(dataset.x_train, flat, dtype),
        "x_test": inputs_as_trained(dataset.x_test, flat, dtype),
        "y_train": dataset.y_train.astype(dtype),
        "y_test": dataset.y_test.astype(dtype),
    }
