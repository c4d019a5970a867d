import json

import pytest

import dnntk
from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.infinite_depth.trained_run import TrainedRun
from dnntk.runs.folder import RunFolder

LINE = {"step": 20, "time": 1.0, "train_loss": 0.1, "test_loss": 0.2}
LINE |= {"train_accuracy": 0.9, "test_accuracy": 0.8}


def run_with(folder, *lines, **fields):
    """A workdir of `dnntk.train` with these evaluations."""
    RunFolder(folder).make()
    (folder / "config.json").write_text(json.dumps(dnntk.TrainConfig(**fields).to_json()))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_on_other_data_is_not_compared(tmp_path):
    run = run_with(tmp_path, json.dumps(LINE))
    with pytest.raises(InputError, match="compare: .* was trained with rho=.*leave rho out"):
        predict(PredictConfig(rho=(2.0,)), compare=run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="compare: expected a run in .*nowhere"):
        TrainedRun(tmp_path / "nowhere")


def test_a_run_without_kernel_time_is_not_compared(tmp_path):
    run = run_with(tmp_path, '{"step": 1, "time": null}')
    with pytest.raises(InputError, match="compare: expected lines with a kernel time"):
        predict(PredictConfig(), compare=run)


def test_a_run_on_another_loss_is_not_compared(tmp_path):
    run = run_with(tmp_path, json.dumps(LINE), loss="cross_entropy", label_smoothing=0.1)
    with pytest.raises(InputError, match="compare: expected a run of loss=squared.*KernelFlow"):
        predict(PredictConfig(), compare=run)


def test_damaged_lines_are_passed_over_and_settings_without_a_limit_named(tmp_path, caplog):
    """As a full disk leaves the lines."""
    lines = (
        ['{"time": NaN, "train_loss": 1}', '{"time": 1, "train_loss": NaN}', "[1]", "no JSON"]
        + [json.dumps(LINE | {"time": "soon"}), json.dumps(LINE), json.dumps(LINE)]
        + ['{"step": 99, "ti']
    )
    folder = run_with(tmp_path / "proj [2]", *lines, init="he_uniform")
    found = predict(compare=folder, progress=False)
    assert [row["time"] for row in found.rows] == [LINE["time"]]
    rows = found.summary["compared"]["rows"]
    assert len(rows) == 1 and rows[0]["trained_train_loss"] == LINE["train_loss"]
    assert caplog.text.count("was trained with init=he_uniform, which its limit does not") == 1
    assert len(repr(found)) < 300
    with pytest.raises(InputError, match="compare: expected lines with a kernel time"):
        TrainedRun(run_with(tmp_path / "worse", *lines[:5]))
