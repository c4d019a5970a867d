"""Datasets: right shapes, targets and splits, and one clear line for every wrong input."""

import dataclasses
import gzip
import hashlib
import importlib
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dnntk.data.datasets import Dataset, load_dataset
from dnntk.data.mnist import LabelledImages, prepare, read_images
from dnntk.errors import InputError

FLOAT32_EPS = float(np.finfo(np.float32).eps)
FILES = {
    "x_train": "train-images-idx3-ubyte",
    "labels_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "labels_test": "t10k-labels-idx1-ubyte",
}
Arrays = dict[str, np.ndarray]

needs_mnist = pytest.mark.skipif(
    "DNNTK_MNIST" not in os.environ,
    reason="set DNNTK_MNIST to a folder with the four published MNIST .gz files",
)


def made_up_set(seed: int, size: tuple[int, int] = (4, 6)) -> Arrays:
    """A small set in MNIST's form: 40 training and 20 test images, all ten classes."""
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (40, *size), np.uint8),
        "labels_train": rng.permutation(np.arange(40, dtype=np.uint8) % 10),
        "x_test": rng.integers(0, 256, (20, *size), np.uint8),
        "labels_test": rng.permutation(np.arange(20, dtype=np.uint8) % 10),
    }


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an IDX file, gzipped if its name says so."""
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    raw += values.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def write_set(folder: Path, arrays: Arrays, suffix: str = "") -> Path:
    """Write a set under the published names."""
    folder.mkdir(exist_ok=True)
    for key, values in arrays.items():
        write_idx(folder / (FILES[key] + suffix), values)
    return folder


def refusal(name: str, **arguments: Any) -> str:
    """The one line with which an input is refused."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, **arguments)
    message = str(caught.value)
    assert "expected" in message and "found" in message and "; " in message
    assert "\n" not in message
    return message


def examples(images: np.ndarray, labels: np.ndarray) -> list[tuple[int, bytes]]:
    """A split as a multiset: equal for equal examples in any order."""
    return sorted(
        (int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)
    )


def assert_same_examples(images: LabelledImages, arrays: Arrays) -> None:
    """Same images with the same labels, both splits, in any order."""
    for split in ("train", "test"):
        expected = examples(arrays[f"x_{split}"], arrays[f"labels_{split}"])
        assert (
            examples(getattr(images, f"x_{split}"), getattr(images, f"labels_{split}")) == expected
        )


def assert_consistent(data: Dataset, d_out: int) -> None:
    """What holds for every dataset of images."""
    for x, y, labels in (
        (data.x_train, data.y_train, data.labels_train),
        (data.x_test, data.y_test, data.labels_test),
    ):
        assert x.dtype == y.dtype == np.float32
        assert x.ndim == 4 and x.shape[-1] == 1
        assert 0 <= x.min() < x.max() <= 1
        assert labels is not None and np.issubdtype(labels.dtype, np.integer)
        assert len(x) == len(labels) and y.shape == (len(labels), d_out)
        decoded = y[:, 0] if d_out == 1 else y.argmax(axis=1)
        np.testing.assert_array_equal(decoded, labels)
        assert set(labels.tolist()) == set(range(len(data.classes)))
        assert set(np.unique(y).tolist()) == {0.0, 1.0}
        if d_out > 1:
            np.testing.assert_array_equal(y.sum(axis=1), 1)
    assert "\n" not in data.description
    for part in (data.name, *map(str, data.classes), str(len(data.x_train)), str(len(data.x_test))):
        assert part in data.description


# The toy problem


def test_toy_is_section_5_1() -> None:
    data = load_dataset("toy")
    assert data.x_train.shape == (200, 2) and data.x_test.shape == (199, 2)
    assert data.x_train.dtype == data.y_train.dtype == np.float32
    assert data.labels_train is None and data.labels_test is None and data.classes == ()
    angles = np.arctan2(data.x_train[:, 1], data.x_train[:, 0])
    step = np.pi / 2 / 219
    np.testing.assert_allclose(angles, step * np.arange(10, 210), atol=4 * FLOAT32_EPS)
    test_angles = np.arctan2(data.x_test[:, 1], data.x_test[:, 0])
    np.testing.assert_allclose(test_angles, step * np.arange(10.5, 209), atol=4 * FLOAT32_EPS)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=4 * FLOAT32_EPS)
        np.testing.assert_allclose(y, x[:, :1] * x[:, 1:], atol=4 * FLOAT32_EPS)


