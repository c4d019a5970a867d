"""Benchmarks of training steps: beside the plain PyTorch loop, and their cost against depth.

For all workers a step is the loss 1/2 E ||f - y||^2, its whole gradient and an update of plain SGD.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import command_line
import numpy as np
from absl import flags

from benchmarking.comparison import Record, Schedule, Task, compare, compare_over_depth, tolerance
from benchmarking.measure import Row, measured, promise, set_baseline

__all__ = ["BENCHMARKS", "check_flags"]

FLAGS = flags.FLAGS

flags.DEFINE_integer("batch", 512, "train, cost: images a batch.", lower_bound=1)
flags.DEFINE_integer("arc", 200, "train, cost: points on the arc.", lower_bound=1)
flags.DEFINE_integer("cnn_depth", 1000, "train_cnn, train_cnn_wide: depth.", lower_bound=3)
flags.DEFINE_integer("deep_depth", 20_000, "train_cnn_deep: depth.", lower_bound=3)
flags.DEFINE_integer("toy_depth", 10_000, "train_toy: depth.", lower_bound=3)
flags.DEFINE_integer("wide_depth", 1000, "train_mlp_wide: depth.", lower_bound=3)
flags.DEFINE_integer("trials", 10, "train_toy: networks side by side.", lower_bound=1)
flags.DEFINE_list(
    "mlp_depths", ["10", "100", "1000", "10000", "100000", "1000000"], "cost_mlp: depths."
)
flags.DEFINE_list("cnn_depths", ["10", "100", "1000", "10000", "100000"], "cost_cnn: depths.")
flags.DEFINE_integer(
    "torch_depth", 20_000, "cost: largest depth of the PyTorch loop.", lower_bound=0
)
flags.DEFINE_integer(
    "unrolled_depth", 100, "cost: largest depth of the unrolled network.", lower_bound=0
)
flags.DEFINE_float("step_seconds", 120.0, "Time limit of a baseline's step.", lower_bound=0.1)
flags.DEFINE_float(
    "peer_gigabytes", 8.0, "cost: a baseline that needs more is left out.", lower_bound=0
)
flags.DEFINE_string("data_dir", None, "train_mlp_mnist: folder of raw IDX files or of tfds sets.")
flags.DEFINE_float("train_scale", 2.0, "C of the trained networks.", lower_bound=0.01)
flags.DEFINE_float("depth_seconds", 30.0, "Least time of all depths' turns.", lower_bound=0)
flags.DEFINE_float("turn_seconds", 0.2, "Time that a turn's steps fill.", lower_bound=0)
flags.DEFINE_integer("checked_steps", 3, "Steps whose losses are compared.", lower_bound=1)

LOOP, SCAN, UNROLLED = "PyTorch loop", "lax.scan", "unrolled"
CHANNELS_LAST = "PyTorch loop, channels_last"
TWO = "two devices"
# Largest time of two devices over one device's: turns of the same work differ by as much.
SLOWER = 1.05
# Bytes by which an allocator's peak memory varies.
MEMORY_NOISE = 4e6
# With a larger tolerance, a comparison of literal networks' losses in float32 shows nothing.
LARGEST_TOLERANCE = 0.2
IMAGE = (7, 7, 1)
# Fraction of a handwritten digit's pixels that are 0.
ZEROS = 0.8


def train_cnn(folder: Path) -> list[Row]:
    """A training step of the CNN with 3 channels at 7 x 7, depth 1000, against a PyTorch loop."""
    return _beside_loop(_cnn(FLAGS.cnn_depth, 1), 3, 4, folder, others=[CHANNELS_LAST])


def train_cnn_deep(folder: Path) -> list[Row]:
    """A training step of the CNN with 3 channels, depth 20,000: time and memory."""
    return _beside_loop(_cnn(FLAGS.deep_depth, 1), 3, 4, folder, memory=5)


def train_cnn_wide(folder: Path) -> list[Row]:
    """A training step of the CNN with 12 channels (ten classes), depth 1000."""
    return _beside_loop(_cnn(FLAGS.cnn_depth, 10), 1.5, 2, folder, others=[CHANNELS_LAST])


def train_mlp_wide(folder: Path) -> list[Row]:
    """A training step of the MLP on 784 pixels, ten classes (width 795): time and memory."""
    return _beside_loop(_wide(), 1.7, None, folder, memory=2)


def train_mlp_regime(folder: Path) -> list[Row]:
    """The same in the theorems' regime, C = depth^2.2: all pixels positive, and most of them zero.

    The baseline's literal matrices in float32 do not learn there: only its time is compared.
    """
    rows = []
    for zeros in (0.0, ZEROS):
        task = dataclasses.replace(_wide(), scale=float(FLAGS.wide_depth) ** 2.2, zeros=zeros)
        rows += _beside_loop(task, 1.7, None, folder, memory=2)
    return rows


def train_mlp_mnist(folder: Path) -> list[Row]:
    """The same on the first images of MNIST, with both C; part of 'all' only with --data_dir."""
    rows = []
    for scale in (FLAGS.train_scale, float(FLAGS.wide_depth) ** 2.2):
        task = dataclasses.replace(_wide(), scale=scale, dataset="mnist", data_dir=FLAGS.data_dir)
        rows += _beside_loop(task, 1.7, None, folder, memory=2)
    return rows


def train_toy(folder: Path) -> list[Row]:
    """A training step of the 4-wide MLP on the arc: one network, and ten side by side."""
    task, trials = _toy(FLAGS.toy_depth), FLAGS.trials
    records = compare(task, ["network", "ensemble", LOOP], _schedule(), folder, trials)
    own, many, loop = (records[name] for name in ("network", "ensemble", LOOP))
    one = _time(task, own, loop)
    _faster(one, 12)
    together = measured(f"{_words(task)}, {trials} trials together: step", "s", many.seconds)
    _beside(together, f"{trials} x {LOOP}", trials, many, loop)
    _faster(together, 15)
    return [one, together]


def train_devices(folder: Path) -> list[Row]:
    """The training steps above on two host devices, beside one device with a thread a core."""
    rows = []
    for task in (
        _cnn(FLAGS.cnn_depth, 1),
        _cnn(FLAGS.deep_depth, 1),
        _cnn(FLAGS.cnn_depth, 10),
        _toy(FLAGS.toy_depth),
        _wide(),
    ):
        records = compare(task, [TWO, "network"], _schedule(), folder)
        row = measured(f"{_words(task)}: step on two devices", "s", records[TWO].seconds)
        _beside(row, "one device with threads", 1, records[TWO], records["network"])
        promise(row, f"at most {SLOWER:g} times", row["ratio"]["median"] <= SLOWER)
        rows.append(row)
    return rows


def cost_mlp(folder: Path) -> list[Row]:
    """Cost against depth of the 4-wide MLP on the arc: time, memory, compilation."""
    return _cost(_toy, command_line.depths("mlp_depths", 3), folder)


def cost_cnn(folder: Path) -> list[Row]:
    """Cost against depth of the CNN with 3 channels: time, memory, compilation."""
    return _cost(partial(_cnn, d_out=1), command_line.depths("cnn_depths", 3), folder)


BENCHMARKS: dict[str, Callable[[Path], list[Row]]] = {
    "train_cnn": train_cnn,
    "train_cnn_deep": train_cnn_deep,
    "train_cnn_wide": train_cnn_wide,
    "train_toy": train_toy,
    "train_mlp_wide": train_mlp_wide,
    "train_mlp_regime": train_mlp_regime,
    "train_mlp_mnist": train_mlp_mnist,
    "train_devices": train_devices,
    "cost_mlp": cost_mlp,
    "cost_cnn": cost_cnn,
}


def check_flags() -> None:
    """Check the flags that later benchmarks read."""
    command_line.depths("mlp_depths", 3)
    command_line.depths("cnn_depths", 3)


# ---- the tasks


def _cnn(depth: int, d_out: int) -> Task:
    return Task("cnn", depth, d_out, IMAGE, FLAGS.batch, FLAGS.train_scale)


def _toy(depth: int) -> Task:
    return Task("mlp", depth, 1, (2,), FLAGS.arc, FLAGS.train_scale)


def _wide() -> Task:
    return Task("mlp", FLAGS.wide_depth, 10, (784,), FLAGS.batch, FLAGS.train_scale)


def _words(task: Task) -> str:
    width = task.shape[-1] + 1 + task.d_out
    units = "channels" if task.arch == "cnn" else "units"
    words = f"{task.arch.upper()}, {width} {units}, depth {task.depth:,}, {task.examples} inputs"
    data = f", {task.zeros:.0%} of the pixels 0" if task.zeros else ""
    data += f", {task.dataset}" if task.dataset else ""
    return f"{words}, C = {task.scale:.3g}{data}"


def _schedule(seconds_allowed: float = float("inf")) -> Schedule:
    return Schedule(
        FLAGS.repeats,
        FLAGS.turn_seconds,
        FLAGS.checked_steps,
        seconds_allowed,
        compiles=FLAGS.compiles,
    )


# ---- beside the loop


def _beside_loop(
    task: Task,
    promised: float,
    aim: float | None,
    folder: Path,
    memory: float | None = None,
    others: Sequence[str] = (),
) -> list[Row]:
    """Time and memory with their promises, and the time beside ``others`` without a promise."""
    records = compare(task, ["network", LOOP, *others], _schedule(), folder)
    own, loop = records["network"], records[LOOP]
    step = _time(task, own, loop)
    _faster(step, promised, aim)
    peak = measured(f"{_words(task)}: peak resident memory", "bytes", [own.peak_bytes])
    _set_or_missing(peak, loop, [loop.peak_bytes])
    if memory and "peer" in peak:
        words = f"at most 1/{memory:g} of the memory"
        promise(peak, words, peak["ratio"]["median"] <= 1 / memory)
    more = [records[name] for name in others if records[name].missing is None]
    return [step, *(_time(task, own, other) for other in more), peak]


def _time(task: Task, own: Record, baseline: Record) -> Row:
    return _beside(
        measured(f"{_words(task)}: step", "s", own.seconds), baseline.name, 1, own, baseline
    )


def _beside(step: Row, name: str, times: int, own: Record, baseline: Record) -> Row:
    """Add ``times`` the baseline's seconds to a row of seconds, and both records."""
    _set_or_missing(step, baseline, [times * s for s in baseline.seconds], name)
    step["records"] = [dataclasses.asdict(record) for record in (own, baseline)]
    return step


