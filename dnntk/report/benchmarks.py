"""Results of ``scripts/benchmark.py``: rows of a number, its baseline (peer) and promise."""

from typing import Any

from dnntk.report.markup import Html, table
from dnntk.report.values import ROWS, number, shown

__all__ = ["benchmark_table", "is_benchmark", "promises"]

HEAD = ["what", "median [quartiles]", "peer", "of the peer's", "promise", "met"]
MET = {True: "yes", False: "NO", None: "\u2013"}


def is_benchmark(content: Any) -> bool:
    """Does ``content`` have rows, and every row a measured number?"""
    rows = content.get("rows") if isinstance(content, dict) else None
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, dict) and {"what", "median"} <= row.keys() for row in rows)
    )


def benchmark_table(content: dict[str, Any], label: str) -> Html:
    """The benchmark's rows, as the script's own table shows them."""
    return table(HEAD, [_cells(row) for row in content["rows"][:ROWS]], label, set())


def promises(content: dict[str, Any]) -> tuple[int, int]:
    """(number of promises that are met, number of promises)."""
    met = [row.get("met") for row in content["rows"]]
    return sum(m is True for m in met), sum(isinstance(m, bool) for m in met)


def _cells(row: dict[str, Any]) -> list[str]:
    unit, peer, ratio = row.get("unit"), row.get("peer"), row.get("ratio")
    beside = row.get("peer_missing") or "\u2013"
    if isinstance(peer, dict):
        beside = f"{shown('', peer.get('name'))}: {_spread(peer, unit)}"
    return [
        shown("", row["what"]),
        _spread(row, unit),
        shown("", beside),
        _spread(ratio, "x") if isinstance(ratio, dict) else "\u2013",
        shown("", row.get("promise")),
        MET[met if isinstance(met := row.get("met"), bool) else None],
    ]


def _spread(spread: dict[str, Any], unit: Any) -> str:
    """Median and quartiles as text; bytes are shown in GB."""
    ends = spread.get("quartiles")
    given = [spread.get("median"), *(ends if isinstance(ends, list) else [])][:3]
    values = [v for value in given if (v := number(value)) is not None]
    if not values:
        return "\u2013"
    if unit == "bytes":
        values, unit = [value / 1e9 for value in values], "GB"
    middle, *around = (f"{value:.3g}" for value in values)
    samples = spread.get("samples")
    single = isinstance(samples, list) and len(samples) < 2
    quartiles = "" if single or len(around) < 2 else f" [{', '.join(around)}]"
    return f"{middle} {shown('', unit)}{quartiles}"
