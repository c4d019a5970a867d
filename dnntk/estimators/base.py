"""The base of the estimators: validated data, and files of fitted estimators.

An estimator takes flat rows, [n, n_features], as scikit-learn does; a CNN's are reshaped to images.
A subclass says how outputs are fitted and computed (`dnntk.estimators.infinite_depth`,
`dnntk.estimators.deep_narrow`), another one what labels or numbers are as outputs
(`dnntk.estimators.targets`).
"""

import abc
import math
import numbers
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from dnntk.checks import brief, check_choice, check_count, check_unmasked
from dnntk.errors import InputError
from dnntk.estimators import savefile
from dnntk.training.config import ARCHITECTURES

__all__ = [
    *("DEFAULT_TIME", "NarrowEstimator", "check_filter", "checked_image", "drawn_seed"),
    *("image_of", "typed", "validated"),
]

DEFAULT_TIME = 1e5


class NarrowEstimator(BaseEstimator, abc.ABC):
    """A deep narrow network on flat rows: validation, predictions' inputs, files."""

    # The fitted numbers that a file holds, and their types.
    RECORD: ClassVar[Mapping[str, type]]

    @abc.abstractmethod
    def _fit_outputs(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Fit outputs y [n, d_out] at x [n, n_features]."""

    @abc.abstractmethod
    def _outputs(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The outputs [n, d_out] at x [n, n_features]."""

    @abc.abstractmethod
    def _output_count(self) -> int:
        """d_out of the fitted network."""

    @abc.abstractmethod
    def _network_described(self) -> tuple[dict[str, NDArray], dict[str, Any]]:
        """What `_outputs` needs: arrays, and a description that JSON can hold."""

    @abc.abstractmethod
    def _restore_network(self, arrays: dict[str, NDArray], about: dict[str, Any]) -> None:
        """The inverse of `_network_described`, and ``n_features_in_``.

        Raises:
            LookupError, TypeError, ValueError: it is no such description.
        """

    @abc.abstractmethod
    def _targets_described(self) -> dict[str, Any]:
        """How outputs become predictions."""

    @abc.abstractmethod
    def _restore_targets(self, about: dict[str, Any]) -> None:
        """The inverse of `_targets_described`; errors as `_restore_network`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one file, without pickle, for `load`.

        The file has the layout of safetensors.

        Args:
            path: the file; an older one is replaced.

        Raises:
            NotFittedError: `fit` has not been called.
            InputError: the file cannot be written, or class labels are neither strings, numbers
                nor bools, or a parameter is none of these.
        """
        check_is_fitted(self)
        arrays, about = self._network_described()
        about |= {
            "parameters": {name: _plain(name, v) for name, v in self.get_params().items()},
            "record": {name: getattr(self, name) for name in self.RECORD},
            "features": getattr(self, "feature_names_in_", np.array([])).tolist(),
            **self._targets_described(),
        }
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
    def _restored(cls, arrays: dict[str, NDArray], about: dict[str, Any]) -> Self:
        found = cls(**{name: _restored_value(v) for name, v in about["parameters"].items()})
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("numbers that are not finite")
        found._restore_network(arrays, about)
        for name, value in typed(about["record"], cls.RECORD).items():
            setattr(found, name, value)
        if about["features"]:
            are_strings = all(isinstance(name, str) for name in about["features"])
            if not are_strings or len(about["features"]) != found.n_features_in_:
                raise ValueError("feature names that are not a string a feature")
            found.feature_names_in_ = np.array(about["features"], object)
        found._restore_targets(about)
        return found

    def _validated(self, X: ArrayLike, y: Any = "no_validation", **options: Any) -> Any:  # noqa: N803
        """X, and y if given, as float64."""
        return validated(self, X, y, dtype=np.float64, **options)

    def _outputs_at(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """The outputs [n, d_out] at the user's points."""
        check_is_fitted(self)
        return self._outputs(self._validated(X, reset=False))

    def _warn_unless_converged(self, advice: str) -> None:
        """Warn on behalf of the caller of ``fit``, which calls `_fit_outputs`."""
        if not self.converged_:
            warnings.warn(
                f"not converged: residual {self.residual_:.2g}, tolerance {self.tolerance:.2g}; "
                f"{advice}",
                ConvergenceWarning,
                stacklevel=4,
            )


def validated(
    estimator: BaseEstimator,
    X: ArrayLike,  # noqa: N803
    y: Any = "no_validation",
    **options: Any,
) -> Any:
    """X, and y if given, validated by scikit-learn; its errors in one line.

    Raises:
        InputError: an entry is masked, or scikit-learn refuses the data.
    """
    check_unmasked("X", X)
    check_unmasked("y", y)
    try:
        return validate_data(estimator, X, y, **options)
    except Exception as error:  # an array of another library may raise anything
        # scikit-learn's tests expect its type errors, and its list of feature names.
        if isinstance(error, TypeError) or "feature names should match" in str(error):
            raise
        if not isinstance(error, ValueError):
            raise InputError(f"X, y: expected arrays, got one that raises {brief(error)}") from None
        raise InputError(_in_one_line(str(error))) from None


def image_of(estimator: Any, features: int) -> tuple[int, int, int] | None:
    """(H, W, c) to which a CNN's rows of ``features`` numbers are reshaped; None for an MLP.

    Raises:
        InputError: the estimator's ``arch`` is neither, or its ``image_shape`` does not fit.
    """
    check_choice("arch", estimator.arch, ARCHITECTURES)
    return None if estimator.arch == "mlp" else checked_image(estimator.image_shape, features)


def drawn_seed(random_state: Any) -> int:
    """A seed, by scikit-learn's rules for ``random_state``.

    Raises:
        InputError: it is neither an integer, a RandomState nor None.
    """
    try:
        return int(check_random_state(random_state).randint(2**31 - 1))
    except ValueError as error:
        raise InputError(
            f"random_state: expected an integer, a RandomState or None, got another ({error})"
        ) from None


def checked_image(shape: Any, features: int) -> tuple[int, int, int]:
    """(H, W, c) of rows with ``features`` numbers; ``shape`` may lack c, or be None for a square.

    Raises:
        InputError: it does not fit.
    """
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


def check_filter(kernel_size: Any, image_shape: tuple[int, int, int] | None) -> int:
    """An odd side of a filter, which is not so large that some shifts see padding only.

    Raises:
        InputError: it is not.
    """
    size = check_count("kernel_size", kernel_size)
    if size % 2 == 0:
        raise InputError(f"kernel_size must be odd, got {size}; add 1")
    if image_shape and size > 2 * max(image_shape[:2]) + 1:
        raise InputError(
            f"kernel_size: expected at most {2 * max(image_shape[:2]) + 1}, beyond which "
            f"filters see padding only, got {size}"
        )
    return size


def typed(found: dict[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """The entries of ``types``, each checked to have exactly its type.

    Raises:
        LookupError, TypeError, ValueError: one has not.
    """
    for name, kind in types.items():
        if type(found[name]) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    return {name: found[name] for name in types}


def _in_one_line(message: str) -> str:
    """scikit-learn's message, without arrays and without the advice of another estimator."""
    text = " ".join(message.split())
    text = re.sub(r"array=.*\. Reshape", "Reshape", text)
    text = re.sub(r"(Complex data not supported).*", r"\1; stack real and imaginary parts", text)
    return re.sub(r"(contains NaN)\..*", r"\1; drop or fill such entries", text)


def _plain(name: str, value: Any) -> Any:
    """A parameter as JSON holds it."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = np.asarray(value).tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(name, side) for side in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, numbers.Real):
        raise InputError(
            f"{name}: expected None, a number or a string to save it, got {brief(value)}; "
            f"set_params({name}=None) first"
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _restored_value(value: Any) -> Any:
    """A parameter that `_plain` converted: a single value or a tuple of integers."""
    if isinstance(value, list) and all(type(side) is int for side in value):
        return tuple(value)
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError("a parameter of an unknown type")
    return value
