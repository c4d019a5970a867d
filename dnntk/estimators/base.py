"""The base of the estimators: parameters, the fit, outputs, and saved files.

An estimator takes flat rows, [n, n_features], as scikit-learn does; `LimitKernel` reshapes them to
images if the network is a CNN. A fitted estimator keeps only the arrays of its predictions.
"""

import dataclasses
import math
import numbers
import os
import re
import warnings
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from dnntk.checks import brief, check_choice, check_count, check_deviation, check_unmasked
from dnntk.errors import InputError
from dnntk.estimators import savefile
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.kernel_flow import MAX_ITERATIONS, KernelFlow
from dnntk.kernel import limit_ntk
from dnntk.training.config import ARCHITECTURES

__all__ = ["CheckedScore", "InfiniteDepth", "LimitKernel"]

DEFAULT_TIME = 1e5
BLOCK_SIZE = 1024
_KERNEL = {"rho": float, "beta": float, "d_out": int, "kernel_size": int}
_RECORD = {"converged_": bool, "residual_": float, "n_iter_": int, "condition_": float}


@dataclasses.dataclass(frozen=True)
class LimitKernel:
    """`limit_ntk` of one network on flat inputs: [n1, d], [n2, d] -> [n1, n2].

    Attributes:
        rho: standard deviation of the Gaussian weights.
        beta: standard deviation of the Gaussian biases.
        d_out: outputs of the network.
        image_shape: (H, W, c) to which the CNN's inputs are reshaped; None is the MLP.
        kernel_size: side of the CNN's filters, odd.
    """

    rho: float
    beta: float
    d_out: int
    image_shape: tuple[int, int, int] | None
    kernel_size: int

    def __post_init__(self) -> None:
        """Check types and ranges, and convert to Python's own numbers, which a file can hold."""
        for name in ("rho", "beta"):
            object.__setattr__(self, name, float(check_deviation(name, getattr(self, name))))
        for name in ("d_out", "kernel_size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {self.kernel_size}; add 1")
        if self.image_shape and self.kernel_size > 2 * max(self.image_shape[:2]) + 1:
            raise InputError(
                f"kernel_size: expected at most {2 * max(self.image_shape[:2]) + 1}, beyond which "
                f"filters see padding only, got {self.kernel_size}"
            )

    def __call__(self, x1: jax.Array, x2: jax.Array) -> jax.Array:
        """The kernel's values."""
        rows = (
            x if self.image_shape is None else x.reshape(-1, *self.image_shape) for x in (x1, x2)
        )
        return limit_ntk(
            *rows, rho=self.rho, beta=self.beta, d_out=self.d_out, kernel_size=self.kernel_size
        )


class CheckedScore:
    """scikit-learn's ``score`` (accuracy or R^2), which refuses masked entries."""

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """The accuracy of a classifier; the coefficient of determination R^2 of a regressor.

        Raises:
            InputError: an entry is masked.
        """
        check_unmasked("y", y)
        check_unmasked("sample_weight", sample_weight)
        return float(super().score(X, y, sample_weight))  # type: ignore[misc]