# Digits


def test_digits_holds_out_a_third_of_every_class() -> None:
    data = load_dataset("digits", classes="all")
    assert_consistent(data, 10)
    assert data.x_train.shape[1:] == (8, 8, 1)
    assert data.labels_train is not None and data.labels_test is not None
    published = load_digits()
    counts = np.bincount(published.target)
    np.testing.assert_array_equal(np.bincount(data.labels_test), np.round(counts / 3))
    together = np.concatenate([data.x_train, data.x_test])[..., 0] * 16
    labels = np.concatenate([data.labels_train, data.labels_test])
    whole = examples(published.images.astype(np.float32), published.target)
    assert examples(together, labels) == whole


def test_digits_split_depends_on_the_seed_only() -> None:
    ten, again, other = (load_dataset("digits", classes="all", seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(ten.x_train, again.x_train)
    np.testing.assert_array_equal(ten.labels_test, again.labels_test)
    assert ten.labels_test is not None and other.labels_test is not None
    assert examples(ten.x_test, ten.labels_test) != examples(other.x_test, other.labels_test)
    two = load_dataset("digits", classes=(4, 7), seed=3)
    assert ten.labels_train is not None and two.labels_train is not None
    fours_and_sevens = np.isin(ten.labels_train, (4, 7))
    np.testing.assert_array_equal(two.x_train, ten.x_train[fours_and_sevens])


@pytest.mark.parametrize(
    ("classes", "d_out"), [((0, 1), 1), ((7, 3), 1), ((2, 9, 4), 3), (range(9, -1, -1), 10)]
)
def test_targets_follow_the_order_of_the_classes(classes: tuple[int, ...], d_out: int) -> None:
    data = load_dataset("digits", classes=classes)
    assert_consistent(data, d_out)
    assert data.classes == tuple(classes)
    ten = load_dataset("digits", classes="all")
    assert data.labels_train is not None and ten.labels_train is not None
    expected = ten.labels_train[np.isin(ten.labels_train, classes)]
    np.testing.assert_array_equal(np.array(classes)[data.labels_train], expected)


@pytest.mark.parametrize("pool", [2, 4, 8])
def test_pool_averages_windows(pool: int) -> None:
    full, pooled = load_dataset("digits"), load_dataset("digits", pool=pool)
    side = 8 // pool
    assert pooled.x_test.shape == (len(full.x_test), side, side, 1)
    for row in range(side):
        for column in range(side):
            rows, columns = (slice(pool * i, pool * (i + 1)) for i in (row, column))
            window = full.x_test[:, rows, columns, 0].astype(np.float64)
            np.testing.assert_allclose(
                pooled.x_test[:, row, column, 0], window.mean(axis=(1, 2)), rtol=FLOAT32_EPS
            )


# Folders of raw IDX files


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_a_folder_of_idx_files(tmp_path: Path, name: str, suffix: str) -> None:
    arrays = made_up_set(0)
    write_set(tmp_path, arrays, suffix)
    data = load_dataset(name, classes="all", data_dir=tmp_path)
    assert_consistent(data, 10)
    expected = arrays["x_train"][..., None] / 255
    np.testing.assert_allclose(data.x_train, expected, rtol=FLOAT32_EPS)
    np.testing.assert_array_equal(data.labels_test, arrays["labels_test"])
    assert data.classes[1] == (1 if name == "mnist" else "Trouser")
    assert str(tmp_path) in data.description


def test_pools_rectangular_images_by_common_divisors_only(tmp_path: Path) -> None:
    arrays = made_up_set(1, (6, 9))
    write_set(tmp_path, arrays)
    data = load_dataset("mnist", data_dir=str(tmp_path), pool=3)
    assert data.x_train.shape[1:] == (2, 3, 1)
    message = refusal("mnist", data_dir=tmp_path, pool=2)
    assert message.startswith("pool=2: ") and "6 x 9" in message and "one of 1, 3" in message


def broken(key: str, values: np.ndarray, words: str) -> Any:
    """A case: the made-up set with one file replaced, and the words that name the fault."""
    return pytest.param(key, values, words, id=f"{key}: {words}")


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        broken("x_train", np.zeros((39, 4, 6), np.uint8), "each of the 39 images"),
        broken("labels_test", np.zeros(21, np.uint8), "found 21"),
        broken("labels_train", np.full(40, 10, np.uint8), "labels 0 to 9, found 10"),
        broken("labels_train", np.zeros((40, 4, 6), np.uint8), "rank 1 (first bytes 00000801)"),
        broken("x_test", np.zeros(20, np.uint8), "rank 3 (first bytes 00000803)"),
        broken("x_test", np.zeros((20, 6, 4), np.uint8), "4 x 6 pixels, found 6 x 4"),
        broken("labels_test", np.zeros(20, np.uint8), "none of class 1 among the test images"),
        broken("labels_train", np.ones(40, np.uint8), "none of class 0 among the training images"),
    ],
)
def test_refuses_files_that_do_not_belong_together(
    tmp_path: Path, key: str, values: np.ndarray, words: str
) -> None:
    write_set(tmp_path, made_up_set(0))
    load_dataset("mnist", data_dir=tmp_path)
    write_idx(tmp_path / FILES[key], values)
    assert words in refusal("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("file", FILES.values())
def test_names_the_missing_file(tmp_path: Path, file: str) -> None:
    write_set(tmp_path, made_up_set(0))
    (tmp_path / file).unlink()
    assert f"found no {file};" in refusal("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("cifar10", {}, "name=cifar10: expected one of digits, toy, mnist, fashion_mnist"),
        ("digits", {"classes": ()}, "classes=: expected two classes or more, found 0"),
        ("digits", {"classes": (3,)}, "classes=3: expected two classes or more, found 1"),
        ("digits", {"classes": (1, 1)}, "classes=1,1: expected each class once, found 1"),
        ("digits", {"classes": (0, 10)}, "classes=0,10: expected classes from 0 to 9, found 10"),
        ("digits", {"classes": (-1, 0)}, "found -1"),
        ("digits", {"classes": "some"}, "classes=some: expected numbers or 'all'"),
        ("digits", {"pool": 3}, "pool=3: expected a divisor of the images' 8 x 8 pixels"),
        ("digits", {"pool": 0}, "pool=0: expected a divisor"),
        ("digits", {"pool": -2}, "choose one of 1, 2, 4, 8"),
        ("digits", {"seed": -1}, "seed=-1: expected a whole number of at least 0"),
        ("toy", {"pool": 2}, "pool=2: expected 1"),
        ("mnist", {"data_dir": "/no/such/folder"}, "data_dir=/no/such/folder: expected a folder"),
    ],
)
def test_refuses_bad_arguments(name: str, arguments: dict[str, Any], words: str) -> None:
    assert words in refusal(name, **arguments)


