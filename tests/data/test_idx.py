"""Every IDX file is read exactly, or refused in one line at no cost in memory."""

import gzip
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dnntk.data.idx import find_idx, read_idx
from dnntk.errors import InputError

BILLION = 10**9
MEBIBYTE = 1 << 20


def header(*shape: int, kind: int = 8) -> bytes:
    """The start of an IDX file."""
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


IMAGES = header(2, 3, 4) + bytes(range(24))
ZIPPED = gzip.compress(IMAGES, mtime=0)


def refusal(path: Path, rank: int = 3) -> str:
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(InputError) as caught:
        read_idx(path, rank)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert "found" in message and "; " in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(1,), (17,), (5, 3), (2, 3, 4), (1, 1, 1), (3, 28, 28)])
def test_reads_what_was_written(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    values = np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)
    raw = header(*shape) + values.tobytes()
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    read = read_idx(path, len(shape))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, values)


def test_reads_across_chunks(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 1000, 1000), np.uint8)
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(header(*values.shape) + values.tobytes(), 1))
    np.testing.assert_array_equal(read_idx(path, 3), values)


@pytest.mark.parametrize(
    ("name", "content", "rank", "words"),
    [
        ("labels", header(5) + bytes(5), 3, "rank 3 (first bytes 00000803), found 00000801"),
        ("images", IMAGES, 1, "rank 1 (first bytes 00000801), found 00000803"),
        ("floats", header(1, 1, 1, kind=0x0D) + bytes(4), 3, "found 00000d03"),
        ("text", b"hello, world", 3, "found 68656c6c"),
        ("tiny", b"\0\0", 3, "found 0000;"),
        ("header", header(2, 3, 4)[:-1], 3, "a header of 16 bytes, found 15"),
        ("zero", header(0, 28, 28), 3, "the shape 0 x 28 x 28"),
        ("zero_billion", header(BILLION, 0, 28), 3, "the shape 1000000000 x 0 x 28"),
        ("short", IMAGES[:-1], 3, "2 x 3 x 4 = 24 bytes after the header, found room for 23"),
        ("long", IMAGES + b"\0", 3, "= 24 bytes after the header, found more"),
        ("zipped", ZIPPED, 3, "found gzip; add .gz"),
        ("empty", b"", 3, "found an empty file"),
        ("empty.gz", b"", 3, "found an empty file"),
        ("plain.gz", IMAGES, 3, "expected a gzip file (first bytes 1f8b) because of its name"),
        ("one.gz", b"\x1f", 3, "because of its name, found 1f;"),
        ("cut.gz", ZIPPED[:-9], 3, "found damage"),
        ("crc.gz", ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], 3, "CRC check failed"),
        ("after.gz", ZIPPED + b"garbage", 3, "found damage"),
        ("short.gz", gzip.compress(IMAGES[:-1], mtime=0), 3, "found only 23"),
        ("long.gz", gzip.compress(IMAGES + b"\0", mtime=0), 3, "found more"),
        ("nothing.gz", gzip.compress(b"", mtime=0), 3, "found ;"),
    ],
)
def test_refuses(tmp_path: Path, name: str, content: bytes, rank: int, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refusal(path, rank)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "directory.gz").mkdir()
    assert "found a directory" in refusal(tmp_path / "directory.gz")
    assert "No such file" in refusal(tmp_path / "absent")
    assert "found a special file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_truncation_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = ZIPPED if suffix else IMAGES
    path = tmp_path / f"file{suffix}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole)
    assert read_idx(path, 3).shape == (2, 3, 4)


def test_no_flipped_bit_of_a_gzip_file_changes_the_values(tmp_path: Path) -> None:
    """Most flips are refused; a few gzip header fields (time, system) carry no data."""
    path = tmp_path / "file.gz"
    refused = 0
    for index in range(8 * len(ZIPPED)):
        flipped = bytearray(ZIPPED)
        flipped[index // 8] ^= 1 << index % 8
        path.write_bytes(flipped)
        try:
            read = read_idx(path, 3)
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(read.ravel(), np.arange(24))
    assert refused > 4 * len(ZIPPED)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain", header(BILLION, 28, 28) + bytes(1000)),
        ("promise.gz", gzip.compress(header(BILLION, 28, 28) + bytes(1000), mtime=0)),
        # Within what deflate could make of these bytes, so only reading shows that it is not there.
        (
            "likely.gz",
            gzip.compress(header(40, 1000, 1000) + np.random.default_rng(0).bytes(50000), mtime=0),
        ),
        ("bomb.gz", gzip.compress(header(1, 28, 28) + bytes(64 * MEBIBYTE), mtime=0)),
    ],
)
def test_lying_headers_cost_no_memory(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    tracemalloc.start()
    try:
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MEBIBYTE


def test_memory_follows_the_content(tmp_path: Path) -> None:
    """An honest file costs its own size and a little: here 16 MiB from a file of 16 KiB."""
    shape = (16, 1024, 1024)
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(header(*shape) + bytes(math.prod(shape))))
    tracemalloc.start()
    try:
        assert not read_idx(path, 3).any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert math.prod(shape) <= peak < 1.25 * math.prod(shape) + 4 * MEBIBYTE


@pytest.mark.parametrize(
    "published",
    ["t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_finds_every_published_name(tmp_path: Path, published: str, suffix: str) -> None:
    assert find_idx(tmp_path, "t10k-labels-idx1-ubyte") is None
    (tmp_path / (published + suffix)).touch()
    assert find_idx(tmp_path, "t10k-labels-idx1-ubyte") == tmp_path / (published + suffix)
    assert find_idx(tmp_path, "train-labels-idx1-ubyte") is None
    assert find_idx(tmp_path / "absent", "t10k-labels-idx1-ubyte") is None


def test_finds_files_before_directories_and_plain_before_zipped(tmp_path: Path) -> None:
    name = "train-images-idx3-ubyte"
    (tmp_path / name).mkdir()
    assert find_idx(tmp_path, name) == tmp_path / name
    for better in (f"{name}.gz", "train-images.idx3-ubyte"):
        (tmp_path / better).touch()
        assert find_idx(tmp_path, name) == tmp_path / better
