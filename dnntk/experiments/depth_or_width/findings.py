"""The findings of the experiment: means over trials, and sentences computed from them.

The error of a difference of two accuracies has two parts: the standard errors over initializations,
and those of an accuracy p on n test images, sqrt(p (1 - p) / n). Both networks have the same test
images, so this overestimates the error. A network is ahead if it leads by more than twice that.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["difference", "points", "statements"]

Row = dict[str, Any]

KEYS = ("part", "dataset", "rule", "depth", "scale", "width", "parameters")
MEASURED = (
    *("test_accuracy", "test_loss", "train_accuracy", "train_loss", "seconds"),
    *("movement", "alignment"),
)
RULES = {"theorem": "deep, C = L^2.2", "small": "deep, small C", "wide": "wide"}
CLOCKS = {"equal": "at the same t", "matched": "by the matched clock"}
# A kernel that has moved by more counts as changed.
STILL = 0.1


def points(rows: Iterable[Row]) -> list[Row]:
    """Average rows over the trials: one mean row per network, clock and time.

    Returns:
        `KEYS`, ``clock``, ``time``, ``trials`` and, of every quantity that all trials measured, its
        mean and ``..._error``, the standard error, None for a single trial. Also ``start``, the
        mean alignment before training, and ``halvings``, the largest of all trials. Runs that
        diverged with every step size are left out.
    """
    groups: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for row in rows:
        for record in row["records"]:
            key = (*(row[k] for k in KEYS), record["clock"], record["time"])
            groups.setdefault(key, []).append((row, record))
    return [_point(key, members) for key, members in groups.items()]


def _point(key: tuple[Any, ...], members: list[tuple[Row, Row]]) -> Row:
    point: Row = dict(zip((*KEYS, "clock", "time"), key, strict=True))
    point["trials"] = len(members)
    point["start"] = float(np.mean([row["alignment"] for row, _ in members]))
    point["halvings"] = max(row["halvings"] for row, _ in members)
    for name in MEASURED:
        if all(name in record for _, record in members):
            values = np.array([record[name] for _, record in members])
            error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
            point |= {name: float(values.mean()), f"{name}_error": error}
    return point


def statements(
    means: list[Row], limits: dict[str, dict[str, Any]], test_examples: dict[str, int]
) -> list[str]:
    """Sentences computed from the numbers.

    Args:
        means: the rows of `points`.
        limits: by dataset, as in `dnntk.experiments.depth_or_width.experiment.DepthOrWidth`.
        test_examples: number of test examples by dataset.
    """
    said = []
    for dataset, limit in limits.items():
        mine = [p for p in means if p["part"] == "size" and p["dataset"] == dataset]
        said += _limits(dataset, limit, test_examples[dataset])
        said += _sides(dataset, mine, test_examples[dataset])
        said += _movements(dataset, mine)
        said += _seconds(dataset, mine)
    return said + _regime([p for p in means if p["part"] == "regime"])


def difference(one: Row, other: Row, examples: int) -> tuple[float, float]:
    """``one``'s test accuracy minus ``other``'s, and the error (see the module's docstring)."""
    variance = 0.0
    for point in (one, other):
        p = point["test_accuracy"]
        variance += (point.get("test_accuracy_error") or 0.0) ** 2 + p * (1 - p) / examples
    return one["test_accuracy"] - other["test_accuracy"], math.sqrt(variance)


def _verdict(differences: list[tuple[float, float]], names: tuple[str, str]) -> str:
    ahead = sum(d > 2 * e for d, e in differences)
    behind = sum(d < -2 * e for d, e in differences)
    total = len(differences)
    if not ahead and not behind:
        return "no difference beyond twice the error"
    leads = [
        f"{n} ahead at {k} of {total}" for n, k in zip(names, (ahead, behind), strict=True) if k
    ]
    return "; ".join(leads) + " beyond twice the error"


def _limits(dataset: str, limit: dict[str, Any], examples: int) -> list[str]:
    said = []
    deep = {line["time"]: line for line in limit["deep"]["records"]}
    for clock, words in CLOCKS.items():
        wide = {line["time"]: line for line in limit["wide"]["records"] if line["clock"] == clock}
        shown = ", ".join(f"{_percent(deep[t])} and {_percent(wide[t])} at t = {t:g}" for t in deep)
        pairs = [difference(deep[t], wide[t], examples) for t in deep]
        verdict = _verdict(pairs, ("infinite depth", "infinite width"))
        said.append(
            f"{dataset}, limits {words}: infinite depth and infinite width reach {shown}: {verdict}"
        )
    names = {"deep": "infinite depth", "wide": "infinite width", "linear": "linear control"}
    best = {n: max(limit[n]["curve"], key=lambda p: p["test_accuracy"]) for n in names}
    shown = ", ".join(
        f"{_percent(best[n])} at t = {best[n]['time']:.3g} ({name})" for n, name in names.items()
    )
    said.append(
        f"{dataset}, limits up to t = {limit['deep']['curve'][-1]['time']:.3g}: best test accuracy "
        f"{shown}; the matched clock runs {limit['ratio']:.3g} times as fast for width"
    )
    linear = {line["time"]: line for line in limit["linear"]["records"]}
    shown = ", ".join(f"{_percent(deep[t])} and {_percent(linear[t])} at t = {t:g}" for t in deep)
    pairs = [difference(deep[t], linear[t], examples) for t in deep]
    said.append(
        f"{dataset}, infinite depth and the linear control (its kernel without random features, "
        f"x.x' + d_out) reach {shown}: {_verdict(pairs, ('infinite depth', 'linear control'))}"
    )
    return said


def _sides(dataset: str, means: list[Row], examples: int) -> list[str]:
    """Deep against wide at all parameter counts: one sentence per rule, clock and time."""
    said = []
    for rule in ("theorem", "small"):
        for clock, words in CLOCKS.items():
            for t in sorted({p["time"] for p in means}):
                deep = _by_depth(means, rule, "equal", t)
                wide = _by_depth(means, "wide", clock, t)
                depths = [d for d in deep if d in wide]
                if not depths:
                    continue
                pairs = [difference(deep[d], wide[d], examples) for d in depths]
                shown = ", ".join(
                    f"{100 * gap:+.1f} +- {100 * error:.1f} ({deep[d]['parameters']:,})"
                    for d, (gap, error) in zip(depths, pairs, strict=True)
                )
                said.append(
                    f"{dataset}, t = {t:g}, {RULES[rule]} less wide {words}, points of test "
                    f"accuracy (parameters): {shown}: {_verdict(pairs, ('deep', 'wide'))}"
                )
    return said


def _by_depth(means: list[Row], rule: str, clock: str, t: float) -> dict[int, Row]:
    chosen = [p for p in means if (p["rule"], p["clock"], p["time"]) == (rule, clock, t)]
    return {p["depth"]: p for p in sorted(chosen, key=lambda p: p["depth"])}


def _movements(dataset: str, means: list[Row]) -> list[str]:
    said = []
    for rule, name in RULES.items():
        for clock, words in CLOCKS.items():
            mine = [p for p in means if p["rule"] == rule and p["clock"] == clock]
            mine = sorted((p for p in mine if "movement" in p), key=lambda p: p["parameters"])
            if not mine:
                continue
            shown = ", ".join(f"{100 * p['movement']:.2g}% ({p['parameters']:,})" for p in mine)
            said.append(
                f"{dataset}, t = {mine[0]['time']:g} {words}, {name}: the kernel moved by {shown}"
            )
    return said


def _seconds(dataset: str, means: list[Row]) -> list[str]:
    said = []
    for rule, name in RULES.items():
        mine = [p for p in means if p["rule"] == rule and "movement" in p]
        mine = sorted(mine, key=lambda p: (p["clock"], p["parameters"]))
        if mine:
            shown = ", ".join(
                f"{p['seconds']:.1f} s ({p['parameters']:,}, {p['clock']})" for p in mine
            )
            said.append(f"{dataset}, seconds of steps, {name} (parameters, clock): {shown}")
    return said


def _regime(means: list[Row]) -> list[str]:
    mine = sorted((p for p in means if "movement" in p), key=lambda p: p["scale"])
    if not mine:
        return []
    least, most = mine[0], mine[-1]
    head = f"{least['dataset']}, depth {least['depth']}, t = {least['time']:g}"
    moved = [p["scale"] for p in mine if p["movement"] > STILL]
    said = [
        f"{head}: test accuracy "
        + ", ".join(f"{_percent(p)} (C = {p['scale']:.3g})" for p in mine),
        f"{head}: the kernel moved by "
        + ", ".join(f"{100 * p['movement']:.2g}% (C = {p['scale']:.3g})" for p in mine),
        f"{head}: alignment with the labels, before and after, "
        + ", ".join(f"{p['start']:.3f}, {p['alignment']:.3f} (C = {p['scale']:.3g})" for p in mine),
        f"{head}: from C = {most['scale']:g} to {least['scale']:g} test accuracy changes by "
        f"{100 * (least['test_accuracy'] - most['test_accuracy']):+.1f} points, alignment gains "
        f"{most['alignment'] - most['start']:+.3f} and {least['alignment'] - least['start']:+.3f}",
    ]
    if moved:
        said.append(f"{head}: the kernel moved by more than {STILL:.0%} at C <= {max(moved):.3g}")
    halved = [f"C = {p['scale']:.3g}: {p['halvings']}" for p in mine if p["halvings"]]
    said.append(f"{head}: steps halved after a divergence: {'; '.join(halved) or 'none'}")
    return said


def _percent(point: Row) -> str:
    return f"{100 * point['test_accuracy']:.1f}%"
