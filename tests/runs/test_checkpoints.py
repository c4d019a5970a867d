"""Checkpoints: intact or refused, under any name, and with no room for them."""

import contextlib
import dataclasses
import json
import random
import shutil
import threading

import jax
import numpy as np
import processes
import pytest

from dnntk import train
from dnntk.errors import InputError
from dnntk.runs import checkpoints
from dnntk.runs.checkpoints import CHECKSUMS, Checkpoints

STATE = {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": [np.int32(3), np.zeros(0)]}
NAMES = (
    *("proj [2]", "[", "[!a]", "a\\b", "\\", "*", "**", "?x", "{a,b}", "%41", "#1", "é", "a b "),
    *("dot.", "$HOME", "~", "a\nb", "x:y", "-rf", "gs:", "\udcff"),
)


def assert_one_line(caught):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400


@pytest.fixture
def two_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jax.tree.map(lambda a, s=step: a + s, STATE))
    return folder


def restored(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(STATE)


def files_of(folder, step):
    return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file())


def test_a_checkpoint_comes_back_whole(two_checkpoints):
    step, state = restored(two_checkpoints)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, jax.tree.map(lambda a: a + 2, STATE))


def test_large_arrays_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PIECE", 1 << 12)
    key = jax.random.key(0)
    state = {
        "large": jax.random.normal(key, (7, 40, 41)),
        "whole numbers": np.arange(3000),  # of 64 bits, which JAX would make 32
        "small": jax.random.normal(key, (3,)),
        "one": np.float32(2.0),
    }
    with Checkpoints(tmp_path) as kept:
        kept.save(1, state)
        _, found = kept.restore(state)
        plain = kept.newest()
    for read in (found, plain):
        assert all(isinstance(read[name], np.ndarray) for name in state)
        assert all(read[name].dtype == state[name].dtype for name in state)
        assert all(np.array_equal(read[name], state[name]) for name in state)
    largest = max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert largest < state["large"].nbytes / 2


def test_layers_in_number_twice_a_prime_are_not_written_in_as_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PIECE", 1 << 14)
    state = {"layers": np.arange(2 * 1999 * 16, dtype=np.float32).reshape(-1, 4, 4)}
    with Checkpoints(tmp_path) as kept:
        kept.save(1, state)
        np.testing.assert_array_equal(kept.newest()["layers"], state["layers"])
    (described,) = tmp_path.rglob("array_metadatas/process_0")
    (entry,) = json.loads(described.read_bytes())["array_metadatas"]
    assert entry["array_metadata"]["chunk_shape"] == [1999, 4, 4]


DAMAGES = ("flip", "cut", "grow", "lose", "add", "link")


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_gives_way_to_the_one_before(two_checkpoints, damage, tmp_path):
    # Every other file; the other ones by the next kind of damage.
    for number in range(DAMAGES.index(damage) % 2, len(files_of(two_checkpoints, 2)), 2):
        folder = shutil.copytree(two_checkpoints, tmp_path / f"{damage}{number}", symlinks=True)
        file = files_of(folder, 2)[number]
        if damage == "grow" and file.name == CHECKSUMS:
            continue  # a blank after JSON is JSON
        data = bytearray(file.read_bytes())
        if damage == "flip":
            data[random.Random(number).randrange(len(data))] ^= 1
        if damage == "cut":
            data = data[:-2]  # the last byte of the list is a newline
        if damage == "grow":
            data += b" "
        file.unlink()
        if damage == "link":
            file.symlink_to(two_checkpoints / file.relative_to(folder))
        elif damage != "lose":
            file.write_bytes(data)
        if damage == "add":
            file.with_name("another").write_bytes(b"")
        step, state = restored(folder)
        assert step == 1
        np.testing.assert_array_equal(state["a"], STATE["a"] + 1)
        assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["1"]


def test_a_first_checkpoint_that_was_cut_short_is_none(two_checkpoints):
    shutil.rmtree(two_checkpoints / "1")
    (two_checkpoints / "2" / CHECKSUMS).unlink()
    assert restored(two_checkpoints) is None
    assert not any(p.name.isdigit() for p in two_checkpoints.iterdir())


