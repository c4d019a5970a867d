"""The report: valid, self-contained, harmless whatever the files hold, and complete."""

import base64
import dataclasses
import itertools
import json
import os
import random
import re
import struct
import tracemalloc
import zlib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import unquote_to_bytes

import processes
import pytest

from dnntk import InputError, TrainConfig, figures
from dnntk.experiments.limit_convergence import LimitConfig
from dnntk.experiments.ntk_convergence import ConvergenceConfig
from dnntk.infinite_depth.config import PredictConfig
from dnntk.report import curves, markup, reading, values, write_report
from dnntk.report.sections import caption, experiment

EVIL = '</td></style></title><script>alert(1)</script><img src="x" onerror=\'y\'>&amp;"'
DATA = "data:image/png;base64,"
BAD_FLAGS = {
    "no such folder": (["--runs=nowhere"], "runs: expected folders, nowhere"),
    "no run": (["--runs=empty"], "found none"),
    "no folder named": (["--runs="], "found none"),
    "workdir is a file": (["--runs=runs", "--workdir=afile"], "workdir"),
    "unknown flag": (["--run=runs"], "run"),
}
CONFIGS = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "ntk_convergence": ConvergenceConfig,
    "limit_convergence": LimitConfig,
}


class Page(HTMLParser):
    """A page's elements; every tag closed in order, every id once, every anchor there."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.source = Path(file).read_text(encoding="utf-8")
        self.open, self.elements, self.text, self.cells = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        for name, attributes in self.elements:
            assert name != "script" and not any(key.startswith("on") for key in attributes)
            assert attributes.get("src", DATA).startswith(DATA)
            href = attributes.get("href", "./")
            assert href.startswith("./") or href[1:] in ids, href
        self.words = " ".join(self.text)

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((name, dict(attributes)))
        if name not in markup.VOID:
            self.open.append(name)
        if name in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name, self.getpos()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def all(self, name):
        return [attributes for kind, attributes in self.elements if kind == name]

    @property
    def images(self):
        return [base64.b64decode(image["src"].partition(",")[2]) for image in self.all("img")]


def png(width=30, height=20, shade=0):
    """A grey PNG; other shades are other bytes."""

    def chunk(kind, data):
        tail = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + tail

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([shade]) * width) * height)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def history(count=8):
    return [
        {
            "step": 10 * i,
            "time": 1.5 * i,
            "train_loss": 0.5 / (1 + i),
            "test_loss": 0.6 / (1 + i),
            "train_accuracy": i / count,
            "test_accuracy": None if i < 2 else i / (2 * count),
            "seconds": 0.25 * i,
        }
        for i in range(count)
    ]


def write(folder, **files):
    """``config={...}`` to config.json, ``metrics=[...]`` to metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        if isinstance(content, list):
            lines = "".join(json.dumps(line) + "\n" for line in content)
            (folder / f"{stem}.jsonl").write_text(lines)
        else:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def trained(folder, depth, **more):
    """A workdir as scripts/train.py leaves it, without figures."""
    summary = {
        "train_loss": 0.00455,
        "test_loss": 0.00512,
        "train_accuracy": 1.0,
        "test_accuracy": 0.98765,
        "steps": 300,
        "time": 42.6,
        "seconds": 7384.0,
        "peak_memory_bytes": 530_000_000,
        "versions": {"jax": "0.10.2"},
    }
    config = TrainConfig(depth=depth).to_json() | {"plan": {"reason": "below the stable limit"}}
    return write(folder, config=config, metrics=history(), summary=summary, **more)


