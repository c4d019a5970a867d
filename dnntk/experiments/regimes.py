"""The plane of depth L and scale C: what section 3.3 bounds, measured on networks of every regime.

Theorems 3.2 and 4.2 ask for L^2 / C -> 0, because their proof bounds a pre-activation's movement by
K L where the least pre-activation is only known to be larger than (K + 1) L. `measure_regimes`
trains networks for a kernel time of order 1 at every depth and C, measures `QUANTITIES`, and fits
powers of L and C to each, so that one reads off what the kernel's invariance really takes.

Everything is in float64 and the ntk form: a kernel of size 10 that moves by 1 / C = 1e-9 is not
seen in float32, nor an input unit that moves by 1e-9 from C x in the literal form. A random unit's
state moves by 1 / C^2, which float64 resolves up to C of about 1e6; above, its movement is NaN.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk import lyapunov
from dnntk.experiments import rates
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.regimes_config import RegimesConfig
from dnntk.figures.regimes import regimes_figure
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP
from dnntk.ntk.empirical import empirical_ntk
from dnntk.ntk.measures import kernel_movement
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training.ensemble import Ensemble
from dnntk.training.evaluation import as_trained
from dnntk.training.run import load_dataset_for

__all__ = ["PREDICTED", "QUANTITIES", "Plane", "measure_regimes", "quantities"]

# The powers of L and of C that are expected where C is large: in the ntk form an output unit moves
# by O(1), all others by O(1 / C), and random units lie near their kink with density O(1 / C).
PREDICTED = {
    "kernel_train": (0, -1),
    "kernel_test": (0, -1),
    "crossings": (1, -2),
    "input": (0, -1),
    "random": (0, -1),
    "output": (0, 0),
    "distance": (-1, 1),
    "gamma": (0, -1),
    "constant": (-1, 0),
}
# A random unit moves by less than its state's rounding times this: not a number.
LEAST_ROUNDINGS = 50
QUANTITIES = {
    "kernel_train": "largest relative movement of the kernel on the training examples",
    "kernel_test": "the same on held-out examples",
    "crossings": "largest number of hidden pre-activations whose sign has changed",
    "input": "largest |f_t - f_0| of an input unit, over layers, units, examples and times",
    "random": "the same of a random unit",
    "output": "the same of an output unit",
    "distance": "least |f_t| of any unit",
    "gamma": "largest Gamma(t) / Gamma(0) - 1; Gamma is without Psi_2",
    "constant": "least A in Gamma(t) <= Gamma(0) + A (L / C) integral of Gamma^4",
}


@dataclasses.dataclass(frozen=True)
class Plane:
    """Networks of one architecture.

    Attributes:
        depths: [cells].
        scales: [cells], C.
        values: {quantity of `QUANTITIES`: [cells, trials]}.
        fit_from: least C of the cells to which powers are fitted.
    """

    depths: np.ndarray
    scales: np.ndarray
    values: dict[str, np.ndarray]
    fit_from: float

    __repr__ = fields.short_repr

    def mean(self, quantity: str) -> np.ndarray:
        """[cells], geometric means over the trials; of a count, which may be 0, the usual ones."""
        values = self.values[quantity]
        if quantity == "crossings":
            return values.mean(axis=1)
        with np.errstate(divide="ignore"):
            return np.exp(np.log(values).mean(axis=1))

    def fitted(self, quantity: str) -> np.ndarray:
        """[cells] bool: C is large enough, and no trial has diverged, or is 0 unless a count."""
        values, counts = self.values[quantity], quantity == "crossings"
        usable = (values < math.inf) & ((values > 0) | counts)
        return (self.scales >= self.fit_from) & np.all(usable, axis=1)

    def fit(self, quantity: str) -> dict[str, Any] | None:
        """The powers of depth and of C with 95% intervals, as in `rates.fit_powers`."""
        chosen = self.fitted(quantity)
        values, depths = self.values[quantity][chosen], self.depths[chosen]
        trials = values.shape[1]
        variables = {"depth": depths, "scale": self.scales[chosen]}
        each = {name: np.repeat(a, trials) for name, a in variables.items()}
        # Networks of a depth and a trial have the same random units, whatever their C.
        draws = (depths[:, None] * trials + np.arange(trials)).ravel()
        fit = rates.fit_counts if quantity == "crossings" else rates.fit_powers
        return fit(each, values.ravel(), draws)

    def predicted(self, quantity: str) -> np.ndarray | None:
        """[cells], the predicted powers times the factor that suits the fitted cells best."""
        chosen = self.fitted(quantity)
        by_depth, by_scale = PREDICTED[quantity]
        law = self.depths.astype(float) ** by_depth * self.scales**by_scale
        means, expected = self.mean(quantity)[chosen], law[chosen]
        if not means.any():
            return None
        if quantity == "crossings":
            return law * means.sum() / expected.sum()
        return law * np.exp(np.log(means / expected).mean())

    def described(self, quantity: str) -> str:
        """In words: the fitted powers, and the growth of C at which the quantity vanishes."""
        if (fit := self.fit(quantity)) is None:
            return "no fit: all are 0, or there are fewer than three depths or C, or one diverged"
        text, needed = "", self.needed(quantity)
        for name, symbol in (("depth", "L"), ("scale", "C")):
            power = fit[name]
            text += f"{symbol}^{power['exponent']:.3f} [{power['low']:.3f}, {power['high']:.3f}]  "
        if needed is None:
            return text
        if not needed:
            return f"{text}vanishes if C -> infinity"
        error = self.needed_error(quantity)
        return f"{text}vanishes if C grows faster than L^{needed:.2f}" + (
            "" if error is None else f" +- {error:.2f}"
        )

    def needed(self, quantity: str) -> float | None:
        """The power p such that the quantity vanishes if C / L^p -> infinity; None if never.

        0 where the 95% interval of depth's power begins below 0: then C -> infinity is enough.
        """
        fit = self.fit(quantity)
        if fit is None or PREDICTED[quantity][1] >= 0 or fit["scale"]["high"] >= 0:
            return None
        if fit["depth"]["low"] <= 0:
            return 0.0
        return _ratio(fit)

    def needed_error(self, quantity: str) -> float | None:
        """Half-width of the 95% interval of `needed`, by the jackknife; None if there is none."""
        values, powers = self.values[quantity], []
        trials = values.shape[1]
        if not self.needed(quantity) or trials < 2:
            return None
        for i in range(trials):
            others = dataclasses.replace(self, values={quantity: np.delete(values, i, axis=1)})
            if (fit := others.fit(quantity)) is None:
                return None
            powers.append(_ratio(fit))
        return rates.jackknife(np.array(powers))

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json."""
        means = {name: self.mean(name) for name in QUANTITIES}
        cells: list[dict[str, Any]] = [
            {"depth": int(depth), "scale": float(scale)}
            for depth, scale in zip(self.depths, self.scales, strict=True)
        ]
        for i, cell in enumerate(cells):
            cell |= rates.means({name: values[i : i + 1] for name, values in means.items()})
        fits = {
            name: {
                "fit": self.fit(name),
                "predicted": PREDICTED[name],
                "needed": self.needed(name),
                "needed_error": self.needed_error(name),
            }
            for name in QUANTITIES
        }
        return {"fits": fits, "cells": cells}


