"""The configuration of a training run: every choice, its default, and the checks between them."""

import dataclasses
import math
import os
from typing import Any

from dnntk.checks import brief
from dnntk.data.datasets import DATASETS
from dnntk.data.mnist import CLASS_NAMES
from dnntk.errors import InputError
from dnntk.networks import models
from dnntk.runs import fields
from dnntk.runs.folder import as_json
from dnntk.training import pipeline
from dnntk.training.losses import LOSSES

__all__ = ["TrainConfig", "parse_classes"]

ARCHITECTURES = ("mlp", "cnn")
# Those that take steps, and the one that does not.
DESCENTS = (
    *("sgd", "adam", "adamw", "nadam", "nadamw", "radam", "amsgrad", "adabelief", "adamax"),
    *("yogi", "rmsprop", "adagrad", "lamb", "lion"),
)
OPTIMIZERS = (*DESCENTS, "kernel")
# Those whose steps do not depend on the gradient's size, which falls as 1 / sqrt(depth).
NORMALIZING = tuple(d for d in DESCENTS if d not in ("sgd", "yogi", "adagrad", "lamb"))
# Optimizers with weight decay apart from the gradient.
DECAYING = ("adamw", "nadamw", "lamb", "lion")
SCHEDULES = ("constant", "cosine", "linear")
DTYPES = ("float32", "float64")
# The values of fields that are words, and the least ones of integers.
CHOICES = {
    **{"arch": ARCHITECTURES, "dataset": DATASETS, "optimizer": OPTIMIZERS},
    **{"schedule": SCHEDULES, "dtype": DTYPES, "loss": LOSSES},
}
LEAST = {
    **dict.fromkeys(("batch_size", "shift", "eval_every", "checkpoint_every", "eval_examples"), 0),
    **{"warmup": 0, "seed": 0, "steps": 1, "epochs": 1, "pool": 1},
}
DEFAULT_STEPS = 300
DEFAULT_KERNEL_TIME = 1e4
# What has no meaning where no steps of gradient descent are taken.
_OF_DESCENT = (
    *("momentum", "weight_decay", "sam_radius", "time_step", "lr", "depth_rate", "schedule"),
    *("warmup", "steps", "epochs", "batch_size", "shift", "eval_every", "checkpoint_every"),
)
EVALUATIONS = 20
EVALUATED_ON_THE_WAY = 2048

