"""One network of the experiment: trained, tested, and its kernel before and after training.

Two clocks. Kernel time t is the learning rate times the steps in NTK parametrization, for deep and
for wide networks alike. But a kernel that is a times as large learns in time t what the other
learns in time a t, and the deep network's kernel is several times the wide one's. So wide networks
are also evaluated by the *matched* clock, t times the ratio of the two limits' mean diagonals.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dnntk.data.datasets import Dataset
from dnntk.errors import Diverged
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig, NetworkSetting
from dnntk.experiments.shallow import ShallowMLP, Stop, descend, shallow_ntk, width_for
from dnntk.ntk.empirical import empirical_ntk
from dnntk.ntk.measures import alignment, kernel_movement
from dnntk.training.evaluation import as_trained, scores, split_scores
from dnntk.training.run import load_dataset_for, train_on
from dnntk.training.step_size import largest_eigenvalue

__all__ = ["ImageData", "deep_parameters", "run", "zero_loss"]

log = logging.getLogger("dnntk")

# Even if a larger step is stable, so that a run stays close to the continuous flow.
LEAST_STEPS_TO_FIRST_TIME = 3
# A run that still diverges after this many halvings of its step is given up.
MOST_HALVINGS = 6

Row = dict[str, Any]


class ImageData:
    """The first training and test images of a dataset, as the networks take them."""

    def __init__(self, config: DepthOrWidthConfig, name: str) -> None:
        """Load the dataset."""
        whole = load_dataset_for(config.network(NetworkSetting("size", name, "theorem", 2, 1.0)))
        train, test = config.train_examples_of(name), config.test_examples
        assert whole.labels_train is not None and whole.labels_test is not None
        part = dataclasses.replace(
            whole,
            x_train=whole.x_train[:train],
            y_train=whole.y_train[:train],
            labels_train=whole.labels_train[:train],
            x_test=whole.x_test[:test],
            y_test=whole.y_test[:test],
            labels_test=whole.labels_test[:test],
        )
        arrays = as_trained(part, True, config.dtype)
        self.dataset: Dataset = part
        self.x, self.y = arrays["x_train"], arrays["y_train"]
        self.x_test, self.y_test = arrays["x_test"], arrays["y_test"]
        # Held out: on training images, memorized labels alone could make the alignment grow.
        probes = config.probe_examples
        self.probes, self.probe_labels = self.x_test[:probes], self.y_test[:probes]

    @property
    def description(self) -> str:
        """A line for the log."""
        return (
            f"{self.dataset.description}; the first {len(self.x)} and {len(self.x_test)} of them, "
            f"kernels on {len(self.probes)} test images"
        )


def run(
    setting: NetworkSetting,
    images: ImageData,
    config: DepthOrWidthConfig,
    ratio: float,
    progress: bool,
) -> Row:
    """Train one network and return its row.

    Args:
        setting: the network.
        images: the network's data.
        config: the experiment.
        ratio: matched time over kernel time.
        progress: show a progress bar.

    Returns:
        The setting's fields and ``width``, ``parameters``, ``lambda_max``, ``time_step``,
        ``halvings`` of the step, ``diverged`` (also with the smallest step), ``alignment`` of the
        initial kernel; and ``records``, one per time and clock: ``clock``, ``time``, accuracies,
        losses, ``seconds`` of training until then; the last of each clock has the kernel's
        ``movement`` and ``alignment``.
    """
    with jax.enable_x64(config.dtype == "float64"):
        network = (
            _Wide(setting, images, config, ratio)
            if setting.rule == "wide"
            else _Deep(setting, images, config)
        )
        row = setting.fields() | network.at_start()
        fraction = config.fraction_of(setting)
        for halvings in range(MOST_HALVINGS + 1):
            time_step = _time_step(
                config.times_of(setting)[0], fraction / 2**halvings, row["lambda_max"]
            )
            made = {"time_step": time_step, "halvings": halvings}
            try:
                records = network.train(time_step, progress)
            except Diverged:
                log.info("%s: diverged with time_step %.3g", setting.name, time_step)
                continue
            return row | made | {"diverged": False, "records": records}
        return row | made | {"diverged": True, "records": []}


def _time_step(first: float, fraction: float, lambda_max: float) -> float:
    """A step of at most ``fraction`` of 2 / lambda_max; the first time is a multiple of it."""
    steps = math.ceil(first * lambda_max / (2 * fraction) * (1 - 1e-9))
    return first / max(steps, LEAST_STEPS_TO_FIRST_TIME)


class _Network:
    """Common to deep and wide networks: the data, the initial kernel, the kernel's change."""

    def __init__(
        self, setting: NetworkSetting, images: ImageData, config: DepthOrWidthConfig
    ) -> None:
        self.setting, self.images, self.config = setting, images, config
        self.before = np.zeros(0)

    def measure_start(self, model: Any, variables: Any) -> Row:
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        found = largest_eigenvalue(model, variables, self.images.x, mesh)
        self.before = self.kernel(variables)
        return {
            "parameters": sum(p.size for p in jax.tree.leaves(variables["params"])),
            "lambda_max": found.value,
            "alignment": self.alignment(self.before),
        }

    def kernel(self, variables: Any) -> np.ndarray:
        raise NotImplementedError

    def alignment(self, kernel: np.ndarray) -> float:
        return float(alignment(kernel, self.images.probe_labels, centred=True))

    def kernel_change(self, variables: Any) -> Row:
        after = self.kernel(variables)
        return {
            "movement": float(kernel_movement(after, self.before)),
            "alignment": self.alignment(after),
        }


