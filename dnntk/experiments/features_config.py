"""The configuration of `dnntk.experiments.features`."""

import dataclasses

from dnntk.checks import check_choice, check_count
from dnntk.errors import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)
from dnntk.networks.random_units import FEATURES
from dnntk.runs import fields

__all__ = ["CASES", "FeaturesConfig"]

# The architecture and the dataset of each case.
CASES = {"toy": ("mlp", "toy"), "digits": ("mlp", "digits"), "digits_cnn": ("cnn", "digits")}


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Settings of the comparison of draws of random units.

    Attributes:
        case: data and architecture, "toy", "digits" (an MLP), "digits_cnn" or "all".
        features: draw of the layers' random units, "gaussian", "antithetic", "orthogonal",
            "sobol" or "all".
        depths: depths of the networks, ascending. Sobol points are most even at 2^k + 2.
        random_units: numbers of random units of a layer, M: a kernel averages over about depth
            times M.
        trials: independent networks of each depth and draw.
        examples: largest number of training examples, and of held-out ones.
        time: kernel time at which predictions are compared.
        trained_depths: depths at which networks are also trained, at C = depth^2.2; none is "".
        trained: networks of each draw that are trained at each of these depths.
        seed: seed of the split and of the draws.
    """

    case: str = "all"
    features: str = "all"
    depths: tuple[int, ...] = (18, 34, 66, 130, 258, 514, 1026, 2050, 4098)
    random_units: tuple[int, ...] = (1,)
    trials: int = 10
    examples: int = 60
    time: float = 100.0
    trained_depths: tuple[int, ...] = (66,)
    trained: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_choice("case", self.case, (*CASES, "all"))
        check_choice("features", self.features, (*FEATURES, "all"))
        for name in ("depths", "trained_depths"):
            depths = getattr(self, name)
            if depths or name == "depths":
                check_depths(name, depths)
            if min(depths, default=3) < 3:
                raise InputError(
                    f"{name}: expected at least 3 layers, so that one has a random unit that the "
                    f"kernel averages over, got {depths}"
                )
        if list(self.depths) != sorted(self.depths):
            raise InputError(f"depths: expected ascending numbers, got {self.depths}")
        for name in ("trials", "examples", "trained"):
            check_count(name, getattr(self, name))
        check_each_once("random_units", self.random_units)
        for count in self.random_units:
            check_count("random_units", count)
        check_positive(self, "time")
        check_at_least(self, 0, "seed")
        if self.trained > self.trials:
            raise InputError(
                f"trained: expected at most the {self.trials} networks of trials, got "
                f"{self.trained}; lower it, or raise trials"
            )

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases, in order."""
        return tuple(CASES) if self.case == "all" else (self.case,)

    @property
    def draws(self) -> tuple[str, ...]:
        """The draws of random units, in order."""
        return FEATURES if self.features == "all" else (self.features,)
