"""Paths that a user gives, checked in one place: workdirs, folders of data, files to save to."""

import errno
import os
from pathlib import Path
from typing import Any

from dnntk.checks import brief
from dnntk.errors import InputError

__all__ = ["as_path", "make_folder"]


def as_path(name: str, value: Any) -> Path:
    """``value`` as a path, with ``~`` and ``~user`` expanded as a shell would.

    Args:
        name: the argument that holds the value, for messages.
        value: a str or `os.PathLike`.

    Raises:
        InputError: the value is not a str or path, is empty, has a null character, cannot be
            encoded, is too long, or names a user without a known home folder.
    """
    try:
        text = os.fsdecode(value)
    except TypeError:
        raise InputError(f"{name}: expected a path, got {brief(value)}; give a str") from None
    try:
        if not text or "\0" in text:
            raise ValueError("empty" if not text else "it has a null character")
        path = Path(text).expanduser()
        os.lstat(path)
    except RuntimeError:  # of `expanduser`
        raise InputError(
            f"{name}: expected a path, got {text!r}, but no home folder is known; write it out"
        ) from None
    except ValueError as error:  # also from characters that the system cannot encode
        raise InputError(
            f"{name}: expected a path, got {brief(value)} ({error}); give another"
        ) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{name}: expected a path, got one of {len(text)} characters ({error.strerror}); "
                "give a shorter one"
            ) from None
    return path


def make_folder(name: str, folder: Path) -> None:
    """Make ``folder``, the value of argument ``name``, and those above it, if they are missing.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{name}: expected a folder that can be made, got {folder} ({error.strerror}); give "
            "another"
        ) from None
