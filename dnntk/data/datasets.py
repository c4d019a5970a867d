"""Datasets: the thesis's toy problem, scikit-learn's digits, MNIST and Fashion-MNIST.

All are returned as inputs of the networks and kernels: NHWC float32 images in [0, 1] (for the toy
problem, points [n, 2]), and float32 targets, 0 or 1 for two classes and one-hot for more, as in the
thesis's squared loss.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnntk.data.mnist import CLASS_NAMES, LabelledImages, read_images
from dnntk.errors import InputError
from dnntk.runs.fields import converted, short_repr

__all__ = ["DATASETS", "Dataset", "Unpooled", "load_dataset", "targets_of"]

DATASETS = ("digits", "toy", *CLASS_NAMES)
NOT_GIVEN: Any = None


@dataclass(frozen=True, eq=False)
class Unpooled:
    """Images before pooling.

    Attributes:
        images: [n, H, W] whole numbers from 0 to ``maximum``.
        maximum: the number that becomes 1.
        pool: side of the windows over which `pooled` averages.
        offset: as in `load_dataset`.
    """

    images: NDArray[Any]
    maximum: int
    pool: int
    offset: float = 0.0

    def pooled(self) -> NDArray[np.float32]:
        """[n, H / pool, W / pool, 1], as in `Dataset`."""
        return _raised(_pooled(self.images, self.pool, self.maximum), self.offset)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples with their targets.

    `load_dataset` returns the fields as below. For your own data, give `dnntk.train` a
    ``Dataset(x_train=x, y_train=y)``, with the other fields that you have; lists, arrays of NumPy,
    JAX or pandas, and labels of any kind are allowed, see `dnntk.data.own_data.own_dataset`.

    Attributes:
        name: one of ``DATASETS``, or any name for your own data.
        description: one line for a run's log: name, classes, counts, shape, split.
        x_train: [n, H, W, 1] images, or [n, 2] points for ``toy``; float32 in [0, 1].
        y_train: [n, d_out] float32 targets; d_out is 1 for two classes and for ``toy``.
        x_test: [m, H, W, 1] or [m, 2].
        y_test: [m, d_out].
        labels_train: [n] int32 indices into ``classes``; None for ``toy``.
        labels_test: [m] int32; None for ``toy``.
        classes: the classes in the order of the labels, by number or published name; empty for
            ``toy``.
        unpooled: the training images before pooling, with ``keep_unpooled``.
    """

    name: str = "own"
    description: str = ""
    x_train: NDArray[np.float32] = NOT_GIVEN
    y_train: NDArray[np.float32] = NOT_GIVEN
    x_test: NDArray[np.float32] = NOT_GIVEN
    y_test: NDArray[np.float32] = NOT_GIVEN
    labels_train: NDArray[np.int32] | None = None
    labels_test: NDArray[np.int32] | None = None
    classes: tuple[Any, ...] = ()
    unpooled: Unpooled | None = None

    __repr__ = short_repr

    def shifted(
        self, chosen: NDArray[np.intp], most: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Training images, each shifted vertically and horizontally by whole pixels, zero-padded.

        Args:
            chosen: [k] indices of training images.
            most: largest shift in pixels (of ``unpooled``, if that is not None). The two shifts are
                independent and uniform from -most to most.
            rng: draws the shifts.

        Returns:
            [k, H, W, channels], like ``x_train[chosen]``.

        Raises:
            InputError: ``x_train`` has no images, or their sides are not larger than ``most``.
        """
        images = self.x_train if self.unpooled is None else self.unpooled.images
        if self.x_train.ndim != 4 or most >= min(images.shape[1:3]):
            raise InputError(
                f"shift: expected images of more than {most} x {most} pixels, got examples of "
                f"shape {images.shape[1:]}; choose a smaller one or 0"
            )
        height, width = images.shape[1:3]
        sides = ((0, 0), (most, most), (most, most), (0, 0))
        padded = np.pad(images[chosen], sides[: images.ndim])
        down, right = rng.integers(0, 2 * most, (2, len(chosen), 1), endpoint=True)
        rows, columns = down + np.arange(height), right + np.arange(width)
        each = np.arange(len(chosen))[:, None, None]
        moved = padded[each, rows[:, :, None], columns[:, None, :]]
        if self.unpooled is None:
            return moved
        return replace(self.unpooled, images=moved).pooled()


def load_dataset(
    name: str,
    *,
    classes: Sequence[int] | str = (0, 1),
    data_dir: str | os.PathLike[str] | None = None,
    pool: int = 1,
    seed: int = 0,
    keep_unpooled: bool = False,
    offset: float = 0.0,
) -> Dataset:
    """Load a dataset.

    Args:
        name: ``digits`` (8 x 8, comes with scikit-learn), ``toy`` (thesis section 5.1), ``mnist``
            or ``fashion_mnist`` (28 x 28).
        classes: numbers of the classes to keep, or ``"all"``. Two give one output with targets 0
            and 1 in the order given, more give one-hot targets. ``toy`` has no classes.
        data_dir: folder of the MNIST sets; see ``dnntk.data.mnist.read_images``.
        pool: side of the windows over which images are averaged; must divide their height and
            width. 4 makes MNIST 7 x 7, as in the thesis.
        seed: chooses the third of ``digits`` that is held out for testing; the other sets have a
            fixed split.
        keep_unpooled: also keep the training images before pooling, one byte per pixel, for
            `Dataset.shifted`.
        offset: in [0, 1): inputs are (1 - offset) x + offset instead of x, strictly positive as
            the theorems ask (the published code's unused option ``shift``).

    Returns:
        The dataset, in NumPy arrays. Loading 60,000 MNIST images takes 3 to 4 s from
        tensorflow-datasets, well under 1 s from IDX files, and 190 MB without pooling.

    Raises:
        InputError: an argument does not fit the dataset, or the files are missing or damaged.
    """
    name, pool = converted("name", name, str), converted("pool", pool, int)
    data_dir = converted("data_dir", data_dir, str | os.PathLike[str] | None)
    classes = converted("classes", classes, tuple[int, ...] | str)
    seed = converted("seed", seed, int)
    if data_dir is not None and name in DATASETS and name not in CLASS_NAMES:
        raise InputError(
            f"data_dir={data_dir}: expected none, found one, and {name} is read from no folder; "
            "leave it out, or name another dataset"
        )
    if not 0 <= (offset := converted("offset", offset, float)) < 1:
        raise InputError(
            f"offset={offset:g}: expected a number in [0, 1), found {offset:g}; choose one"
        )
    if name == "toy":
        return _with_offset(_toy(pool), offset)
    if name == "digits":
        images = _digits(seed)
    elif name in CLASS_NAMES:
        images = read_images(name, data_dir)
    else:
        raise InputError(
            f"name={name}: expected one of {', '.join(DATASETS)}, found {name!r}; choose one"
        )
    numbers = _class_numbers(classes, len(images.class_names))
    return _with_offset(_dataset(name, images, numbers, pool, keep_unpooled), offset)


def _dataset(
    name: str, images: LabelledImages, numbers: tuple[int, ...], pool: int, keep_unpooled: bool
) -> Dataset:
    """Select the classes, pool and scale the images, and make the targets."""
    x_train, labels_train = _select(
        images.x_train, images.labels_train, numbers, "the training images"
    )
    x_test, labels_test = _select(images.x_test, images.labels_test, numbers, "the test images")
    data = Dataset(
        name=name,
        x_train=_pooled(x_train, pool, images.maximum),
        y_train=targets_of(labels_train, len(numbers)),
        x_test=_pooled(x_test, pool, images.maximum),
        y_test=targets_of(labels_test, len(numbers)),
        labels_train=labels_train,
        labels_test=labels_test,
        classes=tuple(images.class_names[number] for number in numbers),
        unpooled=Unpooled(x_train, images.maximum, pool) if keep_unpooled else None,
    )
    return replace(data, description=_describe(data, images, pool))


def _with_offset(data: Dataset, offset: float) -> Dataset:
    if not offset:
        return data
    return replace(
        data,
        x_train=_raised(data.x_train, offset),
        x_test=_raised(data.x_test, offset),
        unpooled=data.unpooled and replace(data.unpooled, offset=offset),
        description=f"{data.description}; offset {offset:g}",
    )


def _raised(x: NDArray[np.float32], offset: float) -> NDArray[np.float32]:
    return (np.float32(1 - offset) * x + np.float32(offset)) if offset else x


def _toy(pool: int) -> Dataset:
    """Section 5.1: the product of the coordinates of 200 points on the first quarter circle."""
    if pool != 1:
        raise InputError(
            f"pool={pool}: expected 1, found {pool}, and the toy problem has no images to pool; "
            "leave pool out"
        )
    angles = np.linspace(0, np.pi / 2, 220)[10:210]
    x_train, y_train = _on_circle(angles)
    x_test, y_test = _on_circle((angles[1:] + angles[:-1]) / 2)
    return Dataset(
        name="toy",
        description=f"toy: x1 * x2 at {len(x_train)} training points on the quarter circle and "
        f"{len(x_test)} test points, the midpoints of the training angles",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )


def _on_circle(angles: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points.astype(np.float32), points.prod(axis=1, keepdims=True).astype(np.float32)


def _digits(seed: int) -> LabelledImages:
    """scikit-learn's digits, a third of each class held out."""
    from sklearn.datasets import load_digits

    if seed < 0:
        raise InputError(
            f"seed={seed}: expected a whole number of at least 0, found {seed}; choose one"
        )
    digits = load_digits()
    train, test = _stratified_thirds(digits.target, np.random.default_rng(seed))
    return LabelledImages(
        x_train=digits.images[train],
        labels_train=digits.target[train],
        x_test=digits.images[test],
        labels_test=digits.target[test],
        maximum=16,
        class_names=tuple(range(10)),
        split=f"a third of each class held out, seed {seed}",
    )


def _stratified_thirds(
    labels: NDArray[np.intp], rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of two thirds and of one third of every class, each shuffled."""
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out = round(len(members) / 3)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _class_numbers(classes: Sequence[int] | str, count: int) -> tuple[int, ...]:
    """The chosen classes, checked."""
    if isinstance(classes, str):
        if classes != "all":
            raise InputError(
                f"classes={classes}: expected numbers or 'all', found {classes!r}; write for "
                "example classes=0,1"
            )
        return tuple(range(count))
    numbers = tuple(classes)
    shown = f"classes={','.join(map(str, numbers))}"
    if len(numbers) < 2:
        raise InputError(
            f"{shown}: expected two classes or more, found {len(numbers)}; write for example "
            "classes=0,1"
        )
    unknown = [number for number in numbers if not 0 <= number < count]
    if unknown:
        raise InputError(
            f"{shown}: expected classes from 0 to {count - 1}, found {unknown[0]}; leave it out"
        )
    repeated = [number for number in numbers if numbers.count(number) > 1]
    if repeated:
        raise InputError(
            f"{shown}: expected each class once, found {repeated[0]} more than once; leave one out"
        )
    return numbers


def _select(
    images: NDArray[Any], labels: NDArray[Any], numbers: tuple[int, ...], where: str
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The images of the chosen classes, in their order, with indices into ``numbers``."""
    index_of = np.full(max(*numbers, int(labels.max())) + 1, -1, np.int32)
    index_of[list(numbers)] = np.arange(len(numbers))
    indices = index_of[labels]
    absent = sorted(set(range(len(numbers))) - set(indices.tolist()))
    if absent:
        number = numbers[absent[0]]
        raise InputError(
            f"classes: expected examples of every class, found none of class {number} among "
            f"{where}; leave {number} out"
        )
    kept = indices >= 0
    return images[kept], indices[kept]


def targets_of(indices: NDArray[np.int32], count: int) -> NDArray[np.float32]:
    """0 and 1 in one column for two classes, one-hot for more."""
    if count == 2:
        return indices[:, None].astype(np.float32)
    return np.eye(count, dtype=np.float32)[indices]


def _pooled(images: NDArray[Any], pool: int, maximum: int) -> NDArray[np.float32]:
    """Average over pool x pool windows and scale to [0, 1]; [n, H, W] -> [n, H/p, W/p, 1]."""
    count, height, width = images.shape
    if pool < 1 or height % pool or width % pool:
        raise InputError(
            f"pool={pool}: expected a divisor of the images' {height} x {width} pixels, found "
            f"{pool}; choose one of {_divisors(height, width)}"
        )
    windows = images.reshape(count, height // pool, pool, width // pool, pool)
    # float32 represents a window's sum of whole numbers exactly, so only the division rounds.
    totals: NDArray[np.float32] = windows.sum(axis=(2, 4), dtype=np.float32)
    totals /= pool * pool * maximum
    return totals[..., None]


def _divisors(height: int, width: int) -> str:
    common = math.gcd(height, width)
    return ", ".join(str(side) for side in range(1, common + 1) if common % side == 0)


def _describe(data: Dataset, images: LabelledImages, pool: int) -> str:
    """One line for the log."""
    height, width = data.x_train.shape[1:3]
    pooled = f" (averaged over {pool} x {pool})" if pool > 1 else ""
    return (
        f"{data.name}: classes {', '.join(map(str, data.classes))}; {len(data.x_train)} training "
        f"and {len(data.x_test)} test images of {height} x {width} pixels{pooled}; {images.split}"
    )