def _ratio(fit: dict[str, Any]) -> float:
    return float(fit["depth"]["exponent"] / -fit["scale"]["exponent"])


@freeing_folders()
def measure_regimes(
    config: RegimesConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Plane]:
    """Train networks at every depth and C, and measure what moves.

    Args:
        config: the experiment; None is the default one.
        workdir: folder for configuration, measurements, summary, figure; None writes nothing.
        resume: keep what is measured in ``workdir`` and measure the rest.
        progress: show a progress bar per architecture.

    Returns:
        {architecture: measurements}.

    Raises:
        InputError: the configuration or the workdir cannot be used; the message says why.
    """
    config = config or RegimesConfig()
    dataset = load_dataset_for(config.data)
    settings = dataclasses.asdict(config)
    folder = ExperimentFolder("regimes", settings, workdir, resume=resume, free=("fit_from",))
    folder.write_config()
    found = {}
    with jax.enable_x64(True):
        for arch in config.archs:
            arrays = as_trained(dataset, arch == "mlp", "float64")
            found[arch] = _Networks(arch, config, folder, arrays).plane(progress)
    folder.finish({arch: plane.summary() for arch, plane in found.items()})
    folder.draw("regimes", regimes_figure, found)
    return found


def quantities(run: dict[str, np.ndarray], depth: int, scale: float) -> dict[str, np.ndarray]:
    """`QUANTITIES` of a cell's networks, [trials] each, from what `_Networks` recorded.

    The integral of Gamma^4 is by the trapezoidal rule over the recorded times.
    """
    kernels, gamma, time = run["kernel"], run["gamma"], run["time"]
    n = kernels.shape[-1] - int(run["held_out"])

    def movement_on(part: slice) -> np.ndarray:
        found = kernels[:, :, part, part]
        with jax.enable_x64(True):
            of_trials = jax.vmap(kernel_movement)
            return np.asarray(jax.vmap(of_trials, (0, None))(found, found[0])).max(0)

    fourth = gamma**4
    areas = np.diff(time)[:, None] * (fourth[1:] + fourth[:-1]) / 2
    growth = gamma[1:] - gamma[0]
    constant = (growth / (depth / scale * np.cumsum(areas, axis=0))).max(0)
    movement = dict(zip(lyapunov.UNITS, run["movement"].max(0).T, strict=True))
    resolved = movement["random"] > LEAST_ROUNDINGS * np.finfo(float).eps * scale
    movement["random"] = np.where(resolved, movement["random"], np.nan)
    return {
        "kernel_train": movement_on(slice(None, n)),
        "kernel_test": movement_on(slice(n, None)),
        "crossings": np.round(run["sign_changes"].max(0) * run["hidden"]),
        **movement,
        "distance": run["distance"].min((0, 2)),
        "gamma": (growth / gamma[0]).max(0),
        "constant": constant,
    }


