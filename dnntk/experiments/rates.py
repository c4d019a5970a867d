"""Powers fitted to measurements, with 95% intervals; the four quantities of section 5.1."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

__all__ = [
    *("crossing", "fit_counts", "fit_power", "fit_powers", "fit_trials", "fits", "jackknife"),
    *("means", "quantities"),
]

LARGEST_LOG = 300.0  # above this exp would overflow
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


def fit_trials(runs: Iterable[tuple[float, np.ndarray]]) -> dict[str, float] | None:
    """`fit_power` of runs (depth, a value per trial); None if any value is 0 or has diverged.

    Leaving such values out would bias the fit.
    """
    points = [(depth, float(value)) for depth, values in runs for value in values]
    return fit_power(points) if all(0 < value < math.inf for _, value in points) else None


def fit_power(points: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Fit value = factor * depth^exponent; None for fewer than three depths.

    Ordinary least squares on logarithms, with the 95% interval of Student's t.
    """
    depths, values = np.reshape(np.array(points, dtype=float), (-1, 2)).T
    found = fit_powers({"depth": depths}, values)
    return None if found is None else found["depth"] | {"factor": found["factor"]}


def fit_powers(
    variables: dict[str, np.ndarray], values: np.ndarray, draws: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Fit value = factor * product of powers of the variables, as `fit_power` does for one.

    Args:
        variables: {name: [n]}, positive numbers.
        values: [n], positive.
        draws: [n], the number of each value's random draw: values of the same draw are not
            independent, and intervals are then by the sums of their errors. None: all are.

    Returns:
        {name: {"exponent", "low", "high"}} and "factor"; None if a variable has fewer than three
        values, or is a product of powers of the others, or if there are only as many values as
        powers and a factor, which leaves no error to tell.
    """
    if (design := _design(variables)) is None:
        return None
    inverse, logs = np.linalg.pinv(design), np.log(values)
    powers = inverse @ logs
    errors, count = logs - design @ powers, len(values)
    if draws is None and count == len(powers):
        return None
    if draws is None:
        variances = np.sum(errors**2) / (count - len(powers)) * np.sum(inverse**2, axis=1)
    else:
        variances, count = _clustered(inverse.T * errors[:, None], draws)
    return _with_intervals(variables, powers, variances, count)


def fit_counts(
    variables: dict[str, np.ndarray], counts: np.ndarray, draws: np.ndarray
) -> dict[str, Any] | None:
    """As `fit_powers`, of the means of counts, which may be 0.

    Poisson regression; the intervals are at least Poisson's. None also if the counts at all but one
    value of a variable are 0.
    """
    design, seen = _design(variables), counts > 0
    if design is None or any(len(np.unique(at[seen])) < 2 for at in variables.values()):
        return None

    def loss(powers: np.ndarray) -> tuple[float, np.ndarray]:
        logs = design @ powers
        expected = np.exp(np.minimum(logs, LARGEST_LOG))
        return float(np.sum(expected - counts * logs)), design.T @ (expected - counts)

    start = np.linalg.lstsq(design, np.log(counts + 0.5), rcond=None)[0]
    powers = optimize.minimize(loss, start, jac=True, method="BFGS").x
    expected = np.exp(design @ powers)
    covariance = np.linalg.pinv(design.T @ (expected[:, None] * design))
    variances, count = _clustered((counts - expected)[:, None] * design @ covariance, draws)
    return _with_intervals(variables, powers, np.maximum(variances, np.diag(covariance)), count)


def _clustered(influences: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, int]:
    """Variances of the powers, and the number of draws, from each value's share [n, powers]."""
    names = np.unique(draws)
    totals = np.stack([influences[draws == name].sum(axis=0) for name in names])
    freedom = len(names) / max(1, len(names) - influences.shape[1])
    return freedom * np.sum(totals**2, axis=0), len(names)


def _design(variables: dict[str, np.ndarray]) -> np.ndarray | None:
    """[n, 1 + variables], 1 and the logarithms; None if they determine no powers."""
    columns = [np.log(at.astype(float)) for at in variables.values()]
    design = np.stack([np.ones_like(columns[0]), *columns], axis=1)
    few = any(len(np.unique(column)) < 3 for column in columns)
    return None if few or np.linalg.matrix_rank(design) < design.shape[1] else design


def _with_intervals(
    names: Iterable[str], powers: np.ndarray, variances: np.ndarray, count: int
) -> dict[str, Any]:
    half_widths = stats.t.ppf(0.975, max(1, count - len(powers))) * np.sqrt(variances)
    found: dict[str, Any] = {
        name: {
            "exponent": float(power),
            "low": float(power - half_width),
            "high": float(power + half_width),
        }
        for name, power, half_width in zip(names, powers[1:], half_widths[1:], strict=True)
    }
    return found | {"factor": float(np.exp(powers[0]))}


def jackknife(values: np.ndarray) -> float:
    """Half-width of the 95% interval of a result, from its values with each trial left out."""
    others = len(values) - 1
    return float(stats.t.ppf(0.975, others) * np.sqrt(others * np.var(values)))


def crossing(depths: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """The depth at which values [D, ...] first fall to ``level``: [...].

    Interpolated on logarithmic scales between two of the ascending ``depths`` [D], where a value
    counts as at least 1% of the level: it may be 0. The result is the first depth if the values
    begin at or below the level, and infinity if they never fall to it.
    """
    logs = np.log(np.maximum(values / level, 0.01))
    after = np.argmax(logs <= 0, axis=0)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(logs, i[None], axis=0)[0] for i in (before, after))
    weight = np.where(before < after, high / np.where(high > low, high - low, 1), 0)
    found = depths[before] * (depths[after] / depths[before]) ** weight
    return np.where((logs > 0).all(axis=0), math.inf, found)


def means(values: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Mean of each quantity over the trials; None if a trial diverged, as JSON has no NaN."""
    averages = {name: float(np.mean(trials)) for name, trials in values.items()}
    return {name: value if math.isfinite(value) else None for name, value in averages.items()}
