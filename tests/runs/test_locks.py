"""One run at a time in a folder."""

import contextlib
import subprocess
import sys

import pytest

from dnntk import train
from dnntk.errors import InputError
from dnntk.runs.locks import LOCK, FolderLock


@contextlib.contextmanager
def killed(process):
    try:
        yield
    finally:
        process.kill()


def test_a_folder_is_one_process_s(small, tmp_path):
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
            train(small, tmp_path, progress=False)
    lock = FolderLock(tmp_path)
    again = FolderLock(tmp_path)  # a notebook's next run, while a traceback holds the last
    lock.release()
    assert (tmp_path / LOCK).exists()
    again.release()
    assert not (tmp_path / LOCK).exists()


def test_a_finished_run_leaves_its_folder_free(run):
    assert not (run[0] / LOCK).exists()