# tensorflow-datasets


def test_import_leaves_tensorflow_datasets_alone() -> None:
    code = "import sys, dnntk.data.datasets; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def serve_as_published(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, address: str
) -> None:
    """Make tensorflow-datasets take a folder's .gz files, at an address, for the published ones.

    Real Fashion-MNIST is not at hand, and the checksums of real MNIST would refuse anything else.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_cls(name)
    infos = {}
    for info in builder.url_infos.values():
        content = (folder / info.filename).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        infos[f"{address}/{info.filename}"] = dataclasses.replace(
            info, checksum=digest, size=type(info.size)(len(content))
        )
    monkeypatch.setattr(builder, "url_infos", infos)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server of ``tmp_path``, up until the last download has ended.

    Where one file fails, tensorflow-datasets leaves the other downloads running; without a server
    their retries would hold up the end of the process for 200 s.
    """
    downloads: list[Future[Any]] = []
    submit = ThreadPoolExecutor.submit

    def remembered(*args: Any, **kwargs: Any) -> Future[Any]:
        downloads.append(submit(*args, **kwargs))
        return downloads[-1]

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    monkeypatch.setattr(ThreadPoolExecutor, "submit", remembered)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        wait(downloads)
        httpd.shutdown()
        thread.join()


def test_downloads_into_the_default_directory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    arrays = made_up_set(0, (28, 28))
    folder = write_set(tmp_path / "published", arrays, ".gz")
    serve_as_published(monkeypatch, "mnist", folder, f"{server}/published")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    data = load_dataset("mnist", classes="all")
    assert_consistent(data, 10)
    for file in folder.iterdir():
        file.unlink()
    assert_same_examples(read_images("mnist"), arrays)
    assert_same_examples(read_images("mnist", tmp_path / "default"), arrays)


