"""A real deep narrow network as scikit-learn estimators, trained in closed form.

`DeepNarrowClassifier` and `DeepNarrowRegressor` initialize a network of finite depth and bring it,
by `dnntk.solve`, to the weights that gradient flow reaches at a kernel time: seconds at a depth of
1000. Use them where a network is wanted that can be looked into, trained further or handed on; the
limit of great depth is `dnntk.InfiniteDepthClassifier`, which needs no network.
"""

import contextlib
import dataclasses
import functools
import math
import typing
import warnings
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.estimators.base import (
    DEFAULT_TIME,
    NarrowEstimator,
    check_filter,
    checked_image,
    drawn_seed,
    image_of,
    typed,
)
from dnntk.estimators.targets import NarrowClassifier, NarrowRegressor
from dnntk.networks.models import DeepNarrow, Variables
from dnntk.training.config import TrainConfig
from dnntk.training.engine import engine_for
from dnntk.training.solve import SolveReport, solve

__all__ = ["DeepNarrowClassifier", "DeepNarrowRegressor"]

_NETWORK = {"depth": int, "d_out": int, "features": str, "random_units": int}
_NETWORK |= dict.fromkeys(("scale", "rho", "beta"), float)
_REPORT: dict[str, type] = {
    name: typing.get_origin(kind) or kind
    for name, kind in typing.get_type_hints(SolveReport).items()
}
# Rows that are predicted at once: at least, and at most; numbers of a layer's states on them.
LEAST_ROWS, MOST_ROWS, STATES = 32, 1024, 1 << 22


