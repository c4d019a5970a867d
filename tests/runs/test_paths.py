"""Paths that a user brings: names of any kind, ``~``, none at all, and users without a home."""

import pwd
import shutil
from pathlib import Path

import numpy as np
import pytest

import dnntk
from dnntk import TrainConfig
from dnntk.data.idx import MNIST_FILES, read_idx
from dnntk.errors import InputError
from dnntk.estimators import savefile
from dnntk.infinite_depth.prediction import predict
from dnntk.kernel import limit_ntk
from dnntk.native import build
from dnntk.report.reading import find_workdirs
from dnntk.runs.folder import RunFolder
from dnntk.runs.paths import as_path


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# ---- what a path is


def test_a_home_is_expanded_wherever_a_path_is_given(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "run").mkdir(parents=True)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(here)
    assert as_path("workdir", "~") == home
    assert as_path("workdir", Path("~/x")) == as_path("workdir", b"~/x") == home / "x"
    assert RunFolder("~/run").path == home / "run"
    RunFolder("~/run").write_json("config.json", {})
    assert [found.path for found in find_workdirs(["~/run"])] == [home / "run"]
    savefile.write("~/model", "thing", {"a": np.ones(2)}, {})
    assert savefile.read("~/model", "thing")[0]["a"].sum() == 2
    x = np.random.default_rng(0).random((4, 3))
    flow = dnntk.KernelFlow(limit_ntk, x, x[:, :1], folder="~/gram", progress=False)
    flow.predict(x)
    assert (home / "gram").is_dir()
    (home / "labels").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]))
    assert read_idx("~/labels", 1).tolist() == [7]
    with pytest.raises(InputError, match="compare: expected a run in .*home/none"):
        predict(compare="~/none")
    with pytest.raises(InputError, match="no train-images"):
        dnntk.load_dataset("mnist", data_dir="~/run")
    assert build._folder() == home / ".cache" / "dnntk"
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    "value",
    ["", "a\0b", b"", 3, True, 2.5, ["x"], ("a", "b"), np.ones((40, 40)), "~nobody9/x"]
    + ["x" * 300, "\ud800"],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_no_path_is_one_line_that_names_the_argument(value):
    with pytest.raises(InputError, match="^workdir: expected a path, got") as caught:
        RunFolder(value)
    one_line(caught)
    with pytest.raises(InputError, match="^data_dir: expected a ") as caught:
        dnntk.load_dataset("mnist", data_dir=value)
    one_line(caught)


def test_a_user_without_a_home_gets_one_line_or_another_folder(tmp_path, monkeypatch):
    def unknown(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.chdir(tmp_path)
    assert build._folder().is_dir() and build._folder() == build._scratch()
    with pytest.raises(
        InputError, match="data_dir: expected a folder to read, or a home"
    ) as caught:
        dnntk.load_dataset("mnist")
    one_line(caught)
    with pytest.raises(InputError, match="no home folder is known") as caught:
        dnntk.train(TrainConfig(depth=4), "~/x", progress=False)
    one_line(caught)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert build._folder() == build._scratch()
    monkeypatch.setenv("HOME", str(tmp_path / "afile"))
    (tmp_path / "afile").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build._folder() == build._scratch()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", MNIST_FILES)
def test_a_folder_named_like_an_idx_file_is_one_line(tmp_path, name, suffix):
    for other in MNIST_FILES:
        count = 20
        shape = [0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 1, 0, 0, 0, 1]
        labels = [0, 0, 8, 1, 0, 0, 0, count]
        head = shape if "images" in other else labels
        (tmp_path / other).write_bytes(bytes(head) + bytes(k % 10 for k in range(count)))
    (tmp_path / name).unlink()
    (tmp_path / (name + suffix)).mkdir()
    with pytest.raises(InputError, match="expected an IDX file, found a directory") as caught:
        dnntk.load_dataset("mnist", data_dir=tmp_path, pool=1)
    assert name in one_line(caught)


# ---- compilers of several words


def test_a_compiler_may_have_several_words(tmp_path, monkeypatch):
    plain = shutil.which("g++") or shutil.which("c++")
    if plain is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "my tools").mkdir()
    wrapper = tmp_path / "my tools" / "wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    version = build._output([plain, "--version"])
    for named in (plain, f"'{wrapper}' {plain}", f"env A=b '{plain}'", f" {plain} -O1 "):
        monkeypatch.setenv("CXX", named)
        assert build._output([*build._compiler(), "--version"]) == version
    monkeypatch.setenv("CXX", str(wrapper))  # unquoted
    assert build._compiler() == [str(wrapper)]
    for empty in ("", " "):
        monkeypatch.setenv("CXX", empty)
        assert len(build._compiler()) == 1
