"""The configuration of `dnntk.experiments.cross_entropy`."""

import dataclasses

from dnntk.checks import check_count
from dnntk.errors import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)
from dnntk.runs import fields
from dnntk.training.config import TrainConfig

__all__ = ["CrossEntropyConfig"]


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """Settings of the experiment on Theorem 3.2 with another loss than squared error.

    Attributes:
        smoothings: label smoothings, each in [0, 1).
        depths: depths of the networks.
        power: C is depth to this power. The theorem asks for more than 2, where kernels move by
            less than rounding from a depth of a few hundred on.
        trials: independent networks of each depth and smoothing.
        examples: largest number of training examples, and of held-out ones.
        classes: classes of the digits to tell apart, or "all".
        times: kernel times, ascending, at which networks are measured; training ends at the last.
        fraction: of the largest stable step that training takes, by the limit's own curvature.
        seed: seed of the split and of the networks.
    """

    smoothings: tuple[float, ...] = (0.0, 0.01, 0.1)
    depths: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    power: float = 1.0
    trials: int = 10
    examples: int = 6
    classes: tuple[int, ...] | str = (0, 1)
    times: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_depths("depths", self.depths)
        check_each_once("smoothings", self.smoothings)
        check_positive(self, "times", "power", "fraction")
        if not self.times or list(self.times) != sorted(set(self.times)):
            raise InputError(f"times: expected ascending numbers, got {self.times}")
        if self.fraction >= 1:
            raise InputError(f"fraction: expected a number below 1, got {self.fraction:g}")
        for name in ("trials", "examples"):
            check_count(name, getattr(self, name))
        check_at_least(self, 0, "seed")
        if not all(0 <= smoothing < 1 for smoothing in self.smoothings):
            raise InputError(f"smoothings: expected numbers in [0, 1), got {self.smoothings}")
        self.run(0.0)  # checks the classes

    def run(self, smoothing: float) -> TrainConfig:
        """A run of the same data and loss."""
        return TrainConfig(
            dataset="digits",
            classes=self.classes,
            pool=2,
            loss="cross_entropy",
            label_smoothing=smoothing,
            seed=self.seed,
        )
