"""Scripts through their real command line, each in a process of its own."""

import concurrent.futures
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--depth=20", "--steps=12", "--eval_every=4", "--checkpoint_every=2")


def command(*flags):
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]


def run(*flags, cwd):
    return subprocess.run(command(*flags), cwd=cwd, capture_output=True, text=True, timeout=300)


def idx(array, magic=None):
    kind = {1: 2049, 3: 2051}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", kind, *array.shape) + array.tobytes()


def write_idx_folder(folder, **replaced):
    """A small MNIST look-alike; ``replaced`` gives some files other bytes, None leaves one out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        for stem, content in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ):
            data = replaced.get(stem.replace("-", "_"), gzip.compress(idx(content)))
            if data is not None:
                (folder / f"{stem}.gz").write_bytes(data)
    return folder


LABELS, IMAGES = "train_labels_idx1_ubyte", "train_images_idx3_ubyte"
GOOD_LABELS = idx(np.arange(40, dtype=np.uint8) % 10)
GOOD_IMAGES = idx(np.zeros((40, 28, 28), np.uint8))
BAD_FILES = {
    "missing labels": {LABELS: None},
    "empty file": {IMAGES: b""},
    "not gzip": {IMAGES: b"hello" * 100},
    "truncated gzip": {IMAGES: gzip.compress(GOOD_IMAGES)[:-20]},
    "flipped bit": {LABELS: bytes(gzip.compress(GOOD_LABELS)[:-6]) + b"\1\2\3\4\5\6"},
    "truncated images": {IMAGES: gzip.compress(GOOD_IMAGES[:-9])},
    "trailing bytes": {LABELS: gzip.compress(GOOD_LABELS + b"xx")},
    "labels as images": {IMAGES: gzip.compress(GOOD_LABELS)},
    "fewer labels": {LABELS: gzip.compress(idx(np.zeros(39, np.uint8)))},
    "labels out of range": {LABELS: gzip.compress(idx(np.full(40, 11, np.uint8)))},
    "a thousand million images": {
        IMAGES: gzip.compress(struct.pack(">4I", 2051, 10**9, 28, 28) + bytes(100))
    },
    "other image size": {IMAGES: gzip.compress(idx(np.zeros((40, 20, 28), np.uint8)))},
}
BAD_FLAGS = {
    "unknown flag": (["--depht=10"], "depht"),
    "stray word": (["depth=10"], "depth=10"),
    "depth not a number": (["--depth=ten"], "depth"),
    "depth too small": (["--depth=1"], "depth"),
    "arch": (["--arch=rnn"], "arch"),
    "dataset": (["--dataset=imagenet"], "dataset"),
    "classes not numbers": (["--classes=zero,one"], "classes"),
    "one class": (["--classes=3"], "classes"),
    "class repeated": (["--classes=3,3"], "classes"),
    "class not in the data": (["--classes=0,12"], "classes"),
    "negative scale": (["--scale=-4"], "scale"),
    "scale not a number": (["--scale=nan"], "scale"),
    "infinite scale, literal matrices": (["--scale=inf", "--parametrization=standard"], "scale"),
    "infinite scale, baseline": (["--scale=inf", "--init=he_uniform"], "scale"),
    "infinite scale, raw rate": (["--scale=inf", "--lr=0.1"], "lr"),
    "rho": (["--rho=-1"], "rho"),
    "beta": (["--beta=inf"], "beta"),
    "init": (["--init=xavier"], "init"),
    "parametrization": (["--parametrization=mup"], "parametrization"),
    "optimizer": (["--optimizer=lbfgs"], "optimizer"),
    "optimizer without rate": (["--optimizer=adam"], "lr"),
    "momentum of one": (["--momentum=1"], "momentum"),
    "momentum with adam": (["--optimizer=adam", "--lr=0.1", "--momentum=0.9"], "momentum"),
    "time_step": (["--time_step=0"], "time_step"),
    "two rates": (["--time_step=0.1", "--lr=0.1"], "lr, time_step"),
    "two lengths": (["--steps=5", "--epochs=2"], "steps, epochs, time"),
    "steps": (["--steps=0"], "steps"),
    "time": (["--time=inf"], "time"),
    "batch_size": (["--batch_size=-1"], "batch_size"),
    "eval_every": (["--eval_every=-2"], "eval_every"),
    "dtype": (["--dtype=float16"], "dtype"),
    "seed": (["--seed=-1"], "seed"),
    "pool": (["--pool=3"], "pool"),
    "even filter": (["--arch=cnn", "--kernel_size=4"], "kernel_size"),
    "toy images": (["--dataset=toy", "--arch=cnn"], "dataset"),
    "no such folder": (["--dataset=mnist", "--data_dir=nowhere"], "data_dir"),
    "folder without data": (["--dataset=mnist", "--data_dir=."], "data_dir"),
    "nothing to resume": (["--resume", "--workdir=nothing"], "resume"),
    "workdir is a file": (["--workdir=afile"], "workdir"),
    "config is not JSON": (["--resume", "--workdir=damaged"], "resume"),
    "another run's workdir": (["--workdir=taken"], "workdir"),
    "resume with another depth": (["--resume", "--workdir=taken", "--depth=30"], "depth"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Every bad command line, run two at a time: name -> finished process."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "afile").write_text("")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    assert run(*SMALL, "--workdir=taken", cwd=folder).returncode == 0
    jobs = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    for name, replaced in BAD_FILES.items():
        data = write_idx_folder(folder / name.replace(" ", "_"), **replaced)
        jobs[name] = ["--dataset=mnist", f"--data_dir={data}"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(
            zip(jobs, pool.map(lambda flags: run(*flags, cwd=folder), jobs.values()), strict=True)
        )


def check_refusal(process, part):
    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and part in lines[0], process.stderr
    assert "Traceback" not in process.stdout + process.stderr


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, refusals):
    check_refusal(refusals[name], BAD_FLAGS[name][1])


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_status_2(name, refusals):
    replaced = next(iter(BAD_FILES[name]))
    part = replaced.replace("_idx", "-idx").replace("train_", "train-").rsplit("-", 1)[0]
    check_refusal(refusals[name], part.split("-")[1])


def test_help_lists_every_flag_with_its_default(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "--depth" in done.stdout and "(default: '1000')" in done.stdout


def test_a_good_folder_of_idx_files_trains(tmp_path):
    data = write_idx_folder(tmp_path / "data")
    done = run("--dataset=mnist", f"--data_dir={data}", "--classes=all", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mlp-mnist-depth20" / "summary.json").exists()


def test_the_log_says_what_the_issue_asks_before_the_first_step(tmp_path):
    done = run("--arch=cnn", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert heads[:6] == ["network", "data", "device", "time_step", "compiled", "memory"]
    assert "loss=" in done.stderr and "step/s" in done.stderr
    again = run("--arch=cnn", *SMALL, cwd=tmp_path)
    assert again.returncode == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "cnn-digits-depth20",
        "cnn-digits-depth20-2",
    }


def test_a_diverging_run_ends_in_one_line_of_advice(tmp_path):
    done = run(*SMALL, "--steps=500", "--time_step=0.5", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 1
    assert "lower the time_step" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def metrics(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    from dnntk.checkpoints import Checkpoints

    flags = (
        "--depth=60",
        "--steps=80",
        "--eval_every=8",
        "--checkpoint_every=4",
        "--batch_size=100",
    )
    assert run(*flags, "--workdir=whole", cwd=tmp_path).returncode == 0
    for wait in (3, 7):
        victim = subprocess.Popen(
            command(*flags, "--workdir=cut") if not (tmp_path / "cut").exists()
            else command("--resume", "--workdir=cut"),
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.time() + 120
        while (
            len(list((tmp_path / "cut" / "checkpoints").glob("[0-9]*"))) < 1
            and time.time() < deadline
        ):
            time.sleep(0.05)
        time.sleep(0.1 * wait)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    done = run("--resume", "--workdir=cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    states = []
    for name in ("whole", "cut"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(checkpoints._manager.restore(80))
    whole, cut = states
    np.testing.assert_equal(cut, whole)
