"""What a run decides before its first step: its devices, the size of the steps, their number."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dnntk.errors import InputError
from dnntk.networks.models import DeepNarrow
from dnntk.runs.fields import LARGEST
from dnntk.training import gradient_flow, pipeline, placement
from dnntk.training.config import (
    DEFAULT_STEPS,
    EVALUATED_ON_THE_WAY,
    EVALUATIONS,
    TrainConfig,
)
from dnntk.training.engine import engine_for
from dnntk.training.losses import curvature
from dnntk.training.step_size import Eigenvalue

__all__ = [
    *("Plan", "Planner", "checkpoint_interval", "evaluated_examples", "evaluation_steps"),
    *("kernel_times", "schedule_of"),
]

# Parts of the stable step. Full batches converge anywhere below it. The noise of mini-batches is
# amplified in the top mode by eta lambda / (2 - eta lambda): 9 times at 0.9 of it, once at half.
FULL_BATCH_FRACTION = 0.9
MINI_BATCH_FRACTION = 0.5
MOST_ITERATIONS = 100  # of a run in closed form


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's steps; saved in config.json, so that a resumed run takes the same ones.

    Attributes:
        steps: their number.
        rate: learning rate for optax.
        time_step: kernel time of a step without momentum; None for optimizers without kernel time
            and in closed form.
        time_per_step: kernel time of a step, momentum included. A schedule multiplies this,
            ``time_step`` and ``rate``.
        lambda_max: the eigenvalue that the step was chosen from; None if it was given.
        reason: a line for the log.
    """

    steps: int
    rate: float
    time_step: float | None
    time_per_step: float | None
    lambda_max: float | None
    reason: str


def schedule_of(config: TrainConfig, steps: int) -> Callable[[Any], Any]:
    """The factor of each of ``steps`` steps, as a function of the number of steps before it."""
    warmup = min(config.warmup, steps)
    fall = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, max(1, steps - warmup)),
        "linear": optax.linear_schedule(1.0, 0.0, max(1, steps - warmup)),
    }[config.schedule]
    # Not from 0, which would waste the first step.
    rise = optax.linear_schedule(1 / (warmup + 1), 1.0, max(1, warmup))
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def kernel_times(config: TrainConfig, plan: Plan) -> np.ndarray | None:
    """Kernel time [steps + 1] before the first step and after each; None without kernel time."""
    if config.optimizer == "kernel":
        return np.append(0.0, np.full(plan.steps, config.time_or_default))
    if plan.time_per_step is None:
        return None
    factors = np.ones(plan.steps)
    if config.scheduled:
        factors = np.asarray(schedule_of(config, plan.steps)(np.arange(plan.steps)), float)
    # Equal steps are multiplied, not added up, since a running sum rounds.
    whole = np.arange(plan.steps + 1) if not config.scheduled else np.append(0, factors.cumsum())
    return plan.time_per_step * whole


