"""How deep is infinitely deep? The depth at which networks are within epsilon of their limit.

`required_depths` predicts that depth from one sample of random units (`Spread.depth`), and measures
it with networks whose layers have independent or Sobol units:

* linear networks (C infinite) of given depths, each the exact gradient flow of its own kernel: the
  RMS of their distance from the limit, relative to the limit, and the share of held-out examples
  that they put into another class than the limit does. The measured depth is where a line through
  the neighbouring depths, on logarithmic scales, meets epsilon, or 1% of the decisions;
* networks of the predicted depths, at C = depth^2.2, trained in closed form by `dnntk.solve`.

The prediction is for independent units; Sobol units may be nearer.
"""

import dataclasses
import logging
import math
import os
from functools import partial
from typing import Any

import jax
import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.data.labels import decide
from dnntk.experiments import rates
from dnntk.experiments.compared_networks import ComparedNetworks
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.required_depth_config import RequiredDepthConfig
from dnntk.figures.required_depth import required_depth_figure
from dnntk.infinite_depth.spread import Spread, initialization_spread, linear_predictions
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training.evaluation import as_trained
from dnntk.training.run import load_dataset_for

__all__ = ["DRAWS", "Requirement", "Trained", "required_depths"]

log = logging.getLogger("dnntk")

DRAWS = ("gaussian", "sobol")
NAMES = {"gaussian": "", "sobol": "_sobol"}  # ends of names in summary.json
DIFFERENT = 0.01  # share of the decisions that may differ from the limit's
LEAST_TRAINED = 10  # networks of fewer layers are not what the first order is for
RESAMPLES = 200  # of the trials, for an interval


@dataclasses.dataclass(frozen=True)
class Trained:
    """Networks of one predicted depth, trained in closed form to one time.

    Attributes:
        epsilon, time, depth: networks of ``depth`` should be ``epsilon`` from the limit at
            ``time``.
        distances: {draw: [trials]}, from the limit, relative.
        disagreements: {draw: [trials]}, shares of held-out decisions that are not the limit's.
    """

    epsilon: float
    time: float
    depth: int
    distances: dict[str, np.ndarray]
    disagreements: dict[str, np.ndarray]

    def distance(self, draw: str) -> np.ndarray:
        """RMS over the trials, and its 95% interval: [3]."""
        return _with_interval(self.distances[draw], lambda trials: np.sqrt(np.mean(trials**2, -1)))

    def described(self) -> str:
        """In words: how far the networks are from the limit."""
        found = ", ".join(
            "{} {:.2%} [{:.2%}, {:.2%}], {:.1%} of the decisions".format(
                *(draw, *self.distance(draw), 1 - self.disagreements[draw].mean())
            )
            for draw in DRAWS
        )
        return (
            f"t={self.time:g} trained at {self.depth:,} layers ({100 * self.epsilon:g}%): {found}"
        )

    def summary(self) -> dict[str, Any]:
        """A row for summary.json."""
        row: dict[str, Any] = {"time": self.time, "epsilon": self.epsilon, "depth": self.depth}
        row |= _columns("distance", {draw: self.distance(draw)[:, None] for draw in DRAWS}, 0)
        for draw in DRAWS:
            row[f"agreement{NAMES[draw]}"] = 1 - float(self.disagreements[draw].mean())
        return row


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The depth that one problem requires with one number of training examples.

    Attributes:
        times: [T].
        epsilons: [E].
        predicted: [E, T] depths, by `Spread.depth`.
        depths: [D], of the linear networks.
        distances: {draw: [D, trials, T]}, their relative distances from the limit.
        disagreements: {draw: [D, trials, T]}, shares of held-out decisions that are not the
            limit's.
        trained: networks of predicted depths; none but with the most training examples.
    """

    times: np.ndarray
    epsilons: np.ndarray
    predicted: np.ndarray
    depths: np.ndarray
    distances: dict[str, np.ndarray]
    disagreements: dict[str, np.ndarray]
    trained: list[Trained]

    __repr__ = fields.short_repr

    def measured(self, draw: str, epsilon: float) -> np.ndarray:
        """[3, T], the depth at which networks are ``epsilon`` from the limit, and its interval.

        The first of ``depths`` if all are nearer, infinity if none is.
        """
        squares = np.moveaxis(self.distances[draw] ** 2, 1, -1)  # [D, T, trials]
        crossing = partial(rates.crossing, self.depths, level=epsilon**2)
        return _with_interval(squares, lambda trials: crossing(np.mean(trials, -1)))

    def decided(self, draw: str) -> np.ndarray:
        """[3, T], the depth at which 99% of the decisions are the limit's, and its interval."""
        shares = np.moveaxis(self.disagreements[draw], 1, -1)
        crossing = partial(rates.crossing, self.depths, level=DIFFERENT)
        return _with_interval(shares, lambda trials: crossing(np.mean(trials, -1)))

    def power(self, draw: str, i: int) -> dict[str, float] | None:
        """The fitted power of depth in the distance at time i, with its 95% interval."""
        return rates.fit_trials(zip(self.depths, self.distances[draw][..., i], strict=True))

    def shown(self, depth: float) -> str:
        """A measured depth, or that it is beyond the measured ones."""
        if math.isinf(depth):
            return f">{self.depths[-1]:,}"
        return f"<={depth:,.0f}" if depth <= self.depths[0] else f"{depth:,.0f}"

    def described(self) -> list[str]:
        """A line a time: the predicted depth, and the measured ones."""
        epsilon = self.epsilons[0]
        lines = []
        for i, time in enumerate(self.times):
            near, same = (
                [self.shown(depth) for depth in depths]
                for depths in (
                    [self.measured(draw, epsilon)[0, i] for draw in DRAWS],
                    [self.decided(draw)[0, i] for draw in DRAWS],
                )
            )
            lines.append(
                f"t={time:<8g} {100 * epsilon:g}%: predicted {self.predicted[0, i]:,}, measured "
                f"{near[0]}, Sobol {near[1]}; 99% of decisions: {same[0]}, Sobol {same[1]}"
            )
        return lines + [each.described() for each in self.trained]

    def summary(self, data: str, examples: int) -> dict[str, list[dict[str, Any]]]:
        """Rows for the tables of summary.json: a row a time and epsilon, a time, trained networks.

        A name without a draw is of independent units; ``_low`` and ``_high`` are 95% intervals.
        """
        problem = {"data": data, "examples": examples}
        times, near, same = self.times.tolist(), [], []
        for epsilon, predicted in zip(self.epsilons.tolist(), self.predicted, strict=True):
            measured = {draw: self.measured(draw, epsilon) for draw in DRAWS}
            for i, time in enumerate(times):
                at = {"time": time, "epsilon": epsilon, "predicted": int(predicted[i])}
                near.append(problem | at | _columns("measured", measured, i))
        decided = {draw: self.decided(draw) for draw in DRAWS}
        for i, time in enumerate(times):
            powers = {f"distance_power{NAMES[draw]}": self.power(draw, i) for draw in DRAWS}
            same.append(problem | {"time": time} | _columns("depth", decided, i) | powers)
        trained = [problem | each.summary() for each in self.trained]
        return {"depths": near, "99% of decisions": same, "trained": trained}


