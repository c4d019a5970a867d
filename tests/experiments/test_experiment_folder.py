"""What experiments write: settings with the experiment's name, rows, arrays; nothing unasked."""

import json
import math

import numpy as np
import pytest

from dnntk import InputError, figures
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.runs.locks import freeing_folders

SETTINGS = {"depth": 3, "scale": math.inf}


@freeing_folders()
def started(workdir, experiment="errata", settings=SETTINGS, **options):
    folder = ExperimentFolder(experiment, settings, workdir, **options)
    if not folder.resumes:
        folder.write_config()
    return folder


def test_a_config_names_its_experiment_and_another_one_cannot_resume_it(tmp_path):
    assert not started(tmp_path / "w").resumes
    saved = json.loads((tmp_path / "w" / "config.json").read_text())
    assert saved.pop("versions")
    assert saved == {"experiment": "errata", "depth": 3, "scale": "inf"}
    assert started(tmp_path / "w", resume=True).resumes
    with pytest.raises(InputError, match="experiment=errata"):
        started(tmp_path / "w", "accumulation", resume=True)
    with pytest.raises(InputError, match="depth=3"):
        started(tmp_path / "w", settings=SETTINGS | {"depth": 4}, resume=True)
    assert started(tmp_path / "w", settings=SETTINGS | {"depth": 4}, resume=True, free=["depth"])


def test_arrays_are_computed_once_and_rows_outlive_a_kill(tmp_path):
    folder = started(tmp_path / "w")
    for _ in range(2):
        calls = []
        found = folder.arrays("one", lambda: calls.append(1) or {"a": np.arange(3)})  # noqa: B023
        np.testing.assert_array_equal(found["a"], np.arange(3))
    assert not calls and [f.name for f in (tmp_path / "w" / "runs").iterdir()] == ["one.npz"]
    folder.append("rows.jsonl", {"scale": math.inf})
    with (tmp_path / "w" / "rows.jsonl").open("a") as file:
        file.write('{"cut of')
    assert started(tmp_path / "w", resume=True).rows("rows.jsonl") == [{"scale": "inf"}]
    assert folder.training() == (tmp_path / "w" / "training", False)
    summary = folder.finish({"rows": 1})
    assert summary == json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["rows"] == 1 and summary["seconds"] >= 0 < summary["peak_memory_bytes"]


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "draw", None)
    folder = started(None)
    folder.append("rows.jsonl", {})
    folder.write_arrays("a.npz", {"a": np.zeros(1)})
    folder.draw("picture", None)
    assert folder.arrays("one", lambda: {"a": 1}) == {"a": 1} and folder.rows("rows.jsonl") == []
    assert folder.finish({})["seconds"] >= 0 and folder.training() == (None, False)
    assert not list(tmp_path.iterdir())