def evaluation_steps(config: TrainConfig, steps: int) -> list[int]:
    """The numbers of steps after which a run of ``steps`` evaluates, 0 and ``steps`` included."""
    every = config.eval_every or max(1, steps // EVALUATIONS)
    # At first after powers of two, as the loss changes most there.
    early = {2**k for k in range(every.bit_length()) if 2**k < every}
    return sorted({0, steps} | {s for s in early if s < steps} | set(range(every, steps, every)))


def evaluated_examples(config: TrainConfig, last: bool) -> int | None:
    """Most examples of each split in an evaluation, in the ``last`` one or another; None is all."""
    every = last or config.optimizer == "kernel"
    return config.eval_examples or (None if every else EVALUATED_ON_THE_WAY)


def checkpoint_interval(config: TrainConfig, steps: int) -> int:
    """Steps between two checkpoints of a run of ``steps``; the last step has one too."""
    return config.checkpoint_every or max(1, steps // EVALUATIONS)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans runs of ``config``: ``model`` on ``examples`` training examples."""

    config: TrainConfig
    model: DeepNarrow
    examples: int

    @property
    def batch_size(self) -> int:
        """Examples a step."""
        if self.config.optimizer == "kernel":
            return self.examples
        return min(self.config.batch_size or self.examples, self.examples)

    def mesh(self, params: Any, x: Any) -> Mesh:
        """The devices to run on; ``params`` may hold shapes alone, ``x`` are inputs."""
        if self.config.mesh:
            return pipeline.make_mesh(self.config.mesh)
        size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
        threaded = engine_for(self.model, params, x).threaded
        return placement.data_mesh(self.batch_size, size, threaded)

    @property
    def chooses_step(self) -> bool:
        """Is the step chosen from the kernel's largest eigenvalue?"""
        config = self.config
        return config.optimizer == "sgd" and config.time_step is None and config.lr is None

    def stable_step(self, lambda_max: float) -> float:
        """The largest stable step of full batches: 2 / (lambda_max times the loss's curvature)."""
        return 2 / (lambda_max * curvature(self.config.loss, self.model.d_out))

    def plan(self, lambda_max: Callable[[], Eigenvalue]) -> Plan:
        """The plan of a new run; ``lambda_max`` is called only if the step is chosen from it.

        Raises:
            InputError: the kernel vanishes, so that no step can be chosen.
        """
        config = self.config
        if config.optimizer == "kernel":
            return self._closed_form()
        if config.optimizer != "sgd":
            rate, said = config.lr, ""
            if config.depth_rate is not None:
                rate = config.depth_rate / math.sqrt(config.depth)
                said = f" = depth_rate / sqrt(depth), depth_rate = {config.depth_rate:g} as given"
            assert rate is not None
            reason = f"none with {config.optimizer}, whose learning rate is {rate:.4g}{said}"
            return Plan(self._steps(None), rate, None, None, None, reason)
        if config.time_step is not None:
            return self._sgd(config.time_step, None, f"{config.time_step:g} as given")
        if config.lr is not None:
            time_step = gradient_flow.time_step_of(self.model, config.lr)
            reason = f"{time_step:.4g} = lr x depth x C^2, lr = {config.lr:g} as given"
            return self._sgd(time_step, None, reason)
        return self._stable(lambda_max())

    def _closed_form(self) -> Plan:
        reason = f"none, in closed form to t = {self.config.time_or_default:g}"
        rate = gradient_flow.learning_rate(self.model, 1.0)
        return Plan(MOST_ITERATIONS, rate, None, None, None, reason)

    def resume(self, saved: Any) -> Plan:
        """The ``saved`` plan of a run, for the number of steps that the configuration now has.

        Raises:
            InputError: ``saved`` is not a plan, or has a schedule for another number of steps.
        """
        try:
            plan = Plan(**saved)
        except TypeError:
            raise InputError(f"resume: expected a plan in config.json, got {saved!r:.80}") from None
        if self.config.optimizer == "kernel":
            return self._closed_form()
        steps = self._steps(plan.time_per_step)
        if self.config.scheduled and steps != plan.steps:
            raise InputError(
                f"steps: expected {plan.steps}, which the run's schedule was made for, got {steps}"
            )
        return dataclasses.replace(plan, steps=steps)

    def _stable(self, found: Eigenvalue) -> Plan:
        if not 0 < found.value < math.inf:
            raise InputError(
                f"time_step: this network's kernel is {found.value:g} at the start, so no step can "
                "be chosen from it; give time_step or lr"
            )
        full = self.batch_size == self.examples
        fraction = FULL_BATCH_FRACTION if full else MINI_BATCH_FRACTION
        time_step = fraction * self.stable_step(found.value)
        if self.config.time is not None:
            # A little shorter, so that the last step ends exactly at this time.
            per_step = time_step / (1 - self.config.momentum)
            time_step *= self.config.time / (self._steps(per_step) * per_step)
        bends = curvature(self.config.loss, self.model.d_out)
        bound = "lambda_max" if bends == 1 else f"({bends:g} lambda_max)"
        reason = (
            f"{time_step:.4g}, below {fraction:g} x 2 / {bound}; lambda_max = {found.value:.4g} "
            f"of its own kernel on {self.batch_size} training examples "
            f"({found.iterations} power iterations)"
        )
        return self._sgd(time_step, found.value, reason)

    def _sgd(self, time_step: float, lambda_max: float | None, reason: str) -> Plan:
        per_step = time_step / (1 - self.config.momentum)
        rate = gradient_flow.learning_rate(self.model, time_step)
        return Plan(self._steps(per_step), rate, time_step, per_step, lambda_max, reason)

    def _steps(self, time_per_step: float | None) -> int:
        config = self.config
        if config.steps is not None:
            return config.steps
        if config.epochs is not None:
            name, found = "epochs", float(config.epochs * (self.examples // self.batch_size))
        elif config.time is not None:
            assert time_per_step is not None
            # Rounding must not add a step to a whole number of steps.
            name, found = "time", config.time / time_per_step * (1 - 1e-9)
        else:
            return DEFAULT_STEPS
        if not found < LARGEST:
            raise InputError(f"{name}: expected at most {LARGEST} steps, got {found:.3g}; lower it")
        return max(1, math.ceil(found))