class InfiniteDepth(BaseEstimator):
    """An infinitely deep network on flat rows: parameters, fit, outputs, files."""

    def __init__(
        self,
        *,
        rho: float = 1.0,
        beta: float = 1.0,
        time: float = DEFAULT_TIME,
        ridge: float = 0.0,
        arch: str = "mlp",
        image_shape: tuple[int, ...] | None = None,
        kernel_size: int = 3,
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = MAX_ITERATIONS,
        memory: float | None = None,
        verbose: bool = False,
    ) -> None:
        """Store the parameters; `fit` checks them.

        Args:
            rho: standard deviation of the network's Gaussian weights (the MLP's times sqrt(d_in)).
            beta: standard deviation of its Gaussian biases over its scale.
            time: kernel time of the training, t >= 0, as in `dnntk.train`; may be infinite. The
                network has learnt the components of y whose eigenvalue of K/N is well above 1/t;
                eigenvalues grow with the square of the inputs' scale. The default suffices for
                nearly all components if inputs are of size 1. It is finite because duplicate inputs
                make K singular: t = infinity then needs a ridge.
            ridge: weight decay, in units of the eigenvalues of K/N.
            arch: "mlp", or "cnn" with a global average pool, on images that are rows of X.
            image_shape: (H, W) or (H, W, channels) of the rows of X, channels innermost, for a CNN;
                None is square with one channel. Without effect on an MLP.
            kernel_size: side of the CNN's filters, odd.
            solver: "eigh", "krylov", or "auto": the first up to 4,096 examples, the second beyond.
            tolerance: `fit` warns if the relative residual is larger.
            max_iterations: most iterations of the Krylov method.
            memory: bytes for the Gram matrix and the Krylov basis; None is 3/4 of this machine's.
            verbose: show progress bars on standard error for what takes longer than five seconds.
        """
        self.rho = rho
        self.beta = beta
        self.time = time
        self.ridge = ridge
        self.arch = arch
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.solver = solver
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.memory = memory
        self.verbose = verbose

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one file, without pickle, for `load`.

        The file has the layout of safetensors, with 8 (n_features + d_out) bytes a training
        example.

        Args:
            path: the file; an older one is replaced.

        Raises:
            NotFittedError: `fit` has not been called.
            InputError: the file cannot be written, or class labels are neither strings, numbers
                nor bools.
        """
        check_is_fitted(self)
        about = {
            "parameters": {name: _plain(value) for name, value in self.get_params().items()},
            "kernel": dataclasses.asdict(self.kernel_),
            "record": {name: getattr(self, name) for name in _RECORD},
            "features": getattr(self, "feature_names_in_", np.array([])).tolist(),
            **self._targets_described(),
        }
        arrays = {"x_train": self.x_train_, "coefficients": self.coefficients_}
        savefile.write(path, type(self).__name__, arrays, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an estimator that `save` wrote; its predictions are the same to the bit.

        Args:
            path: the file. It need not be trusted: no code in it is run, and reading takes no more
                memory than the file's size.

        Returns:
            The fitted estimator, with its parameters.

        Raises:
            InputError: the file is missing, damaged, of another version, or holds another class.
        """
        arrays, about = savefile.read(path, cls.__name__)
        try:
            return cls._restored(arrays, about)
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path}: expected a fitted {cls.__name__}, found other content ({reason:.80}); "
                "save it again"
            ) from None

    @classmethod
    def _restored(cls, arrays: dict[str, NDArray[np.float64]], about: dict[str, Any]) -> Self:
        found = cls(**{name: _restored_value(v) for name, v in about["parameters"].items()})
        x, coefficients = arrays["x_train"], arrays["coefficients"]
        if x.ndim != 2 or coefficients.ndim != 2 or len(x) != len(coefficients):
            raise ValueError("arrays of different lengths")
        if not np.isfinite(x).all() or not np.isfinite(coefficients).all():
            raise ValueError("numbers that are not finite")
        kernel = _typed(about["kernel"], _KERNEL)
        shape = about["kernel"]["image_shape"]
        image_shape = None if shape is None else _checked_image(shape, x.shape[1])
        found.kernel_ = LimitKernel(**kernel, image_shape=image_shape)
        if found.kernel_.d_out != coefficients.shape[1]:
            raise ValueError("another number of outputs than the kernel's")
        found.x_train_, found.coefficients_ = x, coefficients
        found.n_features_in_ = x.shape[1]
        for name, value in _typed(about["record"], _RECORD).items():
            setattr(found, name, value)
        if about["features"]:
            are_strings = all(isinstance(name, str) for name in about["features"])
            if not are_strings or len(about["features"]) != x.shape[1]:
                raise ValueError("feature names that are not a string a feature")
            found.feature_names_in_ = np.array(about["features"], object)
        found._restore_targets(about)
        return found

    def _targets_described(self) -> dict[str, Any]:
        raise NotImplementedError

    def _restore_targets(self, about: dict[str, Any]) -> None:
        raise NotImplementedError

    def _solve(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Fit outputs y [n, d_out]; keep the arrays of the prediction."""
        check_choice("arch", self.arch, ARCHITECTURES)
        shape = None if self.arch == "mlp" else _checked_image(self.image_shape, x.shape[1])
        kernel = LimitKernel(self.rho, self.beta, y.shape[1], shape, self.kernel_size)
        flow = KernelFlow(
            kernel,
            x,
            y,
            ridge=self.ridge,
            solver=self.solver,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            memory=self.memory,
            block_size=BLOCK_SIZE,
            progress=bool(self.verbose),
        )
        solution = flow.solution(self.time)
        self.kernel_ = kernel
        # The flow's copy of X: the caller may change X.
        self.x_train_, self.coefficients_ = flow.gram.cross.x, solution.coefficients
        self.converged_, self.residual_ = bool(solution.converged), float(solution.residual)
        self.n_iter_, self.condition_ = int(solution.iterations), float(solution.condition)
        if not self.converged_:
            warnings.warn(
                f"not converged: residual {self.residual_:.2g}, tolerance {self.tolerance:.2g}; "
                "scale the inputs to size 1, add a ridge, or take a shorter time or more "
                "max_iterations",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _validated(self, X: ArrayLike, y: Any = "no_validation", **options: Any) -> Any:  # noqa: N803
        """X, and y if given, validated by scikit-learn; its errors in one line.

        Raises:
            InputError: an entry is masked, or scikit-learn refuses the data.
        """
        check_unmasked("X", X)
        check_unmasked("y", y)
        try:
            return validate_data(self, X, y, dtype=np.float64, **options)
        except Exception as error:  # an array of another library may raise anything
            # scikit-learn's tests expect its type errors, and its list of feature names.
            if isinstance(error, TypeError) or "feature names should match" in str(error):
                raise
            if not isinstance(error, ValueError):
                raise InputError(
                    f"X, y: expected arrays, got one that raises {brief(error)}"
                ) from None
            raise InputError(_in_one_line(str(error))) from None

    def _outputs(self, x: ArrayLike) -> NDArray[np.float64]:
        """f_t(x), [n, d_out]."""
        check_is_fitted(self)
        points = self._validated(x, reset=False)
        cross = CrossKernel(self.kernel_, self.x_train_, "float64")
        return cross.product(points, self.coefficients_, BLOCK_SIZE)


def _in_one_line(message: str) -> str:
    """scikit-learn's message, without arrays and without the advice of another estimator."""
    text = " ".join(message.split())
    text = re.sub(r"array=.*\. Reshape", "Reshape", text)
    text = re.sub(r"(Complex data not supported).*", r"\1; stack real and imaginary parts", text)
    return re.sub(r"(contains NaN)\..*", r"\1; drop or fill such entries", text)


def _checked_image(shape: Any, features: int) -> tuple[int, int, int]:
    """(H, W, c) of rows with ``features`` numbers."""
    if shape is None:
        side = math.isqrt(features)
        shape = (side, side)
    try:
        full = (*shape, 1) if len(shape) == 2 else tuple(shape)
    except TypeError:
        full = ()
    for side in full:
        check_count("image_shape's sides", side)
    if len(full) != 3 or math.prod(full) != features:
        raise InputError(
            f"image_shape: expected (H, W) or (H, W, channels) of {features} features, got "
            f"{shape!r:.60}; arch='mlp' takes rows of any length"
        )
    height, width, channels = (int(side) for side in full)
    return height, width, channels


def _typed(found: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    """The entries of ``types``, each checked to have exactly its type."""
    for name, kind in types.items():
        if type(found[name]) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    return {name: found[name] for name in types}


def _plain(value: Any) -> Any:
    """A parameter as JSON holds it."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = np.asarray(value).tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(side) for side in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _restored_value(value: Any) -> Any:
    """A parameter that `_plain` converted: a single value or a tuple of integers."""
    if isinstance(value, list) and all(type(side) is int for side in value):
        return tuple(value)
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError("a parameter of an unknown type")
    return value
