"""Section 5.1: the scaled NTK converges with depth and stands still in training.

`converge` trains ensembles of toy networks and follows the kernel of figure 4.1, Theta(x0, x) with
x on an arc. The figure's two depths come first, then a sweep over depths with two rules for the
scale C. The theorems' rates are fitted to the sweep's runs: how far the kernel is from its limit at
initialization (Theorem 3.1), how far it moves in training (Theorem 3.2), how many neurons change
sign and how much Gamma grows (section 3.3).
"""

import dataclasses
import logging
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk import kernel, lyapunov
from dnntk.checks import check_choice, check_count, check_deviation
from dnntk.data.datasets import load_dataset
from dnntk.errors import InputError
from dnntk.experiments import rates
from dnntk.experiments.chunked_steps import chunked_steps
from dnntk.experiments.config_checks import check_at_least, check_depths, check_positive
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.ntk_convergence import convergence_figure, rates_figure
from dnntk.networks.models import DeepNarrowCNN, DeepNarrowMLP
from dnntk.ntk.empirical import empirical_ntk
from dnntk.runs import fields
from dnntk.runs.checkpoints import Checkpoints
from dnntk.runs.folder import metrics_line
from dnntk.runs.locks import freeing_folders
from dnntk.training import engine
from dnntk.training.config import ARCHITECTURES, DTYPES
from dnntk.training.ensemble import Ensemble

__all__ = [
    "ConvergenceConfig",
    "ConvergenceResult",
    "Setting",
    "arc",
    "converge",
    "record_steps",
    "settings",
]

log = logging.getLogger("dnntk")

# The point, at pi/4 of the arc, whose kernel figure 4.1 shows.
X0 = np.array([[math.sqrt(0.5), math.sqrt(0.5)]])
# L^2 / C of all the thesis's toy runs: C = 5 at depth 100, 50,000 at 10,000.
THESIS_RATIO = 2000.0
# Kernel time of a step: the published runs' (2 x learning rate x depth x C^2, as their gradient is
# twice the thesis's), and half of the longest that is stable.
TIME_STEPS = {"mlp": 0.5, "cnn": 0.1}
# Largest depths at which Psi_2 takes a minute.
PSI_2_DEPTHS = {"mlp": 100, "cnn": 10}
# A CNN is shown every tenth input of the arc, because an image costs more than a point.
IMAGES_APART = 10
# Least time between two checkpoints of an ensemble.
SECONDS_A_CHECKPOINT = 60.0
DIVERGENCE = 1e3


