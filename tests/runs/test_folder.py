"""Files that a run reads back, damaged in any way."""

import functools
import gzip
import shutil
import tracemalloc

import numpy as np
import pytest
from mutations import mutations

from dnntk import TrainConfig
from dnntk.data.idx import read_idx
from dnntk.errors import InputError
from dnntk.estimators import savefile
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.gram_matrix import PROGRESS, TILES, SymmetricGram
from dnntk.kernel import limit_ntk
from dnntk.runs.checkpoints import CHECKSUMS, Checkpoints
from dnntk.runs.folder import RunFolder

INPUTS = np.random.default_rng(0).random((7, 3))
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(range(24))


class Folder:
    """As much of a `Checkpoints` as its check of files needs; the rest is orbax's."""

    def __init__(self, folder):
        self._folder = folder


def read_config(workdir):
    TrainConfig.from_json(RunFolder(workdir).read_config())


def read_metrics(workdir):
    assert all(line["step"] <= 8 for line in RunFolder(workdir).keep_metrics_to(8))


def read_checkpoint(workdir):
    Checkpoints._verified(Folder(workdir / "checkpoints"), 12)


def read_images(workdir):
    read_idx(next(workdir.glob("images*")), 3)


def read_model(workdir):
    savefile.read(workdir / "model", "thing")


@functools.cache
def the_gram():
    gram = SymmetricGram(CrossKernel(limit_ntk, INPUTS, "float64"), block_size=3, progress=False)
    return gram, gram.identity()


def read_gram(workdir):
    gram, identity = the_gram()
    sums = gram._load_checksums(workdir / TILES, workdir / PROGRESS, dict(identity))
    if sums:
        gram._data = np.load(workdir / TILES, mmap_mode="r+", allow_pickle=False)
        gram._repair(sums)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """A folder with a file of every kind that is read."""
    folder = shutil.copytree(run[0], tmp_path_factory.mktemp("written") / "w")
    (folder / "images").write_bytes(IMAGES)
    savefile.write(folder / "model", "thing", {"a": np.arange(6.0).reshape(2, 3)}, {"b": [1, "c"]})
    gram = CrossKernel(limit_ntk, INPUTS, "float64")
    SymmetricGram(gram, block_size=3, progress=False, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("name", "read", "count"),
    [
        ("config.json", read_config, 300),
        ("metrics.jsonl", read_metrics, 300),
        (f"checkpoints/12/{CHECKSUMS}", read_checkpoint, 200),
        ("checkpoints/12/default/_METADATA", read_checkpoint, 150),
        ("images", read_images, 300),
        ("images.gz", read_images, 300),
        ("model", read_model, 300),
        (TILES, read_gram, 80),
        (PROGRESS, read_gram, 300),
    ],
)
def test_mutations_cost_no_traceback_and_no_memory(written, tmp_path, name, read, count):
    if name == "images.gz":
        workdir = tmp_path
        (workdir / name).write_bytes(gzip.compress(IMAGES, mtime=0))
    elif read is read_checkpoint:
        workdir = shutil.copytree(written, tmp_path / "w")
    else:
        workdir = tmp_path
        for other in ("config.json", "metrics.jsonl", "images", "model", TILES, PROGRESS):
            if read is not read_images or other == "images":
                shutil.copy(written / other, workdir)
    file = workdir / name
    whole, refused = file.read_bytes(), 0
    read(workdir)
    tracemalloc.start()
    for data in mutations(whole, count):
        file.write_bytes(data)
        try:
            read(workdir)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused or read is read_metrics
    assert peak < 8 << 20
