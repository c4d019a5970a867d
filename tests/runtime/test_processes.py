"""Several real processes on the loopback interface, as one job."""

import json
import re
import signal

import numpy as np
import processes
import pytest

from dnntk.errors import InputError
from dnntk.runtime.processes import join

FLAGS = ("--depth=14", "--scale=20", "--batch_size=100", "--eval_every=2", "--checkpoint_every=4")


def ended(running):
    """Their last words, by process."""
    return [one.wait().strip().splitlines() for one in running]


def curve(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[key] for key in ("step", "train_loss", "test_loss")] for line in lines])


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def test_processes_together_train_as_one_alone(tmp_path):
    alone = processes.outcome("train.py", *FLAGS, "--steps=12", "--workdir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    workdir = tmp_path / "together"
    flags = (*FLAGS, "--mesh=data:2,depth:2", "--steps=12", f"--workdir={workdir}")
    with processes.joined(2, *flags, cwd=tmp_path) as running:
        words = ended(running)
        assert [one.returncode for one in running] == [0, 0], words
    np.testing.assert_allclose(curve(workdir), curve(tmp_path / "alone"), rtol=2e-5, atol=1e-7)
    assert json.loads((workdir / "summary.json").read_text())["device"] == "4 x cpu"


def test_a_process_that_dies_ends_the_job_with_one_line(tmp_path):
    workdir = tmp_path / "w"
    flags = (*FLAGS, "--mesh=data:1,depth:2", "--steps=1000000", f"--workdir={workdir}")
    with processes.joined(2, *flags, cwd=tmp_path) as running:
        running[1].until(lambda: len(checkpoints(workdir)) >= 2)
        running[1].kill()
        words = ended(running)
        assert all(one.returncode for one in running)
    assert "another process of the job is gone; go on with --resume" in words[0][-1]
    # What several wrote, one goes on with.
    last = checkpoints(workdir)[-1] + 2
    again = processes.outcome(
        "train.py", "--resume", "--mesh=", f"--steps={last}", f"--workdir={workdir}", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert curve(workdir)[-1, 0] == last


def test_sigterm_to_one_stops_all_with_a_checkpoint(tmp_path):
    workdir = tmp_path / "w"
    flags = (*FLAGS, "--steps=1000000", f"--workdir={workdir}")
    with processes.joined(2, *flags, cwd=tmp_path) as running:
        running[1].until(lambda: checkpoints(workdir))
        running[1].send_signal(signal.SIGTERM)
        words = ended(running)  # a million steps would take longer
        assert [one.returncode for one in running] == [143, 143], words
    stopped = re.search(r"stopped after step (\d+)", words[0][-1])
    assert stopped and checkpoints(workdir)[-1] == int(stopped[1])


def test_processes_share_a_gram_matrix_and_predict_as_one(tmp_path):
    flags = ("--classes=all", "--train_examples=301", "--solver=krylov", "--block_size=64")
    alone = processes.outcome("predict.py", *flags, "--workdir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    three = (*flags, "--gram_dir=gram", "--workdir=three")
    with processes.joined(3, *three, cwd=tmp_path, script="predict.py") as running:
        words = ended(running)
        assert [one.returncode for one in running] == [0, 0, 0], words
    found, expected = (
        np.load(tmp_path / name / "predictions.npz")["test_outputs"] for name in ("three", "alone")
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)
    sizes = [f.stat().st_size for f in (tmp_path / "gram").glob("process-*/gram.npy")]
    assert len(sizes) == 3 and max(sizes) < 0.45 * sum(sizes)
    # The basis is split too: 301 rows of its first block.
    firsts = [np.load(f)["new"] for f in (tmp_path / "gram").glob("krylov-*/00000.npz")]
    assert sorted(len(first) for first in firsts) == [99, 101, 101]
    whole = np.concatenate(firsts)
    np.testing.assert_allclose(whole.T @ whole, np.eye(whole.shape[1]), atol=1e-12)


def test_a_number_that_is_none_of_them_is_refused():
    with pytest.raises(InputError, match="process: expected a number from 0 to 1, got 2"):
        join("127.0.0.1:1", 2, 2)
