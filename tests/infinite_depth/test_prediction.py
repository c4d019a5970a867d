import json
import shutil

import numpy as np
import processes
import pytest

import dnntk
from dnntk import figures
from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.report import write_report
from dnntk.runs.folder import RunFolder
from dnntk.training.evaluation import described

KINDS = ("pdf", "png")
FILES = {"config.json", "summary.json", "curve.jsonl", "predictions.npz"}
PICTURES = {f"{name}.{kind}" for name in ("attribution", "confusion", "curve") for kind in KINDS}


def _summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than small predictions; one test looks at them."""
    monkeypatch.setattr(figures, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = dnntk.TrainConfig(depth=60, steps=60, time_step=0.05, checkpoint_every=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)
        return folder, dnntk.train(config, folder, progress=False)


def test_a_trained_run_is_compared(trained, tmp_path):
    """The script, through its command line, on what was trained: steps small enough for a flow."""
    folder, result = trained
    done = processes.outcome(
        "predict.py", f"--compare={folder}", "--times=1,1e5,inf", "--workdir=out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "results: out" in done.stdout
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == FILES | PICTURES
    summary = _summary(out)
    compared = summary["compared"]
    assert compared["depth"] == 60 and compared["workdir"] == str(folder)
    assert [row["time"] for row in compared["rows"]] == [h["time"] for h in result.history]
    for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        trained, predicted, difference = (
            np.array([row[f"{kind}_{name}"] for row in compared["rows"]])
            for kind in ("trained", "predicted", "difference")
        )
        np.testing.assert_array_equal(trained, [h[name] for h in result.history])
        np.testing.assert_array_equal(difference, trained - predicted)
        # 60 layers are within 1 / sqrt(60) of the limit, and one step within 0.05 of the flow.
        np.testing.assert_allclose(predicted, trained, rtol=0.35)
        assert predicted[0] == pytest.approx(trained[0], rel=1e-6)
        if name == "train_loss":
            assert compared["largest_difference"] == max(abs(difference)) < 0.02
            assert f"{trained[-1]:12.4g} {predicted[-1]:12.4g}" in done.stdout
    assert done.stdout.count("t = 100000:") == done.stdout.count("t = inf:") == 1
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) < 20 and "done: t = inf: train loss" in lines[-2]
    assert summary["time"] == "inf" and summary["train_mse"] < 1e-12
    assert [row["time"] for row in summary["times"]] == [1.0, 1e5, "inf"]
    assert summary["times"][2]["converged"]


def test_the_rows_are_the_flow_s(trained):
    data = trained[1].dataset
    result = predict(PredictConfig(times=(5.0, 50.0), rho=(2.0,)), progress=False)
    outputs = result.flow.predict(data.x_test, 50.0)
    assert result.chosen is result.rows[-1] and result.chosen["time"] == 50.0
    assert result.chosen["test_accuracy"] == np.mean((outputs > 0.5) == data.y_test)
    assert result.summary["train_mse"] == pytest.approx(2 * result.flow.loss(50.0))
    assert result.curve[-1]["train_loss"] == pytest.approx(result.flow.loss(50.0))
    losses = [line["train_loss"] for line in result.curve]
    assert np.all(np.diff(losses) < 0) and result.curve[0]["time"] <= 0.05


def test_gram_matrix_is_stored_and_found_again(tmp_path, caplog, no_pictures):
    config = PredictConfig(
        arch="cnn",
        pool=4,
        train_examples=50,
        times=(20.0,),
        solver="krylov",
        gram_dir=str(tmp_path / "g"),
    )
    first = predict(config, tmp_path / "a", progress=False)
    with caplog.at_level("INFO", "dnntk"):
        again = predict(config, tmp_path / "b", progress=False)
    assert "tiles taken from" in caplog.text
    assert again.rows == first.rows
    held = np.load(tmp_path / "b" / "predictions.npz")
    assert held["test_outputs"].shape == (1, 120, 1) and held["coefficients"].shape == (1, 50, 1)


def test_toy_has_no_accuracy(tmp_path):
    config = PredictConfig(dataset="toy", times=(10.0,))
    result = predict(config, tmp_path, progress=False)
    assert result.chosen["test_accuracy"] is None
    assert (tmp_path / "fit.png").exists()


# What only a script's flags, files and data can have.
BAD = {
    "times": (["--times=1,soon"], "times: expected numbers like"),
    "no rho": (["--rho="], "rho: expected"),
    "validation": (["--validation=500"], "validation: expected fewer than the 240"),
    "own data": (["--compare=own"], "--compare: own was started on data of your own (planes"),
    "nothing to resume": (["--resume"], "resume: expected the --workdir"),
    "rest": (["fast"], "expected flags"),
}


def test_bad_flags_end_with_one_line(tmp_path, trained_on_own):
    shutil.copytree(trained_on_own[0], tmp_path / "own")
    found = processes.outcomes("predict.py", {name: bad[0] for name, bad in BAD.items()}, tmp_path)
    for name, (_, message) in BAD.items():
        status, _, error = found[name]
        assert status == 2, (name, error)
        assert message in error and error.count("\n") == 1 and "Traceback" not in error, error


def test_a_command_can_be_mended_in_the_same_workdir(tmp_path, no_pictures):
    with pytest.raises(InputError, match="train_examples: expected at most 240"):
        predict(PredictConfig(train_examples=999), tmp_path)
    predict(PredictConfig(train_examples=20, times=(1.0,)), tmp_path, progress=False)
    assert len(_summary(tmp_path)["times"]) == 1


def test_a_run_and_its_prediction_use_the_same_names(trained):
    history, summary = trained[1].history, trained[1].summary
    limit = predict(PredictConfig(times=(1.0,)), progress=False)
    scores = {"time", "train_loss", "test_loss", "train_accuracy", "test_accuracy"}
    assert scores <= history[-1].keys() & limit.rows[-1].keys() & limit.curve[-1].keys()
    assert scores | {"train_mse"} <= summary.keys() & limit.summary.keys()
    for each in (summary, limit.summary):
        assert each["train_mse"] == 2 * each["train_loss"]  # one output
    assert described(summary).startswith(f"train loss {summary['train_loss']:.4g}, test loss ")
    assert "loss" not in history[-1] | limit.rows[-1] | limit.curve[-1]


def test_metrics_of_older_runs_are_read(trained, tmp_path, no_pictures):
    """They have the training loss under the name ``loss``."""
    history = trained[1].history
    folder = RunFolder(shutil.copytree(trained[0], tmp_path / "old"))
    old = [{k.replace("train_loss", "loss"): v for k, v in line.items()} for line in history]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (folder.path / "summary.json").unlink()
    page = write_report([folder.path], tmp_path / "page", progress=False).read_text()
    assert f"{history[-1]['train_loss']:.5g}" in page and "train loss" in page
    found = predict(PredictConfig(), compare=folder.path, progress=False)
    assert [row["time"] for row in found.rows] == [line["time"] for line in history[1:]]
    trained = [row["trained_train_loss"] for row in found.summary["compared"]["rows"]]
    assert trained == [line["train_loss"] for line in history]
    assert folder.keep_metrics_to(60) == history


def test_a_run_in_closed_form_is_compared_with_its_ridge_at_infinite_time(tmp_path, monkeypatch):
    config = dnntk.TrainConfig(depth=60, optimizer="kernel", ridge=1e-3)
    run, drawn = tmp_path / "run", {}
    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", lambda path, _, *shown: drawn.update({path.name: shown}))
        trained = dnntk.train(config, run, progress=False)
        found = predict(compare=run, workdir=tmp_path / "limit", progress=False)
    assert [row["time"] for row in found.rows] == [np.inf] and found.flow.ridge == 1e-3
    for saved in (found.summary, _summary(tmp_path / "limit")):
        assert [row["time"] for row in saved["compared"]["rows"]] == [0.0, "inf"]
    last = found.summary["compared"]["rows"][-1]
    assert last["trained_train_loss"] == trained.summary["train_loss"]
    assert last["predicted_train_loss"] == found.rows[-1]["train_loss"]
    # Without the ridge, this loss is 0; 60 layers are within 1 / sqrt(60) of the limit.
    assert last["predicted_train_loss"] == pytest.approx(last["trained_train_loss"], rel=0.13)
    axes = figures.prediction_figure(*drawn["curve"]).axes[0]
    assert axes.lines[1].get_xdata() == axes.lines[0].get_xdata()[-1]  # at the end of the curve
    assert r"\infty" in axes.lines[1].get_label() and axes.get_xscale() == "log"
    # Another ridge is refused; a resumed run's times are numbers, too.
    with pytest.raises(InputError, match=r"compare: .* with ridge=0\.001, got 0\.0; .*leave ridge"):
        predict(PredictConfig(), compare=run)
    assert RunFolder(run).keep_metrics_to(1) == trained.history
    assert '"time": "inf"' in (run / "metrics.jsonl").read_text()


def own_data(**changed):
    """Two classes -1 and 1 of points in the plane, in float64 and pandas' kinds of labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    y = np.where(x[:, 0] > 0, 1.0, -1.0)
    labels = np.where(y > 0, "right", "left")
    mine = {"x_train": x[:30], "y_train": y[:30], "labels_train": labels[:30], "name": "planes"}
    mine |= {"x_test": x[30:], "y_test": y[30:], "labels_test": labels[30:]}
    return dnntk.Dataset(**mine | changed)


