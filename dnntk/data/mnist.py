"""MNIST and Fashion-MNIST: from a folder of raw IDX files, or from tensorflow-datasets.

Neither way needs TensorFlow. tensorflow-datasets reads a prepared ``array_record`` set without it,
but needs it to prepare one. `prepare` therefore gives the registered builder its own reading and
PNG encoding and keeps the rest (addresses, SHA-256 sums, file layout): it writes an ordinary
prepared set. tensorflow-datasets stores examples in a hashed order, so the two ways give the same
examples in different orders.
"""

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnntk.data.idx import MNIST_FILES, find_idx, read_pair
from dnntk.errors import InputError
from dnntk.runs.paths import as_path

__all__ = ["CLASS_NAMES", "LabelledImages", "prepare", "read_images"]

CLASS_NAMES: dict[str, tuple[str | int, ...]] = {
    "mnist": tuple(range(10)),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
# SHA-256 of train-labels-idx1-ubyte.gz, as tensorflow-datasets publishes it.
_PUBLISHED_TRAIN_LABELS = {
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c": "mnist",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845": "fashion_mnist",
}
# tensorflow-datasets, after the modules that it needs here but does not declare on every platform.
_NEEDED = (
    "PIL.Image",
    "importlib_resources",
    "array_record.python.array_record_module",
    "tensorflow_datasets",
)
_PROBE_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A set of images as stored, all classes.

    Attributes:
        x_train: [n, H, W] pixels, 0 to ``maximum``.
        labels_train: [n] integers, indices into ``class_names``.
        x_test: [m, H, W].
        labels_test: [m].
        maximum: the pixel value that means white.
        class_names: one entry a class.
        split: how the examples were divided into training and test set, and their source.
    """

    x_train: NDArray[Any]
    labels_train: NDArray[Any]
    x_test: NDArray[Any]
    labels_test: NDArray[Any]
    maximum: int
    class_names: tuple[str | int, ...]
    split: str


def read_images(name: str, data_dir: str | os.PathLike[str] | None = None) -> LabelledImages:
    """Read ``mnist`` or ``fashion_mnist`` in the published split.

    Args:
        name: the dataset.
        data_dir: a folder with the four raw IDX files, gzipped or not, or a tensorflow-datasets
            directory in which the set is prepared as ``array_record``. None: tensorflow-datasets'
            own directory, to which the set is downloaded and prepared unless it is in it already.

    Returns:
        uint8 images of any one size, 28 x 28 as published.

    Raises:
        InputError: ``data_dir`` has no such files, they are damaged, or the download failed.
    """
    if data_dir is None:
        return _read_prepared(name, prepare(name))
    folder = as_path("data_dir", data_dir)
    if not os.path.isdir(folder):  # where a parent cannot be entered, `Path.is_dir` raises
        raise InputError(f"data_dir={data_dir}: expected a folder, found none; check the path")
    paths = [find_idx(folder, file) for file in MNIST_FILES]
    if all(paths):
        return _read_folder(name, folder, [path for path in paths if path])
    if _is_prepared(name, folder):
        return _read_prepared(name, folder)
    missing = [file for file, path in zip(MNIST_FILES, paths, strict=True) if path is None]
    raise InputError(
        f"data_dir={data_dir}: expected {name}'s four IDX files (plain or .gz) or a "
        f"tensorflow-datasets folder {name}/, found no {', '.join(missing)}; name the folder that "
        "holds them, or leave data_dir out to download"
    )


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Download a set and prepare it for tensorflow-datasets, without TensorFlow; 6 s for MNIST.

    Does nothing if the set is prepared already. Every file, downloaded or given, is compared with
    the SHA-256 that tensorflow-datasets publishes.

    Args:
        name: ``mnist`` or ``fashion_mnist``.
        data_dir: where to write ``<name>/<version>``; tensorflow-datasets' own directory
            (``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``) if None.
        manual_dir: a folder with the four published ``.gz`` files, used instead of a download.

    Returns:
        The directory written to, for ``tfds.data_source(name, data_dir=...)``.

    Raises:
        InputError: a failed download, a wrong checksum, a file missing from ``manual_dir``, or a
            directory that cannot be written.
    """
    directory = _default_dir() if data_dir is None else as_path("data_dir", data_dir)
    if _is_prepared(name, directory):
        return directory
    manual = None if manual_dir is None else as_path("manual_dir", manual_dir)
    tfds = _import_tfds(name)
    builder_class = _builder_class(tfds, name)
    with _one_line_errors(tfds, name, directory, builder_class):
        if manual:
            _require_manual_files(manual)
        elif not _is_downloaded(name, directory):
            _probe(builder_class)
        builder_class(data_dir=directory, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual,
                # tensorflow-datasets caches extracted files by name, and both sets' files have the
                # same names: with one cache, the second set would get the first one's images.
                extract_dir=directory / "downloads" / "extracted" / name,
                try_download_gcs=False,
            )
        )
    return directory


@contextlib.contextmanager
def _one_line_errors(tfds: Any, name: str, directory: Path, builder_class: Any) -> Iterator[None]:
    """Turn the errors of a download, a checksum or a disk into `InputError`."""
    import requests

    try:
        yield
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        raise InputError(
            f"{name}: expected the published files, found another SHA-256 "
            f"({_first_line(error)}); replace that file, or read your own files with "
            "data_dir=FOLDER"
        ) from error
    except (requests.RequestException, tfds.download.DownloadError) as error:
        # requests' own messages nest four exceptions: the kind and the address suffice.
        address = next(iter(builder_class.url_infos)).rpartition("/")[0]
        raise InputError(
            f"{name}: expected to download it from {address}, found {type(error).__name__}; give "
            "data_dir=FOLDER with its four IDX files, or try again with a network"
        ) from error
    except OSError as error:
        raise InputError(
            f"{name}: expected to write to {directory}, found '{_first_line(error)}'; set "
            "TFDS_DATA_DIR to a folder with room, or give data_dir=FOLDER with its IDX files"
        ) from error


