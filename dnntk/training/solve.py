"""Train a deep narrow network in closed form: to any kernel time, in a few passes over the data.

In the ntk form the network is linear in its parameters D up to O(1/C), and its kernel K is known
without a gradient (`dnntk.ntk.random_features`). Gradient flow from D_0 to time t therefore ends at

    D_0 + J^T c,    c = K^-1 (I - exp(-t K / N)) (y - f_0),

and c is the solution of a `KernelFlow` with that kernel. D_0 + J^T c is what one step of gradient
descent, with step 1, makes of D_0 on the targets f_0 + N c. So it costs one step, at any depth.

At small C the network is not linear, and its outputs after that step are not the flow's. More steps
of the same kind bring them there: Gauss-Newton steps with the kernel at initialization in place of
the current one, damped (Levenberg-Marquardt), and combined by Anderson's method (1965), which is
GMRES if the network is linear.
"""

import dataclasses
import logging
import math
import time as clock
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from dnntk.checks import check_count, host_examples, host_targets, number_within
from dnntk.errors import Diverged
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.random_features import RandomFeatures
from dnntk.training import gradient_flow, placement
from dnntk.training.engine import engine_for
from dnntk.training.gradient_flow import TrainState

__all__ = ["SolveReport", "solve"]

WINDOW = 10  # steps that Anderson's method combines
MOST_DAMPING = 1e6  # times the first one, where the solver gives up

log = logging.getLogger("dnntk")


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """How the weights were found.

    Attributes:
        converged: is the residual within the tolerance?
        residual: norm of f(X) minus the flow's outputs, relative to that of y - f_0(X).
        iterations: gradient passes over the training examples.
        seconds: of all of it, the kernel's solution included.
        history: a dict an iteration: iteration, residual, loss, damping (in units of K / N),
            seconds since the start.
    """

    converged: bool
    residual: float
    iterations: int
    seconds: float
    history: list[dict[str, float]] = dataclasses.field(repr=False)


def solve(
    model: DeepNarrow,
    variables: Any,
    x: ArrayLike,
    y: ArrayLike,
    *,
    time: float = math.inf,
    ridge: float = 0.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    memory: float | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], SolveReport]:
    """The weights that gradient flow reaches at ``time``, without descending.

    Args:
        model: a ``deep_narrow`` network in the ntk form, of any depth and C.
        variables: its ``params`` and ``initial``; training starts at these ``params``.
        x: [n, ...] training inputs.
        y: [n, d_out] targets, or [n] for one output.
        time: kernel time of gradient flow on 1/2 mean ||f - y||^2; may be infinite.
        ridge: weight decay, 1/2 mean ||f - y||^2 + ridge/2 ||D - D_0||^2.
        tolerance: of the report's residual.
        max_iterations: gradient passes at most.
        memory: bytes for the kernel, as `KernelFlow` takes them.
        progress: show bars for what takes longer than five seconds.

    Returns:
        (variables, report). At large C the first pass is the last. At a C so small that the
        network is not linear, its outputs at the training examples are brought to those of the
        linear network's flow.

    Raises:
        InputError: an argument is not as above; or the time is infinite, there is no ridge, and
            the kernel is singular.
    """
    kernel = RandomFeatures(model, variables)
    problem = _Problem(model, variables, x, y, tolerance, max_iterations)
    flow = KernelFlow(
        kernel,
        problem.x,
        problem.y,
        ridge=ridge,
        initial=problem.outputs,
        tolerance=problem.tolerance / 10,
        memory=memory,
        progress=progress,
    )
    problem.step(flow.solution(time).coefficients, flow.train_predictions(time))
    if not problem.converged:
        problem.iterate(flow, max(flow.ridge, 1 / time, 1e-7 * float(flow.eigenvalues[-1])))
    return problem.result()


