"""A run's optimizer, from optax."""

from typing import Any, cast

import jax
import optax
import optax.contrib

from dnntk.training import gradient_flow
from dnntk.training.config import TrainConfig
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
    more = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
    made = getattr(optax, config.optimizer)(over_time, **more)
    if not config.sam_radius:
        return cast(optax.GradientTransformation, made)
    # Not `optax.contrib.normalize`, which turns a gradient of 0 into nan.
    uphill = optax.chain(optax.normalize_by_update_norm(), optax.sgd(config.sam_radius))
    return optax.contrib.sam(made, uphill, opaque_mode=True)
