"""The printed theorems lie outside the error bars of real networks, the corrected ones inside."""

import json

import processes
import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errata")
    done = processes.run("errata.py", "--depth=60", "--networks=6", "--workdir=w", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {p.suffix for p in (folder / "w").glob("errata.*")} == {".png", ".pdf"}
    return json.loads((folder / "w" / "summary.json").read_text())["rows"]


def test_networks_have_the_corrected_kernel_and_not_the_printed_one(rows):
    assert len(rows) == 3
    for row in rows:
        # The mean over initializations is off by O(1 / depth) besides.
        allowed = 4 * row["standard_error"] + 4 * row["corrected"] / row["depth"]
        assert abs(row["measured"] - row["corrected"]) < allowed
        assert abs(row["measured"] - row["printed"]) > 2 * allowed


def test_bad_settings_are_one_line(tmp_path):
    bad = {name: [name] for name in ("--depth=2", "--networks=1", "--networks=few", "--seed=-1")}
    for flag, outcome in processes.outcomes("errata.py", bad, tmp_path).items():
        assert outcome.returncode == 2 and len(outcome.stderr.splitlines()) == 1
        assert flag[2:].split("=")[0] in outcome.stderr