class _Problem:
    """The network between steps, and how far its outputs are from the targets of the flow."""

    def __init__(
        self,
        model: DeepNarrow,
        variables: Any,
        x: ArrayLike,
        y: ArrayLike,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        self._start = clock.perf_counter()
        self.tolerance = number_within(
            "tolerance", tolerance, lambda t: 0 < t < 1, "a number between 0 and 1"
        )
        self._max_iterations = check_count("max_iterations", max_iterations)
        params = variables["params"]
        dtype = jax.tree.leaves(params)[0].dtype
        self.x = host_examples("x", x).astype(dtype)
        self.y = host_targets("y", y, len(self.x))
        bytes_held = sum(p.nbytes for p in jax.tree.leaves(params))
        threaded = engine_for(model, params, self.x).threaded
        self.mesh = placement.data_mesh(len(self.x), bytes_held, threaded)
        self._frozen = placement.put_state({"initial": variables["initial"]}, self.mesh)
        optimizer = gradient_flow.sgd(gradient_flow.learning_rate(model, 1.0))
        # A step overwrites its state, so it starts from a copy of the caller's parameters.
        params = jax.tree.map(lambda p: p.copy(), placement.put_state(params, self.mesh))
        self._state = TrainState(params, optimizer.init(params))
        self._sgd_step = gradient_flow.make_step(model, optimizer, self.mesh)
        self._predict = gradient_flow.make_predict(model, self.mesh)
        self.outputs = self._outputs()
        self._size = float(np.linalg.norm(self.y - self.outputs)) or 1.0
        self.history: list[dict[str, float]] = []

    def step(self, coefficients: np.ndarray, targets: np.ndarray, damping: float = 0.0) -> None:
        """D + J^T coefficients, by a step of gradient descent with step 1."""
        self.targets = targets
        aim = (self.outputs + len(self.x) * coefficients).astype(self.x.dtype)
        batch = placement.put_batch(self.x, aim, self.mesh)
        self._state, _ = self._sgd_step(self._state, self._frozen, batch)
        self.outputs = self._outputs()
        self.residual = float(np.linalg.norm(targets - self.outputs)) / self._size
        loss = 0.5 * float(np.sum((self.outputs - self.y) ** 2)) / len(self.x)
        seconds = clock.perf_counter() - self._start
        made = (len(self.history) + 1, self.residual, loss, damping, seconds)
        names = ("iteration", "residual", "loss", "damping", "seconds")
        self.history.append(dict(zip(names, made, strict=True)))
        log.info("solve: iteration %d: residual %.2g, loss %.4g, damping %.2g", *made[:4])

    @property
    def converged(self) -> bool:
        return self.residual <= self.tolerance

    def iterate(self, flow: KernelFlow, damping: float) -> None:
        """Take damped Gauss-Newton steps until the outputs are the targets.

        ``steps`` holds (coefficients, change of the outputs) of the last ones.
        """
        best, first = self._kept(), damping
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        while not self.converged and len(self.history) < self._max_iterations:
            before, left = self.outputs, self.targets - self.outputs
            gamma = np.zeros(len(steps))
            if steps:
                changes = np.stack([change.ravel() for _, change in steps], 1)
                gamma = np.linalg.lstsq(changes, left.ravel(), rcond=1e-6)[0]
            rest = left - sum(g * change for g, (_, change) in zip(gamma, steps, strict=True))
            solved = KernelFlow(
                flow.gram.cross.kernel, self.x, rest, ridge=damping, gram=flow.gram, progress=False
            )
            combined = solved.solution().coefficients
            combined = combined + sum(g * c for g, (c, _) in zip(gamma, steps, strict=True))
            self.step(combined, self.targets, damping)
            if self.residual < best[0]:
                steps = [*steps, (combined, self.outputs - before)][-WINDOW:]
                best, damping = self._kept(), max(damping / 3, first)
                continue
            damping, steps = 10 * damping, []
            self._return_to(best)
            if damping > MOST_DAMPING * first:
                break

    def result(self) -> tuple[dict[str, Any], SolveReport]:
        seconds = clock.perf_counter() - self._start
        if not np.isfinite(self.residual):
            raise Diverged(
                "solve: the outputs are not finite; give a shorter time or a ridge", self.history
            )
        report = SolveReport(
            self.converged, self.residual, len(self.history), seconds, self.history
        )
        if not self.converged:
            log.warning(
                "solve: residual %.2g after %d iterations, tolerance %.2g",
                self.residual,
                report.iterations,
                self.tolerance,
            )
        return {"params": self._state.params, **self._frozen}, report

    def _outputs(self) -> np.ndarray:
        found = self._predict(self._state.params, self._frozen, self.x)
        return np.asarray(found, np.float64)

    def _kept(self) -> tuple[float, Any, np.ndarray]:
        return self.residual, jax.tree.map(lambda p: p.copy(), self._state), self.outputs

    def _return_to(self, kept: tuple[float, Any, np.ndarray]) -> None:
        self.residual, state, self.outputs = kept
        self._state = jax.tree.map(lambda p: p.copy(), state)