@freeing_folders()
def required_depths(
    config: RequiredDepthConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, dict[int, Requirement]]:
    """Predict and measure the depth at which networks are near their infinitely deep limit.

    Args:
        config: the experiment; None is the default one, on scikit-learn's digits.
        workdir: folder for configuration, runs, summary, figure; None writes nothing.
        resume: keep what is measured in ``workdir`` and measure the rest.
        progress: show a progress bar per dataset and number of training examples.

    Returns:
        {dataset: {number of training examples: requirement}}.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
    """
    config = config or RequiredDepthConfig()
    folder = ExperimentFolder("required_depth", dataclasses.asdict(config), workdir, resume=resume)
    loaded = {name: load_dataset_for(config.network(name, 2, DRAWS[0])) for name in config.datasets}
    folder.write_config()
    found: dict[str, dict[int, Requirement]] = {}
    for name, dataset in loaded.items():
        log.info("data: %s", dataset.description)
        counts = sorted({min(n, len(dataset.x_train)) for n in config.train_examples})
        found[name] = {
            count: _Problem(name, count, config, dataset, folder, progress).result(
                config.trained if count == counts[-1] else 0
            )
            for count in counts
        }
    each = [one.summary(name, n) for name, by in found.items() for n, one in by.items()]
    folder.finish({table: [row for one in each for row in one[table]] for table in each[0]})
    folder.draw("required_depth", required_depth_figure, found)
    return found


