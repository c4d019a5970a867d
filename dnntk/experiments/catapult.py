"""Gradient descent at steps larger than the kernel allows: the catapult of Lewkowycz et al. (2020).

With a constant kernel, gradient descent diverges where ``ratio``, time_step times lambda_max(K / N)
of the kernel at the start, is above 2. In a network the loss first grows until the kernel moves,
and may come back once the kernel is small enough. `catapult` measures this for networks of several
depths and C: the peak of the loss and its power of C, the steps until the loss is below its start
again, lambda_max after the last step, and the test accuracy there.

The ReLU of an output unit bounds the network: where f = -C the unit is off in the last hidden
layers, on all examples. At first only the last layer then learns, by a kernel of order 1 / depth.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.data.labels import decide
from dnntk.experiments import rates
from dnntk.experiments.catapult_config import CatapultConfig
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.catapult import catapult_figure
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.empirical import empirical_ntk
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training import engine, gradient_flow
from dnntk.training.ensemble import Ensemble
from dnntk.training.evaluation import as_trained
from dnntk.training.placement import Batch
from dnntk.training.run import load_dataset_for

__all__ = ["Runs", "catapult", "powers_of_scale"]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Networks of one depth and C at every ratio.

    Attributes:
        losses: [ratios, trials, steps], before each step; NaN after one that is not finite.
        before: [trials], lambda_max(K / N) at the start.
        after: [ratios, trials], lambda_max(K / N) after the last step; NaN if the loss diverged.
        accuracy: [ratios, trials], test accuracy after the last step; NaN if the loss diverged.
        kink: [], the loss over the first one where all outputs are -C.
    """

    losses: np.ndarray
    before: np.ndarray
    after: np.ndarray
    accuracy: np.ndarray
    kink: np.ndarray

    __repr__ = fields.short_repr

    @property
    def peak(self) -> np.ndarray:
        """[ratios, trials], the largest loss over the first one; infinite if the loss diverged."""
        finite = np.isfinite(self.losses).all(2)
        return np.where(finite, np.nanmax(self.losses, 2) / self.losses[:, :, 0], np.inf)

    @property
    def back(self) -> np.ndarray:
        """[ratios, trials], steps until the loss is below the first one, for good or until the end.

        Infinite if the loss is not below it at the end.
        """
        above = ~(self.losses < self.losses[:, :, :1])
        last = self.losses.shape[2] - 1 - np.argmax(above[:, :, ::-1], axis=2)
        return np.where(above[:, :, -1], np.inf, last + 1.0)

    def rows(self, ratios: tuple[float, ...]) -> list[dict[str, Any]]:
        """A row a ratio for summary.json: medians over the trials."""
        back, shrinking = np.median(self.back, axis=1), np.median(self.after / self.before, axis=1)
        return [
            {
                "ratio": ratio,
                "peak": float(np.median(self.peak[i])),
                "came_back": float(np.mean(np.isfinite(self.back[i]))),
                "steps_back": float(back[i]),
                "lambda_ratio": _number(shrinking[i]),
                "test_accuracy": _number(np.median(self.accuracy[i])),
            }
            for i, ratio in enumerate(ratios)
        ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@freeing_folders()
def catapult(
    config: CatapultConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[tuple[int, float], Runs]:
    """Train at every ratio of the step to the largest that a constant kernel would bear.

    Args:
        config: the experiment; None is the default one.
        workdir: folder for configuration, losses, summary, figure; None writes nothing.
        resume: keep the runs in ``workdir`` and make the rest.
        progress: show a progress bar.

    Returns:
        {(depth, C): runs}.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used.
    """
    config = config or CatapultConfig()
    folder = ExperimentFolder("catapult", dataclasses.asdict(config), workdir, resume=resume)
    dataset = load_dataset_for(config.network(config.depths[0], config.scales[0]))
    data = as_trained(dataset, config.arch == "mlp", "float32")
    every = -(-len(data["x_train"]) // config.examples)
    data |= {name: data[name][::every] for name in ("x_train", "y_train")}
    folder.write_config()
    cases = [(depth, scale) for depth in config.depths for scale in config.scales]
    found = {}
    with progress_bar(cases, desc=config.arch, unit="case", disable=not progress) as bar:
        for depth, scale in bar:
            bar.set_postfix_str(f"depth {depth}, C {scale:g}")
            measure = functools.partial(_measure, config, depth, scale, data)
            name = f"depth{depth}-C{fields.exact(scale)}"
            found[depth, scale] = Runs(**folder.arrays(name, measure))
    powers = {depth: powers_of_scale(config, found, depth) for depth in config.depths}
    rows = [
        {"depth": depth, "scale": scale, **row}
        for (depth, scale), runs in found.items()
        for row in runs.rows(config.ratios)
    ]
    folder.finish({"power_of_scale": powers, "rows": rows})
    folder.draw("catapult", catapult_figure, config, found, powers)
    return found


def powers_of_scale(
    config: CatapultConfig, found: dict[tuple[int, float], Runs], depth: int
) -> list[dict[str, float] | None]:
    """The fitted power of C in the peak at each ratio, as `dnntk.experiments.rates.fit_trials`."""
    return [
        rates.fit_trials((scale, found[depth, scale].peak[i]) for scale in config.scales)
        for i in range(len(config.ratios))
    ]


def _measure(
    config: CatapultConfig, depth: int, scale: float, data: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of `Runs`."""
    x, y = data["x_train"], data["y_train"]
    model = config.network(depth, scale).model(y.shape[1])
    ensemble = Ensemble(model, config.trials, x, y)
    params, frozen = ensemble.init(config.seed)
    kernel = ensemble.one_by_one(lambda p, f: _kernel(model, p, f, x))
    descend = ensemble.one_by_one(_descent(model, data, config.steps, ensemble.mesh.size))
    before, labels = _largest(kernel(params, frozen)), decide(data["y_test"])
    losses, after, accuracy = [], [], []
    for ratio in config.ratios:
        steps = ensemble.put((ratio / before).astype(x.dtype))
        trained, own_losses, outputs = descend(params, frozen, steps)
        finite = np.isfinite(own_losses).all(1)
        right = [np.mean(decide(f) == labels) for f in np.asarray(outputs)]
        losses.append(own_losses)
        after.append(np.where(finite, _largest(kernel(trained, frozen)), np.nan))
        accuracy.append(np.where(finite, right, np.nan))
    arrays = {"losses": losses, "after": after, "accuracy": accuracy}
    kink = np.mean(np.sum((scale + y) ** 2, 1)) / np.mean(np.sum(y**2, 1))
    return {name: np.stack(array) for name, array in arrays.items()} | {
        "before": before,
        "kink": kink,
    }


def _descent(
    model: DeepNarrow, data: dict[str, np.ndarray], steps: int, devices: int
) -> Callable[..., Any]:
    """(params, frozen, time_step) -> (params, losses [steps], held-out outputs) of one network."""
    x, y, held_out = (jnp.asarray(data[name]) for name in ("x_train", "y_train", "x_test"))
    batch = Batch(x, y, jnp.ones(len(x), x.dtype))

    def descend(params: Any, frozen: Any, time_step: jax.Array) -> Any:
        def goes_on(carry: Any) -> jax.Array:
            step, _, losses = carry
            return (step < steps) & ((step == 0) | jnp.isfinite(losses[step - 1]))

        def take_step(carry: Any) -> Any:
            step, params, losses = carry
            value, gradient = gradient_flow.loss_and_gradient(model, params, frozen, batch, devices)
            moved = jax.tree.map(lambda p, g: p - time_step / len(x) * g, params, gradient)
            return step + 1, moved, losses.at[step].set(value / len(x))

        start = 0, params, jnp.full(steps, jnp.nan, x.dtype)
        _, params, losses = jax.lax.while_loop(goes_on, take_step, start)
        return params, losses, engine.apply(model, params, frozen, held_out)

    return descend


def _kernel(model: DeepNarrow, params: Any, frozen: Any, x: np.ndarray) -> jax.Array:
    """K / N as a matrix [N d_out, N d_out]."""
    kernel = empirical_ntk(model, {"params": params, **frozen}, x)
    return kernel.swapaxes(1, 2).reshape(len(x) * model.d_out, -1) / len(x)


def _largest(kernels: jax.Array) -> np.ndarray:
    """Largest eigenvalues [trials]; NaN of a kernel that is not finite."""
    return np.array(
        [
            np.linalg.eigvalsh(kernel)[-1] if np.isfinite(kernel).all() else np.nan
            for kernel in np.asarray(kernels, np.float64)
        ]
    )
