"""What a training run will take, told before it begins: parameters, memory, arithmetic, time.

Time is that of the same work, on this device and this data, of two shallower networks: a step takes
a + b depth, and b is what counts. Memory is what the compiler says that the whole step, and the
choice of its size, need, what the CPU library and a checkpoint's writing keep beside it, and
what this process holds already.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dnntk import figures
from dnntk.data.datasets import Dataset
from dnntk.data.own_data import own_dataset
from dnntk.errors import InputError
from dnntk.native.blocks import THREAD_STATE_BYTES
from dnntk.networks.initializers import layer_shapes
from dnntk.networks.models import DeepNarrow
from dnntk.runs.checkpoints import Checkpoints, memory_to_write
from dnntk.runs.folder import resident_bytes
from dnntk.runtime import processes
from dnntk.training import gradient_flow, pipeline, placement
from dnntk.training.config import (
    DEFAULT_STEPS,
    EVALUATED_ON_THE_WAY,
    EVALUATIONS,
    TrainConfig,
    checkpoint_interval,
    evaluation_steps,
)
from dnntk.training.engine import engine_for
from dnntk.training.evaluation import as_trained
from dnntk.training.optimizers import optimizer_of
from dnntk.training.plan import Job
from dnntk.training.run import check_compiles, load_dataset_for
from dnntk.training.step_size import Eigenvalue, kernel_product, largest_eigenvalue

# A step of the deeper of the two networks takes at least so long, if the run's own does.
CALIBRATION_SECONDS = 0.3
# At least and at most, and for so long in between.
STEPS_TIMED, MOST_STEPS_TIMED = 3, 40
SECONDS_TIMED = 0.2


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A run that has not begun.

    Attributes:
        parameters: how many are trained.
        memory_bytes: resident at the peak, on all devices together.
        step_bytes: of these what the step takes on one device, arguments included.
        step_operations: floating-point operations of a step, recomputation included.
        step_seconds: of a training step.
        steps: how many there will be.
        total_seconds: of all that `dnntk.train` does with a workdir: data, initialization, choice
            of the step, compilation, steps, evaluations, checkpoints and pictures.
        calibrated_at: depths of the two networks that were timed.
        device: what they were timed on.
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

    def __str__(self) -> str:
        """Some lines to read."""
        rate = self.step_operations / self.step_seconds / 1e9
        whole = _duration(self.total_seconds)
        each = f"{self.step_bytes / 1e9:.2f} GB for the step"
        return "\n".join(
            (
                f"parameters:  {self.parameters:,}",
                f"memory:      {self.memory_bytes / 1e9:.2f} GB at the peak; on each device {each}",
                f"arithmetic:  {self.step_operations / 1e9:.4g} Gflop a step ({rate:.3g} Gflop/s)",
                f"time:        {self.step_seconds:.3g} s a step; {whole} for "
                f"{self.steps:,} steps, their evaluations and checkpoints",
                "calibrated:  on depths {:,} and {:,}, {}".format(*self.calibrated_at, self.device),
            )
        )


def forecast(config: TrainConfig, *, dataset: Dataset | None = None) -> Forecast:
    """Time two shallower networks on the run's own data, and go on from there.

    Args:
        config: the run.
        dataset: examples of your own, instead of those that ``config`` names.

    Returns:
        What `dnntk.train` will take on this machine while nothing else runs on it.

    Raises:
        InputError: the data cannot be used, the network's kernel sets no step, the run's mesh wants
            more devices than are here, or several processes ask together.
    """
    return forecast_on(config, None if dataset is None else own_dataset(dataset, config))


def forecast_on(config: TrainConfig, dataset: Dataset | None) -> Forecast:
    """`forecast` on what `load_dataset_for` has loaded for ``config`` before; None loads it."""
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
        examples = len(data.x_train)
        self.batch_size = min(config.batch_size or examples, examples)
        self.job = Job(config, config.model(data.y_train.shape[1]), examples, self.batch_size)
        self.model = self.job.model
        self.x = data.x_train[: self.batch_size]
        self.stages = pipeline.parse_mesh(config.mesh)[pipeline.DEPTH]
        self.itemsize = jnp.dtype(config.dtype).itemsize

    def forecast(self) -> Forecast:
        first, second = self._timed()
        took = _Timed.at(self.model.depth, first, second)
        plan = self.job.planned(lambda: second.eigenvalue)
        step_bytes, settling_bytes = self._step_bytes(), 0
        settling = 0.0
        if self.job.chooses_step:
            settling = took.compiling + second.eigenvalue.iterations * took.product
            settling_bytes = self._settling_bytes()
        state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self._state()))
        looks = sum(self._batches_a_look(plan.steps)) * took.evaluation
        checkpoints = math.ceil(plan.steps / checkpoint_interval(self.config, plan.steps))
        total = (
            self.reading
            + took.initialization
            + settling
            + 2 * took.compiling  # the step and the evaluation
            + plan.steps * took.step
            + looks
            + checkpoints * took.checkpoint
            + self.drawing
        )
        return Forecast(
            parameters=self._parameters(),
            memory_bytes=self.held + max(step_bytes + memory_to_write(state), settling_bytes),
            step_bytes=step_bytes // self._mesh(self.model).size,
            step_operations=self._operations(),
            step_seconds=took.step,
            steps=plan.steps,
            total_seconds=total,
            calibrated_at=(first.depth, second.depth),
            device=f"{self._mesh(self.model).size} x {jax.devices()[0].device_kind}",
        )

    def _timed(self) -> tuple["_Timed", "_Timed"]:
        """Two depths, the second large enough for its time to tell."""
        depth = self.model.depth
        second = self._time(self._near(64))
        begun = time.perf_counter()
        _draw_once()
        self.drawing = time.perf_counter() - begun
        # What a process holds that has compiled and written everything once, as the run will.
        self.held = resident_bytes()
        while second.depth < depth and second.step < CALIBRATION_SECONDS:
            factor = min(16.0, 1.5 * CALIBRATION_SECONDS / second.step)
            second = self._time(self._near(math.ceil(second.depth * max(2.0, factor))))
        first = second if second.depth == depth else self._time(self._near(second.depth // 4))
        return first, second

    def _near(self, depth: int) -> int:
        """A depth that splits into stages as the run's does, at least 4 and at most the run's."""
        layers = max(depth, 4) - 2
        return min(self.model.depth, -(-layers // self.stages) * self.stages + 2)

    def _mesh(self, model: DeepNarrow) -> Mesh:
        if self.config.mesh:
            return pipeline.make_mesh(self.config.mesh)
        params = jax.eval_shape(model.init, jax.random.key(0), self.x[:1])["params"]
        # As the run's own network would be placed, however shallow this one is.
        threaded = engine_for(model, params, self.x).threaded
        size = self._parameters() * self.itemsize
        return placement.data_mesh(self.batch_size, size, threaded)

    def _time(self, depth: int) -> "_Timed":
        scale = self.config.scale_or_default
        model = self.model.clone(depth=depth, scale=scale)
        # Recomputes as the deep network does.
        return self._time_model(model, int(THREAD_STATE_BYTES * depth / self.model.depth))

    def _time_model(self, model: DeepNarrow, state_bytes: int) -> "_Timed":
        mesh = self._mesh(model)
        begun = time.perf_counter()
        variables = jax.jit(model.init)(jax.random.key(self.config.seed), self.x[:1])
        jax.block_until_ready(variables)
        initialization = time.perf_counter() - begun
        begun, found = time.perf_counter(), Eigenvalue(1.0, True, 0)
        if self.job.chooses_step:
            found = largest_eigenvalue(model, variables, self.x, mesh, state_bytes=state_bytes)
        eigenvalue_seconds = time.perf_counter() - begun
        optimizer = optimizer_of(self.config, 1e-3 / max(found.value, 1e-30), DEFAULT_STEPS)
        frozen = {name: tree for name, tree in variables.items() if name != "params"}
        params, frozen = placement.put_state((variables["params"], frozen), mesh)
        opt_state = placement.put_state(optimizer.init(variables["params"]), mesh)
        state = gradient_flow.TrainState(params, opt_state)
        batch = placement.put_batch(self.x, self.data.y_train[: self.batch_size], mesh)
        begun = time.perf_counter()
        step = gradient_flow.make_step(model, optimizer, mesh, state_bytes)
        step = step.lower(state, frozen, batch).compile()
        compiling = time.perf_counter() - begun
        state, _ = step(state, frozen, batch)
        predict = gradient_flow.make_predict(model, mesh, state_bytes)
        predict(state.params, frozen, self.x, self.batch_size)
        seconds: list[float] = []
        looks: list[float] = []
        # As in the run, where a step that follows an evaluation finds nothing in the caches.
        spacing = max(1, (self.config.steps or DEFAULT_STEPS) // EVALUATIONS)
        while len(seconds) < STEPS_TIMED or (
            sum(seconds) < SECONDS_TIMED and len(seconds) < MOST_STEPS_TIMED
        ):
            if len(seconds) % spacing == 0:
                begun = time.perf_counter()
                predict(state.params, frozen, self.x, self.batch_size)
                looks.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            state, loss = step(state, frozen, batch)
            loss.block_until_ready()
            seconds.append(time.perf_counter() - begun)
        return _Timed(
            depth=model.depth,
            step=float(np.mean(seconds)),
            evaluation=float(np.mean(looks)),
            product=max(eigenvalue_seconds - compiling, 0.0) / max(found.iterations, 1),
            compiling=compiling,
            initialization=initialization,
            checkpoint=_checkpoint_seconds({"state": state._asdict(), "frozen": frozen}),
            eigenvalue=found,
        )

    def _parameters(self) -> int:
        shapes = self._shapes()
        biases = self.model.depth * shapes["last"][-2] - shapes["last"][-2] + self.model.d_out
        return sum(math.prod(shape) for shape in shapes.values()) + biases

    def _shapes(self) -> dict[str, tuple]:
        side = getattr(self.model, "kernel_size", 1)
        window = (side, side) if self.config.arch == "cnn" else ()
        return layer_shapes(self.model.depth, self.x.shape[-1], self.model.d_out, window)

    def _operations(self) -> float:
        """Two for every weight, position and example, up once and down twice."""
        positions = math.prod(self.x.shape[1:-1]) / getattr(self.model, "pool", 1) ** 2
        products = sum(math.prod(shape) for shape in self._shapes().values())
        params = jax.eval_shape(self.model.init, jax.random.key(0), self.x[:1])["params"]
        engine = engine_for(self.model, params, self.x)
        ways = 3 + (engine.recomputed(self.x) if self.stages == 1 else 1.0)
        gradients = 2 if self.config.sam_radius else 1
        return 2 * gradients * ways * products * positions * self.batch_size

    def _state(self) -> tuple[gradient_flow.TrainState, Any]:
        """Shapes of all that a checkpoint holds: what is trained, and what is not."""
        optimizer = optimizer_of(self.config, 1e-3, DEFAULT_STEPS)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), self.x[:1])
        params = variables["params"]
        frozen = {name: tree for name, tree in variables.items() if name != "params"}
        return gradient_flow.TrainState(params, jax.eval_shape(optimizer.init, params)), frozen

    def _step_bytes(self) -> int:
        """On all devices, from the whole step, compiled for arrays that are not there."""
        mesh = self._mesh(self.model)
        state, frozen = self._state()
        batch = placement.put_batch(self.x, self.data.y_train[: self.batch_size], mesh)
        step = gradient_flow.make_step(
            self.model, optimizer_of(self.config, 1e-3, DEFAULT_STEPS), mesh
        )
        need = step.lower(state, frozen, batch).compile()
        return gradient_flow.step_bytes(need, self.model, state.params, self.x, mesh)

    def _settling_bytes(self) -> int:
        """The same of a turn of the power iteration, which holds a whole gradient."""
        mesh = self._mesh(self.model)
        state, frozen = self._state()
        batch = placement.put_batch(self.x, self.data.y_train[: self.batch_size], mesh)
        product = kernel_product(self.model, state.params, frozen, mesh)
        need = product.lower(state.params, frozen, *batch).compile()
        return gradient_flow.step_bytes(need, self.model, state.params, self.x, mesh)

    def _batches_a_look(self, steps: int) -> Iterator[int]:
        """Batches that each evaluation of the run goes through."""
        sizes = len(self.data.x_train), len(self.data.x_test)
        for step in evaluation_steps(self.config, steps):
            limit = self.config.eval_examples or (
                math.inf if step == steps else EVALUATED_ON_THE_WAY
            )
            yield sum(math.ceil(min(limit, size) / self.batch_size) for size in sizes)


@dataclasses.dataclass(frozen=True)
class _Timed:
    """Seconds of one depth: each of a step, a product with the kernel, a compilation, ..."""

    depth: int
    step: float
    evaluation: float
    product: float
    compiling: float
    initialization: float
    checkpoint: float
    eigenvalue: Eigenvalue

    @classmethod
    def at(cls, depth: int, first: "_Timed", second: "_Timed") -> "_Timed":
        """What grows with depth on the line through two; the rest is the deeper one's."""
        if first.depth == second.depth:
            return second
        far = (depth - second.depth) / (second.depth - first.depth)
        line = {
            name: getattr(second, name)
            + far * max(getattr(second, name) - getattr(first, name), 0.0)
            for name in ("step", "evaluation", "product", "initialization", "checkpoint")
        }
        return dataclasses.replace(second, depth=depth, **line)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _checkpoint_seconds(tree: Any) -> float:
    """Of writing a checkpoint, the first one of a folder apart; the mean of two."""
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
    """Make a picture: what a run loads for that stays in its memory."""
    scores = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    look = dict.fromkeys(("time", *scores), 1.0)
    history = [{"step": step, **look} for step in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        figures.draw(Path(folder, "loss"), figures.loss_figure, history, "")
