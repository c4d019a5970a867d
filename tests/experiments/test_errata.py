"""The printed theorems lie outside the error bars of real networks, the corrected ones inside."""

import json

import processes
import pytest

BAD = ("--depth=2", "--networks=1", "--networks=few", "--seed=-1")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(rows, outcomes of the bad flags) of the script."""
    folder = tmp_path_factory.mktemp("errata")
    cases = {"good": ["--depth=60", "--networks=6", "--workdir=w"]} | {flag: [flag] for flag in BAD}
    found = processes.outcomes("errata.py", cases, folder, first="good")
    done = found.pop("good")
    assert done.returncode == 0, done.stderr
    assert {p.suffix for p in (folder / "w").glob("errata.*")} == {".png", ".pdf"}
    return json.loads((folder / "w" / "summary.json").read_text())["rows"], found


def test_networks_have_the_corrected_kernel_and_not_the_printed_one(scripted):
    rows, _ = scripted
    assert len(rows) == 3
    for row in rows:
        # The mean over initializations is off by O(1 / depth) besides.
        allowed = 4 * row["standard_error"] + 4 * row["corrected"] / row["depth"]
        assert abs(row["measured"] - row["corrected"]) < allowed
        assert abs(row["measured"] - row["printed"]) > 2 * allowed


def test_bad_settings_are_one_line(scripted):
    for flag, outcome in scripted[1].items():
        processes.check_refusal(outcome, "errata.py", flag[2:].split("=")[0])
