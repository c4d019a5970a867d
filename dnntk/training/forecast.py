"""Forecast of a training run before it begins: parameters, memory, arithmetic, time.

Two shallower networks are timed on this device and this data; times grow linearly with depth.
Memory is the compiler's for the step and for the power iteration that chooses its size, the CPU
library's, that of writing a checkpoint, and what this process holds already.
"""

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from dnntk import figures
from dnntk.data.datasets import Dataset
from dnntk.data.own_data import own_dataset
from dnntk.errors import InputError
from dnntk.infinite_depth.cost import EIGH_MATRICES
from dnntk.infinite_depth.feature_gram import Choice, choose
from dnntk.infinite_depth.solvers import MAX_EIGH_ROWS
from dnntk.native.blocks import THREAD_STATE_BYTES
from dnntk.networks.initializers import layer_shapes
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runs.checkpoints import Checkpoints, memory_to_write
from dnntk.runs.folder import resident_bytes
from dnntk.runtime import processes
from dnntk.runtime.progress import duration
from dnntk.training import gradient_flow, pipeline, placement
from dnntk.training.config import (
    DEFAULT_STEPS,
    EVALUATIONS,
    TrainConfig,
)
from dnntk.training.engine import engine_for
from dnntk.training.evaluation import as_trained
from dnntk.training.optimizers import optimizer_of
from dnntk.training.plan import (
    Planner,
    checkpoint_interval,
    evaluated_examples,
    evaluation_steps,
)
from dnntk.training.run import check_compiles, load_dataset_for
from dnntk.training.step_size import Eigenvalue, kernel_product, largest_eigenvalue

__all__ = ["Forecast", "forecast", "forecast_on"]

