"""Section 5.2's runs: figure 4.2, table 4.1's rows, small-C runs that reach their accuracies."""

import dataclasses
import os
from typing import Any

from dnntk.checks import check_choice, check_count
from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_at_least, check_positive
from dnntk.networks.initializers import INITS
from dnntk.runs import fields
from dnntk.training.config import ARCHITECTURES, DESCENTS, TrainConfig

__all__ = ["Preset", "TrainabilityConfig", "row_of", "runs_of"]

FIGURE = "figure-4.2"
EVALUATIONS = 24


@dataclasses.dataclass(frozen=True)
class Preset:
    """A long run and the thesis's results for it (None if the run is not the thesis's).

    ``train_mse`` is the mean over examples and outputs, as in the published code: 2 / d_out times
    the loss.
    """

    config: TrainConfig
    train_mse: float | None = None
    test_accuracy: float | None = None


# A small C reaches accuracies that the kernel regime does not reach in reasonable time: the network
# learns features, and large random weights distinguish images that global pooling makes alike.
_SMALL_C = TrainConfig(
    dataset="mnist", classes="all", scale=1.0, optimizer="adam", lr=2e-3, schedule="cosine"
)


def _row(lr: float, d_out: int, scale: float, **fields: Any) -> TrainConfig:
    # The published gradient is 2 / d_out times the thesis's.
    step = lr * fields["depth"] * scale**2 * 2 / d_out
    return TrainConfig(dataset="mnist", scale=scale, time_step=step, **fields)


