"""The infinite-depth neural tangent kernel of deep narrow networks, in closed form.

`limit_ntk` is the limit Theta^infinity of Theorem 3.1 (MLP) and Theorem 4.1 (CNN), corrected where
the printed theorems are wrong: the kernel that a network keeps throughout training once it is deep
enough. Use it to predict what such a network learns without training one. `arccos0` and `arccos1`
are the arc-cosine kernels of Cho & Saul (2009) that it is made of.

How it is computed. For Gaussians of standard deviation n, n' and correlation c,

    E[relu relu] = n n' (c / 2 + even(c)) / 2,    even(c) = (sqrt(1 - c^2) + c arcsin(c)) / pi.

The part c / 2 is bilinear in the inputs and costs one matrix product. The even part is
|c| / 2 + y^(3/2) P(y) with y = 1 - |c| and P analytic, so one square root and a short polynomial
replace arctan2. Neither it nor its slope times the derivative of c amplifies rounding as c -> 1,
so coincident inputs need no special case; and at zero inputs, where n has a kink if beta = 0, it
leaves the mean of the one-sided derivatives.
"""

import functools
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpy.polynomial import Chebyshev, Polynomial

from dnntk.errors import InputError
from dnntk.gram import blockwise

# Longest inner product summed in one go, and most pieces: in float32 the rounding of a longer sum
# (784 terms) alone reaches 1.2e-6.
_PIECE, _PIECES = 256, 16


def arccos1(var_x: ArrayLike, var_y: ArrayLike, cov: ArrayLike) -> jax.Array:
    """E[relu(g) relu(g')] of centred Gaussians, the arc-cosine kernel of order 1.

    (s + (pi - atan2(s, cov)) cov) / (2 pi) with s = sqrt(var_x var_y - cov^2); Cho & Saul (2009).

    Args:
        var_x: Variance of g, not negative; any shape.
        var_y: Variance of g', likewise; the three shapes broadcast.
        cov: Covariance; |cov| beyond sqrt(var_x var_y), as rounding gives, counts as equal to it.

    Returns:
        The expectation, in the inputs' dtype. Derivatives are finite everywhere: those by a
        variance are 0 where that variance is.
    """
    return _arccos1(*_float_arrays(var_x, var_y, cov))


def arccos0(var_x: ArrayLike, var_y: ArrayLike, cov: ArrayLike) -> jax.Array:
    """E[step(g) step(g')], the arc-cosine kernel of order 0: 1/2 - angle / (2 pi).

    The derivative of `arccos1` by `cov`. Arguments and shapes are those of `arccos1`.

    Returns:
        The probability that both are positive, in the inputs' dtype; 1/4 where a variance is 0
        (step(0) = 1/2 on average). Its derivatives, infinite at |cov| = sqrt(var_x var_y), are 0
        there.
    """
    return _arccos0(*_float_arrays(var_x, var_y, cov))


