"""Sections 3.1 and 4.0.1: a network's initialization, drawn from its actual parameters.

`initialize` builds the flax networks, converts them to the thesis's literal matrices and draws
figures 3.1 and 3.2 from them; `parameter_styles` maps each value to a drawing style.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dnntk.checks import check_choice, check_count, check_deviation
from dnntk.errors import InputError
from dnntk.experiments.config_checks import check_at_least
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.parameter_styles import network_styles
from dnntk.figures.initialization import Diagram, Style, initialization_figure
from dnntk.networks.initializers import INITS
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP, Variables, to_standard
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.training.config import ARCHITECTURES

__all__ = ["InitializationConfig", "Initialized", "activations", "initialize"]

log = logging.getLogger("dnntk")

FIGURES = {"mlp": "figure_3_1", "cnn": "figure_3_2"}
D_OUT = {"mlp": 2, "cnn": 1}
THEOREMS_EXPONENT = 2.2
# More units, channels or pixels per side would not be legible on a page.
MOST_UNITS, MOST_CHANNELS, MOST_PIXELS = 12, 6, 16
# The literal matrices are float32: C and its products with rho and beta have to fit.
SMALLEST_SCALE, LARGEST_SCALE, LARGEST_DEVIATION = 1e-30, 1e30, 1e6
# Number of inputs at which the output is evaluated.
EXAMPLES = 16
LINES = (Style.SOLID, Style.DOUBLE, Style.DASHED, Style.NONE)
BOXES = (Style.SOLID, Style.DASHED, Style.DOUBLE, Style.DOUBLE_DASHED)


@dataclasses.dataclass(frozen=True)
class InitializationConfig:
    """The networks to draw.

    Attributes:
        arch: architecture, "mlp" (figure 3.1), "cnn" (figure 3.2) or "both".
        d_in: number of inputs of the MLP.
        d_out: number of outputs; None is the thesis's: 2 for the MLP, 1 for the CNN.
        height, width, channels: size of the CNN's image.
        kernel_size: side of the CNN's filters, odd.
        depth: number of weight layers, at least 2; above 7, dots stand for some of the layers.
        scale: C; None is depth^2.2. C = 1 is not allowed: 1 is drawn in another style.
        rho, beta: standard deviations of the random weights and biases.
        init: initialization to draw, "deep_narrow", "he_uniform" or "torch_default".
        seed: seed of the parameters and of the example that shades the units.
    """

    arch: str = "both"
    d_in: int = 3
    d_out: int | None = None
    height: int = 4
    width: int = 4
    channels: int = 1
    kernel_size: int = 3
    depth: int = 5
    scale: float | None = None
    rho: float = 1.0
    beta: float = 1.0
    init: str = "deep_narrow"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        fields.convert(self)
        check_choice("arch", self.arch, (*ARCHITECTURES, "both"))
        check_choice("init", self.init, INITS)
        if self.arch == "mlp":
            of_images = ("height", "width", "channels", "kernel_size")
            fields.without_effect(self, of_images, "on arch=mlp, which has no images")
        if self.arch == "cnn":
            fields.without_effect(self, ["d_in"], "on arch=cnn, whose inputs are channels")
        if self.init != "deep_narrow":
            deviations = f"on init={self.init}, which has a deviation of its own"
            fields.without_effect(self, ["rho", "beta"], deviations)
        sides = {"d_in": MOST_UNITS, "d_out": MOST_UNITS, "channels": MOST_CHANNELS}
        sides |= {"height": MOST_PIXELS, "width": MOST_PIXELS}
        for name, most in sides.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise InputError(f"{name}: expected 1 to {most}, to fit a page, got {value}")
        check_count("kernel_size", self.kernel_size)
        for name in ("rho", "beta"):
            check_deviation(name, getattr(self, name))
            if getattr(self, name) > LARGEST_DEVIATION:
                raise InputError(
                    f"{name}: expected at most {LARGEST_DEVIATION:g}, got {getattr(self, name)}"
                )
        check_at_least(self, 0, "seed")
        if not SMALLEST_SCALE <= self.c <= LARGEST_SCALE or np.float32(self.c) == 1:
            raise InputError(
                f"scale: expected {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, other than 1, which is "
                f"drawn in another style, got {self.c:g}"
            )
        for arch in self.archs:  # the networks check the rest
            self.model(arch)

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures, in order."""
        return ARCHITECTURES if self.arch == "both" else (self.arch,)

    @property
    def c(self) -> float:
        """C_L."""
        if self.scale is not None:
            return self.scale
        return float(max(self.depth, 2)) ** THEOREMS_EXPONENT

    def model(self, arch: str) -> DeepNarrow:
        """The network of one architecture, in the default (ntk) form."""
        d_out = D_OUT[arch] if self.d_out is None else self.d_out
        options: dict[str, Any] = {"rho": self.rho, "beta": self.beta, "init": self.init}
        if arch == "mlp":
            return DeepNarrowMLP(self.depth, d_out, self.c, **options)
        return DeepNarrowCNN(self.depth, d_out, self.c, kernel_size=self.kernel_size, **options)

    def inputs(self, arch: str) -> np.ndarray:
        """`EXAMPLES` random positive inputs, float32: [n, d_in] or [n, H, W, c]."""
        image = (self.height, self.width, self.channels)
        shape = (EXAMPLES, *((self.d_in,) if arch == "mlp" else image))
        return np.random.default_rng(self.seed).uniform(0.1, 1.0, shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Initialized:
    """One initialized network: its picture, its outputs and its size.

    Attributes:
        diagram: the styles of all parameters, and the other contents of the picture.
        outputs: [2, `EXAMPLES`, d_out], f(x) in the ntk form and in the literal form.
        parameters: number of literal parameters.
    """

    diagram: Diagram
    outputs: np.ndarray
    parameters: int

    @property
    def largest_output(self) -> float:
        """Max |f(x)|; 0 for the thesis's initialization."""
        return float(np.abs(self.outputs).max())

    def summary(self) -> dict[str, Any]:
        """The entry of summary.json; lines are weights (MLP) or filters (CNN), boxes are biases."""
        return {
            "depth": self.diagram.depth,
            "parameters": self.parameters,
            "lines": _counts(self.diagram.lines, self.diagram.line_meanings),
            "boxes": _counts(self.diagram.boxes, self.diagram.box_meanings),
            "largest_output": self.largest_output,
        }


def activations(params: dict[str, Any], x: np.ndarray) -> list[np.ndarray]:
    """Values of all layers of a literal network for one input [d_in] or [H, W, c].

    Returns:
        L + 1 arrays [H, W, units] (MLP: H = W = 1): the input, the values after each of the L - 1
        ReLUs, and the last layer's values, before the CNN's average.
    """
    filters = {name: np.asarray(params[name]["kernel"]) for name in params}
    if x.ndim == 1:
        x, filters = x[None, None], {name: w[..., None, None, :, :] for name, w in filters.items()}
    biases = {name: np.asarray(params[name]["bias"]) for name in params}
    layers = [(filters["first"], biases["first"])]
    layers += zip(filters["middle"], biases["middle"], strict=True)
    states = [x]
    for kernel, bias in layers:
        states.append(np.maximum(_convolved(states[-1], kernel) + bias, 0))
    return [*states, _convolved(states[-1], filters["last"]) + biases["last"]]


def _convolved(h: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[H, W, in] and [q, q, in, out] -> [H, W, out], with zeros around the image."""
    size = len(kernel)
    padded = np.pad(h, [(size // 2, size // 2)] * 2 + [(0, 0)])
    patches = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
    return np.einsum("hwcij,ijco->hwo", patches, kernel)


@freeing_folders()
def initialize(
    config: InitializationConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
) -> dict[str, Initialized]:
    """Build the networks, find the style of every parameter, draw the figures.

    Args:
        config: the networks; None is those of figures 3.1 and 3.2.
        workdir: folder for configuration, summary, figures; None writes nothing.
        resume: draw again in a ``workdir`` that holds the same networks.

    Returns:
        The initialized network of each architecture.

    Raises:
        InputError: the configuration or the workdir cannot be used; the message says why.
    """
    config = config or InitializationConfig()
    folder = ExperimentFolder("initialization", dataclasses.asdict(config), workdir, resume=resume)
    folder.write_config()
    found = {arch: _initialized(config, arch) for arch in config.archs}
    for arch, network in found.items():
        folder.draw(FIGURES[arch], initialization_figure, network.diagram)
    folder.finish({arch: network.summary() for arch, network in found.items()})
    return found


def _initialized(config: InitializationConfig, arch: str) -> Initialized:
    model, x = config.model(arch), config.inputs(arch)
    literal = model.clone(parametrization="standard")

    def build(key: jax.Array) -> tuple[Any, Variables]:
        variables: Any = model.init(key, x)
        return variables, to_standard(model, variables)[1]

    variables, matrices = jax.jit(build)(jax.random.key(config.seed))
    outputs = jax.jit(lambda v, m: (model.apply(v, x), literal.apply(m, x)))(variables, matrices)
    found = Initialized(
        _diagram(config, arch, matrices["params"], x[0]),
        np.stack(outputs),
        sum(leaf.size for leaf in jax.tree.leaves(matrices["params"])),
    )
    log.info(
        "%s: %d layers, C = %.6g, max |f(x)| = %g",
        *(arch, config.depth, config.c, found.largest_output),
    )
    return found


def _diagram(
    config: InitializationConfig, arch: str, params: dict[str, Any], x: np.ndarray
) -> Diagram:
    lines, boxes = network_styles(params, config.c)
    states = activations(params, x)
    # A baseline's activations have the size of its input, not of C.
    narrow = config.init == "deep_narrow"
    unit = config.c if narrow else 1.0
    shades = [states[0], *(state / unit for state in states[1:-1]), states[-1]]
    line_meanings, box_meanings = _meanings(config, arch)
    k = len(boxes[-1])
    sizes = {
        "mlp": f"$d_{{in}} = {config.d_in}$, $d_{{out}} = {k}$",
        "cnn": rf"${config.height} \times {config.width}$ image, "
        f"$c = {config.channels}$, $k = {k}$",
    }
    deviations = rf", $\rho$ = {config.rho:.4g}, $\beta$ = {config.beta:.4g}" if narrow else ""
    return Diagram(
        d_in=lines[0].shape[0],
        lines=lines,
        boxes=boxes,
        activations=shades,
        pooled=states[-1].mean((0, 1)) if arch == "cnn" else None,
        title=f"{config.init} initialization of a deep {arch.upper()}: {sizes[arch]},\n"
        f"$L$ = {config.depth:,}, $C_L$ = {config.c:.4g}{deviations}",
        line_meanings=line_meanings,
        box_meanings=box_meanings,
        shade="Shade: activation" + (r" / $C_L$ (input: $x$)" if narrow else ""),
    )


def _meanings(config: InitializationConfig, arch: str) -> tuple[dict[Style, str], dict[Style, str]]:
    """(meanings of the lines' styles, meanings of the boxes' styles)."""
    other = "Gaussian" if config.init == "deep_narrow" else "any other value"
    size = config.kernel_size

    def value(number: str) -> str:
        if arch == "mlp":
            return number
        if number == "0":
            return rf"$0_{{{size} \times {size}}}$"
        if size > 5:
            return f"{number}, at the centre only"
        beside = ["0"] * (size // 2)
        return f"diag({', '.join([*beside, number, *beside])})"

    lines = dict(zip(LINES, (value("1"), value("$C_L$"), other, value("0")), strict=True))
    return lines, dict(zip(BOXES, ("0", other, "$C_L$", "$-C_L$"), strict=True))


def _counts(
    layers: Sequence[np.ndarray], meanings: dict[Style, str]
) -> dict[str, dict[str, str | int]]:
    """The meaning of each style, and how often the style occurs in all layers."""
    signs = str.maketrans("", "", "${}")
    return {
        style.name.lower(): {
            "means": meaning.replace(r" \times ", "x").translate(signs),
            "count": sum(int(np.sum(layer == style)) for layer in layers),
        }
        for style, meaning in meanings.items()
    }
