"""Training steps of `dnntk` and its peers on one network and the same data, in turns A B A B ....

Every contestant is a process of its own (see `contestant`). Before any time is kept their losses
are compared over a few steps; the literal matrices, the peers' start, are written here. A turn is
as many steps as fill ``turn_seconds``: a short step is not to be measured by what waking up costs.
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
from contestant import Contestant, Gone
from measuring import busy_cores

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, to_standard
from dnntk.data.datasets import load_dataset
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow
from dnntk.training import gradient_flow

SEED = 0
OWN = ("network", "ensemble", "two devices")
SCRIPT = {
    "network": "dnntk_contestants.py",
    "ensemble": "dnntk_contestants.py",
    "two devices": "dnntk_contestants.py",
    "PyTorch loop": "torch_contestant.py",
    "PyTorch loop, channels_last": "torch_contestant.py",
    "lax.scan": "jax_contestants.py",
    "unrolled": "jax_contestants.py",
}
# Of 1 / lambda_max of the limit kernel, which would reach the top mode's target at once.
STEP_SIZE = 0.5
# A turn is not shorter than this share of the slowest contestant's step, beside which a moment
# would be all that is seen of the others.
SHARE = 0.05
# Threads that wait in a loop for more work have stopped by then.
PAUSE = 0.05
# Cores at other work, beside which PyTorch's threads wait for each other: a step has taken up to a
# hundred times as long.
BUSY = 0.25
Setting = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and its data: what all contestants of a race train.

    ``shape`` is that of one input: (2,) means points on the quarter circle with target x1 x2,
    anything else random pixels in [0, 1) with random classes. A share of ``zeros`` of the
    pixels is 0. With a ``dataset``, its first training images and their classes instead, from
    ``data_dir``.
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
    """What a contestant did, or why it did not (``missing``)."""

    name: str
    missing: str | None = None
    facts: Setting = dataclasses.field(default_factory=dict)
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
        """Peak memory of the steps, beyond a gradient and what was there before the first one."""
        return self.step_bytes - self.facts["ready_bytes"] - self.facts["gradient_bytes"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a race goes.

    Attributes:
        turns: of every contestant, after the warm-up; more where ``seconds`` have not passed yet.
        turn_seconds: what a turn's steps should fill.
        checked_steps: losses before these first steps are compared; they are the warm-up.
        seconds_allowed: for a peer's preparation, compilation included, and for each of its turns.
        seconds: for the turns of all, at least.
        compiles: compilations, the least of which is told.
    """

    turns: int
    turn_seconds: float
    checked_steps: int
    seconds_allowed: float
    seconds: float = 0.0
    compiles: int = 1


def race(
    task: Task, names: list[str], rules: Rules, folder: Path, trials: int = 1
) -> dict[str, Record]:
    """Let the contestants called ``names`` train, the first of them `dnntk`'s; a record each.

    Raises:
        RuntimeError: losses differ by more than `tolerance`, or one of `dnntk`'s own ended.
    """
    records = {name: Record(name) for name in names}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        peers = [name for name in names if name not in OWN and _installed(records[name])]
        job = _write(task, Path(place), literal=bool(peers)) | {"trials": trials}
        jobs = {name: job | {"contestant": name} for name in names if not records[name].missing}
        _run(records, jobs, rules, lambda running: _check(task, running))
    return records


def race_over_depth(tasks: list[Task], rules: Rules, folder: Path) -> list[Record]:
    """Let `dnntk`'s own networks of several depths train, in turns; a record each.

    What a shared machine does for a while, it then does to all of them.
    """
    records = {f"depth {task.depth}": Record("network") for task in tasks}
    with contextlib.ExitStack() as stack:
        jobs = {}
        for name, task in zip(records, tasks, strict=True):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            jobs[name] = _write(task, place, literal=False) | {"contestant": "network"}
        _run(records, jobs, rules, lambda running: None)
    return list(records.values())


