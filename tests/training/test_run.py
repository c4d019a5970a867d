"""One run of `dnntk.train`: what it returns, what it leaves on disk, and how it goes on."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import dnntk
from dnntk import InputError, TrainConfig, train
from dnntk.runs.checkpoints import Checkpoints

SMALL = TrainConfig(depth=20, steps=12, eval_every=4, checkpoint_every=3)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """(workdir, result) of a run for several tests, which copy what they change."""
    workdir = tmp_path_factory.mktemp("small")
    with counted_calls() as traced:
        result = train(SMALL, workdir, progress=False)
    return workdir, result, len(traced)


@pytest.fixture
def copied_run(small_run, tmp_path):
    """The same, in a folder to be changed."""
    return shutil.copytree(small_run[0], tmp_path / "copy"), small_run[1]


@contextlib.contextmanager
def counted_calls():
    """A list with an entry for every call of the network: for each time that it is traced."""
    traced = []
    original = dnntk.DeepNarrowMLP.__call__

    def counting(self, x):
        traced.append(x.shape)
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dnntk.DeepNarrowMLP, "__call__", counting)
        yield traced


def numbers(history):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


def test_a_notebook_trains_in_five_lines_and_nothing_global_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_enable_x64, jax.config.jax_numpy_rank_promotion
    config = TrainConfig(depth=30, steps=60, dtype="float64")
    result = train(config, progress=False)
    with jax.enable_x64(True):
        outputs = result.model.apply(result.variables, result.dataset.x_test)
    assert outputs.shape == (120, 1)
    assert result.history[0]["train_loss"] > 10 * result.history[-1]["train_loss"]
    assert result.summary["test_accuracy"] >= 0.95
    assert {v.dtype for v in jax.tree.leaves(result.variables)} == {np.dtype("float64")}
    assert (jax.config.jax_enable_x64, jax.config.jax_numpy_rank_promotion) == before
    assert list(tmp_path.iterdir()) == []


def test_the_first_line_is_the_loss_of_a_zero_output(small_run):
    result = small_run[1]
    zero_loss = 0.5 * np.mean(np.sum(result.dataset.y_train**2, 1))
    assert result.history[0]["train_loss"] == pytest.approx(zero_loss, rel=1e-6)
    assert [line["step"] for line in result.history] == [0, 1, 2, 4, 8, 12]
    assert result.history[-1]["time"] == pytest.approx(12 * result.summary["time_step"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": "all", "batch_size": 64, "momentum": 0.9, "shift": 2},
        # No middle layers.
        {"arch": "cnn", "depth": 2, "optimizer": "adamw", "lr": 0.01, "sam_radius": 0.1},
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, changes, copied_run):
    config, (workdir, whole) = dataclasses.replace(SMALL, **changes), copied_run
    if changes:
        workdir = tmp_path / "other"
        whole = train(config, workdir, progress=False)
    if config.classes == "all":
        assert (
            whole.dataset.y_train.shape[1] == 10 and whole.summary["test_accuracy"] > 0.15
        )  # of 10 classes
    # As if killed before the last checkpoint: it and the summary never came to be.
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints._manager.delete(12)
    (workdir / "summary.json").unlink()
    resumed = train(config, workdir, resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
    assert numbers(resumed.history) == numbers(whole.history)
    lines = [json.loads(t) for t in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert numbers(lines) == numbers(whole.history)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied_run):
    workdir, whole = copied_run
    for file in (workdir / "checkpoints" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    resumed = train(SMALL, workdir, resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)


def test_a_workdir_holds_what_the_readme_says(small_run):
    workdir, result, _ = small_run
    names = {p.name for p in workdir.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "summary.json", "checkpoints"),
        *("loss.png", "loss.pdf", "confusion.png", "confusion.pdf"),
    }
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary == result.summary
    promised = """train_loss train_accuracy test_accuracy steps time seconds steps_per_second
    sitting_seconds compile_seconds peak_memory_bytes parameters versions""".split()
    assert set(promised) <= set(summary)
    assert summary["parameters"] == 64 * 66 + 66 + 18 * (66 * 66 + 66) + 66 + 1
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["experiment"] == "train"
    assert TrainConfig.from_json(saved) == SMALL


def test_the_toy_task_is_learnt_without_accuracies(tmp_path):
    result = train(TrainConfig(dataset="toy", depth=200, steps=300), tmp_path, progress=False)
    assert result.summary["test_accuracy"] is None
    assert result.summary["train_loss"] < 1e-3
    assert (tmp_path / "fit.pdf").exists() and not (tmp_path / "confusion.png").exists()


def test_resuming_needs_the_same_run(copied_run, tmp_path):
    workdir, _ = copied_run
    with pytest.raises(InputError, match="depth=20, got 21"):
        train(dataclasses.replace(SMALL, depth=21), workdir, resume=True)
    with pytest.raises(InputError, match="holds one"):
        train(SMALL, workdir)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="found no config.json"):
        train(SMALL, tmp_path, resume=True)
    longer = train(dataclasses.replace(SMALL, steps=15), workdir, resume=True, progress=False)
    assert longer.history[-1]["step"] == 15


def test_the_step_is_traced_once(small_run):
    with counted_calls() as traced:
        train(dataclasses.replace(SMALL, steps=40), progress=False)
    assert 0 < len(traced) == small_run[2]


def test_examples_of_ones_own_are_trained_on():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.1, 1, (50, 3)).astype("float32"), np.zeros((50, 2), "float32") + 0.5
    data = dnntk.Dataset("mine", "mine: 40 and 10 points", x[:40], y[:40], x[40:], y[40:])
    result = train(TrainConfig(depth=50, steps=30), dataset=data, progress=False)
    assert result.summary["test_accuracy"] is None
    assert result.history[-1]["test_loss"] < 0.01 * result.history[0]["test_loss"]


def test_without_compilation_a_run_is_refused_at_once():
    with jax.disable_jit(), pytest.raises(InputError, match="^JAX_DISABLE_JIT: ") as caught:
        train(TrainConfig(depth=10**6), progress=False)
    assert "\n" not in str(caught.value)


def test_arguments_without_effect_are_refused():
    with pytest.raises(InputError, match=r"^resume: .*workdir"):
        train(SMALL, resume=True, progress=False)
    with pytest.raises(InputError, match=r"^config: "):
        train({"depth": 5}, progress=False)
