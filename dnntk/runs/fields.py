"""Fields of the configurations: any library's values as Python's own.

Configurations are compared, hashed and written as JSON, for which NumPy's and JAX's numbers and
paths are unsuitable. A configuration's ``__post_init__`` calls `convert` first and then checks
ranges.
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

__all__ = [
    "LARGEST",
    "LARGEST_SEED",
    "convert",
    "converted",
    "exact",
    "short_repr",
    "without_effect",
]

# Devices count steps and sizes in int32.
LARGEST = 2**31 - 1
# JAX ignores all but 32 bits of a seed if x64 is off.
LARGEST_SEED = 2**32 - 1
EXPECTED = {int: "an integer", float: "a number", str: "a str", bool: "True or False"}
EXPECTED |= {os.PathLike: "a path", type(None): "None"}


def convert(config: Any) -> None:
    """Replace every field of a frozen dataclass by a Python value of its annotated type.

    Integers are converted by ``operator.index``, numbers by ``float``, paths by ``os.fspath``, and
    sequences, including one-dimensional arrays, to tuples.

    Raises:
        InputError: a field has another type, is NaN, or is an integer that is too large for JAX.
    """
    for field in dataclasses.fields(config):
        value = converted(field.name, getattr(config, field.name), field.type)
        object.__setattr__(config, field.name, value)


def converted(name: str, value: Any, kind: Any) -> Any:
    """``value`` as a Python value of the type ``kind``: one of `EXPECTED`, a tuple, or a union."""
    kinds = _alternatives(kind)
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        try:
            if one is not type(None):
                return _as(name, value, one)
        except InputError:
            raise
        except Exception:  # another library's array may raise anything
            continue
    expected = " or ".join(_described(one) for one in kinds)
    raise InputError(f"{name}: expected {expected}, got {brief(value)}")


def without_effect(config: Any, names: Iterable[str], reason: str) -> None:
    """Refuse settings that are not at their default although they have no effect.

    Raises:
        InputError: one of the fields ``names`` is not at its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise InputError(f"{name}: no effect {reason}, got {brief(value)}; leave it out")


def exact(number: float) -> str:
    """``number`` in a file's name: short where that is exact, so no two numbers share a name."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    found = typing.get_args(kind) if union else (kind,)
    # ``str`` comes first: a str is a sequence and a path, too.
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
    """One line for a dataclass, with sizes instead of contents; to be assigned as ``__repr__``."""
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
