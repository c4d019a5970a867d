"""What a run settles before its first step: the size of the steps, and how many of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from dnntk.errors import InputError
from dnntk.fields import LARGEST
from dnntk.networks.models import DeepNarrow
from dnntk.training import gradient_flow
from dnntk.training.config import DEFAULT_STEPS, TrainConfig
from dnntk.training.step_size import FULL_BATCH_FRACTION, MINI_BATCH_FRACTION, Eigenvalue


@dataclasses.dataclass(frozen=True)
class Plan:
    """Kept in config.json, so that a resumed run takes the same steps.

    Attributes:
        steps: how many there are in all.
        rate: learning rate that optax gets.
        time_step: kernel time a step without momentum, time_per_step with it; None for optimizers
            that have no kernel time. A schedule multiplies all three.
        lambda_max: the eigenvalue that the step was chosen from, if it was.
        reason: a line for the log.
    """

    steps: int
    rate: float
    time_step: float | None
    time_per_step: float | None
    lambda_max: float | None
    reason: str


def schedule_of(config: TrainConfig, steps: int) -> Callable[[Any], Any]:
    """What each of ``steps`` steps is multiplied by, as a function of how many came before."""
    warmup = min(config.warmup, steps)
    fall = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, max(1, steps - warmup)),
        "linear": optax.linear_schedule(1.0, 0.0, max(1, steps - warmup)),
    }[config.schedule]
    # The first step is not to be wasted on a factor of 0.
    rise = optax.linear_schedule(1 / (warmup + 1), 1.0, max(1, warmup))
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def kernel_times(config: TrainConfig, plan: Plan) -> np.ndarray | None:
    """Kernel time [steps + 1] before the first step and after each; None where there is none."""
    if plan.time_per_step is None:
        return None
    factors = np.ones(plan.steps)
    if config.scheduled:
        factors = np.asarray(schedule_of(config, plan.steps)(np.arange(plan.steps)), float)
    # Not a running sum: so many equal steps are a multiple of one, to the bit.
    whole = np.arange(plan.steps + 1) if not config.scheduled else np.append(0, factors.cumsum())
    return plan.time_per_step * whole


@dataclasses.dataclass(frozen=True)
class Job:
    """What a plan depends on."""

    config: TrainConfig
    model: DeepNarrow
    examples: int
    batch_size: int

    @property
    def chooses_step(self) -> bool:
        """Is the step chosen from the kernel's largest eigenvalue?"""
        config = self.config
        return config.optimizer == "sgd" and config.time_step is None and config.lr is None

    def planned(self, lambda_max: Callable[[], Eigenvalue]) -> Plan:
        """A new run's plan; ``lambda_max`` is called only where the step is chosen from it.

        Raises:
            InputError: the kernel vanishes, so that it sets no step.
        """
        config = self.config
        if config.optimizer != "sgd":
            assert config.lr is not None
            reason = f"none with {config.optimizer}, whose learning rate is {config.lr:g}"
            return Plan(self._steps(None), config.lr, None, None, None, reason)
        if config.time_step is not None:
            return self._sgd(config.time_step, None, f"{config.time_step:g} as given")
        if config.lr is not None:
            time_step = gradient_flow.time_step_of(self.model, config.lr)
            reason = f"{time_step:.4g} = lr x depth x C^2, lr = {config.lr:g} as given"
            return self._sgd(time_step, None, reason)
        return self._stable(lambda_max())

    def resumed(self, held: Any) -> Plan:
        """The plan that a run was started with, for as many steps as the configuration now says.

        Raises:
            InputError: ``held`` is not a plan.
        """
        try:
            plan = Plan(**held)
        except TypeError:
            raise InputError(f"resume: expected a plan in config.json, got {held!r:.80}") from None
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
        time_step = fraction * 2 / found.value
        if self.config.time is not None:
            # A little shorter, so that the last step ends at the time asked for.
            per_step = time_step / (1 - self.config.momentum)
            time_step *= self.config.time / (self._steps(per_step) * per_step)
        reason = (
            f"{time_step:.4g}, below {fraction:g} x 2 / lambda_max; lambda_max = {found.value:.4g} "
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
            # Rounding must not add a step to a time that is a whole number of them.
            name, found = "time", config.time / time_per_step * (1 - 1e-9)
        else:
            return DEFAULT_STEPS
        if not found < LARGEST:
            raise InputError(f"{name}: expected at most {LARGEST} steps, got {found:.3g}; lower it")
        return max(1, math.ceil(found))