WITHOUT_TEST = dict.fromkeys(("x_test", "y_test", "labels_test"))


@pytest.fixture(scope="module")
def trained_on_own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    config = dnntk.TrainConfig(depth=40, steps=20, time_step=0.05, checkpoint_every=20)
    return folder, dnntk.train(config, folder, dataset=own_data(), progress=False)


def test_a_run_on_own_data_is_compared_on_the_same_only(trained_on_own, tmp_path, no_pictures):
    run, result = trained_on_own
    found = predict(compare=run, workdir=tmp_path, dataset=own_data(), progress=False)
    assert found.summary["data"] == result.summary["data"]
    last = found.summary["compared"]["rows"][-1]
    assert last["predicted_test_accuracy"] == found.rows[-1]["test_accuracy"] >= 0.8
    # Half of the inputs are negative, which the network's first ReLU makes 0, and its limit's.
    assert last["predicted_train_loss"] == pytest.approx(last["trained_train_loss"], rel=0.02)
    outputs = np.load(tmp_path / "predictions.npz")["test_outputs"][-1]
    right = np.mean((outputs > 0) == (own_data().y_test[:, None] > 0))
    assert found.rows[-1]["test_accuracy"] == right
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["experiment"] == "predict"
    trained = json.loads((run / "config.json").read_text())
    assert saved["dataset"] == "own" and saved["own"]["x_train"] == trained["own"]["x_train"]

    with pytest.raises(InputError, match="compare: .* data of your own .* again from Python"):
        predict(compare=run)
    other = own_data(x_train=own_data().x_train + 1e-3)
    with pytest.raises(InputError, match="compare: .* other data .*sha256"):
        predict(compare=run, dataset=other)
    with pytest.raises(InputError, match="resume: .* other data"):
        predict(workdir=tmp_path, dataset=other, resume=True)
    with pytest.raises(InputError, match="resume: .* data of your own .* got none"):
        predict(workdir=tmp_path, resume=True)


def test_a_ridge_chosen_by_evidence_is_not_the_runs(trained):
    with pytest.raises(InputError, match="select: expected validation or loo beside compare"):
        predict(PredictConfig(select="evidence"), compare=trained[0])


def test_own_data_are_not_compared_with_a_run_on_a_dataset(trained):
    with pytest.raises(InputError, match="compare: .* was started on dataset=digits, got data of"):
        predict(compare=trained[0], dataset=own_data())


def test_own_data_without_a_test_set_are_predicted(tmp_path):
    config = PredictConfig(times=(5.0,), rho=(1.0, 2.0))  # a choice, by classes of -1 and 1
    found = predict(config, tmp_path, dataset=own_data(**WITHOUT_TEST), progress=False)
    assert found.chosen["test_loss"] is found.chosen["test_accuracy"] is None
    assert found.chosen["train_accuracy"] > 0.8
    lines = (tmp_path / "search.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["scores"][0]["accuracy"] > 0.5
    assert (tmp_path / "curve.png").exists() and not (tmp_path / "confusion.png").exists()
    assert np.load(tmp_path / "predictions.npz")["test_outputs"].shape == (1, 0, 1)
