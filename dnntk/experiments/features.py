"""How near to their limit networks are with each draw of their random units: quasi-random depth.

A kernel is an average over its layers' random units, so a draw that fills their space more evenly
than independent ones do takes fewer layers (`dnntk.networks.random_units`). `compare_features`
measures, for each draw and depth and at C = infinity,

* ``kernel``: the relative Frobenius distance of networks' kernels from `limit_ntk`;
* ``random``: the part of it that the draw decides, the middle layers' average over their units. The
  rest, of order 1 / depth, is the first layer and the last one, which have no units before them;
* ``predictions``: the distance from the limit's f_t on held-out examples, relative to its size. The
  flow is that of the network's own kernel, which is where training ends (`dnntk.solve`) at
  C = infinity; no gradient is needed.

Networks of a few depths are also trained, at C = depth^2.2, in closed form and by gradient descent.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.experiments import rates
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.features_config import CASES, FeaturesConfig
from dnntk.figures.features import features_figure
from dnntk.infinite_depth.matrix_flow import MatrixFlow
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP
from dnntk.networks.random_units import random_units
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training import engine
from dnntk.training.config import TrainConfig
from dnntk.training.ensemble import Ensemble
from dnntk.training.evaluation import as_trained
from dnntk.training.run import load_dataset_for
from dnntk.training.solve import solve

__all__ = ["QUANTITIES", "Distances", "compare_features"]

QUANTITIES = ("kernel", "random", "predictions")
NEAR = 0.01  # the distance whose depth is reported


@dataclasses.dataclass(frozen=True)
class Distances:
    """Networks of one draw in one case.

    Attributes:
        draw: of `dnntk.networks.random_units.FEATURES`.
        random_units: M, of each layer.
        depths: [D].
        values: {quantity of `QUANTITIES`: [D, trials]}, relative distances from the limit.
        trained: {depth: {"kernel flow" | "solve" | "sgd": [networks]}}, distances of the same
            networks' predictions from the limit's.
    """

    draw: str
    random_units: int
    depths: np.ndarray
    values: dict[str, np.ndarray]
    trained: dict[int, dict[str, np.ndarray]]

    __repr__ = fields.short_repr

    def mean(self, quantity: str) -> np.ndarray:
        """[D], root mean squares over the trials."""
        return np.sqrt(np.mean(self.values[quantity] ** 2, axis=1))

    def fit(self, quantity: str) -> dict[str, float] | None:
        """The fitted power of depth, with its 95% interval; None for fewer than three depths."""
        return rates.fit_trials(zip(self.depths, self.values[quantity], strict=True))

    def near(self, quantity: str) -> float | None:
        """The depth at which the mean first falls to `NEAR`, interpolated between two depths.

        None if it is below `NEAR` at the first depth, or above it at all.
        """
        depth = float(rates.crossing(self.depths, self.mean(quantity), NEAR))
        return depth if self.depths[0] < depth < math.inf else None

    def described(self, quantity: str) -> str:
        """In words: the distance at the last depth, the power of depth, the depth of `NEAR`."""
        text = f"{self.mean(quantity)[-1]:.2e} at depth {self.depths[-1]:,}"
        fit, near = self.fit(quantity), self.near(quantity)
        if fit is not None:
            text += f"  depth^{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
        return text if near is None else f"{text}  {NEAR:.0%} at depth {near:,.0f}"

    def training_difference(self) -> float | None:
        """The largest one by training instead of the kernel's flow; None if none was trained."""
        differences = [
            np.abs(distances[how] - distances["kernel flow"]).max()
            for distances in self.trained.values()
            for how in ("solve", "sgd")
        ]
        return float(max(differences)) if differences else None

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json."""
        found: dict[str, Any] = {
            quantity: {
                "distance": dict(
                    zip(map(str, self.depths), self.mean(quantity).tolist(), strict=True)
                ),
                "fit": self.fit(quantity),
                "depth_of_1_percent": self.near(quantity),
            }
            for quantity in QUANTITIES
        }
        found["trained"] = {
            str(depth): {how: each.tolist() for how, each in distances.items()}
            for depth, distances in self.trained.items()
        }
        found["training_difference"] = self.training_difference()
        return found


@freeing_folders()
def compare_features(
    config: FeaturesConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Distances]]:
    """Measure the distance from the limit for every draw of the random units.

    Args:
        config: the experiment; None is the default one.
        workdir: folder for configuration, distances, summary, figure; None writes nothing.
        resume: keep what is measured in ``workdir`` and measure the rest.
        progress: show a progress bar per case.

    Returns:
        {case: {draw: distances}}; with M random units a layer, M > 1, the key is "draw-M".

    Raises:
        InputError: the configuration or the workdir cannot be used; the message says why.
    """
    config = config or FeaturesConfig()
    folder = ExperimentFolder("features", dataclasses.asdict(config), workdir, resume=resume)
    folder.write_config()
    with jax.enable_x64(True):
        found: dict[str, dict[str, Distances]] = {name: {} for name in config.cases}
        for name, count in itertools.product(config.cases, config.random_units):
            found[name] |= _Case(name, count, config, folder).result(progress)
    folder.finish(
        {
            name: {key: distances.summary() for key, distances in each.items()}
            for name, each in found.items()
        }
    )
    folder.draw("features", features_figure, found, NEAR)
    return found


class _Case:
    """The data of one case, the limit on them, and the networks."""

    def __init__(
        self, name: str, random_units: int, config: FeaturesConfig, folder: ExperimentFolder
    ) -> None:
        self.name, self.random_units, self.config, self.folder = name, random_units, config, folder
        self.arch, dataset_name = CASES[name]
        dataset = load_dataset_for(
            TrainConfig(arch=self.arch, dataset=dataset_name, seed=config.seed)
        )
        arrays = as_trained(dataset, self.arch == "mlp", "float64")
        self.x, self.y = (self._some(arrays[f"{key}_train"]) for key in "xy")
        self.held_out = self._some(arrays["x_test"])
        self.all = np.concatenate([self.x, self.held_out])
        self.limit = np.asarray(limit_ntk(self.all))
        self.predicted = self._flow(self.limit)
        # The limit's terms without random units, and of an output's constant 1.
        self.inputs, both = (
            np.asarray(limit_ntk(self.all, rho=0.0, beta=0.0, d_out=k)) for k in (1, 2)
        )
        self.one = both - self.inputs
        self._draw = {draw: self._sequence(draw) for draw in config.draws}

    def _sequence(self, draw: str) -> Callable[[jax.Array], Any]:
        """Keys [trials] to the units of as many layers as the deepest networks have and one more.

        One program for all depths: each compilation takes a second.
        """
        window = (DeepNarrowCNN.kernel_size,) * 2 if self.arch == "cnn" else ()
        deepest = 1 + max(self.config.depths + self.config.trained_depths)
        sizes = (deepest, self.x.shape[-1], window, 1.0, 1.0, np.dtype(float))
        return jax.jit(jax.vmap(lambda key: random_units(key, draw, *sizes, self.random_units)))

    def _key(self, draw: str) -> str:
        return draw if self.random_units == 1 else f"{draw}-{self.random_units}"

    def _some(self, rows: np.ndarray) -> np.ndarray:
        """Evenly spaced rows, ``examples`` at most: the toy's lie along its arc."""
        return rows[:: -(-len(rows) // self.config.examples)]

    def network(self, depth: int, scale: float) -> DeepNarrow:
        """The network, whatever its draw: its units are in ``variables["initial"]``."""
        kind = DeepNarrowMLP if self.arch == "mlp" else DeepNarrowCNN
        return kind(depth, self.y.shape[1], scale, random_units=self.random_units)

    def result(self, progress: bool) -> dict[str, Distances]:
        """The distances of every draw, by its key."""
        config, measured, trained = self.config, {}, {}
        pairs = [(depth, draw) for depth in config.depths for draw in config.draws]
        with progress_bar(
            pairs, desc=self._key(self.name), unit="draw", disable=not progress
        ) as bar:
            for depth, draw in bar:
                measured[depth, draw] = self.folder.arrays(
                    f"{self.name}-{self._key(draw)}-depth{depth}",
                    functools.partial(self._measure, depth, draw),
                )
        for depth in config.trained_depths:
            train = self._training(depth)
            for draw in config.draws:
                trained[depth, draw] = self.folder.arrays(
                    f"{self.name}-{self._key(draw)}-trained{depth}", functools.partial(train, draw)
                )
        return {
            self._key(draw): Distances(
                draw,
                self.random_units,
                np.array(config.depths),
                {
                    name: np.stack([measured[depth, draw][name] for depth in config.depths])
                    for name in QUANTITIES
                },
                {depth: trained[depth, draw] for depth in config.trained_depths},
            )
            for draw in config.draws
        }

    def _units(self, depth: int, draw: str) -> list[Any]:
        """``initial`` of the networks of one depth: the first points of each trial's own draw.

        The first points of a draw are those of a network of fewer layers, whatever the draw.
        """
        depth_key = jax.random.fold_in(jax.random.key(self.config.seed), depth)
        keys = jax.random.split(depth_key, self.config.trials)
        drawn = jax.device_get(self._draw[draw](keys))["middle"]
        return [
            {
                "first": {name: points[i, depth - 2] for name, points in drawn.items()},
                "middle": {name: points[i, : depth - 2] for name, points in drawn.items()},
            }
            for i in range(self.config.trials)
        ]

    def _measure(self, depth: int, draw: str) -> dict[str, np.ndarray]:
        """`QUANTITIES` of all trials."""
        model, rows = self.network(depth, math.inf), []
        for units in self._units(depth, draw):
            own = np.asarray(RandomFeatures(model, {"initial": units})(self.all, self.all))
            first = np.sum(np.maximum(units["first"]["bias"], 0) ** 2) * self.one
            average = (depth * own - (depth - 1) * self.inputs - first) / (depth - 2)
            rows.append(
                [
                    self._kernel_distance(own),
                    self._kernel_distance(average + self.inputs),
                    self._distance(self._flow(own)),
                ]
            )
        return dict(zip(QUANTITIES, np.array(rows).T, strict=True))

    def _flow(self, kernel: np.ndarray) -> np.ndarray:
        """Outputs on the held-out examples by a kernel of all examples."""
        return MatrixFlow(kernel[:, : len(self.x)], self.y).predict(self.config.time)

    def _kernel_distance(self, kernel: np.ndarray) -> float:
        return float(np.linalg.norm(kernel - self.limit) / np.linalg.norm(self.limit))

    def _distance(self, outputs: np.ndarray) -> float:
        return float(np.linalg.norm(outputs - self.predicted) / np.linalg.norm(self.predicted))

    def _training(self, depth: int) -> Any:
        """Of the first networks of a draw, trained in closed form and by descent: the distances."""
        count, time = self.config.trained, self.config.time
        model = self.network(depth, float(depth) ** 2.2)
        largest = np.linalg.norm(self.limit[: len(self.x), : len(self.x)], 2) / len(self.x)
        steps = math.ceil(time * float(largest))  # half as long as the longest that is stable
        descend = Ensemble(model, count, self.x, self.y).descent(time / steps)
        predict = jax.jit(lambda p, f: engine.apply(model, p, f, jnp.asarray(self.held_out)))

        def train(draw: str) -> dict[str, np.ndarray]:
            units = self._units(depth, draw)[:count]
            shapes = jax.eval_shape(model.init, jax.random.key(0), self.x[:1])["params"]
            start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
            frozen = {"initial": stack(units)}
            descended, _ = descend(stack([start] * count), frozen, steps)
            found: dict[str, list[float]] = {"kernel flow": [], "solve": [], "sgd": []}
            for i, initial in enumerate(units):
                variables = {"params": start, "initial": initial}
                solved, _ = solve(model, variables, self.x, self.y, time=time, progress=False)
                params = jax.tree.map(lambda a, i=i: a[i], descended)
                kernel = RandomFeatures(self.network(depth, math.inf), variables)
                for how, outputs in (
                    ("kernel flow", self._flow(np.asarray(kernel(self.all, self.all)))),
                    ("solve", predict(solved["params"], {"initial": initial})),
                    ("sgd", predict(params, {"initial": initial})),
                ):
                    found[how].append(self._distance(np.asarray(outputs)))
            return {how: np.array(each) for how, each in found.items()}

        return train
