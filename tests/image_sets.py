"""Made-up sets of images in MNIST's form, and what holds for every dataset of images."""

import gzip
import struct

import numpy as np
import pytest

from dnntk.data.datasets import load_dataset
from dnntk.errors import InputError

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "labels_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "labels_test": "t10k-labels-idx1-ubyte",
}


def made_up_set(seed, size=(4, 6)):
    """A small set in MNIST's form: 40 training and 20 test images, all ten classes."""
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (40, *size), np.uint8),
        "labels_train": rng.permutation(np.arange(40, dtype=np.uint8) % 10),
        "x_test": rng.integers(0, 256, (20, *size), np.uint8),
        "labels_test": rng.permutation(np.arange(20, dtype=np.uint8) % 10),
    }


def write_idx(path, values):
    """Write an IDX file, gzipped if its name says so."""
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    raw += values.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def write_set(folder, arrays, suffix=""):
    """Write a set under the published names."""
    folder.mkdir(exist_ok=True)
    for key, values in arrays.items():
        write_idx(folder / (FILES[key] + suffix), values)
    return folder


def refusal(name, **arguments):
    """The one line with which an input is refused."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, **arguments)
    message = str(caught.value)
    assert "expected" in message and "found" in message and "; " in message
    assert "\n" not in message
    return message


def examples(images, labels):
    """A split as a multiset: equal for equal examples in any order."""
    return sorted(
        (int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)
    )


def assert_same_examples(images, arrays):
    """Same images with the same labels, both splits, in any order."""
    for split in ("train", "test"):
        expected = examples(arrays[f"x_{split}"], arrays[f"labels_{split}"])
        assert (
            examples(getattr(images, f"x_{split}"), getattr(images, f"labels_{split}")) == expected
        )


def assert_consistent(data, d_out):
    """What holds for every dataset of images."""
    for x, y, labels in (
        (data.x_train, data.y_train, data.labels_train),
        (data.x_test, data.y_test, data.labels_test),
    ):
        assert x.dtype == y.dtype == np.float32
        assert x.ndim == 4 and x.shape[-1] == 1
        assert 0 <= x.min() < x.max() <= 1
        assert np.issubdtype(labels.dtype, np.integer)
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
