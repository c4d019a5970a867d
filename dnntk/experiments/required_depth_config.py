"""The configuration of `dnntk.experiments.required_depth`."""

import dataclasses
import os

from dnntk.checks import check_choice, check_count
from dnntk.data.mnist import CLASS_NAMES
from dnntk.errors import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)
from dnntk.runs import fields
from dnntk.training.config import TrainConfig

__all__ = ["PROBLEMS", "RequiredDepthConfig"]

# The dataset and the classes of each problem.
PROBLEMS: dict[str, tuple[str, tuple[int, ...] | str]] = {
    "digits_01": ("digits", (0, 1)),
    "digits": ("digits", "all"),
    "mnist_01": ("mnist", (0, 1)),
    "mnist": ("mnist", "all"),
    "fashion_mnist_01": ("fashion_mnist", (0, 1)),
    "fashion_mnist": ("fashion_mnist", "all"),
}


@dataclasses.dataclass(frozen=True)
class RequiredDepthConfig:
    """Settings of the search for the depth at which networks are near their limit.

    Attributes:
        datasets: "digits", "mnist" or "fashion_mnist" with ten classes, or with two, of numbers 0
            and 1: "digits_01", "mnist_01" or "fashion_mnist_01".
        arch: architecture, "mlp" or "cnn".
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; None is 4 for the MNIST sets and 1
            otherwise.
        train_examples: largest numbers of training examples.
        test_examples: largest number of held-out examples to compare on.
        times: kernel times, ascending.
        epsilons: relative distances from the limit that networks are to keep.
        depths: depths of the networks that are linear in their parameters (C infinite),
            ascending. Sobol points are most even at 2^k + 2.
        trials: independent networks of each depth.
        trained: number of predicted depths at which networks are also trained in closed form, at
            C = depth^2.2: the deepest within ``depths``, with most training examples.
        samples: random units of which the prediction is made.
        rho, beta: standard deviations of the random weights and biases.
        seed: seed of the split, the initializations and the draws.
    """

    datasets: tuple[str, ...] = ("digits_01", "digits")
    arch: str = "mlp"
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    train_examples: tuple[int, ...] = (30, 120, 240)
    test_examples: int = 400
    times: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
    epsilons: tuple[float, ...] = (0.01, 0.1)
    depths: tuple[int, ...] = (6, 18, 66, 258, 1026, 4098)
    trials: int = 20
    trained: int = 3
    samples: int = 4096
    rho: float = 1.0
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        for name in self.datasets:
            check_choice("datasets", name, tuple(PROBLEMS))
        for field in ("datasets", "train_examples", "times", "epsilons"):
            check_each_once(field, getattr(self, field))
        check_depths("depths", self.depths)
        check_positive(self, "times", "epsilons")
        for field in ("depths", "times"):
            if list(getattr(self, field)) != sorted(getattr(self, field)):
                raise InputError(
                    f"{field}: expected ascending numbers, got {getattr(self, field)}; sort them"
                )
        for count in self.train_examples:
            check_count("train_examples", count)
        for field in ("test_examples", "trials", "samples"):
            check_count(field, getattr(self, field))
        check_at_least(self, 0, "trained", "seed")
        if not any(PROBLEMS[name][0] in CLASS_NAMES for name in self.datasets):
            named = ", ".join(self.datasets)
            fields.without_effect(self, ["data_dir"], f"on {named}, read from no folder")
        for name in self.datasets:  # TrainConfig checks the rest
            self.network(name, self.depths[0], "gaussian")

    def network(self, problem: str, depth: int, features: str) -> TrainConfig:
        """The network of one depth, in the theorems' regime, and its data."""
        dataset, classes = PROBLEMS[problem]
        return TrainConfig(
            arch=self.arch,
            depth=depth,
            dataset=dataset,
            classes=classes,
            data_dir=self.data_dir if dataset in CLASS_NAMES else None,
            pool=self.pool,
            seed=self.seed,
            rho=self.rho,
            beta=self.beta,
            features=features,
        )