@pytest.mark.parametrize("damage", ["changed", "absent", "unreachable"])
def test_a_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, damage: str
) -> None:
    folder = write_set(tmp_path / "published", made_up_set(0, (28, 28)), ".gz")
    address = "http://127.0.0.1:9" if damage == "unreachable" else f"{server}/published"
    serve_as_published(monkeypatch, "mnist", folder, address)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    if damage == "changed":
        write_set(folder, made_up_set(1, (28, 28)), ".gz")
    elif damage == "absent":
        (folder / (FILES["labels_test"] + ".gz")).unlink()
    message = refusal("mnist")
    assert "data_dir=FOLDER" in message
    assert ("SHA-256" in message) == (damage == "changed")
    assert not (tmp_path / "default" / "mnist" / "3.0.1").exists()


def test_a_damaged_cached_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    """tensorflow-datasets trusts its cache of downloads: the files' own checks must not."""
    folder = write_set(tmp_path / "published", made_up_set(0, (28, 28)), ".gz")
    serve_as_published(monkeypatch, "mnist", folder, f"{server}/published")
    directory = prepare("mnist", tmp_path / "prepared")
    shutil.rmtree(directory / "mnist")
    cached = max(directory.glob("downloads/mnist/*.gz"), key=lambda path: path.stat().st_size)
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(InputError, match="found damage.*; delete it") as caught:
        prepare("mnist", directory)
    assert str(cached) in str(caught.value) and "\n" not in str(caught.value)
    cached.unlink()
    prepare("mnist", directory)


def test_two_sets_prepared_into_one_directory_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"mnist": made_up_set(0, (28, 28)), "fashion_mnist": made_up_set(1, (28, 28))}
    for name, arrays in sets.items():
        folder = write_set(tmp_path / f"manual_{name}", arrays, ".gz")
        serve_as_published(monkeypatch, name, folder, f"http://{name}.invalid")
        assert prepare(name, tmp_path / "both", folder) == tmp_path / "both"
    for name, arrays in sets.items():
        assert_same_examples(read_images(name, tmp_path / "both"), arrays)


def test_files_given_by_hand_are_checked(tmp_path: Path) -> None:
    """Against the real published checksums, which made-up files cannot have."""
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    with pytest.raises(InputError, match="SHA-256"):
        prepare("mnist", tmp_path / "prepared", folder)
    (folder / (FILES["x_test"] + ".gz")).unlink()
    with pytest.raises(InputError, match="found no t10k-images-idx3-ubyte.gz;"):
        prepare("mnist", tmp_path / "prepared", folder)
    assert not (tmp_path / "prepared" / "mnist" / "3.0.1").exists()


