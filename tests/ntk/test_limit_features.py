"""Features of the limit kernel: their mean over units, written out, and how fast they reach it."""

import math

import jax
import numpy as np
import pytest
from scipy import signal

from dnntk.kernel import limit_ntk
from dnntk.ntk.limit_features import draw_units, limit_features

RNG = np.random.default_rng(0)
MOST = 4096


def random_part(x, units, rho, beta):
    """sum over units of relu relu, less its mean's bilinear part: written out for an MLP."""
    g = x @ units["kernel"].T + units["bias"]
    relu = np.maximum(g, 0) - g / 2
    bilinear = (rho**2 * x @ x.T / x.shape[1] + beta**2) / 4
    return relu @ relu.T / len(units["bias"]) + bilinear


def test_products_are_the_limit_with_an_average_over_the_units(x64):
    x, key = RNG.normal(size=(5, 3)), jax.random.key(0)
    units = jax.device_get(draw_units(key, "gaussian", 7, (3,), 0.7, 0.4, np.dtype("float64")))
    phi = jax.jit(limit_features, static_argnums=4)(x, units, 0.7, 0.4, 2)
    assert phi.shape == (5, 3 + 1 + 7)
    np.testing.assert_allclose(
        phi @ phi.T, x @ x.T + 2 + random_part(x, units, 0.7, 0.4), rtol=1e-12
    )


def test_a_cnns_features_are_its_maps_means_in_every_shift(x64):
    x = RNG.normal(size=(2, 4, 3, 2))
    units = draw_units(jax.random.key(1), "gaussian", 2, (3, 3, 2), 0.7, 0.4, np.dtype("float64"))
    units = jax.device_get(units)
    phi = np.asarray(jax.jit(limit_features, static_argnums=4)(x, units, 0.7, 0.4, 3))
    assert phi.shape == (2, 9 * (2 + 9 * 2 + 2) + 1)
    for image, features in zip(x, phi[:, -18:].reshape(2, 9, 2), strict=True):
        for unit in range(2):
            correlate = lambda c: signal.correlate2d(image[..., c], kernel[..., c], "same")  # noqa: B023, E731
            kernel = units["kernel"][unit]
            size = np.abs(correlate(0) + correlate(1) + units["bias"][unit]) / 2
            shifted = [
                size[max(0, -i) : 4 - max(0, i), max(0, -j) : 3 - max(0, j)].sum() / 12
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
            np.testing.assert_allclose(features[:, unit] * math.sqrt(2), shifted, rtol=1e-12)


@pytest.mark.parametrize(
    ("features", "low", "high"), [("gaussian", -0.65, -0.35), ("sobol", -1.15, -0.85)]
)
def test_the_error_falls_with_the_units_at_the_rate_of_their_draw(features, low, high, x64):
    x = RNG.normal(size=(12, 2))
    exact = np.asarray(limit_ntk(x, rho=2.0))
    counts, errors = 2 ** np.arange(6, 13, 2), []
    for seed in range(6):
        units = draw_units(
            jax.random.key(seed), features, MOST, (2,), 2.0, 1.0, np.dtype("float64")
        )
        units = jax.device_get(units)  # the first units of a draw are a draw of fewer
        parts = [{name: u[:m] for name, u in units.items()} for m in counts]
        found = [x @ x.T + 1 + random_part(x, part, 2.0, 1.0) for part in parts]
        errors.append([np.linalg.norm(k - exact) / np.linalg.norm(exact) for k in found])
    rms = np.sqrt(np.mean(np.square(errors), 0))
    slope = np.polyfit(np.log(counts), np.log(rms), 1)[0]
    assert low < slope < high
    assert rms[-1] < (0.02 if features == "gaussian" else 5e-4)
