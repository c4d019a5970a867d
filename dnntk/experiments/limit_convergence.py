"""Theorems 3.3 and 4.3: deep trained networks predict what their infinitely deep limit predicts.

`converge_to_limit` trains finite networks of growing depth, C = depth^2.2, and compares their
outputs on held-out examples with the limit's f_t at equal kernel times. They are trained by
gradient descent in small steps, or in closed form (`dnntk.solve`), which reaches any time. The
relative difference should fall as depth^-1/2. `dnntk.infinite_depth.spread` predicts its size
without training: to first order, and from networks that are linear in their parameters.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dnntk import figures
from dnntk.data.datasets import Dataset
from dnntk.errors import InputError
from dnntk.experiments import rates
from dnntk.experiments.compared_networks import ComparedNetworks
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.limit_convergence_config import LimitConfig
from dnntk.figures.limit_convergence import limit_figure, scores_figure
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.spread import initialization_spread, linear_predictions
from dnntk.kernel import limit_ntk
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.training.evaluation import as_trained, scores
from dnntk.training.run import load_dataset_for

__all__ = ["Comparison", "Scores", "converge_to_limit"]

log = logging.getLogger("dnntk")

# Time step over the largest stable one. The fastest mode decays in a few steps, and the slow modes,
# still learning at the times compared, have small errors: `Comparison.discretization`.
STABLE_FRACTION = 0.5


@dataclasses.dataclass(frozen=True)
class Scores:
    """A loss or an accuracy of networks and of their limit.

    Attributes:
        trained: [D, trials, T], of the trained networks.
        linear: [D, T], of networks linear in their parameters: the mean over the draws.
        limit: [T].
    """

    trained: np.ndarray
    linear: np.ndarray
    limit: np.ndarray

    __repr__ = fields.short_repr

    def summary(self, depths: np.ndarray, i: int) -> dict[str, Any]:
        """The entry of summary.json for time i: means over the trials, by depth."""
        return {
            "trained": _by_depth(depths, np.mean(self.trained[:, :, i], axis=1)),
            "linear": _by_depth(depths, self.linear[:, i]),
            "limit": float(self.limit[i]) if math.isfinite(self.limit[i]) else None,
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One architecture beside its limit, on m held-out examples.

    Attributes:
        times: [T], kernel times.
        depths: [D].
        limit: [T, m, d_out], the limit's f_t.
        outputs: [D, trials, T, m, d_out], of the trained networks.
        differences: [D, trials, T], RMS of outputs - limit over RMS of the limit.
        linear: [D, T], the same for networks linear in their parameters: RMS over the draws.
        first_order: [D, T], the same to first order in the change of the kernel.
        discretization: [T], the same for the limit itself, trained in steps of ``time_step``.
        time_step: kernel time of a step; 0 for networks trained in closed form.
        examples: number of training examples.
        train_loss: the loss 1/2 E ||f - y||^2 on the training examples.
        test_accuracy: on the held-out examples; NaN for targets without classes.
        fits: T fitted powers of depth, ``exponent``, ``low``, ``high`` (95%), ``factor``; None
            for fewer than three depths.
    """

    times: np.ndarray
    depths: np.ndarray
    limit: np.ndarray
    outputs: np.ndarray
    differences: np.ndarray
    linear: np.ndarray
    first_order: np.ndarray
    discretization: np.ndarray
    time_step: float
    examples: int
    train_loss: Scores
    test_accuracy: Scores
    fits: list[dict[str, float] | None]

    __repr__ = fields.short_repr

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json: root mean squares over the trials, by time and depth."""
        measured = np.sqrt(np.mean(self.differences**2, axis=1))
        by_time = [
            {
                "time": float(t),
                "fit": self.fits[i],
                "discretization": float(self.discretization[i]),
                "measured": _by_depth(self.depths, measured[:, i]),
                "linear": _by_depth(self.depths, self.linear[:, i]),
                "first_order": _by_depth(self.depths, self.first_order[:, i]),
                "train_loss": self.train_loss.summary(self.depths, i),
                "test_accuracy": self.test_accuracy.summary(self.depths, i),
            }
            for i, t in enumerate(self.times)
        ]
        return {"time_step": self.time_step, "comparisons": by_time}


@freeing_folders()
def converge_to_limit(
    config: LimitConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Train networks of growing depth and compare their predictions with the limit's.

    Args:
        config: the experiment; None is the default one, on scikit-learn's digits.
        workdir: folder for configuration, runs, summary, figure; None writes nothing.
        resume: keep the finished networks in ``workdir`` and train the others.
        progress: show a progress bar per group of networks.

    Returns:
        The comparison by architecture.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
    """
    config = config or LimitConfig()
    folder = ExperimentFolder(
        "limit_convergence", dataclasses.asdict(config), workdir, resume=resume
    )
    dataset = load_dataset_for(config.network(config.archs[0], config.depths[0]))
    folder.write_config()
    log.info(
        "data: %s; the first %d and %d of them",
        *(dataset.description, *_counts(config, dataset)),
    )
    found = {arch: _Arch(arch, config, dataset, folder, progress).result() for arch in config.archs}
    summary = {arch: comparison.summary() for arch, comparison in found.items()}
    folder.finish(summary | {"data": dataset.description})
    title = f"{figures.plain(dataset.name)}, held-out examples"
    folder.draw("limit_convergence", limit_figure, found, title)
    folder.draw("scores", scores_figure, found, figures.plain(dataset.name))
    return found