def _set_or_missing(
    step: Row, baseline: Record, samples: list[float] | list[int], name: str | None = None
) -> None:
    if baseline.missing is None:
        set_baseline(step, name or baseline.name, samples)
        step["difference"] = baseline.difference
    else:
        step["peer_missing"] = baseline.missing


def _faster(step: Row, times: float, aim: float | None = None) -> None:
    if "peer" in step:
        words = f"at least {times:g} times faster" + (f" (aim: {aim:g})" if aim else "")
        promise(step, words, step["ratio"]["median"] <= 1 / times)


# ---- cost against depth


def _cost(task_of: Callable[[int], Task], depths: list[int], folder: Path) -> list[Row]:
    last: dict[str, tuple[int, Record]] = {}
    rows, own = [], []
    for depth in depths:
        task = task_of(depth)
        left_out = {name: _left_out(name, task, last.get(name)) for name in (LOOP, SCAN, UNROLLED)}
        names = ["network", *(name for name, reason in left_out.items() if not reason)]
        records = compare(task, names, _schedule(FLAGS.step_seconds), folder)
        last |= {name: (depth, record) for name, record in records.items()}
        own.append(records["network"])
        left_out |= {name: record.missing for name, record in records.items()}
        rows += _at_depth(task, records, {n: why for n, why in left_out.items() if why})
    # Depths from 100 on, if there are several: at smaller depths a step's time is mostly its call.
    kept = [k for k, depth in enumerate(depths) if depth >= 100]
    kept = kept if len(kept) > 1 else list(range(len(depths)))
    deep = [depths[k] for k in kept]
    schedule = dataclasses.replace(_schedule(), seconds=FLAGS.depth_seconds)
    beside = [own[k] for k in kept]
    several = len(deep) > 1
    tasks = [task_of(depth) for depth in deep]
    in_turns = compare_over_depth(tasks, schedule, folder) if several else beside
    return rows + _growth(deep, beside, in_turns)


