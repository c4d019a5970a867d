"""Training steps of `dnntk` and of baselines on one network and the same data: A B A B ....

Every network is trained by a worker, a process of its own (see `worker`). Before times are kept,
the workers' losses are compared over a few steps. The baselines start from the literal matrices,
which are written here. A turn takes as many steps as fill ``turn_seconds``, because the first step
after a pause includes the time in which threads wake up.
"""

import contextlib
import dataclasses
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking.measure import busy_cores
from benchmarking.worker import Worker, WorkerExited
from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, to_standard
from dnntk.data.datasets import load_dataset
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow
from dnntk.training import gradient_flow

__all__ = [
    *("Record", "Schedule", "Task", "compare", "compare_over_depth"),
    *("first_key", "model_of", "nbytes", "tolerance"),
]

SEED = 0
OWN = ("network", "ensemble", "two devices")
SCRIPT = {
    "network": "dnntk_worker.py",
    "ensemble": "dnntk_worker.py",
    "two devices": "dnntk_worker.py",
    "PyTorch loop": "torch_worker.py",
    "PyTorch loop, channels_last": "torch_worker.py",
    "lax.scan": "jax_worker.py",
    "unrolled": "jax_worker.py",
}
# Step size times lambda_max of the limit kernel; at 1, one step fits the top mode.
STEP_SIZE = 0.5
# The least length of a turn, as a multiple of the slowest worker's step: other workers' turns, if
# shorter, would measure only a moment of the machine.
SHORTEST_TURN = 0.05
# Seconds between turns, in which threads that spin for more work stop.
PAUSE = 0.05
# If more cores are busy, PyTorch's threads wait for each other: steps took up to a hundred times
# as long.
BUSY = 0.25
Job = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and its data, which all workers train.

    ``shape`` is one input's shape: (2,) gives points on the quarter circle with target x1 x2, any
    other shape random pixels in [0, 1), a fraction ``zeros`` of which is 0, with random classes. A
    ``dataset`` gives its first training images and their classes, from ``data_dir``.
    """

    arch: str
    depth: int
    d_out: int
    shape: tuple[int, ...]
    examples: int
    scale: float
    zeros: float = 0.0
    dataset: str | None = None
    data_dir: str | None = None


@dataclasses.dataclass
class Record:
    """A worker's measurements, or the reason why there are none (``missing``)."""

    name: str
    missing: str | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    difference: float = 0.0
    warm_seconds: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    step_bytes: int = 0
    idle_cpu_seconds: float = 0.0
    busy_cores: float | None = None

    @property
    def beyond_bytes(self) -> int:
        """Peak memory of the steps, beyond a gradient and the memory before the first step."""
        return self.step_bytes - self.facts["ready_bytes"] - self.facts["gradient_bytes"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many turns the workers take, and how long.

    Attributes:
        turns: turns of every worker after the warm-up, at least.
        turn_seconds: time that a turn's steps should fill.
        checked_steps: steps of the warm-up, whose losses are compared.
        seconds_allowed: most time for a baseline's preparation and compilation, and for a turn.
        seconds: least time of all turns together; more turns are taken until it has passed.
        compiles: compilations, of which the fastest is reported.
    """

    turns: int
    turn_seconds: float
    checked_steps: int
    seconds_allowed: float
    seconds: float = 0.0
    compiles: int = 1


def compare(
    task: Task, names: list[str], schedule: Schedule, folder: Path, trials: int = 1
) -> dict[str, Record]:
    """Let the workers called ``names`` train, the first of them `dnntk`'s; a record for each.

    Raises:
        RuntimeError: losses differ by more than `tolerance`, or one of `dnntk`'s workers exited.
    """
    records = {name: Record(name) for name in names}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        baselines = [name for name in names if name not in OWN and _installed(records[name])]
        job = _write(task, Path(place), literal=bool(baselines)) | {"trials": trials}
        jobs = {name: job | {"worker": name} for name in names if not records[name].missing}
        _run(records, jobs, schedule, lambda compared: _check(task, compared))
    return records


def compare_over_depth(tasks: list[Task], schedule: Schedule, folder: Path) -> list[Record]:
    """Let `dnntk` train networks of several depths in turns; a record for each.

    In turns, a slow phase of a shared machine slows all depths down.
    """
    records = {f"depth {task.depth}": Record("network") for task in tasks}
    with contextlib.ExitStack() as stack:
        jobs = {}
        for name, task in zip(records, tasks, strict=True):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            jobs[name] = _write(task, place, literal=False) | {"worker": "network"}
        _run(records, jobs, schedule, lambda compared: None)
    return list(records.values())


def _run(
    records: dict[str, Record],
    jobs: dict[str, Job],
    schedule: Schedule,
    check: Callable[[list[Record]], None],
) -> None:
    """Fill the records of the workers with ``jobs``; ``check`` the losses of the warm-up."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Worker] = {}
        for name, job in jobs.items():
            with _tolerated(name, records):
                kind, job = job["worker"], job | {"compiles": schedule.compiles}
                allowed = math.inf if kind in OWN else schedule.seconds_allowed
                worker = contextlib.closing(Worker(SCRIPT[kind], job, allowed))
                running[name] = stack.enter_context(worker)
                records[name].facts = running[name].facts

        def turn(steps: dict[str, int], checking: bool) -> None:
            for name in list(running):
                time.sleep(PAUSE)
                with _tolerated(name, records, running):
                    _take(running[name], steps[name], records[name], checking)

        for _ in range(schedule.checked_steps):
            turn(dict.fromkeys(running, 1), checking=True)
        check([records[name] for name in running])
        busy = busy_cores(0.3)
        if busy and busy > BUSY:
            print(f"other work on {busy:.1f} cores: PyTorch suffers most from that", flush=True)
        for name in running:
            records[name].busy_cores = busy
        warm = {name: records[name].warm_seconds for name in running}
        steps = {name: max(1, round(schedule.turn_seconds / warm[name])) for name in running}
        if max(steps.values()) > 1:
            # The time of a single step is mostly its call: one more turn, whose time is not kept,
            # measures how many steps fill a turn.
            turn(steps, checking=False)
            step = {name: records[name].seconds.pop() for name in running}
            filled = max(schedule.turn_seconds, SHORTEST_TURN * max(step.values()))
            steps = {name: max(1, round(filled / step[name])) for name in running}
        begun, turns = time.monotonic(), 0
        while turns < schedule.turns or time.monotonic() - begun < schedule.seconds:
            turn(steps, checking=False)
            turns += 1


def tolerance(task: Task) -> float:
    """The largest difference between two workers' losses, relative to the first loss.

    Every literal layer rounds numbers of size C, in the worst case always in one direction.
    """
    return 1e-4 + 2 * float(np.finfo(np.float32).eps) * task.scale * task.depth


def model_of(job: Job) -> DeepNarrow:
    """The network of a job, which holds the fields of its `Task`."""
    kind = DeepNarrowCNN if job["arch"] == "cnn" else DeepNarrowMLP
    return kind(job["depth"], job["d_out"], job["scale"])


def first_key() -> jax.Array:
    """The key of an ensemble's first network."""
    return jax.random.fold_in(jax.random.key(SEED), 0)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, each counted once."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _take(running: Worker, steps: int, record: Record, checking: bool) -> None:
    answer = running.take(steps)
    if checking:
        record.losses.append(answer["loss"])
        record.warm_seconds = answer["seconds"]
    else:
        record.seconds.append(answer["seconds"] / steps)
        # Processor time that an idle worker uses is lost for the others.
        record.idle_cpu_seconds = max(record.idle_cpu_seconds, answer["idle_cpu_seconds"])
    record.peak_bytes, record.step_bytes = answer["peak_bytes"], answer["step_bytes"]


@contextlib.contextmanager
def _tolerated(
    name: str, records: dict[str, Record], running: dict[str, Worker] | None = None
) -> Iterator[None]:
    """Record a baseline's `WorkerExited` and stop its worker; raise that of `dnntk`'s workers."""
    try:
        yield
    except WorkerExited as exited:
        record = records[name]
        if record.name in OWN:
            raise RuntimeError(f"{name}: {exited}") from None
        record.missing = f"{name}: {exited}"
        if running:
            running.pop(name).close()


def _installed(record: Record) -> bool:
    if SCRIPT[record.name] == "torch_worker.py" and importlib.util.find_spec("torch") is None:
        record.missing = f"{record.name}: PyTorch is not installed (extra bench)"
    return record.missing is None


def _check(task: Task, records: list[Record]) -> None:
    """Compare the losses with the first worker's, and check that training lowered them."""
    own = np.array(records[0].losses)
    if len(own) > 1 and not own[-1] < own[0]:
        raise RuntimeError(f"{task}: the loss did not fall in {len(own)} steps: {own}")
    for record in records[1:]:
        record.difference = float(np.abs(np.array(record.losses) - own).max() / own[0])
        if not record.difference <= tolerance(task):
            raise RuntimeError(
                f"{task}: losses of {records[0].name} and {record.name} differ by "
                f"{record.difference:.1e} of the first one, expected {tolerance(task):.1e}"
            )


def _write(task: Task, folder: Path, literal: bool) -> Job:
    """Write data and ``literal`` matrices into ``folder``; return the job, without a worker."""
    x, y = _data(task)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    gram = np.asarray(limit_ntk(x, d_out=task.d_out), np.float64)
    time_step = STEP_SIZE / (np.linalg.eigvalsh(gram)[-1] / len(x))
    job: Job = dataclasses.asdict(task) | {"folder": str(folder.absolute())}
    model = model_of(job)
    if literal:
        variables = jax.jit(model.init)(first_key(), jnp.asarray(x[:1]))
        for name, layer in to_standard(model, variables)[1]["params"].items():
            for part, values in layer.items():
                np.save(folder / f"{name}_{part}.npy", np.ascontiguousarray(values))
    rate = gradient_flow.learning_rate(model.clone(parametrization="standard"), time_step)
    return job | {
        "time_step": time_step,
        "literal_rate": rate,
        "platform": jax.default_backend(),
    }


def _data(task: Task) -> tuple[np.ndarray, np.ndarray]:
    if task.shape == (2,):
        angles = np.linspace(0, np.pi / 2, task.examples + 20)[10:-10]
        x = np.stack([np.cos(angles), np.sin(angles)], 1)
        y = x[:, :1] * x[:, 1:]
    elif task.dataset:
        data = load_dataset(task.dataset, classes="all", data_dir=task.data_dir)
        if len(data.x_train) < task.examples:
            raise InputError(
                f"--batch={task.examples}: expected at most {len(data.x_train)}, the training "
                f"images of {task.dataset}, got {task.examples}; choose fewer"
            )
        x = data.x_train[: task.examples].reshape(task.examples, *task.shape)
        y = data.y_train[: task.examples]
    else:
        generator = np.random.default_rng(SEED)
        x = generator.random((task.examples, *task.shape))
        if task.zeros > 0:
            x *= generator.random(x.shape) >= task.zeros
        classes = generator.integers(0, max(2, task.d_out), task.examples)
        y = classes[:, None] == np.arange(task.d_out)
        y = classes[:, None] if task.d_out == 1 else y
    return x.astype(np.float32), y.astype(np.float32)
