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
import functools
import logging
import math
import os
import time as clock
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from dnntk.checks import (
    all_finite,
    brief,
    check_count,
    host_examples,
    host_targets,
    not_negative,
    number_within,
)
from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.solvers import MAX_EIGH_ROWS
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.random_features import RandomFeatures
from dnntk.training import gradient_flow, placement
from dnntk.training.engine import engine_for
from dnntk.training.gradient_flow import TrainState

__all__ = ["KernelSolver", "SolveReport", "solve"]

TOLERANCE = 1e-4
FLOAT32_ERROR = 1e-8  # of the flow's outputs by tiles, relative to the targets and its time
WINDOW = 10  # steps that Anderson's method combines
MOST_DAMPING = 1e6  # times the first one, where the solver gives up
DAMPING_FACTOR = 3.0
# The residual of `STALL` iterations ago over the present one, below which the solver gives up.
STALL, LEAST_PROGRESS = 8, 1.5
# Parameters that are copied before a step, which may have to be taken back.
MOST_COPIED_BYTES = 1 << 31

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
            seconds since the start. A step that brings the outputs no nearer is taken back, and
            the next one is damped more; but parameters of more than `MOST_COPIED_BYTES` are kept
            as they are, and the solver ends.
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
    tolerance: float = TOLERANCE,
    max_iterations: int = 100,
    memory: float | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], SolveReport]:
    """The weights that gradient flow reaches at ``time``, without descending.

    Args:
        model: a ``deep_narrow`` network in the ntk form, of any depth and C.
        variables: its ``params`` and ``initial``; training starts at these ``params``. The kernel
            is that of ``initial``, from which trained ones differ at small C.
        x: [n, ...] training inputs.
        y: [n, d_out] targets, or [n] for one output.
        time: kernel time of gradient flow on 1/2 mean ||f - y||^2; may be infinite.
        ridge: weight decay, 1/2 mean ||f - y||^2 + ridge/2 ||D - D_0||^2.
        tolerance: of the report's residual.
        max_iterations: gradient passes at most.
        memory: bytes for the kernel, as `KernelFlow` takes them.
        progress: show bars for what takes longer than five seconds.

    Returns:
        (variables, report). At large C the first pass is the last. At small C, where the network
        is not linear, its outputs at the training examples become those of the linear one's flow.

    Raises:
        InputError: an argument is not as above; or the time is infinite, there is no ridge, and
            the kernel is singular.
    """
    begun = clock.perf_counter()
    kernel = RandomFeatures(model, variables)
    _check_numbers(time, ridge, tolerance, max_iterations)
    params, inputs, targets = _checked_problem(model, variables, x, y)
    bytes_held = sum(p.nbytes for p in jax.tree.leaves(params))
    mesh = placement.data_mesh(len(inputs), bytes_held, engine_for(model, params, inputs).threaded)
    frozen = placement.put_state({"initial": variables["initial"]}, mesh)
    # A step overwrites its state, so it starts from a copy of the caller's parameters.
    restart = lambda: _copied(placement.put_state(params, mesh))  # noqa: E731
    solver = KernelSolver(
        *(model, mesh, restart(), frozen, inputs, targets), restart=restart, tolerance=tolerance
    )
    start = solver.evaluate()
    flow = solver.flow_of(kernel, time, ridge, start, memory=memory, progress=progress)
    solver.prepare(flow, time, start)
    while solver.iterations < max_iterations and not solver.ended:
        solver.iterate(begun)
    if not solver.converged:
        solver.warn()
    return {"params": solver.state.params, **frozen}, SolveReport(
        *(solver.converged, solver.residual, solver.iterations),
        *(clock.perf_counter() - begun, solver.history),
    )


def _check_numbers(time: float, ridge: float, tolerance: float, max_iterations: int) -> None:
    number_within("time", time, lambda t: t >= 0, "a number >= 0, or infinity")
    not_negative("ridge", ridge)
    number_within("tolerance", tolerance, lambda t: 0 < t < 1, "a number between 0 and 1")
    check_count("max_iterations", max_iterations)


def _checked_problem(
    model: DeepNarrow, variables: Any, x: ArrayLike, y: ArrayLike
) -> tuple[Any, np.ndarray, np.ndarray]:
    """(parameters, inputs in their dtype, targets)."""
    params = _checked_parameters(variables)
    dtype = jax.tree.leaves(params)[0].dtype
    inputs = host_examples("x", x)
    targets = host_targets("y", y, len(inputs), examples="x")
    if targets.shape[1] != model.d_out:
        raise InputError(
            f"y: expected {model.d_out} outputs, as the network has, got {targets.shape[1]}"
        )
    for name, array in (("x", inputs), ("y", targets)):
        if (largest := float(np.abs(array).max())) > float(np.finfo(dtype).max):
            raise InputError(
                f"{name}: expected numbers within {dtype}, got {largest:.3g}; scale it to size 1"
            )
    return params, inputs.astype(dtype), targets


