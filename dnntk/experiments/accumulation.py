"""Section 5.3, figure 5.1: the output of a trained network, built up layer by layer.

`accumulate` trains one network, follows its rightmost neuron through the layers, and compares this
curve with the one that linear theory predicts without training (see `dnntk.shares`). L times the
share of a layer is a random number. With the limit kernel's alpha, draws of the random units alone
give its distribution, which has an atom where the unit is off. Its mean is the limit's f_t(x), so
the curve becomes the straight line (l/L) f_t(x) as depth grows.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.checks import check_count
from dnntk.data.datasets import Dataset
from dnntk.errors import InputError
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.accumulation import accumulation_figure, shares_figure
from dnntk.infinite_depth.solvers import MAX_EIGH_ROWS
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.empirical import empirical_ntk
from dnntk.runs import fields
from dnntk.runs.folder import as_json
from dnntk.runs.locks import freeing_folders
from dnntk.shares import accumulated, coefficients, layer_shares
from dnntk.training.config import TrainConfig
from dnntk.training.run import TrainResult, load_dataset_for, train_on

__all__ = ["Accumulation", "AccumulationConfig", "accumulate"]

log = logging.getLogger("dnntk")

# The thesis's toy run: L^2 / C at every depth, and the kernel time of a step.
THESIS_RATIO = 2000.0
THESIS_TIME_STEP = 0.5
# Shallow networks have few random units; draws for them use networks of this depth.
LEAST_DRAWN_DEPTH = 1002
CURVES = "curves.npz"


@dataclasses.dataclass(frozen=True)
class AccumulationConfig:
    """Settings of figure 5.1; the defaults are the thesis's.

    Attributes:
        arch: architecture, "mlp" or "cnn".
        depth: weight layers, at least 2.
        scale: C; None is the thesis's rule, depth^2 / 2000. May be infinite.
        dataset: "toy" (MLP only), "digits", "mnist" or "fashion_mnist".
        classes: classes to tell apart, or "all". Two classes are one output with targets 0 and 1.
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; None is 4 for the MNIST sets and 1
            otherwise.
        train_examples: largest number of training examples, at most 4,096; each step uses all.
        steps: full-batch steps of gradient descent.
        time_step: kernel time of a step; None is the thesis's 0.5 for the toy, and a safe fraction
            of 2 / lambda_max of the network's kernel for images.
        rho, beta: standard deviations of the random weights and biases.
        kernel_size: side of the CNN's filters, odd.
        points: number of held-out inputs to follow through the layers.
        output: index of the output to follow; -1 is the last, the thesis's rightmost neuron.
        draws: number of random units drawn for the predicted distribution of the shares.
        dtype: floating-point type of training. Measurements after training use float64.
        seed: seed of the split, the initialization and the draws.
    """

    arch: str = "mlp"
    depth: int = 10_000
    scale: float | None = None
    dataset: str = "toy"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    train_examples: int = MAX_EIGH_ROWS
    steps: int = 2000
    time_step: float | None = None
    rho: float = 1.0
    beta: float = 1.0
    kernel_size: int = 3
    points: int = 5
    output: int = -1
    draws: int = 20_000
    dtype: str = "float64"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        for name in ("steps", "train_examples", "points", "draws"):
            check_count(name, getattr(self, name))
        if self.train_examples > MAX_EIGH_ROWS:
            raise InputError(
                f"train_examples: expected at most {MAX_EIGH_ROWS:,}, whose kernel is "
                f"diagonalized, got {self.train_examples:,}"
            )
        if self.output < -1:
            raise InputError(f"output: expected a number from 0 on, or -1, got {self.output}")
        self.training  # noqa: B018 - TrainConfig checks the rest

    @property
    def training(self) -> TrainConfig:
        """Configuration of the run that trains the network."""
        toy = THESIS_TIME_STEP if self.dataset == "toy" else None
        shared = {field.name for field in dataclasses.fields(TrainConfig)}
        values = {name: value for name, value in vars(self).items() if name in shared}
        values["scale"] = self.depth**2 / THESIS_RATIO if self.scale is None else self.scale
        values["time_step"] = toy if self.time_step is None else self.time_step
        return TrainConfig(**values, batch_size=0)


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """One output of a trained network at p inputs, layer by layer; float64.

    Attributes:
        labels: names of the p inputs.
        targets: [p].
        trained: [depth, p], figure 5.1: the neuron after layers 1 to depth, compensated for C.
        theory: [depth, p], linear theory of the same network.
        limit: [p], f_t of the infinitely deep network.
        off: [depth - 1, p], is the layer's random unit off? In a CNN, the fraction of pixels.
        drawn: [draws, p], random draws of depth times the share of a layer, from theory alone.
        summary: the content of summary.json.
    """

    labels: list[str]
    targets: np.ndarray
    trained: np.ndarray
    theory: np.ndarray
    limit: np.ndarray
    off: np.ndarray
    drawn: np.ndarray
    summary: dict[str, Any]

    __repr__ = fields.short_repr

    @property
    def shares(self) -> np.ndarray:
        """[depth - 1, p]: depth times what each layer but the first adds to the trained output."""
        return len(self.trained) * np.diff(self.trained, axis=0)

    @property
    def line(self) -> np.ndarray:
        """[depth, p]: (l/L) f_t, the infinitely deep network's."""
        depth = len(self.trained)
        return np.arange(1, depth + 1)[:, None] / depth * self.limit


