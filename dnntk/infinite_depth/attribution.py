"""Which training examples decided the class of a test example, exactly.

Of two classes with the targets T1 and T2, outputs f decide for T1 by the margin (f - m) d, where
m = (T1 + T2) / 2 and d = T1 - T2. In the flow from 0, f is linear in the training targets, f =
influence y (`dnntk.KernelFlow.influence`), so that training example j contributes
influence_j (y_j - m) d to the margin of the class that was decided for over the next best.
"""

import logging

import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.data.labels import decide
from dnntk.figures.attribution import Decision, TrainingShare
from dnntk.infinite_depth.kernel_flow import KernelFlow

__all__ = ["decisions"]

log = logging.getLogger("dnntk")

MOST_READ = 2e11  # bytes of the Gram matrix, by a Krylov solver
UNSURE, SURE, EXAMPLES = 2, 2, 6  # that are shown


def decisions(
    flow: KernelFlow,
    time: float,
    data: Dataset,
    *,
    shape: tuple[int, ...],
    outputs: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> list[Decision]:
    """What decided two test examples whose class is wrong or least certain, and two others.

    The list is empty if the examples are no labelled images, or if a Krylov solver would take as
    long as the prediction did.

    Args:
        flow: from 0, on all training examples.
        time: t.
        data: the examples, flat or not.
        shape: (H, W, c) of an image.
        outputs: f_t [n', d_out] on the test examples; None is ``flow.predict``.
        targets: [k, d_out] of the classes, as in `dnntk.data.labels.decide`.
    """
    if data.labels_test is None or data.labels_train is None or not len(data.x_test):
        return []
    if len(shape) != 3 or len(data.classes) < 2:
        return []
    iterations = flow.solution(time).iterations
    if iterations and (not flow.gram.stored or iterations * flow.gram.nbytes > MOST_READ):
        log.info("attribution: no picture, as it would take as long as the prediction")
        return []
    outputs = flow.predict(data.x_test, time) if outputs is None else outputs
    if targets is None:
        targets = np.array([[0.0], [1.0]]) if outputs.shape[1] == 1 else np.eye(outputs.shape[1])
    first = decide(outputs, targets)
    scores = outputs @ targets.T - 0.5 * np.sum(targets**2, 1)
    everyone = np.arange(len(outputs))
    best = scores[everyone, first]
    scores[everyone, first] = -np.inf
    second = np.argmax(scores, 1)
    margin = best - scores[everyone, second]
    shown = _chosen(margin, first, data.labels_test)
    found = []
    for test, influence in zip(shown, flow.influence(data.x_test[shown], time), strict=True):
        pair = targets[first[test]], targets[second[test]]
        toward = (data.y_train - (pair[0] + pair[1]) / 2) @ (pair[0] - pair[1])
        contributions = influence * toward
        shares = contributions / (np.abs(contributions).sum() or 1.0)
        largest = np.argsort(-np.abs(shares), kind="stable")[:EXAMPLES]
        examples = [
            TrainingShare(
                data.x_train[i].reshape(shape), data.classes[data.labels_train[i]], shares[i]
            )
            for i in largest
        ]
        classes = (data.labels_test[test], first[test], second[test])
        true, decided, next_best = (data.classes[c] for c in classes)
        image = data.x_test[test].reshape(shape)
        found.append(Decision(image, true, decided, next_best, examples))
    return found


def _chosen(margin: np.ndarray, decided: np.ndarray, labels: np.ndarray) -> list[int]:
    """The most certain mistakes, else the least certain examples; then typical ones, by class."""
    wrong = decided != labels
    unsure = np.lexsort((np.where(wrong, -margin, margin), ~wrong))[:UNSURE].tolist()
    order = np.argsort(margin, kind="stable")
    typical = order[np.argsort(np.abs(np.arange(len(order)) - len(order) // 2), kind="stable")]
    shown, classes = list(unsure), set()
    for i in typical.tolist():
        if len(shown) < UNSURE + SURE and i not in shown and not wrong[i]:
            if decided[i] not in classes:
                classes.add(decided[i])
                shown.append(i)
    return shown
