"""A worker of benchmark.py: `dnntk` as a script runs it.

``network`` is one network on the devices and by the step that `dnntk.train` chooses, ``two
devices`` one network with its batch split over two host devices (``--mesh=data:2``), ``ensemble``
many networks by `Ensemble.descent`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import jax
import numpy as np

from benchmarking import comparison, worker
from benchmarking.jax_worker import peak_bytes
from dnntk.training import gradient_flow, pipeline, placement
from dnntk.training.engine import NativeEngine, engine_for
from dnntk.training.ensemble import Ensemble


class One:
    """Training steps of one network."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Initialize ``job``'s network and compile the step."""
        model, (x, y) = comparison.model_of(job), _data(job)
        variables = jax.jit(model.init)(comparison.first_key(), x[:1])
        params = variables.pop("params")
        held, engine = comparison.nbytes(params), engine_for(model, params, x)
        if job["worker"] == "two devices":
            mesh = pipeline.make_mesh("data:2")
        else:
            mesh = placement.data_mesh(len(x), held, engine.threaded)
        optimizer = gradient_flow.sgd(gradient_flow.learning_rate(model, job["time_step"]))
        self.frozen = placement.put_replicated(variables, mesh)
        params = placement.put_replicated(params, mesh)
        self.state = gradient_flow.TrainState(params, optimizer.init(params))
        self.batch = placement.put_batch(x, y, mesh)
        jax.block_until_ready((self.frozen, self.state))  # else copies slow the compilation down
        self.at_once = gradient_flow.short_steps(params)
        make = gradient_flow.make_steps if self.at_once else gradient_flow.make_step
        given = (self.state, self.frozen, self.batch, *((np.int32(1),) if self.at_once else ()))
        self.step, seconds = worker.compiled(
            lambda: make(model, optimizer, mesh).lower(*given).compile(), job["compiles"]
        )
        own = x[: len(x) // mesh.size]
        in_place = isinstance(engine, NativeEngine) and engine.supports_sgd_step(own)
        self.facts = {
            "compile_seconds": seconds,
            "gradient_bytes": 0 if in_place else mesh.size * held,
            "devices": mesh.size,
            "one_call": engine.threaded,
        }

    def take(self, steps: int) -> float:
        """Take training steps; return the loss before the last one."""
        value = math.nan
        if self.at_once:
            count = np.int32(steps)
            self.state, loss = self.step(self.state, self.frozen, self.batch, count)
            return float(loss)
        for _ in range(steps):
            self.state, loss = self.step(self.state, self.frozen, self.batch)
            value = float(loss)
        jax.block_until_ready(self.state)
        return value


class Many:
    """Training steps of ``job["trials"]`` networks side by side."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Initialize the networks."""
        ensemble = Ensemble(comparison.model_of(job), job["trials"], *_data(job))
        self.params, self.frozen = ensemble.init(comparison.SEED)

        def compile() -> Any:
            descend = jax.jit(ensemble.descent(job["time_step"]), donate_argnums=0)
            return descend.lower(self.params, self.frozen, 1).compile()

        self.descend, seconds = worker.compiled(compile, job["compiles"])
        self.facts = {
            "compile_seconds": seconds,
            "gradient_bytes": comparison.nbytes(self.params),
            "devices": ensemble.mesh.size,
        }

    def take(self, steps: int) -> float:
        """Take training steps; return the first network's loss before the last one."""
        self.params, losses = self.descend(self.params, self.frozen, steps)
        jax.block_until_ready(self.params)
        return float(losses[0])


def _data(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    folder = Path(job["folder"])
    return np.load(folder / "x.npy"), np.load(folder / "y.npy")


def main() -> None:
    """Serve the network or the networks that the job names."""
    jax.devices()  # allocates the backend's memory before the network's is counted
    kinds: dict[str, Callable[[dict[str, Any]], worker.Steps]]
    kinds = {"network": One, "two devices": One, "ensemble": Many}
    worker.serve(lambda job: kinds[job["worker"]](job), peak_bytes)


if __name__ == "__main__":
    command_line.run(main)
