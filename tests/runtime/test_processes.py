"""Several real processes on the loopback interface, as one job."""

import dataclasses
import json
import re
import signal

import numpy as np
import processes
import pytest

import dnntk
from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.runtime.processes import join

FLAGS = ("--depth=14", "--scale=20", "--batch_size=100", "--eval_every=2", "--checkpoint_every=12")
# A job that is soon at work.
SMALL = ("--depth=4", "--dataset=toy", "--time_step=0.1", "--checkpoint_every=4")


def ended(running):
    """Their last words, by process."""
    return [one.wait().strip().splitlines() for one in running]


def curve(history):
    return np.array(
        [[line[key] for key in ("step", "train_loss", "test_loss")] for line in history]
    )


def metrics(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def test_processes_train_as_one_alone_and_sigterm_to_one_stops_all_with_a_checkpoint(tmp_path):
    config = dnntk.TrainConfig(depth=14, scale=20, batch_size=100, eval_every=2, steps=12)
    alone = curve(dnntk.train(config, progress=False).history)
    workdir = tmp_path / "together"
    flags = (*FLAGS, "--mesh=data:2,depth:2", "--steps=1000000", f"--workdir={workdir}")
    with processes.joined(2, *flags, cwd=tmp_path) as running:
        running[1].until(lambda: checkpoints(workdir))
        running[1].send_signal(signal.SIGTERM)
        words = ended(running)  # a million steps would take longer
        assert [one.returncode for one in running] == [143, 143], words
    # A mesh of two times two is made of all devices: two of each process.
    np.testing.assert_allclose(curve(metrics(workdir))[: len(alone)], alone, rtol=2e-5, atol=1e-7)
    stopped = re.search(r"SIGTERM: stopped after step (\d+)", words[0][-1])
    assert stopped and checkpoints(workdir)[-1] == int(stopped[1])
    # What several wrote, one goes on with.
    last = int(stopped[1]) + 2
    longer = dnntk.TrainConfig.from_json(json.loads((workdir / "config.json").read_text()))
    longer = dataclasses.replace(longer, steps=last, mesh="")
    again = dnntk.train(longer, workdir, resume=True, progress=False)
    assert again.history[-1]["step"] == last


def test_a_process_that_dies_ends_the_job_with_one_line(tmp_path):
    workdir = tmp_path / "w"
    flags = (*SMALL, "--steps=1000000", f"--workdir={workdir}")
    with processes.joined(2, *flags, cwd=tmp_path) as running:
        running[1].until(lambda: len(checkpoints(workdir)) >= 2)
        running[1].kill()
        words = ended(running)
        assert all(one.returncode for one in running)
    assert "another process of the job is gone; go on with --resume" in words[0][-1]


def test_processes_share_a_gram_matrix_and_predict_as_one(tmp_path):
    flags = ("--classes=2,3,4", "--train_examples=301", "--solver=krylov", "--block_size=64")
    config = PredictConfig(classes=(2, 3, 4), train_examples=301, solver="krylov", block_size=64)
    predict(config, tmp_path / "alone", progress=False)
    joint = (*flags, "--gram_dir=gram", "--workdir=joint")
    with processes.joined(2, *joint, cwd=tmp_path, script="predict.py") as running:
        words = ended(running)
        assert [one.returncode for one in running] == [0, 0], words
    found, expected = (
        np.load(tmp_path / name / "predictions.npz")["test_outputs"] for name in ("joint", "alone")
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)
    sizes = [f.stat().st_size for f in (tmp_path / "gram").glob("process-*/gram.npy")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    # The basis is split too: 301 rows of its first block.
    firsts = [np.load(f)["new"] for f in (tmp_path / "gram").glob("krylov-*/00000.npz")]
    assert sorted(len(first) for first in firsts) == [150, 151]
    whole = np.concatenate(firsts)
    np.testing.assert_allclose(whole.T @ whole, np.eye(whole.shape[1]), atol=1e-12)


def test_a_number_that_is_none_of_them_is_refused():
    with pytest.raises(InputError, match="process: expected a number from 0 to 1, got 2"):
        join("127.0.0.1:1", 2, 2)