class _Problem:
    """One dataset with one number of training examples."""

    def __init__(
        self,
        name: str,
        count: int,
        config: RequiredDepthConfig,
        dataset: Dataset,
        folder: ExperimentFolder,
        progress: bool,
    ) -> None:
        self.name, self.config, self.folder, self.progress = name, config, folder, progress
        arrays = as_trained(dataset, config.arch == "mlp", "float32")
        self.x, self.y = arrays["x_train"][:count], arrays["y_train"][:count]
        self.held_out = arrays["x_test"][: config.test_examples]
        self.label = f"{name}-{count}"
        self.data = self.x, self.y, self.held_out, config.times
        self.options: dict[str, Any] = {"rho": config.rho, "beta": config.beta}
        self.key = jax.random.key(config.seed)

    def result(self, trained: int) -> Requirement:
        """The requirement, with networks trained at so many predicted depths."""
        config, times = self.config, np.array(self.config.times)
        self.limit, predicted = self._predicted()
        pairs = [(draw, depth) for draw in DRAWS for depth in config.depths]
        found = {}
        with progress_bar(pairs, desc=self.label, unit="depth", disable=not self.progress) as bar:
            for draw, depth in bar:
                found[draw, depth] = self.folder.arrays(
                    f"{self.label}-{draw}-depth{depth}", partial(self._linear, draw, depth)
                )
        distances, disagreements = (
            {
                draw: np.stack([found[draw, depth][name] for depth in config.depths])
                for draw in DRAWS
            }
            for name in ("distances", "disagreements")
        )
        fits = (predicted >= LEAST_TRAINED) & (predicted <= config.depths[-1])
        chosen = sorted(np.argwhere(fits), key=lambda place: -predicted[tuple(place)])[:trained]
        return Requirement(
            *(times, np.array(config.epsilons), predicted, np.array(config.depths)),
            *(distances, disagreements),
            [self._trained(e, i, int(predicted[e, i])) for e, i in np.array(chosen).tolist()],
        )

    def _predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """(the limit's predictions [T, m, d_out], predicted depths [E, T])."""

        def compute() -> dict[str, np.ndarray]:
            samples = self.config.samples
            return dataclasses.asdict(
                initialization_spread(*self.data, samples=samples, key=self.key, **self.options)
            )

        spread = Spread(**self.folder.arrays(f"{self.label}-spread", compute))
        return spread.prediction, np.stack([spread.depth(e) for e in self.config.epsilons])

    def _linear(self, draw: str, depth: int) -> dict[str, np.ndarray]:
        """Distances and disagreements [trials, T] of linear networks."""
        outputs = linear_predictions(
            *self.data,
            depth=depth,
            scale=math.inf,
            features=draw,
            draws=self.config.trials,
            key=jax.random.fold_in(self.key, depth),
            **self.options,
        )
        return _compared(outputs, self.limit)

    def _trained(self, e: int, i: int, depth: int) -> Trained:
        """Networks trained to time i, whose distance should be epsilon e."""
        time = self.config.times[i]
        found = {
            draw: self.folder.arrays(
                f"{self.label}-{draw}-t{fields.exact(time)}-trained{depth}",
                partial(self._solved, draw, i, depth),
            )
            for draw in DRAWS
        }
        distances, disagreements = (
            {draw: found[draw][name] for draw in DRAWS} for name in ("distances", "disagreements")
        )
        return Trained(self.config.epsilons[e], time, depth, distances, disagreements)

    def _solved(self, draw: str, i: int, depth: int) -> dict[str, np.ndarray]:
        """Distances and disagreements [trials] of networks trained in closed form to time i."""
        model = self.config.network(self.name, depth, draw).model(self.y.shape[1])
        networks = ComparedNetworks(model, self.x, self.y, self.held_out, self.config.seed)
        label, times = f"{self.label}, {draw}, depth {depth}", [self.config.times[i]]
        outputs = networks.solve(range(self.config.trials), times, label, self.progress)
        return _compared(outputs[:, 0], self.limit[i])


def _compared(outputs: np.ndarray, limit: np.ndarray) -> dict[str, np.ndarray]:
    """Relative distances of outputs [trials, ..., m, d_out] from the limit's, and disagreements."""
    square = lambda f: np.mean(f**2, axis=(-2, -1))  # noqa: E731
    classes, right = (
        decide(f.reshape(-1, f.shape[-1])).reshape(f.shape[:-1]) for f in (outputs, limit)
    )
    return {
        "distances": np.sqrt(square(outputs - limit) / square(limit)),
        "disagreements": np.mean(classes != right, axis=-1),
    }


def _columns(name: str, values: dict[str, np.ndarray], i: int) -> dict[str, float]:
    """Columns of a summary's row: values {draw: [3, T]} at time i, with their intervals."""
    ends = ("", "_low", "_high")
    return {
        f"{name}{NAMES[draw]}{end}": float(value)
        for draw, found in values.items()
        for end, value in zip(ends, found[:, i], strict=True)
    }


def _with_interval(trials: np.ndarray, statistic: Any) -> np.ndarray:
    """The statistic of [..., trials], and its 95% interval over resampled trials: [3, ...]."""
    count = trials.shape[-1]
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    each = np.stack([statistic(trials[..., pick]) for pick in picks])
    low, high = np.sort(each, axis=0)[[RESAMPLES // 40, -1 - RESAMPLES // 40]]
    return np.stack([statistic(trials), low, high])
