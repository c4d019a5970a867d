"""The configuration of the experiment, and its list of networks."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from dnntk.checks import check_choice, check_count, check_deviation
from dnntk.data.datasets import DATASETS
from dnntk.data.mnist import CLASS_NAMES
from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_at_least, check_each_once, check_positive
from dnntk.runs import fields
from dnntk.training.config import DTYPES, TrainConfig

__all__ = ["DepthOrWidthConfig", "NetworkSetting"]

# The toy task has no classes.
LABELLED = tuple(name for name in DATASETS if name != "toy")
# Examples to train on by default.
TRAIN_EXAMPLES = {"digits": 1000}
MANY_TRAIN_EXAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class DepthOrWidthConfig:
    """Settings of both parts: depth against width, and leaving the kernel regime.

    Attributes:
        datasets: datasets of part one, with all ten classes; part two uses the first one.
        data_dir: folder of raw IDX files or of prepared tensorflow-datasets, for the MNIST sets.
        pool: side of the average pool over the images; None is 4 for the MNIST sets and 1
            otherwise.
        train_examples: most training examples; None is 1000 for digits, 2000 for the MNIST sets.
        test_examples: largest number of test examples.
        probe_examples: kernels are compared on this many of the first test examples.
        depths: depths of the deep networks; each is compared with a wide network of as many
            parameters.
        trials: independent initializations of every network of part one.
        single_from: from this depth on, a network and the wide one of its size have only one
            initialization.
        times: kernel times to compare at, ascending, whole multiples of the first.
        small_scale: C of the deep networks' second rule; the first is depth^2.2.
        fraction: largest step over 2 / lambda_max of the network's initial kernel, for networks
            whose kernel should not move: deep ones with C = depth^2.2, and wide ones.
        moving_fraction: the same where the kernel may grow: the second rule, and all of part two.
        regime_depth: depth of the networks of part two.
        regime_time: kernel time of part two; features take longer than a fixed kernel.
        regime_batch_size: examples per step in part two; 0 is all of them.
        regime_scales: number of values of C in part two, spaced evenly on a log scale up to
            depth^2.2; infinity is added. 0 skips part two.
        least_scale: the smallest C of part two.
        regime_trials: independent initializations of each network of part two.
        rho, beta: standard deviations of the random weights and biases.
        dtype: floating-point type of the networks, "float32" or "float64"; limits are
            always float64.
        seed: seed of the split and of the first trial; the next trials take the next seeds.
    """

    datasets: tuple[str, ...] = ("digits",)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    train_examples: int | None = None
    test_examples: int = 2000
    probe_examples: int = 100
    depths: tuple[int, ...] = (30, 100, 300, 1000)
    trials: int = 3
    single_from: int = 300
    times: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    small_scale: float = 1.0
    fraction: float = 0.5
    moving_fraction: float = 0.25
    regime_depth: int = 100
    regime_time: float = 100.0
    regime_batch_size: int = 250
    regime_scales: int = 8
    least_scale: float = 1.0
    regime_trials: int = 1
    rho: float = 1.0
    beta: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        for name in self.datasets:
            check_choice("datasets", name, LABELLED)
        for field in ("datasets", "depths", "times"):
            check_each_once(field, getattr(self, field))
        if not set(self.datasets) & set(CLASS_NAMES):
            named = ", ".join(self.datasets)
            fields.without_effect(self, ["data_dir"], f"on {named}, read from no folder")
        self._check_times()
        names = ["test_examples", "probe_examples", "trials", "single_from", "regime_trials"]
        for name in names + ["train_examples"] * (self.train_examples is not None):
            check_count(name, getattr(self, name))
        check_at_least(self, 3, "probe_examples")
        check_positive(self, "small_scale", "regime_time")
        for name in ("fraction", "moving_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"{name}: expected a number between 0 and 1, got {getattr(self, name)}; steps "
                    "above 2 / lambda_max are unstable"
                )
        check_choice("dtype", self.dtype, DTYPES)
        for name in ("rho", "beta"):
            check_deviation(name, getattr(self, name))
        for part, depths in (("size", self.depths), ("regime", (self.regime_depth,))):
            for depth in depths:  # TrainConfig checks the rest
                self.network(NetworkSetting(part, self.datasets[0], "theorem", depth, 1.0))
        self._check_regime()

    def _check_times(self) -> None:
        times = self.times
        check_positive(self, "times")
        if list(times) != sorted(times):
            raise InputError(f"times: expected ascending numbers, got {times}")
        multiples = [t / times[0] for t in times]
        if any(abs(multiple - round(multiple)) > 1e-6 * multiple for multiple in multiples):
            raise InputError(f"times: expected whole multiples of the first, got {times}")

    def _check_regime(self) -> None:
        if self.regime_scales == 1 or self.regime_scales < 0:
            raise InputError(f"regime_scales: expected 0, or 2 or more, got {self.regime_scales}")
        most = self.scale(self.regime_depth)
        if self.regime_scales and not 0 < self.least_scale < most:
            raise InputError(
                f"least_scale: expected a number above 0 and below regime_depth^2.2 = {most:.4g}, "
                f"got {self.least_scale!r}"
            )

    @staticmethod
    def scale(depth: int) -> float:
        """C of the theorems' regime."""
        return float(depth) ** 2.2

    def train_examples_of(self, dataset: str) -> int:
        """Largest number of training examples."""
        return self.train_examples or TRAIN_EXAMPLES.get(dataset, MANY_TRAIN_EXAMPLES)

    def network(self, setting: "NetworkSetting") -> TrainConfig:
        """The deep network of a setting, and its data."""
        return TrainConfig(
            depth=setting.depth,
            dataset=setting.dataset,
            classes="all",
            data_dir=self.data_dir if setting.dataset in CLASS_NAMES else None,
            pool=self.pool,
            scale=setting.scale,
            rho=self.rho,
            beta=self.beta,
            batch_size=0 if setting.part == "size" else self.regime_batch_size,
            dtype=self.dtype,
            seed=self.seed + setting.trial,
        )

    def network_settings(self) -> list["NetworkSetting"]:
        """Every network of both parts, the small ones first."""
        found = []
        for dataset in self.datasets:
            for depth in sorted(self.depths):
                for trial in range(1 if depth >= self.single_from else self.trials):
                    scales = {"theorem": self.scale(depth), "small": self.small_scale, "wide": None}
                    found += [
                        NetworkSetting("size", dataset, rule, depth, scale, trial)
                        for rule, scale in scales.items()
                    ]
        if self.regime_scales:
            finite = np.geomspace(
                self.least_scale, self.scale(self.regime_depth), self.regime_scales
            )
            found += [
                NetworkSetting(
                    "regime", self.datasets[0], "regime", self.regime_depth, scale, trial
                )
                for trial in range(self.regime_trials)
                for scale in (*finite.tolist(), math.inf)
            ]
        return found

    def times_of(self, setting: "NetworkSetting") -> tuple[float, ...]:
        """Kernel times at which a setting's network is evaluated."""
        return self.times if setting.part == "size" else (self.regime_time,)

    def fraction_of(self, setting: "NetworkSetting") -> float:
        """A setting's largest step over 2 / lambda_max."""
        return self.fraction if setting.rule in ("theorem", "wide") else self.moving_fraction


@dataclasses.dataclass(frozen=True)
class NetworkSetting:
    """One network to train.

    Attributes:
        part: "size" (depth or width) or "regime" (leaving the kernel regime).
        dataset: name of the dataset.
        rule: "theorem" (C = depth^2.2), "small" (C fixed), "wide" (two layers), or "regime".
        depth: depth of the network; for a wide one, of the deep network with as many parameters.
        scale: C, or None for a wide network.
        trial: which initialization.
    """

    part: str
    dataset: str
    rule: str
    depth: int
    scale: float | None
    trial: int = 0

    @property
    def name(self) -> str:
        """The setting's name in files and logs."""
        scale = "" if self.scale is None else f"-scale{self.scale:.4g}"
        return f"{self.part}-{self.dataset}-{self.rule}-depth{self.depth}{scale}-trial{self.trial}"

    def fields(self) -> dict[str, Any]:
        """The setting's entries in a row."""
        return {"name": self.name, **dataclasses.asdict(self)}