@freeing_folders()
def accumulate(
    config: AccumulationConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Accumulation:
    """Train a network, follow its output through the layers, and compare with linear theory.

    Args:
        config: the experiment; None is the thesis's figure 5.1.
        workdir: folder for configuration, training run, curves, summary, figures; None writes none.
        resume: continue the training in ``workdir``.
        progress: show a progress bar.

    Returns:
        The curves, the predictions and their differences. After training, these cost a few float64
        evaluations of the network and an eigendecomposition of its kernel.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
        Diverged: the loss became NaN or grew without bound.
    """
    config = config or AccumulationConfig()
    folder = ExperimentFolder("accumulation", dataclasses.asdict(config), workdir, resume=resume)
    data = _subsampled(load_dataset_for(config.training), config.train_examples)
    chosen = _chosen(config, data)
    folder.write_config()
    training, resume_training = folder.training()
    trained = train_on(config.training, data, training, resume=resume_training, progress=progress)
    with jax.enable_x64(True):
        found = _measured(config, trained, chosen)
    _log(found)
    arrays = {n: value for n, value in vars(found).items() if n not in ("labels", "summary")}
    arrays |= {"labels": np.array(found.labels), "line": found.line}
    folder.write_arrays(CURVES, arrays)
    found.summary.update(folder.finish(found.summary))
    _draw(config, found, folder)
    return found


def _drawn(
    config: AccumulationConfig, model: DeepNarrow, x_train: jax.Array, x: jax.Array, alpha: Any
) -> np.ndarray:
    """[draws, p]: depth times the layers' shares in newly drawn networks with C = infinity."""
    depth = min(config.draws + 2, max(model.depth, LEAST_DRAWN_DEPTH))
    other, parts = model.clone(depth=depth, scale=math.inf), []
    init, key = jax.jit(other.init), jax.random.fold_in(jax.random.key(config.seed), 1)
    for one in jax.random.split(key, math.ceil(config.draws / (depth - 2))):
        variables = init(one, x[:1])
        # The first layer adds nothing here, and its random unit does not see the input.
        parts.append(depth * layer_shares(other, variables, x_train, x, alpha[:, None])[2:, :, 0])
    return np.concatenate(parts)[: config.draws]


def _subsampled(data: Dataset, most: int) -> Dataset:
    """The dataset with at most ``most`` training examples, evenly spaced."""
    if len(data.x_train) <= most:
        return data
    kept = np.linspace(0, len(data.x_train) - 1, most).round().astype(int)
    labels = data.labels_train
    return dataclasses.replace(
        data,
        description=f"{data.description}; {most} of the training examples",
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        labels_train=None if labels is None else labels[kept],
    )


def _chosen(config: AccumulationConfig, data: Dataset) -> np.ndarray:
    """Indices of the test examples to follow: along the arc, or of each class in turn."""
    count, d_out = config.points, data.y_test.shape[1]
    if config.output >= d_out:
        raise InputError(f"output: expected less than {d_out}, got {config.output}; or -1")
    if count > len(data.x_test):
        raise InputError(f"points: expected at most {len(data.x_test)}, got {count}")
    if data.labels_test is None:
        # Not symmetric about the middle of the arc, or the targets would be equal in pairs.
        return ((np.arange(count) + 1 / 3) / count * len(data.x_test)).astype(int)
    classes = len(data.classes)
    first = config.output % classes
    turns = [np.flatnonzero(data.labels_test == (first + c) % classes) for c in range(classes)]
    order = sorted((rank, c, i) for c, turn in enumerate(turns) for rank, i in enumerate(turn))
    return np.array([i for *_, i in order[:count]])


def _measured(config: AccumulationConfig, run: TrainResult, chosen: np.ndarray) -> Accumulation:
    """The trained network's curves, and theory's predictions of them."""
    model, data, count = run.model, run.dataset, config.steps
    doubled = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), run.variables)
    start = doubled | {"params": jax.tree.map(jnp.zeros_like, doubled["params"])}
    x_train, x = (jnp.asarray(a, jnp.float64) for a in (data.x_train, data.x_test[chosen]))
    y = data.y_train[:, config.output].astype(np.float64)
    time_step = run.summary["time_step"]
    curve, off = accumulated(model, doubled, x)
    own = empirical_ntk(model, start, x_train, outputs="diagonal")[:, :, config.output]
    alphas = coefficients(np.asarray(own), y, time_step, count)
    shares = layer_shares(model, start, x_train, x, jnp.asarray(alphas))
    theory, flow = np.moveaxis(np.cumsum(np.asarray(shares), 0), 2, 0)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("rho", "beta")}
    options |= {"d_out": data.y_train.shape[1], "kernel_size": config.kernel_size}
    kernel: Callable[..., jax.Array] = partial(limit_ntk, **options)
    alpha = coefficients(np.asarray(kernel(x_train)), y, time_step, count)[:, 0]
    found = Accumulation(
        labels=[_label(data, i) for i in chosen],
        targets=data.y_test[chosen, config.output].astype(np.float64),
        trained=np.asarray(curve)[:, :, config.output],
        theory=theory,
        limit=np.asarray(kernel(x, x_train)) @ alpha,
        off=np.asarray(off),
        drawn=_drawn(config, model, x_train, x, jnp.asarray(alpha)),
        summary={},
    )
    found.summary.update(
        {name: run.summary[name] for name in ("data", "steps", "time", "time_step", "train_loss")},
        **{"depth": model.depth, "scale": as_json(model.scale)},
        **_differences(found, flow),
    )
    return found


