"""Classes: labels of any kind as indices into them, and the class that outputs decide for."""

import math
from typing import Any

import numpy as np

from dnntk.checks import brief, check_unmasked
from dnntk.data.datasets import Dataset, targets_of
from dnntk.errors import InputError

__all__ = ["checked_classes", "class_targets", "decide", "index_labels", "label_values"]

# More different labels are taken for a regression's targets.
MOST_CLASSES = 10_000


def label_values(name: str, labels: Any, examples: int) -> list[Any] | None:
    """Labels [n] or [n, 1] as a list of Python values; None without labels.

    Raises:
        InputError: the number of labels is not ``examples``, or a label is missing.
    """
    if labels is None or (not examples and hasattr(labels, "__len__") and len(labels) == 0):
        return None
    expected = f"{name}: expected [{examples}] labels, an example each"
    if not hasattr(labels, "__len__") or isinstance(labels, str | bytes | dict):
        raise InputError(f"{expected}, got {brief(labels)}")
    check_unmasked(name, labels)
    if not isinstance(labels, list | tuple):
        try:  # a table of pandas' has no tolist
            labels = (labels if hasattr(labels, "tolist") else np.asarray(labels)).tolist()
        except Exception as error:  # another library's array may raise anything
            raise InputError(f"{expected}, got {brief(labels)} ({brief(error)})") from None
    values = [one[0] if isinstance(one, list | tuple) and len(one) == 1 else one for one in labels]
    values = [one.item() if hasattr(one, "item") and not np.ndim(one) else one for one in values]
    values = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in values]
    if len(values) != examples:
        raise InputError(f"{expected}, got {len(values)}")
    for value in (one for one in values if type(one) not in (int, bool, str)):
        if not isinstance(value, str | bytes) and np.ndim(value):
            raise InputError(f"{expected}, got {brief(value)} as one of them; one-hot: argmax(1)")
        if value is None or str(value) in ("<NA>", "NaT") or value != value:
            raise InputError(f"{name}: expected a label for each example, got {value}; drop those")
    return values


def checked_classes(classes: Any) -> tuple[Any, ...]:
    """The classes as a tuple of Python values.

    Raises:
        InputError: ``classes`` is no sequence, or repeats a class.
    """
    if classes is None:
        return ()
    if isinstance(classes, str | bytes | dict | set) or not hasattr(classes, "__len__"):
        raise InputError(f"classes: expected a sequence of labels, got {brief(classes)}")
    names = tuple(label_values("classes", classes, len(classes)) or ())
    if len(set(map(_hashable, names))) < len(names):
        raise InputError(f"classes: expected each class once, got {brief(names)}")
    return names


def index_labels(
    train: list[Any], test: list[Any] | None, names: tuple[Any, ...], targets: np.ndarray | None
) -> tuple[tuple[Any, ...], np.ndarray, np.ndarray | None]:
    """Labels as indices into the classes.

    Args:
        train: the training set's labels: all are values in ``names``, or all are indices into it.
        test: the test set's labels, of the same kind; or None.
        names: the classes; () for the training labels, sorted.
        targets: [n, d_out] of the training examples, or None; they decide whether integers that
            could be either are values or indices.

    Returns:
        The classes, and int32 indices [n] and [m] (or None).

    Raises:
        InputError: a label is none of the classes, or a class has no training examples.
    """
    kinds = set(map(_hashable, train))
    if len(kinds) > MOST_CLASSES:
        raise InputError(
            f"labels_train: expected at most {MOST_CLASSES:,} classes, got {len(kinds):,}; leave "
            "labels out for a regression"
        )
    by_index = bool(names) and _are_indices(train, kinds, names, targets)
    if not names:
        try:
            names = tuple(sorted(kinds))
        except TypeError:
            raise InputError(
                f"labels_train: expected labels of one kind, got {brief(list(kinds))}; or name "
                "them all in classes"
            ) from None
    if len(names) < 2:
        raise InputError(f"labels_train: expected two classes or more, got {brief(names)}")
    places = {i: i for i in range(len(names))} if by_index else {n: i for i, n in enumerate(names)}
    labels = _looked_up("labels_train", train, places, names)
    absent = sorted(set(range(len(names))) - set(labels.tolist()))
    if absent:
        raise InputError(
            f"classes: expected training examples of every class, got none of "
            f"{brief(names[absent[0]])}; leave it out"
        )
    of_test = None if test is None else _looked_up("labels_test", test, places, names)
    return tuple(map(_as_json, names)), labels, of_test


def decide(outputs: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Class indices [n]: the class whose target is nearest to the outputs [n, d_out].

    ``targets`` [k, d_out] holds the classes' targets; None is 0 and 1 for one output, and one-hot
    vectors for several.
    """
    if targets is None:
        several = outputs.shape[1] > 1
        return np.argmax(outputs, axis=1) if several else (outputs[:, 0] > 0.5).astype(int)
    # |f - y|^2 without |f|^2; for one-hot targets this compares the outputs' exact bits.
    half = 0.5 * np.sum(targets**2, axis=1)
    with np.errstate(all="ignore"):
        return np.argmax(outputs @ targets.T - (half - half.min()), axis=1)


def class_targets(dataset: Dataset) -> np.ndarray:
    """The mean target [k, d_out] of each class's training examples; float64."""
    assert dataset.labels_train is not None
    count = len(dataset.classes)
    sums = np.zeros((count, dataset.y_train.shape[1]))
    np.add.at(sums, dataset.labels_train, dataset.y_train)
    return sums / np.bincount(dataset.labels_train, minlength=count)[:, None]


def _looked_up(
    name: str, values: list[Any], places: dict[Any, int], names: tuple[Any, ...]
) -> np.ndarray:
    try:
        return np.array([places[value] for value in values], np.int32)
    except KeyError as error:
        raise InputError(
            f"{name}: expected labels among the classes {brief(list(names))}, got "
            f"{brief(error.args[0])}"
        ) from None
    except TypeError:
        raise InputError(f"{name}: expected numbers or words, got others") from None


def _are_indices(
    values: list[Any], kinds: set[Any], names: tuple[Any, ...], targets: np.ndarray | None
) -> bool:
    whole = (isinstance(v, int) or (isinstance(v, float) and v.is_integer()) for v in kinds)
    if not all(whole) or not all(0 <= v < len(names) for v in kinds):
        return False
    if not kinds <= set(names):
        return True
    by_index = targets_of(np.array(values, np.int32), len(names))
    return targets is not None and np.array_equal(targets, by_index)


def _hashable(value: Any) -> Any:
    """The label, if it is hashable."""
    try:
        hash(value)
    except TypeError:
        raise InputError(f"labels: expected numbers or words, got {brief(value)}") from None
    return value


def _as_json(name: Any) -> Any:
    kept = isinstance(name, str | int) or (isinstance(name, float) and math.isfinite(name))
    return name if kept else str(name)
