"""Any JSON value as text and tables."""

import random

from report_pages import EVIL, page_of, write

from dnntk.report import values


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
