"""Hyperparameters of the infinitely deep network, chosen on examples that it was not fitted to."""

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

SEARCH = "search.jsonl"

log = logging.getLogger("dnntk")

# (rho, beta, examples) -> the flow on so many training examples.
Fit = Callable[[float, float, int], KernelFlow]


class Selection:
    """Validation scores by kernel and number of training examples; kept, so none is found twice."""

    def __init__(
        self,
        data: Dataset,
        held_out: int,
        times: tuple[float, ...],
        folder: RunFolder | None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Hold out the last examples; take up the scores that ``folder`` has.

        ``targets`` are those of the classes of own data, as in `dnntk.training.evaluation.decide`.
        """
        self._x, self._y = data.x_train[-held_out:], data.y_train[-held_out:]
        self._labelled, self._targets = data.labels_train is not None, targets
        labels = None if targets is None else data.labels_train
        self._labels = None if labels is None else labels[-held_out:]
        self.rest, self._times, self._folder = len(data.x_train) - held_out, times, folder
        self._found: dict[tuple[float, float, int], list[dict[str, Any]]] = {}
        for line in [] if folder is None else folder.keep_lines(SEARCH):
            held = [score | {"time": float(score["time"])} for score in line["scores"]]
            self._found[line["rho"], line["beta"], line["examples"]] = held

    def kernel(
        self, rhos: tuple[float, ...], betas: tuple[float, ...], fit: Fit, examples: int
    ) -> tuple[float, float]:
        """The pair (rho, beta) with the best score at its best time."""
        pairs = list(itertools.product(rhos, betas))
        if len(pairs) == 1:
            return pairs[0]
        examples = min(examples, self.rest)
        log.info(
            "choosing rho and beta: %d pairs, %d training and %d validation examples",
            *(len(pairs), examples, len(self._x)),
        )
        best = {pair: self.best(*pair, examples, fit) for pair in pairs}
        return max(pairs, key=lambda pair: _rank(best[pair]))

    def best(self, rho: float, beta: float, examples: int, fit: Fit) -> dict[str, Any]:
        """The best of the times: time, accuracy, loss."""
        key = (rho, beta, examples)
        if key not in self._found:
            self._found[key] = self._scored(fit(rho, beta, examples))
            self._keep(key)
        best = max(self._found[key], key=_rank)
        log.info(
            "validation: rho = %g, beta = %g, %d examples: %s, loss %.4g at t = %g",
            *(rho, beta, examples),
            "" if best["accuracy"] is None else f"error {100 * (1 - best['accuracy']):.2f}%",
            *(best["loss"], best["time"]),
        )
        return best

    def _scored(self, flow: KernelFlow) -> list[dict[str, Any]]:
        times, found = usable(flow, self._times), []
        for t, f in zip(times, flow.predict(self._x, times), strict=True):
            loss, accuracy = scores(f, self._y, self._labelled, self._targets, self._labels)
            found.append({"time": t, "accuracy": accuracy, "loss": loss})
        return found

    def _keep(self, key: tuple[float, float, int]) -> None:
        if self._folder is None:
            return
        line = dict(zip(("rho", "beta", "examples"), key, strict=True))
        self._folder.append(SEARCH, line | {"scores": self._found[key]})


def usable(flow: KernelFlow, times: Sequence[float]) -> list[float]:
    """The times in order; infinity is left out where the Gram matrix is too near to singular.

    Raises:
        InputError: there is no other time.
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
