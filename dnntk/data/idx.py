"""Reader of raw IDX files, the format in which MNIST and its relatives are published.

An IDX file is a big-endian header (two zero bytes, a type byte, the rank, then a 32-bit size for
each dimension) followed by the values in row-major order. The reader needs only NumPy and takes
plain and gzipped files. It allocates no more memory than the file has bytes, whatever a damaged or
hostile header says. Source of the format: http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import math
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from dnntk.errors import InputError
from dnntk.runs.paths import as_path

__all__ = ["MNIST_FILES", "find_idx", "read_idx", "read_pair"]

# The published names: images and labels for training, then for testing.
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
# Deflate's shortest code has 2 bits and expands to at most 258 bytes (RFC 1951): 1032 per byte.
_DEFLATE_MAX_RATIO = 1032


def read_idx(path: str | os.PathLike[str], rank: int) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes; files named ``*.gz`` are decompressed.

    Args:
        path: the file.
        rank: the required number of dimensions: 3 for images, 1 for labels.

    Returns:
        A uint8 array of the shape in the header. Memory: the array, and at most an eighth more
        while reading.

    Raises:
        InputError: the file is missing, unreadable, damaged, of another type or rank, or shorter
            or longer than its header says.
    """
    path = as_path("path", path)
    size = _file_size(path)
    zipped = path.suffix == ".gz"
    try:
        if zipped:
            _check_gzip_magic(path)
        with gzip.open(path) if zipped else path.open("rb") as opened:
            stream = cast(BinaryIO, opened)
            shape = _read_shape(stream, path, rank)
            _check_possible(shape, path, size, zipped)
            payload = _read_at_most(stream, math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: expected an intact gzip file, found damage ({error}); delete it and "
            "download it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable file, found '{error.strerror}'; correct its permissions"
        ) from error
    _check_length(payload, shape, path)
    return np.frombuffer(payload, np.uint8).reshape(shape)


def read_pair(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images and their labels, and check that they belong together.

    Args:
        images_path: an IDX file of rank 3.
        labels_path: an IDX file of rank 1.

    Returns:
        Images [n, H, W] and labels [n], 0 to 9, both uint8.

    Raises:
        InputError: as `read_idx`; the numbers of images and labels differ; a label is above 9.
    """
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: expected a label for each of the {len(images)} images in "
            f"{images_path.name}, found {len(labels)}; take both files from one dataset"
        )
    if labels.max() > 9:
        raise InputError(
            f"{labels_path}: expected labels 0 to 9, found {labels.max()}; check that it belongs "
            "to this dataset"
        )
    return images, labels


def find_idx(folder: str | os.PathLike[str], name: str) -> Path | None:
    """Find a published IDX file under any of its usual names.

    Args:
        folder: the folder to search, not recursively.
        name: the published name, such as ``train-images-idx3-ubyte``. The variant with a dot
            (``train-images.idx3-ubyte``), and both with ``.gz``, are found, too.

    Returns:
        The file, a plain one before a gzipped one; None without such a file.
    """
    folder, stems = as_path("folder", folder), (name, name.replace("-idx", ".idx"))
    candidates = [folder / (stem + suffix) for suffix in ("", ".gz") for stem in stems]
    # Some unpackers make a directory of that name. It is returned if there is no file, so that
    # `read_idx` explains the problem.
    found = [path for path in candidates if os.path.isfile(path)]
    found += [path for path in candidates if os.path.exists(path)]
    return found[0] if found else None


def _file_size(path: Path) -> int:
    """Size in bytes of a regular, non-empty file."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(
            f"{path}: expected an IDX file, found '{error.strerror}'; check the path"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a special file"
        raise InputError(f"{path}: expected an IDX file, found {kind}; name the file itself")
    if status.st_size == 0:
        raise InputError(
            f"{path}: expected an IDX file, found an empty file; delete it and download it again"
        )
    return status.st_size


def _check_gzip_magic(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start != _GZIP_MAGIC:
        raise InputError(
            f"{path}: expected a gzip file (first bytes 1f8b) because of its name, found "
            f"{start.hex()}; drop .gz from the name if it is a plain IDX file, else download it "
            "again"
        )


def _read_shape(stream: BinaryIO, path: Path, rank: int) -> tuple[int, ...]:
    """Read and check the header: the magic number, then one size a dimension."""
    expected = bytes([0, 0, _UNSIGNED_BYTE, rank])
    magic = stream.read(4)
    if magic[:2] == _GZIP_MAGIC:
        raise InputError(f"{path}: expected a plain IDX file, found gzip; add .gz to its name")
    if magic != expected:
        raise InputError(
            f"{path}: expected an IDX file of unsigned bytes and rank {rank} (first bytes "
            f"{expected.hex()}), found {magic.hex()}; images have rank 3 and labels rank 1: check "
            "that the right file has this name"
        )
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise InputError(
            f"{path}: expected a header of {4 + 4 * rank} bytes, found {4 + len(sizes)}; "
            "the file is cut short: delete it and download it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    if 0 in shape:
        raise InputError(
            f"{path}: expected at least one value, found the shape {_times(shape)} in the header; "
            "download it again"
        )
    return shape


def _check_possible(shape: tuple[int, ...], path: Path, size: int, zipped: bool) -> None:
    """Refuse a header with more values than a file of this size can contain."""
    room = (size * _DEFLATE_MAX_RATIO if zipped else size) - 4 - 4 * len(shape)
    if math.prod(shape) > room:
        raise InputError(
            f"{path}: expected {_times(shape)} = {math.prod(shape)} bytes after the header, found "
            f"room for {room} in a file of {size}; delete it and download it again"
        )


def _read_at_most(stream: BinaryIO, count: int) -> bytearray:
    """Read at most ``count`` bytes, in chunks, as ``read(count)`` would allocate all at once."""
    payload = bytearray()
    while chunk := stream.read(min(_CHUNK, count - len(payload))):
        payload += chunk
    return payload


def _check_length(payload: bytearray, shape: tuple[int, ...], path: Path) -> None:
    count = math.prod(shape)
    if len(payload) != count:
        found = "more" if len(payload) > count else f"only {len(payload)}"
        raise InputError(
            f"{path}: expected {_times(shape)} = {count} bytes after the header, found {found}; "
            "download it again"
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