def _checked_parameters(variables: Any) -> Any:
    """The ``params`` of variables, which must hold finite numbers."""
    params = variables.get("params")
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(p, "dtype") for p in leaves):
        raise InputError(
            f"variables: expected the collection 'params', as model.init gives, got {brief(params)}"
        )
    for p in (*leaves, *jax.tree.leaves(variables["initial"])):
        if not all_finite(p):
            raise InputError("variables: expected finite numbers, got NaN or infinity")
    return params


def _kernel_dtype(rows: int, time: float, ridge: float, tolerance: float) -> str:
    """float32 for many rows, where it takes half the time, if the tolerance bears its rounding."""
    longest = min(time, 1 / ridge) if ridge else time
    return "float32" if rows > MAX_EIGH_ROWS and FLOAT32_ERROR * longest <= tolerance else "float64"


def _copied(tree: Any) -> Any:
    """Copies on the same devices; `jax.Array.copy` would be compiled for every shape."""
    return jax.tree.map(lambda p: jax.device_put(p, p.sharding, may_alias=False), tree)


def _optimizer(model: DeepNarrow) -> gradient_flow.PlainSGD:
    """Steps of kernel time 1."""
    return gradient_flow.sgd(gradient_flow.learning_rate(model, 1.0))


@functools.lru_cache(maxsize=8)
def _programs(model: DeepNarrow, mesh: Mesh) -> tuple[Any, Any]:
    """A step and a prediction, compiled once for all networks of a kind, as a search has."""
    step = gradient_flow.make_step(model, _optimizer(model), mesh)
    return step, gradient_flow.make_predict(model, mesh)


