r"""A million rows of 784 numbers: linear models on the features of the infinitely deep network.

    python scripts/million_rows.py --data_dir=FOLDER_OF_MNIST
    python scripts/million_rows.py --parts=ridge --data_dir=FOLDER_OF_MNIST

The rows are MNIST's training images, each shifted by up to two pixels in either direction. Parts:

    errors  distance of the features' products from the limit kernel, on digits and MNIST
    sgd     SGDClassifier, a chunk of rows at a time
    ridge   a pipeline of InfiniteDepthFeatures and Ridge, all features in memory

Each part writes one JSON file into --workdir as it ends; a part whose file exists is not run again.
A part's peak memory is that of the process until its end.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import command_line
import numpy as np
from absl import flags
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.pipeline import make_pipeline

from dnntk import InfiniteDepthFeatures, load_dataset
from dnntk.data.mnist import LabelledImages, read_images
from dnntk.kernel import limit_ntk
from dnntk.networks.random_units import EVEN_FEATURES
from dnntk.runs.folder import RunFolder, peak_memory_bytes
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar

FLAGS = flags.FLAGS
COUNTS = (64, 256, 1024, 4096)  # of the features in "errors"
DRAWS = 5
REACH = 2  # pixels of the largest shift

flags.DEFINE_list("parts", ["all"], "Some of errors, sgd, ridge; or 'all'.")
flags.DEFINE_string("data_dir", None, "Folder of MNIST. None: tensorflow-datasets' own.")
flags.DEFINE_integer("rows", 1_000_000, "Training rows, of MNIST's images shifted.", lower_bound=1)
flags.DEFINE_integer("count", 1024, "Random features.", lower_bound=1)
flags.DEFINE_enum("features", "sobol", EVEN_FEATURES, "Draw of the random features.")
flags.DEFINE_float("rho", 10.0, "Standard deviation of the network's Gaussian weights.")
flags.DEFINE_float("beta", 1.0, "Standard deviation of its Gaussian biases over its scale.")
flags.DEFINE_float("ridge", 1e-4, "Ridge in units of the eigenvalues of K/N.", lower_bound=0)
flags.DEFINE_integer("chunk", 10_000, "Rows of a chunk of sgd.", lower_bound=1)
flags.DEFINE_integer("compared", 500, "Examples of each dataset in errors.", lower_bound=2)
flags.DEFINE_integer("seed", 0, "Seed of the features and of sgd.", lower_bound=0)
flags.DEFINE_string("workdir", "runs/million-rows", "Folder for all results.")


def shifted(images: NDArray, rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows [rows, pixels] float32 from images [n, H, W], and whose image each is.

    In every pass over the images each has another shift; after all (2 REACH + 1)^2 they repeat.
    """
    shifts = sorted(
        itertools.product(range(-REACH, REACH + 1), repeat=2), key=lambda s: abs(s[0]) + abs(s[1])
    )
    padded = np.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH)))
    n, height, width = images.shape
    number = np.arange(rows)
    image, shift = number % n, (number % n + number // n) % len(shifts)
    x = np.empty((rows, height * width), np.float32)
    for k, (down, right) in enumerate(shifts):
        window = padded[:, REACH - down :, REACH - right :][:, :height, :width]
        for own in np.array_split(np.flatnonzero(shift == k), 16):
            x[own] = window[image[own]].reshape(-1, height * width)
    return x, image


def transformer() -> InfiniteDepthFeatures:
    """The features that the flags name."""
    return InfiniteDepthFeatures(
        FLAGS.count, FLAGS.rho, FLAGS.beta, FLAGS.features, random_state=FLAGS.seed
    )


def train_rows(images: LabelledImages) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Training rows, 0 to 1, and their labels."""
    x, image = shifted(images.x_train, FLAGS.rows)
    x /= images.maximum
    return x, np.asarray(images.labels_train, np.int64)[image]


def test_rows(images: LabelledImages) -> NDArray[np.float32]:
    """MNIST's test images as rows, not shifted, 0 to 1."""
    x = images.x_test.reshape(len(images.x_test), -1).astype(np.float32)
    x /= images.maximum
    return x


def ridge() -> dict[str, Any]:
    """One-hot targets by scikit-learn's Ridge behind the transformer."""
    images = read_images("mnist", FLAGS.data_dir)
    x, labels = train_rows(images)
    targets = np.eye(10, dtype=np.float32)[labels]
    linear = Ridge(alpha=len(x) * FLAGS.ridge, fit_intercept=False, copy_X=False, solver="cholesky")
    start = time.perf_counter()
    model = make_pipeline(transformer(), linear).fit(x, targets)
    seconds = time.perf_counter() - start
    predicted = model.predict(test_rows(images)).argmax(1)
    return _result(x, seconds, predicted != images.labels_test)


def sgd() -> dict[str, Any]:
    """Hinge losses by SGDClassifier.partial_fit, a chunk of features in memory."""
    images = read_images("mnist", FLAGS.data_dir)
    x, labels = train_rows(images)
    features = transformer().fit(x[:1])
    model = SGDClassifier(alpha=1e-6, average=True, random_state=FLAGS.seed)
    start = time.perf_counter()
    for i in progress_bar(range(0, len(x), FLAGS.chunk), desc="sgd", unit="chunk", delay=5.0):
        chunk = slice(i, i + FLAGS.chunk)
        model.partial_fit(features.transform(x[chunk]), labels[chunk], classes=np.arange(10))
    seconds = time.perf_counter() - start
    predicted = model.predict(features.transform(test_rows(images)))
    return _result(x, seconds, predicted != images.labels_test)


def errors() -> dict[str, Any]:
    """||Phi Phi^T - K||_F / ||K||_F, root mean square of some draws; rho = beta = 1."""
    digits = load_dataset("digits", classes="all").x_train
    mnist = test_rows(read_images("mnist", FLAGS.data_dir))
    found = {}
    for name, x in {"digits": digits.reshape(len(digits), -1), "mnist": mnist}.items():
        rows = x[: FLAGS.compared].astype(np.float64)
        exact = np.asarray(limit_ntk(rows), np.float64)
        for features, count in itertools.product(EVEN_FEATURES, COUNTS):
            each = []
            for seed in range(FLAGS.seed, FLAGS.seed + DRAWS):
                model = InfiniteDepthFeatures(count, features=features, random_state=seed)
                phi = model.fit_transform(rows)
                each.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
            found[f"{name}, {features}, {count}"] = float(np.sqrt(np.mean(np.square(each))))
    return {"relative_error": found, "examples": FLAGS.compared, "draws": DRAWS}


def _result(x: NDArray, seconds: float, wrong: NDArray) -> dict[str, Any]:
    return {
        "rows": len(x),
        "numbers_a_row": x.shape[1],
        "random_features": FLAGS.count,
        "features": FLAGS.features,
        "rho": FLAGS.rho,
        "beta": FLAGS.beta,
        "test_error": float(np.mean(wrong)),
        "fit_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


PARTS = {"errors": errors, "sgd": sgd, "ridge": ridge}


@freeing_folders()
def main() -> None:
    """Run the parts that have no result yet, then show all results."""
    names = command_line.chosen("parts", PARTS)
    folder = RunFolder(command_line.workdir())
    folder.claim({}, resume=False)
    for name in names:
        file: Path = folder.path / f"{name}.json"
        if not file.exists():
            folder.write_json(file.name, PARTS[name]())
        print(name, file.read_text(), flush=True)


if __name__ == "__main__":
    command_line.run(main)
