"""MNIST and Fashion-MNIST, from IDX files and from tensorflow-datasets."""

import dataclasses
import hashlib
import importlib
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from image_sets import (
    FILES,
    assert_consistent,
    assert_same_examples,
    made_up_set,
    refusal,
    write_idx,
    write_set,
)

from dnntk.data.datasets import load_dataset
from dnntk.data.mnist import prepare, read_images
from dnntk.errors import InputError

FLOAT32_EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_a_folder_of_idx_files(tmp_path, name, suffix):
    arrays = made_up_set(0)
    write_set(tmp_path, arrays, suffix)
    data = load_dataset(name, classes="all", data_dir=tmp_path)
    assert_consistent(data, 10)
    expected = arrays["x_train"][..., None] / 255
    np.testing.assert_allclose(data.x_train, expected, rtol=FLOAT32_EPS)
    np.testing.assert_array_equal(data.labels_test, arrays["labels_test"])
    assert data.classes[1] == (1 if name == "mnist" else "Trouser")
    assert str(tmp_path) in data.description


def test_pools_rectangular_images_by_common_divisors_only(tmp_path):
    arrays = made_up_set(1, (6, 9))
    write_set(tmp_path, arrays)
    data = load_dataset("mnist", data_dir=str(tmp_path), pool=3)
    assert data.x_train.shape[1:] == (2, 3, 1)
    message = refusal("mnist", data_dir=tmp_path, pool=2)
    assert message.startswith("pool=2: ") and "6 x 9" in message and "one of 1, 3" in message


def broken(key, values, words):
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
def test_refuses_files_that_do_not_belong_together(tmp_path, key, values, words):
    write_set(tmp_path, made_up_set(0))
    load_dataset("mnist", data_dir=tmp_path)
    write_idx(tmp_path / FILES[key], values)
    assert words in refusal("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("file", FILES.values())
def test_names_the_missing_file(tmp_path, file):
    write_set(tmp_path, made_up_set(0))
    (tmp_path / file).unlink()
    assert f"found no {file};" in refusal("mnist", data_dir=tmp_path)


def test_import_leaves_tensorflow_datasets_alone():
    code = "import sys, dnntk.data.datasets; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def serve_as_published(monkeypatch, name, folder, address):
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
def server(tmp_path, monkeypatch):
    """Address of a web server of ``tmp_path``, up until the last download has ended.

    Where one file fails, tensorflow-datasets leaves the other downloads running; without a server
    their retries would hold up the end of the process for 200 s.
    """
    downloads = []
    submit = ThreadPoolExecutor.submit

    def remembered(*args, **kwargs):
        downloads.append(submit(*args, **kwargs))
        return downloads[-1]

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
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


def test_downloads_into_the_default_directory_once(tmp_path, monkeypatch, server):
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
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, server, damage):
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


def test_a_damaged_cached_download_is_one_line(tmp_path, monkeypatch, server):
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


def test_two_sets_prepared_into_one_directory_stay_apart(tmp_path, monkeypatch):
    sets = {"mnist": made_up_set(0, (28, 28)), "fashion_mnist": made_up_set(1, (28, 28))}
    for name, arrays in sets.items():
        folder = write_set(tmp_path / f"manual_{name}", arrays, ".gz")
        serve_as_published(monkeypatch, name, folder, f"http://{name}.invalid")
        assert prepare(name, tmp_path / "both", folder) == tmp_path / "both"
    for name, arrays in sets.items():
        assert_same_examples(read_images(name, tmp_path / "both"), arrays)


def test_files_given_by_hand_are_checked(tmp_path):
    """Against the real published checksums, which made-up files cannot have."""
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    with pytest.raises(InputError, match="SHA-256"):
        prepare("mnist", tmp_path / "prepared", folder)
    (folder / (FILES["x_test"] + ".gz")).unlink()
    with pytest.raises(InputError, match="found no t10k-images-idx3-ubyte.gz;"):
        prepare("mnist", tmp_path / "prepared", folder)
    assert not (tmp_path / "prepared" / "mnist" / "3.0.1").exists()


def prepared_set(tmp_path, monkeypatch):
    """A made-up set, prepared; returns the folder of its version."""
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    serve_as_published(monkeypatch, "mnist", folder, "http://mnist.invalid")
    (version,) = prepare("mnist", tmp_path / "prepared", folder).glob("mnist/*")
    return version


def test_a_damaged_prepared_set_is_refused(tmp_path, monkeypatch):
    version = prepared_set(tmp_path, monkeypatch)
    (records,) = version.glob("mnist-train.array_record*")
    records.write_bytes(records.read_bytes()[:-1000])
    assert "expected an intact prepared set" in refusal("mnist", data_dir=tmp_path / "prepared")
    records.unlink()
    assert "expected an intact prepared set" in refusal("mnist", data_dir=tmp_path / "prepared")


def test_a_set_prepared_in_another_format_is_refused(tmp_path, monkeypatch):
    info = prepared_set(tmp_path, monkeypatch) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert "array_record, found another format" in refusal("mnist", data_dir=tmp_path / "prepared")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    assert "array_record, found another format" in refusal("mnist")


def test_an_unwritable_directory_is_one_line(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "manual", made_up_set(0, (28, 28)), ".gz")
    serve_as_published(monkeypatch, "mnist", folder, "http://mnist.invalid")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="TFDS_DATA_DIR") as caught:
        prepare("mnist", tmp_path / "file" / "below", folder)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError):
        importlib.import_module("tensorflow_datasets")
    assert "data_dir=FOLDER" in refusal("mnist")


def test_published_mnist_has_the_published_counts(mnist_folder):
    """Class counts as in shared/data/README.md, which took them from the published files."""
    images = read_images("mnist", mnist_folder)
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(images.labels_train).tolist() == train
    assert np.bincount(images.labels_test).tolist() == test
    assert images.x_train.shape == (60000, 28, 28) and images.x_test.shape == (10000, 28, 28)


def test_the_published_files_of_one_set_are_not_taken_for_the_other(mnist_folder):
    with pytest.raises(InputError, match="dataset=mnist"):
        load_dataset("fashion_mnist", data_dir=mnist_folder)
