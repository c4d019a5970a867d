"""Figure 4.2 and table 4.1, small: every run is there, in the same axes, and survives a kill."""

import dataclasses
import json

import numpy as np
import processes
import pytest

from dnntk.experiments import trainability as t
from dnntk.experiments.trainability_config import TrainabilityConfig, row_of

SMALL = TrainabilityConfig(
    dataset="digits",
    archs=("mlp",),
    inits=("deep_narrow", "he_uniform"),
    depth=12,
    steps=6,
    rates=(1e-3, 30.0),
    eval_examples=64,
)


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("figure") / "w"
    return workdir, t.trainability(SMALL, workdir, progress=False)


def test_every_initialization_runs_at_every_rate(figure):
    workdir, found = figure
    # deep_narrow by its kernel, and two initializations at two rates
    assert len({row["name"] for row in found.rows}) == 1 + 2 * 2
    summary = json.loads((workdir / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == [row["name"] for row in found.rows]
    assert {p.suffix for p in workdir.glob("figure_4_2.*")} == {".png", ".pdf"}


def test_the_narrow_networks_learn_and_a_huge_rate_diverges(figure):
    _, found = figure
    for row in found.rows:
        losses = [line["train_loss"] for line in row["history"]]
        assert np.isfinite(losses).all()
        if row["lr"] is None:
            assert losses[-1] < 0.95 * losses[0]
        if row["init"] == "deep_narrow" and row["lr"] == 30.0:
            assert row["ended"] == "diverged"


def test_finished_runs_are_kept(figure):
    workdir, found = figure
    file = workdir / t.ROWS_FILE
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + '\n{"name": "cut sho')
    again = t.trainability(SMALL, workdir, resume=True, progress=False)
    *kept, last = (row["seconds"] for row in found.rows)
    assert [row["seconds"] for row in again.rows][:-1] == kept
    assert again.summary["seconds"] >= sum(kept)  # of both sittings
    for row, other in zip(found.rows, again.rows, strict=True):
        assert row["history"][-1]["train_loss"] == other["history"][-1]["train_loss"]


def test_a_row_is_set_beside_the_thesis_and_the_limit(tmp_path):
    done = processes.outcome(
        "trainability.py",
        "--preset=cnn-20000-binary",
        *("--dataset=digits", "--depth=30", "--scale=1000", "--budget_minutes=0.02"),
        *("--limit_examples=60", "--workdir=w"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    thesis, own, limit = summary["rows"]
    assert summary["steps"] == own["steps"] < 1000
    assert thesis["train_mse"] == 0.031257 and limit["time"] == own["time"] > 0
    assert abs(own["train_mse"] - limit["train_mse"]) < 0.25 * limit["train_mse"]
    assert "of 1,000 steps" in done.stdout and summary["left_out"]
    assert (tmp_path / "w" / "row.pdf").exists()


def test_a_row_in_closed_form_ends_at_its_kernel_time_whatever_the_budget():
    config = TrainabilityConfig(
        preset="cnn-12000-binary", dataset="digits", depth=8, scale=1000.0, pool=2,
        limit_examples=0, budget_minutes=1e-3,
    )  # fmt: skip
    found = t.trainability(config, progress=False)
    (own,) = found.rows
    assert own["time"] == 864 and own["ended"] == "finished" and not found.summary["left_out"]
    assert own["steps"] < 50 and own["train_mse"] < 0.1 and own["test_accuracy"] > 0.9


def test_a_row_that_diverges_is_a_row_all_the_same(tmp_path):
    config = TrainabilityConfig(
        preset="cnn-20000-binary", dataset="digits", depth=20, epochs=40, scale=1e4,
        limit_examples=0, eval_examples=40, time_step=2.0,
    )  # fmt: skip
    found = t.trainability(config, tmp_path / "w", progress=False)
    _, own = found.rows
    assert own["ended"] == "diverged" and 0 < own["steps"] < 40
    assert own["train_mse"] > 0.25 and own["time"] > 0
    assert (tmp_path / "w" / "row.png").exists()
    kept = dataclasses.replace(config, time_step=0.1)
    assert row_of(kept).time_step == 0.1 and row_of(kept).epochs == 40
