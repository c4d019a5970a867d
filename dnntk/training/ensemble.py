"""Many networks trained side by side: independent initializations, the same data, full batches.

`jax.vmap` over the trials of a device, the trials split over devices. Ten narrow networks at once
take little longer than one, up to the point where arithmetic dominates.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dnntk.networks.models import DeepNarrow
from dnntk.training import gradient_flow, placement

__all__ = ["Ensemble"]


class Ensemble:
    """``trials`` networks of one kind on inputs x [n, ...] and targets y [n, d_out].

    All trees of a network's arrays have a leading axis of trials.
    """

    def __init__(self, model: DeepNarrow, trials: int, x: np.ndarray, y: np.ndarray) -> None:
        """Split the trials over as many local devices as divide their number."""
        devices = jax.local_devices()
        count = max(d for d in range(1, len(devices) + 1) if trials % d == 0)
        self.model, self.trials = model, trials
        self.mesh = Mesh(np.array(devices[:count]), ("trials",))
        self._x, self._y = jnp.asarray(x), jnp.asarray(y)
        self._descents: dict[str, Any] = {}

    def init(self, seed: int, first: int = 0) -> tuple[Any, Any]:
        """(params, frozen) of all trials, numbered from ``first``.

        A trial depends on its number alone, not on the number of trials.
        """
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
            first + jnp.arange(self.trials)
        )
        variables = jax.jit(jax.vmap(lambda key: self.model.init(key, self._x[:1])))(keys)
        frozen, params = flax.core.pop(variables, "params")
        return self.put(params), self.put(frozen)

    def put(self, tree: Any) -> Any:
        """``tree`` split over the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, P("trials")))

    def descent(
        self, time_step: float, loss: str = "squared"
    ) -> Callable[[Any, Any, int], tuple[Any, jax.Array]]:
        """(params, frozen, steps) -> (params, losses [trials] before the last of the steps).

        Full-batch gradient descent on a loss, ``time_step`` of kernel time a step.
        ``params`` are donated; a program serves any number and size of steps.
        """
        rate = gradient_flow.learning_rate(self.model, time_step) / len(self._x)
        compiled = self._descents.setdefault(loss, self._compiled(loss))
        return lambda params, frozen, steps: compiled(params, frozen, steps, rate)

    def _compiled(self, loss: str) -> Any:
        """(params, frozen, steps, rate) -> (params, losses): one program for all sizes of steps."""
        weight = jnp.ones(len(self._x), self._x.dtype)
        batch, examples = placement.Batch(self._x, self._y, weight), len(self._x)

        def step(params: Any, frozen: Any, rate: jax.Array) -> tuple[Any, jax.Array]:
            value, gradient = gradient_flow.loss_and_gradient(
                self.model, params, frozen, batch, self.mesh, loss
            )
            moved = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
            return moved, value / examples

        def descend(
            params: Any, frozen: Any, steps: jax.Array, rate: jax.Array
        ) -> tuple[Any, jax.Array]:
            body = lambda _, carry: jax.vmap(step, (0, 0, None))(carry[0], frozen, rate)  # noqa: E731
            local = jax.tree.leaves(params)[0].shape[0]
            return lax.fori_loop(0, steps, body, (params, jnp.zeros(local, self._x.dtype)))

        trials = P("trials")
        sharded = jax.shard_map(
            descend,
            mesh=self.mesh,
            in_specs=(trials, trials, P(), P()),
            out_specs=(trials, trials),
            check_vma=False,
        )
        return jax.jit(sharded, donate_argnums=0)

    def one_by_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of one trial's trees, of all trials, those of a device one after the other.

        Trials may then take different numbers of steps.
        """
        mapped = jax.shard_map(
            lambda *trees: lax.map(lambda args: function(*args), trees),
            mesh=self.mesh,
            in_specs=P("trials"),
            out_specs=P("trials"),
            check_vma=False,
        )
        return jax.jit(mapped)

    def measure(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of one trial's trees, mapped over all trials on one device.

        Not on several: host devices share their threads, and batches of singular values on two
        devices may deadlock.
        """
        mapped = jax.jit(lambda *trees: lax.map(lambda args: function(*args), trees))
        device = self.mesh.devices.flat[0]
        return lambda *trees: mapped(*jax.device_put(trees, device))
