"""Figure 5.1 small, end to end: the curves, linear theory, the shares, resuming, the script."""

import json

import jax
import numpy as np
import processes
import pytest

from dnntk import InputError, figures
from dnntk.experiments.accumulation import AccumulationConfig, accumulate
from dnntk.training import trainer as training_run

# At C = infinity linear theory is all there is.
SMALL = AccumulationConfig(
    dataset="digits",
    classes=(3, 5, 8),
    output=1,
    depth=12,
    scale=np.inf,
    train_examples=9,
    steps=40,
    points=2,
    draws=3000,
)
FLAGS = (
    "--dataset=digits",
    "--classes=3,5,8",
    "--output=1",
    "--depth=12",
    "--scale=inf",
    "--train_examples=9",
    "--steps=40",
    "--points=2",
    "--draws=3000",
)
BAD_FLAGS = {
    "depth": (["--depth=1"], "depth"),
    "no images": (["--arch=cnn"], "dataset"),
    "too many points": (["--points=1000", "--workdir=new"], "points"),
    "output": (["--output=1", "--workdir=newer"], "output"),
    "time_step": (["--time_step=nan"], "time_step"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--steps=5", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, result) of one run."""
    folder = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script's test looks at pictures
        return folder, accumulate(SMALL, folder, progress=False)


def test_at_infinite_scale_theory_is_exact(small):
    _, found = small
    assert found.summary["difference_from_theory"] < 1e-11
    assert 1e-3 < found.summary["difference_from_line"]
    assert not jax.config.jax_enable_x64


def test_shares_are_distributed_around_the_limits_prediction(small):
    _, found = small
    error = found.drawn.std(0) / np.sqrt(len(found.drawn))
    assert (np.abs(found.drawn.mean(0) - found.limit) < 4 * error).all()
    for drawn in found.drawn.T:
        values, counts = np.unique(drawn.round(9), return_counts=True)
        # The atom: the unit is off in half of the draws, 4 standard errors allowed.
        assert abs(counts.max() / len(drawn) - 0.5) < 2 / np.sqrt(len(drawn)), values
    np.testing.assert_allclose(found.line[-1], found.limit)
    np.testing.assert_allclose(found.shares.mean(0), found.trained[-1] * 12 / 11, rtol=1e-9)


def test_resuming_does_not_train_again(small, monkeypatch):
    folder, whole = small
    lines = (folder / "training" / "metrics.jsonl").read_text()
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(training_run.Run, "_train", lambda *_: 0.0)
    again = accumulate(SMALL, folder, resume=True, progress=False)
    np.testing.assert_array_equal(again.trained, whole.trained)
    np.testing.assert_array_equal(again.drawn, whole.drawn)
    assert (folder / "training" / "metrics.jsonl").read_text() == lines


def test_configurations_are_checked():
    for change, name in (
        ({"output": -2}, "output"),
        ({"scale": -3.0}, "scale"),
        ({"points": 0}, "points"),
        ({"draws": 0}, "draws"),
        ({"train_examples": 5000}, "train_examples"),
        ({"steps": 0}, "steps"),
        ({"rho": -1.0}, "rho"),
        ({"dtype": "float16"}, "dtype"),
    ):
        with pytest.raises(InputError, match=name):
            AccumulationConfig(**change)


@pytest.fixture(scope="module")
def scripted(small):
    """(folder, outcome) of the script, which goes on with the small run, and of the bad flags."""
    folder = small[0].parent
    for name in ("curves.npz", "summary.json"):
        (small[0] / name).unlink()
    flags = (*FLAGS, "--resume")
    return folder, *processes.good_and_bad("accumulation.py", flags, BAD_FLAGS, folder)


def test_the_script_leaves_pictures_curves_and_numbers(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    for stem in ("figure_5_1", "shares"):
        assert (out / f"{stem}.png").stat().st_size > 10_000
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scale"] == "inf" and summary["steps"] == 40
    assert 0 < summary["difference_from_theory"] < 1e-11
    classes = [point["label"].split(",")[0] for point in summary["points"]]
    assert classes == ["class 5", "class 8"]
    assert [point["target"] for point in summary["points"]] == [1, 0]
    with np.load(out / "curves.npz") as curves:
        assert curves["trained"].shape == curves["theory"].shape == curves["line"].shape == (12, 2)
        assert curves["drawn"].shape == (3000, 2)
        assert summary["points"][0]["trained"] == curves["trained"][-1, 0]
    assert "of the largest output from linear theory" in outcome.stdout


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "accumulation.py", BAD_FLAGS[name][1])