def prepared_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up set, prepared; returns the folder of its version."""
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    serve_as_published(monkeypatch, "mnist", folder, "http://mnist.invalid")
    (version,) = prepare("mnist", tmp_path / "prepared", folder).glob("mnist/*")
    return version


def test_a_damaged_prepared_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = prepared_set(tmp_path, monkeypatch)
    (records,) = version.glob("mnist-train.array_record*")
    records.write_bytes(records.read_bytes()[:-1000])
    assert "expected an intact prepared set" in refusal("mnist", data_dir=tmp_path / "prepared")
    records.unlink()
    assert "expected an intact prepared set" in refusal("mnist", data_dir=tmp_path / "prepared")


def test_a_set_prepared_in_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = prepared_set(tmp_path, monkeypatch) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert "array_record, found another format" in refusal("mnist", data_dir=tmp_path / "prepared")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    assert "array_record, found another format" in refusal("mnist")


def test_an_unwritable_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    serve_as_published(monkeypatch, "mnist", folder, "http://mnist.invalid")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="TFDS_DATA_DIR") as caught:
        prepare("mnist", tmp_path / "file" / "below", folder)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError):
        importlib.import_module("tensorflow_datasets")
    assert "data_dir=FOLDER" in refusal("mnist")


# The real thing


@needs_mnist
def test_published_mnist_has_the_published_counts() -> None:
    """Class counts as in shared/data/README.md, which took them from the published files."""
    images = read_images("mnist", os.environ["DNNTK_MNIST"])
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(images.labels_train).tolist() == train
    assert np.bincount(images.labels_test).tolist() == test
    assert images.x_train.shape == (60000, 28, 28) and images.x_test.shape == (10000, 28, 28)


def test_the_published_files_of_one_set_are_not_taken_for_the_other(mnist_folder):
    with pytest.raises(InputError, match="dataset=mnist"):
        load_dataset("fashion_mnist", data_dir=mnist_folder)


# Images that are moved


def test_shifted_images_are_the_pooled_ones_of_moved_pixels(tmp_path: Path) -> None:
    arrays = made_up_set(3, (8, 12))
    write_set(tmp_path, arrays, "")
    data = load_dataset("mnist", classes="all", data_dir=tmp_path, pool=4, keep_unpooled=True)
    assert data.unpooled is not None
    chosen = np.random.default_rng(0).integers(0, 40, 500)
    found = data.shifted(chosen, 2, np.random.default_rng(5))
    assert found.shape == (500, 2, 3, 1) and found.dtype == np.float32
    ways = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros((40, 8, 12))
            to = np.s_[:, max(down, 0) : 8 + down, max(right, 0) : 12 + right]
            source = np.s_[:, max(-down, 0) : 8 - down, max(-right, 0) : 12 - right]
            moved[to] = data.unpooled.images[source]
            pooled = moved.reshape(40, 2, 4, 3, 4).mean(axis=(2, 4)) / 255
            ways[down, right] = pooled.astype(np.float32)[..., None]
    counts = dict.fromkeys(ways, 0)
    for image, number in zip(found, chosen, strict=True):
        same = [way for way, x in ways.items() if np.allclose(x[number], image, atol=1e-6)]
        assert len(same) == 1
        counts[same[0]] += 1
    assert min(counts.values()) > 5  # of 20 expected each
    np.testing.assert_array_equal(
        data.shifted(chosen, 0, np.random.default_rng(5)), data.x_train[chosen]
    )


def test_images_of_ones_own_are_shifted_as_they_are() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, 5, 4, 3)).astype(np.float32)
    y = np.zeros((6, 1), np.float32)
    data = Dataset("own", "own", x, y, x, y)
    moved = data.shifted(np.arange(6), 1, rng)
    assert moved.shape == x.shape and not np.array_equal(moved, x)
    # Whatever is left of an image is in it unchanged.
    np.testing.assert_array_equal(np.isin(moved, np.append(x, 0)), True)
    with pytest.raises(InputError, match="more than 4 x 4 pixels"):
        data.shifted(np.arange(6), 4, rng)
    points = Dataset("own", "own", x[:, 0, 0], y, x[:, 0, 0], y)
    with pytest.raises(InputError, match="expected images"):
        points.shifted(np.arange(6), 1, rng)
