"""The configuration of `dnntk.experiments.limit_convergence`."""

import dataclasses
import os
from typing import Any

from dnntk.checks import check_choice, check_count
from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_depths, check_each_once, check_positive
from dnntk.runs import fields
from dnntk.training.config import ARCHITECTURES, DTYPES, TrainConfig

__all__ = ["LimitConfig"]


@dataclasses.dataclass(frozen=True)
class LimitConfig:
    """Settings of the comparison of finite networks with their limit.

    Attributes:
        arch: architecture, "mlp", "cnn" or "both".
        dataset: "digits", "mnist", "fashion_mnist" or (MLP only) "toy".
        classes: classes to tell apart, or "all". Two classes are one output with targets 0 and 1.
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; None is 4 for the MNIST sets and 1
            otherwise.
        train_examples: largest number of training examples.
        test_examples: largest number of held-out examples to compare on.
        depths: depths of the networks; C = depth^2.2.
        trials: independent initializations of every network.
        optimizer: "sgd" trains by gradient descent in small steps, "kernel" in closed form, to
            any time.
        times: kernel times to compare at. With sgd the first is a whole number of steps; the
            others are rounded to whole steps.
        time_step: kernel time of a step of sgd; None is half of the largest stable step,
            2 / lambda_max of the limit's kernel on the training examples.
        rho, beta: standard deviations of the random weights and biases.
        kernel_size: side of the CNN's filters, odd.
        draws: number of linear networks per depth over which theory's difference is averaged.
        dtype: floating-point type of the trained networks; the theory is always float64.
        seed: seed of the split, the initializations and the draws.
    """

    arch: str = "both"
    dataset: str = "digits"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    train_examples: int = 120
    test_examples: int = 120
    depths: tuple[int, ...] = (30, 100, 300, 1000)
    trials: int = 4
    optimizer: str = "sgd"
    times: tuple[float, ...] = (10.0, 20.0)
    time_step: float | None = None
    rho: float = 1.0
    beta: float = 1.0
    kernel_size: int = 3
    draws: int = 64
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_choice("arch", self.arch, (*ARCHITECTURES, "both"))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("optimizer", self.optimizer, ("sgd", "kernel"))
        if self.optimizer == "kernel":
            fields.without_effect(self, ["time_step"], "on optimizer=kernel, which takes no steps")
        check_depths("depths", self.depths)
        check_each_once("times", self.times)
        check_positive(self, "times", "time_step")
        if list(self.times) != sorted(self.times):
            raise InputError(f"times: expected ascending numbers, got {self.times}")
        for name in ("train_examples", "test_examples", "trials", "draws"):
            check_count(name, getattr(self, name))
        if self.arch == "mlp":
            fields.without_effect(self, ["kernel_size"], "on arch=mlp, which has no filters")
        for arch in self.archs:  # TrainConfig checks the rest
            self.network(arch, self.depths[0])

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures, in order."""
        return ARCHITECTURES if self.arch == "both" else (self.arch,)

    @property
    def kernel_options(self) -> dict[str, Any]:
        """Keyword arguments of the limit's kernels and predictions."""
        return {"rho": self.rho, "beta": self.beta, "kernel_size": self.kernel_size}

    def network(self, arch: str, depth: int) -> TrainConfig:
        """The network of one depth, in the theorems' regime, and its data."""
        return TrainConfig(
            arch=arch,
            depth=depth,
            dataset=self.dataset,
            classes=self.classes,
            data_dir=self.data_dir,
            pool=self.pool,
            seed=self.seed,
            rho=self.rho,
            beta=self.beta,
            kernel_size=self.kernel_size if arch == "cnn" else TrainConfig.kernel_size,
        )