# Least duration of a step of the deeper timed network, unless it is as deep as the run's own.
CALIBRATION_SECONDS = 0.3
# Steps are timed for this long, but at least and at most this many.
SECONDS_TIMED = 0.2
STEPS_TIMED, MOST_STEPS_TIMED = 3, 40
KERNEL_PASSES = 2  # of a run in closed form, at large C
IN_CLOSED_FORM = "gradient passes, as at large C, with the kernel and all else"
KERNEL_ROWS, EIGH_ROWS = 256, 512  # examples of a timed kernel, rows of a timed matrix


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        parameters: number of trained parameters.
        memory_bytes: peak of the resident memory, of all devices together.
        step_bytes: memory of a step on one device, its arguments included.
        step_operations: floating-point operations of a step, recomputation included.
        step_seconds: duration of a training step.
        steps: number of steps.
        total_seconds: duration of `dnntk.train` with a workdir: data, initialization, choice of the
            step, compilation, steps, evaluations, checkpoints and pictures.
        calibrated_at: depths of the two networks that were timed.
        device: devices that they were timed on.
        counted: what ``total_seconds`` is the time of, after the number of steps.
    """

    parameters: int
    memory_bytes: int
    step_bytes: int
    step_operations: float
    step_seconds: float
    steps: int
    total_seconds: float
    calibrated_at: tuple[int, int]
    device: str
    counted: str = "steps, their evaluations and checkpoints"

    def __str__(self) -> str:
        """The forecast in five lines."""
        rate = self.step_operations / self.step_seconds / 1e9
        return (
            f"parameters:  {self.parameters:,}\n"
            f"memory:      {self.memory_bytes / 1e9:.2f} GB at the peak; on each device "
            f"{self.step_bytes / 1e9:.2f} GB for the step\n"
            f"arithmetic:  {self.step_operations / 1e9:.4g} Gflop a step ({rate:.3g} Gflop/s)\n"
            f"time:        {self.step_seconds:.3g} s a step; {duration(self.total_seconds)} for "
            f"{self.steps:,} {self.counted}\n"
            "calibrated:  on depths {:,} and {:,}, {}".format(*self.calibrated_at, self.device)
        )


def forecast(config: TrainConfig, *, dataset: Dataset | None = None) -> Forecast:
    """Time two shallower networks on the run's data, and extrapolate to its depth.

    Args:
        config: the run.
        dataset: examples of your own, instead of those that ``config`` names.

    Returns:
        What `dnntk.train` will take on this machine while nothing else runs on it.

    Raises:
        InputError: the data cannot be used, the network's kernel sets no step, the run's mesh needs
            more devices than there are, or this is one of several processes.
    """
    return forecast_on(config, None if dataset is None else own_dataset(dataset, config))


def forecast_on(config: TrainConfig, dataset: Dataset | None) -> Forecast:
    """`forecast` on the dataset that `load_dataset_for` loads for ``config``; None loads it."""
    if processes.is_multiprocess():
        raise InputError(
            "dry run: expected one process, which may have several devices, got "
            f"{jax.process_count()}; ask without the flags or variables that join processes"
        )
    check_compiles()
    with jax.enable_x64(config.dtype == "float64"):
        begun = time.perf_counter()
        data = load_dataset_for(config) if dataset is None else dataset
        arrays = as_trained(data, config.arch == "mlp", config.dtype)
        reading = time.perf_counter() - begun
        return _Calibration(config, dataclasses.replace(data, **arrays), reading).forecast()


class _Calibration:
    def __init__(self, config: TrainConfig, data: Dataset, reading: float) -> None:
        self.config, self.data, self.reading = config, data, reading
        self.model = config.model(data.y_train.shape[1])
        self.planner = Planner(config, self.model, len(data.x_train))
        self.batch_size = self.planner.batch_size
        self.x = data.x_train[: self.batch_size]
        self.shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.x[:1])
        self.mesh = self.planner.mesh(self.shapes["params"], self.x)
        self.batch = placement.put_batch(self.x, data.y_train[: self.batch_size], self.mesh)

    def forecast(self) -> Forecast:
        first, second = self._timed_pair()
        times = _Times.at(self.model.depth, first, second)
        plan = self.planner.plan(lambda: second.eigenvalue)
        if self.config.optimizer == "kernel":
            plan = dataclasses.replace(plan, steps=KERNEL_PASSES)
        total = (
            self.reading
            + times.initialization
            + 2 * times.compiling  # the step and the evaluation
            + plan.steps * times.step
            + self._evaluation_batches(plan.steps) * times.evaluation
            + math.ceil(plan.steps / checkpoint_interval(self.config, plan.steps))
            * times.checkpoint
            + self.drawing
        )
        if self.planner.chooses_step:
            total += times.compiling + second.eigenvalue.iterations * times.product
        if self.config.optimizer == "kernel":
            choice, rows = self._kernel_choice()
            total += choice.operations / times.kernel_rate + _eigh_seconds(rows)
        step_bytes, peak_bytes = self._memory()
        return Forecast(
            parameters=sum(p.size for p in jax.tree.leaves(self.shapes["params"])),
            memory_bytes=self.held + peak_bytes,
            step_bytes=step_bytes // self.mesh.size,
            step_operations=self._operations(),
            step_seconds=times.step,
            steps=plan.steps,
            total_seconds=total,
            calibrated_at=(first.depth, second.depth),
            device=f"{self.mesh.size} x {jax.devices()[0].device_kind}",
            counted=IN_CLOSED_FORM if self.config.optimizer == "kernel" else Forecast.counted,
        )

    def _timed_pair(self) -> tuple["_Times", "_Times"]:
        """Times at two depths, the second so deep that a step takes `CALIBRATION_SECONDS`."""
        depth = self.model.depth
        second = self._time(self._near(64))
        begun = time.perf_counter()
        _draw_once()
        self.drawing = time.perf_counter() - begun
        # The memory of a process that has compiled and written everything once, as the run will.
        self.held = resident_bytes()
        while second.depth < depth and second.step < CALIBRATION_SECONDS:
            factor = min(16.0, 1.5 * CALIBRATION_SECONDS / second.step)
            second = self._time(self._near(math.ceil(second.depth * max(2.0, factor))))
        first = second if second.depth == depth else self._time(self._near(second.depth // 4))
        return first, second

    def _near(self, depth: int) -> int:
        """A depth that splits into stages as the run's does, at least 4 and at most the run's."""
        stages = pipeline.stages_of(self.mesh)
        layers = max(depth, 4) - 2
        return min(self.model.depth, -(-layers // stages) * stages + 2)

    def _time(self, depth: int) -> "_Times":
        model = self.model.clone(depth=depth, scale=self.config.scale_or_default)
        # Memory for states in proportion to the depth: the network recomputes as the run's does.
        state_bytes = int(THREAD_STATE_BYTES * depth / self.model.depth)
        begun = time.perf_counter()
        variables = jax.jit(model.init)(jax.random.key(self.config.seed), self.x[:1])
        jax.block_until_ready(variables)
        initialization = time.perf_counter() - begun
        begun, found = time.perf_counter(), Eigenvalue(1.0, True, 0)
        if self.planner.chooses_step:
            found = largest_eigenvalue(model, variables, self.x, self.mesh, state_bytes=state_bytes)
        iterating = time.perf_counter() - begun
        optimizer = optimizer_of(self.config, 1e-3 / max(found.value, 1e-30), DEFAULT_STEPS)
        opt_state = placement.put_state(optimizer.init(variables["params"]), self.mesh)
        frozen, params = placement.put_state(flax.core.pop(variables, "params"), self.mesh)
        state = gradient_flow.TrainState(params, opt_state)
        begun = time.perf_counter()
        make = gradient_flow.make_step(model, optimizer, self.mesh, state_bytes, self.config.loss)
        compiled = make.lower(state, frozen, self.batch).compile()
        compiling = time.perf_counter() - begun
        predict = gradient_flow.make_predict(model, self.mesh, state_bytes)
        step = lambda state: compiled(state, frozen, self.batch)  # noqa: E731
        evaluate = lambda state: predict(state.params, frozen, self.x, self.batch_size)  # noqa: E731
        state, step_seconds, evaluation_seconds = self._step_seconds(step, evaluate, state)
        return _Times(
            depth=depth,
            step=step_seconds,
            evaluation=evaluation_seconds,
            product=max(iterating - compiling, 0.0) / max(found.iterations, 1),
            compiling=compiling,
            initialization=initialization,
            checkpoint=_checkpoint_seconds({"state": state._asdict(), "frozen": frozen}),
            eigenvalue=found,
            kernel_rate=self._kernel_rate(model, frozen),
        )

    def _kernel_choice(self) -> tuple[Choice, int]:
        """How a run in closed form solves its kernel, and the rows of what it diagonalizes."""
        shapes, zeros = self.shapes["initial"], lambda a: np.broadcast_to(a.dtype.type(0), a.shape)
        kernel = RandomFeatures(self.model, {"initial": jax.tree.map(zeros, shapes)})
        choice = choose(kernel, self.x.shape)
        rows = {"matrix": self.batch_size, "features": kernel.count(self.x.shape)}
        return choice, min(rows.get(choice.way, 0), MAX_EIGH_ROWS)

    def _kernel_rate(self, model: Any, frozen: Any) -> float:
        """Operations a second on the network's own kernel, which a run in closed form computes."""
        if self.config.optimizer != "kernel":
            return math.inf
        kernel, x = RandomFeatures(model, frozen), self.data.x_train[:KERNEL_ROWS]
        x = np.resize(x, (KERNEL_ROWS, *x.shape[1:])).astype(np.float64)
        operations = 2 * (KERNEL_ROWS**2 * kernel.count(x.shape) + kernel.operations(x.shape))
        seconds = []
        with jax.enable_x64(True):
            for _ in range(3):
                begun = time.perf_counter()
                kernel(x, x).block_until_ready()
                seconds.append(time.perf_counter() - begun)
        return operations / min(seconds[1:])

    def _step_seconds(self, step: Any, evaluate: Any, state: Any) -> tuple[Any, float, float]:
        """The state after some steps, and the mean seconds of a step and of an evaluation."""
        state, _ = step(state)
        evaluate(state)
        steps: list[float] = []
        evaluations: list[float] = []
        # As often as in the run: a step after an evaluation finds other arrays in the caches.
        spacing = max(1, (self.config.steps or DEFAULT_STEPS) // EVALUATIONS)
        while len(steps) < STEPS_TIMED or (
            sum(steps) < SECONDS_TIMED and len(steps) < MOST_STEPS_TIMED
        ):
            if len(steps) % spacing == 0:
                begun = time.perf_counter()
                evaluate(state)
                evaluations.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            state, loss = step(state)
            loss.block_until_ready()
            steps.append(time.perf_counter() - begun)
        return state, float(np.mean(steps)), float(np.mean(evaluations))

    def _operations(self) -> float:
        """Two for every weight, position and example, forward once and backward twice."""
        side = getattr(self.model, "kernel_size", 1)
        window = (side, side) if self.config.arch == "cnn" else ()
        sizes = self.model.depth, self.x.shape[-1], self.model.d_out
        shapes = layer_shapes(*sizes, window, self.model.random_units)
        products = sum(math.prod(shape) for shape in shapes.values())
        positions = math.prod(self.x.shape[1:-1]) / getattr(self.model, "pool", 1) ** 2
        engine = engine_for(self.model, self.shapes["params"], self.x)
        passes = 3 + (engine.recomputed(self.x) if pipeline.stages_of(self.mesh) == 1 else 1.0)
        gradients = 2 if self.config.sam_radius else 1
        return 2 * gradients * passes * products * positions * self.batch_size

    def _memory(self) -> tuple[int, int]:
        """Bytes of a step on all devices, and of the run at its peak; nothing is allocated.

        The peak is either writing a checkpoint beside the step, or the power iteration, which holds
        a whole gradient.
        """
        optimizer = optimizer_of(self.config, 1e-3, DEFAULT_STEPS)
        frozen, params = flax.core.pop(self.shapes, "params")
        state = gradient_flow.TrainState(params, jax.eval_shape(optimizer.init, params))

        def bytes_of(function: Any, *arguments: Any) -> int:
            compiled = function.lower(*arguments).compile()
            return gradient_flow.step_bytes(compiled, self.model, params, self.x, self.mesh)

        step = gradient_flow.make_step(self.model, optimizer, self.mesh, loss=self.config.loss)
        step_bytes = bytes_of(step, state, frozen, self.batch)
        kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((state, frozen)))
        peak_bytes = step_bytes + memory_to_write((state, frozen))
        if self.planner.chooses_step:
            product = kernel_product(self.model, params, frozen, self.mesh)
            peak_bytes = max(peak_bytes, bytes_of(product, params, frozen, *self.batch))
        if self.config.optimizer == "kernel":
            # The kernel, and what its eigendecomposition holds beside it.
            choice, rows = self._kernel_choice()
            tiles = 4 * self.batch_size**2 if choice.way == "matrix" else 0
            peak_bytes = max(peak_bytes, kept) + tiles + 8 * EIGH_MATRICES * rows**2
        return step_bytes, peak_bytes

    def _evaluation_batches(self, steps: int) -> int:
        """Batches that all evaluations of the run go through."""
        sizes, total = (len(self.data.x_train), len(self.data.x_test)), 0
        for step in evaluation_steps(self.config, steps):
            limit = evaluated_examples(self.config, step == steps) or math.inf
            total += sum(math.ceil(min(limit, size) / self.batch_size) for size in sizes)
        return total