class _Arch:
    """One architecture's networks and its theory."""

    def __init__(
        self,
        arch: str,
        config: LimitConfig,
        dataset: Dataset,
        folder: ExperimentFolder,
        progress: bool,
    ) -> None:
        self.arch, self.config, self.folder, self.progress = arch, config, folder, progress
        train, test = _counts(config, dataset)
        arrays = as_trained(dataset, arch == "mlp", config.dtype)
        self.x, self.y = arrays["x_train"][:train], arrays["y_train"][:train]
        self.held_out, self.y_test = arrays["x_test"][:test], arrays["y_test"][:test]
        self.labelled = dataset.labels_train is not None
        self.kernel: Callable[..., jax.Array] = partial(
            limit_ntk, d_out=self.y.shape[1], **config.kernel_options
        )
        self.flow = KernelFlow(self.kernel, self.x, self.y, progress=progress)
        self.times, self.time_step = np.array(config.times), 0.0
        if config.optimizer == "sgd":
            self.time_step, self.steps = self._choose_time_step()
            self.times = self.time_step * np.array(self.steps)

    def result(self) -> Comparison:
        config = self.config
        x, y, held_out = (np.asarray(a, np.float64) for a in (self.x, self.y, self.held_out))
        times = [float(t) for t in self.times]
        key = jax.random.key(config.seed)
        limit, found = self.flow.predict(np.concatenate([x, held_out]), times), []
        discretization = self._discretization(limit[:, len(x) :])
        self._log_time_step(discretization)
        spread = initialization_spread(x, y, held_out, times, key=key, **config.kernel_options)
        first_order = [_rms(spread.std(depth)) / _rms(spread.prediction) for depth in config.depths]
        for depth in config.depths:
            drawn = linear_predictions(
                x,
                y,
                np.concatenate([x, held_out]),
                times,
                depth=depth,
                draws=config.draws,
                key=jax.random.fold_in(key, depth),
                **config.kernel_options,
            )
            found.append((self._trained(depth), drawn))
            self._log_depth(depth, *(_relative(f, limit, len(x)) for f in found[-1]))
        return self._comparison(limit, found, discretization, np.stack(first_order))

    def _comparison(
        self,
        limit: np.ndarray,
        found: list[tuple[np.ndarray, np.ndarray]],
        discretization: np.ndarray,
        first_order: np.ndarray,
    ) -> Comparison:
        """``found`` holds (trained, linear) outputs of each depth, training examples first."""
        n = len(self.x)
        outputs = np.stack([trained for trained, _ in found])
        differences = _relative(outputs, limit, n)
        linear = [np.sqrt(np.mean(_relative(f, limit, n) ** 2, axis=0)) for _, f in found]
        loss, accuracy = (
            Scores(
                np.stack([self._scores(trained)[i] for trained, _ in found]),
                np.stack([np.mean(self._scores(drawn)[i], axis=0) for _, drawn in found]),
                self._scores(limit)[i],
            )
            for i in range(2)
        )
        return Comparison(
            self.times,
            np.array(self.config.depths),
            limit[:, n:],
            outputs[..., n:, :],
            differences,
            np.stack(linear),
            first_order,
            discretization,
            self.time_step,
            n,
            loss,
            accuracy,
            [self._fit(differences[:, :, i]) for i in range(len(self.times))],
        )

    def _scores(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(training loss, held-out accuracy), each [...], of outputs [..., n + m, d_out]."""
        n, each = len(self.x), outputs.reshape(-1, *outputs.shape[-2:])
        losses = [scores(f[:n], self.y, False)[0] for f in each]
        accuracies = [scores(f[n:], self.y_test, self.labelled)[1] for f in each]
        shape = outputs.shape[:-2]
        return np.reshape(losses, shape), np.array(accuracies, float).reshape(shape)

    def _discretization(self, limit: np.ndarray) -> np.ndarray:
        if not self.time_step:
            return np.zeros(len(limit))
        stepped = self.flow.predict(self.held_out, self.times.tolist(), self.time_step)
        return _relative(stepped, limit)

    def _choose_time_step(self) -> tuple[float, list[int]]:
        """(time step, numbers of steps after which to compare)."""
        config, stable = self.config, self.flow.max_time_step()
        most = config.time_step or STABLE_FRACTION * stable
        if most >= stable:
            raise InputError(
                f"time_step: expected less than 2 / lambda_max = {stable:.3g} of the {self.arch} "
                f"limit, got {most:g}; lower it, or leave it out"
            )
        # A little shorter, so that the first time is a whole number of steps.
        time_step = config.times[0] / math.ceil(config.times[0] / most * (1 - 1e-9))
        return time_step, [round(t / time_step) for t in config.times]

    def _trained(self, depth: int) -> np.ndarray:
        """Outputs [trials, T, n + m, d_out] of the networks, read from files that exist."""
        model = self.config.network(self.arch, depth).model(self.y.shape[1])
        inputs = np.concatenate([self.x, self.held_out])
        run = ComparedNetworks(model, self.x, self.y, inputs, self.config.seed)
        trials = self.config.trials
        size = min(trials, run.at_once)
        starts = range(0, trials, size)
        return np.concatenate(
            [self._group(run, depth, range(i, min(i + size, trials))) for i in starts]
        )

    def _group(self, run: ComparedNetworks, depth: int, trials: range) -> np.ndarray:
        label = f"{self.arch}-depth{depth}-trials{trials[0]}-{trials[-1]}"

        def train() -> dict[str, np.ndarray]:
            with jax.enable_x64(self.config.dtype == "float64"):
                if self.config.optimizer == "kernel":
                    found = run.solve(trials, self.times.tolist(), label, self.progress)
                else:
                    found = run.train(trials, self.time_step, self.steps, label, self.progress)
            return {"outputs": found}

        return self.folder.arrays(label, train)["outputs"]

    def _fit(self, differences: np.ndarray) -> dict[str, float] | None:
        """Fit a power of depth to [D, trials]; None if any trial has diverged."""
        return rates.fit_trials(zip(self.config.depths, differences, strict=True))

    def _log_time_step(self, discretization: np.ndarray) -> None:
        errors = ", ".join(f"{e:.1e}" for e in discretization)
        times = ", ".join(f"{t:g}" for t in self.times)
        how = (
            f"time_step {self.time_step:.4g}; by its steps alone the limit would be off by {errors}"
        )
        log.info(
            "%s: %d training and %d held-out examples, %s at t = %s",
            *(self.arch, len(self.x), len(self.held_out)),
            *(how if self.time_step else "networks trained in closed form", times),
        )

    def _log_depth(self, depth: int, differences: np.ndarray, linear: np.ndarray) -> None:
        measured, theory = (
            ", ".join(f"{d:.2e}" for d in np.sqrt(np.mean(each**2, axis=0)))
            for each in (differences, linear)
        )
        fate = "" if np.isfinite(differences).all() else "; some trials diverged"
        log.info(
            "%s depth %d: relative difference %s (linear theory %s), %d trials%s",
            *(self.arch, depth, measured, theory, self.config.trials, fate),
        )


def _counts(config: LimitConfig, dataset: Dataset) -> tuple[int, int]:
    """Numbers of training and held-out examples: the configured ones, or all if fewer exist."""
    return (
        min(config.train_examples, len(dataset.x_train)),
        min(config.test_examples, len(dataset.x_test)),
    )


def _rms(outputs: np.ndarray) -> np.ndarray:
    """RMS over examples and outputs: [..., m, d_out] -> [...]."""
    return np.sqrt(np.mean(outputs**2, axis=(-2, -1)))


def _relative(outputs: np.ndarray, limit: np.ndarray, first: int = 0) -> np.ndarray:
    """RMS of the difference over the limit's, from example ``first`` on.

    [..., T, m, d_out], [T, m, d_out] -> [..., T].
    """
    outputs, limit = outputs[..., first:, :], limit[..., first:, :]
    return _rms(outputs - limit) / _rms(limit)


def _by_depth(depths: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    """{depth: value}, with None instead of NaN, which JSON does not have."""
    pairs = zip(depths.tolist(), values.tolist(), strict=True)
    return {str(depth): value if math.isfinite(value) else None for depth, value in pairs}