class _Deep(_Network):
    """A deep narrow MLP, trained by `dnntk.train`."""

    def __init__(
        self, setting: NetworkSetting, images: ImageData, config: DepthOrWidthConfig
    ) -> None:
        super().__init__(setting, images, config)
        self.network = config.network(setting)
        self.model = self.network.model(images.y.shape[1])

    def at_start(self) -> Row:
        key, x = jax.random.key(self.network.seed), jnp.asarray(self.images.x[:1])
        variables = jax.jit(self.model.init)(key, x)
        return {"width": variables["params"]["first"]["bias"].size} | self.measure_start(
            self.model, variables
        )

    def kernel(self, variables: Any) -> np.ndarray:
        return np.asarray(empirical_ntk(self.model, variables, self.images.probes))

    def train(self, time_step: float, progress: bool) -> list[Row]:
        times, images = self.config.times_of(self.setting), self.images
        network = dataclasses.replace(
            self.network,
            time_step=time_step,
            time=times[-1],
            eval_every=round(times[0] / time_step),
            eval_examples=max(len(images.x), len(images.x_test)),
        )
        with _quiet():
            result = train_on(network, images.dataset, progress=progress)
        lines = {line["step"]: line for line in result.history}
        _check_fell(lines[0]["train_loss"], result.history[-1]["train_loss"])
        pace = result.summary["steps_per_second"]
        records = []
        for t in times:
            step = round(t / time_step)
            line = lines[step]
            keys = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
            scored = {key: line[key] for key in keys}
            records.append({"clock": "equal", "time": t, **scored, "seconds": step / pace})
        records[-1] |= self.kernel_change(result.variables)
        return records


class _Wide(_Network):
    """A `ShallowMLP` with as many parameters as the deep network of the setting."""

    def __init__(
        self, setting: NetworkSetting, images: ImageData, config: DepthOrWidthConfig, ratio: float
    ) -> None:
        super().__init__(setting, images, config)
        d_in, d_out = images.x.shape[1], images.y.shape[1]
        width = width_for(deep_parameters(setting.depth, d_in, d_out), d_in, d_out)
        self.model = ShallowMLP(width, d_out, rho=config.rho, beta=config.beta)
        key = jax.random.key(config.seed + setting.trial)
        self.variables = jax.jit(self.model.init)(key, jnp.asarray(images.x[:1]))
        self.clocks = {"equal": 1.0, "matched": ratio}

    def at_start(self) -> Row:
        return {"width": self.model.width} | self.measure_start(self.model, self.variables)

    def kernel(self, variables: Any) -> np.ndarray:
        probes = jnp.asarray(self.images.probes)
        return np.asarray(shallow_ntk(self.model, variables, probes, probes))

    def train(self, time_step: float, progress: bool) -> list[Row]:
        times, images = self.config.times_of(self.setting), self.images
        steps = {
            (clock, t): max(1, round(t * factor / time_step))
            for clock, factor in self.clocks.items()
            for t in times
        }
        last = {steps[clock, times[-1]] for clock in self.clocks}
        x, y = jnp.asarray(images.x), jnp.asarray(images.y)
        stops = sorted(set(steps.values()))
        found = {
            stop.step: self._evaluated(stop, stop.step in last)
            for stop in descend(
                self.model, self.variables, x, y, time_step, stops, "training", progress
            )
        }
        _check_fell(zero_loss(images.y), found[stops[-1]]["train_loss"])
        return [{"clock": clock, "time": t, **found[step]} for (clock, t), step in steps.items()]

    def _evaluated(self, stop: Stop, last: bool) -> Row:
        if not math.isfinite(stop.loss):
            raise Diverged(f"the loss is {stop.loss} at step {stop.step}", [])
        variables = {"params": stop.params, "initial": self.variables["initial"]}
        images = self.images
        line: Row = {}
        for split, x, y in (
            ("test", images.x_test, images.y_test),
            ("train", images.x, images.y),
        ):
            outputs = np.asarray(_apply(self.model, variables, jnp.asarray(x)))
            line |= split_scores(split, outputs, y, True)
        line["seconds"] = stop.seconds
        return line | (self.kernel_change(variables) if last else {})


_apply: Callable[..., jax.Array] = jax.jit(
    lambda model, variables, x: model.apply(variables, x), static_argnums=0
)


def deep_parameters(depth: int, d_in: int, d_out: int) -> int:
    """Weights and biases of a deep narrow MLP."""
    width = d_in + 1 + d_out
    return (d_in + 1) * width + (depth - 2) * (width + 1) * width + (width + 1) * d_out


def zero_loss(y: np.ndarray) -> float:
    """The loss of a network that is 0 everywhere, as all networks are at initialization."""
    return scores(np.zeros_like(y), y, False)[0]


def _check_fell(first: float, last: float) -> None:
    """Raise `Diverged` if the loss ends above its start: such a run diverges slowly."""
    if not last < first:
        raise Diverged(f"the loss went from {first:.3g} to {last:.3g}", [])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence `train`, which logs seven lines per run: the experiment has dozens of runs."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
