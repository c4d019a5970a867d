"""A section a run: its figures, tables, problems and settings, and which experiment it is."""

import dataclasses
import json
import os
import struct
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from report_pages import EVIL, Page, history, page_of, png, trained, write

from dnntk import TrainConfig
from dnntk.experiments.accumulation import AccumulationConfig
from dnntk.experiments.catapult_config import CatapultConfig
from dnntk.experiments.cross_entropy_config import CrossEntropyConfig
from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig
from dnntk.experiments.errata import ErrataConfig
from dnntk.experiments.features_config import FeaturesConfig
from dnntk.experiments.initialization import InitializationConfig
from dnntk.experiments.limit_convergence_config import LimitConfig
from dnntk.experiments.ntk_convergence import ConvergenceConfig
from dnntk.experiments.regimes_config import RegimesConfig
from dnntk.experiments.required_depth_config import RequiredDepthConfig
from dnntk.experiments.trainability_config import TrainabilityConfig
from dnntk.infinite_depth.config import PredictConfig
from dnntk.report import write_report
from dnntk.report.sections import caption, experiment

CONFIGS = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "accumulation": AccumulationConfig,
    "catapult": CatapultConfig,
    "cross_entropy": CrossEntropyConfig,
    "depth_or_width": DepthOrWidthConfig,
    "errata": ErrataConfig,
    "features": FeaturesConfig,
    "initialization": InitializationConfig,
    "limit_convergence": LimitConfig,
    "ntk_convergence": ConvergenceConfig,
    "regimes": RegimesConfig,
    "required_depth": RequiredDepthConfig,
    "trainability": TrainabilityConfig,
}


def test_every_figure_is_embedded_and_described(made):
    folder, page = made
    files = [file.read_bytes() for file in sorted((folder / "runs").rglob("*.png"))]
    assert len(files) == 3 and sorted(page.images) == sorted(files)
    for image in page.all("img"):
        assert image["alt"] and int(image["width"]) > 0 and int(image["height"]) > 0
    assert "Panels/a panel, sweep" in [image["alt"] for image in page.all("img")]


def test_pictures_come_before_numbers(made):
    sections = [part for part in made[1].source.split("<section")[1:] if "<figure" in part]
    assert len(sections) == 3
    assert all(part.index("<figure") < part.index("<table") for part in sections)


def test_nested_runs_and_rows_are_tables(made):
    _, page = made
    assert {"sweep", "sweep/he-depth3"} <= set(page.cells)
    start = page.cells.index("fit exponent") - 1
    assert page.cells[start : start + 9] == [
        *("depth", "fit exponent", "diverged"),
        *("3", "-1.5", "no", "30", "-15", "yes"),
    ]


def test_a_pdf_elsewhere_is_named_by_its_path(made):
    folder, page = made
    pdf = folder / "runs" / "mlp-depth1000" / "loss.pdf"
    assert str(pdf) in page.words


def test_a_linked_pdf_is_found_whatever_its_name(tmp_path):
    names = [b"100% #1?a=b.pdf", b"loss.pdf", b"\xff\xfe.pdf", b"javascript:alert(1).pdf"]
    run = os.fsencode(write(tmp_path / "runs" / "\u00e9t\u00e9 %20", config={}))
    for name in names:
        Path(os.fsdecode(os.path.join(run, name))).write_bytes(b"%PDF")
    page = Page(write_report([tmp_path], tmp_path, progress=False))
    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert not any(character in link for link in links for character in "#?")
    found = [os.path.join(os.fsencode(tmp_path), unquote_to_bytes(link[2:])) for link in links]
    assert sorted(found) == sorted(os.path.join(run, name) for name in names)


def test_figures_beyond_the_budget_are_said(tmp_path, monkeypatch):
    run = trained(tmp_path / "runs" / "one", 10)
    for shade in range(3):
        (run / f"{shade}.png").write_bytes(png(shade=shade))
    (run / "bomb.png").write_bytes(png(3, 3).replace(struct.pack(">I", 3), b"\0\1\0\0"))
    monkeypatch.setattr("dnntk.report.FIGURES_BYTES", len(png()) + len(png(shade=1)))
    page = page_of(tmp_path / "runs")
    assert len(page.images) == 2
    assert "2.png: left out" in page.words and "bomb.png: 65,536 x 65,536 pixels" in page.words


def test_settings_are_named_like_their_flags(made):
    _, page = made
    assert {"batch_size", "plan.reason", "settings.batch"} <= set(page.cells)


def test_missing_files_are_said(tmp_path):
    write(tmp_path / "runs" / "a", config={})
    write(tmp_path / "runs" / "b", summary={"train_loss": 1.5})
    page = page_of(tmp_path / "runs")
    assert "summary.json: missing; the run is unfinished" in page.words
    assert "config.json: missing" in page.words


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_that_does_not_name_its_experiment_is_known_by_its_settings(name):
    config = json.loads(json.dumps(dataclasses.asdict(CONFIGS[name]())))
    assert experiment(config | {"versions": {}, "plan": {}}) == name
    assert experiment(config | {"experiment": EVIL}) == EVIL
    assert experiment({"architectures": ["Bert"], "hidden_size": 3}) is None


def test_captions_name_the_thesis_figure():
    assert caption("figure_5_1") == caption("figure-5.1") == "Figure 5.1"
    assert caption("figure_5_1_cnn") == "Figure 5.1 CNN" and caption("by_depth") == "By depth"
    assert caption("") == ""


def test_own_data_a_missing_test_set_and_how_a_run_ended_are_said(tmp_path):
    own = {"name": "planes", "x_train": [30, 2], "x_test": [0, 2], "sha256": "0123456789abcdef"}
    config = TrainConfig().to_json() | {"dataset": "own", "classes": [-1, 1], "own": own}
    blank = {"test_loss": None, "test_accuracy": None}
    lines = [line | blank for line in history()]
    at_end = {**lines[-1], "learned": False}
    runs = tmp_path / "runs"
    write(runs / "mine", config=config, metrics=lines, summary=at_end)
    write(runs / "up", config=config, metrics=lines, diverged={"message": "the loss went <up>"})
    write(runs / "later", config=config, summary={"learned": True}, diverged={"message": "before"})
    write(runs / "odd", config=config | {"own": {}}, diverged=[1])
    write(runs / "two", config={"datasets": ["mnist_01", "mnist"]}, summary={"seconds": 3})
    page = page_of(runs)
    cells = {name: page.cells[page.cells.index(name) :] for name in ("mine", "up", "later", "odd")}
    assert page.cells[page.cells.index("two") + 4] == "mnist_01, mnist"
    for name in ("mine", "up", "later"):
        assert cells[name][4] == "own data: planes, 30 x 2, sha256 01234567", name
    assert "finished, no better than a constant" in cells["mine"][:15]
    assert "diverged" in cells["up"][:15] and "finished" in cells["later"][:15]
    assert "diverged: the loss went <up>" in page.words and "before" not in page.words
    assert "digits" not in page.words.replace("digits0", "")
