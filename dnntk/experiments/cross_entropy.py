"""Theorem 3.2 beyond squared error: networks trained on cross-entropy, beside their limit.

The theorem holds for every loss for which the integral of ||delta||, the loss's derivative by the
outputs, stays bounded: a network's kernel then stays still, and `dnntk.KernelFlow` predicts it.
With smoothed labels cross-entropy has a minimizer and the integral is finite for all times; with
one-hot labels outputs grow like log t, delta falls like 1 / t, and the integral grows like log t.
`measure_cross_entropy` trains networks of growing depth by gradient descent, and measures at
several times

* ``distance``: of their outputs on held-out examples from the limit's by the same steps, relative
  to its size; ``by_steps`` is the distance of these from `KernelFlow`'s, which takes none;
* ``movement``: of their kernels on the training examples, ||K_t - K_0|| / ||K_0||.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.experiments import rates
from dnntk.experiments.cross_entropy_config import CrossEntropyConfig
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.cross_entropy import cross_entropy_figure
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.pointwise_loss import Pointwise
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrowMLP
from dnntk.ntk.empirical import empirical_ntk
from dnntk.ntk.measures import kernel_movement
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training import engine
from dnntk.training.ensemble import Ensemble
from dnntk.training.evaluation import as_trained, with_targets_of
from dnntk.training.run import load_dataset_for

__all__ = ["Smoothed", "measure_cross_entropy"]

LOSS = "cross_entropy"
GRID = 200  # times of the integral, evenly spaced on a logarithmic scale
# A step is at most this part of the time before it, so that it follows the flow.
PART_OF_TIME = 0.2


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """Networks trained on labels of one smoothing.

    Attributes:
        depths: [D].
        times: [T].
        distance: [D, T, trials].
        movement: [D, T, trials].
        by_steps: [T], the distance of the limit by these steps from the flow.
        integral: [T], of ||delta|| (root mean square over the examples) from 0 on, in the limit.
    """

    depths: np.ndarray
    times: np.ndarray
    distance: np.ndarray
    movement: np.ndarray
    by_steps: np.ndarray
    integral: np.ndarray

    __repr__ = fields.short_repr

    def fit(self, quantity: str, time: int = -1) -> dict[str, float] | None:
        """The fitted power of depth at a time's index, with its 95% interval."""
        return rates.fit_trials(zip(self.depths, getattr(self, quantity)[:, time], strict=True))

    def described(self, quantity: str) -> str:
        """In words: the values at the last time of the first and the last depth, and the power."""
        first, last = (np.exp(np.log(getattr(self, quantity)[i, -1]).mean()) for i in (0, -1))
        text = f"{first:.2e} at depth {self.depths[0]:,}, {last:.2e} at {self.depths[-1]:,}"
        if (fit := self.fit(quantity)) is None:
            return text
        return f"{text}: depth^{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json."""
        names = ("distance", "movement")
        means = {n: np.exp(np.log(getattr(self, n)).mean(-1)).tolist() for n in names}
        fits = {f"{n}_fit": [self.fit(n, i) for i in range(len(self.times))] for n in names}
        of_limit = {n: getattr(self, n).tolist() for n in ("by_steps", "integral")}
        return means | fits | of_limit


