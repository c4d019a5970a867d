"""The choice of rho, beta and the time on a validation split."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.runs.folder import RunFolder
from dnntk.training.evaluation import scores

__all__ = ["Selection", "solvable_times"]

SEARCH = "search.jsonl"

log = logging.getLogger("dnntk")

# (rho, beta, n) -> the flow on the first n training examples.
Fit = Callable[[float, float, int], KernelFlow]


class Selection:
    """Validation scores by rho, beta and number of training examples; none is computed twice."""

    def __init__(
        self,
        data: Dataset,
        held_out: int,
        times: tuple[float, ...],
        folder: RunFolder | None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Hold out the last examples; load the scores that ``folder`` holds.

        ``targets`` are the class targets of own data, as in `dnntk.data.labels.decide`.
        """
        self._x, self._y = data.x_train[-held_out:], data.y_train[-held_out:]
        self._targets = targets
        self._labels = None if data.labels_train is None else data.labels_train[-held_out:]
        self.fit_examples, self._times, self._folder = len(data.x_train) - held_out, times, folder
        self._scores: dict[tuple[float, float, int], list[dict[str, Any]]] = {}
        for line in [] if folder is None else folder.keep_lines(SEARCH):
            held = [score | {"time": float(score["time"])} for score in line["scores"]]
            self._scores[line["rho"], line["beta"], line["examples"]] = held

    def kernel(
        self, rhos: tuple[float, ...], betas: tuple[float, ...], fit: Fit, examples: int
    ) -> tuple[float, float]:
        """The pair (rho, beta) with the best score at its best time."""
        pairs = list(itertools.product(rhos, betas))
        if len(pairs) == 1:
            return pairs[0]
        examples = min(examples, self.fit_examples)
        log.info(
            "choosing rho and beta: %d pairs, %d training and %d validation examples",
            *(len(pairs), examples, len(self._x)),
        )
        best = {pair: self.best(*pair, examples, fit) for pair in pairs}
        return max(pairs, key=lambda pair: _rank(best[pair]))

    def best(self, rho: float, beta: float, examples: int, fit: Fit) -> dict[str, Any]:
        """The score of the best time: time, accuracy, loss."""
        key = (rho, beta, examples)
        if key not in self._scores:
            self._scores[key] = self._evaluated(fit(rho, beta, examples))
            if self._folder is not None:
                names = {"rho": rho, "beta": beta, "examples": examples}
                self._folder.append(SEARCH, names | {"scores": self._scores[key]})
        best = max(self._scores[key], key=_rank)
        log.info(
            "validation: rho = %g, beta = %g, %d examples: %s, loss %.4g at t = %g",
            *(rho, beta, examples),
            "" if best["accuracy"] is None else f"error {100 * (1 - best['accuracy']):.2f}%",
            *(best["loss"], best["time"]),
        )
        return best

    def _evaluated(self, flow: KernelFlow) -> list[dict[str, Any]]:
        times, found = solvable_times(flow, self._times), []
        for t, f in zip(times, flow.predict(self._x, times), strict=True):
            labelled = self._labels is not None
            loss, accuracy = scores(f, self._y, labelled, self._targets, self._labels)
            found.append({"time": t, "accuracy": accuracy, "loss": loss})
        return found


def solvable_times(flow: KernelFlow, times: Sequence[float]) -> list[float]:
    """The times in order; infinity is left out if the Gram matrix is too close to singular.

    Raises:
        InputError: infinity is left out and was the only time.
    """
    finite = sorted(t for t in times if math.isfinite(t))
    if len(finite) == len(times):
        return finite
    try:
        if finite:
            flow.solutions(finite)
        flow.solution(math.inf)
    except InputError as error:
        if not finite:
            raise
        log.warning("t = inf is left out: %s", error)
        return finite
    return [*finite, math.inf]


def _rank(score: dict[str, Any]) -> tuple[float, float]:
    return (score["accuracy"] or 0.0, -score["loss"])
