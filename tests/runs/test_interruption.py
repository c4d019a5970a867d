"""SIGTERM and Ctrl-C: the run stops with a checkpoint, and goes on as if it never had."""

import json
import os
import signal
import sys
import threading
import time
import weakref

import jax
import numpy as np
import processes
import pytest

from dnntk import train
from dnntk.errors import Stopped
from dnntk.runs.interruption import raise_on_sigterm, termination_flag
from dnntk.training.trainer import Run

ORDERS = (signal.SIGINT, signal.SIGTERM)


def test_ctrl_c_writes_a_checkpoint_and_ends_the_run(tmp_path):
    """Of SIGTERM see test_processes.py."""
    flags = ("--depth=400", "--steps=100000", "--checkpoint_every=100000")
    running = processes.Running("train.py", "--workdir", "w", *flags, cwd=tmp_path)
    metrics = tmp_path / "w/metrics.jsonl"  # its first line comes before the first step
    running.until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 1)
    running.send_signal(signal.SIGINT)
    errors = running.wait()  # all steps would take longer
    assert running.returncode == 128 + signal.SIGINT
    last = errors.splitlines()[-1]
    # All flags are named: before the first write, and for predictions, the folder has none.
    again = " ".join(("--resume", "--workdir=w", *flags))
    assert "interrupted after step" in last and last.endswith(f"go on with {again}")
    assert "Traceback" not in errors
    step = int(last.partition("step ")[2].partition(";")[0])
    assert [p.name for p in (tmp_path / "w/checkpoints").iterdir()] == [str(step)]


def test_a_run_stopped_twice_and_resumed_is_the_uninterrupted_one(
    small, run, tmp_path, monkeypatch
):
    workdir, whole = tmp_path / "w", run[1]
    check, before = Run._check, [signal.getsignal(number) for number in ORDERS]
    for order, kind in zip(ORDERS, (KeyboardInterrupt, Stopped), strict=True):
        taken = []

        def counted(self, loss, step, taken=taken, order=order):
            taken.append(step)
            if len(taken) == 4:
                os.kill(os.getpid(), order)
            return check(self, loss, step)

        with monkeypatch.context() as patch, pytest.raises(kind) as caught:
            patch.setattr(Run, "_check", counted)
            train(small, workdir, resume=order == signal.SIGTERM, progress=False)
        assert f"go on with resume=True, workdir={str(workdir)!r}" in caught.value.message
        assert [signal.getsignal(number) for number in ORDERS] == before
    resumed = train(small, workdir, resume=True, progress=False)
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


@pytest.mark.parametrize("order", ORDERS)
def test_a_signal_within_a_callback_stops_all_the_same(order, monkeypatch, capsys):
    """Python reports what a weak reference's callback raises, and ignores it."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGALRM)}
    raise_on_sigterm(lambda: "stopped")
    try:
        with pytest.raises((Stopped, KeyboardInterrupt)):
            held = threading.Event()
            reference = weakref.ref(held, lambda _: os.kill(os.getpid(), order))
            del held
            time.sleep(20)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert reference() is None and capsys.readouterr().err == ""
