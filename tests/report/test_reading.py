"""Files of runs, read whatever they hold: damaged, huge, long, or not there."""

import json
import os
import tracemalloc

import pytest
from report_pages import history, page_of, png, trained, write

from dnntk.report import reading

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
