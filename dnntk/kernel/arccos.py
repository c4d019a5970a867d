"""Arc-cosine kernels (Cho & Saul 2009): expectations of a ReLU's output or slope over Gaussians.

`arccos1` and `arccos0` take the variances and the covariance of two centred Gaussians. `limit_ntk`
splits `arccos1` into a bilinear part and `even`: with standard deviations n, n' and correlation c,

    E[relu relu] = n n' (c / 2 + even(c)) / 2,    even(c) = (sqrt(1 - c^2) + c arcsin(c)) / pi.

even(c) is |c| / 2 + y^(3/2) P(y) with y = 1 - |c| and P analytic, so a square root and a short
polynomial replace arctan2. Rounding of c is not amplified as c -> 1, neither in the values nor in
the derivatives by the inputs, so near-coincident inputs need no special case.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpy.polynomial.chebyshev import cheb2poly

from dnntk.checks import checked_array, common_dtype
from dnntk.errors import InputError

__all__ = ["arccos0", "arccos1", "even", "root_and_inverse"]


def arccos1(var_x: ArrayLike, var_y: ArrayLike, cov: ArrayLike) -> jax.Array:
    """E[relu(g) relu(g')] of centred Gaussians: the arc-cosine kernel of order 1.

    (s + (pi - atan2(s, cov)) cov) / (2 pi) with s = sqrt(var_x var_y - cov^2); Cho & Saul (2009).

    Args:
        var_x: variance of g, not negative; any shape.
        var_y: variance of g', likewise; the three shapes broadcast.
        cov: covariance. |cov| may exceed sqrt(var_x var_y) by rounding, up to a factor of
            1 + sqrt(eps), and is then taken as equal to it.

    Returns:
        The expectation, in the inputs' dtype, float32 at least. Its derivative by a variance is
        infinite at variance 0; 0 is returned instead.

    Raises:
        InputError: a variance is negative, a value is not finite, |cov| is beyond
            sqrt(var_x var_y) by more than rounding, or the shapes do not broadcast. Traced values
            are not checked.
    """
    return _arccos(1, *_checked_moments(var_x, var_y, cov))


def arccos0(var_x: ArrayLike, var_y: ArrayLike, cov: ArrayLike) -> jax.Array:
    """E[step(g) step(g')], 1/2 - atan2(s, cov) / (2 pi): the arc-cosine kernel of order 0.

    `arccos0` is the derivative of `arccos1` by cov, with the same arguments and errors.

    Returns:
        The probability that g and g' are positive, in the inputs' dtype; 1/4 where a variance is 0.
        The derivatives are infinite at |cov| = sqrt(var_x var_y); 0 is returned instead.
    """
    return _arccos(0, *_checked_moments(var_x, var_y, cov))


@jax.custom_jvp
def even(cosine: jax.Array) -> jax.Array:
    """(sqrt(1 - c^2) + c arcsin(c)) / pi; a cosine that rounding put beyond +-1 counts as +-1."""
    size = jnp.minimum(jnp.abs(cosine), 1.0)
    y = 1 - size
    return size / 2 + y * jnp.sqrt(y) * _series(y, order=1)


@even.defjvp
def _even_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (cosine,), (tangent,) = primals, tangents
    sign = jnp.where(cosine < 0, -1.0, 1.0)  # abs would spoil the second derivative at 0
    y = 1 - sign * cosine
    arcsine = sign * (0.5 - root_and_inverse(y)[0] * _series(y, order=0))  # over pi
    return even(cosine), arcsine * tangent


def _series(y: jax.Array, order: int) -> jax.Array:
    """The polynomial of `_polynomial` at y, by Horner's rule."""
    degree = (8, 6) if y.dtype.itemsize <= 4 else (17, 16)
    coefficients = _polynomial(degree[order], order)
    value = jnp.full_like(y, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * (2 * y - 1) + coefficient
    return value


@cache
def _polynomial(degree: int, order: int) -> tuple[float, ...]:
    """Coefficients of the arccosine's analytic factor on 0 <= y = 1 - c <= 1, powers of 2 y - 1.

    Order 0 is arccos(c) / (pi y^(1/2)) = sum_k a_k y^k, with a_k = sqrt(2) / pi binom(2k, k) /
    (8^k (2k + 1)). Integrated, order 1 is (sqrt(1 - c^2) - c arccos(c)) / (pi y^(3/2)), with
    a_k / (k + 3/2). As y^k = 4^-k sum_{|j| <= k} binom(2k, k - j) T_|j|(2 y - 1), they become
    Chebyshev series, which fall by a factor of about 7 a term and are cut at the degree given.
    """
    terms = range(64)
    power = [math.sqrt(2) / math.pi * math.comb(2 * k, k) / (8**k * (2 * k + 1)) for k in terms]
    if order == 1:
        power = [a / (k + 1.5) for k, a in enumerate(power)]
    chebyshev = [
        (2 if j else 1) * math.fsum(power[k] * math.comb(2 * k, k - j) / 4**k for k in terms[j:])
        for j in range(degree + 1)
    ]
    return tuple(cheb2poly(chebyshev).tolist())


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _arccos(order: int, var_x: jax.Array, var_y: jax.Array, cov: jax.Array) -> jax.Array:
    _, root, y = _sine_root_and_y(var_x, var_y, cov)
    part = root_and_inverse(y)[0] * _series(y, order)
    if order == 0:
        return jnp.where(cov < 0, part, 1 - part) / 2
    return (jnp.maximum(cov, 0) + root * y * part) / 2


@_arccos.defjvp
def _arccos_jvp(order: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (var_x, var_y, cov), (dvar_x, dvar_y, dcov) = primals, tangents
    sine, _, _ = _sine_root_and_y(*primals)
    relative = _divide(dvar_x, var_x) + _divide(dvar_y, var_y)
    if order == 0:
        tangent = _divide(dcov - cov * relative / 2, 2 * jnp.pi * sine)
    else:
        tangent = _arccos(0, *primals) * dcov + sine * relative / (4 * jnp.pi)
    return _arccos(order, *primals), tangent


def _sine_root_and_y(
    var_x: jax.Array, var_y: jax.Array, cov: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return s = sqrt(var_x var_y - cov^2), sqrt(var_x var_y) and 1 - |correlation|.

    Each factor is split into halves, whose products are exact. So s keeps half its digits where the
    Gaussians nearly coincide, and is 0 where they coincide.
    """
    info = jnp.finfo(cov.dtype)
    factors = (var_x, var_y, cov)
    x, y, c = (lax.reduce_precision(v, info.nexp, (info.nmant + 1) // 2 - 1) for v in factors)
    dx, dy, dc = var_x - x, var_y - y, cov - c
    square = (x * y - c * c) + ((x * dy - c * dc) + (dx * y - c * dc)) + (dx * dy - dc * dc)
    sine, root = (
        root_and_inverse(square)[0],
        root_and_inverse(var_x)[0] * root_and_inverse(var_y)[0],
    )
    ratio = _divide(sine, root) * _divide(sine, root + jnp.abs(cov))
    return sine, root, jnp.where(root <= 0, 1.0, jnp.minimum(ratio, 1.0))


def root_and_inverse(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Square root and its inverse; both 0, of derivative 0, where the square is not positive."""
    positive = ~(square <= 0)  # True for NaN, which so reaches the result
    root = jnp.sqrt(jnp.where(positive, square, 1.0))
    return jnp.where(positive, root, 0.0), jnp.where(positive, 1 / root, 0.0)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Quotient; 0 where y is not positive."""
    positive = ~(y <= 0)
    return jnp.where(positive, x / jnp.where(positive, y, 1.0), 0.0)


def _checked_moments(var_x: ArrayLike, var_y: ArrayLike, cov: ArrayLike) -> list[jax.Array]:
    """The moments in their common floating dtype, broadcast against each other."""
    moments = {"var_x": var_x, "var_y": var_y, "cov": cov}
    given = arrays = [_checked_moment(name, value) for name, value in moments.items()]
    dtype = common_dtype(*arrays)
    try:
        arrays = jnp.broadcast_arrays(*(a.astype(dtype) for a in arrays))
    except ValueError:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(moments, arrays, strict=True))
        raise InputError(f"{shapes}: the shapes must broadcast; add or drop axes") from None
    if not any(isinstance(a, jax.core.Tracer) for a in given):
        _check_covariance(*map(_on_host, given), tolerance=float(jnp.finfo(dtype).eps) ** 0.5)
    return arrays


def _checked_moment(name: str, value: ArrayLike) -> jax.Array:
    array = checked_array(name, value)
    if name != "cov" and not isinstance(array, jax.core.Tracer):
        host = _on_host(array)
        if (host < 0).any():
            raise InputError(
                f"{name} must not be negative, as a variance is, got {host[host < 0].flat[0]}; "
                "correct it"
            )
    return array


def _check_covariance(
    var_x: np.ndarray, var_y: np.ndarray, cov: np.ndarray, *, tolerance: float
) -> None:
    """Refuse a ``cov`` beyond sqrt(var_x var_y); both variances are finite and not negative."""
    size, limit = np.broadcast_arrays(np.abs(cov), np.sqrt(var_x) * np.sqrt(var_y))
    beyond = size > limit * (1 + tolerance)
    if beyond.any():
        raise InputError(
            f"cov must be at most sqrt(var_x var_y) = {limit[beyond].flat[0]:.6g} in size, got "
            f"{size[beyond].flat[0]:.6g}; use moments of the same pair of Gaussians"
        )


def _on_host(value: jax.Array) -> np.ndarray:
    return np.asarray(value).astype(np.float64)
