"""scripts/benchmark.py through its real command line, at the smallest sizes. No speed is judged."""

import json

import numpy as np
import processes
import pytest

NAMES = ("ntk", "ntk_memory", "limit_cnn", "limit_mlp")
SMALL = (
    "--repeats=2",
    "--compiles=1",
    "--depths=5,3",
    "--peer_depth=3",
    "--points=6",
    "--memory_depth=2",
    "--memory_images=3",
    "--cnn_images=5",
    "--mlp_images=6",
)
BAD_FLAGS = {
    "unknown benchmark": (["--benchmarks=ntk,speed"], "speed"),
    "depths not numbers": (["--depths=ten"], "depths"),
    "depth too small": (["--depths=1,100"], "depths"),
    "no repeats": (["--repeats=0"], "repeats"),
    "no time for the peer": (["--peer_seconds=0"], "peer_seconds"),
    "workdir is a file": (["--workdir=afile"], "workdir"),
}


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory):
    """(folder, outcome) of one run of everything."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        # No speed is judged here, and most of a small run's time is XLA's.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        outcome = processes.run("benchmark.py", *SMALL, "--workdir=out", cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    return folder / "out", outcome


@pytest.fixture(scope="module")
def later(benchmarked):
    """(files before, outcomes) of a second run in the same folder and of the bad flags."""
    folder, _ = benchmarked
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    (folder.parent / "afile").write_text("")
    cases = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    cases["again"] = ["--repeats=3", f"--workdir={folder}"]
    return before, processes.outcomes("benchmark.py", cases, folder.parent)


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def check_spread(spread):
    low, high = spread["quartiles"]
    assert 0 < low <= spread["median"] <= high
    np.testing.assert_allclose(np.median(spread["samples"]), spread["median"])


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_whole(name, benchmarked):
    folder, _ = benchmarked
    kept = result(folder, name)
    assert kept["settings"]["points"] == 6
    assert kept["versions"]["jax"] and kept["machine"]["cores"] and kept["rows"]
    for row in kept["rows"]:
        check_spread(row)
        if "peer" in row:
            check_spread(row["peer"])
            check_spread(row["ratio"])
        assert (row["promise"] is None) == (row["met"] is None)
    assert any(row["promise"] and isinstance(row["met"], bool) for row in kept["rows"])
    assert any("peer" in row for row in kept["rows"])


def test_the_peer_of_the_empirical_kernel_stops_at_its_largest_depth(benchmarked):
    folder, _ = benchmarked
    rows = result(folder, "ntk")["rows"]
    assert [row["depth"] for row in rows] == [3, 3, 3, 3, 5, 5]
    assert all(("peer" in row) == (row["depth"] == 3) for row in rows)


def test_work_and_peer_give_the_same_numbers(benchmarked):
    folder, _ = benchmarked
    for name, tolerance in (("ntk", 1e-9), ("limit_cnn", 1e-5)):
        differences = [row["difference"] for row in result(folder, name)["rows"] if "peer" in row]
        assert differences and max(differences) <= tolerance


def test_the_pictures_are_there(benchmarked):
    folder, _ = benchmarked
    assert (folder / "ntk.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "ntk.pdf").read_bytes().startswith(b"%PDF")


def test_the_table_shows_every_row(benchmarked):
    folder, outcome = benchmarked
    lines = outcome.stdout.splitlines()
    for name in NAMES:
        shown = [line for line in lines if line.startswith(f"{name} ")]
        assert len(shown) == len(result(folder, name)["rows"])


def test_a_finished_benchmark_is_not_run_again(later):
    before, outcomes = later
    again = outcomes["again"]
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("kept from") == len(NAMES) == len(before)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, later):
    outcome = later[1][name]
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1 and BAD_FLAGS[name][1] in outcome.stderr