@dataclasses.dataclass(frozen=True)
class ConvergenceConfig:
    """Settings of section 5.1 and of the sweep that goes beyond it.

    Attributes:
        arch: "mlp" for the thesis's points (cos, sin) on an arc, or "cnn" (Theorems 4.1 and 4.2)
            for images cos a + sin b of 4 x 4 pixels, a and b the mean zero and the mean one of
            digits.
        depths: depths of figure 4.1.
        scale: C at the figure's depths, one for all or one a depth; None is the thesis's, depth^2 /
            2000.
        trials: independent initializations of every network.
        steps: full-batch steps of figure 4.1's runs.
        time_step: kernel time of a step; None is 0.5 for the MLP, as in the published runs, and 0.1
            for the CNN.
        rho, beta: standard deviations of the Gaussian weights (times sqrt(d_in) in an MLP) and
            biases (over C).
        dtype: floating-point type, "float64", as in the published runs, or "float32".
        sweep_depths: depths of the sweep to which the rates are fitted; empty skips the sweep.
        sweep_steps: steps of each run of the sweep.
        sweep_power: the sweep's first rule for C is depth to this power.
        sweep_scale: C of the sweep's second rule, the same at all depths (5 is the thesis's at
            depth 100).
        psi_2_depth: largest depth at which Psi_2 is computed; its cost grows as depth squared. None
            is 100 for the MLP, 10 for the CNN.
        seed: seed of the initializations.
    """

    arch: str = "mlp"
    depths: tuple[int, ...] = (100, 10_000)
    scale: tuple[float, ...] | None = None
    trials: int = 10
    steps: int = 2000
    time_step: float | None = None
    rho: float = 1.0
    beta: float = 1.0
    dtype: str = "float64"
    sweep_depths: tuple[int, ...] = (10, 32, 100, 316, 1000, 3162, 10_000)
    sweep_steps: int = 100
    sweep_power: float = 2.2
    sweep_scale: float = 5.0
    psi_2_depth: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_depths("depths", self.depths)
        if self.sweep_depths:
            check_depths("sweep_depths", self.sweep_depths)
        for name in ("trials", "steps", "sweep_steps"):
            check_count(name, getattr(self, name))
        check_choice("arch", self.arch, ARCHITECTURES)
        check_positive(self, "scale", "time_step", "sweep_power", "sweep_scale")
        if self.scale is not None and len(self.scale) not in (1, len(self.depths)):
            raise InputError(
                f"scale: expected one number or one for each of {len(self.depths)} depths, got "
                f"{self.scale}"
            )
        for name in ("rho", "beta"):
            check_deviation(name, getattr(self, name))
        check_at_least(self, 0, "psi_2_depth", "seed")
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def scales(self) -> list[float]:
        """C at each of ``depths``."""
        if self.scale is None:
            return [depth**2 / THESIS_RATIO for depth in self.depths]
        return list(self.scale) * (len(self.depths) // len(self.scale))

    @property
    def psi_2_depth_or_default(self) -> int:
        """``psi_2_depth``, or the architecture's."""
        return PSI_2_DEPTHS[self.arch] if self.psi_2_depth is None else self.psi_2_depth


@dataclasses.dataclass(frozen=True)
class Setting:
    """One ensemble: ``name`` names its file, ``rule`` is "figure" or the sweep's rule for C."""

    name: str
    rule: str
    depth: int
    scale: float
    steps: int


@dataclasses.dataclass(frozen=True)
class ConvergenceResult:
    """The result of `converge`.

    Attributes:
        angles: [n], angles of the inputs on the arc.
        limit: [n], the limit kernel Theta^infinity(x0, x).
        runs: arrays of each run by its setting's name: ``step`` [r], ``kernel`` and ``outputs``
            [r, trials, n], ``train_loss``, ``sign_changes``, ``gamma``, ``psi_2`` [r, trials];
            entry 0 is initialization.
        fits: exponents of the sweep, by rule and quantity: ``exponent``, ``low``, ``high`` (95%).
        summary: the content of summary.json.
    """

    angles: np.ndarray
    limit: np.ndarray
    runs: dict[str, dict[str, np.ndarray]]
    fits: dict[str, dict[str, Any]]
    summary: dict[str, Any]

    __repr__ = fields.short_repr


def settings(config: ConvergenceConfig) -> list[Setting]:
    """Settings of the figure's runs, then of the sweep's."""
    found = []
    for depth, scale in zip(config.depths, config.scales, strict=True):
        found.append(Setting(f"figure-depth{depth}", "figure", depth, scale, config.steps))
    for depth in config.sweep_depths:
        rules = {"growing": depth**config.sweep_power, "constant": config.sweep_scale}
        for rule, scale in rules.items():
            name = f"{rule}-depth{depth}"
            found.append(Setting(name, rule, depth, scale, config.sweep_steps))
    return found


@freeing_folders()
def converge(
    config: ConvergenceConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> ConvergenceResult:
    """Train the ensembles, follow their kernels, fit the rates, draw the figures.

    Args:
        config: the experiment; None is the thesis's figure 4.1 and the default sweep.
        workdir: folder for configuration, runs, checkpoints, summary, figures; None writes nothing.
        resume: keep the finished runs in ``workdir`` and continue the interrupted one.
        progress: show a progress bar per run.

    Returns:
        Kernels, outputs and losses of all runs, and the fitted rates.

    Raises:
        InputError: the configuration or the workdir cannot be used; the message says why.
    """
    config = config or ConvergenceConfig()
    folder = ExperimentFolder("ntk_convergence", dataclasses.asdict(config), workdir, resume=resume)
    folder.write_config()
    with jax.enable_x64(config.dtype == "float64"):
        angles, *arrays = arc(config.arch)
        data = [a.astype(config.dtype) for a in arrays]
        runs = {s.name: _Run(s, config, folder, data, progress).result() for s in settings(config)}
    with jax.enable_x64(True):
        x0, x = (a.astype(np.float64) for a in data[:2])
        limit = np.asarray(kernel.limit_ntk(x0, x, rho=config.rho, beta=config.beta)[0])
    values = {s.name: rates.quantities(runs[s.name], limit) for s in settings(config)}
    fits = _fits(config, values)
    means = {name: rates.means(measured) for name, measured in values.items()}
    summary = folder.finish({"fits": fits, "runs": means})
    result = ConvergenceResult(angles, limit, runs, fits, summary)
    _draw(config, result, values, data[2][:, 0], folder)
    return result


def arc(arch: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Angles [n], the input x0 [1, ...] at pi/4, inputs x [n, ...] and targets cos sin [n, 1]."""
    toy = load_dataset("toy")
    points, y = toy.x_train, toy.y_train
    if arch == "mlp":
        return np.arctan2(points[:, 1], points[:, 0]).astype(np.float64), X0, points, y
    points, y = points[::IMAGES_APART], y[::IMAGES_APART]
    digits = load_dataset("digits", pool=2)
    pair = np.stack([digits.x_train[digits.labels_train == label].mean(0) for label in (0, 1)])
    x0, x = (np.tensordot(at, pair, 1) for at in (X0, points))
    return np.arctan2(points[:, 1], points[:, 0]).astype(np.float64), x0, x, y


def record_steps(steps: int) -> list[int]:
    """Steps at which a run's kernel is measured: 0, the powers of two, and the last step."""
    return [0, *(2**i for i in range(steps.bit_length()) if 2**i < steps), steps]


class _Run:
    """The training of one ensemble, continued from its last checkpoint if one exists."""

    def __init__(
        self,
        setting: Setting,
        config: ConvergenceConfig,
        folder: ExperimentFolder,
        data: list[np.ndarray],
        progress: bool,
    ) -> None:
        self.setting, self.config, self.folder, self.progress = setting, config, folder, progress
        kind = DeepNarrowMLP if config.arch == "mlp" else DeepNarrowCNN
        self.model = kind(setting.depth, 1, setting.scale, rho=config.rho, beta=config.beta)
        self.x0, self.x, self.y = map(jnp.asarray, data)
        self.ensemble = Ensemble(self.model, config.trials, *data[1:])
        self.record_steps = record_steps(setting.steps)
        self._compiled: dict[bool, Any] = {}

    def result(self) -> dict[str, np.ndarray]:
        """The run's arrays: read if the run is finished, else computed and written."""
        return metrics_line(self.folder.arrays(self.setting.name, self._computed))

    def _computed(self) -> dict[str, np.ndarray]:
        if self.folder.path is None:
            return self._train(None)
        with Checkpoints(self.folder.path / "checkpoints" / self.setting.name) as checkpoints:
            return self._train(checkpoints)

    def _train(self, checkpoints: Checkpoints | None) -> dict[str, np.ndarray]:
        begun = time.perf_counter()
        params, frozen = self.ensemble.init(self.config.seed)
        start = jax.tree.map(jnp.copy, params)
        records = self._empty()
        found = checkpoints and checkpoints.restore({"params": params, "records": records})
        step = 0
        if found:
            step, saved = found
            params, records = self.ensemble.put(saved["params"]), saved["records"]
        else:
            self._record(records, 0, start, params, frozen)
        time_step = self.config.time_step or TIME_STEPS[self.config.arch]
        train_steps = self.ensemble.descent(time_step)

        def take_steps(count: int) -> float:
            nonlocal params
            params, losses = train_steps(params, frozen, count)
            return float(np.mean(losses))

        s = self.setting
        label = f"depth {s.depth:,}, C = {s.scale:.3g}"
        last_checkpoint = time.perf_counter()
        steps = chunked_steps(take_steps, self.record_steps, label, self.progress, step)
        for step, _ in steps:
            if step in self.record_steps:
                self._record(records, self.record_steps.index(step), start, params, frozen)
            due = time.perf_counter() - last_checkpoint > SECONDS_A_CHECKPOINT
            if checkpoints and due and step < self.setting.steps:
                checkpoints.save(step, {"params": params, "records": records})
                last_checkpoint = time.perf_counter()
        self._log_run(records, time.perf_counter() - begun)
        return records | {"step": np.array(self.record_steps)}

    def _empty(self) -> dict[str, np.ndarray]:
        """Arrays for all records, NaN until measured."""
        shape, n = (len(self.record_steps), self.config.trials), len(self.x)
        records = {name: np.full((*shape, n), np.nan) for name in ("kernel", "outputs")}
        scalars = ("train_loss", "sign_changes", "gamma", "psi_2")
        return records | {name: np.full(shape, np.nan) for name in scalars}

    def _record(
        self, records: dict[str, np.ndarray], index: int, start: Any, params: Any, frozen: Any
    ) -> None:
        ends = index in (0, len(self.record_steps) - 1)
        psi_2 = ends and self.setting.depth <= self.config.psi_2_depth_or_default
        for name, values in self._measured(psi_2)(start, params, frozen).items():
            records[name][index] = np.asarray(values)

    def _measured(self, psi_2: bool) -> Any:
        model, x0, x = self.model, self.x0, self.x

        def evaluate(start: Any, params: Any, frozen: Any) -> dict[str, jax.Array]:
            before, after = {"params": start, **frozen}, {"params": params, **frozen}
            outputs = engine.apply(model, params, frozen, x)
            measured = lyapunov.measure(model, before, after, x, psi_2=psi_2)
            return {
                "kernel": empirical_ntk(model, after, x0, x)[0, :, 0, 0],
                "outputs": outputs[:, 0],
                "train_loss": 0.5 * jnp.mean(jnp.sum((outputs - self.y) ** 2, axis=1)),
                "sign_changes": measured.sign_changes,
                "gamma": measured.gamma,
                "psi_2": measured.psi_2,
            }

        if psi_2 not in self._compiled:
            self._compiled[psi_2] = self.ensemble.measure(evaluate)
        return self._compiled[psi_2]

    def _log_run(self, records: dict[str, np.ndarray], seconds: float) -> None:
        s, first, last = self.setting, records["train_loss"][0].mean(), records["train_loss"][-1]
        fate = "" if np.all(last <= DIVERGENCE * first) else "; some trials diverged"
        log.info(
            "%s: C = %.3g, %d trials, %d steps: loss %.3g to %.3g, %.0f s%s",
            *(s.name, s.scale, self.config.trials, s.steps, first, last.mean(), seconds, fate),
        )


def _fits(
    config: ConvergenceConfig, values: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    def runs(rule: str) -> list[tuple[int, dict[str, np.ndarray]]]:
        return [(s.depth, values[s.name]) for s in settings(config) if s.rule == rule]

    return {rule: rates.fits(runs(rule)) for rule in ("growing", "constant")}


def _draw(
    config: ConvergenceConfig,
    result: ConvergenceResult,
    values: dict[str, dict[str, np.ndarray]],
    target: np.ndarray,
    folder: ExperimentFolder,
) -> None:
    chosen = settings(config)
    shown = {s.depth: result.runs[s.name] for s in chosen if s.rule == "figure"}
    curves = (result.angles, target, result.limit, shown)
    folder.draw("figure_4_1", convergence_figure, *curves)
    sweep = [s for s in chosen if s.rule != "figure"]
    if sweep:
        points = [(s.rule, s.depth, values[s.name]) for s in sweep]
        rules = config.sweep_power, config.sweep_scale
        fitted = (points, result.fits, rules, config.psi_2_depth_or_default)
        folder.draw("rates", rates_figure, *fitted)
