"""The report: valid, self-contained and complete; the script that writes it."""

import os
import re
from importlib import resources
from urllib.parse import unquote_to_bytes

import processes
import pytest
from report_pages import Page, write

from dnntk import InputError, TrainConfig
from dnntk.report import write_report

BAD_FLAGS = {
    "no such folder": (["--runs=nowhere"], "runs: expected folders, nowhere"),
    "no run": (["--runs=empty"], "found none"),
    "no folder named": (["--runs="], "found none"),
    "workdir is a file": (["--runs=runs", "--workdir=afile"], "workdir"),
    "unknown flag": (["--run=runs"], "run"),
}


def test_the_page_asks_for_nothing(made):
    _, page = made
    style = resources.files("dnntk.report").joinpath("page.css").read_text()
    assert "url(" not in style and "@import" not in style and "</" not in style
    assert not re.search(r"(src|href|action|data|poster)=\"?(https?:)?//", page.source)
    assert {name for name, _ in page.elements}.isdisjoint({"link", "iframe", "object", "script"})
    metas = {
        meta.get("name", meta.get("http-equiv")): meta.get("content") for meta in page.all("meta")
    }
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["Content-Security-Policy"].startswith("default-src 'none';")


def test_the_overview_says_what_was_reached(made):
    _, page = made
    cells = page.cells
    heads = cells[: cells.index("state") + 1]
    line = cells[cells.index("mlp-depth1000") :][: len(heads)]
    row = dict(zip(heads, line, strict=True))
    expected = {
        "experiment": "train",
        "architecture": "MLP",
        "depth": "1,000",
        "data": "digits 0/1",
        "train loss": "0.00455",
        "test accuracy": "98.77%",
        "steps": "300",
        "kernel time": "42.6",
        "wall time": "2 h 3 min",
        "peak memory": "0.53 GB",
        "state": "finished",
    }
    assert expected.items() <= row.items()
    assert cells.index("mlp-depth200") < cells.index("mlp-depth1000")  # as people count
    line = dict(zip(heads, cells[cells.index("cut-off") :], strict=False))
    assert line["state"] == "unfinished" and line["steps"] == "20" and line["depth"] == "1,000"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        write_report([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.fixture(scope="module")
def scripted(made):
    folder, _ = made
    cases = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    good = {"good": ["--runs=runs,runs/sweep", "--workdir=out", "--title=All <runs>"]}
    write(folder / "one, two", config={}, summary={})
    good["comma"] = ["--runs=one, two", "--workdir=comma"]
    return folder, processes.outcomes("report.py", cases | good, folder)


def test_the_script_writes_the_page(scripted):
    folder, outcomes = scripted
    assert outcomes["good"].returncode == 0, outcomes["good"].stderr
    assert outcomes["good"].stdout == "report: out/report.html\n"
    assert os.listdir(folder / "out") == ["report.html"]
    assert outcomes["comma"].stdout == "report: comma/report.html\n", outcomes["comma"].stderr
    page = Page(folder / "out" / "report.html")
    assert "All <runs>" in page.text and "6 runs" in page.words and len(page.images) == 3


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[1][name], "report.py", BAD_FLAGS[name][1])


ODD_NAMES = ("proj [2]", "a b", "$5_$", "<b>&amp;", "größe ü", "back\\slash", "50% #1?", "*")


def test_runs_with_any_name_are_found_and_shown_as_they_are(tmp_path):
    for depth, name in enumerate(ODD_NAMES, 10):
        write(tmp_path / "runs" / name, config=TrainConfig(depth=depth).to_json(), summary={})
        (tmp_path / "runs" / name / "loss.pdf").write_bytes(b"%PDF")
    page = Page(write_report([tmp_path / "runs"], tmp_path, progress=False))
    for depth, name in enumerate(ODD_NAMES, 10):
        assert page.cells[page.cells.index(name) + 3] == str(depth), name
        linked = [unquote_to_bytes(a["href"]).decode() for a in page.all("a") if "href" in a]
        assert any(href.endswith(f"/{name}/loss.pdf") for href in linked), name
