"""Checks of arguments, shared by the numerical modules; their errors name the argument."""

import contextlib
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import ArrayLike as HostArrayLike
from numpy.typing import NDArray

from dnntk.errors import InputError

__all__ = [
    *("all_finite", "brief", "check_choice", "check_count", "check_deviation", "check_rows"),
    *("check_unmasked", "checked_array", "checked_inputs", "checked_pair", "common_dtype"),
    *("host_examples", "host_numbers", "host_targets", "host_times", "integer", "native_numbers"),
    *("not_negative", "number_within", "on_host", "real_array", "real_number", "reason"),
]

MOST_SHOWN = 60  # characters of a value in a message
_BRIEF = reprlib.Repr()
_BRIEF.maxother = _BRIEF.maxstring = MOST_SHOWN


def brief(value: object) -> str:
    """The value as one short line, for a message."""
    text = " ".join(_BRIEF.repr(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def check_unmasked(name: str, value: Any) -> None:
    """Refuse masked entries, which NumPy would replace by the numbers behind the mask."""
    if _any_entry(value, _is_masked):
        raise InputError(
            f"{name} must have no masked entries, got a masked array; fill them by .filled(...), "
            "or drop them"
        )


def native_numbers(name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array of real numbers, in this machine's byte order.

    All arrays from users pass through this function, except JAX's.

    Raises:
        InputError: entries are masked, complex, missing, ragged, or no numbers (text, dates).
    """
    check_unmasked(name, value)
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = _from_objects(array)
    except Exception as error:  # another library's array may raise anything
        raise InputError(
            f"{name} must be an array of numbers, got {brief(value)} ({reason(error)})"
        ) from None
    dtype = array.dtype
    _check_real(name, dtype, value)
    if dtype.kind == "f" and dtype.itemsize > 8:
        return _cast(array, np.dtype(np.float64))  # a longdouble
    return array.astype(dtype.newbyteorder("="), copy=False)


def real_array(name: str, value: ArrayLike, *, keep_integers: bool = False) -> jax.Array:
    """The value as a JAX array of float32 or float64.

    NumPy's float64 becomes float32 if x64 is off, half precision becomes float32, and integers and
    bools become JAX's default float, on the host, before JAX could wrap integers. A JAX array stays
    on its device and may be traced; a Python number stays weakly typed.

    Args:
        name: the value's name in messages.
        value: the value.
        keep_integers: keep integers and bools, and refuse integers that JAX would wrap.

    Raises:
        InputError: as `native_numbers`.
    """
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if _any_entry(value, _is_jax_array) and not isinstance(value, jax.Array):
        value = _stacked(name, cast(Sequence[Any], value))
    kept = (np.integer, np.bool_) if keep_integers else ()
    if isinstance(value, jax.Array):
        _check_real(name, value.dtype, value)
        if any(jax.dtypes.issubdtype(value.dtype, kind) for kind in kept):
            return value
        dtype = _floating(value.dtype)
        traced = isinstance(value, jax.core.Tracer)
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            return value if value.dtype == dtype else value.astype(dtype)
    array = native_numbers(name, value)
    if any(jax.dtypes.issubdtype(array.dtype, kind) for kind in kept):
        array = _unwrapped(name, array)
    else:
        array = _cast(array, _floating(array.dtype))
    weak = type(value) in (int, float) and not kept
    with jax.ensure_compile_time_eval():  # inside a traced function, a constant is known
        if weak:
            return jnp.asarray(float(array))
        # A copy, since callers may change their array; `jnp.asarray` would compile a program.
        return jax.device_put(array.copy())


def checked_array(name: str, value: ArrayLike, *, keep_integers: bool = False) -> jax.Array:
    """`real_array`, and finite unless it is traced."""
    x = real_array(name, value, keep_integers=keep_integers)
    if isinstance(x, jax.core.Tracer):
        return x
    if not all_finite(x):
        from_jax = _any_entry(value, _is_jax_array)
        given = np.asarray(x) if from_jax else native_numbers(name, value)
        bad = given[~np.isfinite(np.asarray(x))][0]
        if np.isfinite(bad):
            raise InputError(
                f"{name} must be finite in {x.dtype}, got {bad}; scale it down, or enable x64"
            )
        raise InputError(f"{name} must be finite, got {bad}; drop or fill such entries")
    return x


def on_host(x: Any) -> Any:
    """An array that is not traced, as NumPy's if it lies in the host's memory, and else as it is.

    NumPy compiles nothing for the array's shape.
    """
    in_memory = not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())
    return np.asarray(x) if in_memory else x


def all_finite(x: Any) -> bool:
    """Does an array that is not traced hold finite numbers only?"""
    x = on_host(x)
    with jax.ensure_compile_time_eval():
        return bool(x.__array_namespace__().isfinite(x).all())


def common_dtype(*arrays: Any) -> np.dtype:
    """The arrays' common floating dtype, float32 at least.

    Callers convert to it, so that ``jax_numpy_dtype_promotion="strict"`` works.
    """
    with jax.numpy_dtype_promotion("standard"):
        return _floating(jnp.result_type(*arrays))


def _check_real(name: str, dtype: np.dtype, value: Any) -> None:
    if jax.dtypes.issubdtype(dtype, np.complexfloating):
        raise InputError(f"{name} must be real, got {dtype}; stack real and imaginary parts")
    number = jax.dtypes.issubdtype(dtype, np.number) and dtype.kind != "m"
    if not (number or dtype == np.bool_):
        raise InputError(f"{name} must be an array of numbers, got {brief(value)} of dtype {dtype}")


def _floating(dtype: np.dtype) -> np.dtype:
    """The dtype to compute in with numbers of ``dtype``: float32, or float64 if x64 is on."""
    if not jax.dtypes.issubdtype(dtype, np.floating):
        return jnp.result_type(float)
    wide = dtype.itemsize > 4 and jax.config.read("jax_enable_x64")
    return np.dtype(np.float64 if wide else np.float32)


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As another dtype; numbers beyond it become infinite, which a later check finds."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _unwrapped(name: str, array: np.ndarray) -> np.ndarray:
    """Integers in JAX's dtype for them."""
    converted = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    wrapped = converted != array
    if wrapped.any():
        raise InputError(
            f"{name} must be integers within {converted.dtype}, got {array[wrapped][0]}; give "
            "floats, or enable x64"
        )
    return converted


def _stacked(name: str, value: Sequence[Any]) -> jax.Array:
    """Nested lists of JAX arrays, which may be traced."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.stack([real_array(name, one) for one in value])
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} must be an array of numbers, got {brief(value)} ({reason(error)})"
        ) from None


def _from_objects(array: np.ndarray) -> np.ndarray:
    """Any objects with a ``__float__`` as float64; complex numbers as complex128."""
    types = set(map(type, array.flat))
    if type(np.ma.masked) in types:
        raise TypeError("masked entries among them")
    if any(
        issubclass(kind, numbers.Complex) and not issubclass(kind, numbers.Real) for kind in types
    ):
        return array.astype(np.complex128)
    for kind in types:
        if issubclass(kind, str | bytes | NoneType):
            raise TypeError(f"{kind.__name__} among them")
    return array.astype(np.float64)


def _any_entry(value: Any, found: Callable[[Any], bool]) -> bool:
    """True if ``found`` is, for the value or an entry of nested lists and tuples."""
    if not isinstance(value, list | tuple):
        return bool(found(value))
    if set(map(type, value)) <= {float, int}:  # fast, without a loop in Python
        return False
    return any(_any_entry(one, found) for one in value)


def _is_masked(value: Any) -> bool:
    plain = isinstance(value, np.ma.MaskedArray) and value.dtype.names is None
    return plain and bool(np.ma.is_masked(value))


def _is_jax_array(value: Any) -> bool:
    return isinstance(value, jax.Array)


def reason(error: Exception) -> str:
    """What an error says, as one short line, for a message."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def check_rows(name: str, x: jax.Array) -> None:
    """At least one example along the first axis."""
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"{name} must have at least one row, got shape {x.shape}")


def checked_inputs(name: str, value: ArrayLike) -> jax.Array:
    """A batch for a network or its limit: [n, d_in] or [n, H, W, c], floating point, finite."""
    x = checked_array(name, value)
    if x.ndim not in (2, 4) or 0 in x.shape[1:]:
        raise InputError(
            f"{name} must be [n, d_in] or NHWC images [n, H, W, c], got shape {x.shape}; "
            "add the missing axes"
        )
    return x


def checked_pair(
    x1: ArrayLike,
    x2: ArrayLike | None,
    checked: Callable[[str, ArrayLike], jax.Array] = checked_inputs,
    names: tuple[str, str] = ("x1", "x2"),
) -> tuple[jax.Array, jax.Array | None]:
    """The two batches of a kernel, inputs of one shape and dtype; x2 is None if it is x1."""
    left = checked(names[0], x1)
    if x2 is None or x2 is x1:
        return left, None
    right = checked(names[1], x2)
    if left.shape[1:] != right.shape[1:]:
        raise InputError(
            f"{names[1]} must hold inputs of shape {left.shape[1:]}, as {names[0]} does, got "
            f"{right.shape[1:]}; reshape or resize one of them"
        )
    dtype = common_dtype(left, right)
    return left.astype(dtype), right.astype(dtype)


def check_deviation(name: str, value: Any) -> Any:
    """A standard deviation, finite and >= 0, as a Python number unless it is a JAX array.

    A traced value is not checked.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    number = real_number(f"{name}, a standard deviation,", value, "a finite number >= 0")
    if not 0 <= number < math.inf:
        raise InputError(
            f"{name}, a standard deviation, must be a finite number >= 0, got {brief(value)}"
        )
    return value if isinstance(value, jax.Array) else number


def check_count(name: str, value: Any) -> int:
    """A positive integer, as a Python int."""
    number = integer(name, value, "a positive integer")
    if number < 1:
        raise InputError(f"{name} must be a positive integer, got {brief(value)}")
    return number


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """Any library's integer as a Python int."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be {expected}, got {brief(value)}") from None


def real_number(name: str, value: Any, expected: str = "a number") -> float:
    """Any library's real number, or an array of shape (), as a Python float."""
    try:
        if isinstance(value, str | bytes) or _is_masked(value) or np.ndim(value):
            raise TypeError
        return float(value)
    except Exception:
        raise InputError(f"{name} must be {expected}, got {brief(value)}") from None


def check_key(name: str, key: Any) -> None:
    """Refuse what is no random key of JAX, typed or of two raw integers."""
    try:
        jax.random.key_data(key)
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: expected a random key of JAX, got {brief(key)}; make one by jax.random.key(0)"
        ) from None


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {brief(value)}")


def number_within(name: str, value: Any, valid: Callable[[float], bool], expected: str) -> float:
    """Any library's number, but no bool, as a Python float if it is ``valid``."""
    try:
        number = math.nan if isinstance(value, bool | np.bool_) else real_number(name, value)
    except InputError:
        number = math.nan
    if not valid(number):
        raise InputError(f"{name}: expected {expected}, got {brief(value)}")
    return number


def not_negative(name: str, value: Any) -> float:
    """Any library's finite number >= 0, as a Python float."""
    return number_within(name, value, lambda v: 0 <= v < math.inf, "a finite number >= 0")


def host_numbers(name: str, value: HostArrayLike) -> NDArray[np.float64]:
    """A finite float64 copy on the host, also if JAX's x64 is off."""
    array = native_numbers(name, value).astype(np.float64)
    if not np.isfinite(array).all():
        bad = array[~np.isfinite(array)][0]
        raise InputError(f"{name}: expected finite numbers, got {bad}; drop or fill such entries")
    return array


def host_examples(name: str, value: HostArrayLike) -> NDArray[np.float64]:
    """Examples [n, ...], at least one."""
    array = host_numbers(name, value)
    if array.ndim < 2 or array.size == 0:
        raise InputError(
            f"{name}: expected examples [n, ...], at least one, got shape {list(array.shape)}"
        )
    return array


def host_targets(
    name: str, value: HostArrayLike, n: int, *, examples: str = "x_train"
) -> NDArray[np.float64]:
    """Targets [n, d_out] of n ``examples``; [n] is one output."""
    array = host_numbers(name, value)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != n or array.shape[1] == 0:
        raise InputError(
            f"{name}: expected [n, d_out] with n = {n}, as {examples} has, got shape "
            f"{list(np.shape(value))}"
        )
    return array


def host_times(time: float | Sequence[float]) -> list[float]:
    """Kernel times >= 0, at least one; infinity is allowed."""
    try:
        times = np.atleast_1d(native_numbers("time", time)).astype(np.float64)
    except InputError:
        times = np.zeros(0)
    if times.ndim != 1 or not times.size or not (times >= 0).all():
        raise InputError(f"time: expected one or more numbers >= 0, or infinity, got {brief(time)}")
    return times.tolist()
