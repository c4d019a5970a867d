"""The configuration of `dnntk.experiments.regimes`."""

import dataclasses
import os

from dnntk.checks import check_choice, check_count, check_deviation
from dnntk.errors import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)
from dnntk.runs import fields
from dnntk.training.config import ARCHITECTURES, TrainConfig

__all__ = ["DATASETS", "RegimesConfig"]

DATASETS = ("digits", "mnist", "fashion_mnist")


@dataclasses.dataclass(frozen=True)
class RegimesConfig:
    """Settings of the plane of depth L and scale C.

    Attributes:
        arch: "mlp", "cnn" or "all".
        depths: depths of the networks.
        scales: values of C at every depth; those above depth^power are left out.
        power: the largest C at each depth is depth to this power.
        trials: independent networks at each depth; those of all C have the same random units.
        examples: largest number of training examples, and of held-out ones.
        time: kernel time of training.
        records: times after 0, evenly spaced, at which networks are measured.
        rho, beta: standard deviations of the Gaussian weights (times sqrt(d_in) in an MLP) and
            biases (over C).
        offset: inputs are (1 - offset) x + offset, strictly positive as the theorems ask; 0 leaves
            dark pixels at the ReLU's kink.
        dataset: one of digits, mnist, fashion_mnist.
        classes: classes to tell apart, or "all".
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets.
        pool: side of the average pool over the images; 4 makes the MNIST sets 7 x 7.
        fit_from: least C of the networks to which powers are fitted.
        seed: seed of the split and of the networks.
    """

    arch: str = "all"
    depths: tuple[int, ...] = (100, 500, 2000, 10_000)
    scales: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0)
    power: float = 2.2
    trials: int = 10
    examples: int = 6
    time: float = 1.0
    records: int = 3
    rho: float = 1.0
    beta: float = 1.0
    offset: float = 0.1
    dataset: str = "digits"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int = 2
    fit_from: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; the data's are checked when they are read."""
        fields.convert(self)
        check_choice("arch", self.arch, (*ARCHITECTURES, "all"))
        check_depths("depths", self.depths)
        if min(self.depths) < 3:
            raise InputError(f"depths: expected at least 3 layers, got {self.depths}")
        check_each_once("scales", self.scales)
        check_positive(self, "scales", "power", "time", "fit_from")
        for name in ("trials", "examples", "records"):
            check_count(name, getattr(self, name))
        for name in ("rho", "beta"):
            check_deviation(name, getattr(self, name))
        check_at_least(self, 0, "seed")
        check_choice("dataset", self.dataset, DATASETS)
        self.data  # noqa: B018 - TrainConfig checks the rest

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures, in order."""
        return ARCHITECTURES if self.arch == "all" else (self.arch,)

    @property
    def data(self) -> TrainConfig:
        """The configuration whose dataset this is."""
        names = ("dataset", "classes", "data_dir", "pool", "offset", "seed")
        return TrainConfig(arch="cnn", **{name: getattr(self, name) for name in names})

    @property
    def cells(self) -> list[tuple[int, float]]:
        """(depth, C), in order."""
        return [
            (depth, scale)
            for depth in self.depths
            for last in [float(depth) ** self.power]
            for scale in (*(scale for scale in self.scales if scale < last), last)
        ]
