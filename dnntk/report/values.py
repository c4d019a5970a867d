"""The content of a JSON file as HTML tables, whatever the experiment that wrote it.

A mapping of plain values becomes a table of two columns. A list or a mapping of mappings becomes a
table with one row per mapping. Deeper content gets a heading with its own tables below.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from dnntk.report.markup import Html, joined, table, tag

__all__ = [
    "cut",
    "duration",
    "mapping",
    "number",
    "properties",
    "records",
    "rendered",
    "shown",
    "thinned",
    "title",
]

ROWS, COLUMNS, LISTED, CHARACTERS = 200, 40, 12, 500
# Most levels of nested mappings; experiments write fewer.
LEVELS = 5
WORDS = {"ntk": "NTK", "cnn": "CNN", "mlp": "MLP", "mse": "MSE"}
Mapping = dict[str, Any]


def title(name: str) -> str:
    """``test_loss`` -> ``test loss``."""
    return " ".join(WORDS.get(word, word) for word in str(name)[:CHARACTERS].split("_"))


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Differences of larger numbers overflow; a larger integer may not fit a float.
    return float(value) if abs(value) < 1e300 else None


def shown(name: str, value: Any) -> str:
    """A value as a cell shows it; the unit follows from the last word of ``name``."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        inside = [shown(name, v) if _plain(v) else "\u2026" for v in value[:LISTED]]
        more = f", \u2026 ({len(value):,} in all)" if len(value) > LISTED else ""
        return cut(", ".join(inside) + more)
    if isinstance(value, dict):
        inside = [f"{title(n)} {shown(n, v) if _plain(v) else '…'}" for n, v in value.items()]
        return cut("; ".join(inside[:LISTED]))
    if (finite := number(value)) is None:
        return cut(str(value))
    return _measured(name, finite, isinstance(value, int))


def _measured(name: str, value: float, whole: bool) -> str:
    unit = re.split(r"[_.]", name)[-1]
    if unit == "accuracy" and 0 <= value <= 1:
        return f"{100 * value:.2f}%"
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"
    if unit == "seconds":
        return duration(value)
    if (whole or value == int(value)) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def duration(seconds: float) -> str:
    """``0.012 s``, ``21.3 s``, ``4 min 5 s``, ``3 h 20 min``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def properties(content: Mapping, label: str, named: Callable[[str], str] = title) -> Html:
    """A table of names, as ``named`` writes them, and values; nested names are ``name.name``."""
    flat = list(_flat(content, LEVELS).items())
    rows = [[named(name), shown(name, value)] for name, value in flat[:ROWS]]
    return joined(table(["name", "value"], rows, label, set()), _left_out(len(flat), "values"))


def records(rows: Sequence[Mapping], label: str) -> Html:
    """A table with one row per mapping, and a column for every name in any mapping."""
    few = thinned(rows, ROWS)
    flat = [_flat(row, 2) for row in few]
    names = list(dict.fromkeys(name for row in flat for name in row))
    names = [name for name in names if any(row.get(name) is not None for row in flat)] or names
    kept = names[:COLUMNS]
    cells = [[shown(n, row[n]) if n in row else "" for n in kept] for row in flat]
    # The first column is the row's name.
    numeric = {i for i, n in enumerate(kept) if i and _is_numeric([row.get(n) for row in flat])}
    heads = [title(name.replace(".", " ")) for name in kept]
    return joined(
        table(heads, cells, label, numeric),
        _left_out(len(rows), "rows", evenly=True),
        _left_out(len(names), "columns", COLUMNS),
    )


def rendered(name: str, value: Any, level: int = 3) -> Html:
    """A part of a file under its own heading, whose ``level`` is 3 to 6."""
    heading = tag(f"h{min(level, 6)}", title(name))
    if isinstance(value, dict):
        return joined(heading, mapping(title(name), value, level))
    if _is_records(value):
        return joined(heading, records(value, title(name)))
    return joined(heading, tag("p", shown(name, value)))


def mapping(label: str, content: Mapping, level: int = 3) -> Html:
    """A mapping without a heading: plain values first, then the others, each with a heading."""
    if not content:
        return tag("p", "empty")
    if _is_table(content):
        rows = [{"": name, **(row or {})} for name, row in content.items()]
        return records(rows, label)
    deep = {n: v for n, v in content.items() if isinstance(v, dict) or _is_records(v)}
    plain = {n: v for n, v in content.items() if n not in deep}
    parts = [properties(plain, label)] if plain else []
    if level >= 3 + LEVELS:
        return joined(*parts, tag("p", shown(label, deep)))
    parts += [rendered(name, value, level + 1) for name, value in list(deep.items())[:ROWS]]
    return joined(*parts, _left_out(len(deep), "parts"))


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` rows, evenly chosen, with the first and the last row."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _flat(content: Mapping, levels: int) -> Mapping:
    """Nested mappings as ``name.name``, down to ``levels``."""
    flat: Mapping = {}
    for name, value in content.items():
        if isinstance(value, dict) and value and levels > 1:
            flat |= {f"{name}.{inner}": v for inner, v in _flat(value, levels - 1).items()}
        else:
            flat[name] = value
    return flat


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_table(content: Mapping) -> bool:
    """Are all values mappings of plain values or None, and at least two values mappings?"""
    rows = [row for row in content.values() if isinstance(row, dict)]
    return (
        len(rows) >= 2
        and all(row is None or isinstance(row, dict) for row in content.values())
        and all(_plain(value) for row in rows for value in row.values())
    )


def _is_numeric(values: list[Any]) -> bool:
    return all(v is None or v in ("inf", "nan", math.inf) or number(v) is not None for v in values)


def _plain(value: Any) -> bool:
    return not isinstance(value, dict | list)


def cut(text: str) -> str:
    """The text, cut to the most characters that a cell shows."""
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "\u2026"


def _left_out(count: int, what: str, most: int = ROWS, evenly: bool = False) -> Html:
    if count <= most:
        return Html()
    which = "evenly chosen" if evenly else "the first"
    return tag("p", f"{most} of {count:,} {what} shown, {which}.", class_="note")
