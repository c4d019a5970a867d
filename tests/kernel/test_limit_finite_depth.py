"""The limit kernel against two truths that share nothing with its closed form.

Monte-Carlo: the theorems' sum with the Gaussian features drawn, one loop a symbol. Finite
networks: the
mean NTK of seeds, whose expectation at initialization is known at every depth.
"""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

from dnntk import DeepNarrowCNN, DeepNarrowMLP, empirical_ntk
from dnntk.kernel import limit_ntk

# Shape of an input, filters, outputs, rho, beta.
CASES = [
    ((1,), 1, 1, 1.0, 1.0),
    ((1,), 1, 4, 2.0, 0.5),
    ((5,), 1, 3, 1.5, 0.7),
    ((12,), 1, 10, 1.0, 0.0),
    ((1, 1, 2), 3, 2, 0.7, 0.5),
    ((3, 3, 1), 3, 1, 3**-0.5, 1.0),
    ((4, 6, 2), 5, 3, 0.4, 0.9),
    ((3, 2, 3), 3, 2, 0.6, 0.4),
    ((2, 3, 1), 1, 2, 1.0, 0.3),
    ((4, 4, 1), 5, 1, 0.5, 0.6),
]
NETWORKS = [CASES[1], CASES[3], CASES[6], CASES[8]]
CHANCE = 4.5  # standard errors, for seeds that are fixed


def pair_of_inputs(shape):
    return np.random.default_rng(0).uniform(0.1, 1, size=(2, *shape))


def windows(shape, kernel_size):
    """Of each shift, the (position, shifted position) pairs that are both inside the image."""
    height, width = shape[:2]
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    return [
        [
            ((i, j), (i + s, j + t))
            for i, j in itertools.product(range(height), range(width))
            if 0 <= i + s < height and 0 <= j + t < width
        ]
        for s, t in itertools.product(reach, reach)
    ]


def patch(x, position, kernel_size):
    reach = kernel_size // 2
    i, j = position
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
    return padded[i : i + kernel_size, j : j + kernel_size].ravel()


# ---- Monte-Carlo


def relu_features(x, kernel_size, rho, beta, draws, rng_seed):
    """relu(u . x + v) of every draw: MLP [draws], CNN {position: [draws]}."""
    rng = np.random.default_rng(rng_seed)  # the same u and v for x and x'
    if x.ndim == 1:
        u = rng.normal(size=(draws, len(x))) * rho / np.sqrt(len(x))
        return np.maximum(u @ x + beta * rng.normal(size=draws), 0)
    u = rng.normal(size=(draws, kernel_size**2 * x.shape[2])) * rho
    v = beta * rng.normal(size=draws)
    positions = itertools.product(*map(range, x.shape[:2]))
    return {p: np.maximum(u @ patch(x, p, kernel_size) + v, 0) for p in positions}


def monte_carlo(x, y, features, kernel_size, d_out):
    """The limit's value at each draw, and that of the theorem as printed."""
    if x.ndim == 1:
        samples = features[0] * features[1] + x @ y
        return samples + d_out, samples + 1
    certain, random = 0.0, 0.0
    constant = 0
    for window in windows(x.shape, kernel_size):
        if window:
            sums = [sum(z[shifted] for _, shifted in window) for z in (x, y)]
            certain += sums[0] @ sums[1]
            constant += len(window) ** 2
            # The double sum over p, p' of a draw's products is the product of its sums.
            random += np.prod([sum(f[p] for p, _ in window) for f in features], 0)
    area = x.shape[0] * x.shape[1]
    samples = random + certain
    return (samples + d_out * constant) / area**2, (samples + constant) / area**2


@pytest.mark.parametrize(("shape", "kernel_size", "d_out", "rho", "beta"), CASES)
def test_limit_is_the_mean_over_gaussian_features(x64, shape, kernel_size, d_out, rho, beta):
    x, y = pair_of_inputs(shape)
    values = limit_ntk(np.stack([x, y]), rho=rho, beta=beta, d_out=d_out, kernel_size=kernel_size)
    features = [relu_features(z, kernel_size, rho, beta, 30_000, 1) for z in (x, y)]
    for index, inputs in (((0, 1), (x, y)), ((0, 0), (x, x))):
        samples, printed = monte_carlo(*inputs, [features[i] for i in index], kernel_size, d_out)
        error = CHANCE * samples.std() / np.sqrt(samples.size)
        value = float(values[index])
        assert abs(samples.mean() - value) < error
        assert error < 0.02 * value
        if d_out > 1:  # a constant of 1, as printed
            assert abs(printed.mean() - value) > 2 * error


# ---- finite networks


def window_sum_products(x, kernel_size):
    """The part of the kernel that only the inputs make: [n, n]."""
    if x.ndim == 2:
        return x @ x.T
    sums = [
        sum(x[:, i, j] for _, (i, j) in window)
        for window in windows(x.shape[1:], kernel_size)
        if window
    ]
    return sum(s @ s.T for s in sums) / (x.shape[1] * x.shape[2]) ** 2


def expected_ntk(x, options, rho, kernel_size, depth, scale):
    """The mean of the scaled NTK at initialization, exactly, at a finite depth and scale.

    Only weights and biases of output units count. Layers 2 to L read C times what the limit's
    layers read, and a bias of 1; layer 1 reads x and a bias of 1. The random unit of layer 1 reads
    x where the others read C x, so its weights are C times less.
    """
    kernel = partial(limit_ntk, x, kernel_size=kernel_size, **options)
    unscaled = window_sum_products(x, kernel_size) + 1 + (depth - 1)
    layers = (depth - 2) * kernel(rho=rho) + kernel(rho=rho / scale)
    return (layers + unscaled / scale**2) / depth


@pytest.mark.parametrize(("shape", "kernel_size", "d_out", "rho", "beta"), NETWORKS)
def test_limit_is_the_mean_over_finite_networks(x64, shape, kernel_size, d_out, rho, beta):
    x, depth, seeds = pair_of_inputs(shape), 100, 16
    scale = depth**2.2
    fields = {"depth": depth, "d_out": d_out, "scale": scale, "rho": rho, "beta": beta}
    fields["segment"] = depth  # compiles in half the time
    if len(shape) == 1:
        model = DeepNarrowMLP(**fields)
    else:
        model = DeepNarrowCNN(**fields, kernel_size=kernel_size)

    @jax.jit
    @jax.vmap
    def networks(key):
        return empirical_ntk(model, model.init(key, x), x)

    ntk = np.asarray(networks(jax.random.split(jax.random.key(0), seeds)))
    blocks = np.einsum("sijkk->sijk", ntk)
    other = ntk[..., ~np.eye(d_out, dtype=bool)]
    np.testing.assert_allclose(other, 0, atol=1e-12)
    np.testing.assert_allclose(blocks, blocks[..., :1] * np.ones(d_out), rtol=1e-12)
    sample = blocks[..., 0]
    options = {"beta": beta, "d_out": d_out}
    expected = expected_ntk(x, options, rho, kernel_size, depth, scale)
    # As improbable as CHANCE standard errors of a Gaussian.
    quantile = stats.t.isf(stats.norm.sf(CHANCE), seeds - 1)
    error = quantile * sample.std(0, ddof=1) / np.sqrt(seeds)
    np.testing.assert_array_less(abs(sample.mean(0) - expected), error)
    np.testing.assert_array_less(error, 0.15 * expected)
    if d_out > 1:  # a constant of 1, as printed
        options["d_out"] = 1
        printed = expected_ntk(x, options, rho, kernel_size, depth, scale)
        np.testing.assert_array_less(error, abs(sample.mean(0) - printed))
