"""Depth transfer: at constant C a network learns alike at every depth, so rates carry over.

In the ntk form a layer changes the state by O(1 / depth), so depth is the step of a discretized
flow whose limit, at constant C, is no kernel's: features move. `transfer_depth` trains networks of
many depths on the same examples, full batch, and measures

* the loss after every step, for sgd in kernel time and for others at rate b / sqrt(depth)
  (`TrainConfig.depth_rate`);
* the rate that is best at each depth, and that of networks of another initialization;
* how fast the outputs f_t(x) on held-out examples near those of the deepest networks;
* one much deeper network, trained with what was best at a small depth.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dnntk.experiments import rates
from dnntk.experiments.depth_transfer_config import DepthTransferConfig, Kind
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.depth_transfer import depth_transfer_figure
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import duration, progress_bar
from dnntk.training import engine
from dnntk.training.evaluation import as_trained, scores
from dnntk.training.optimizers import optimizer_of
from dnntk.training.placement import Batch
from dnntk.training.plan import Planner
from dnntk.training.run import load_dataset_for
from dnntk.training.step_size import Eigenvalue

__all__ = ["Curves", "Transferred", "transfer_depth"]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Networks of one kind.

    Attributes:
        kind: what they have in common.
        tuned: the rate of `losses`, which is best at the configuration's ``tune_depth``.
        rates: [R] rates that were tried at the depths of ``sweep``.
        sweep: {depth: [R]}, the last training loss of one network; infinite where it diverged.
        losses: {depth: [trials or 1, steps + 1]}, training losses; infinite where one diverged.
        outputs: {depth: [trials or 1, held_out, d_out]}, after the last step.
    """

    kind: Kind
    tuned: float
    rates: np.ndarray
    sweep: dict[int, np.ndarray]
    losses: dict[int, np.ndarray]
    outputs: dict[int, np.ndarray]

    __repr__ = fields.short_repr

    def best(self, depth: int) -> float:
        """The best rate, by a parabola through the losses of the best one and its neighbours.

        NaN if every rate diverged.
        """
        found, logs = self.sweep[depth], np.log(self.rates)
        i = int(np.argmin(found))
        if not np.isfinite(found[i]):
            return math.nan
        if not 0 < i < len(found) - 1 or not np.isfinite(found[i - 1 : i + 2]).all():
            return float(self.rates[i])
        curved, slope, _ = np.polyfit(logs[i - 1 : i + 2] - logs[i], found[i - 1 : i + 2], 2)
        return float(self.rates[i] * np.exp(-slope / (2 * curved) if curved > 0 else 0.0))

    def distances(self) -> dict[int, np.ndarray]:
        """{depth: [trials]}: of outputs from the deepest networks' mean, over the mean's size.

        Of the depths above the last one with as many trials; none of single networks.
        """
        trials = max(map(len, self.outputs.values()))
        if trials == 1:
            return {}
        *shallow, deepest = [depth for depth in self.outputs if len(self.outputs[depth]) == trials]
        mean = self.outputs[deepest].mean(axis=0)
        size = np.linalg.norm(mean)
        return {
            depth: np.linalg.norm(self.outputs[depth] - mean, axis=(1, 2)) / size
            for depth in shallow
        }

    def fit(self) -> dict[str, float] | None:
        """The fitted power of depth in `distances`, with its 95% interval; None without trials."""
        found = self.distances()
        return rates.fit_trials(found.items()) if found else None

    def spread(self, least: int) -> float:
        """Largest difference of mean losses at depths from ``least`` on, over steps and depths."""
        means = [runs.mean(axis=0) for depth, runs in self.losses.items() if depth >= least]
        with np.errstate(invalid="ignore"):  # infinities, if one diverged
            return float(np.nan_to_num(np.ptp(means, axis=0), nan=np.inf, posinf=np.inf).max())

    def described(self, least: int) -> str:
        """In words: the rate, the last loss at each depth, the best rates, the power of depth."""
        losses = " ".join(f"{runs[:, -1].mean():.4g}" for runs in self.losses.values())
        best = " ".join(f"{self.best(depth):.2g}" for depth in self.sweep)
        text = f"{self.kind.name}: rate {self.tuned:g}: losses {losses}; best rates {best}"
        if (fit := self.fit()) is not None:
            text += f"; outputs depth^{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
        return f"{text}; curves differ by {self.spread(least):.1e} from depth {least} on"

    def summary(self, least: int) -> dict[str, Any]:
        """The entry of summary.json."""
        return {
            "rate": self.tuned,
            "loss": {depth: float(runs[:, -1].mean()) for depth, runs in self.losses.items()},
            "best_rate": {
                depth: None if math.isnan(best) else best
                for depth in self.sweep
                for best in [self.best(depth)]
            },
            "best_loss": {depth: float(found.min()) for depth, found in self.sweep.items()},
            "distance": {
                depth: float(np.sqrt(np.mean(found**2)))
                for depth, found in self.distances().items()
            },
            "fit": self.fit(),
            "largest_difference": self.spread(least),
        }


