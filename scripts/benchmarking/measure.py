"""Timing in turns, and rows of results: medians, ratios to a baseline, promises."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    *("Call", "Row", "busy_cores", "check_same", "machine", "measured"),
    *("promise", "set_baseline", "spread", "turns"),
]

Row = dict[str, Any]
Call = Callable[[], Any]
Samples = Sequence[float] | np.ndarray


def turns(repeats: int, *calls: Call, forget: bool = False) -> list[list[float]]:
    """Seconds of each call, in turn: A B A B ...; with ``forget`` every turn compiles again."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        if forget:
            jax.clear_caches()
        for call, kept in zip(calls, seconds, strict=True):
            begun = time.perf_counter()
            jax.block_until_ready(call())
            kept.append(time.perf_counter() - begun)
    return seconds


def check_same(found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference, relative to the largest value.

    Raises:
        RuntimeError: the difference is larger than ``tolerance``.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= tolerance:
        raise RuntimeError(
            f"work and baseline differ by {difference:.1e}, expected {tolerance:.1e}"
        )
    return difference


def measured(what: str, unit: str, samples: Samples) -> Row:
    """A row: a measured number, without a promise."""
    return {"what": what, "unit": unit, **spread(samples), "promise": None, "met": None}


def set_baseline(row: Row, name: str, samples: Samples) -> Row:
    """Add a baseline (``peer`` on disk) to a row, and the ratio of work to baseline per turn.

    A single sample of the baseline is compared with every turn.
    """
    row["peer"] = {"name": name, **spread(samples)}
    row["ratio"] = spread(np.divide(row["samples"], samples))
    return row


def promise(row: Row, words: str, met: Any) -> Row:
    """Add to a row what was promised of its number, and whether the promise is met."""
    row["promise"], row["met"] = words, bool(met)
    return row


def spread(samples: Samples) -> dict[str, Any]:
    """Median, quartiles and all samples."""
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "samples": [float(s) for s in samples],
    }


def machine() -> dict[str, Any]:
    """The machine, and its load."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg(),
    }


def busy_cores(seconds: float) -> float | None:
    """Cores that other processes keep busy while this process sleeps; None if not known."""
    before = _cpu_seconds()
    time.sleep(seconds)
    after = _cpu_seconds()
    return None if before is None or after is None else (after - before) / seconds


def _cpu_seconds() -> float | None:
    try:
        user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    except (OSError, ValueError):
        return None
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")
