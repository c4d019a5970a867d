"""A run's optimizer, from optax."""

import inspect
import math
from typing import Any, cast

import jax
import optax
import optax.contrib

from dnntk.training import gradient_flow
from dnntk.training.config import DECAYING, TrainConfig
from dnntk.training.plan import schedule_of

__all__ = ["optimizer_of"]


def optimizer_of(config: TrainConfig, rate: float, steps: int) -> optax.GradientTransformation:
    """The run's optimizer at a learning rate, for a run of ``steps``.

    It works under JAX's strict promotion too, though optax mixes dtypes.
    """
    made = _optimizer_of(config, rate, steps)

    def standard(function: Any) -> Any:
        return jax.numpy_dtype_promotion("standard")(function)

    if isinstance(made, gradient_flow.PlainSGD):
        return made
    return made._replace(init=standard(made.init), update=standard(made.update))


def _optimizer_of(config: TrainConfig, rate: float, steps: int) -> optax.GradientTransformation:
    if config.optimizer in ("sgd", "kernel") and not config.momentum and not config.scheduled:
        return gradient_flow.sgd(rate)
    over_time: Any = rate
    if config.scheduled:
        factor = schedule_of(config, steps)
        over_time = lambda count: rate * factor(count)  # noqa: E731
    if config.optimizer == "sgd":
        return optax.sgd(over_time, momentum=config.momentum or None)
    make = getattr(optax, config.optimizer)
    more = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
    if config.depth_rate is not None and config.optimizer in DECAYING:
        # optax multiplies it by the learning rate, the configuration by ``depth_rate``.
        default = inspect.signature(make).parameters["weight_decay"].default
        more = {"weight_decay": more.get("weight_decay", default) * math.sqrt(config.depth)}
    made = make(over_time, **more)
    if not config.sam_radius:
        return cast(optax.GradientTransformation, made)
    # Not `optax.contrib.normalize`, which turns a gradient of 0 into nan.
    uphill = optax.chain(optax.normalize_by_update_norm(), optax.sgd(config.sam_radius))
    return optax.contrib.sam(made, uphill, opaque_mode=True)
