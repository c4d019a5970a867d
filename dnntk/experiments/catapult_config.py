"""The configuration of `dnntk.experiments.catapult`."""

import dataclasses
import os

from dnntk.checks import check_choice, check_count
from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_depths, check_each_once, check_positive
from dnntk.runs import fields
from dnntk.training.config import TrainConfig

__all__ = ["LABELLED", "CatapultConfig"]

# Datasets with classes, for the test accuracy.
LABELLED = ("digits", "mnist", "fashion_mnist")


@dataclasses.dataclass(frozen=True)
class CatapultConfig:
    """Settings of the runs at steps beyond the largest stable one.

    Attributes:
        arch: architecture, "mlp" or "cnn".
        dataset: "digits", "mnist" or "fashion_mnist".
        classes: classes to tell apart, or "all". Two classes are one output with targets 0 and 1.
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; None is as in `TrainConfig`.
        depths: depths of the networks, ascending.
        scales: values of C, ascending.
        ratios: time_step times lambda_max(K / N) of a network's own kernel at the start, ascending;
            without change of the kernel gradient descent converges below 2 and diverges above.
        trials: independent networks of every depth and C.
        examples: largest number of training examples.
        steps: steps of full-batch gradient descent.
        rho, beta: standard deviations of the random weights and biases.
        seed: seed of the split and of the initializations.

    Raises:
        InputError: a value is not as above.
    """

    arch: str = "mlp"
    dataset: str = "digits"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = 2
    depths: tuple[int, ...] = (10, 100, 1000)
    scales: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    ratios: tuple[float, ...] = (0.5, 1.5, 2.2, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    trials: int = 10
    examples: int = 40
    steps: int = 150
    rho: float = 1.0
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_choice("dataset", self.dataset, LABELLED)
        check_depths("depths", self.depths)
        for name in ("scales", "ratios"):
            check_each_once(name, getattr(self, name))
        check_positive(self, "scales", "ratios")
        for name in ("depths", "scales", "ratios"):
            if list(values := getattr(self, name)) != sorted(values):
                raise InputError(f"{name}: expected ascending numbers, got {values}")
        for name in ("trials", "examples", "steps"):
            check_count(name, getattr(self, name))
        self.network(self.depths[0], self.scales[0])  # TrainConfig checks the rest

    def network(self, depth: int, scale: float) -> TrainConfig:
        """The network of one depth and C, and its data."""
        shared = ("arch", "dataset", "classes", "data_dir", "pool", "rho", "beta", "seed")
        return TrainConfig(
            depth=depth, scale=scale, **{name: getattr(self, name) for name in shared}
        )