def _run(
    records: dict[str, Record],
    jobs: dict[str, Setting],
    rules: Rules,
    check: Callable[[list[Record]], None],
) -> None:
    """The steps of a race; ``check`` sees the losses of the first ones."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Contestant] = {}
        for name, job in jobs.items():
            with _forgiven(name, records):
                kind, job = job["contestant"], job | {"compiles": rules.compiles}
                allowed = math.inf if kind in OWN else rules.seconds_allowed
                running[name] = stack.enter_context(Contestant(SCRIPT[kind], job, allowed))
                records[name].facts = running[name].facts

        def everyone(steps: dict[str, int], checking: bool) -> None:
            for name in list(running):
                time.sleep(PAUSE)
                with _forgiven(name, records, running):
                    _take(running[name], steps[name], records[name], checking)

        for _ in range(rules.checked_steps):
            everyone(dict.fromkeys(running, 1), checking=True)
        check([records[name] for name in running])
        busy = busy_cores(0.3)
        if busy and busy > BUSY:
            print(f"other work on {busy:.1f} cores: PyTorch suffers most from that", flush=True)
        for name in running:
            records[name].busy_cores = busy
        warm = {name: records[name].warm_seconds for name in running}
        steps = {name: max(1, round(rules.turn_seconds / warm[name])) for name in running}
        if max(steps.values()) > 1:
            # One step alone is mostly its call: the first turn only tells how many fill one.
            everyone(steps, checking=False)
            step = {name: records[name].seconds.pop() for name in running}
            filled = max(rules.turn_seconds, SHARE * max(step.values()))
            steps = {name: max(1, round(filled / step[name])) for name in running}
        begun, turns = time.monotonic(), 0
        while turns < rules.turns or time.monotonic() - begun < rules.seconds:
            everyone(steps, checking=False)
            turns += 1


def tolerance(task: Task) -> float:
    """By how much of the first loss two contestants may differ.

    Every literal layer rounds numbers of size C, at worst all of them one way.
    """
    return 1e-4 + 2 * float(np.finfo(np.float32).eps) * task.scale * task.depth


def model_of(job: Setting) -> DeepNarrow:
    """The network of a `Task`, as a dict or as JSON brings it."""
    kind = DeepNarrowCNN if job["arch"] == "cnn" else DeepNarrowMLP
    return kind(job["depth"], job["d_out"], job["scale"])


def first_key() -> jax.Array:
    """The key of an ensemble's first network."""
    return jax.random.fold_in(jax.random.key(SEED), 0)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, each counted once."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _take(running: Contestant, steps: int, record: Record, checking: bool) -> None:
    answer = running.take(steps)
    if checking:
        record.losses.append(answer["loss"])
        record.warm_seconds = answer["seconds"]
    else:
        record.seconds.append(answer["seconds"] / steps)
        # What an idle contestant burns, the others miss.
        record.idle_cpu_seconds = max(record.idle_cpu_seconds, answer["idle_cpu_seconds"])
    record.peak_bytes, record.step_bytes = answer["peak_bytes"], answer["step_bytes"]


@contextlib.contextmanager
def _forgiven(
    name: str, records: dict[str, Record], running: dict[str, Contestant] | None = None
) -> Iterator[None]:
    """A peer that is gone leaves the race; one of `dnntk`'s own ends it."""
    try:
        yield
    except Gone as gone:
        record = records[name]
        if record.name in OWN:
            raise RuntimeError(f"{name}: {gone}") from None
        record.missing = f"{name}: {gone}"
        if running:
            running.pop(name).close()


def _installed(record: Record) -> bool:
    if SCRIPT[record.name] == "torch_contestant.py" and importlib.util.find_spec("torch") is None:
        record.missing = f"{record.name}: PyTorch is not installed (extra bench)"
    return record.missing is None


def _check(task: Task, records: list[Record]) -> None:
    """Compare the losses with the first contestant's, and see that training moved them."""
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


def _write(task: Task, folder: Path, literal: bool) -> Setting:
    """Data and ``literal`` matrices into ``folder``, and the job without its contestant."""
    x, y = _data(task)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    gram = np.asarray(limit_ntk(x, d_out=task.d_out), np.float64)
    time_step = STEP_SIZE / (np.linalg.eigvalsh(gram)[-1] / len(x))
    job: Setting = dataclasses.asdict(task) | {"folder": str(folder.absolute())}
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