@dataclasses.dataclass(frozen=True)
class _Times:
    """Seconds of a step, of a product with the kernel, of a compilation, ... at one depth."""

    depth: int
    step: float
    evaluation: float
    product: float
    compiling: float
    initialization: float
    checkpoint: float
    eigenvalue: Eigenvalue
    kernel_rate: float

    @classmethod
    def at(cls, depth: int, first: "_Times", second: "_Times") -> "_Times":
        """Times that grow with depth extrapolated linearly, the others as in ``second``."""
        if first.depth == second.depth:
            return second
        far = (depth - second.depth) / (second.depth - first.depth)
        grown = {
            name: getattr(second, name)
            + far * max(getattr(second, name) - getattr(first, name), 0.0)
            for name in ("step", "evaluation", "product", "initialization", "checkpoint")
        }
        return dataclasses.replace(second, depth=depth, **grown)


def _eigh_seconds(rows: int) -> float:
    """Seconds to diagonalize a matrix as a whole."""
    matrix = np.random.default_rng(0).normal(size=(EIGH_ROWS, EIGH_ROWS))
    begun = time.perf_counter()
    np.linalg.eigh(matrix)
    return (time.perf_counter() - begun) * (rows / EIGH_ROWS) ** 3


def _checkpoint_seconds(tree: Any) -> float:
    """Mean time of writing two checkpoints, after a first one, which takes longer."""
    seconds: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder, "checkpoints")) as checkpoints,
    ):
        for step in range(3):
            begun = time.perf_counter()
            checkpoints.save(step, tree)
            seconds.append(time.perf_counter() - begun)
    return float(np.mean(seconds[1:]))


def _draw_once() -> None:
    """Draw a figure: the libraries that this loads stay in memory."""
    scores = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"step": step, **dict.fromkeys(("time", *scores), 1.0)} for step in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        figures.draw(Path(folder, "loss"), figures.loss_figure, history, "")
