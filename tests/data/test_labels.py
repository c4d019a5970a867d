"""Labels become indices into the classes; outputs decide for the class of the nearest target."""

import json

import numpy as np
import pytest

from dnntk import Dataset, TrainConfig
from dnntk.data.labels import class_targets, decide
from dnntk.data.own_data import own_dataset

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3))
SIDES = np.array([0, 0, 1, 1, 0, 1, 0, 1])
THREE = np.array([0, 1, 2, 0, 1, 2, 0, 1])
WORDS = np.where(SIDES, "dog", "cat")


def checked(**fields):
    return own_dataset(Dataset(**fields), TrainConfig(depth=4))


LABELS = {
    "words": (WORDS, (), ("cat", "dog")),
    "words in another order": (WORDS, ("dog", "cat"), ("dog", "cat")),
    "-1 and 1": (2 * SIDES - 1, (), (-1, 1)),
    "1 to 2": (SIDES + 1, (), (1, 2)),
    "floats": (SIDES + 0.5, (), (0.5, 1.5)),
    "bools": (SIDES.astype(bool), (), (False, True)),
    "bytes": (np.where(SIDES, b"dog", b"cat"), (), ("cat", "dog")),
    "a column": (WORDS[:, None], (), ("cat", "dog")),
    "a list of NumPy's": (list(SIDES + 1), np.array([2, 1]), (2, 1)),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_by_value_are_indices_into_the_classes(name):
    labels, classes, names = LABELS[name]
    found = checked(
        x_train=X, labels_train=labels, x_test=X[:3], labels_test=labels[:3], classes=classes
    )
    assert found.classes == names and json.loads(json.dumps(found.classes)) == list(names)
    values = np.asarray(labels).ravel()
    values = values.astype(str) if values.dtype.kind == "S" else values
    np.testing.assert_array_equal(np.array(names)[found.labels_train], values)
    np.testing.assert_array_equal(np.array(names)[found.labels_test], values[:3])
    assert found.labels_train.dtype == np.int32
    np.testing.assert_array_equal(found.y_train[:, 0], found.labels_train)


def test_targets_decide_what_ambiguous_integers_mean():
    by_index = checked(x_train=X, y_train=SIDES, labels_train=SIDES, classes=(1, 0))
    np.testing.assert_array_equal(by_index.labels_train, SIDES)
    for y in (1 - SIDES, None):
        by_value = checked(x_train=X, y_train=y, labels_train=SIDES, classes=(1, 0))
        np.testing.assert_array_equal(by_value.labels_train, 1 - SIDES)
    one_hot = np.eye(3)[THREE]
    indices = checked(x_train=X, y_train=one_hot, labels_train=THREE, classes=(2, 1, 0))
    np.testing.assert_array_equal(indices.labels_train, THREE)
    named = checked(x_train=X, y_train=one_hot, labels_train=THREE, classes=("a", "b", "c"))
    np.testing.assert_array_equal(named.labels_train, THREE)


@pytest.mark.parametrize("y", [2.0 * SIDES - 1, 1.0 - SIDES, 100 + 0.5 * SIDES])
def test_one_output_decides_for_the_nearer_target(y):
    data = checked(x_train=X, y_train=y, labels_train=SIDES, x_test=X, y_test=y)
    np.testing.assert_array_equal(data.labels_test, SIDES)  # by the targets
    near = data.y_train + 0.2 * np.ptp(y) * RNG.uniform(-1, 1, (8, 1))
    np.testing.assert_array_equal(decide(near, class_targets(data)), SIDES)


def test_decisions_by_one_hot_targets_are_the_largest_outputs():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(500, 4)).astype(np.float32) * 1e-9
    np.testing.assert_array_equal(decide(outputs, np.eye(4)), decide(outputs))
    outputs = rng.normal(size=(500, 1)).astype(np.float32) * 1e-7 + np.float32(0.5)
    np.testing.assert_array_equal(decide(outputs, np.array([[0.0], [1.0]])), decide(outputs))
