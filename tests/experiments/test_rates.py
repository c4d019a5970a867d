"""Powers of depth, fitted to what was measured."""

import numpy as np
from scipy import stats

from dnntk.experiments import rates


def test_a_fitted_power_is_found_within_its_interval():
    rng = np.random.default_rng(0)
    depths = np.repeat([10, 100, 1000, 10_000], 10)
    covered = 0
    for _ in range(200):
        values = 3 * depths**-0.5 * np.exp(0.3 * rng.standard_normal(depths.size))
        fit = rates.fit_power(list(zip(depths.tolist(), values.tolist(), strict=True)))
        covered += fit["low"] < -0.5 < fit["high"]
    assert 0.9 < covered / 200 < 0.99
    assert rates.fit_power([(10, 1.0), (100, 0.5)]) is rates.fit_power([]) is None


def test_powers_of_two_variables_are_found_together_whatever_their_places():
    rng = np.random.default_rng(0)
    depths, scales = np.repeat([100, 300, 1000, 300], 25), np.tile([1.0, 10, 100, 1000, 1e4], 20)
    values = 3 * depths**-0.5 * scales**2.0 * np.exp(0.3 * rng.standard_normal(100))
    fit = rates.fit_powers({"depth": depths, "scale": scales}, values)
    assert fit["depth"]["low"] < -0.5 < fit["depth"]["high"] < 0 and 1 < fit["factor"] < 9
    assert 1.95 < fit["scale"]["low"] < 2 < fit["scale"]["high"]
    assert rates.fit_powers({"depth": depths, "scale": depths**2.2}, values) is None
    assert rates.fit_powers({"depth": depths, "scale": np.minimum(scales, 10)}, values) is None


def test_as_many_values_as_powers_leave_no_interval():
    variables = {"depth": np.array([1.0, 2, 3]), "scale": np.array([1.0, 5, 2])}
    assert rates.fit_powers(variables, np.ones(3)) is None
    assert rates.fit_powers({"depth": variables["depth"]}, np.array([1.0, 2, 4])) is not None


def test_the_jackknife_of_a_mean_is_student_s_interval():
    values = np.random.default_rng(0).normal(size=10)
    others = (values.sum() - values) / 9
    low, high = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    np.testing.assert_allclose(rates.jackknife(others), (high - low) / 2)


def test_values_of_the_same_draw_do_not_make_an_interval_narrower():
    depths, scales = np.repeat([100, 300, 1000.0], 40), np.tile([1.0, 10, 100, 1000], 30)
    draws, rng, covered = np.arange(120) // 4, np.random.default_rng(0), np.zeros(2)
    for _ in range(100):
        noise = rng.standard_normal(30)[draws]  # of four values alike
        values = depths**-1.0 * np.exp(noise)
        for i, given in enumerate((draws, None)):
            fit = rates.fit_powers({"depth": depths, "scale": scales}, values, given)
            covered[i] += fit["depth"]["low"] < -1 < fit["depth"]["high"]
    assert covered[0] > 85 and covered[1] < 75


def test_powers_of_counts_are_those_of_their_means_although_most_are_0():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    variables = {"depth": np.repeat([100, 500, 2500], 40), "scale": np.tile([3.0, 10, 30, 100], 30)}
    means, draws = 0.02 * variables["depth"] / variables["scale"] ** 2, np.arange(120)
    for _ in range(20):
        fit = rates.fit_counts(variables, rng.poisson(means), draws)
        covered += [fit[n]["low"] < p < fit[n]["high"] for n, p in (("depth", 1), ("scale", -2))]
    assert (covered > 16).all()
    # Counts at one depth, or none at all, tell nothing.
    assert rates.fit_counts(variables, 1.0 * (variables["depth"] == 500), draws) is None
    assert rates.fit_counts(variables, np.zeros(120), draws) is None


def test_quantities_are_relative_to_the_limit_and_the_start():
    limit, start = np.array([2.0, 2.0]), np.array([[2.0, 2.0], [3.0, 1.0]])  # two trials
    run = {
        "kernel": np.stack([start, start + 1, start]),
        "gamma": np.array([[1.0, 2.0], [0.0, 0.0], [4.0, 2.0]]),
        "psi_2": np.array([[1.0, np.nan], [np.nan, np.nan], [2.0, np.nan]]),
        "sign_changes": np.array([[0.0, 0.0], [0.5, 0.1], [0.2, 0.3]]),
    }
    found = rates.quantities(run, limit)
    assert set(found) == set(rates.QUANTITIES)
    np.testing.assert_allclose(found["deviation"], [0, 0.5])
    np.testing.assert_allclose(found["movement"], [0.5, 0.5])
    np.testing.assert_allclose(found["sign_changes"], [0.5, 0.3])
    np.testing.assert_allclose(found["growth"], [2, 0])
    diverged = found | {"growth": np.array([1.0, np.inf])}
    assert rates.means(diverged)["growth"] is None and rates.means(diverged)["deviation"] == 0.25
    fits = rates.fits([(depth, diverged) for depth in (4, 8, 16)])
    assert abs(fits["movement"]["exponent"]) < 1e-12
    assert fits["growth"] is fits["deviation"] is None  # infinite, and 0


def test_a_crossing_lies_between_two_depths():
    depths = np.array([10, 100, 1000])
    values = np.array([[1.0, 1.0, 0.1, 9.0, 1.0], [0.01, 0.0, 1.0, 9.0, 0.5], [1, 1, 1, 9, 0.1]])
    found = rates.crossing(depths, values, 0.1)
    # Halfway; a 0 counts as 1% of the level; below it at once; never; at a depth.
    np.testing.assert_allclose(found, [10**1.5, 10 ** (4 / 3), 10, np.inf, 1000])
    assert rates.crossing(depths, values[:, 0], 0.1) == found[0]