def test_a_checkpoint_of_another_shape_is_never_made(two_checkpoints):
    other = {**STATE, "a": np.zeros((1 << 20, 1 << 10), np.float32)}
    with Checkpoints(two_checkpoints) as checkpoints, pytest.raises(InputError, match="another"):
        checkpoints.restore(other)


def test_a_thread_of_the_user_s_that_fails_meanwhile_is_reported(tmp_path, monkeypatch):
    def failing(*args):
        other = threading.Thread(target=lambda: 1 / 0)
        other.start()
        other.join()
        return write(*args)

    write, reported = checkpoints._in_pieces, []
    monkeypatch.setattr(checkpoints, "_in_pieces", failing)
    monkeypatch.setattr(threading, "excepthook", reported.append)
    with Checkpoints(tmp_path) as kept:
        kept.save(1, STATE)
        assert kept.restore(STATE)[0] == 1
    assert [failure.exc_type for failure in reported] == [ZeroDivisionError]


def test_no_room_is_one_line_and_the_checkpoint_before_stays(small, run, tmp_path, monkeypatch):
    workdir = shutil.copytree(run[0], tmp_path / "w")
    longer = dataclasses.replace(small, steps=16)
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="expected room for a checkpoint") as caught:
        train(longer, workdir, resume=True, progress=False)
    assert_one_line(caught)
    monkeypatch.undo()
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"8", "12"}
    train(longer, workdir, resume=True, progress=False)


def test_a_file_system_that_takes_no_more_is_one_line(tmp_path):
    """A limit on the size of files fails as a full disk does, in the middle of a write."""
    code = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    case = {"": ["train.py", "--depth=50", "--steps=20", "--workdir=w"]}
    done = processes.outcomes(None, case, tmp_path, code=code)[""]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "expected room for a checkpoint" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_kept_under_any_name(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as kept:
        kept.save(3, STATE)
    with Checkpoints(folder) as kept:
        step, state = kept.restore(STATE)
    assert step == 3 and state["b"][0] == 3
    np.testing.assert_array_equal(state["a"], STATE["a"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["proj [2]", "a\\b", "*"])
def test_a_name_that_orbax_would_mistake_is_refused_where_there_is_no_other(
    tmp_path, name, monkeypatch
):
    monkeypatch.setattr(checkpoints, "_OPEN_FILES", tmp_path / "nothing")
    with pytest.raises(InputError, match="workdir: expected a path without") as caught:
        Checkpoints(tmp_path / name)
    assert_one_line(caught)
    with Checkpoints(tmp_path / "plain") as kept:
        kept.save(1, STATE)
        assert kept.restore(STATE)[0] == 1


def test_a_checkpoint_that_cannot_be_read_again_is_an_error_at_once(tmp_path, monkeypatch):
    """What orbax does by itself with such a name: no error, and nothing to restore."""
    monkeypatch.setattr(checkpoints, "_without_pattern", contextlib.nullcontext)
    with Checkpoints(tmp_path / "proj [2]") as kept:
        with pytest.raises(InputError, match="checkpoints can be read again") as caught:
            kept.save(1, {"a": STATE["a"]})
        assert_one_line(caught)
        assert kept.newest() is None


def test_a_checkpoint_of_other_values_is_an_error_at_once(tmp_path, monkeypatch):
    def wrong(state):
        return save_args(state | {"b": [np.int32(4), state["b"][1]]})

    save_args = checkpoints._in_pieces
    monkeypatch.setattr(checkpoints, "_in_pieces", wrong)
    with Checkpoints(tmp_path) as kept, pytest.raises(InputError, match="other values"):
        kept.save(1, STATE)


def test_a_run_resumes_in_a_folder_of_any_name_and_prints_it_in_ascii(run, tmp_path):
    code = (
        "import runpy, sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    workdir = "runs [2]/a\\b é→ *"
    shutil.copytree(run[0], tmp_path / workdir)
    flags = ("--resume", "--steps=14", f"--workdir={workdir}")
    done = processes.outcomes("train.py", {"": flags}, tmp_path, code=code)[""]
    assert done.returncode == 0, done.stderr
    assert "resume: from step 12\n" in done.stdout
    assert "results: runs [2]/a\\b \\xe9\\u2192 *" in done.stdout
    assert (tmp_path / workdir / "checkpoints" / "14").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs [2]"]