def spread(*samples):
    middle = sorted(samples)[len(samples) // 2]
    return {"median": middle, "quartiles": [min(samples), max(samples)], "samples": samples}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of varied runs, small."""
    folder = tmp_path_factory.mktemp("made")
    runs = folder / "runs"
    one = trained(runs / "mlp-depth1000", 1000)
    figures.draw(one / "loss", figures.loss_figure, history()[2:], "title")
    trained(runs / "mlp-depth200", 200)
    write(runs / "cut-off", config=TrainConfig(arch="cnn").to_json(), metrics=history(3))
    rows = [{"depth": d, "fit": {"exponent": -0.5 * d}, "diverged": d > 5} for d in (3, 30)]
    sweep = write(runs / "sweep", config={"depths": [3, 30]}, summary={"rows": rows, "seconds": 3})
    (sweep / "panels").mkdir()
    (sweep / "panels" / "a_panel.png").write_bytes(png(shade=1))
    inner = write(sweep / "he-depth3", config={"arch": "mlp", "depth": 3}, summary={})
    (inner / "fit.png").write_bytes(png(shade=2))
    measured = {"what": "step <1>", "unit": "s", **spread(0.1, 0.2, 0.4), "promise": "fast"}
    memory = {"what": "peak", "unit": "bytes", **spread(2e9), "promise": None, "met": None}
    beside = {"peer": {"name": "PyTorch loop", **spread(1.0, 2.0, 4.0)}, "ratio": spread(0.1)}
    write(
        runs / "benchmark",
        train_cnn={
            "benchmark": "train_cnn",
            "settings": {"batch": 512},
            "rows": [measured | beside | {"met": False}, memory],
        },
    )
    (folder / "empty").mkdir()
    (folder / "afile").write_text("")
    write_report([runs], folder / "report", progress=False)
    return folder, Page(folder / "report" / "report.html")


def page_of(folder, **kwargs):
    return Page(write_report([folder], folder.parent / "report", progress=False, **kwargs))


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


def test_every_figure_is_embedded_and_described(made):
    folder, page = made
    files = [file.read_bytes() for file in sorted((folder / "runs").rglob("*.png"))]
    assert len(files) == 3 and sorted(page.images) == sorted(files)
    for image in page.all("img"):
        assert image["alt"] and int(image["width"]) > 0 and int(image["height"]) > 0
    assert "Panels/a panel, sweep" in [image["alt"] for image in page.all("img")]


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


def test_nested_runs_rows_and_benchmarks_are_tables(made):
    _, page = made
    assert {"sweep", "sweep/he-depth3"} <= set(page.cells)
    start = page.cells.index("fit exponent") - 1
    assert page.cells[start : start + 9] == [
        *("depth", "fit exponent", "diverged"),
        *("3", "-1.5", "no", "30", "-15", "yes"),
    ]
    start = page.cells.index("step <1>")
    assert page.cells[start + 1 : start + 6] == [
        *("0.2 s [0.1, 0.4]", "PyTorch loop: 2 s [1, 4]", "0.1 x", "fast", "NO")
    ]
    assert "2 GB" in page.cells and "0 of 1 promises met" in page.cells


def test_a_run_without_a_picture_of_its_losses_has_a_curve(made):
    _, page = made
    labels = [svg["aria-label"] for svg in page.all("svg")]
    # Two of mlp-depth200, two of the one cut off less its accuracy with a single point; none of
    # mlp-depth1000, which has loss.png.
    assert len(labels) == 4
    assert "training from 0.5 to 0.0625; test from 0.6 to 0.075" in labels[-2]


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


def test_nothing_in_a_file_or_its_name_becomes_markup(tmp_path):
    name = EVIL.replace("/", "\u2215")
    run = write(
        tmp_path / "runs" / name,
        config={EVIL: EVIL, "arch": EVIL, "depth": [EVIL], "dataset": EVIL, "classes": EVIL},
        summary={EVIL: {EVIL: EVIL}, "rows": [{EVIL: EVIL}], "train_loss": EVIL},
        metrics=[{"step": i, "train_loss": 1.0 + i, EVIL: EVIL} for i in range(3)],
        bench={"benchmark": EVIL, "rows": [{"what": EVIL, "median": 1, "unit": EVIL}]},
    )
    (run / f"{name}.png").write_bytes(png())
    (run / "javascript:alert(1).pdf").write_bytes(b"%PDF")
    (run / f"{name}.pdf").write_bytes(b"%PDF")
    page = Page(write_report([tmp_path], tmp_path, heading=EVIL, progress=False))
    assert page.words.count(EVIL) > 10 and len(page.images) == 1
    allowed = {"class", "id", "href", "src", "alt", "width", "height", "aria-label", "role", "open"}
    allowed |= {"scope", "tabindex", "lang", "charset", "http-equiv", "content", "name"}
    drawn = {"viewbox", "d", "x", "y", "text-anchor", "transform"}
    assert {key for _, attributes in page.elements for key in attributes} <= allowed | drawn


DAMAGE = {
    "empty": b"",
    "cut short": b'{"train_loss": 0.1, "st',
    "not text": b"\xff\xfe\x00\x80" * 9,
    "nested a million deep": b"[" * 1_000_000,
    "a list": b"[1, 2, []]",
    "null": b"null",
    "odd numbers": b'{"train_loss": NaN, "steps": 1e999, "time": ' + b"9" * 4000 + b"}",
    "an endless number": b'{"steps": ' + b"9" * 9000 + b"}",
    "half a character": rb'{"train_loss": "\ud800", "\udfff": "\u0000\u202e"}',
    "other types": b'{"train_loss": {"a": []}, "steps": "many", "versions": 3, "rows": [{}, {}]}',
    "deep": b'{"a":' * 400 + b"1" + b"}" * 400,
}


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "loss.png"])
def test_damaged_files_are_said_and_the_rest_is_shown(name, tmp_path):
    for label, content in DAMAGE.items():
        (trained(tmp_path / "runs" / label, 10) / name).write_bytes(content)
    page = page_of(tmp_path / "runs")
    assert set(DAMAGE) <= set(page.cells)
    problems = page.words.count(f"{name}: ")
    assert problems >= (len(DAMAGE) if name == "loss.png" else 4), page.words
    if name != "config.json":
        assert page.cells.count("below the stable limit") == len(DAMAGE)


def test_huge_files_are_not_read_whole(tmp_path):
    names = ("config.json", "summary.json", "metrics.jsonl", "loss.png", "bench.json")
    run = trained(tmp_path / "runs" / "one", 10)
    for name in names:
        with (run / name).open("ab") as file:
            file.truncate(10 << 30)
    tracemalloc.start()
    page = page_of(tmp_path / "runs")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    for name in names[:-1]:
        assert f"{name}: " in page.words


def test_a_long_history_keeps_its_beginning_and_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "JSON_BYTES", 2000)
    lines = history(200)
    run = write(tmp_path / "runs" / "one", metrics=lines)
    write(run, config={})
    found, problem = reading.read_lines(run / "metrics.jsonl")
    assert found[0] == lines[0] and found[-1] == lines[-1] and 10 < len(found) < 200
    assert "each end" in problem and "damaged" not in problem
    assert all(line in lines for line in found)
    sizes = [len(json.dumps(line)) + 1 for line in lines]
    for size in (1, 2, 5, sum(sizes) // 2 + 1, sum(sizes), sum(sizes) + 1):
        monkeypatch.setattr(reading, "JSON_BYTES", size)
        found, _ = reading.read_lines(run / "metrics.jsonl")
        assert all(line in lines for line in found)
    assert found == lines


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


def test_workdirs_are_found_once_and_by_what_they_hold(tmp_path):
    for name in ("b/depth30", "b/depth4", "a", "a/checkpoints/3", "a/.hidden", "b/depth4/in/side"):
        write(tmp_path / name, config={})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "config.json")
    write(tmp_path / "d", other={"a": 1})
    write(tmp_path / "e", rows=[])
    (tmp_path / "e" / "drawn.json").write_text("[]")
    (tmp_path / "e" / "drawn.png").write_bytes(png())
    found = reading.find_workdirs([tmp_path / "b", tmp_path])
    names = ["a", "b/depth4", "b/depth4/in/side", "b/depth30", "e"]
    assert [workdir.name for workdir in found] == names
    assert [workdir.name for workdir in reading.find_workdirs([tmp_path / "a"])][0] == "a"


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_tell_their_experiment(name):
    config = json.loads(json.dumps(dataclasses.asdict(CONFIGS[name]())))
    assert experiment(config | {"versions": {}}) == name
    config.pop("beta")
    assert experiment(config | {"plan": {}}) == name
    assert experiment({"beta": 1.0, "experiment": EVIL}) == EVIL
    assert experiment({"architectures": ["Bert"], "hidden_size": 3}) is None


def _random_json(rng, level=0):
    """Any JSON value: types and nesting at random, text with markup in it."""
    kind = rng.randrange(10 if level < 5 else 6)
    if kind < 6:
        plain = [None, True, rng.randrange(10**9), rng.gauss(0, 1e6), EVIL, "x" * 2000, 10**400]
        return rng.choice([*plain, float("nan"), float("-inf"), 5e-324, "\ud800"])
    if kind < 8:
        return [_random_json(rng, level + 1) for _ in range(rng.randrange(15))]
    names = [rng.choice([EVIL, "loss", "rows", "a.b", "", "bytes", "accuracy"]) for _ in range(4)]
    return {f"{name}{i}": _random_json(rng, level + 1) for i, name in enumerate(names)}


def test_any_json_is_shown(tmp_path):
    rng = random.Random(0)
    for i in range(30):
        write(tmp_path / "runs" / str(i), config=_random_json(rng), summary=_random_json(rng))
        rows = [value for _ in range(9) if isinstance(value := _random_json(rng), dict)]
        write(tmp_path / "runs" / str(i), bench={"benchmark": 1, "rows": rows}, metrics=rows)
    page = page_of(tmp_path / "runs")
    assert max(map(len, page.cells)) <= values.CHARACTERS


def test_long_tables_are_thinned_and_say_so(tmp_path):
    rows = [{"row": i} | {f"column{j}": j for j in range(100)} for i in range(1001)]
    write(tmp_path / "runs" / "one", config={}, summary={"rows": rows})
    page = page_of(tmp_path / "runs")
    assert "200 of 1,001 rows shown" in page.words and "40 of 101 columns shown" in page.words
    assert {"0", "1,000"} <= set(page.cells)


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.1, 0.01],
        [3.0, 3.0],
        [0.0, 0.0],
        [-1.0, 2.0, 1e-9],
        [1e299, -1e299],
        [5e-324, 1e299],
        [1.0, float("nan"), 1.0 + 1e-15],
        [10**400, 1, "2", None, 4.0],
        list(range(5000)),
    ],
)
def test_curves_stay_inside_their_frame(losses):
    lines = [{"step": i, "time": None, "train_loss": loss} for i, loss in enumerate(losses)]
    svg = curves.course(lines)
    paths = re.findall(r'<path d="([^"]*)"', svg)
    assert len(paths) > 4  # grid lines, axes, curve and legend
    for path in paths:
        assert re.fullmatch(r"[MLHVh\d. -]+", path)
    curve = re.search(r'd="M([^"]*)" class="training"', svg)[1]
    points = [tuple(map(float, point.split())) for point in curve.split("L")]
    assert 2 <= len(points) <= curves.POINTS
    for x, y in points:
        assert curves.LEFT <= x <= curves.WIDTH and curves.TOP <= y <= curves.HEIGHT
    assert all(a[0] < b[0] for a, b in itertools.pairwise(points))


def test_a_single_evaluation_is_no_curve():
    assert curves.course(history(1)) is None and curves.course([]) is None


def test_values_are_shown_with_their_units():
    assert values.shown("train_accuracy", 0.98765) == "98.77%"
    assert values.shown("peak_memory_bytes", 2_345_000_000) == "2.35 GB"
    assert values.shown("peer_gigabytes", 8.0) == "8" and values.shown("a.bytes", 5e6) == "5 MB"
    assert values.shown("seconds", 12_000.0) == "3 h 20 min"
    assert values.shown("compile_seconds", 119.99) == "120 s"
    assert values.shown("seconds", 125) == "2 min 5 s"
    assert values.shown("depth", 20000) == "20,000"
    assert values.shown("loss", 0.000123456) == "0.00012346"
    assert values.shown("depths", list(range(100))).endswith("11, \u2026 (100 in all)")
    assert values.shown("resume", True) == "yes" and values.shown("scale", None) == "\u2013"


def test_captions_name_the_thesis_figure():
    assert caption("figure_5_1") == caption("figure-5.1") == "Figure 5.1"
    assert caption("figure_5_1_cnn") == "Figure 5.1 CNN" and caption("by_depth") == "By depth"
    assert caption("") == ""


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
    outcome = scripted[1][name]
    assert outcome.returncode == 2, outcome.stderr
    line = outcome.stderr.strip()
    assert "\n" not in line and BAD_FLAGS[name][1] in line and line.startswith("report.py")


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
    page = page_of(runs)
    cells = {name: page.cells[page.cells.index(name) :] for name in ("mine", "up", "later", "odd")}
    for name in ("mine", "up", "later"):
        assert cells[name][4] == "own data: planes, 30 x 2, sha256 01234567", name
    assert "finished, no better than a constant" in cells["mine"][:15]
    assert "diverged" in cells["up"][:15] and "finished" in cells["later"][:15]
    assert "diverged: the loss went <up>" in page.words and "before" not in page.words
    assert "digits" not in page.words.replace("digits0", "")
