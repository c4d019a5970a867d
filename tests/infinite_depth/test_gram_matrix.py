import functools
import json

import jax
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.gram_matrix import PROGRESS, TILES, SymmetricGram
from dnntk.kernel import limit_ntk

X = np.random.default_rng(0).uniform(0, 1, (23, 4))


class Counted:
    """A kernel that counts its blocks, and raises an error after a given number."""

    def __init__(self, rho=1.0, most=10**9):
        self.blocks, self.rho, self.most = 0, rho, most

    def __call__(self, x1, x2):
        self.blocks += not isinstance(x1, jax.core.Tracer)
        if self.blocks > self.most:
            raise KeyboardInterrupt
        return limit_ntk(x1, x2, rho=self.rho)


def _gram(kernel=None, x=X, **options):
    options = {"block_size": 6, "progress": False} | options
    return SymmetricGram(CrossKernel(kernel or Counted(), x, "float64"), **options)


@functools.cache
def _full():
    with jax.enable_x64(True):
        return np.asarray(limit_ntk(X))


@pytest.mark.parametrize(
    ("block_size", "stored"),
    [(3, True), (5, False), (6, True), (6, False), (23, True), (100, False)],
)
def test_products_are_the_matrix_s(stored, block_size):
    gram, full = _gram(block_size=block_size, stored=stored), _full()
    vectors = np.random.default_rng(1).normal(size=(23, 3))
    np.testing.assert_allclose(gram.dense(), full, rtol=1e-12)
    for used in (23, 17, 6, 1):
        expected = full[:used, :used] @ vectors[:used]
        np.testing.assert_allclose(gram.product(vectors[:used]), expected, rtol=1e-10)
        np.testing.assert_allclose(gram.dense(used), full[:used, :used], rtol=1e-12)


def test_half_of_the_entries_are_computed_and_kept():
    kernel = Counted()
    gram = _gram(kernel)
    assert kernel.blocks == 4 * 5 // 2
    assert gram.nbytes < 8 * 0.7 * 23**2


def test_a_stored_matrix_is_found_again(tmp_path):
    _gram(folder=tmp_path)
    kernel = Counted()
    again = _gram(kernel, folder=tmp_path)
    assert kernel.blocks == 1  # the probes that identify it
    np.testing.assert_allclose(again.dense(), _full(), rtol=1e-12)


def test_an_interrupted_matrix_is_taken_up_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _gram(Counted(most=8), folder=tmp_path)
    assert len(json.loads((tmp_path / PROGRESS).read_text())["checksums"]) == 6
    kernel = Counted()
    np.testing.assert_allclose(_gram(kernel, folder=tmp_path).dense(), _full(), rtol=1e-12)
    assert kernel.blocks == 1 + 10 - 6


def test_a_matrix_stored_without_checksums_is_taken_up_all_the_same(tmp_path):
    _gram(folder=tmp_path)
    content = json.loads((tmp_path / PROGRESS).read_text())
    content["done"] = len(content.pop("checksums"))
    (tmp_path / PROGRESS).write_text(json.dumps(content))
    kernel = Counted()
    np.testing.assert_allclose(_gram(kernel, folder=tmp_path).dense(), _full(), rtol=1e-12)
    assert kernel.blocks == 1


@pytest.mark.parametrize("complete", [True, False])
def test_a_tile_that_is_not_what_was_written_is_computed_anew(tmp_path, complete, caplog):
    if complete:
        _gram(folder=tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            _gram(Counted(most=8), folder=tmp_path)
    whole = bytearray((tmp_path / TILES).read_bytes())
    whole[50 - _gram().nbytes] ^= 1  # of the first tile
    (tmp_path / TILES).write_bytes(whole)
    kernel = Counted()
    np.testing.assert_allclose(_gram(kernel, folder=tmp_path).dense(), _full(), rtol=1e-12)
    assert kernel.blocks == 1 + 1 + (0 if complete else 10 - 6)
    assert "1 of" in caplog.text and "damaged: evaluated again" in caplog.text
    caplog.clear()
    _gram(folder=tmp_path)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": Counted(rho=1.001)},
        {"x": X[:, ::-1]},
        {"x": X[:20]},
        {"block_size": 5},
    ],
)
def test_another_matrix_is_refused(tmp_path, other):
    _gram(folder=tmp_path)
    with pytest.raises(InputError, match="gram: expected"):
        _gram(folder=tmp_path, **other)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _truncate(folder / TILES),
        lambda folder: _truncate(folder / PROGRESS),
        lambda folder: (folder / TILES).write_bytes(b"nothing"),
        lambda folder: (folder / PROGRESS).write_text("[]"),
        lambda folder: (folder / PROGRESS).write_text("{}"),
        lambda folder: (folder / PROGRESS).write_text('{"checksums": [1e9], "probes": [1]}'),
        lambda folder: np.save(folder / TILES, np.array([{}]), allow_pickle=True),
        lambda folder: np.save(folder / TILES, np.zeros(4, np.int8)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    _gram(folder=tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match="gram: expected a stored matrix.*found damage"):
        _gram(folder=tmp_path)
