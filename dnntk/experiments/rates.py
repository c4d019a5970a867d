"""Section 5.1's test of the theorems: four measured quantities, each fitted as a power of depth."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["fit_power", "fit_trials", "fits", "means", "quantities"]

QUANTITIES = ("deviation", "movement", "sign_changes", "growth")


def quantities(run: dict[str, np.ndarray], limit: np.ndarray) -> dict[str, np.ndarray]:
    """The `QUANTITIES` whose rates are fitted: {name: [trials]}.

    The distance of two kernels is the RMS of their difference over the arc, over the limit's RMS.
    """

    def distance(kernels: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(np.mean((kernels - other) ** 2, -1) / np.mean(limit**2))

    gamma = run["gamma"] + np.nan_to_num(run["psi_2"])
    return {
        "deviation": distance(run["kernel"][0], limit[None]),
        "movement": distance(run["kernel"], run["kernel"][:1]).max(0),
        "sign_changes": run["sign_changes"].max(0),
        "growth": gamma[-1] / gamma[0] - 1,
    }


def fits(runs: list[tuple[int, dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Fit a power of depth to each of `QUANTITIES`; a run is (depth, result of `quantities`)."""
    return {
        quantity: fit_trials((depth, values[quantity]) for depth, values in runs)
        for quantity in QUANTITIES
    }


def fit_trials(runs: Iterable[tuple[int, np.ndarray]]) -> dict[str, float] | None:
    """`fit_power` of runs (depth, a value per trial); None if any value is 0 or has diverged.

    Leaving such values out would bias the fit.
    """
    points = [(depth, float(value)) for depth, values in runs for value in values]
    return fit_power(points) if all(0 < value < math.inf for _, value in points) else None


def fit_power(points: list[tuple[int, float]]) -> dict[str, float] | None:
    """Fit value = factor * depth^exponent; None for fewer than three depths.

    Ordinary least squares on logarithms, with the 95% interval of Student's t.
    """
    if len({depth for depth, _ in points}) < 3:
        return None
    depths, values = np.log10(np.array(points, dtype=float)).T
    line = stats.linregress(depths, values)
    half_width = stats.t.ppf(0.975, len(points) - 2) * line.stderr
    return {
        "exponent": float(line.slope),
        "low": float(line.slope - half_width),
        "high": float(line.slope + half_width),
        "factor": float(10**line.intercept),
    }


def means(values: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Mean of each quantity over the trials; None if a trial diverged, as JSON has no NaN."""
    averages = {name: float(np.mean(trials)) for name, trials in values.items()}
    return {name: value if math.isfinite(value) else None for name, value in averages.items()}