# What a resumed run may change: its length, how often it evaluates and saves, its devices.
RESUMABLE = ("steps", "epochs", "time", "eval_every", "eval_examples", "checkpoint_every", "mesh")
KERNEL_RESUMABLE = ("eval_examples", "mesh")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. None means: chosen from the rest, and said in the log.

    Attributes:
        arch: architecture, "mlp" or "cnn".
        depth: weight layers, at least 2.
        kernel_size: side of the CNN's filters, odd.
        dataset: "digits", "mnist", "fashion_mnist" or "toy"; digits and toy need no download.
        classes: classes to tell apart, or "all". Two classes are one output with targets 0 and 1.
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; None is 4 for the MNIST sets and 1
            otherwise.
        offset: in [0, 1): inputs are (1 - offset) x + offset instead of x, strictly positive as
            the theorems ask.
        scale: C; None is depth^2.2, the theorems' regime. May be infinite in the ntk form.
        rho, beta: standard deviations of the random weights and biases.
        init: initialization, "deep_narrow", "he_uniform" or "torch_default".
        features: draw of the layers' random units, "gaussian" (independent), "antithetic",
            "orthogonal" or "sobol"; a network of the others is nearer to the infinitely deep one.
        random_units: random units a layer, with rho and beta over the root of their number.
        parametrization: form to compute in, "ntk" or "standard".
        loss: "squared", the thesis's 1/2 mean ||f - y||^2, or "cross_entropy", in which outputs are
            logits and targets probabilities: one-hot rows, or 0 and 1 for two classes.
        label_smoothing: s in [0, 1): cross-entropy's targets y of k classes, of both splits, are
            (1 - s) y + s / k instead.
        optimizer: one of `OPTIMIZERS`. "kernel" finds the weights of gradient flow at ``time`` in
            closed form, as `dnntk.solve` does; sgd follows kernel time in steps; the others need
            ``lr`` or ``depth_rate`` and have no kernel time.
        momentum: momentum of sgd, in [0, 1).
        weight_decay: part of its value, times ``lr`` or ``depth_rate``, that a parameter loses in a
            step: towards the initial network in the ntk parametrization, towards 0 in the standard
            one. Only for `DECAYING`; None is the optimizer's own default.
        sam_radius: radius of sharpness-aware minimization (Foret et al. 2021), for any optimizer
            but sgd: a step takes its gradient this far uphill from the parameters, which costs a
            second gradient. Measured in the parametrization's own parameters, over all layers
            together; 0 turns it off.
        time_step: kernel time of a step; None is a safe fraction of 2 / lambda_max.
        lr: raw learning rate, instead of ``time_step``: on the thesis's matrices for sgd, on the
            parametrization's own parameters for the other optimizers.
        depth_rate: learning rate times sqrt(depth), instead of ``lr``: one value for all depths at
            one scale C. Only in the ntk parametrization, and for optimizers that divide a gradient
            by its size (`NORMALIZING`); sgd's ``time_step`` serves all depths as it is.
        schedule: factor of the step size during the run: "constant" is 1; "cosine" and "linear"
            fall from 1 to 0.
        warmup: steps at the start over which the step size rises from 0.
        steps: steps to train; None is `DEFAULT_STEPS`, unless ``epochs`` or ``time`` is given.
        epochs: passes over the data to train for, instead of ``steps``.
        time: kernel time to train for, instead of ``steps``. With optimizer=kernel it may be
            infinite, and None is infinite with a ridge and `DEFAULT_KERNEL_TIME` without.
        ridge: weight decay of optimizer=kernel, in units of the eigenvalues of K/N.
        batch_size: examples a step, at most; 0 is all of them.
        shift: largest shift of a training image, in pixels before the average pool: every image of
            a step is moved at random (data augmentation); evaluations do not move images. 0 turns
            it off.
        eval_every: steps between evaluations; 0 is `EVALUATIONS` evaluations a run.
        checkpoint_every: steps between checkpoints; 0 is `EVALUATIONS` checkpoints a run.
        eval_examples: examples of each split in an evaluation, at most; 0 is
            `EVALUATED_ON_THE_WAY` during the run and all of them after the last step.
        dtype: floating-point type, "float32" or "float64".
        seed: seed of the split, the initialization and the shuffle.
        mesh: devices, as "data:4,depth:2": the batch is split over ``data``, the layers over
            ``depth``. Empty is as many as the batch keeps busy, all layers on each.

    Raises:
        InputError: a value is not as above, or two of them contradict each other.
    """

    arch: str = "mlp"
    depth: int = 1000
    kernel_size: int = 3
    dataset: str = "digits"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    offset: float = 0.0
    scale: float | None = None
    rho: float = 1.0
    beta: float = 1.0
    init: str = "deep_narrow"
    features: str = "gaussian"
    random_units: int = 1
    parametrization: str = "ntk"
    loss: str = "squared"
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float | None = None
    sam_radius: float = 0.0
    time_step: float | None = None
    lr: float | None = None
    depth_rate: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    steps: int | None = None
    epochs: int | None = None
    time: float | None = None
    ridge: float = 0.0
    batch_size: int = 512
    shift: int = 0
    eval_every: int = 0
    checkpoint_every: int = 0
    eval_examples: int = 0
    dtype: str = "float32"
    seed: int = 0
    mesh: str = ""

    def __post_init__(self) -> None:
        """Convert every field, and check everything that needs no data."""
        fields.convert(self)
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}: expected an integer of at least {least}, got {value}")
        for name in ("time_step", "lr", "depth_rate", "time"):
            value = getattr(self, name)
            if name == "time" and value == math.inf and self.optimizer == "kernel":
                continue
            if value is not None and not 0 < value < math.inf:
                kind = (
                    "number" if name == "time" and self.optimizer == "kernel" else "finite number"
                )
                raise InputError(f"{name}: expected a {kind} above 0, got {value}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum: expected a number in [0, 1), got {self.momentum}")
        self._check_data()
        self._check_loss()
        if self.optimizer == "kernel":
            self._check_kernel()
        else:
            fields.without_effect(
                self, ["ridge"], f"on optimizer={self.optimizer}, give optimizer=kernel"
            )
            self._check_optimizer()
        if sum(value is not None for value in (self.steps, self.epochs, self.time)) > 1:
            raise InputError("steps, epochs, time: expected at most one of them, got several")
        pipeline.parse_mesh(self.mesh)
        self.model(d_out=1)

    def _check_data(self) -> None:
        if isinstance(self.classes, str) and self.classes != "all":
            raise InputError(
                f"classes: expected 'all' or integers like (0, 1), got {brief(self.classes)}"
            )
        if not 0 <= self.offset < 1:
            raise InputError(f"offset: expected a number in [0, 1), got {self.offset:g}")
        if self.arch == "cnn" and self.dataset == "toy":
            raise InputError("dataset: toy has no images for arch=cnn; use arch=mlp")
        if self.shift and self.dataset == "toy":
            raise InputError(f"shift: toy has no images to move, got {self.shift}; leave it out")
        if self.dataset not in CLASS_NAMES:
            fields.without_effect(
                self,
                ["data_dir"],
                f"on dataset={self.dataset}, which is read from no folder (dataset="
                f"{' and '.join(CLASS_NAMES)} are)",
            )
        if self.dataset == "toy":
            fields.without_effect(self, ["classes"], "on dataset=toy, which has none")
        if self.arch == "mlp":
            fields.without_effect(self, ["kernel_size"], "on arch=mlp, which has no filters")
        if self.init != "deep_narrow":
            fields.without_effect(
                self, ["rho", "beta"], f"on init={self.init}, which has a deviation of its own"
            )

    def _check_loss(self) -> None:
        if self.loss == "squared":
            fields.without_effect(self, ["label_smoothing"], "on loss=squared")
        elif self.dataset == "toy":
            raise InputError(f"loss: toy has no classes for loss={self.loss}; use loss=squared")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}"
            )

    def _check_kernel(self) -> None:
        fields.without_effect(
            self, _OF_DESCENT, "on optimizer=kernel, which takes no steps of descent"
        )
        for name, needed in (
            *(("init", "deep_narrow"), ("parametrization", "ntk")),
            ("loss", "squared"),
        ):
            if (value := getattr(self, name)) != needed:
                raise InputError(
                    f"{name}: optimizer=kernel needs {needed}, got {value}; leave {name} out"
                )
        if not 0 <= self.ridge < math.inf:
            raise InputError(f"ridge: expected a finite number >= 0, got {self.ridge}")

    def _check_optimizer(self) -> None:
        rates = [name for name in ("lr", "time_step", "depth_rate") if getattr(self, name)]
        if len(rates) > 1:
            raise InputError(f"{', '.join(rates)}: expected at most one of them, got several")
        if self.depth_rate is not None:
            self._check_depth_rate()
        if self.weight_decay is not None:
            if self.optimizer not in DECAYING:
                raise InputError(
                    f"weight_decay: only optimizer={'|'.join(DECAYING)} takes it, "
                    f"got {self.optimizer}"
                )
            if not 0 <= self.weight_decay < math.inf:
                raise InputError(
                    f"weight_decay: expected a finite number from 0 on, got {self.weight_decay}"
                )
        if not 0 <= self.sam_radius < math.inf:
            raise InputError(
                f"sam_radius: expected a finite number from 0 on, got {self.sam_radius}"
            )
        if self.sam_radius and self.optimizer == "sgd":
            raise InputError(
                "sam_radius: optimizer=sgd follows kernel time, which a gradient taken elsewhere "
                f"does not, got {self.sam_radius}; give another optimizer"
            )
        if self.optimizer != "sgd":
            if self.momentum:
                raise InputError(f"momentum: only optimizer=sgd takes it, got {self.optimizer}")
            if self.lr is None and self.depth_rate is None:
                raise InputError(f"depth_rate: optimizer={self.optimizer} needs it or lr; try 0.02")
            if self.time is not None:
                raise InputError(
                    f"time: optimizer={self.optimizer} has no kernel time; give steps or epochs"
                )
        elif self.lr is not None and self.scale is not None and math.isinf(self.scale):
            raise InputError("lr: an infinite scale has no raw learning rate; give time_step")
        if self.time is not None and self.scheduled:
            raise InputError(
                f"time: expected schedule=constant without warmup, got schedule={self.schedule}, "
                f"warmup={self.warmup}; give steps or epochs"
            )

    def _check_depth_rate(self) -> None:
        if self.optimizer not in NORMALIZING:
            instead = "time_step, which serves all depths" if self.optimizer == "sgd" else "lr"
            raise InputError(
                f"depth_rate: expected optimizer={'|'.join(NORMALIZING)}, got {self.optimizer}; "
                f"give {instead}"
            )
        if self.parametrization != "ntk":
            raise InputError(
                f"depth_rate: expected parametrization=ntk, got {self.parametrization}; give "
                "lr = depth_rate / (depth C), which is the same step"
            )

    @property
    def scheduled(self) -> bool:
        """Do the steps change in the course of the run?"""
        return self.schedule != "constant" or self.warmup > 0

    @property
    def time_or_default(self) -> float:
        """Kernel time of a run in closed form."""
        if self.time is not None:
            return self.time
        return math.inf if self.ridge else DEFAULT_KERNEL_TIME

    @property
    def resumable(self) -> tuple[str, ...]:
        """The fields that a resumed run may change."""
        return KERNEL_RESUMABLE if self.optimizer == "kernel" else RESUMABLE

    @property
    def scale_or_default(self) -> float:
        """C, depth^2.2 unless given."""
        return float(self.depth) ** 2.2 if self.scale is None else self.scale

    @property
    def pool_or_default(self) -> int:
        """The thesis pools MNIST to 7 x 7; nothing else is pooled."""
        if self.pool is not None:
            return self.pool
        return 4 if self.dataset in CLASS_NAMES else 1

    def model(self, d_out: int) -> models.DeepNarrow:
        """The flax module of this run."""
        kind = models.DeepNarrowMLP if self.arch == "mlp" else models.DeepNarrowCNN
        extra: dict[str, Any] = {} if self.arch == "mlp" else {"kernel_size": self.kernel_size}
        return kind(
            depth=self.depth,
            d_out=d_out,
            scale=self.scale_or_default,
            rho=self.rho,
            beta=self.beta,
            initialization=self.init,
            parametrization=self.parametrization,
            features=self.features,
            random_units=self.random_units,
            **extra,
        )

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON holds it; infinity as text."""
        return as_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`; other keys are ignored.

        Raises:
            InputError: a field is missing, of the wrong type or not valid, or the run had data of
                the user's own.
        """
        if "own" in content:
            raise InputError(
                "config.json: expected one of dnntk's datasets, got a run on data of your own; go "
                "on with it from Python, by dnntk.train(config, workdir, dataset=..., resume=True)"
            )
        # Fields that earlier versions did not have.
        added = "schedule warmup mesh shift features random_units ridge offset depth_rate loss"
        added += " label_smoothing"
        content = {name: getattr(cls, name) for name in added.split()} | content
        try:
            values = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            for name in ("scale", "time"):  # infinity is text
                if values[name] is not None:
                    values[name] = float(values[name])
            if not isinstance(values["classes"], str):
                values["classes"] = tuple(int(c) for c in values["classes"])
            return cls(**values)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"config.json: expected a run's fields, problem with {error}"
            ) from None


def parse_classes(text: str) -> tuple[int, ...] | str:
    """``all``, or integers separated by commas.

    Raises:
        InputError: it is neither.
    """
    if text == "all":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"classes: expected 'all' or integers like 0,1, got {text!r}") from None
