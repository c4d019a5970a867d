"""How good a network's outputs are."""

import numpy as np
import pytest

from dnntk import Dataset, InputError
from dnntk.training.evaluation import (
    confusion,
    constant_loss,
    described,
    least_loss,
    mean_squared_error,
    split_scores,
    with_targets_of,
)


def test_scores_are_the_thesis_s_loss_and_the_share_of_right_decisions():
    outputs, y = np.array([[0.2], [0.9], [0.6], [0.0]]), np.array([[0.0], [1.0], [0.0], [0.0]])
    found = split_scores("test", outputs, y, labelled=True)
    loss = 0.5 * (0.2**2 + 0.1**2 + 0.6**2) / 4
    np.testing.assert_allclose(found["test_loss"], loss)
    assert found["test_accuracy"] == 0.75
    np.testing.assert_array_equal(confusion(outputs, y[:, 0].astype(int), 2), [[2, 1], [0, 1]])
    np.testing.assert_allclose(mean_squared_error(loss, 1), np.mean((outputs - y) ** 2))
    assert split_scores("test", outputs, y, labelled=False)["test_accuracy"] is None
    words = described(found | {"train_loss": 0.5, "train_accuracy": None})
    assert words == "train loss 0.5, test loss 0.05125, 75.00% test"


@pytest.mark.parametrize("outputs", [1, 2])
def test_logits_of_two_classes_score_alike_in_one_column_or_two(outputs):
    f, right = np.array([-1.0, 0.3, 0.2, 4.0]), np.array([0, 1, 0, 1])
    p = np.where(right == 1, 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(f)))
    y = right[:, None] if outputs == 1 else np.eye(2)[right]
    logits = f[:, None] if outputs == 1 else np.stack([0 * f, f], 1)
    found = split_scores("test", logits, y.astype(float), True, loss="cross_entropy")
    np.testing.assert_allclose(found["test_loss"], -np.mean(np.log(p)))
    assert found["test_accuracy"] == 0.75
    uneven = np.full_like(y, 0.2, float) if outputs == 1 else np.tile([0.8, 0.2], (4, 1))
    entropy = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    np.testing.assert_allclose(least_loss(uneven, "cross_entropy"), entropy)
    expected = -(0.2 + 0.8) * np.log(0.5)
    np.testing.assert_allclose(constant_loss(uneven, y, "cross_entropy"), expected)
    assert least_loss(y, "cross_entropy") == 0


def test_targets_are_those_of_the_loss():
    data = Dataset(x_train=np.eye(3), y_train=np.eye(3), x_test=np.eye(3), y_test=np.eye(3))
    smooth = with_targets_of(data, "cross_entropy", 0.3)
    np.testing.assert_allclose(smooth.y_train, 0.7 * np.eye(3) + 0.1)
    np.testing.assert_array_equal(smooth.y_train, smooth.y_test)
    other = Dataset(x_train=np.eye(3), y_train=2 * np.eye(3))
    assert with_targets_of(other, "squared", 0.0) is other
    with pytest.raises(InputError, match="^y_train: expected probabilities"):
        with_targets_of(other, "cross_entropy", 0.0)
