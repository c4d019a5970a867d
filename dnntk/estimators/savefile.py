"""A file of float64 arrays and a description, without code, with a checksum of every byte.

The layout is that of safetensors (https://github.com/huggingface/safetensors), which other programs
read: the length of the header as a 64-bit little-endian number, the header in JSON, then the bytes
of the arrays. The header's metadata hold the kind of the content, a description, and a SHA-256 of
everything else. Use this format for fitted objects that must outlast a version of Python or that
others receive: unpickling would run any code in the file. Memory is allocated only after the file's
size and the checksum have confirmed the header.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.runs.paths import as_path

__all__ = ["read", "write"]

FORMAT, VERSION = "dnntk", "1"
_DTYPE, _WIDTH = "F64", 8
_PREFIX = 8  # bytes of the header's length, which is a multiple of 8
_MAX_HEADER = 1 << 26
_CHUNK = 1 << 20
_METADATA = ("about", "format", "kind", "sha256", "version")

PathLike = str | os.PathLike[str]


def write(path: PathLike, kind: str, arrays: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Write a file atomically: if the process is interrupted, an older file remains.

    Args:
        path: the file; an older one is replaced.
        kind: name of the content; `read` must be called with the same.
        arrays: float64, any shape, by name.
        about: a description that JSON can hold.

    Raises:
        InputError: the file cannot be written.
    """
    path = as_path("path", path)
    exact = {name: np.ascontiguousarray(arrays[name], "<f8") for name in sorted(arrays)}
    header = _header({name: a.shape for name, a in exact.items()}, kind, json.dumps(about))
    digest = hashlib.sha256(_encoded(header))
    for array in exact.values():
        digest.update(array.data)
    header["__metadata__"]["sha256"] = digest.hexdigest()
    start = _encoded(header)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(start).to_bytes(_PREFIX, "little") + start)
            for array in exact.values():
                stream.write(array.data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            f"path: expected a file that can be written, got {path} ({error.strerror}); choose "
            "another folder, or make room"
        ) from None


def read(path: PathLike, kind: str) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Read a file that `write` wrote.

    Args:
        path: the file.
        kind: name of the content.

    Returns:
        The arrays, to the bit, and the description. Memory: the arrays.

    Raises:
        InputError: there is no such file; it is damaged, of another kind, or of another version.
    """
    path = as_path("path", path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise InputError(f"{path}: expected a saved {kind}, found no regular file")
        with path.open("rb") as stream:
            return _read(stream, path, status.st_size, kind)
    except OSError as error:
        raise InputError(
            f"{path}: expected a saved {kind}, found '{error.strerror}'; check the path"
        ) from None


def _read(
    stream: BinaryIO, path: Path, size: int, kind: str
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    length = int.from_bytes(stream.read(_PREFIX), "little")
    if not 0 < length <= min(size - _PREFIX, _MAX_HEADER):
        raise _damage(path, kind, f"a header of {length} bytes in a file of {size}")
    start = stream.read(length)
    try:
        header = json.loads(start)
        metadata, shapes = header["__metadata__"], _shapes(header)
        if not all(isinstance(metadata[name], str) for name in _METADATA):
            raise TypeError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _damage(path, kind, "an unreadable header") from None
    if metadata["format"] != FORMAT or metadata["version"] != VERSION:
        raise InputError(
            f"{path}: expected version {VERSION} of the format {FORMAT}, found version "
            f"{metadata['version']!r:.20} of {metadata['format']!r:.20}; read it with the dnntk "
            "that wrote it, and fit and save again"
        )
    expected = _PREFIX + length + sum(_WIDTH * math.prod(shape) for shape in shapes.values())
    if size != expected:
        raise _damage(path, kind, f"{size} bytes where the header promises {expected}")
    canonical = _header(shapes, metadata["kind"], metadata["about"])
    digest = hashlib.sha256(_encoded(canonical))
    left = size - _PREFIX - length
    while left and (chunk := stream.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    canonical["__metadata__"]["sha256"] = digest.hexdigest()
    # The header must be spelled as `write` spells it: no byte of the file may change unnoticed.
    if left or start != _encoded(canonical):
        raise _damage(path, kind, "another checksum than it was saved with")
    if metadata["kind"] != kind:
        raise InputError(
            f"{path}: expected a saved {kind}, found a saved {metadata['kind']!r:.60}; load it "
            "as that"
        )
    try:
        about = json.loads(metadata["about"])
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise _damage(path, kind, "no description")
    stream.seek(_PREFIX + length)
    arrays = {}
    for name, shape in shapes.items():
        values = np.fromfile(stream, "<f8", math.prod(shape))
        if values.size != math.prod(shape):
            raise _damage(path, kind, "a file that another process changes")
        arrays[name] = values.reshape(shape).astype(np.float64, copy=False)
    return arrays, about


def _header(shapes: Mapping[str, tuple[int, ...]], kind: str, about: str) -> dict[str, Any]:
    """The header without the checksum."""
    metadata = {"about": about, "format": FORMAT, "kind": kind, "version": VERSION}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _WIDTH * math.prod(shape)
        header[name] = {"dtype": _DTYPE, "shape": list(shape), "data_offsets": [begin, end]}
    return header


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _PREFIX)


def _shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The arrays' shapes by name; errors of many types for what is no such header."""
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    for shape in shapes.values():
        if not 0 < len(shape) <= 8 or not all(
            type(side) is int and 0 < side < 2**63 for side in shape
        ):
            raise ValueError
    return {name: tuple(shape) for name, shape in shapes.items()}


def _damage(path: Path, kind: str, found: str) -> InputError:
    return InputError(
        f"{path}: expected an intact saved {kind}, found {found}; save it again, or copy it again"
    )