class KernelSolver:
    """A network between two iterations, and how far its outputs are from the flow's.

    Attributes:
        state: parameters, with the state of the optimizer that changes them.
        history: as in `SolveReport`.
        flow: gradient flow by the network's own kernel; `prepare` makes it.
    """

    def __init__(
        self,
        model: DeepNarrow,
        mesh: Mesh,
        params: Any,
        frozen: Any,
        x: np.ndarray,
        y: np.ndarray,
        *,
        restart: Callable[[], Any],
        tolerance: float = TOLERANCE,
    ) -> None:
        """Take ``params`` and ``frozen`` as `placement.put_state` lays them out on ``mesh``.

        A step overwrites ``params``; ``restart`` makes the first ones again.
        """
        self.tolerance = tolerance
        self.history: list[dict[str, float]] = []
        self._x, self._y, self._mesh, self._frozen = x, y, mesh, frozen
        self.state = TrainState(params, _optimizer(model).init(params))
        self._sgd_step, self._predict = _programs(model, mesh)
        # Coefficients of the last steps that were kept, and the change of the outputs by each.
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self._restart, self._failed = restart, False
        self.iterations, self._residuals = 0, list[float]()  # the last `STALL` + 1 of them
        self._level = 0  # the damping is the first one times `DAMPING_FACTOR` to this power

    def flow_of(
        self,
        kernel: RandomFeatures,
        time: float,
        ridge: float,
        start: np.ndarray | None = None,
        *,
        memory: float | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> KernelFlow:
        """Gradient flow by the network's own kernel, for times up to ``time``.

        ``start`` [n, d_out] are the first outputs, None is 0; the rest is as in `KernelFlow`.
        """
        return KernelFlow(
            kernel,
            self._x,
            self._y,
            ridge=ridge,
            initial=start,
            tolerance=self.tolerance / 10,
            memory=memory,
            dtype=_kernel_dtype(len(self._x), time, ridge, self.tolerance),
            folder=folder,
            progress=progress,
        )

    def prepare(self, flow: KernelFlow, time: float, start: np.ndarray | None = None) -> None:
        """Solve ``flow`` at ``time``, before the first iteration or after `take`."""
        self.flow = flow
        self._first = flow.solution(time).coefficients
        self._targets = flow.train_predictions(time)
        learnt = 1 / time if time else math.inf  # eigenvalues above this one are learnt
        self._least = max(flow.ridge, learnt, 1e-7 * float(flow.eigenvalues[-1]))
        self._size = float(np.linalg.norm(self._y - (0.0 if start is None else start))) or 1.0
        self._look(self.evaluate() if start is None else start)

    def evaluate(self) -> np.ndarray:
        """The network's outputs at the training examples, [n, d_out] float64."""
        found = self._predict(self.state.params, self._frozen, self._x)
        return np.asarray(found, np.float64)

    @property
    def converged(self) -> bool:
        """Are the outputs those of the flow, within the tolerance?"""
        return self.residual <= self.tolerance

    @property
    def ended(self) -> bool:
        """Is there nothing more to gain?"""
        before = self._residuals[-STALL - 1 : -1]
        stalled = len(before) == STALL and before[0] < LEAST_PROGRESS * self._residuals[-1]
        damped = DAMPING_FACTOR**self._level > MOST_DAMPING
        return self.converged or stalled or damped or self._failed

    def iterate(self, begun: float) -> None:
        """One gradient pass; ``begun`` is the `time.perf_counter` of the start."""
        first = self.iterations == 0
        damping = 0.0 if first else self._least * DAMPING_FACTOR**self._level
        before, found = self.outputs, self.residual
        take_back = self._way_back()
        coefficients = self._coefficients(damping).astype(self._x.dtype)
        aim = before.astype(self._x.dtype) + len(self._x) * coefficients
        batch = placement.put_batch(self._x, aim, self._mesh)
        self.state, _ = self._sgd_step(self.state, self._frozen, batch)
        self._look(self.evaluate())
        if self.residual < found:
            change = (self.outputs - before).astype(self._x.dtype)
            if not first:  # which is far longer than the others
                self._steps = [*self._steps, (coefficients, change)][-WINDOW:]
            self._level = max(self._level - 1, 0)
        elif take_back is None:
            self._failed = True
        else:
            self.state = self.state._replace(params=take_back())
            self._look(before)
            self._steps, self._level = [], self._level + 2
        loss = 0.5 * float(np.sum((self.outputs - self._y) ** 2)) / len(self._x)
        self.iterations += 1
        self._residuals = [*self._residuals, float(np.float32(self.residual))][-STALL - 1 :]
        made = (self.iterations, self.residual, loss, damping, clock.perf_counter() - begun)
        names = ("iteration", "residual", "loss", "damping", "seconds")
        self.history.append(dict(zip(names, made, strict=True)))
        log.info("solve: iteration %d: residual %.2g, loss %.4g, damping %.2g", *made[:4])

    def memory(self) -> dict[str, np.ndarray]:
        """What the next iterations depend on beside the parameters: arrays of fixed shapes."""
        count, shape, dtype = len(self._steps), (WINDOW, *self._y.shape), self._x.dtype
        held = np.zeros(shape, dtype), np.zeros(shape, dtype)
        for number, pair in enumerate(self._steps):
            for array, values in zip(held, pair, strict=True):
                array[number] = values
        residuals = np.zeros(STALL + 1, np.float32)
        residuals[: len(self._residuals)] = self._residuals
        numbers = np.array([count, self._level, self.iterations], np.int32)
        named = {"coefficients": held[0], "changes": held[1], "residuals": residuals}
        return {**named, "numbers": numbers}

    def take(self, state: TrainState, frozen: Any, memory: dict[str, np.ndarray]) -> None:
        """Go on from the state and the `memory` of another solver of the same problem."""
        self.state, self._frozen = state, frozen
        count, self._level, self.iterations = map(int, memory["numbers"])
        pairs = zip(memory["coefficients"][:count], memory["changes"][:count], strict=True)
        self._steps = list(pairs)
        self._residuals = memory["residuals"][: self.iterations].tolist()
        self.residual = self._residuals[-1] if self._residuals else math.inf

    def warn(self) -> None:
        """Log that the tolerance was not reached."""
        log.warning(
            "solve: residual %.2g after %d iterations, tolerance %.2g; a larger scale, a shorter "
            "time, a ridge or smaller targets may help",
            *(self.residual, self.iterations, self.tolerance),
        )

    def _way_back(self) -> Callable[[], Any] | None:
        """Makes the present parameters again, after a step from them; None if that is too much."""
        if self.iterations == 0:
            return self._restart
        params = self.state.params
        if sum(p.nbytes for p in jax.tree.leaves(params)) > MOST_COPIED_BYTES:
            return None
        copies = _copied(params)
        return lambda: copies

    def _look(self, outputs: np.ndarray) -> None:
        self.outputs = outputs
        self.residual = float(np.linalg.norm(self._targets - outputs)) / self._size

    def _coefficients(self, damping: float) -> np.ndarray:
        """The step's coefficients [n, d_out]: of the flow at first, then of Gauss-Newton.

        Anderson's method takes from the last steps what they bring, and the damped kernel from
        what then is left.
        """
        if self.iterations == 0:
            return self._first
        left = self._targets - self.outputs
        gamma = np.zeros(len(self._steps))
        if self._steps:
            changes = np.stack([change.ravel() for _, change in self._steps], 1)
            gamma = np.linalg.lstsq(changes.astype(np.float64), left.ravel(), rcond=1e-6)[0]
        pairs = list(zip(gamma, self._steps, strict=True))
        rest = left - sum(g * change for g, (_, change) in pairs)
        solved = self.flow.for_targets(rest, ridge=damping).solution().coefficients
        return solved + sum(g * coefficients for g, (coefficients, _) in pairs)
