"""Checks of arguments that the numerical modules share: one line that names the argument."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import ArrayLike as HostArrayLike
from numpy.typing import NDArray

from dnntk.errors import InputError


def checked_array(name: str, value: ArrayLike) -> jax.Array:
    """The value as an array; finite where its values are known, that is, where it is not traced."""
    with jax.ensure_compile_time_eval():  # inside a traced function, constants are checked too
        try:
            x = jnp.asarray(value)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be an array of numbers, got {value!r:.60}") from None
        if jnp.iscomplexobj(x):
            raise InputError(f"{name} must be real, got {x.dtype}; stack real and imaginary parts")
        if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
            values = np.asarray(x, np.float64)
            bad = values[~np.isfinite(values)][0]
            raise InputError(f"{name} must be finite, got {bad}; drop or fill such entries")
    return x


def checked_inputs(name: str, value: ArrayLike) -> jax.Array:
    """A batch for a network or its limit: [n, d_in] or [n, H, W, c], floating point, finite."""
    x = checked_array(name, value)
    if x.ndim not in (2, 4) or 0 in x.shape[1:]:
        raise InputError(
            f"{name} must be [n, d_in] or NHWC images [n, H, W, c], got shape {x.shape}; "
            "add the missing axes"
        )
    return x.astype(jnp.result_type(x, float))


def checked_pair(
    x1: ArrayLike,
    x2: ArrayLike | None,
    checked: Callable[[str, ArrayLike], jax.Array] = checked_inputs,
) -> tuple[jax.Array, jax.Array | None]:
    """The two batches of a kernel, holding inputs of one shape; None for x2 where it is x1."""
    left = checked("x1", x1)
    if x2 is None or x2 is x1:
        return left, None
    right = checked("x2", x2)
    if left.shape[1:] != right.shape[1:]:
        raise InputError(
            f"x2 must hold inputs of shape {left.shape[1:]}, as x1 does, got {right.shape[1:]}; "
            "reshape or resize one of them"
        )
    return left, right


def check_deviation(name: str, value: Any) -> None:
    """A standard deviation: a finite number >= 0, unless it is traced."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        valid = np.ndim(value) == 0 and 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{name}, a standard deviation, must be a finite number >= 0, got {value!r}"
        )


def check_count(name: str, value: Any) -> None:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def is_number(value: object) -> bool:
    """A real number, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def host_numbers(name: str, value: HostArrayLike) -> NDArray[np.float64]:
    """As float64 on the host, whatever JAX's default is; finite."""
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected an array of real numbers, got {value!r:.60}") from None
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


def host_targets(name: str, value: HostArrayLike, n: int) -> NDArray[np.float64]:
    """Targets [n, d_out]; [n] is one output."""
    array = host_numbers(name, value)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != n or array.shape[1] == 0:
        raise InputError(
            f"{name}: expected [n, d_out] with n = {n}, as x_train has, got shape "
            f"{list(np.shape(value))}"
        )
    return array


def host_times(time: float | Sequence[float]) -> list[float]:
    """Kernel times >= 0, at least one; infinity is one."""
    try:
        times = [float(t) for t in np.atleast_1d(np.asarray(time, np.float64))]
    except (TypeError, ValueError):
        times = [math.nan]
    if not times or not all(t >= 0 for t in times):
        raise InputError(f"time: expected one or more numbers >= 0, or infinity, got {time!r:.80}")
    return times
