"""Depth against width, small, end to end: rows, sentences, pictures, resuming, the script."""

import dataclasses
import json

import numpy as np
import processes
import pytest

from dnntk import InputError, figures
from dnntk.experiments.depth_or_width import experiment as depth_or_width
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig
from dnntk.experiments.depth_or_width.experiment import compare

SMALL = DepthOrWidthConfig(
    train_examples=30,
    test_examples=20,
    probe_examples=8,
    depths=(4,),
    trials=1,
    times=(0.5, 1.0),
    regime_depth=4,
    regime_time=1.0,
    regime_scales=0,
    dtype="float64",
)
FLAGS = (
    "--train_examples=30",
    "--test_examples=20",
    "--probe_examples=8",
    "--depths=4",
    "--trials=1",
    "--times=0.5,1",
    "--regime_depth=4",
    "--regime_time=1",
    "--regime_scales=0",
    "--dtype=float64",
)
BAD_FLAGS = {
    "depths not numbers": (["--depths=ten"], "depths"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--trials=3", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("script")
    return folder, *processes.good_and_bad("depth_or_width.py", FLAGS, BAD_FLAGS, folder)


def test_the_script_leaves_rows_sentences_and_pictures(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    assert (out / "depth-or-width.png").stat().st_size > 10_000
    assert (out / "depth-or-width.pdf").read_bytes().startswith(b"%PDF")
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [setting.name for setting in SMALL.network_settings()]
    theorem, small, wide = rows
    assert abs(wide["parameters"] / theorem["parameters"] - 1) < 0.01
    assert [(r["clock"], r["time"]) for r in wide["records"]] == [
        *(("equal", 0.5), ("equal", 1.0), ("matched", 0.5), ("matched", 1.0))
    ]
    for row in rows:
        bound = 2 / row["lambda_max"]
        assert 0 < row["time_step"] <= SMALL.fraction * bound * (1 + 1e-9)
        losses = [r["train_loss"] for r in row["records"]]
        assert 0.5 > losses[0] > losses[-1] > 0
    moved = [row["records"][-1]["movement"] for row in rows]
    assert 0 < 3 * moved[0] < moved[1]  # C = 4^2.2 and 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["statements"] and all(line in outcome.stdout for line in summary["statements"])
    assert summary["rows"] == rows


def test_networks_that_are_done_are_kept_and_the_others_made(scripted, tmp_path, monkeypatch):
    source = scripted[0] / "out"
    lines = (source / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])  # cut off
    calls, real = [], depth_or_width.run

    def counted(setting, *args):
        calls.append(setting.name)
        return real(setting, *args)

    limits = json.loads((source / "summary.json").read_text())["limits"]
    monkeypatch.setattr(depth_or_width, "run", counted)
    monkeypatch.setattr(depth_or_width, "_limits", lambda *_: limits["digits"])
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    found = compare(SMALL, tmp_path, resume=True, progress=False)
    assert calls == [SMALL.network_settings()[-1].name]
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    whole = json.loads(lines[-1])
    assert len(again) == 3 and again[0] == json.loads(lines[0])
    losses = [[r["test_loss"] for r in row["records"]] for row in (again[-1], whole)]
    np.testing.assert_allclose(*losses, rtol=1e-9)
    assert found.limits == limits
    limits = limits["digits"]
    diagonals = [limits[side]["mean_diagonal"] for side in ("deep", "wide")]
    assert limits["ratio"] == pytest.approx(diagonals[0] / diagonals[1])
    # Some 250 units: 10% of the kernel, and the steps.
    wide = [r["train_loss"] for r in limits["wide"]["records"]]
    np.testing.assert_allclose([r["train_loss"] for r in whole["records"]], wide, rtol=0.3)
    with pytest.raises(InputError, match="resume"):
        compare(dataclasses.replace(SMALL, seed=1), tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "depth_or_width.py", BAD_FLAGS[name][1])
