"""scripts/benchmark.py through its real command line, at the smallest sizes. No speed is judged."""

import dataclasses
import importlib.util
import json
import sys

import command_lines
import numpy as np
import processes
import pytest
from absl import flags

from dnntk import InputError
from dnntk.data.datasets import load_dataset

sys.path.insert(0, str(processes.SCRIPTS))
from benchmarking import comparison, training, worker  # noqa: E402

TORCH = importlib.util.find_spec("torch") is not None
NAMES = ("ntk", "ntk_memory", "limit_cnn", "limit_mlp")
TRAINING = ("train_toy", "cost_cnn")
SMALL = (
    f"--benchmarks={','.join(TRAINING + NAMES)}",
    "--repeats=2",
    "--compiles=1",
    "--depths=5,3",
    "--peer_depth=3",
    "--points=6",
    "--memory_depth=2",
    "--memory_images=3",
    "--cnn_images=5",
    "--mlp_images=6",
    "--turn_seconds=0",
    "--depth_seconds=0",
    "--checked_steps=2",
    "--batch=4",
    "--arc=8",
    "--toy_depth=5",
    "--trials=2",
    "--cnn_depths=4",
)
BAD_FLAGS = {
    "unknown benchmark": (["--benchmarks=ntk,speed"], "speed"),
    "depths not numbers": (["--depths=ten"], "depths"),
    "depth too small": (["--depths=1,100"], "depths"),
    "cost depths not numbers": (["--mlp_depths=10,many"], "mlp_depths"),
    "cost depth too small": (["--cnn_depths=2"], "cnn_depths"),
    "no check": (["--checked_steps=0"], "checked_steps"),
    "no repeats": (["--repeats=0"], "repeats"),
    "no time for the peer": (["--peer_seconds=0"], "peer_seconds"),
    "workdir is a file": (["--workdir=afile"], "workdir"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, outcomes) of one run of everything, a second in its folder, and the bad flags."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "afile").write_text("")
    first = processes.outcome("benchmark.py", *SMALL, "--workdir=out", cwd=folder)
    assert first.returncode == 0, first.stderr
    cases = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    cases["again"] = [SMALL[0], "--repeats=3", "--workdir=out"]
    found = command_lines.outcomes("benchmark.py", cases, folder)
    return folder / "out", found | {"first": first}


@pytest.fixture(scope="module")
def benchmarked(runs):
    """(folder, outcome) of the run of everything."""
    folder, found = runs
    return folder, found["first"]


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


def test_the_baseline_of_the_empirical_kernel_stops_at_its_largest_depth(benchmarked):
    folder, _ = benchmarked
    rows = result(folder, "ntk")["rows"]
    assert [row["depth"] for row in rows] == [3, 3, 3, 3, 5, 5]
    assert all(("peer" in row) == (row["depth"] == 3) for row in rows)


def test_work_and_baseline_give_the_same_numbers(benchmarked):
    folder, _ = benchmarked
    for name, tolerance in (("ntk", 1e-9), ("limit_cnn", 1e-5)):
        differences = [row["difference"] for row in result(folder, name)["rows"] if "peer" in row]
        assert differences and max(differences) <= tolerance


def test_the_pictures_are_there(benchmarked):
    folder, _ = benchmarked
    for name in ("ntk", "cost_cnn"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_table_shows_every_row(benchmarked):
    folder, outcome = benchmarked
    lines = outcome.stdout.splitlines()
    for name in NAMES + TRAINING:
        shown = [line for line in lines if line.startswith(f"{name} ")]
        assert len(shown) == len(result(folder, name)["rows"])


def test_a_finished_benchmark_is_not_run_again(runs):
    folder, found = runs
    again, written = found["again"], list(folder.glob("*.json"))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("kept from") == len(written) == len(NAMES + TRAINING)
    # The second asked for another number of repeats, and came to an end after the first.
    assert all(json.loads(path.read_text())["settings"]["repeats"] == 2 for path in written)


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, runs):
    processes.check_refusal(runs[1][name], "benchmark.py", BAD_FLAGS[name][1])


# ---- training


def test_a_step_has_its_baseline_or_says_why_not(benchmarked):
    folder, _ = benchmarked
    rows = result(folder, "train_toy")["rows"]
    assert len(rows) == 2
    for row in rows:
        check_spread(row)
        assert ("peer" in row) == ("ratio" in row) == TORCH
        assert TORCH or "not installed" in row["peer_missing"]
        assert (row["promise"] is None) == (row["met"] is None)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_networks_side_by_side_are_set_against_as_many_loops(benchmarked):
    one, together = result(benchmarked[0], "train_toy")["rows"]
    assert "2 trials" in together["what"]
    losses = [row["records"][0]["losses"] for row in (one, together)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    if TORCH:
        samples = [row["peer"]["samples"] for row in (one, together)]
        np.testing.assert_allclose(samples[1], 2 * np.array(samples[0]))


def test_baselines_begin_as_the_same_network_and_train_as_it_does(benchmarked):
    step = result(benchmarked[0], "cost_cnn")["rows"][0]
    own, *baselines = step["records"]
    expected = [name for name in comparison.SCRIPT if name in ("lax.scan", "unrolled")]
    expected = (["PyTorch loop"] if TORCH else []) + expected
    assert [baseline["name"] for baseline in baselines] == expected
    for baseline in baselines:
        assert len(baseline["losses"]) == 2 and baseline["losses"][1] < baseline["losses"][0]
        np.testing.assert_allclose(baseline["losses"], own["losses"], rtol=1e-4)


TASK = comparison.Task("mlp", 100, 1, (2,), 8, 2.0)


def record(name, losses=(), **others):
    return comparison.Record(name, losses=list(losses), **others)


def test_time_and_memory_are_judged_by_the_plain_loop_alone(monkeypatch):
    records = {
        "network": record("network", seconds=[0.1, 0.3, 0.2], peak_bytes=100),
        "PyTorch loop": record("PyTorch loop", seconds=[0.7, 0.8, 0.7], peak_bytes=400),
        "other": record("other", seconds=[0.1, 0.1, 0.1], peak_bytes=50),
        "slow": record("slow", missing="slow: not done in 1 s"),
    }
    monkeypatch.setattr(training, "compare", lambda *_: records)
    monkeypatch.setattr(training, "_schedule", lambda: None)
    beside = training._beside_loop
    rows = beside(TASK, 3, 4, None, memory=5, others=["other", "slow"])
    assert [row["peer"]["name"] for row in rows] == ["PyTorch loop", "other", "PyTorch loop"]
    np.testing.assert_allclose([row["ratio"]["median"] for row in rows], [2 / 7, 2, 1 / 4])
    assert [row["met"] for row in rows] == [True, None, False]
    assert "(aim: 4)" in rows[0]["promise"] and "1/5" in rows[2]["promise"]
    records["PyTorch loop"].missing = "PyTorch loop: PyTorch is not installed"
    for row in beside(TASK, 3, 4, None, memory=5):
        assert row["peer_missing"] and "peer" not in row and row["promise"] is None


def test_the_share_of_zeros_is_that_of_the_pixels():
    task = dataclasses.replace(TASK, shape=(784,), d_out=10, zeros=0.8)
    x, _ = comparison._data(task)
    assert abs((x == 0).mean() - 0.8) < 0.02
    assert (comparison._data(dataclasses.replace(task, zeros=0.0))[0] > 0).all()
    assert training._words(task).endswith("8 inputs, C = 2, 80% of the pixels 0")


def test_images_of_a_data_set_are_its_first_ones():
    digits = load_dataset("digits", classes="all")
    task = dataclasses.replace(TASK, shape=(64,), d_out=10, examples=20, dataset="digits")
    x, y = comparison._data(task)
    np.testing.assert_array_equal(x, digits.x_train[:20].reshape(20, 64))
    np.testing.assert_array_equal(y, digits.y_train[:20])
    assert training._words(task).endswith("20 inputs, C = 2, digits")
    with pytest.raises(InputError, match="--batch=2000: expected at most 1198"):
        comparison._data(dataclasses.replace(task, examples=2000))


def test_losses_that_differ_or_do_not_fall_stop_a_comparison():
    own, allowed = record("network", [1.0, 0.5]), comparison.tolerance(TASK)
    comparison._check(TASK, [own, record("unrolled", [1.0, 0.5 + allowed / 2])])
    for loss in (0.5 + 2 * allowed, float("nan")):
        with pytest.raises(RuntimeError, match="unrolled differ"):
            comparison._check(TASK, [own, record("unrolled", [1.0, loss])])
    with pytest.raises(RuntimeError, match="did not fall"):
        comparison._check(TASK, [record("network", [1.0, 1.0])])


@pytest.mark.parametrize("seconds, reason", [(0.05, "not done in 0.05 s"), (60, "status 3")])
def test_a_worker_that_hangs_or_ends_is_an_error(seconds, reason, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(60)" if seconds < 1 else "raise SystemExit(3)")
    with pytest.raises(worker.WorkerExited, match=reason):
        worker.Worker(str(script), {}, seconds)


STUB = """
from benchmarking import worker

class Steps:
    facts = {"gradient_bytes": 0}

    def __init__(self, job):
        self.loss = job["depth"]

    def take(self, steps):
        self.loss /= 2
        return self.loss

worker.serve(Steps)
"""


def test_depths_take_turns_in_workers_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setitem(comparison.SCRIPT, "network", str(tmp_path / "stub.py"))
    tasks = [dataclasses.replace(TASK, depth=depth) for depth in (4, 8)]
    schedule = comparison.Schedule(3, 0.0, 2, 1.0)
    records = comparison.compare_over_depth(tasks, schedule, tmp_path)
    assert [record.losses for record in records] == [[2, 1], [4, 2]]
    assert all(len(r.seconds) == 3 and r.peak_bytes >= r.step_bytes > 0 for r in records)
    assert [path.name for path in tmp_path.iterdir()] == ["stub.py"]


def test_a_baseline_whose_worker_exits_is_left_out_and_own_work_stops():
    baseline = record("lax.scan")
    records = {"lax.scan": baseline, "network": record("network")}
    with comparison._tolerated("lax.scan", records):
        raise worker.WorkerExited("not done in 1 s")
    assert baseline.missing == "lax.scan: not done in 1 s"
    with pytest.raises(RuntimeError, match="not done"), comparison._tolerated("network", records):
        raise worker.WorkerExited("not done in 1 s")


def test_a_baseline_is_left_out_where_it_would_take_too_long_or_too_much():
    flags.FLAGS.mark_as_parsed()
    seen = record("unrolled", seconds=[0.1], facts={"start_bytes": 10**8}, step_bytes=2 * 10**8)
    for depth, name, before, reason in (
        (100, "lax.scan", None, None),
        (1000, "lax.scan", (100, seen), None),
        (10**6, "lax.scan", None, "float32"),
        (101, "unrolled", None, "only up to depth 100"),
        (10**5, "lax.scan", (10, seen), "1000 s"),
        (10**5, "lax.scan", (1000, seen), "10 GB"),
        (1000, "lax.scan", (100, record("lax.scan", missing="ended")), "ended"),
    ):
        task = dataclasses.replace(TASK, depth=depth)
        found = training._left_out(name, task, before)
        assert (found is None) if reason is None else (reason in found)


def test_growth_is_that_of_depths_in_turns():
    def at(depth, seconds, beyond, compilation):
        facts = {"ready_bytes": 0, "gradient_bytes": 0, "compile_seconds": compilation}
        return record("network", seconds=[seconds * depth], facts=facts, step_bytes=beyond)

    beside = [at(100, 1.0, 10**7, 2.0), at(10_000, 9.0, 3 * 10**8, 1.0)]
    in_turns = [at(100, 1.0, 10**7, 1.0), at(10_000, 1.1, 10**8, 3.0)]
    rows = training._growth([100, 10_000], beside, in_turns)
    np.testing.assert_allclose([row["median"] for row in rows], [1.1, 3.0, 1.0])
    np.testing.assert_allclose(rows[0]["seconds a layer"], [1.0, 1.1])
    assert [row["met"] for row in rows] == [True, False, True]
