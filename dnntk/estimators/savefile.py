"""A file of floating-point arrays and a description, without code, with a checksum of every byte.

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
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.runs.paths import as_path

__all__ = ["read", "write"]

FORMAT, VERSION = "dnntk", "1"
_DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_PREFIX = 8  # bytes of the header's length, which is a multiple of 8
_MAX_HEADER = 1 << 26
_CHUNK = 1 << 20
_MOST_NUMBERS = 1 << 59  # of an array, for NumPy
_METADATA = ("about", "format", "kind", "sha256", "version")

PathLike = str | os.PathLike[str]


def write(path: PathLike, kind: str, arrays: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Write a file atomically: if the process is interrupted, an older file remains.

    Args:
        path: the file; an older one is replaced.
        kind: name of the content; `read` must be called with the same.
        arrays: by name, any shape; float32, and float64 for every other type.
        about: a description that JSON can hold.

    Raises:
        InputError: the file cannot be written.
    """
    path = as_path("path", path)
    exact = {name: _exact(arrays[name]) for name in sorted(arrays)}
    header = _header({name: _Layout.of(a) for name, a in exact.items()}, kind, json.dumps(about))
    digest = hashlib.sha256(_encoded(header))
    for array in exact.values():
        digest.update(array.ravel().data)
    header["__metadata__"]["sha256"] = digest.hexdigest()
    start = _encoded(header)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(start).to_bytes(_PREFIX, "little") + start)
            for array in exact.values():
                stream.write(array.ravel().data)
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


def read(path: PathLike, kind: str) -> tuple[dict[str, NDArray], dict[str, Any]]:
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
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    length = int.from_bytes(stream.read(_PREFIX), "little")
    if not 0 < length <= min(size - _PREFIX, _MAX_HEADER):
        raise _damage(path, kind, f"a header of {length} bytes in a file of {size}")
    start = stream.read(length)
    try:
        header = json.loads(start)
        metadata, layouts = header["__metadata__"], _layouts(header)
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
    expected = _PREFIX + length + sum(layout.bytes for layout in layouts.values())
    if size != expected:
        raise _damage(path, kind, f"{size} bytes where the header promises {expected}")
    canonical = _header(layouts, metadata["kind"], metadata["about"])
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
    for name, layout in layouts.items():
        values = np.fromfile(stream, layout.dtype, math.prod(layout.shape))
        if values.nbytes != layout.bytes:
            raise _damage(path, kind, "a file that another process changes")
        own = layout.dtype.newbyteorder("=")
        arrays[name] = values.reshape(layout.shape).astype(own, copy=False)
    return arrays, about


class _Layout(NamedTuple):
    """One array of a file."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> "_Layout":
        return cls("F32" if array.itemsize == 4 else "F64", array.shape)

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.kind]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def _exact(array: Any) -> np.ndarray:
    """In the byte order and layout of a file."""
    array = np.asarray(array)
    return np.asarray(array, _DTYPES["F32" if array.dtype == np.float32 else "F64"], order="C")


def _header(layouts: Mapping[str, _Layout], kind: str, about: str) -> dict[str, Any]:
    """The header without the checksum."""
    metadata = {"about": about, "format": FORMAT, "kind": kind, "version": VERSION}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, layout in layouts.items():
        begin, end = end, end + layout.bytes
        header[name] = {
            "dtype": layout.kind,
            "shape": list(layout.shape),
            "data_offsets": [begin, end],
        }
    return header


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _PREFIX)


def _layouts(header: dict[str, Any]) -> dict[str, _Layout]:
    """The arrays' layouts by name; errors of many types for what is no such header."""
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            shape, kind = entry["shape"], entry["dtype"]
            sides = all(type(side) is int and side >= 0 for side in shape)
            if kind not in _DTYPES or len(shape) > 8 or not sides:
                raise ValueError
            if math.prod(side or 1 for side in shape) > _MOST_NUMBERS:
                raise ValueError
            found[name] = _Layout(kind, tuple(shape))
    return found


def _damage(path: Path, kind: str, found: str) -> InputError:
    return InputError(
        f"{path}: expected an intact saved {kind}, found {found}; save it again, or copy it again"
    )
