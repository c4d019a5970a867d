"""One run of `dnntk.train` with optimizer=kernel: trained in closed form, saved as other runs are.

A step of the run is an iteration of `dnntk.training.solve.KernelSolver`: one gradient pass over all
training examples. The kernel's tiles lie in the folder ``kernel`` of the workdir until the run
ends, so that a killed run does not compute them again.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.infinite_depth.gram_matrix import UnusableTiles
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runs.checkpoints import Checkpoints
from dnntk.runs.folder import SUMMARY, as_json, parsed
from dnntk.runs.interruption import termination_flag
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar
from dnntk.training.solve import KernelSolver
from dnntk.training.trainer import Run, TrainResult

__all__ = ["KernelRun"]

CURVE_POINTS, CURVE_SPAN = 81, 1e5
KERNEL = "kernel"

log = logging.getLogger("dnntk")


class KernelRun(Run):
    """A `Run` whose steps are iterations of a `KernelSolver`."""

    compile_seconds = 0.0
    _finished = False  # was the run at its end when it was resumed?

    def __init__(self, *arguments: Any) -> None:
        """Prepare everything but the kernel; the arguments are those of `Run`."""
        super().__init__(*arguments)
        x, y = self.dataset.x_train, self.dataset.y_train.astype(np.float64)
        self.solver = KernelSolver(
            *(self.model, self.mesh, self.state.params, self.frozen, x, y),
            restart=self._first_parameters,
        )

    def _first_parameters(self) -> Any:
        """The parameters of a network before its training: zeros in the ntk form."""
        zeros = lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding)  # noqa: E731
        return jax.tree.map(zeros, self.solver.state.params)

    def _held(self) -> dict[str, Any]:
        return {**super()._held(), "solver": self.solver.memory()}

    def _take(self, held: dict[str, Any]) -> None:
        super()._take(held)
        self.solver.take(self.state, self.frozen, held["solver"])
        assert self.folder is not None
        self._finished = (self.folder.path / SUMMARY).exists() and self.solver.ended

    def result(self) -> TrainResult:
        """Train, write the results, and remove the kernel's tiles."""
        found = super().result()
        self._remove_tiles()
        return found

    def _compile(self) -> None:
        """Compute the kernel, and solve its flow."""
        if self._finished:
            return
        begun = time.perf_counter()
        try:
            self._prepare()
        except UnusableTiles:
            log.warning("kernel: the tiles of the workdir are damaged: computed again")
            self._remove_tiles()
            self._prepare()
        if self.folder is not None:  # a resumed run that had no iteration may have another time
            content = self.config.to_json() | self.recorded
            self.folder.write_config("train", content | {"plan": dataclasses.asdict(self.plan)})
        self.curve = self._curve()
        self.kernel_seconds = time.perf_counter() - begun
        log.info("kernel: its flow solved, %.1f s", self.kernel_seconds)

    def _prepare(self) -> None:
        kernel = RandomFeatures(self.model, self._whole(self.frozen))
        flow = self.solver.flow_of(
            kernel,
            *(self.config.time_or_default, self.config.ridge),
            folder=None if self.folder is None else self.folder.path / KERNEL,
            progress=self.progress,
        )
        self.solver.prepare(flow, self.config.time_or_default)

    def _remove_tiles(self) -> None:
        if self.folder and processes.is_primary():
            shutil.rmtree(self.folder.path / KERNEL, ignore_errors=True)
        processes.barrier("tiles")

    def _curve(self) -> list[dict[str, float]]:
        """The training loss of the flow at many times."""
        flow, end = self.solver.flow, self.config.time_or_default
        last = (
            end if math.isfinite(end) else 1 / max(self.config.ridge, 1e-7 * flow.eigenvalues[-1])
        )
        times = np.geomspace(last / CURVE_SPAN, last, CURVE_POINTS)
        return [
            {"time": float(t), "train_loss": float(loss)}
            for t, loss in zip(times, flow.loss(times.tolist()), strict=True)
        ]

    def _train(self, start: int, checkpoints: Checkpoints | None) -> float:
        """Iterate from iteration ``start`` on; returns the seconds of the iterations alone."""
        solver, step, stepping = self.solver, start, 0.0
        if self._finished:
            return stepping
        bar = progress_bar(
            desc="solving",
            unit="iteration",
            initial=start,
            delay=PROGRESS_DELAY,
            disable=not self.progress,
        )
        with bar, termination_flag() as termination_requested:
            while step < self.plan.steps and not solver.ended:
                begun = time.perf_counter()
                solver.iterate(self.begun)
                stepping, step = stepping + time.perf_counter() - begun, step + 1
                self.state, line = solver.state, solver.history[-1]
                bar.set_postfix(residual=f"{solver.residual:.2g}", refresh=False)
                bar.update()
                self._evaluate(step, residual=solver.residual, damping=line["damping"])
                if checkpoints:
                    checkpoints.save(step, self._whole(self._held()))
                if processes.any_process(termination_requested() > 0 and not solver.ended):
                    raise self._stopped(step, termination_requested())
        if not solver.converged:
            solver.warn()
        return stepping

    def _outputs(self, x: np.ndarray) -> np.ndarray:
        if np.may_share_memory(x, self.dataset.x_train):
            return self.solver.outputs[: len(x)].astype(x.dtype)
        return super()._outputs(x)

    def _summary(self, stepping: float, steps: int) -> dict[str, Any]:
        if self._finished and self.folder:
            return parsed((self.folder.path / SUMMARY).read_bytes())
        iterations = self.solver.iterations
        summary = super()._summary(stepping, iterations) | {
            "steps": iterations,
            "lambda_max": float(self.solver.flow.eigenvalues[-1]),
            "converged": self.solver.converged,
            "residual": self.solver.residual,
            "kernel_seconds": self.kernel_seconds,
        }
        return as_json(summary)

    def _draw(self) -> None:
        if self._finished or self.folder is None:
            return
        if processes.is_primary():
            lines = "".join(json.dumps(line) + "\n" for line in self.curve)
            (self.folder.path / "curve.jsonl").write_text(lines, encoding="utf-8")
        super()._draw()
