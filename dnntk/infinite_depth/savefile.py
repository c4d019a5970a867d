"""One file of float64 arrays and a description, which holds no code and is believed only if intact.

The layout is that of safetensors (https://github.com/huggingface/safetensors), which other programs
read: the length of the header as a 64-bit little-endian number, the header in JSON, then the arrays
as they lie in memory. The header's metadata hold what the file is, a description, and a SHA-256 of
everything else. Use it for anything fitted that must outlast a version of Python or be given to
others, where unpickling would run whatever the file says. Nothing is allocated before the file's
own size and the checksum bear the header out.
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

FORMAT, VERSION = "dnntk", "1"
_DTYPE, _WIDTH = "F64", 8
_PREFIX = 8  # bytes of the header's length, and what the header's own length is a multiple of
_MOST_HEADER = 1 << 26
_CHUNK = 1 << 20
_METADATA = ("about", "format", "kind", "sha256", "version")

PathLike = str | os.PathLike[str]


def write(path: PathLike, kind: str, arrays: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Write a file, in one move: a run cut short leaves whatever was there before.

    Args:
        path: the file; replaced where it exists.
        kind: what it holds; `read` must be asked for the same.
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
    """Read what `write` wrote.

    Args:
        path: the file.
        kind: what it must hold.

    Returns:
        The arrays, to the bit, and the description. Memory: the arrays.

    Raises:
        InputError: there is no such file; it is damaged, of another kind, or of another version.
    """
    path = as_path("path", path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for for ever
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
    if not 0 < length <= min(size - _PREFIX, _MOST_HEADER):
        raise _damage(path, kind, f"a header of {length} bytes in a file of {size}")
    start = stream.read(length)
    header = _parsed(start)
    shapes = None if header is None else _shapes(header)
    if header is None or shapes is None:
        raise _damage(path, kind, "a header that is none")
    metadata = header["__metadata__"]
    if metadata["format"] != FORMAT or metadata["version"] != VERSION:
        raise InputError(
            f"{path}: expected version {VERSION} of the format {FORMAT}, found version "
            f"{metadata['version']!r:.20} of {metadata['format']!r:.20}; read it with the dnntk "
            "that wrote it, and fit and save anew"
        )
    expected = _PREFIX + length + sum(_WIDTH * math.prod(shape) for shape in shapes.values())
    if size != expected:
        raise _damage(path, kind, f"{size} bytes where the header promises {expected}")
    claimed = metadata.pop("sha256")
    digest = hashlib.sha256(_encoded(header))
    left = size - _PREFIX - length
    while left and (chunk := stream.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    metadata["sha256"] = claimed
    # The header must be as `write` spells it, so that there is no byte without a meaning.
    if left or digest.hexdigest() != claimed or start != _encoded(header):
        raise _damage(path, kind, "another checksum than it was saved with")
    if metadata["kind"] != kind:
        raise InputError(
            f"{path}: expected a saved {kind}, found a saved {metadata['kind']!r:.60}; load it "
            "as that"
        )
    about = _loaded(metadata["about"])
    if not isinstance(about, dict):
        raise _damage(path, kind, "no description")
    stream.seek(_PREFIX + length)
    arrays = {}
    for name, shape in shapes.items():
        values = np.fromfile(stream, "<f8", math.prod(shape))
        if values.size != math.prod(shape):
            raise _damage(path, kind, "a file that is being changed")
        arrays[name] = values.reshape(shape).astype(np.float64, copy=False)
    return arrays, about


def _header(shapes: Mapping[str, tuple[int, ...]], kind: str, about: str) -> dict[str, Any]:
    """All of the header but the checksum."""
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


def _loaded(text: str | bytes) -> Any:
    """JSON, or None: deep nesting and numbers without end are no JSON of this project's."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parsed(start: bytes) -> dict[str, Any] | None:
    """The header, if it has the right members; its arrays are `_shapes`' to look at."""
    header = _loaded(start)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or tuple(sorted(metadata)) != _METADATA:
        return None
    return header if all(isinstance(text, str) for text in metadata.values()) else None


def _shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The arrays' shapes by name, if those are all that the header says of arrays."""
    shapes = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not 0 < len(shape) <= 8:
            return None
        if not all(type(side) is int and 0 < side < 2**63 for side in shape):
            return None
        shapes[name] = tuple(shape)
    rebuilt = _header(shapes, "", "")
    return shapes if all(header[name] == rebuilt[name] for name in shapes) else None


def _damage(path: Path, kind: str, found: str) -> InputError:
    return InputError(
        f"{path}: expected an intact saved {kind}, found {found}; save it again, or copy it again"
    )
