"""Networks of one depth that `limit_convergence` trains, by gradient descent or in closed form."""

import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.experiments.chunked_steps import chunked_steps
from dnntk.networks.models import DeepNarrow
from dnntk.runtime.progress import progress_bar
from dnntk.training import engine
from dnntk.training.ensemble import Ensemble
from dnntk.training.solve import solve

__all__ = ["ComparedNetworks"]

# Most bytes of parameters and gradients of networks trained together; one alone may exceed it.
GROUP_BYTES = 1 << 30


class ComparedNetworks:
    """Networks of one depth, trained in groups. Trial i does not depend on the group it is in."""

    def __init__(
        self, model: DeepNarrow, x: np.ndarray, y: np.ndarray, inputs: np.ndarray, seed: int
    ) -> None:
        """Train on x [N, ...] and y [N, d_out]; outputs are those at ``inputs`` [m, ...]."""
        self.model, self.x, self.y, self.inputs, self.seed = model, x, y, inputs, seed

    @property
    def at_once(self) -> int:
        """Networks to train together, the same on all machines: a resumed run finds its files."""
        variables = jax.eval_shape(self.model.init, jax.random.key(0), self.x[:1])
        weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        return max(1, GROUP_BYTES // (2 * weights * self.x.itemsize))

    def train(
        self,
        trials: range,
        time_step: float,
        steps: Sequence[int],
        label: str,
        progress: bool,
    ) -> np.ndarray:
        """Outputs [trials, T, m, d_out] at the inputs after each of ``steps``."""
        ensemble = Ensemble(self.model, len(trials), self.x, self.y)
        params, frozen = ensemble.init(self.seed, first=trials.start)
        train_steps, inputs = ensemble.descent(time_step), jnp.asarray(self.inputs)
        predict = ensemble.measure(lambda p, f: engine.apply(self.model, p, f, inputs))

        def take_steps(count: int) -> float:
            nonlocal params
            params, losses = train_steps(params, frozen, count)
            return float(np.mean(losses))

        outputs = {
            step: np.asarray(predict(params, frozen), np.float64)
            for step, _ in chunked_steps(take_steps, steps, label, progress)
            if step in steps
        }
        return np.stack([outputs[step] for step in steps], axis=1)

    def solve(
        self, trials: range, times: Sequence[float], label: str, progress: bool
    ) -> np.ndarray:
        """Outputs [trials, T, m, d_out] at the inputs at each of ``times``."""
        ensemble = Ensemble(self.model, len(trials), self.x, self.y)
        starts = jax.device_get(ensemble.init(self.seed, first=trials.start))
        predict = jax.jit(lambda p, f: engine.apply(self.model, p, f, jnp.asarray(self.inputs)))
        pairs = list(itertools.product(range(len(trials)), times))
        outputs = []
        for trial, time in progress_bar(pairs, desc=label, unit="network", disable=not progress):
            params, frozen = jax.tree.map(operator.itemgetter(trial), starts)
            start = {"params": params, **frozen}
            trained, _ = solve(self.model, start, self.x, self.y, time=time, progress=False)
            outputs.append(np.asarray(predict(trained["params"], frozen), np.float64))
        found = np.stack(outputs)
        return found.reshape(len(trials), len(times), *found.shape[1:])
