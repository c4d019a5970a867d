"""What befalls a run: damage, a second one in its folder, no room, an order to stop."""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc

import jax
import numpy as np
import processes
import pytest
from mutations import mutations

from dnntk import TrainConfig, train
from dnntk.data.idx import read_idx
from dnntk.errors import InputError, Stopped
from dnntk.infinite_depth import savefile
from dnntk.infinite_depth.gram_matrix import PROGRESS, TILES, CrossKernel, SymmetricGram
from dnntk.kernel import limit_ntk
from dnntk.runs import checkpoints
from dnntk.runs.checkpoints import CHECKSUMS, Checkpoints
from dnntk.runs.folder import RunFolder
from dnntk.runs.interruption import termination_flag
from dnntk.runs.locks import LOCK, FolderLock

SMALL = TrainConfig(depth=8, steps=12, eval_every=4, checkpoint_every=4, batch_size=64)
STATE = {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": [np.int32(3), np.zeros(0)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    return workdir, train(SMALL, workdir, progress=False)


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "w"), run[1]


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


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "lose", "add", "link"])
def test_any_damage_gives_way_to_the_one_before(two_checkpoints, damage, tmp_path):
    for number in range(len(files_of(two_checkpoints, 2))):
        folder = shutil.copytree(two_checkpoints, tmp_path / f"{damage}{number}", symlinks=True)
        file = files_of(folder, 2)[number]
        if damage == "grow" and file.name == CHECKSUMS:
            continue  # a blank after JSON is JSON
        data = bytearray(file.read_bytes())
        if damage == "flip":
            data[random.Random(number).randrange(len(data))] ^= 1
        if damage == "cut":
            data = data[:-1]
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
    sums = gram._known(workdir / TILES, workdir / PROGRESS, dict(identity))
    if sums:
        gram._data = np.load(workdir / TILES, mmap_mode="r+", allow_pickle=False)
        gram._mend(sums)


INPUTS = np.random.default_rng(0).random((7, 3))
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(range(24))


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
        ("config.json", read_config, 1000),
        ("metrics.jsonl", read_metrics, 1000),
        (f"checkpoints/12/{CHECKSUMS}", read_checkpoint, 500),
        ("checkpoints/12/default/_METADATA", read_checkpoint, 300),
        ("images", read_images, 1000),
        ("images.gz", read_images, 1000),
        ("model", read_model, 1000),
        (TILES, read_gram, 250),
        (PROGRESS, read_gram, 1000),
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


# ---- one run a folder


@contextlib.contextmanager
def killed(process):
    try:
        yield
    finally:
        process.kill()


def test_a_folder_is_one_process_s(tmp_path):
    code = f"""
import time
from pathlib import Path
from dnntk.runs.locks import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}))
print("held", flush=True)
time.sleep(60)
"""
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other,
        killed(other),
    ):
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"used by process {other.pid} on"):
            FolderLock(tmp_path)
        with pytest.raises(InputError, match="workdir: expected one that no run is using"):
            train(SMALL, tmp_path, progress=False)
    lock = FolderLock(tmp_path)
    again = FolderLock(tmp_path)  # a notebook's next run, while a traceback holds the last
    lock.release()
    assert (tmp_path / LOCK).exists()
    again.release()
    assert not (tmp_path / LOCK).exists()


def test_a_finished_run_leaves_its_folder_free(run):
    assert not (run[0] / LOCK).exists()


# ---- orders and shortages

FLAGS = ("--depth=400", "--dataset=digits", "--steps=100000", "--checkpoint_every=100000")


ORDERS = {signal.SIGTERM: "SIGTERM: stopped", signal.SIGINT: "interrupted"}


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_to_stop_writes_a_checkpoint_and_ends_the_run(tmp_path, order):
    running = processes.Running("train.py", *FLAGS, "--workdir=w", cwd=tmp_path)
    metrics = tmp_path / "w/metrics.jsonl"  # its first line comes before the first step
    running.until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 1)
    running.send_signal(order)
    errors = running.wait()  # 100,000 steps would take longer
    assert running.returncode == 128 + order
    last = errors.splitlines()[-1]
    assert f"{ORDERS[order]} after step" in last and "go on with --resume --workdir=w" in last
    assert "Traceback" not in errors
    step = int(last.partition("step ")[2].partition(";")[0])
    assert [p.name for p in (tmp_path / "w/checkpoints").iterdir()] == [str(step)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(run, tmp_path, monkeypatch, order):
    workdir = tmp_path / "w"
    whole, taken = run[1], []
    from dnntk.training import trainer as training_run

    count = training_run.Run._check

    def counted(self, loss, step):
        taken.append(step)
        if len(taken) == 8:
            os.kill(os.getpid(), order)
        return count(self, loss, step)

    before = [signal.getsignal(number) for number in ORDERS]
    kind = Stopped if order == signal.SIGTERM else KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(kind) as caught:
        patch.setattr(training_run.Run, "_check", counted)
        train(SMALL, workdir, progress=False)
    assert f"go on with resume=True, workdir={str(workdir)!r}" in caught.value.message
    assert [signal.getsignal(number) for number in ORDERS] == before
    resumed = train(SMALL, workdir, resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in whole.history]


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    code = """
import os, signal
from dnntk.runs.interruption import termination_flag
with termination_flag() as requested:
    os.kill(os.getpid(), signal.SIGINT)
    print(requested(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""
    (done,) = processes.outcomes("train.py", {"": ()}, tmp_path, code=code).values()
    assert done.stdout == "2\n" and done.returncode == -signal.SIGINT
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # a notebook, which must go on
    with pytest.raises(KeyboardInterrupt), termination_flag() as requested:
        os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def test_no_room_is_one_line_and_the_checkpoint_before_stays(copied, monkeypatch):
    workdir, _ = copied
    longer = dataclasses.replace(SMALL, steps=16)
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="expected room for a checkpoint") as caught:
        train(longer, workdir, resume=True, progress=False)
    assert "\n" not in str(caught.value)
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