def _label(data: Dataset, index: int) -> str:
    if data.labels_test is None:
        point = data.x_test[index]
        return f"γ = {math.atan2(point[1], point[0]):.2f}"
    return f"class {data.classes[data.labels_test[index]]}, test image {index}"


def _differences(found: Accumulation, flow: np.ndarray) -> dict[str, Any]:
    """Relative differences between the trained network, linear theory and the limit."""

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))

    points = [
        {
            "label": label,
            "target": found.targets[i],
            "trained": found.trained[-1, i],
            "theory": found.theory[-1, i],
            "limit": found.limit[i],
            "off": found.off[:, i].mean(),
            "mean": {"measured": found.shares[:, i].mean(), "predicted": found.limit[i]},
            "std": {"measured": found.shares[:, i].std(), "predicted": found.drawn[:, i].std()},
        }
        for i, label in enumerate(found.labels)
    ]
    return {
        "difference_from_theory": relative(found.trained, found.theory),
        "difference_from_line": relative(found.trained, found.line),
        "steps_from_flow": relative(found.theory, flow),
        "off": float(found.off.mean()),
        "points": jax.tree.map(lambda v: v if isinstance(v, str) else float(v), points),
    }


def _log(found: Accumulation) -> None:
    summary = found.summary
    log.info(
        "curves: %.2g of the largest output from linear theory, %.2g from the straight line of the "
        "infinitely deep network; random units off in %.1f%% of layers",
        *(summary["difference_from_theory"], summary["difference_from_line"]),
        100 * summary["off"],
    )
    for point in summary["points"]:
        mean, std = point["mean"], point["std"]
        log.info(
            "%s: output %.4f, target %.4f; depth x share: mean %.3f (predicted %.3f), standard "
            "deviation %.3f (predicted %.3f)",
            *(point["label"], point["trained"], point["target"]),
            *(mean["measured"], mean["predicted"], std["measured"], std["predicted"]),
        )


def _draw(config: AccumulationConfig, found: Accumulation, folder: ExperimentFolder) -> None:
    scale = config.training.scale_or_default
    shown = r"\infty" if math.isinf(scale) else f"{scale:,.6g}".replace(",", "{,}")
    title = f"{config.depth:,}-layer {config.arch.upper()}, $C = {shown}$, {config.dataset}, "
    title += f"$t = {found.summary['time']:.4g}$"
    averaged = config.arch == "cnn"
    folder.draw("figure_5_1", accumulation_figure, found, title, averaged)
    folder.draw("shares", shares_figure, found, title)