class DeepNarrowEstimator(NarrowEstimator):
    """A deep narrow network on flat rows: parameters, fit, outputs."""

    RECORD = {"converged_": bool, "residual_": float, "n_iter_": int}

    def __init__(
        self,
        *,
        depth: int = 1000,
        scale: float | None = None,
        rho: float = 1.0,
        beta: float = 1.0,
        time: float = DEFAULT_TIME,
        ridge: float = 0.0,
        arch: str = "mlp",
        image_shape: tuple[int, ...] | None = None,
        kernel_size: int = 3,
        features: str = "gaussian",
        random_units: int = 1,
        dtype: str = "float32",
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        memory: float | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        """Store the parameters; `fit` checks them.

        Args:
            depth: weight layers, at least 2. More examples need more: a layer is a random feature.
            scale: C, perhaps infinite; None is depth^2.2. A small C takes more passes.
            rho: standard deviation of the Gaussian weights (the MLP's times sqrt(d_in)).
            beta: standard deviation of the Gaussian biases over the scale.
            time: kernel time of the training, t >= 0, as for `dnntk.InfiniteDepthClassifier`; may
                be infinite, which needs a ridge if there are more examples than features.
            ridge: weight decay, in units of the eigenvalues of K/N.
            arch: "mlp", or "cnn" with a global average pool, on images that are rows of X.
            image_shape: as for `dnntk.InfiniteDepthClassifier`.
            kernel_size: side of the CNN's filters, odd.
            features: draw of the random features, as in `dnntk.networks.random_units`.
            random_units: random features a layer.
            dtype: of the network, "float32" or "float64".
            tolerance: of the training outputs, relative to the targets; `fit` warns beyond it.
            max_iterations: gradient passes over the training examples, at most.
            memory: bytes for the kernel of the training examples; None is 3/4 of this machine's.
            random_state: seed of the initialization; a RandomState, or None, draws another a fit.
            verbose: show progress bars on standard error for what takes longer than five seconds.
        """
        self.depth = depth
        self.scale = scale
        self.rho = rho
        self.beta = beta
        self.time = time
        self.ridge = ridge
        self.arch = arch
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.features = features
        self.random_units = random_units
        self.dtype = dtype
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    def _fit_outputs(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        image_shape = image_of(self, x.shape[1])
        model = self._model(image_shape, y.shape[1])
        inputs = _as_inputs(x, image_shape, self.dtype)
        with _precision(self.dtype):
            variables, report = solve(
                model,
                _initial(model, jax.random.key(drawn_seed(self.random_state)), inputs[:1]),
                inputs,
                y,
                time=self.time,
                ridge=self.ridge,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                memory=self.memory,
                progress=bool(self.verbose),
            )
        self.model_, self.image_shape_ = model, image_shape
        self.variables_, self.report_ = jax.device_get(variables), report
        self.converged_, self.residual_ = bool(report.converged), float(report.residual)
        self.n_iter_ = int(report.iterations)
        if (negative := float(np.mean(x < 0))) > 0:
            warnings.warn(
                f"X: {100 * negative:.3g}% of the entries are negative, and the network's first "
                "ReLU makes them 0; scale X by MinMaxScaler, or split every feature by its sign",
                stacklevel=3,
            )
        self._warn_unless_converged(
            "scale the inputs to size 1, add a ridge, or take a shorter time, more max_iterations "
            "or dtype='float64'"
        )

    def _model(self, image_shape: tuple[int, int, int] | None, d_out: int) -> DeepNarrow:
        names = ["arch", "depth", "scale", "rho", "beta", "features", "random_units", "dtype"]
        if image_shape:
            check_filter(self.kernel_size, image_shape)
            names.append("kernel_size")
        return TrainConfig(**{name: getattr(self, name) for name in names}).model(d_out)

    def _outputs(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        dtype = self.variables_["params"]["first"]["kernel"].dtype.name
        inputs = _as_inputs(x, self.image_shape_, dtype)
        width = self.variables_["params"]["last"]["kernel"].shape[-2]
        states = width * math.prod(inputs.shape[1:-1])
        # Powers of two, so that few programs are compiled.
        most = 1 << max(LEAST_ROWS, min(MOST_ROWS, STATES // states)).bit_length() - 1
        rows = min(most, max(LEAST_ROWS, 1 << (len(x) - 1).bit_length()))
        parts = []
        with _precision(dtype):
            variables = jax.device_put(self.variables_)
            for start in range(0, len(x), rows):
                part = inputs[start : start + rows]
                padded = np.pad(part, ((0, rows - len(part)), *((0, 0),) * (part.ndim - 1)))
                found = _network_outputs(self.model_, variables, padded)
                parts.append(np.asarray(found, np.float64)[: len(part)])
        return np.concatenate(parts)

    def _output_count(self) -> int:
        return self.model_.d_out

    def _network_described(self) -> tuple[dict[str, NDArray], dict[str, Any]]:
        types = _NETWORK | ({"kernel_size": int} if self.image_shape_ else {})
        about = {
            "network": {name: getattr(self.model_, name) for name in types},
            "image_shape": self.image_shape_,
            "report": dataclasses.asdict(self.report_),
        }
        return flatten_dict(self.variables_, sep="/"), about

    def _restore_network(self, arrays: dict[str, NDArray], about: dict[str, Any]) -> None:
        shape = about["image_shape"]
        image_shape = None if shape is None else checked_image(shape, math.prod(shape))
        fields = typed(about["network"], _NETWORK | ({"kernel_size": int} if shape else {}))
        d_out = fields.pop("d_out")
        model = TrainConfig(arch="cnn" if shape else "mlp", **fields).model(d_out)
        kernel = arrays["params/first/kernel"]
        x = jax.ShapeDtypeStruct((1, *(image_shape or kernel.shape[:1])), kernel.dtype)
        with _precision(kernel.dtype.name):
            expected = jax.eval_shape(functools.partial(_initial, model), jax.random.key(0), x)
        layouts = {name: (a.shape, a.dtype) for name, a in flatten_dict(expected, sep="/").items()}
        if layouts != {name: (a.shape, a.dtype) for name, a in arrays.items()}:
            raise ValueError("arrays that are not the network's")
        self.model_, self.image_shape_ = model, image_shape
        self.variables_ = unflatten_dict(arrays, sep="/")
        self.report_ = SolveReport(**typed(about["report"], _REPORT))
        self.n_features_in_ = math.prod(x.shape)


class DeepNarrowClassifier(NarrowClassifier, DeepNarrowEstimator):
    """Classification by a deep narrow network, trained in closed form to a kernel time.

    The loss is least squares, as in the thesis: on one output with the targets 0 and 1 for two
    classes, with the threshold 1/2, and on one-hot targets for more classes. The outputs are not
    probabilities.

    The network is as wide as its inputs, its outputs and 1. Scale X to size 1, and to 0 or more (as
    `sklearn.preprocessing.MinMaxScaler` does): the first layer's ReLU makes every negative entry 0,
    so of centred features (`StandardScaler`) the network sees only what lies above the mean.

    `fit` takes O(depth n^2) operations in the number of training examples for the network's
    kernel, O(n^3) for its solution up to 4,096 of them, and a few gradient passes. A saved file
    takes 4 (8 in float64) bytes a parameter, depth * width * (width + 1) of them with the width
    n_features + d_out + 1: 18 MB at a depth of 1000 for 64 features and one output.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: features seen in `fit`.
        feature_names_in_: [n_features_in_], where X had names that are all strings.
        model_: the `dnntk.DeepNarrowMLP` or `dnntk.DeepNarrowCNN`.
        variables_: its trained ``params`` and their ``initial`` values, NumPy arrays of ``dtype``:
            ``model_.apply(variables_, x)`` are the outputs.
        image_shape_: (H, W, channels) of the rows as ``model_`` wants them; None for an MLP.
        report_: the `dnntk.SolveReport` of the fit.
        converged_: is the residual within the tolerance?
        residual_: distance of the outputs at the training examples from those of the flow, relative
            to the targets.
        n_iter_: gradient passes over the training examples.
    """


class DeepNarrowRegressor(NarrowRegressor, DeepNarrowEstimator):
    """Regression by a deep narrow network, trained in closed form to a kernel time.

    Targets are not scaled or centred: the network starts at 0, and the mean of y is learnt early.
    Several outputs belong to one network, whose width they add to. For the inputs, the cost and the
    size of a saved file see `DeepNarrowClassifier`.

    Attributes: those of `DeepNarrowClassifier` without ``classes_``.
    """


@functools.partial(jax.jit, static_argnums=0)
def _initial(model: DeepNarrow, key: jax.Array, x: jax.Array) -> Variables:
    """The variables at initialization, without the outputs at x."""
    return cast(Variables, model.init(key, x, method="network"))


@functools.partial(jax.jit, static_argnums=0)
def _network_outputs(model: DeepNarrow, variables: Variables, x: jax.Array) -> jax.Array:
    params, frozen = variables["params"], {"initial": variables["initial"]}
    return engine_for(model, params, x).outputs(params, frozen, x)


def _as_inputs(
    x: NDArray[np.float64], image_shape: tuple[int, int, int] | None, dtype: str
) -> NDArray:
    """Rows as the network takes them."""
    with np.errstate(over="ignore"):
        inputs = x.astype(dtype)
    if not np.isfinite(inputs).all():
        raise InputError(
            f"X: expected numbers within {dtype}, got {x[~np.isfinite(inputs)][0]}; scale it to "
            "size 1"
        )
    return inputs if image_shape is None else inputs.reshape(-1, *image_shape)


def _precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """JAX's float64, where the network is of it."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
