import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.kernel import arccos, arccos0, arccos1

DTYPES = (np.float32, np.float64)


def test_arc_cosine_kernels_agree_with_monte_carlo():
    factors = np.array(
        [[1, 0, 1, 0], [1, 0, 0.3, 2], [1, 0, -0.9, 0.1], [2, 0, 0, 0.5], [1, 0, 3, 0.01]]
    )
    draws = np.random.default_rng(0).standard_normal((2, 400_000))
    for a, b, c, d in factors:
        x, y = a * draws[0] + b * draws[1], c * draws[0] + d * draws[1]
        moments = a * a + b * b, c * c + d * d, a * c + b * d
        relu = np.maximum(x, 0) * np.maximum(y, 0)
        step = (x > 0) & (y > 0)
        for sample, value in ((relu, arccos1(*moments)), (step, arccos0(*moments))):
            error = sample.std() / np.sqrt(sample.size)
            assert abs(sample.mean() - float(value)) < 4 * error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("sign", [1, -1])
def test_arc_cosine_kernels_are_accurate_to_rounding(x64, dtype, distance, sign):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 4))
    y = sign * (x + distance * rng.normal(size=x.shape)) * rng.uniform(0.3, 3, size=(200, 1))
    var_x, var_y, cov = (np.sum(a * b, 1).astype(dtype) for a, b in ((x, x), (y, y), (x, y)))
    # Exact in rational arithmetic up to the root, as float64 would cancel here.
    squares = [
        float(Fraction(float(a)) * Fraction(float(b)) - Fraction(float(c)) ** 2)
        for a, b, c in zip(var_x, var_y, cov, strict=True)
    ]
    sine, cov64 = np.sqrt(np.maximum(squares, 0)), cov.astype(np.float64)
    angle = np.arctan2(sine, cov64)
    root = np.sqrt(var_x.astype(np.float64) * var_y)
    value0, value1 = (jax.jit(f)(var_x, var_y, cov) for f in (arccos0, arccos1))
    assert value0.dtype == value1.dtype == dtype
    eps = np.finfo(dtype).eps
    expected = (sine + (np.pi - angle) * cov64) / (2 * np.pi)
    np.testing.assert_array_less(abs(value1 - expected), 4 * eps * root)
    # The sine's square is kept to one and a half times the digits: half of these are left at 0.
    np.testing.assert_allclose(value0, (np.pi - angle) / (2 * np.pi), rtol=0, atol=eps**0.75)


@pytest.mark.parametrize("order", [0, 1])
def test_polynomials_meet_their_error_bounds(order):
    y = np.linspace(0, 1, 4001)[1:].astype(np.longdouble)
    half = np.sqrt(y / 2)
    angle = 2 * np.arctan2(half, np.sqrt(1 - half**2))  # arccos(1 - y), without cancellation
    pi = np.arctan2(np.longdouble(0), np.longdouble(-1))
    exact = angle / (pi * np.sqrt(y))
    if order == 1:
        # sin t - t cos t by its power series, for the difference of the two cancels.
        terms = [
            (-1) ** (k + 1)
            * angle ** (2 * k + 1)
            * (np.longdouble(2 * k) / math.factorial(2 * k + 1))
            for k in range(1, 16)
        ]
        exact = sum(terms) / (pi * y * np.sqrt(y))
    for degree, bound in (((8, 2e-9), (17, 2e-16)), ((6, 6e-9), (16, 2e-16)))[order]:
        coefficients = np.array(arccos._polynomial(degree, order), np.longdouble)
        value = np.polynomial.polynomial.polyval(2 * y - 1, coefficients)
        assert np.max(abs(value - exact)) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_even_part_and_its_slope_are_accurate_to_rounding(x64, dtype):
    cosine = np.concatenate([np.linspace(-1, 1, 2001), 1 - np.logspace(-16, -3, 100)]).astype(dtype)
    c = cosine.astype(np.float64)
    with_slope = jax.jit(jax.vmap(jax.value_and_grad(arccos.even)))
    value, slope = with_slope(cosine)
    eps = np.finfo(dtype).eps
    expected = (np.sqrt((1 - c) * (1 + c)) + c * np.arcsin(c)) / np.pi
    np.testing.assert_allclose(value, expected, rtol=0, atol=2 * eps)
    np.testing.assert_allclose(slope, np.arcsin(c) / np.pi, rtol=0, atol=2 * eps)
    beyond = jnp.asarray([1 + 4 * eps, -1 - 4 * eps], dtype)
    value, slope = with_slope(beyond)
    np.testing.assert_allclose(value, 0.5, rtol=0, atol=eps)
    np.testing.assert_allclose(slope, [0.5, -0.5], atol=eps)