@dataclasses.dataclass(frozen=True)
class Transferred:
    """What is best at a small depth, and a deep network trained with it.

    Attributes:
        kind: optimizer and C.
        rate: sgd's ``time_step``, or ``depth_rate``.
        depths: of the two networks.
        losses: [2, steps + 1], training losses.
        accuracies: [2], on held-out examples.
        seconds: [2], of the whole search at the small depth, and of the deep network.
    """

    kind: Kind
    rate: float
    depths: tuple[int, int]
    losses: np.ndarray
    accuracies: np.ndarray
    seconds: np.ndarray

    __repr__ = fields.short_repr

    def described(self) -> str:
        """In words: what was best, and both networks' results."""
        both = zip(self.losses[:, -1], self.accuracies, self.seconds, self.depths, strict=True)
        small, large = (
            f"loss {loss:.4f}, {accuracy:.1%} held-out, {duration(seconds)} at depth {depth:,}"
            for loss, accuracy, seconds, depth in both
        )
        return f"{self.kind.name}, rate {self.rate:g}, is best of all: {small}; {large}"

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json."""
        return {
            "kind": self.kind.name,
            "rate": self.rate,
            "depths": self.depths,
            "losses": self.losses[:, -1].tolist(),
            "largest_difference": float(np.abs(np.subtract(*self.losses)).max()),
            "accuracies": self.accuracies.tolist(),
            "seconds": self.seconds.tolist(),
        }


@freeing_folders()
def transfer_depth(
    config: DepthTransferConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, tuple[list[Curves], Transferred | None]]:
    """Train networks of many depths at constant C, and compare them.

    Args:
        config: the experiment; None is the default one.
        workdir: folder for configuration, curves, summary, figures; None writes nothing.
        resume: keep what is trained in ``workdir`` and train the rest.
        progress: show a progress bar per architecture.

    Returns:
        {architecture: (networks of each kind, the deepest one)}.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
    """
    config = config or DepthTransferConfig()
    folder = ExperimentFolder("depth_transfer", dataclasses.asdict(config), workdir, resume=resume)
    cases = [_Case(arch, config, folder) for arch in config.archs]
    folder.write_config()
    found = {case.arch: case.result(progress) for case in cases}
    summary: dict[str, Any] = {}
    for arch, (curves, transferred) in found.items():
        summary |= {one.kind.name: one.summary(config.tune_depth) for one in curves}
        if transferred is not None:
            summary[f"{arch}-transferred"] = transferred.summary()
    folder.finish(summary)
    for arch, (curves, transferred) in found.items():
        folder.draw(f"depth_transfer_{arch}", depth_transfer_figure, curves, transferred)
    return found


class _Case:
    """One architecture: its examples and its networks."""

    def __init__(self, arch: str, config: DepthTransferConfig, folder: ExperimentFolder) -> None:
        self.arch, self.config, self.folder, self.own = arch, config, folder, config.of(arch)
        run = config.run(config.kinds(arch)[0], 2, 1.0)
        arrays = as_trained(load_dataset_for(run), arch == "mlp", run.dtype)
        train, held_out = self.own["examples"], self.own["held_out"]
        rows = (arrays[f"{name}_train"][:train] for name in "xy")
        others = (arrays[f"{name}_test"][:held_out] for name in "xy")
        self.x, self.y = (np.concatenate(pair) for pair in zip(rows, others, strict=True))
        self.examples = len(arrays["x_train"][:train])
        # Held-out examples have no weight in the gradient.
        self.weight = (np.arange(len(self.x)) < self.examples).astype(self.y.dtype)

    def result(self, progress: bool) -> tuple[list[Curves], Transferred | None]:
        """Train the networks of every kind, and the deepest one."""
        kinds = self.config.kinds(self.arch)
        with progress_bar(kinds, desc=self.arch, unit="kind", disable=not progress) as bar:
            curves = [self._curves(kind) for kind in bar]
        return curves, self._transferred(curves) if self.own["deepest"] else None

    def _curves(self, kind: Kind) -> Curves:
        tune, sweep_depth = self.config.tune_depth, self.own["sweep_depth"]
        first = self._trained(kind, tune)
        tuned = float(first["tuned"])
        depths = self.own["depths"]
        if kind.init != "deep_narrow":  # which is to show at what depths it trains at all
            depths = [depth for depth in depths if depth <= sweep_depth]
        found = {
            depth: first if depth == tune else self._trained(kind, depth, tuned) for depth in depths
        }
        return Curves(
            kind,
            tuned,
            np.array(self.config.rates(kind)),
            {depth: found[depth]["sweep"] for depth in depths if depth <= sweep_depth},
            {depth: found[depth]["losses"] for depth in depths},
            {depth: found[depth]["outputs"] for depth in depths},
        )

    def _transferred(self, curves: list[Curves]) -> Transferred:
        """The best of all kinds at the small depth, and the deepest network."""
        tune, deepest = self.config.tune_depth, self.own["deepest"]
        own = [one for one in curves if one.kind.init == "deep_narrow"]
        best = min(own, key=lambda one: one.sweep[tune].min())
        both = [self._trained(best.kind, tune), self._trained(best.kind, deepest, best.tuned)]
        search = sum(float(self._trained(one.kind, tune)["seconds"]) for one in own)
        return Transferred(
            best.kind,
            best.tuned,
            (tune, deepest),
            np.stack([each["losses"][0] for each in both]),
            np.stack([each["accuracy"] for each in both]),
            np.array([search, float(both[1]["seconds"])]),
        )

    def _trained(self, kind: Kind, depth: int, tuned: float | None = None) -> dict[str, np.ndarray]:
        """Networks of one kind and depth: the rates tried, and trials at ``tuned`` or the best."""
        return self.folder.arrays(
            f"{kind.name}-depth{depth}", functools.partial(self._train, kind, depth, tuned)
        )

    def _train(self, kind: Kind, depth: int, tuned: float | None) -> dict[str, np.ndarray]:
        begun, values = time.perf_counter(), self.config.rates(kind)
        batch = Batch(*map(jnp.asarray, (self.x, self.y, self.weight)))
        train = _trainer(self.config, kind, depth, batch)
        found = {}
        if depth <= self.own["sweep_depth"]:
            found["sweep"] = np.array([self._losses(train(rate, 0))[-1] for rate in values])
            found["seconds"] = np.array(time.perf_counter() - begun)
            tuned = values[np.argmin(found["sweep"])] if tuned is None else tuned
        assert tuned is not None
        many = kind.init == "deep_narrow" and depth <= self.own["trial_depth"]
        runs = [train(tuned, trial) for trial in range(self.config.trials if many else 1)]
        found.setdefault("seconds", np.array(time.perf_counter() - begun))
        held_out = slice(self.examples, None)
        found["accuracy"] = np.array(scores(runs[0][-1, held_out], self.y[held_out], True)[1])
        found["losses"] = np.stack([self._losses(run) for run in runs])
        return found | {
            "tuned": np.array(tuned),
            "outputs": np.stack([run[-1, held_out] for run in runs]).astype(np.float64),
        }

    def _losses(self, outputs: np.ndarray) -> np.ndarray:
        """[steps + 1] of outputs [steps + 1, examples and held_out, d_out]."""
        errors = outputs[:, : self.examples].astype(np.float64) - self.y[: self.examples]
        losses = 0.5 * np.mean(np.sum(errors**2, axis=2), axis=1)
        return np.where(np.isfinite(losses), losses, np.inf)


@functools.partial(jax.jit, static_argnums=0)
def _initialized(model: nn.Module, key: jax.Array, x: jax.Array) -> Any:
    return model.init(key, x)


def _trainer(
    config: DepthTransferConfig, kind: Kind, depth: int, batch: Batch
) -> Callable[[float, int], np.ndarray]:
    """(rate, trial) -> outputs [steps + 1, n, d_out] before the first step and after each.

    The steps are those of `dnntk.train`, in one program for all rates: an update is linear in it.
    """
    run, d_out, examples = config.run(kind, depth, 1.0), batch.y.shape[1], int(batch.weight.sum())
    model = config.network(kind, depth, d_out)
    # In the ntk form the initial values do not depend on C: one program for all.
    start = config.network(dataclasses.replace(kind, scale=1.0), depth, d_out)
    rule = optimizer_of(run, 1.0, run.steps or 0)

    @jax.jit
    def descend(params: Any, frozen: Any, rate: jax.Array) -> jax.Array:
        chosen = engine.engine_for(model, params, batch.x)

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
            params, opt_state = state
            outputs, gradient = chosen.outputs_and_gradient(params, frozen, batch)
            mean = jax.tree.map(lambda g: g / examples, gradient)
            updates, opt_state = rule.update(mean, opt_state, params)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), opt_state), outputs

        first = params, rule.init(params)
        return jax.lax.scan(step, first, None, length=1 + (run.steps or 0))[1]

    def train(rate: float, trial: int) -> np.ndarray:
        planner = Planner(config.run(kind, depth, rate), run.model(d_out), examples)
        plan = planner.plan(lambda: Eigenvalue(0.0, False, 0))  # not asked for: the rate is given
        depth_key = jax.random.fold_in(jax.random.key(config.seed), depth)
        variables = _initialized(start, jax.random.fold_in(depth_key, trial), batch.x[:1])
        frozen, params = flax.core.pop(variables, "params")
        return np.asarray(descend(params, frozen, jnp.asarray(plan.rate, batch.x.dtype)))

    return train