@freeing_folders()
def measure_cross_entropy(
    config: CrossEntropyConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[float, Smoothed]:
    """Train networks of every depth on every smoothing of the labels.

    Args:
        config: the experiment; None is the default one.
        workdir: folder for configuration, measurements, summary, figure; None writes nothing.
        resume: keep what is measured in ``workdir`` and measure the rest.
        progress: show a progress bar.

    Returns:
        {smoothing: measurements}.

    Raises:
        InputError: the configuration or the workdir cannot be used; the message says why.
    """
    config = config or CrossEntropyConfig()
    settings = dataclasses.asdict(config)
    folder = ExperimentFolder("cross_entropy", settings, workdir, resume=resume)
    folder.write_config()
    found, cells = {}, len(config.smoothings) * len(config.depths)
    with (
        jax.enable_x64(True),
        progress_bar(total=cells, desc="cross-entropy", unit="depth", disable=not progress) as bar,
    ):
        for smoothing in config.smoothings:
            case, runs = _Case(smoothing, config), []
            for depth in config.depths:
                name = f"smoothing{fields.exact(smoothing)}-depth{depth}"
                runs.append(folder.arrays(name, functools.partial(case.train, depth)))
                bar.update()
            arrays = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
            depths, times = np.array(config.depths), np.array(config.times)
            of_limit = {"by_steps": case.distance(case.flow), "integral": case.integral()}
            found[smoothing] = Smoothed(depths=depths, times=times, **arrays, **of_limit)
    folder.finish({fields.exact(smoothing): each.summary() for smoothing, each in found.items()})
    folder.draw("cross_entropy", cross_entropy_figure, found)
    return found


class _Case:
    """The data of one smoothing, and the limit on them."""

    def __init__(self, smoothing: float, config: CrossEntropyConfig) -> None:
        self.config, run = config, config.run(smoothing)
        dataset = with_targets_of(load_dataset_for(run), LOSS, smoothing)
        arrays = as_trained(dataset, True, "float64")
        self.x, self.y, self.held_out = (
            arrays[name][: config.examples] for name in ("x_train", "y_train", "x_test")
        )
        kernel = functools.partial(limit_ntk, d_out=self.y.shape[1])
        self.kernel = np.asarray(kernel(self.x))
        self.limit = KernelFlow(kernel, self.x, self.y, loss=LOSS, tolerance=1e-8, progress=False)
        self.pointwise = Pointwise(LOSS, self.y)
        self.flow = self.limit.predict(self.held_out, config.times)
        self.predicted = self._descent()

    def integral(self) -> np.ndarray:
        """`Smoothed.integral`, by the trapezoidal rule over t; delta is constant at first."""
        times = self.config.times
        grid = np.union1d(np.geomspace(1e-4 * times[0], times[-1], GRID), (0.0, *times))
        outputs = self.limit.train_predictions(grid.tolist())
        sizes = [np.sqrt(np.mean(np.sum(self.pointwise.gradient(f) ** 2, 1))) for f in outputs]
        areas = np.diff(grid) * (np.array(sizes[1:]) + sizes[:-1]) / 2
        return np.append(0, np.cumsum(areas))[np.searchsorted(grid, times)]

    def steps(self) -> list[tuple[float, int]]:
        """(time_step, steps) up to each of the times from the one before.

        A step is `fraction` of 2 / lambda, lambda the largest eigenvalue of the limit's K times the
        loss's second derivatives, at either end: these fall, and steps grow, as the loss is learnt.
        """
        times = (0.0, *self.config.times)
        outputs = self.limit.train_predictions(times)
        count = len(self.x)
        largest = []
        for f in outputs:
            product = np.einsum("iop,ij->iojp", self.pointwise.hessian(f), self.kernel) / count
            size = f.size
            largest.append(np.linalg.eigvals(product.reshape(size, size)).real.max())
        found = []
        for i, (start, stop) in enumerate(zip(times, times[1:], strict=False)):
            step = self.config.fraction * 2 / max(largest[i : i + 2])
            if start:
                step = min(step, PART_OF_TIME * start)
            number = math.ceil((stop - start) / step)
            found.append(((stop - start) / number, number))
        return found

    def distance(self, outputs: np.ndarray) -> np.ndarray:
        """Of outputs [T, ..., m, k] on held-out examples from the limit's by the same steps."""
        expected = self.predicted.reshape(len(outputs), *(1,) * (outputs.ndim - 3), -1)
        flat = outputs.reshape(*outputs.shape[:-2], -1)
        return np.linalg.norm(flat - expected, axis=-1) / np.linalg.norm(expected, axis=-1)

    def _descent(self) -> np.ndarray:
        """The limit's outputs [T, m, k] on held-out examples by `steps`."""
        cross = np.asarray(limit_ntk(self.held_out, self.x, d_out=self.y.shape[1]))
        coefficients, found = np.zeros_like(self.y), []
        for time_step, steps in self.steps():
            for _ in range(steps):
                slope = self.pointwise.gradient(self.kernel @ coefficients)
                coefficients = coefficients - time_step / len(self.x) * slope
            found.append(cross @ coefficients)
        return np.stack(found)

    def train(self, depth: int) -> dict[str, np.ndarray]:
        """The distance and the movement of all networks of one depth: [T, trials] each."""
        config = self.config
        model = DeepNarrowMLP(depth, self.y.shape[1], float(depth) ** config.power)
        ensemble = Ensemble(model, config.trials, self.x, self.y)
        params, frozen = ensemble.init(config.seed)
        x, held_out = jnp.asarray(self.x), jnp.asarray(self.held_out)

        def evaluate(params: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
            outputs = engine.apply(model, params, frozen, held_out)
            return outputs, empirical_ntk(model, {"params": params, **frozen}, x, outputs="trace")

        measure, outputs, movement = ensemble.measure(evaluate), [], []
        start = np.asarray(measure(params, frozen)[1])
        of_trials = jax.vmap(kernel_movement)
        for time_step, steps in self.steps():
            params, _ = ensemble.descent(time_step, LOSS)(params, frozen, steps)
            reached, kernel = map(np.asarray, measure(params, frozen))
            outputs.append(reached)
            movement.append(np.asarray(of_trials(kernel, start)))
        return {"distance": self.distance(np.stack(outputs)), "movement": np.stack(movement)}
