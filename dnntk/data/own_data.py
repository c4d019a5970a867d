"""The user's own data, for `dnntk.train`: checked and converted before compilation.

`own_dataset` converts a `Dataset` of lists, arrays of NumPy, JAX or pandas, and labels of any kind
to one as `load_dataset` returns it. A run's config.json keeps its `record`, so that the run can be
resumed on the same data only.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnntk.checks import brief, native_numbers
from dnntk.data.datasets import Dataset, Unpooled, targets_of
from dnntk.data.labels import checked_classes, class_targets, decide, index_labels, label_values
from dnntk.errors import InputError
from dnntk.runs.fields import without_effect

__all__ = ["check_same", "own_dataset", "record", "warn_of_inputs", "warn_of_negative"]

log = logging.getLogger("dnntk")

# Root mean square of the inputs above which a warning is logged: standardized features and pixels
# in [0, 1] are at 1 or below, pixels from 0 to 255 at 30 to 150.
LARGE = 10.0


class _Config(Protocol):
    """What own data depend on in a run's configuration."""

    @property
    def arch(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shift(self) -> int: ...


def own_dataset(data: Dataset, config: _Config) -> Dataset:
    """Check the user's own data, and convert them to a dataset as `load_dataset` returns it.

    Args:
        data: ``x_train`` is [n, d_in] or NHWC images [n, H, W, c], ``y_train`` [n] or [n, d_out].
            Without a test set, the result's test set is empty. ``labels_train`` [n] are the
            examples' classes, or indices into ``classes``, as in `load_dataset`; integers that
            could be either are indices if they agree with the targets (0 and 1, or one-hot).
            Without ``classes``, the classes are the labels, sorted. With labels, ``y_train`` may
            be missing: the targets are then 0 and 1 for two classes, else one-hot. Data without
            labels are a regression, which has no accuracy.
        config: the run's `dnntk.TrainConfig`, for the architecture and the result's dtype.

    Returns:
        The dataset, in new arrays.

    Raises:
        InputError: a field cannot be used; the message names it.
    """
    if not isinstance(data, Dataset):
        raise InputError(
            f"dataset: expected a dnntk.Dataset, got {brief(data)}; make one by "
            "dnntk.Dataset(x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    of_data = ("dataset", "classes", "data_dir", "pool", "offset")
    without_effect(config, of_data, "beside data of your own, given as dataset")
    x_train = _inputs("x_train", data.x_train, config)
    x_test = _test_inputs(data.x_test, x_train, config)
    y_train = _targets("y_train", data.y_train, len(x_train), None, config)
    names, labels_train, labels_test = _labels(data, y_train, len(x_train), len(x_test))
    if y_train is None:
        if labels_train is None:
            raise InputError("y_train: expected targets [n, d_out], got none; or give labels_train")
        y_train = targets_of(labels_train, len(names)).astype(config.dtype)
    y_test = _targets("y_test", data.y_test, len(x_test), y_train.shape[1], config)
    if y_test is None and data.y_train is None and labels_test is not None:
        y_test = targets_of(labels_test, len(names)).astype(config.dtype)
    if y_test is None:
        if len(x_test):
            raise InputError("y_test: expected targets of x_test, got none; give both or neither")
        y_test = y_train[:0]
    found = Dataset(
        name=" ".join(str(data.name or "").split()) or "own",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        labels_train=labels_train,
        labels_test=labels_test,
        classes=names,
        unpooled=_unpooled(data.unpooled, x_train, config),
    )
    if labels_train is not None:
        found = _decided(found)
    said = " ".join(str(data.description or "").split())
    return dataclasses.replace(found, description=said or _describe(found))


def warn_of_inputs(data: Dataset) -> None:
    """Log a warning each for inputs of size far above 1, and for negative inputs."""
    size = math.sqrt(float(np.vdot(data.x_train, data.x_train)) / data.x_train.size)
    if size > LARGE:
        log.warning(
            "data: the inputs' root mean square is %.3g, which makes training slow or unstable; "
            "scale them to about 1 (pixels by 1/255, features to standard deviation 1)",
            size,
        )
    warn_of_negative(data)


def warn_of_negative(data: Dataset) -> bool:
    """Return whether any inputs are negative, and log a warning if so."""
    fraction = float(np.mean(data.x_train < 0))
    negative = fraction > 0 or bool((data.x_test < 0).any())
    if negative:
        log.warning(
            "data: %.3g%% of the inputs are negative and count as 0, which the network's first "
            "ReLU makes of them; shift every feature to start at 0, or split it by sign",
            100 * fraction,
        )
    return negative


def record(data: Dataset) -> dict[str, Any]:
    """Entries of config.json for checked own data; they replace the entries of the same names."""
    digest = hashlib.sha256()
    for array in (data.x_train, data.y_train, data.x_test, data.y_test):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    own = {
        "name": data.name,
        "description": data.description,
        "x_train": list(data.x_train.shape),
        "x_test": list(data.x_test.shape),
        "sha256": digest.hexdigest(),
    }
    return {"dataset": "own", "classes": list(data.classes), "own": own}


def check_same(
    saved: dict[str, Any], recorded: dict[str, Any], workdir: Path, argument: str
) -> None:
    """Refuse to go on with a run on other data than it was started on.

    Args:
        saved: content of the run's config.json.
        recorded: `record` of the given data, or {} without own data.
        workdir: the run's folder.
        argument: name of the argument that gave the folder, for the message.

    Raises:
        InputError: the data differ.
    """
    before, now = saved.get("own"), recorded.get("own")
    if before is None and now is not None:
        raise InputError(
            f"{argument}: {workdir} was started on dataset={saved.get('dataset')}, got data of "
            "your own; leave dataset out, or use another workdir"
        )
    if before is not None and now is None:
        raise InputError(
            f"{argument}: {workdir} was started on data of your own ({_in_short(before)}), got "
            "none; give them again from Python, as dataset"
        )
    if before is not None and now is not None:
        if not isinstance(before, dict) or before.get("sha256") != now["sha256"]:
            raise InputError(
                f"{argument}: {workdir} was started on other data ({_in_short(before)}), got "
                f"{_in_short(now)}; give the same, or use another workdir"
            )


def _in_short(own: Any) -> str:
    held = own if isinstance(own, dict) else {}
    digest = str(held.get("sha256"))[:8]
    return f"{held.get('name')}: x_train {held.get('x_train')}, sha256 {digest}"


def _numbers(name: str, value: Any, dtype: str) -> np.ndarray:
    """A copy in ``dtype``; finite."""
    if value is None:
        raise InputError(f"{name}: expected an array of numbers, got None")
    given = native_numbers(name, value)
    with np.errstate(over="ignore"):
        array = np.array(given, dtype)
    finite = np.isfinite(array)
    if not finite.all():
        bad, many = given[~finite][0], f"{int((~finite).sum())} such entries of {array.size}"
        if np.isfinite(bad):
            raise InputError(
                f"{name}: expected numbers that {dtype} holds, got {bad} ({many}); scale them down"
            )
        raise InputError(
            f"{name}: expected finite numbers, got {bad} ({many}); drop those examples, or fill "
            "the entries"
        )
    return array


def _inputs(name: str, value: Any, config: _Config) -> np.ndarray:
    array = _numbers(name, value, config.dtype)
    shapes = "images [n, H, W, c]" if config.arch == "cnn" else "[n, d_in] or images [n, H, W, c]"
    advice = {
        1: "one feature is x[:, None], one example x[None]",
        2: "reshape the examples to images, or give arch=mlp",
        3: "add a channel axis, by x[..., None]",
    }
    right = (4,) if config.arch == "cnn" else (2, 4)
    if array.ndim not in right:
        more = f"; {advice[array.ndim]}" if array.ndim in advice else ""
        raise InputError(f"{name}: expected {shapes}, got shape {array.shape}{more}")
    if array.size == 0:
        raise InputError(f"{name}: expected at least one example, got shape {array.shape}")
    return array


def _test_inputs(value: Any, x_train: np.ndarray, config: _Config) -> np.ndarray:
    if _is_missing(value):
        return x_train[:0]
    x_test = _inputs("x_test", value, config)
    if x_test.shape[1:] != x_train.shape[1:]:
        raise InputError(
            f"x_test: expected examples of shape {x_train.shape[1:]}, as x_train has, got "
            f"{x_test.shape[1:]}"
        )
    return x_test


def _unpooled(given: Any, x_train: np.ndarray, config: _Config) -> Unpooled | None:
    """The training images before pooling, which only a run with ``shift`` needs."""
    if given is None or not config.shift:
        return None
    try:
        found = dataclasses.replace(given, images=np.array(given.images))
        same = np.array_equal(found.pooled(), x_train.astype(np.float32))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"unpooled: expected images as load_dataset keeps them ({error})"
        ) from None
    if not same:
        raise InputError(
            "unpooled: expected the images of x_train before they were averaged, got others; leave "
            "unpooled out, or take the same examples of both"
        )
    return found


def _targets(
    name: str, value: Any, examples: int, d_out: int | None, config: _Config
) -> np.ndarray | None:
    """[n, d_out], or None without targets."""
    inputs = name.replace("y", "x")
    if _is_missing(value) and (value is None or not examples):
        return None
    if not examples:
        raise InputError(f"{name}: expected none without {inputs}, got some; give both or neither")
    try:
        array = _numbers(name, value, config.dtype)
    except InputError as error:
        if not _is_text(value):
            raise
        raise InputError(f"{error}; classes go into labels_train") from None
    array = array[:, None] if array.ndim == 1 else array
    width = "d_out" if d_out is None else str(d_out)
    if array.ndim != 2 or len(array) != examples or array.shape[1] != (d_out or array.shape[1]):
        raise InputError(
            f"{name}: expected shape [{examples}, {width}], an example each as in {inputs}, got "
            f"{list(np.shape(value))}"
        )
    if not array.shape[1]:
        raise InputError(f"{name}: expected one output or more, got shape {array.shape}")
    return array


def _is_text(value: Any) -> bool:
    with contextlib.suppress(Exception):
        array = np.asarray(value)
        return array.dtype.kind in "US" or any(isinstance(one, str) for one in array.flat)
    return False


def _is_missing(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _labels(
    data: Dataset, y_train: np.ndarray | None, train: int, test: int
) -> tuple[tuple[Any, ...], np.ndarray | None, np.ndarray | None]:
    """(classes, labels of the training and of the test set as indices into them)."""
    names = checked_classes(data.classes)
    in_train = label_values("labels_train", data.labels_train, train)
    in_test = label_values("labels_test", data.labels_test, test)
    if in_train is None:
        if in_test is not None:
            raise InputError("labels_train: expected labels, as labels_test has, got none")
        if names:
            raise InputError(f"classes: no effect without labels_train, got {brief(names)}")
        return (), None, None
    return index_labels(in_train, in_test, names, y_train)


def _decided(data: Dataset) -> Dataset:
    """The dataset with test labels, made from its targets; every class must have its own target."""
    targets = class_targets(data)
    if len(np.unique(targets, axis=0)) < len(targets):
        raise InputError(
            "y_train: expected other targets for each class, got two classes with the same; leave "
            "y_train out to have them made from labels_train"
        )
    if data.labels_test is not None or not len(data.x_test):
        return data
    return dataclasses.replace(data, labels_test=decide(data.y_test, targets).astype(np.int32))


def _describe(data: Dataset) -> str:
    shape = " x ".join(map(str, data.x_train.shape[1:]))
    d_out = data.y_train.shape[1]
    named = f"{len(data.classes)} classes, " if data.classes else ""
    return (
        f"{data.name}: {named}{len(data.x_train)} training and {len(data.x_test)} test examples of "
        f"{shape} numbers, {d_out} output{'s' if d_out > 1 else ''}"
    )
