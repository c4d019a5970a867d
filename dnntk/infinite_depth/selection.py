"""The choice of rho, beta and the time, or of a ridge, by scores that need no test set.

`validation_scores` are those on held-out examples, `leave_one_out_scores` those on each example
from all the others, and `evidence_scores` the likelihood of a Gaussian process.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from scipy.optimize import minimize_scalar

from dnntk.data.datasets import Dataset
from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.runs.folder import RunFolder
from dnntk.training.evaluation import scores

__all__ = [
    *("Fit", "Selection", "evidence_scores", "leave_one_out_scores", "solvable_times"),
    "validation_scores",
]

SEARCH = "search.jsonl"
TINY = float(np.finfo(np.float64).tiny)
NOISES = 25  # that are tried, from the largest eigenvalue down to its rounding error

log = logging.getLogger("dnntk")

# (rho, beta, n) -> the flow on the first n training examples.
Fit = Callable[[float, float, int], KernelFlow]
# A flow's scores: a dict a time, with time, accuracy and loss; or with time, evidence and noise.
Evaluate = Callable[[KernelFlow], list[dict[str, Any]]]


class Selection:
    """Scores by rho, beta and number of training examples; none is computed twice."""

    def __init__(self, named: str, evaluate: Evaluate, folder: RunFolder | None) -> None:
        """Load the scores that ``folder`` holds; ``named`` says in the log whose they are."""
        self._named, self._evaluate, self._folder = named, evaluate, folder
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
        log.info(
            "choosing rho and beta by %s: %d pairs, %d training examples",
            *(self._named, len(pairs), examples),
        )
        best = {pair: self.best(*pair, examples, fit) for pair in pairs}
        return max(pairs, key=lambda pair: _rank(best[pair]))

    def best(self, rho: float, beta: float, examples: int, fit: Fit) -> dict[str, Any]:
        """The best score: time, accuracy, loss; or as `evidence_scores`."""
        key = (rho, beta, examples)
        if key not in self._scores:
            self._scores[key] = self._evaluate(fit(rho, beta, examples))
            if self._folder is not None:
                names = {"rho": rho, "beta": beta, "examples": examples}
                self._folder.append(SEARCH, names | {"scores": self._scores[key]})
            log.info(
                "%s: rho = %g, beta = %g, %d examples: %s",
                *(self._named, rho, beta, examples, _described(max(self._scores[key], key=_rank))),
            )
        return max(self._scores[key], key=_rank)


def validation_scores(
    data: Dataset, held_out: int, times: Sequence[float], targets: np.ndarray | None = None
) -> Evaluate:
    """Scores on the last ``held_out`` training examples, of a flow on others.

    ``targets`` are the class targets of own data, as in `dnntk.data.labels.decide`.
    """
    part = slice(-held_out, None)

    def evaluate(flow: KernelFlow) -> list[dict[str, Any]]:
        found = solvable_times(flow, times)
        return _scored(found, flow.predict(data.x_train[part], found), data, part, targets)

    return evaluate


def leave_one_out_scores(
    data: Dataset, times: Sequence[float], targets: np.ndarray | None = None
) -> Evaluate:
    """Scores on every example of a flow, the first training ones, as the others predict it.

    ``targets`` are as in `validation_scores`.
    """

    def evaluate(flow: KernelFlow) -> list[dict[str, Any]]:
        found = solvable_times(flow, times)
        outputs = flow.leave_one_out(found)
        return _scored(found, outputs, data, slice(outputs.shape[1]), targets)

    return evaluate


def evidence_scores(data: Dataset) -> Evaluate:
    """The best noise's score, log p(y) an entry of y, for y ~ N(0, scale (K + noise)).

    Predictions at infinite time, with the ridge noise / n, do not depend on the scale. The
    kernel's own is set by the network's parametrization and not by the targets, so that evidence
    is maximal over it, too.

    A score is a dict of ``evidence``, ``noise``, ``scale``, and ``time``, infinity.
    """

    def evaluate(flow: KernelFlow) -> list[dict[str, Any]]:
        n = len(flow.eigenvalues)
        y = np.zeros_like(data.y_train[:n])
        nothing = flow.for_targets(y, ridge=0.0)

        def likelihood(log_noise: float) -> tuple[float, float]:
            noise = math.exp(log_noise)
            # log p(y) and log p(0) differ by the quadratic form of y.
            both = (each.log_marginal_likelihood(noise) for each in (flow, nothing))
            of_y, of_0 = (cast(float, value) for value in both)
            scale = max(2 * (of_0 - of_y) / y.size, TINY)
            return of_0 / y.size - 0.5 * (1 + math.log(scale)), scale

        largest = n * float(flow.eigenvalues[-1])
        rounding = n * float(np.finfo(flow.gram.cross.dtype).eps)
        tried = np.linspace(math.log(rounding * largest), math.log(largest), NOISES)
        best = int(np.argmax([likelihood(one)[0] for one in tried]))
        around = tried[max(best - 1, 0)], tried[min(best + 1, NOISES - 1)]
        found = minimize_scalar(lambda one: -likelihood(one)[0], bounds=around, method="bounded").x
        (evidence, scale), noise = likelihood(found), math.exp(found)
        return [{"time": math.inf, "evidence": evidence, "noise": noise, "scale": scale}]

    return evaluate


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


def _scored(
    times: Sequence[float],
    outputs: np.ndarray,
    data: Dataset,
    part: slice,
    targets: np.ndarray | None,
) -> list[dict[str, Any]]:
    """The scores of outputs [times, n, d_out] on a part of the training examples."""
    labels = None if data.labels_train is None else data.labels_train[part]
    found = []
    for t, f in zip(times, outputs, strict=True):
        loss, accuracy = scores(f, data.y_train[part], labels is not None, targets, labels)
        found.append({"time": t, "accuracy": accuracy, "loss": loss})
    return found


def _rank(score: dict[str, Any]) -> tuple[float, float]:
    if "evidence" in score:
        return (score["evidence"], 0.0)
    return (score["accuracy"] or 0.0, -score["loss"])


def _described(score: dict[str, Any]) -> str:
    if "evidence" in score:
        return f"evidence {score['evidence']:.5g} an output, noise {score['noise']:.3g}"
    error = "" if score["accuracy"] is None else f"error {100 * (1 - score['accuracy']):.2f}%, "
    return f"{error}loss {score['loss']:.4g} at t = {score['time']:g}"
