"""Pictures are drawn whatever a user's matplotlib, names and numbers are, and never end a run."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import cbook

from dnntk import figures

ROOT = Path(__file__).parents[2]
NAMES = (
    "$5_$",
    r"\frac",
    "x^2_$",
    r"a\$b$",
    "two\nlines\0",
    "漢字 🙂",
    "\udcff",
    "",
    7,
    "_",
    "n" * 999,
)
# A figure to draw: inputs, targets and outputs of the toy task.
ARC = np.eye(2), np.zeros((2, 1)), np.ones((2, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_users_text_is_one_short_line_without_a_formula(name):
    text = figures.plain(name)
    assert text.isprintable() and len(text) <= 42
    assert not cbook.is_math_text(text)
    if str(name).isprintable() and len(str(name)) < 40:  # as matplotlib shows it
        assert text.replace(r"\$", "$") == str(name)


def test_every_name_of_a_class_is_drawn(tmp_path, caplog):
    counts = np.eye(len(NAMES), dtype=int)
    title = f"{figures.plain('$x_')}, $t = 3$"
    figures.draw(tmp_path / "names", figures.confusion_figure, counts, NAMES, title)
    assert {file.name for file in tmp_path.iterdir()} == {"names.png", "names.pdf"}
    assert not caplog.records


STRANGE = {
    "text.usetex": True,
    "figure.autolayout": True,
    "figure.dpi": 11.0,
    "savefig.format": "svg",
    "savefig.bbox": "tight",
    "axes.facecolor": "red",
    "font.size": 40.0,
    "interactive": True,
}


def test_a_picture_has_its_own_settings_and_the_users_stay(tmp_path):
    shown = (figures.arc_figure, *ARC, "fit", "title")
    figures.draw(tmp_path / "by-default", *shown)
    with matplotlib.rc_context(STRANGE), np.errstate(all="raise"):
        before = dict(matplotlib.rcParams)
        figures.draw(tmp_path / "with-settings", *shown)
        assert dict(matplotlib.rcParams) == before
        with pytest.raises(KeyboardInterrupt):
            figures.draw(tmp_path / "interrupted", raising(KeyboardInterrupt()))
    first, second = (tmp_path / f"{name}.png" for name in ("by-default", "with-settings"))
    assert first.read_bytes() == second.read_bytes()


def raising(error):
    def figure_of():
        raise error

    return figure_of


class Unprintable(Exception):
    def __str__(self):
        return "several\nlines " * 99


def test_a_picture_that_cannot_be_drawn_is_one_line_of_warning(tmp_path, caplog, monkeypatch):
    kept = tmp_path / "loss.png"
    kept.write_text("of an earlier run")
    (tmp_path / ".full.png.partial").symlink_to("/dev/full")
    one = (figures.arc_figure, *ARC, "fit", "title")
    figures.draw(tmp_path / "loss", raising(Unprintable()))
    figures.draw(tmp_path / "loss", raising(MemoryError()))
    figures.draw(tmp_path / "full", *one)
    figures.draw(tmp_path / "no-folder" / "loss", *one)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures.draw(tmp_path / "loss", *one)
    reasons = (
        "Unprintable: several lines",
        "MemoryError",
        "No space left",
        "No such",
        "matplotlib",
    )
    assert len(caplog.records) == len(reasons)
    for record, reason in zip(caplog.records, reasons, strict=True):
        message = record.getMessage()
        assert record.levelname == "WARNING" and reason in message
        assert "\n" not in message and len(message) < 1000
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]
    assert kept.read_text() == "of an earlier run"


def test_all_pictures_go_one_way_to_their_files():
    for file in (*ROOT.glob("dnntk/**/*.py"), *ROOT.glob("scripts/*.py")):
        text = file.read_text()
        assert "import pyplot" not in text and "matplotlib.pyplot" not in text
        assert ("savefig(" in text) == (file.name == "drawing.py"), file
        # Its import may fail, and is a quarter of what dnntk's takes.
        assert not re.search(r"^(from|import) matplotlib", text, re.MULTILINE), file


RUN = """
import dataclasses, os, sys
from pathlib import Path
import numpy as np
import dnntk
from dnntk import figures
from dnntk.data.datasets import load_dataset

def drawn(name, backend):
    os.environ["MPLBACKEND"] = backend
    figures.draw(Path(name), figures.confusion_figure, np.eye(1), "a", "title")
    import matplotlib
    assert matplotlib.rcParams["text.usetex"] and "matplotlib.pyplot" not in sys.modules
    return matplotlib.get_backend(auto_select=False)

assert "matplotlib" not in sys.modules and sys.stderr is None
if not os.fork():
    assert drawn("child", "module://nothing") == "module://nothing"
    os._exit(0)
assert os.wait()[1] == 0
sys.modules["matplotlib"] = None
data = dataclasses.replace(load_dataset("digits"), classes=("$5_$", r"\frac"))
dnntk.train(dnntk.TrainConfig(depth=4, steps=2, time_step=0.1), "run", dataset=data)
assert Path("run/summary.json").exists() and not Path("run/loss.png").exists()
del sys.modules["matplotlib"]
drawn("parent", "nonsense")
"""


def test_a_process_with_nothing_that_pictures_and_bars_need_runs_to_its_end(tmp_path):
    (tmp_path / "rc").write_text("text.usetex: True\nsavefig.format: svg\n")
    settings = {"PYTHONPATH": str(ROOT), "MATPLOTLIBRC": str(tmp_path / "rc")}
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, RUN],
        cwd=tmp_path,
        env=os.environ | settings,
        timeout=300,
    )
    assert done.returncode == 0
    names = {file.name for file in tmp_path.iterdir()}
    assert {f"{who}.{kind}" for who in ("child", "parent") for kind in ("png", "pdf")} <= names


def test_numbers_in_mathematics_have_powers_of_ten():
    shown = {300: "300", 1e6: "10^{6}", 2.5e-7: r"2.5 \cdot 10^{-7}", math.inf: r"\infty"}
    assert {number: figures.in_math(number) for number in shown} == shown
