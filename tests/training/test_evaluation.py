"""How good a network's outputs are."""

import numpy as np

from dnntk.training.evaluation import confusion, described, mean_squared_error, split_scores


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