def _read_folder(name: str, folder: Path, paths: list[Path]) -> LabelledImages:
    x_train, labels_train = read_pair(*paths[:2])
    _refuse_another_set(name, paths[1])
    x_test, labels_test = read_pair(*paths[2:])
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"{paths[2]}: expected test images of the training images' {_size(x_train)} pixels, "
            f"found {_size(x_test)}; take both files from one dataset"
        )
    arrays = x_train, labels_train, x_test, labels_test
    return LabelledImages(*arrays, 255, CLASS_NAMES[name], f"published split, from {folder}")


def _refuse_another_set(name: str, train_labels: Path) -> None:
    """Refuse the other set's published files, which have the same names, by their content."""
    digest = hashlib.sha256(train_labels.read_bytes()).hexdigest()
    found = _PUBLISHED_TRAIN_LABELS.get(digest, name)
    if found != name:
        raise InputError(
            f"{train_labels}: expected the labels of {name}, found those of {found}; "
            f"give dataset={found}, or the folder of {name}"
        )


def _size(images: NDArray[Any]) -> str:
    return " x ".join(map(str, images.shape[1:]))


def _read_prepared(name: str, directory: Path) -> LabelledImages:
    tfds = _import_tfds(name)
    try:
        train, test = (_read_split(tfds, name, directory, split) for split in ("train", "test"))
    except NotImplementedError as error:
        raise InputError(
            f"{directory / name}: expected a set prepared as array_record, found another format; "
            "set TFDS_DATA_DIR to another folder to prepare it again without TensorFlow, or give "
            "data_dir=FOLDER with its four IDX files"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{directory / name}: expected an intact prepared set, found '{_first_line(error)}'; "
            "delete that folder to have it prepared again"
        ) from error
    split = f"published split, from tensorflow-datasets in {directory}"
    return LabelledImages(*train, *test, 255, CLASS_NAMES[name], split)


def _read_split(
    tfds: Any, name: str, directory: Path, split: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All examples of a split; faster than tensorflow-datasets' own decoding, and silent."""
    source = tfds.data_source(
        name,
        split=split,
        data_dir=directory,
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    # One call for all examples: a call for each takes four times as long.
    examples = source.__getitems__(list(range(len(source))))
    images = np.stack([_decode_png(example["image"]) for example in examples])
    return images, np.array([example["label"] for example in examples], np.uint8)


def _builder_class(tfds: Any, name: str) -> Any:
    """The registered builder, with reading and encoding that need no TensorFlow."""
    base = tfds.builder_cls(name)

    with tfds.core.registered.skip_registration():

        class BuilderWithoutTensorFlow(base):  # type: ignore[misc, valid-type]
            # Without these two lines both would be derived from this class and its module.
            name = base.name
            url_infos = base.url_infos

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                # The addresses come from the table of checksums, so every file is checked.
                urls = {info.filename: url for url, info in self.url_infos.items()}
                paths = dl_manager.download(urls)
                train, test = (
                    read_pair(*(Path(paths[file + ".gz"]) for file in files))
                    for files in (MNIST_FILES[:2], MNIST_FILES[2:])
                )
                splits = {"train": train, "test": test}
                return {key: self._generate_examples(*pair) for key, pair in splits.items()}

            def _generate_examples(
                self, images: NDArray[np.uint8], labels: NDArray[np.uint8]
            ) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield index, {"image": _encode_png(image), "label": int(label)}

    return BuilderWithoutTensorFlow


def _encode_png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def _decode_png(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def _import_tfds(name: str) -> Any:
    """tensorflow-datasets, imported only here: it takes half a second and few runs need it."""
    try:
        return [importlib.import_module(module) for module in _NEEDED][-1]
    except ImportError as error:
        raise InputError(
            f"{name}: expected tensorflow-datasets, array_record, importlib_resources and pillow, "
            f"found '{_first_line(error)}'; install them, or give data_dir=FOLDER with the "
            "dataset's four IDX files"
        ) from error


def _default_dir() -> Path:
    """tensorflow-datasets' own rule, which the library itself applies once, on import."""
    if named := os.environ.get("TFDS_DATA_DIR"):
        return as_path("TFDS_DATA_DIR", named)
    try:
        return as_path("data_dir", "~/tensorflow_datasets")
    except InputError:
        raise InputError(
            "data_dir: expected a folder to read, or a home folder to download to, found neither; "
            "give data_dir, or set HOME or TFDS_DATA_DIR"
        ) from None


def _is_prepared(name: str, directory: Path) -> bool:
    return any((directory / name).glob("*/dataset_info.json"))


def _is_downloaded(name: str, directory: Path) -> bool:
    return len(list((directory / "downloads" / name).rglob("*.gz"))) >= len(MNIST_FILES)


def _require_manual_files(folder: Path) -> None:
    """Refuse a folder without all files: tensorflow-datasets would download the missing ones."""
    missing = [file + ".gz" for file in MNIST_FILES if not (folder / (file + ".gz")).is_file()]
    if missing:
        raise InputError(
            f"{folder}: expected the four published .gz files, found no {', '.join(missing)}; "
            "put them there under these names"
        )


def _probe(builder_class: Any) -> None:
    """Ask once whether the server can be reached.

    Without a network, tensorflow-datasets retries every file ten times, for 200 s.
    """
    import requests

    requests.head(next(iter(builder_class.url_infos)), timeout=_PROBE_SECONDS)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