class _Networks:
    """The data of one architecture, and its networks."""

    def __init__(
        self, arch: str, config: RegimesConfig, folder: ExperimentFolder, arrays: dict[str, Any]
    ) -> None:
        self.arch, self.config, self.folder = arch, config, folder
        self.x, self.y, self.held_out = (
            arrays[name][: config.examples] for name in ("x_train", "y_train", "x_test")
        )
        limit = np.asarray(limit_ntk(self.x, rho=config.rho, beta=config.beta, d_out=self.d_out))
        largest = float(np.linalg.norm(limit, 2)) / len(self.x)
        # Steps half as long as the longest that is stable.
        self.steps_a_record = math.ceil(config.time * largest / config.records)

    @property
    def d_out(self) -> int:
        """Outputs of the networks."""
        return self.y.shape[1]

    @property
    def units(self) -> int:
        """Pre-activations of a hidden layer, over units, pixels and training examples."""
        channels = self.x.shape[-1]
        return self.x.size // channels * (channels + 1 + self.d_out)

    def plane(self, progress: bool) -> Plane:
        """The measurements of all cells."""
        cells, found = self.config.cells, []
        with progress_bar(cells, desc=self.arch, unit="cell", disable=not progress) as bar:
            for depth, scale in bar:
                run = self.folder.arrays(
                    f"{self.arch}-depth{depth}-scale{fields.exact(scale)}",
                    functools.partial(self._train, depth, scale),
                )
                found.append(quantities(run, depth, scale))
        depths, scales = map(np.array, zip(*cells, strict=True))
        values = {name: np.stack([each[name] for each in found]) for name in QUANTITIES}
        return Plane(depths, scales, values, self.config.fit_from)

    def network(self, depth: int, scale: float) -> DeepNarrow:
        """The network of a cell."""
        kind = DeepNarrowMLP if self.arch == "mlp" else DeepNarrowCNN
        return kind(depth, self.d_out, scale, rho=self.config.rho, beta=self.config.beta)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - networks of the last depth
    def _start(self, depth: int) -> Any:
        """(params, frozen) of the trials, the same for every C: random units are drawn over C."""
        model = self.network(depth, math.inf)
        start = Ensemble(model, self.config.trials, self.x, self.y).init(self.config.seed)
        return jax.device_get(start)

    def _train(self, depth: int, scale: float) -> dict[str, np.ndarray]:
        """The networks of a cell at `RegimesConfig.records` times and at 0: [times, trials, ...].

        Kernels are of the training and the held-out examples together.
        """
        config, model = self.config, self.network(depth, scale)
        ensemble = Ensemble(model, config.trials, self.x, self.y)
        time_step = config.time / config.records / self.steps_a_record
        descend, measure = ensemble.descent(time_step), ensemble.measure(self._measured(model))
        start, frozen = self._start(depth)
        params, frozen = ensemble.put(start), ensemble.put(frozen)
        records = [measure(start, params, frozen)]
        for _ in range(config.records):
            params, _ = descend(params, frozen, self.steps_a_record)
            records.append(measure(start, params, frozen))
        return {name: np.stack([each[name] for each in records]) for name in records[0]} | {
            "time": np.linspace(0, config.time, config.records + 1),
            "held_out": np.array(len(self.held_out)),
            "hidden": np.array((depth - 1) * self.units),
        }

    def _measured(self, model: DeepNarrow) -> Any:
        x, every = jnp.asarray(self.x), jnp.concatenate([self.x, self.held_out])

        def evaluate(start: Any, params: Any, frozen: Any) -> dict[str, jax.Array]:
            before, after = {"params": start, **frozen}, {"params": params, **frozen}
            kernel = empirical_ntk(model, after, every, outputs="trace")
            found = lyapunov.measure(model, before, after, x, psi_2=False)
            names = ("gamma", "sign_changes", "movement", "distance")
            return {"kernel": kernel} | {name: getattr(found, name) for name in names}

        return evaluate