PRESETS = {
    "mlp-4000": Preset(
        _row(1e-5, 10, 4.0, arch="mlp", depth=4000, classes="all", pool=1, epochs=1500),
        0.0055,
        0.9748,
    ),
    "cnn-4000": Preset(
        _row(1e-5, 10, 4.0, arch="cnn", depth=4000, classes="all", rho=3**-0.5, epochs=2000),
        0.014578,
        0.9402,
    ),
    "cnn-20000-binary": Preset(
        _row(1e-8, 1, 20.0, arch="cnn", depth=20_000, rho=3**-0.5, epochs=1000), 0.031257, 0.9887
    ),
    # From the published code's README; its rho is 1/3. It takes 1000 epochs of 25 steps at rate
    # 1e-8: 864 of kernel time, here in closed form.
    "cnn-12000-binary": Preset(
        TrainConfig(
            arch="cnn",
            depth=12_000,
            dataset="mnist",
            scale=12.0,
            rho=1 / 3,
            optimizer="kernel",
            time=864.0,
        )
    ),
    "mlp-4000-small-c": Preset(
        dataclasses.replace(
            _SMALL_C,
            arch="mlp",
            depth=4000,
            scale=0.3,
            optimizer="adamw",
            weight_decay=0.3,
            lr=3e-4,
            warmup=100,
            batch_size=128,
            shift=1,
            steps=17_000,
        )
    ),
    "cnn-1000-small-c": Preset(
        dataclasses.replace(
            _SMALL_C,
            arch="cnn",
            depth=1000,
            rho=5.0,
            beta=5.0,
            lr=1.5e-3,
            warmup=50,
            batch_size=128,
            steps=7000,
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainabilityConfig:
    """Figure 4.2, or a row of table 4.1.

    Attributes:
        preset: "figure-4.2", or one of `PRESETS`: a row of table 4.1, or a run at a small C that
            learns features, sized for two cores.
        dataset, data_dir, offset: as in `TrainConfig`.
        pool: side of the average pool over the images; None is the preset's own, which leaves
            28 x 28 pixels to the thesis's MLPs and 7 x 7 to its CNNs.
        depth: weight layers; None is the preset's own, 1000 for the figure.
        scale: C; None is the preset's own, the table's C = 4 for the figure.
        rho, beta: standard deviations of the random weights and biases; None is the preset's own:
            for the figure rho = 1 (CNN: 1/sqrt 3) and beta = 1.
        time_step: kernel time of a step of a row; None is the preset's own, for the table's rows
            the thesis's learning rate. At C = 4 this step is larger than the initial kernel allows.
        epochs: passes over the data of a row; None is the preset's own.
        archs: architectures of the figure.
        inits: initializations of the figure.
        rates: learning rates of the figure, on the literal matrices; "deep_narrow" is also run with
            the step that its kernel allows.
        optimizer: optimizer of the figure's runs; the thesis's is sgd. For the others the kernel
            gives no step size; they work best at a small C.
        steps: number of steps of each of the figure's runs.
        batch_size: examples per step; None is the preset's own, 512 for the thesis's.
        shift: as in `TrainConfig`; None is the preset's own: 0, but 1 for the MLP at a small C.
        budget_minutes: total time of all runs, which take as many steps as fit; 0 is no limit.
        limit_examples: largest number of training examples for the limit that a row is compared
            with; 0 skips the limit.
        eval_examples: as in `TrainConfig`.
        dtype, seed: as in `TrainConfig`.

    Raises:
        InputError: a value is not as above.
    """

    preset: str = FIGURE
    dataset: str = "mnist"
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    offset: float = 0.0
    depth: int | None = None
    scale: float | None = None
    rho: float | None = None
    beta: float | None = None
    time_step: float | None = None
    epochs: int | None = None
    archs: tuple[str, ...] = ARCHITECTURES
    inits: tuple[str, ...] = INITS
    rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
    optimizer: str = "sgd"
    steps: int = 500
    batch_size: int | None = None
    shift: int | None = None
    budget_minutes: float = 0.0
    limit_examples: int = 4000
    eval_examples: int = 0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check everything that needs no data."""
        fields.convert(self)
        check_choice("preset", self.preset, (FIGURE, *PRESETS))
        check_choice("optimizer", self.optimizer, DESCENTS)
        for name, values, allowed in (
            ("archs", self.archs, ARCHITECTURES),
            ("inits", self.inits, INITS),
        ):
            if not values:
                raise InputError(f"{name}: expected some of {', '.join(allowed)}, got none")
            for value in values:
                check_choice(name, value, allowed)
        check_positive(self, "rates")
        check_count("steps", self.steps)
        counts = ("batch_size", "shift", "limit_examples", "eval_examples", "seed")
        check_at_least(self, 0, *counts, "budget_minutes")
        if self.preset == FIGURE:
            fields.without_effect(self, _ROW_FIELDS, "on the figure's runs")
        else:
            fields.without_effect(self, _FIGURE_FIELDS, f"on preset={self.preset}")
        # TrainConfig checks each run, before anything is computed.
        _ = [config for _, config in runs_of(self)] if self.preset == FIGURE else row_of(self)


def _given(config: TrainabilityConfig, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


_SHARED = ("dataset", "data_dir", "offset", "batch_size", "shift", "eval_examples", "dtype", "seed")
_OWN = ("pool", "depth", "scale", "rho", "beta")
_ROW_FIELDS = ("epochs", "time_step", "limit_examples")
_FIGURE_FIELDS = ("archs", "inits", "rates", "optimizer", "steps")


def row_of(config: TrainabilityConfig) -> TrainConfig:
    """The run of a row of table 4.1; another depth or C keeps the step in kernel time."""
    own = _given(config, (*_SHARED, *_OWN, "epochs", "time_step"))
    if "epochs" in own:
        own["steps"] = None
    return dataclasses.replace(PRESETS[config.preset].config, **own)


def runs_of(config: TrainabilityConfig) -> list[tuple[str, TrainConfig]]:
    """All runs of figure 4.2, as (name, run); of each architecture first the one without ``lr``."""
    found = []
    for arch in config.archs:
        fields: dict[str, Any] = {"depth": 1000, "scale": 4.0, "classes": "all"}
        fields |= {"rho": 3**-0.5} if arch == "cnn" else {}
        if config.pool is None and config.dataset != "digits" and arch == "mlp":
            fields["pool"] = 1
        fields |= _given(config, (*_SHARED, *_OWN)) | {"arch": arch, "steps": config.steps}
        fields["optimizer"] = config.optimizer
        fields["eval_every"] = max(1, config.steps // EVALUATIONS)
        if "deep_narrow" in config.inits and config.optimizer == "sgd":
            found.append((f"{arch} deep_narrow", TrainConfig(**fields)))
        for init in config.inits:
            # Literal matrices have no scale C, and their learning rate is the ordinary one.
            literal = {"parametrization": "standard", "scale": 1.0, "rho": 1.0, "beta": 1.0}
            form = {} if init == "deep_narrow" else literal
            for rate in config.rates:
                values = fields | form | {"init": init, "lr": rate}
                found.append((f"{arch} {init} lr={rate:g}", TrainConfig(**values)))
    return found
