"""Datasets: right shapes, targets and splits, and one clear line for every wrong input."""

import numpy as np
import pytest
from image_sets import assert_consistent, examples, made_up_set, refusal, write_set
from sklearn.datasets import load_digits

from dnntk.data.datasets import Dataset, load_dataset
from dnntk.errors import InputError

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def test_toy_is_section_5_1():
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


def test_digits_holds_out_a_third_of_every_class():
    data = load_dataset("digits", classes="all")
    assert_consistent(data, 10)
    assert data.x_train.shape[1:] == (8, 8, 1)
    published = load_digits()
    counts = np.bincount(published.target)
    np.testing.assert_array_equal(np.bincount(data.labels_test), np.round(counts / 3))
    together = np.concatenate([data.x_train, data.x_test])[..., 0] * 16
    labels = np.concatenate([data.labels_train, data.labels_test])
    whole = examples(published.images.astype(np.float32), published.target)
    assert examples(together, labels) == whole


def test_digits_split_depends_on_the_seed_only():
    ten, again, other = (load_dataset("digits", classes="all", seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(ten.x_train, again.x_train)
    np.testing.assert_array_equal(ten.labels_test, again.labels_test)
    assert examples(ten.x_test, ten.labels_test) != examples(other.x_test, other.labels_test)
    two = load_dataset("digits", classes=(4, 7), seed=3)
    fours_and_sevens = np.isin(ten.labels_train, (4, 7))
    np.testing.assert_array_equal(two.x_train, ten.x_train[fours_and_sevens])


@pytest.mark.parametrize(
    ("classes", "d_out"), [((0, 1), 1), ((7, 3), 1), ((2, 9, 4), 3), (range(9, -1, -1), 10)]
)
def test_targets_follow_the_order_of_the_classes(classes, d_out):
    data = load_dataset("digits", classes=classes)
    assert_consistent(data, d_out)
    assert data.classes == tuple(classes)
    ten = load_dataset("digits", classes="all")
    expected = ten.labels_train[np.isin(ten.labels_train, classes)]
    np.testing.assert_array_equal(np.array(classes)[data.labels_train], expected)


@pytest.mark.parametrize("pool", [2, 4, 8])
def test_pool_averages_windows(pool):
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
        ("digits", {"offset": 1}, "offset=1: expected a number in [0, 1), found 1"),
        ("toy", {"pool": 2}, "pool=2: expected 1"),
        ("mnist", {"data_dir": "/no/such/folder"}, "data_dir=/no/such/folder: expected a folder"),
    ],
)
def test_refuses_bad_arguments(name, arguments, words):
    assert words in refusal(name, **arguments)


# tensorflow-datasets


def test_shifted_images_are_the_pooled_ones_of_moved_pixels(tmp_path):
    arrays = made_up_set(3, (8, 12))
    write_set(tmp_path, arrays, "")
    data = load_dataset("mnist", classes="all", data_dir=tmp_path, pool=4, keep_unpooled=True)
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


def test_an_offset_makes_inputs_strictly_positive():
    plain = load_dataset("digits", keep_unpooled=True)
    data = load_dataset("digits", keep_unpooled=True, offset=0.2)
    assert plain.x_train.min() == 0 and data.x_train.min() == np.float32(0.2)
    for name in ("x_train", "x_test"):
        expected = 0.2 + 0.8 * getattr(plain, name).astype(np.float64)
        np.testing.assert_allclose(getattr(data, name), expected, rtol=1e-6)
    moved, chosen = np.zeros((2, 40, 8, 8, 1)), np.arange(40)
    for i, one in enumerate((plain, data)):
        moved[i] = one.shifted(chosen, 2, np.random.default_rng(0))
    np.testing.assert_allclose(moved[1], 0.2 + 0.8 * moved[0], rtol=1e-6)
    toy = load_dataset("toy", offset=0.5)
    np.testing.assert_allclose(toy.x_test, 0.5 + 0.5 * load_dataset("toy").x_test, rtol=1e-6)
    np.testing.assert_array_equal(toy.y_test, load_dataset("toy").y_test)


def test_images_of_ones_own_are_shifted_as_they_are():
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
