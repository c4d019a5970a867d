"""The soak, small: a run is killed, taken up again and compared, and the soak itself goes on."""

import json

import processes

SMALL = ("--meshes=data:1", "--depth=6", "--steps=10", "--workdir=w")


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    done = processes.outcome("soak.py", "--kills=1", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert summary["wrong"] == 0 and summary["kills"] >= 1
    assert summary["of_these_exact"] == summary["on_one_mesh"] == summary["runs"]
    assert {p.suffix for p in (tmp_path / "w").glob("soak.*")} == {".png", ".pdf"}


def test_a_mesh_that_is_none_is_one_line(tmp_path):
    bad = ("--meshes=rows:3", "--meshes=", "--meshes=3", "--kills=0")
    cases = {flag: (flag, "--workdir=v") for flag in bad}
    for done in processes.outcomes("soak.py", cases, tmp_path).values():
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
