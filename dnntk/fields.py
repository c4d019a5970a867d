"""Fields of the configurations: Python's own values, whatever library's the caller gives.

A configuration is compared, hashed and written as JSON, which NumPy's and JAX's numbers and paths
are not made for. `convert` is called first in a configuration's ``__post_init__``; the checks of
ranges follow.
"""

import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from dnntk.checks import brief
from dnntk.errors import InputError

# Steps and sizes are counted in int32 on the devices.
LARGEST = 2**31 - 1
# Of a seed, JAX takes 32 bits where x64 is off, and drops the rest.
LARGEST_SEED = 2**32 - 1
EXPECTED = {int: "an integer", float: "a number", str: "a str", bool: "True or False"}
EXPECTED |= {os.PathLike: "a path", type(None): "None"}


def convert(config: Any) -> None:
    """Replace every field of a frozen dataclass by Python's own value of its annotated type.

    Integers are taken by ``operator.index``, numbers by ``float``, paths by ``os.fspath``, and
    sequences, one-dimensional arrays among them, become tuples.

    Raises:
        InputError: a field holds something else, NaN, or an integer beyond what JAX counts to.
    """
    for field in dataclasses.fields(config):
        value = converted(field.name, getattr(config, field.name), field.type)
        object.__setattr__(config, field.name, value)


def converted(name: str, value: Any, kind: Any) -> Any:
    """``value`` as Python's own value of the type ``kind``: one of `EXPECTED`, a tuple, a union."""
    kinds = _alternatives(kind)
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        try:
            if one is not type(None):
                return _as(name, value, one)
        except InputError:
            raise
        except Exception:  # an array of another library's may raise anything
            continue
    expected = " or ".join(_described(one) for one in kinds)
    raise InputError(f"{name}: expected {expected}, got {brief(value)}")


def without_effect(config: Any, names: Iterable[str], reason: str) -> None:
    """Refuse settings that were changed where they cannot change anything.

    Raises:
        InputError: one of the fields ``names`` is not at its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise InputError(f"{name}: no effect {reason}, got {brief(value)}; leave it out")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    found = typing.get_args(kind) if union else (kind,)
    # A str is a sequence, and a path: whatever takes it as such comes first.
    return tuple(sorted(found, key=lambda one: one is not str))


def _as(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str | bytes | Mapping | Set) or np.ndim(value) != 1:
            raise TypeError
        inner = typing.get_args(kind)[0]
        return tuple(converted(name, one, inner) for one in value)
    if kind in (os.PathLike, os.PathLike[str]):
        return os.fsdecode(os.fspath(value))
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return str(value)
    truth = isinstance(value, bool | np.bool_)
    if kind is bool:
        if not truth:
            raise TypeError
        return bool(value)
    if truth:
        raise TypeError
    return _integer(name, value) if kind is int else _number(name, value)


def _integer(name: str, value: Any) -> int:
    number = operator.index(value)
    largest = LARGEST_SEED if name == "seed" else LARGEST
    if abs(number) > largest:
        raise InputError(f"{name}: expected an integer of at most {largest}, got {brief(number)}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bytes | bytearray) or np.ndim(value) or np.ma.is_masked(value):
        raise TypeError
    number = float(value)
    if math.isnan(number):
        raise InputError(f"{name}: expected a number, got nan")
    return number


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        inner = {int: "integers like (0, 1)", float: "numbers like (1.0, 10.0)", str: "words"}
        return f"a sequence of {inner[typing.get_args(kind)[0]]}"
    return EXPECTED[typing.get_origin(kind) or kind]


def short_repr(held: Any) -> str:
    """A dataclass in a line, with the sizes of what it holds in place of the content.

    To be assigned as ``__repr__``.
    """
    shown = (f"{f.name}={_short(getattr(held, f.name))}" for f in dataclasses.fields(held))
    return f"{type(held).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return brief(value)
    if isinstance(value, tuple) and len(value) <= 10 and not any(map(_is_large, value)):
        return brief(value)
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size}>"


def _is_large(value: Any) -> bool:
    return not isinstance(value, bool | int | float | str)