def _left_out(name: str, task: Task, last: tuple[int, Record] | None) -> str | None:
    """Why a baseline is left out of ``task``, judged by its ``last`` (depth, record)."""
    depth = task.depth
    most = {LOOP: FLAGS.torch_depth, UNROLLED: FLAGS.unrolled_depth}.get(name, depth)
    if depth > most:
        return f"{name}: only up to depth {most:,}"
    if tolerance(task) > LARGEST_TOLERANCE:
        return f"{name}: float32 matrices no longer tell one network from another"
    if last is None:
        return None
    before, record = last
    if record.missing is not None:
        return record.missing
    seconds = np.median(record.seconds) * depth / before
    start = record.facts["start_bytes"]
    gigabytes = (start + (record.step_bytes - start) * depth / before) / 1e9
    if seconds > FLAGS.step_seconds:
        return f"{name}: a step would take {seconds:.0f} s"
    if gigabytes > FLAGS.peer_gigabytes:
        return f"{name}: would take {gigabytes:.0f} GB"
    return None


def _at_depth(task: Task, records: dict[str, Record], left_out: dict[str, str]) -> list[Row]:
    """Rows of time, memory and compilation at one depth, one for each baseline."""
    baselines = [r for name, r in records.items() if name != "network" and r.missing is None]
    own, rows = records["network"], []
    for kind, unit, values in (
        ("step", "s", lambda record: record.seconds),
        ("memory beyond the parameters", "bytes", lambda record: [_beyond(record)]),
        ("compilation", "s", lambda record: [record.facts["compile_seconds"]]),
    ):
        alone = measured(f"{_words(task)}: {kind}", unit, values(own))
        alone |= {"depth": task.depth, "kind": kind, "task": dataclasses.asdict(task)}
        alone |= {"tolerance": tolerance(task)}
        beside = []
        for baseline in baselines:
            if kind != "compilation" or "compile_seconds" in baseline.facts:
                beside.append(set_baseline(dict(alone), baseline.name, values(baseline)))
                beside[-1]["difference"] = baseline.difference
        beside = beside or [alone]
        if kind == "step":
            seen = [dataclasses.asdict(record) for record in (own, *baselines)]
            beside[0] |= {"records": seen, "left_out": left_out}
            if not baselines and left_out:
                beside[0]["peer_missing"] = "; ".join(left_out.values())
        rows += beside
    return rows


