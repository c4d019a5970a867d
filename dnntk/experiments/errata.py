"""Where the printed theorems are wrong: printed and corrected kernel beside measured networks.

Theorems 3.1 and 4.1 state the limit of a freshly initialized network's scaled NTK as depth grows.
`errata` evaluates both limits as printed and as `dnntk.kernel.limit_ntk` corrects them. It measures
the kernels of finite networks by exact backpropagation in float64, and reports their mean over
initializations with its standard error.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_at_least
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.figures.errata import errata_figure
from dnntk.kernel import limit_ntk
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP
from dnntk.ntk.empirical import empirical_ntk
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar

__all__ = ["ErrataConfig", "Statement", "errata"]


@dataclasses.dataclass(frozen=True)
class ErrataConfig:
    """How the networks are measured.

    Attributes:
        depth: weight layers of every network; kernels scatter around the limit by
            O(1/sqrt(depth)).
        networks: number of initializations per statement.
        seed: seed of inputs and initializations.

    Raises:
        InputError: a value is not as above.
    """

    depth: int = 1000
    networks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        fields.convert(self)
        for name, least in (("depth", 3), ("networks", 2), ("seed", 0)):
            check_at_least(self, least, name)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A kernel entry Theta(x, x) that the thesis prints wrongly.

    ``shape`` is the shape of x, [d_in] or [H, W, c].
    """

    name: str
    setting: str
    shape: tuple[int, ...]
    d_out: int
    rho: float = 1.0
    beta: float = 1.0
    kernel_size: int = 3

    def network(self, depth: int) -> DeepNarrow:
        """The network to measure, in the theorems' regime."""
        values = (depth, self.d_out, float(depth) ** 2.2, self.rho, self.beta)
        if len(self.shape) == 1:
            return DeepNarrowMLP(*values)
        return DeepNarrowCNN(*values, kernel_size=self.kernel_size)

    def corrected(self, x: np.ndarray) -> float:
        """The limit for one input."""
        given: dict[str, Any] = {"d_out": self.d_out, "kernel_size": self.kernel_size}
        return float(limit_ntk(x[None], rho=self.rho, beta=self.beta, **given)[0, 0])

    def printed(self, x: np.ndarray, corrected: float) -> float:
        """The thesis's value; where it states none, ``corrected`` without the missing factor."""
        if x.ndim == 1:
            return corrected - self.d_out + 1  # the constant 1 instead of d_out
        sizes, sums = _windows(x, self.kernel_size)
        pixels = x.shape[0] * x.shape[1]
        if self.d_out > 1:
            return corrected - (self.d_out - 1) * sum(size**2 for size in sizes) / pixels**2
        # Prefactor d^-2 instead of d^-4, and means instead of sums: d^2 S S' with S = sum / d^2.
        inputs = sum(float(total @ total) for total in sums)
        return (pixels**2 * corrected - inputs + inputs / pixels) / pixels


def _windows(x: np.ndarray, kernel_size: int) -> tuple[list[int], list[np.ndarray]]:
    """For each filter shift: number of pixels inside the image, each channel's sum over them."""
    half, (height, width, _) = kernel_size // 2, x.shape
    sizes, sums = [], []
    for dy in range(-half, half + 1):
        for dx in range(-half, half + 1):
            inside = x[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            sizes.append(inside.shape[0] * inside.shape[1])
            sums.append(inside.sum((0, 1)))
    return sizes, sums


STATEMENTS = (
    Statement(
        "Theorem 3.1: the constant is d_out, not 1", "MLP, d_in = 4, d_out = 10", (4,), d_out=10
    ),
    Statement(
        "Theorem 4.1: the prefactor is 1/d^4, with sums, not means",
        "CNN, 5 x 5 images, rho = 1/sqrt 3",
        (5, 5, 1),
        d_out=1,
        rho=3**-0.5,
    ),
    Statement(
        "Theorem 4.1, k outputs: the term p_d times k",
        "CNN, 4 x 6 images of 2 channels, k = 3, 5 x 5 filters, rho = 0.3",
        (4, 6, 2),
        d_out=3,
        rho=0.3,
        kernel_size=5,
    ),
)


@freeing_folders()
def errata(
    config: ErrataConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate every statement as printed and as corrected, and measure it.

    Args:
        config: depth and number of the networks; None is the default.
        workdir: folder for the configuration, the summary and the figure; None writes nothing.
        progress: show a progress bar.

    Returns:
        A dict per statement: statement, setting, printed, corrected, measured, standard_error, ....

    Raises:
        InputError: the workdir cannot be used.
    """
    config = config or ErrataConfig()
    folder = ExperimentFolder("errata", dataclasses.asdict(config), workdir)
    with (
        jax.enable_x64(True),
        progress_bar(STATEMENTS, desc="errata", disable=not progress) as bar,
    ):
        rows = [_row(statement, config) for statement in bar]
    folder.write_config()  # only now: an interrupted run leaves nothing to resume
    folder.finish({"rows": rows})
    folder.draw("errata", errata_figure, rows)
    return rows


def _row(statement: Statement, config: ErrataConfig) -> dict[str, Any]:
    rng = np.random.default_rng(config.seed)
    x = rng.random(statement.shape)
    model = statement.network(config.depth)
    init, batch = jax.jit(model.init), jnp.asarray(x[None])
    keys = jax.random.split(jax.random.key(config.seed), config.networks)
    values = [float(empirical_ntk(model, init(key, batch), batch)[0, 0, 0, 0]) for key in keys]
    if not np.isfinite(values).all():
        raise InputError(f"depth: the kernel at depth {config.depth} is not finite; lower it")
    corrected = statement.corrected(x)
    return {
        "statement": statement.name,
        "setting": statement.setting,
        "printed": statement.printed(x, corrected),
        "corrected": corrected,
        "measured": float(np.mean(values)),
        "standard_error": float(np.std(values, ddof=1) / np.sqrt(len(values))),
        "depth": config.depth,
        "networks": config.networks,
    }
