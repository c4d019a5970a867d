"""The configuration of `dnntk.experiments.depth_transfer`."""

import dataclasses
import os
from typing import Any

from dnntk.checks import check_choice, check_count
from dnntk.data.mnist import CLASS_NAMES
from dnntk.errors import InputError
from dnntk.experiments.config_checks import (
    check_at_least,
    check_depths,
    check_each_once,
    check_positive,
)
from dnntk.experiments.residual import RESIDUAL, ResidualNetwork
from dnntk.networks.initializers import BASELINES
from dnntk.networks.models import DeepNarrow
from dnntk.runs import fields
from dnntk.training.config import ARCHITECTURES, NORMALIZING, TrainConfig

__all__ = ["IMAGES", "OWN", "DepthTransferConfig", "Kind"]

IMAGES = ("digits", *CLASS_NAMES)
# What an architecture has where the configuration says None. A layer of the CNN is 28 times the
# MLP's work, and its average over the image needs large random filters to tell images apart.
OWN: dict[str, dict[str, Any]] = {
    "mlp": {
        **{"depths": (10, 30, 100, 300, 1000, 3000), "sweep_depth": 300, "trial_depth": 1000},
        **{"deepest": 10_000, "examples": 64, "held_out": 32, "steps": 60},
        **{"rho": 1.0, "beta": 1.0},
        "time_steps": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
        "depth_rates": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    },
    "cnn": {
        **{"depths": (10, 18, 30, 56, 100, 300), "sweep_depth": 100, "trial_depth": 100},
        **{"deepest": 1000, "examples": 32, "held_out": 16, "steps": 100},
        **{"rho": 5.0, "beta": 5.0},
        "time_steps": (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
        "depth_rates": (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
    },
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """Networks that differ in depth, rate and draw alone."""

    arch: str
    init: str
    optimizer: str
    scale: float

    @property
    def name(self) -> str:
        """For files and the summary."""
        return f"{self.arch}-{self.init}-{self.optimizer}-C{fields.exact(self.scale)}"


@dataclasses.dataclass(frozen=True)
class DepthTransferConfig:
    """Settings of the comparison of depths at constant C. None: the architecture's own, in `OWN`.

    Attributes:
        arch: "mlp", "cnn" or "both".
        scales: values of C.
        optimizers: "sgd", which has a ``time_step``, and others that take a ``depth_rate``.
        baselines: networks to compare with, at C = 1: other initializations, or as wide networks
            with skips, "residual" and "depth_mup" (`dnntk.experiments.residual`); none is "".
        dataset, data_dir: as in `TrainConfig`; images, all ten classes.
        pool: side of the average pool over the images.
        rho, beta: standard deviations of the random weights and biases.
        features: as in `TrainConfig`.
        depths: depths of the networks, ascending.
        sweep_depth: largest depth at which every rate is tried; deeper networks take the one that
            is best at ``tune_depth``.
        trial_depth: largest depth of which ``trials`` networks are trained, and not one.
        tune_depth: the one of ``depths`` at which rates are chosen.
        deepest: depth of one more network, trained with the optimizer, C and rate that are best at
            ``tune_depth``; 0 is none.
        trials: independent networks.
        examples: training examples.
        held_out: examples on which outputs are compared.
        steps: steps of a run, each on all training examples.
        time_steps: rates of sgd to try.
        depth_rates: rates of other optimizers to try.
        seed: seed of the split and of the draws.
    """

    arch: str = "both"
    scales: tuple[float, ...] = (0.3, 1.0, 4.0)
    optimizers: tuple[str, ...] = ("sgd", "adam")
    baselines: tuple[str, ...] = ("he_uniform", *RESIDUAL)
    dataset: str = "digits"
    data_dir: str | os.PathLike[str] | None = None
    pool: int = 2
    rho: float | None = None
    beta: float | None = None
    features: str = "gaussian"
    depths: tuple[int, ...] | None = None
    sweep_depth: int | None = None
    trial_depth: int | None = None
    tune_depth: int = 30
    deepest: int | None = None
    trials: int = 10
    examples: int | None = None
    held_out: int | None = None
    steps: int | None = None
    time_steps: tuple[float, ...] | None = None
    depth_rates: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_choice("arch", self.arch, (*ARCHITECTURES, "both"))
        for name, allowed in (
            ("optimizers", ("sgd", *NORMALIZING)),
            ("baselines", (*BASELINES, *RESIDUAL)),
        ):
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        check_positive(self, "scales", "time_steps", "depth_rates")
        check_choice("dataset", self.dataset, IMAGES)
        if self.deepest == 1:
            raise InputError("deepest: expected 0 for none, or a depth of at least 2, got 1")
        for name in ("scales", "optimizers", *(["baselines"] if self.baselines else [])):
            check_each_once(name, getattr(self, name))
        check_at_least(self, 0, "deepest", "seed", "sweep_depth", "trial_depth")
        for arch in self.archs:
            own = self.of(arch)
            check_depths("depths", own["depths"])
            if list(own["depths"]) != sorted(own["depths"]):
                raise InputError(f"depths: expected ascending numbers, got {own['depths']}")
            if self.tune_depth not in own["depths"] or self.tune_depth > own["sweep_depth"]:
                raise InputError(
                    f"tune_depth: expected one of depths={own['depths']} up to sweep_depth="
                    f"{own['sweep_depth']}, got {self.tune_depth}"
                )
            for name in ("examples", "held_out", "steps"):
                check_count(name, own[name])
            for name in ("time_steps", "depth_rates"):
                check_each_once(name, own[name])
            for kind in self.kinds(arch):
                self.run(kind, 2, 1.0)  # TrainConfig checks the rest
        check_count("trials", self.trials)

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures, in order."""
        return ARCHITECTURES if self.arch == "both" else (self.arch,)

    def of(self, arch: str) -> dict[str, Any]:
        """The fields of `OWN` for an architecture, as given or its own."""
        given = {name: getattr(self, name) for name in OWN[arch]}
        return OWN[arch] | {name: value for name, value in given.items() if value is not None}

    def kinds(self, arch: str) -> list[Kind]:
        """The kinds of networks of an architecture; baselines come last."""
        inits = [("deep_narrow", self.scales), *((init, (1.0,)) for init in self.baselines)]
        return [
            Kind(arch, init, optimizer, scale)
            for init, scales in inits
            for optimizer in self.optimizers
            for scale in scales
        ]

    def run(self, kind: Kind, depth: int, rate: float) -> TrainConfig:
        """The run of `dnntk.train` at a rate: sgd's ``time_step``, or a ``depth_rate``.

        Of a network with skips this is the run of a deep narrow one that takes as long steps.
        """
        own = self.of(kind.arch)
        more: dict[str, Any] = {"time_step" if kind.optimizer == "sgd" else "depth_rate": rate}
        if kind.init in BASELINES:
            more["init"] = kind.init
        else:
            more |= {"rho": own["rho"], "beta": own["beta"], "features": self.features}
        return TrainConfig(
            arch=kind.arch,
            depth=depth,
            dataset=self.dataset,
            classes="all",
            data_dir=self.data_dir,
            pool=self.pool,
            scale=kind.scale,
            optimizer=kind.optimizer,
            steps=own["steps"],
            batch_size=0,
            seed=self.seed,
            **more,
        )

    def network(self, kind: Kind, depth: int, d_out: int) -> DeepNarrow | ResidualNetwork:
        """The Flax module."""
        if kind.init in RESIDUAL:
            return ResidualNetwork(depth, d_out, RESIDUAL[kind.init])
        return self.run(kind, depth, 1.0).model(d_out)

    def rates(self, kind: Kind) -> tuple[float, ...]:
        """The rates to try."""
        own = self.of(kind.arch)
        found: tuple[float, ...] = own["time_steps" if kind.optimizer == "sgd" else "depth_rates"]
        return found