def _beyond(record: Record) -> float:
    return max(record.beyond_bytes, MEMORY_NOISE)


def _growth(depths: list[int], beside: list[Record], in_turns: list[Record]) -> list[Row]:
    """How time, memory and compilation grow with depth.

    Times come from ``in_turns``, where the depths took turns. Of the two workers of a depth, the
    larger memory and the faster compilation count: other work on the machine slows compilations.
    """
    span = f"depth {depths[0]:,} to {depths[-1]:,}"
    a_layer = np.array([np.median(r.seconds) / d for d, r in zip(depths, in_turns, strict=True)])
    pairs = list(zip(beside, in_turns, strict=True))
    by_root = [
        max(map(_beyond, pair)) / depth**0.5 for depth, pair in zip(depths, pairs, strict=True)
    ]
    # The growth from every smaller depth counts, not only from the smallest depth.
    growth = max(b / a for i, a in enumerate(by_root) for b in by_root[i:])
    compilation = np.array([min(r.facts["compile_seconds"] for r in pair) for pair in pairs])
    time = _bound(
        f"{span}: time a layer, largest over smallest", a_layer.max() / a_layer.min(), 1.2
    )
    time["depths in turns"] = [dataclasses.asdict(record) for record in in_turns]
    time["seconds a layer"] = a_layer.tolist()
    return [
        time,
        _bound(f"{span}: memory beyond the parameters, growth over sqrt(depth)", growth, 1.2),
        _bound(
            f"{span}: compilation, largest over smallest",
            compilation.max() / compilation.min(),
            1.5,
        ),
    ]


def _bound(what: str, value: float, most: float) -> Row:
    return promise(measured(what, "x", [value]), f"at most {most:g}", value <= most)
