"""Data of the user's own: every kind is taken as it is meant, or refused in one line."""

import dataclasses
import json
import logging
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from networks import outputs as apply

import dnntk
from dnntk import Dataset, InputError, TrainConfig, train
from dnntk.data.own_data import own_dataset, record

RNG = np.random.default_rng(0)
X, IMAGES = RNG.normal(size=(8, 3)), RNG.uniform(size=(8, 4, 5, 2))
SIDES = np.array([0, 0, 1, 1, 0, 1, 0, 1])
WORDS = np.where(SIDES, "dog", "cat")
MLP, CNN = TrainConfig(depth=4, steps=2), TrainConfig(depth=4, steps=2, arch="cnn")


def checked(config=MLP, **fields):
    return own_dataset(Dataset(**fields), config)


def refusal(config=MLP, **fields):
    with pytest.raises(InputError) as caught:
        checked(config, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


class Frame:
    """What NumPy sees of a table of pandas'."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray, Frame])
def test_every_kind_of_array_becomes_the_same_dataset(kind):
    expected = checked(x_train=X, y_train=SIDES[:, None], x_test=X[:5], y_test=SIDES[:5, None])
    make = (lambda a: kind(a.tolist())) if kind is list else kind
    found = checked(
        x_train=make(X), y_train=make(SIDES), x_test=make(X[:5]), y_test=make(SIDES[:5])
    )
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == np.float32
    assert found.labels_train is None and found.classes == ()
    np.testing.assert_array_equal(found.x_train, X.astype(np.float32))


def test_the_caller_may_change_the_arrays_afterwards():
    x, y = X.astype(np.float32), SIDES.astype(np.float32)[:, None]
    found = checked(x_train=x, y_train=y, x_test=x, y_test=y)
    before = record(found)
    x *= 0
    y += 1
    assert record(found) == before and found.y_train.max() == 1


def test_what_load_dataset_returns_stays_as_it_is():
    for classes in ((1, 0), (3, 8), (2, 1, 0)):
        data = dnntk.load_dataset("digits", classes=classes)
        found = own_dataset(data, MLP)
        assert found.classes == classes and found.description == data.description
        for name in ("x_train", "y_train", "x_test", "y_test", "labels_train", "labels_test"):
            np.testing.assert_array_equal(getattr(found, name), getattr(data, name))


BAD = {
    "nothing": ({}, "x_train"),
    "no targets": ({"x_train": X}, "y_train"),
    "scalars": ({"x_train": 3, "y_train": 4}, "x_train"),
    "no examples": ({"x_train": X[:0], "y_train": []}, "x_train"),
    "no features": ({"x_train": X[:, :0], "y_train": SIDES}, "x_train"),
    "one feature without its axis": ({"x_train": X[:, 0], "y_train": SIDES}, r"x\[:, None\]"),
    "images without channels": ({"x_train": IMAGES[..., 0], "y_train": SIDES}, "channel axis"),
    "NaN": ({"x_train": changed(X, (2, 1), np.nan), "y_train": SIDES}, "x_train.*nan"),
    "infinite target": ({"x_train": X, "y_train": changed(X, 0, np.inf)}, "y_train.*inf"),
    "NaN in the test set": (
        {"x_train": X, "y_train": SIDES, "x_test": X, "y_test": changed(X[:, 0], 0, np.nan)},
        "y_test.*nan",
    ),
    "beyond float32": ({"x_train": X * 1e300, "y_train": SIDES}, "x_train.*float32"),
    "masked label": (
        {"x_train": X, "labels_train": [np.ma.masked, *SIDES[1:]]},
        "labels_train.*masked",
    ),
    "masked labels": (
        {"x_train": X, "labels_train": np.ma.array(SIDES, mask=SIDES == 0)},
        "labels_train.*masked",
    ),
    "masked": ({"x_train": np.ma.array(X, mask=X > 1), "y_train": SIDES}, "x_train.*mask"),
    "complex": ({"x_train": X + 1j, "y_train": SIDES}, "x_train.*real"),
    "words as inputs": ({"x_train": [["a"]] * 8, "y_train": SIDES}, "x_train"),
    "words as targets": ({"x_train": X, "y_train": WORDS}, "y_train.*labels_train"),
    "ragged": ({"x_train": [[1, 2], [3]], "y_train": [1, 2]}, "x_train"),
    "fewer targets": ({"x_train": X, "y_train": SIDES[:5]}, r"y_train: .*\[8, d_out\]"),
    "a cube of targets": ({"x_train": X, "y_train": IMAGES}, "y_train"),
    "narrower test inputs": (
        {"x_train": X, "y_train": SIDES, "x_test": X[:, :2], "y_test": SIDES},
        "x_test",
    ),
    "narrower test targets": (
        {"x_train": X, "y_train": X, "x_test": X, "y_test": SIDES},
        r"y_test: .*\[8, 3\]",
    ),
    "one row of test targets": (
        {"x_train": X, "y_train": X, "x_test": X, "y_test": X[:1]},
        r"y_test: .*\[8, 3\]",
    ),
    "test inputs alone": ({"x_train": X, "y_train": SIDES, "x_test": X}, "y_test"),
    "test targets alone": ({"x_train": X, "y_train": SIDES, "y_test": SIDES}, "y_test"),
    "fewer labels": ({"x_train": X, "labels_train": SIDES[:4]}, "labels_train"),
    "one-hot labels": ({"x_train": X, "labels_train": np.eye(2)[SIDES]}, "labels_train.*argmax"),
    "no label": ({"x_train": X, "labels_train": [None] * 8}, "labels_train.*None"),
    "NaN as a label": ({"x_train": X, "labels_train": [np.nan] * 8}, "labels_train.*nan"),
    "labels of two kinds": ({"x_train": X, "labels_train": [1, "a"] * 4}, "labels_train"),
    "one class": ({"x_train": X, "labels_train": [1] * 8}, "labels_train.*two"),
    "a label that is no class": (
        {"x_train": X, "labels_train": WORDS, "classes": ("cat", "cow")},
        "labels_train.*'dog'",
    ),
    "a test label that is no class": (
        {"x_train": X, "labels_train": SIDES, "x_test": X[:1], "labels_test": [7]},
        "labels_test.*7",
    ),
    "a class without examples": (
        {"x_train": X, "labels_train": SIDES, "classes": (0, 1, 2)},
        "classes.*none of 2",
    ),
    "a class twice": ({"x_train": X, "labels_train": SIDES, "classes": (0, 0, 1)}, "classes"),
    "classes without labels": ({"x_train": X, "y_train": SIDES, "classes": (0, 1)}, "classes"),
    "test labels alone": (
        {"x_train": X, "y_train": SIDES, "x_test": X, "y_test": SIDES, "labels_test": SIDES},
        "labels_train",
    ),
    "two classes with one target": (
        {"x_train": X, "y_train": np.ones(8), "labels_train": SIDES},
        "y_train",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line_that_names_the_field(name):
    fields, words = BAD[name]
    assert re.search(words, refusal(**fields))


def test_a_cnn_takes_images_alone():
    assert "arch=mlp" in refusal(CNN, x_train=X, y_train=SIDES)
    assert checked(CNN, x_train=IMAGES, y_train=SIDES).x_train.shape == IMAGES.shape
    assert checked(MLP, x_train=IMAGES, y_train=SIDES).x_train.shape == IMAGES.shape


@pytest.mark.parametrize(
    "settings",
    [{"dataset": "toy"}, {"classes": "all"}, {"pool": 5}, {"dataset": "mnist", "data_dir": "x"}],
)
def test_settings_of_other_data_are_refused_beside_data_of_ones_own(settings):
    name = next(iter(settings))
    with pytest.raises(InputError, match=f"^{name}: no effect"):
        checked(dataclasses.replace(MLP, **settings), x_train=X, y_train=SIDES)


def test_a_dataset_is_a_dataset():
    with pytest.raises(InputError, match="Dataset"):
        train(MLP, dataset=(X, SIDES), progress=False)
    assert len(repr(checked(x_train=X, y_train=SIDES))) < 400


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """(workdir, data, result) of images with labels by word, targets -1 and 1, no test set."""
    workdir = tmp_path_factory.mktemp("own")
    y = 2.0 * SIDES - 1
    data = Dataset("mine", x_train=IMAGES * 255, y_train=y, labels_train=WORDS)
    return workdir, data, train(MLP, workdir, dataset=data, progress=False)


def test_a_dataset_without_a_test_set_trains(own_run):
    workdir, _, result = own_run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["test_loss"] is None and summary["test_accuracy"] is None
    outputs = np.asarray(apply(result.model, result.variables, result.dataset.x_train))
    right = np.mean((outputs[:, 0] > 0) == SIDES)
    assert summary["train_accuracy"] == pytest.approx(right)
    assert result.dataset.x_test.shape == (0, 40)
    assert (workdir / "loss.png").exists() and not (workdir / "confusion.png").exists()


def test_what_was_trained_on_is_recorded(own_run):
    workdir, _, result = own_run
    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset"] == "own" and config["classes"] == ["cat", "dog"]
    assert config["own"]["name"] == "mine" and config["own"]["x_train"] == [8, 4, 5, 2]
    assert len(config["own"]["sha256"]) == 64
    assert result.summary["data"].startswith("own data: mine")
    with pytest.raises(InputError, match="own.*dataset="):
        TrainConfig.from_json(config)


def test_a_run_goes_on_with_its_own_data_only(own_run, tmp_path):
    workdir, data, _ = own_run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    longer = dataclasses.replace(MLP, steps=3)
    other = dataclasses.replace(data, x_train=IMAGES * 254)
    for given, words in ((None, "got none"), (other, "sha256"), (Dataset(), "x_train")):
        with pytest.raises(InputError, match=words) as caught:
            train(longer, copy, dataset=given, resume=True, progress=False)
        assert "\n" not in str(caught.value)
    resumed = train(longer, copy, dataset=data, resume=True, progress=False)
    assert resumed.history[-1]["step"] == 3
    config = json.loads((copy / "config.json").read_text())
    del config["own"]
    (copy / "config.json").write_text(json.dumps(config | {"dataset": "digits"}))
    with pytest.raises(InputError, match="started on dataset=digits"):
        train(longer, copy, dataset=data, resume=True, progress=False)


def test_inputs_far_above_size_1_or_below_0_get_a_line(caplog):
    with caplog.at_level(logging.WARNING, "dnntk"):
        for scale in (-1, 1, 255):
            caplog.clear()
            data = Dataset(x_train=IMAGES * scale, y_train=SIDES, x_test=IMAGES, y_test=SIDES)
            result = train(MLP, dataset=data, progress=False)
            assert ("scale them to about 1" in caplog.text) == (scale == 255)
            assert ("inputs are negative" in caplog.text) == (scale == -1)
    assert result.summary["test_accuracy"] is None


def test_images_to_be_shifted_are_those_of_the_inputs():
    data = dnntk.load_dataset("digits", pool=2, keep_unpooled=True)
    shifted = dataclasses.replace(MLP, shift=1)
    assert own_dataset(data, shifted).unpooled is not None
    other = dataclasses.replace(data, x_train=data.x_train[::-1])
    for given in (other, dataclasses.replace(data, unpooled=data.x_train)):
        with pytest.raises(InputError, match="^unpooled: expected"):
            own_dataset(given, shifted)
    assert own_dataset(other, MLP).unpooled is None