def test_arc_cosine_derivatives_agree_with_finite_differences(x64):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 30, 4))
    moments = [jnp.asarray(np.sum(a * b, 1)) for a, b in ((x, x), (y, y), (x, y))]
    step = 1e-6  # truncation step^2 and rounding eps / step, both below 1e-9
    for function, index in itertools.product((arccos0, arccos1), range(3)):
        total = jax.jit(lambda *m, f=function: f(*m).sum())
        gradient = jax.jit(jax.grad(total, argnums=index))(*moments)
        ahead, behind = ([*moments], [*moments])
        ahead[index], behind[index] = moments[index] + step, moments[index] - step
        difference = (jax.jit(function)(*ahead) - jax.jit(function)(*behind)) / (2 * step)
        np.testing.assert_allclose(gradient, difference, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arc_cosine_derivatives_where_they_are_singular(x64, dtype):
    """Columns: coincident, opposite, one variance 0, both 0."""
    moments = [
        jnp.asarray(m, dtype)
        for m in ([1.7, 3.0, 0.0, 0.0], [1.7, 3.0, 2.0, 0.0], [1.7, -3.0, 0, 0])
    ]
    np.testing.assert_allclose(arccos1(*moments), [0.85, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(arccos0(*moments), np.array([0.5, 0, 0.25, 0.25], dtype))
    gradients = jax.jit(jax.grad(lambda *m: arccos1(*m).sum(), argnums=(0, 1, 2)))(*moments)
    np.testing.assert_array_equal(gradients[2], np.array([0.5, 0, 0.25, 0.25], dtype))
    np.testing.assert_array_equal(np.stack(gradients[:2]), 0)
    for gradient in jax.jit(jax.grad(lambda *m: arccos0(*m).sum(), argnums=(0, 1, 2)))(*moments):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ((-1.0, 1.0, 0.0), ("var_x", "-1.0", "not be negative")),
        ((1.0, np.array([1.0, np.nan]), 0.0), ("var_y", "nan", "finite")),
        ((1.0, 1.0, np.inf), ("cov", "inf", "finite")),
        ((1.0, 4.0, -2.1), ("cov", "sqrt(var_x var_y) = 2", "2.1")),
        ((0.0, 4.0, 0.1), ("cov", "0.1")),
        ((np.ones(2), np.ones(3), 0.0), ("(2,)", "(3,)", "broadcast")),
        ((1.0, 1j, 0.0), ("var_y", "complex")),
        (("one", 1.0, 0.0), ("var_x", "one")),
    ],
)
@pytest.mark.parametrize("function", [arccos0, arccos1])
def test_bad_moments_are_named_in_one_line(function, moments, words):
    with pytest.raises(InputError) as caught:
        function(*moments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_rounding_of_the_covariance_is_forgiven_and_traced_moments_are_not_checked():
    np.testing.assert_allclose(arccos1(1.0, 4.0, np.float32(2.0001)), 1.00005, rtol=1e-5)
    np.testing.assert_array_equal(arccos0(1.0, 4.0, np.float32([2.0001, -2.0001])), [0.5, 0])
    with pytest.raises(InputError, match="var_x"):  # constants of a traced function are checked
        jax.jit(lambda cov: arccos1(-1.0, 1.0, cov))(0.0)
    for function in (arccos0, arccos1):
        traced = jax.jit(function)
        assert np.isfinite(traced(1.0, 1.0, 2.0))
        assert np.isnan(traced(np.nan, 1.0, 0.5))
