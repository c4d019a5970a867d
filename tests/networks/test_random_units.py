"""The draws of the layers' random units: each exactly Gaussian, together more even."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import qmc

from dnntk import DeepNarrowCNN, DeepNarrowMLP
from dnntk.data.datasets import load_dataset
from dnntk.kernel import limit_ntk
from dnntk.networks import random_units
from dnntk.networks.random_units import FEATURES
from dnntk.ntk.random_features import RandomFeatures

QUASI_RANDOM = FEATURES[1:]


@functools.cache
def points(features, count, dimensions, seed=0, dtype="float32"):
    """(u, v) / (rho, beta) of the middle layers and then of the first: [count, dimensions]."""
    draw = jax.jit(random_units.random_units, static_argnums=range(1, 8))
    d_in, key = dimensions - 1, jax.random.key(seed)
    units = draw(key, features, count + 1, d_in, (), d_in**0.5, 1.0, np.dtype(dtype))
    units = jax.tree.map(np.asarray, units)
    middle = np.column_stack([units["middle"]["kernel"], units["middle"]["bias"]])
    return np.vstack([middle, np.append(units["first"]["kernel"], units["first"]["bias"])])


def test_gaussian_units_are_the_ones_that_seeds_and_checkpoints_have():
    key = jax.random.key(4)
    found = random_units.random_units(key, "gaussian", 6, 2, (3, 3), 0.5, 0.3, np.float32)
    for name, lead, own in zip(("first", "middle"), ((), (4,)), jax.random.split(key), strict=True):
        for part, deviation, shape, one in zip(
            ("kernel", "bias"), (0.5, 0.3), ((3, 3, 2), ()), jax.random.split(own), strict=True
        ):
            expected = deviation * jax.random.normal(one, (*lead, *shape))
            np.testing.assert_array_equal(found[name][part], expected)


@pytest.mark.parametrize("features", QUASI_RANDOM)
def test_units_have_the_stated_deviations_and_a_normal_distribution(features):
    rho, beta, depth = 0.5, 0.7, 2050
    model = DeepNarrowCNN(depth, 1, 9.0, rho, beta, features=features)
    units = jax.jit(model.init)(jax.random.key(1), np.ones((1, 3, 3, 2)))["initial"]["middle"]
    assert units["kernel"].shape == (2048, 3, 3, 2) and units["bias"].shape == (2048,)
    for values, deviation in ((units["kernel"], rho), (units["bias"], beta)):
        z = np.ravel(values) / deviation
        # Five standard errors of half as many independent normal values: pairs count once.
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            assert abs(np.mean(z**power) - moment) < 5 * np.sqrt(variance / (z.size / 2))


def test_antithetic_units_come_in_pairs():
    z = points("antithetic", 7, 3)
    np.testing.assert_array_equal(z[1::2], -z[:-1:2])
    assert len(np.unique(np.abs(z))) == 12


def test_orthogonal_units_come_in_blocks_and_their_negatives():
    z = points("orthogonal", 26, 5)
    np.testing.assert_array_equal(z[5:10], -z[:5])
    for block in (z[:5], z[10:15], z[20:25]):
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=2e-6 * gram.max())
        assert np.ptp(np.diag(gram)) > 0.1
    # Uniform over all rotations: the first unit's first number has either sign.
    assert len({points("orthogonal", 26, 5, seed)[0, 0] > 0 for seed in range(5)}) == 2


def test_sobol_directions_make_scipys_sequence():
    numbers = random_units.directions(40, 6)
    index = np.arange(64)[:, None]
    gray = index ^ index >> 1
    bits = (gray >> np.arange(6) & 1).astype(np.uint32)
    found = np.bitwise_xor.reduce(bits[:, None] * numbers, axis=2)
    expected = qmc.Sobol(40, scramble=False).random(64)
    np.testing.assert_array_equal(np.ldexp(found.astype(float), -32), expected)


def test_sobol_points_are_evenly_spread():
    uniform = ndtr(points("sobol", 65, 12).astype(np.float64))[:64]
    # Sixty-four points: one in each of as many intervals, in every dimension, and in each of 8 x 8
    # squares of the sequence's first two: v, then u's first.
    assert (np.sort(np.floor(64 * uniform), axis=0) == np.arange(64)[:, None]).all()
    v, u = (np.floor(8 * uniform[:, column]) for column in (-1, 0))
    assert len(set(zip(v, u, strict=True))) == 64


def test_normal_quantiles_are_finite_and_symmetric():
    fractions = np.array([0, 1, 2**20, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    found = random_units._normal(fractions, np.float32)
    expected = ndtri((np.minimum(fractions, ~fractions) + 0.5) / 2**32)
    np.testing.assert_allclose(
        found, np.where(fractions < 2**31, expected, -expected), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("features", QUASI_RANDOM)
def test_layers_of_several_units_have_the_points_of_as_many_layers(features):
    draw = functools.partial(random_units.random_units, jax.random.key(3), features)
    wide = draw(5, 2, (3, 3), 0.5, 0.7, np.float32, 4)
    deep = draw(17, 2, (3, 3), 0.5, 0.7, np.float32)["middle"]
    for name, shape in (("kernel", (3, 3, 2)), ("bias", ())):
        assert wide["first"][name].shape == (*shape, 4)
        assert wide["middle"][name].shape == (3, *shape, 4)
        units = np.concatenate([wide["middle"][name], wide["first"][name][None]])
        units = np.moveaxis(units, -1, 1).reshape(16, *shape)
        np.testing.assert_allclose(units[:15], deep[name] / 2, rtol=1e-6)  # over sqrt(4)


def test_several_independent_units_have_the_stated_deviation():
    units = random_units.random_units(
        jax.random.key(0), "gaussian", 402, 4, (), 2.0, 0.5, np.float32, 4
    )["middle"]
    assert units["kernel"].shape == (400, 4, 4) and units["bias"].shape == (400, 4)
    for values, deviation in ((units["kernel"], 0.5), (units["bias"], 0.25)):
        assert abs(np.std(values) / deviation - 1) < 5 / np.sqrt(2 * values.size)


@pytest.mark.parametrize("features", QUASI_RANDOM)
def test_a_seed_gives_one_draw_also_beside_others(features):
    model, x = DeepNarrowMLP(12, 1, 2.0, features=features), np.ones((1, 2), np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    init = lambda key: model.init(key, x)["initial"]  # noqa: E731
    first, second = map(jax.jit(init), keys)
    both = jax.jit(jax.vmap(init))(keys)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose([a, b], c, 1e-5), first, second, both)
    assert not (first["middle"]["bias"] == second["middle"]["bias"]).any()


def test_sobol_units_are_one_draw_in_either_dtype(x64):
    np.testing.assert_allclose(
        points("sobol", 65, 3), points("sobol", 65, 3, dtype="float64"), rtol=2e-6, atol=1e-6
    )


def test_sobol_layers_stand_nearer_to_the_limit(x64):
    x = load_dataset("toy").x_train[::10].astype(np.float64)
    limit = limit_ntk(x)

    def distance(features):
        model = DeepNarrowMLP(256, 1, np.inf, features=features)
        init = jax.jit(model.init)
        kernels = (RandomFeatures(model, init(jax.random.key(s), x[:1]))(x, x) for s in range(3))
        return np.sqrt(np.mean([np.sum((kernel - limit) ** 2) for kernel in kernels]))

    assert 3 * distance("sobol") < distance("gaussian")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": "halton"}, "features: expected one of gaussian, .*, got 'halton'$"),
        ({"features": "sobol", "init": "he_uniform"}, "features: expected 'gaussian' with init="),
        ({"random_units": 0}, "random_units: expected an integer of at least 1, got 0"),
        ({"random_units": 2, "init": "he_uniform"}, "random_units: expected 1 with .*, got 2"),
    ],
)
def test_other_draws_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeepNarrowMLP(4, 1, 1.0, **fields)


def test_inputs_beyond_the_sequence_are_refused():
    model = DeepNarrowMLP(4, 1, 1.0, features="sobol")
    with pytest.raises(ValueError, match="features: sobol has 21,201 numbers .* need 21,202; pool"):
        jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 21_201)))


def test_orthogonal_units_up_to_sign_come_in_blocks_without_negatives():
    z = np.asarray(random_units.units_up_to_sign(jax.random.key(0), "orthogonal", 5, 3, np.float32))
    assert z.shape == (5, 3)
    for block in (z[:3], z[3:]):
        products = block @ block.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-6)
    cosines = (
        z[:3] @ z[3:].T / np.linalg.norm(z[:3], axis=1)[:, None] / np.linalg.norm(z[3:], axis=1)
    )
    assert np.abs(cosines).max() < 0.999