def limit_ntk(
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    rho: ArrayLike = 1.0,
    beta: ArrayLike = 1.0,
    d_out: int = 1,
    kernel_size: int = 3,
) -> jax.Array:
    """Infinite-depth limit of the scaled NTK (Theorems 3.1 and 4.1, corrected).

    The kernel of f: R^d_in -> R^d_out is the returned number times the identity of size d_out:

        MLP:  x.x' + d_out + E[relu relu], variances rho^2 x.x / d_in + beta^2
        CNN:  (HW)^-2 sum over the kernel_size^2 shifts of
                  d_out |psi|^2 + sum_ch (sum_psi x_ch)(sum_psi x'_ch) + sum_{p, p' in psi} E_pp'

    with psi the output positions whose shifted position lies in the image, and E_pp' the
    expectation for the zero-padded patches around p and p', variances rho^2 |patch|^2 + beta^2.
    It is defined for all real inputs; the theorems, that networks converge to it, assume positive
    ones.

    Args:
        x1: [n1, d_in] for the MLP, NHWC images [n1, H, W, c] for the CNN.
        x2: [n2, ...], inputs of the same shape; None means x1, and then each pair is computed once
            and the result is exactly symmetric.
        rho: Standard deviation of the Gaussian weights, as in `DeepNarrowMLP` and `DeepNarrowCNN`.
        beta: Standard deviation of the Gaussian biases.
        d_out: Number of outputs.
        kernel_size: Side of the CNN's filters, odd.

    Returns:
        [n1, n2] in the inputs' dtype (integers become the default float). float32 results are
        within 1e-6 of float64 ones, relative to sqrt(Theta(x,x) Theta(x',x')). Time:
        n1 n2 d_in, or n1 n2 (HW)^2 kernel_size^2 c. Memory beyond the result: blocks of a few MB
        (`dnntk.gram.gram` for results that fill the memory). Works under jit, vmap and grad; rho
        and beta may be traced.

    Raises:
        InputError: An argument has the wrong shape, type or range, or an input is not finite.
    """
    if x2 is x1:
        x2 = None
    left = _checked_input("x1", x1)
    right = None if x2 is None else _checked_input("x2", x2)
    if right is not None and left.shape[1:] != right.shape[1:]:
        raise InputError(
            f"x2 must hold inputs of the same shape as x1, {left.shape[1:]}, "
            f"got {right.shape[1:]}; reshape or resize one of them"
        )
    _check_deviation("rho", rho)
    _check_deviation("beta", beta)
    _check_count("d_out", d_out)
    if _check_count("kernel_size", kernel_size) % 2 == 0:
        raise InputError(f"kernel_size must be odd, got {kernel_size}; take {kernel_size + 1}")
    elements = 2**17 if jax.default_backend() == "cpu" else 2**24  # on a CPU, so as to stay in cache
    return _limit_ntk(left, right, rho, beta, d_out, int(kernel_size), elements)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _limit_ntk(
    x1: jax.Array,
    x2: jax.Array | None,
    rho: jax.Array,
    beta: jax.Array,
    d_out: jax.Array,
    kernel_size: int,
    block_elements: int,
) -> jax.Array:
    """`limit_ntk` of checked arguments; a step computes about block_elements cosines."""
    dtype = x1.dtype if x2 is None else jnp.promote_types(x1.dtype, x2.dtype)
    working = jnp.promote_types(dtype, jnp.float32)
    x1, x2 = (None if x is None else x.astype(working) for x in (x1, x2))
    rho_sq, beta_sq = jnp.square(rho).astype(working), jnp.square(beta).astype(working)
    d_out = jnp.asarray(d_out, working)
    if x1.ndim == 2:
        pair_fn = functools.partial(_mlp_block, rho_sq=rho_sq, beta_sq=beta_sq, d_out=d_out)
        block_size = math.isqrt(8 * block_elements)
    else:
        pair_fn = functools.partial(
            _cnn_block, rho_sq=rho_sq, beta_sq=beta_sq, d_out=d_out, kernel_size=kernel_size
        )
        block_size = max(math.isqrt(block_elements // x1.shape[2]), 16)
    return blockwise(pair_fn, x1, x2, block_size).astype(dtype)


def _mlp_block(
    x1: jax.Array, x2: jax.Array, rho_sq: jax.Array, beta_sq: jax.Array, d_out: jax.Array
) -> jax.Array:
    scale = rho_sq / x1.shape[1]
    inner = _inner(x1, x2)
    norm1, inverse1 = _norm(scale * _squared_norm(x1) + beta_sq)
    norm2, inverse2 = _norm(scale * _squared_norm(x2) + beta_sq)
    cosine = (scale * inner + beta_sq) * (inverse1[:, None] * inverse2[None, :])
    bilinear = (1 + scale / 4) * inner + (d_out + beta_sq / 4)
    return bilinear + (norm1[:, None] * norm2[None, :]) * _even(cosine) / 2


def _cnn_block(
    x1: jax.Array,
    x2: jax.Array,
    rho_sq: jax.Array,
    beta_sq: jax.Array,
    d_out: jax.Array,
    kernel_size: int,
) -> jax.Array:
    _, height, width, channels = x1.shape
    members = jnp.asarray(_window_members(height, width, kernel_size), x1.dtype)

    def features(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features of the bilinear part [b, f]; unit patches [HW, b, k] and norms [HW, b]."""
        patches = _patches(x, kernel_size)
        halved = jnp.sqrt(rho_sq) / 2 * patches
        linear = jnp.concatenate([x.reshape(-1, height*width, channels).transpose(1, 0, 2), halved], -1)
        linear = jnp.tensordot(linear, members, ((0,), (0,)), precision=lax.Precision.HIGHEST)
        norm, inverse = _norm(rho_sq * _squared_norm(patches) + beta_sq)
        bias = jnp.broadcast_to(jnp.sqrt(beta_sq), (*norm.shape, 1))
        unit = jnp.concatenate([jnp.sqrt(rho_sq) * patches, bias], -1) * inverse[:, :, None]
        return linear.reshape(len(x), -1), unit, norm

    linear1, unit1, norm1 = features(x1)
    linear2, unit2, norm2 = features(x2)

    def image_row(total: jax.Array, row: tuple) -> tuple[jax.Array, None]:
        unit1, norm1, members1 = row

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def position(total: jax.Array, other: tuple) -> tuple[jax.Array, None]:
            unit2, norm2, members2 = other
            shared_windows = members1 @ members2
            weight = shared_windows[:, None, None] * norm2[None, None, :]
            return total + weight * _even(_inner(unit1, unit2)), None

        start = jnp.zeros((width, len(x1), len(x2)), x1.dtype)
        by_position, _ = lax.scan(position, start, (unit2, norm2, members))
        return total + jnp.sum(norm1[:, :, None] * by_position, 0), None

    rows = jax.tree.map(
        lambda a: a.reshape(height, width, *a.shape[1:]), (unit1, norm1, members)
    )
    total, _ = lax.scan(image_row, jnp.zeros((len(x1), len(x2)), x1.dtype), rows)
    constant = (d_out + beta_sq / 4) * jnp.sum(jnp.square(jnp.sum(members, 0)))
    return (_inner(linear1, linear2) + constant + total / 2) / (height * width) ** 2


def _window_members(height: int, width: int, kernel_size: int) -> np.ndarray:
    """Which output positions keep inside the image under which shift: [HW, kernel_size^2]."""
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    rows, cols = (
        np.array([[0 <= i + shift < size for shift in reach] for i in range(size)])
        for size in (height, width)
    )
    return np.kron(rows, cols)


def _patches(x: jax.Array, kernel_size: int) -> jax.Array:
    """Zero-padded patches around every position: [HW, n, kernel_size^2 c]."""
    n, height, width, _ = x.shape
    reach = kernel_size // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    shifted = [
        padded[:, i : i + height, j : j + width]
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]
    return jnp.concatenate(shifted, -1).reshape(n, height * width, -1).transpose(1, 0, 2)


def _cuts(size: int) -> list[slice]:
    pieces = max(1, min(math.ceil(size / _PIECE), _PIECES))
    ends = [size * i // pieces for i in range(pieces + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., k], [n, k] -> [..., n], at full precision on every device."""
    dot = functools.partial(jnp.tensordot, axes=((-1,), (-1,)), precision=lax.Precision.HIGHEST)
    return functools.reduce(operator.add, [dot(x[..., s], y[:, s]) for s in _cuts(x.shape[-1])])


def _squared_norm(x: jax.Array) -> jax.Array:
    parts = [jnp.sum(jnp.square(x[..., s]), -1) for s in _cuts(x.shape[-1])]
    return functools.reduce(operator.add, parts)


def _norm(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Square root and its inverse; both 0, with derivative 0, at 0."""
    positive = square > 0
    root = jnp.sqrt(jnp.where(positive, square, 1.0))
    return jnp.where(positive, root, 0.0), jnp.where(positive, 1 / root, 0.0)


@jax.custom_jvp
def _even(cosine: jax.Array) -> jax.Array:
    """(sqrt(1 - c^2) + c arcsin(c)) / pi, to the precision of the dtype."""
    size = jnp.minimum(jnp.abs(cosine), 1.0)
    return size / 2 + _odd_remainder(1 - size)


@_even.defjvp
def _even_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (cosine,), (tangent,) = primals, tangents
    inside = jnp.abs(cosine) < 1
    slope = jnp.arcsin(jnp.where(inside, cosine, 0.0)) / jnp.pi
    return _even(cosine), jnp.where(inside, slope, jnp.sign(cosine) / 2) * tangent


def _odd_remainder(y: jax.Array) -> jax.Array:
    """(sqrt(1 - c^2) - c arccos(c)) / pi at c = 1 - y, for y in [0, 1]."""
    first, *others = reversed(_polynomial(6 if y.dtype.itemsize <= 4 else 17))
    value = jnp.full_like(y, first)
    for coefficient in others:
        value = value * y + coefficient
    return y * jnp.sqrt(y) * value


@functools.cache
def _polynomial(degree: int) -> tuple[float, ...]:
    """Coefficients of P(y) = (sqrt(1 - c^2) - c arccos(c)) / (pi y^(3/2)), c = 1 - y, on [0, 1].

    Integrating arccos(1 - y) = sqrt(2 y) sum_k binom(2k, k) / (8^k (2k + 1)) y^k gives the power
    series of P, which converges for y < 2. Interpolating it at Chebyshev nodes leaves an error
    of 5e-9 at degree 6 and below 1e-16 at degree 17 (it falls by 5.8 a degree).
    """
    k = np.arange(64)
    binomials = np.cumprod(np.concatenate([[1.0], (2 * k[1:] - 1) / (4 * k[1:])]))
    series = Polynomial(math.sqrt(2) / math.pi * binomials / ((2 * k + 1) * (k + 1.5)))
    fit = Chebyshev.interpolate(series, degree, domain=[0, 1])
    return tuple(fit.convert(kind=Polynomial).coef.tolist())
