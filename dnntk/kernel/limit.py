"""The infinite-depth neural tangent kernel of deep narrow networks, in closed form.

`limit_ntk` is the limit Theta^infinity of Theorem 3.1 (MLP) and Theorem 4.1 (CNN), corrected where
the printed theorems are wrong: a deep enough network keeps this kernel throughout training. Use it
to predict such a network's outputs without training one.

Computation: with n, n' the standard deviations of u x + v and u x' + v and c their correlation,
E[relu relu] = n n' c / 4 + n n' even(c) / 2 (see `dnntk.kernel.arccos`). The first term is bilinear
in the inputs and costs one matrix product. At zero inputs with beta = 0,
where the kernel has a kink, autodiff of this form gives the mean of the one-sided slopes.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_deviation, checked_pair, on_host
from dnntk.errors import InputError
from dnntk.kernel.arccos import even, root_and_inverse
from dnntk.kernel.gram import blockwise

__all__ = ["limit_ntk", "padded_patches", "shifts_inside"]


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

    The kernel of a network with d_out outputs is the number returned times the identity:

        MLP:  x.x' + d_out + E[relu relu], with variances rho^2 x.x / d_in + beta^2
        CNN:  (HW)^-2 sum over the kernel_size^2 shifts of
                  d_out |psi|^2 + sum_ch (sum_psi x_ch)(sum_psi x'_ch) + sum_{p, p' in psi} E_pp'

    psi holds the output positions whose shifted position is in the image; E_pp' is E[relu relu] for
    the zero-padded patches around p and p', with variances rho^2 |patch|^2 + beta^2. The kernel is
    defined for all real inputs; the theorems, that networks converge to it, assume positive ones.
    It is positive semidefinite up to rounding: coincident inputs make a Gram matrix singular, and
    `dnntk.kernel.gram.check_positive_definite` says whether one can be solved with.

    Args:
        x1: [n1, d_in] for the MLP, NHWC images [n1, H, W, c] for the CNN.
        x2: [n2, ...], inputs of the same shape; None means x1, and each pair is then computed once
            and the result exactly symmetric.
        rho: standard deviation of the Gaussian weights (the MLP's times sqrt(d_in)).
        beta: standard deviation of the Gaussian biases over the network's scale.
        d_out: output dimension.
        kernel_size: side of the CNN's filters, odd.

    Returns:
        [n1, n2] in the inputs' dtype, float32 for half precision and JAX's default float for
        integers. float32 results differ from float64 ones by at most 1e-6, relative to Theta(x,x')
        for inputs without negative entries, and to sqrt(Theta(x,x) Theta(x',x')) for signed inputs,
        whose x.x' can cancel; measured for d_in up to 3072 and images up to 28 x 28. Time is of
        order n1 n2 d_in, or n1 n2 (HW)^2 kernel_size^2 c. Memory beyond the result: a few blocks,
        and up to twice the result in reverse-mode differentiation; for results that fill the
        memory, use `dnntk.kernel.gram.gram`. rho and beta may be traced and differentiated by.

    Raises:
        InputError: an argument has the wrong shape, type or range, or an input is not finite.
    """
    left, right = checked_pair(x1, x2)
    _check_squares("x1", left)
    if right is not None:
        _check_squares("x2", right)
    rho, beta = check_deviation("rho", rho), check_deviation("beta", beta)
    constant = float(check_count("d_out", d_out))  # JAX takes no int beyond 2^31
    kernel_size = check_count("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd, got {kernel_size}; take {kernel_size + 1}")
    # Cosines in a block: on a CPU few enough for its cache; elsewhere blocks are few and large.
    on_cpu, elsewhere = (
        partial(_limit_ntk, kernel_size=kernel_size, elements=count) for count in (2**18, 2**24)
    )
    return lax.platform_dependent(left, right, rho, beta, constant, cpu=on_cpu, default=elsewhere)


def _check_squares(name: str, x: jax.Array) -> None:
    """Refuse inputs whose sum of squares is beyond their dtype; traced inputs are not checked."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
        rows = on_host(x).reshape(len(x), math.prod(x.shape[1:]))
        xp = rows.__array_namespace__()
        within = bool(xp.isfinite(xp.einsum("ni,ni->n", rows, rows)).all())
        largest = 0.0 if within else float(xp.abs(rows).max())
    if not within:
        raise InputError(
            f"{name} must have squares within {x.dtype}, got entries up to {largest:.3g}; scale it "
            "down, or enable x64"
        )


@partial(jax.jit, static_argnames=("kernel_size", "elements"))
def _limit_ntk(
    x1: jax.Array,
    x2: jax.Array | None,
    rho: ArrayLike,
    beta: ArrayLike,
    d_out: ArrayLike,
    kernel_size: int,
    elements: int,
) -> jax.Array:
    """`limit_ntk` of checked arguments, in blocks of about ``elements`` cosines."""
    scalars = [jnp.asarray(value, x1.dtype) for value in (rho, beta, d_out)]
    if x1.ndim == 2:
        return blockwise(partial(_mlp_block, *scalars), x1, x2, elements)
    area = elements // x1.shape[2]  # a loop iteration computes one row of positions
    return blockwise(partial(_cnn_block, kernel_size, *scalars), x1, x2, area)


def _mlp_block(
    rho: jax.Array, beta: jax.Array, d_out: jax.Array, x1: jax.Array, x2: jax.Array
) -> jax.Array:
    """x.x' + d_out + E[relu relu], the bilinear part of the last term merged into x.x'."""
    scale = rho**2 / x1.shape[1]
    inner = _inner(x1, x2.T)
    norm1, inverse1 = root_and_inverse(scale * _squared_norm(x1) + beta**2)
    norm2, inverse2 = root_and_inverse(scale * _squared_norm(x2) + beta**2)
    cosine = (scale * inner + beta**2) * (inverse1[:, None] * inverse2[None, :])
    bilinear = (1 + scale / 4) * inner + (d_out + beta**2 / 4)
    return bilinear + (norm1[:, None] * norm2[None, :]) * (even(cosine) / 2)


def _cnn_block(
    kernel_size: int,
    rho: jax.Array,
    beta: jax.Array,
    d_out: jax.Array,
    x1: jax.Array,
    x2: jax.Array,
) -> jax.Array:
    height, width = x1.shape[1:3]
    axes = [jnp.asarray(shifts_inside(size, kernel_size), x1.dtype) for size in (height, width)]
    members = jnp.kron(*axes)  # [positions, shifts]: 1 where the shifted position is in the image
    scales = jnp.asarray(_scales(height * width)[:, None], x1.dtype)

    def features(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit patches [HW, n, k], their norms [HW, n], features of the bilinear part [n, f]."""
        patches = rho * padded_patches(x, kernel_size)
        norm, inverse = root_and_inverse(_squared_norm(patches) + beta**2)
        bias = jnp.broadcast_to(beta, (*norm.shape, 1))
        unit = jnp.concatenate([patches, bias], -1) * inverse[:, :, None]
        linear = jnp.concatenate([padded_patches(x, 1), patches / 2], -1)
        return unit, norm, _window_sums(linear, *axes)

    unit1, norm1, linear1 = features(x1)
    unit2, norm2, linear2 = features(x2)
    columns = unit2.transpose(0, 2, 1)

    def image_row(_: None, row: tuple) -> tuple[None, jax.Array]:
        unit1, norm1, members1 = row

        @partial(jax.checkpoint, prevent_cse=False)
        def position(total: jax.Array, other: tuple) -> tuple[jax.Array, None]:
            unit2, norm2, members2 = other
            common_windows = (members1 @ members2)[:, None, None]
            weight = common_windows * norm2[None, None, :]
            return total + weight * even(_inner(unit1, unit2)), None

        start = jnp.zeros((width, len(x1), len(x2)), x1.dtype)
        by_position, _ = lax.scan(position, start, (columns, norm2, members))
        return None, _sum(norm1[:, :, None] * by_position)

    rows = [
        a.reshape(height, width, *a.shape[1:]) for a in (unit1, norm1 / scales, members * scales)
    ]
    total = _sum(lax.scan(image_row, None, tuple(rows))[1])
    constant = (d_out + beta**2 / 4) * jnp.sum(jnp.sum(members, 0) ** 2)
    return (_inner(linear1, linear2.T) + constant + total / 2) / (height * width) ** 2


def shifts_inside(size: int, kernel_size: int) -> np.ndarray:
    """[size, shifts] bool along an axis, True where the shifted position is in the image."""
    shifts = np.arange(kernel_size) - kernel_size // 2
    shifted = np.arange(size)[:, None] + shifts
    return (0 <= shifted) & (shifted < size)


def padded_patches(x: jax.Array, kernel_size: int) -> jax.Array:
    """Zero-padded patches around every position: [HW, n, kernel_size^2 c]."""
    n, height, width, channels = x.shape
    reach = kernel_size // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    shifted = [
        padded[:, i : i + height, j : j + width]
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]
    size = kernel_size**2 * channels
    return jnp.concatenate(shifted, -1).reshape(n, height * width, size).transpose(1, 0, 2)


def _window_sums(x: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """For each shift, the sum over positions that it keeps inside: [HW, n, f] -> [n, shifts f]."""
    image = x.reshape(len(rows), len(cols), *x.shape[1:])

    def one_row_shift(inside: jax.Array) -> jax.Array:
        column_sums = _sum(image * inside[:, None, None, None])
        return _sum(column_sums[:, None] * cols[:, :, None, None])

    sums = lax.map(one_row_shift, rows.T)
    shifts = rows.shape[1] * cols.shape[1]
    return sums.transpose(2, 0, 1, 3).reshape(x.shape[1], shifts * x.shape[2])


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of rows and columns: [..., k], [k, n] -> [..., n]."""
    size = len(y)
    groups = min(math.ceil(size / 196), max(2, math.ceil(size / 392)))
    pieces = min(math.ceil(size / 28), 7)
    scales = jnp.asarray(_scales(groups * pieces).reshape(groups, pieces), x.dtype)
    if groups == 1:
        return _inner_in_pieces(x, y, scales[0])
    # A loop stores its result; without one, XLA would recompute the sum for each use of it.
    extra = -size % groups
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, extra)])
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 0)
    y = jnp.pad(y, ((0, extra), (0, 0))).reshape(groups, x.shape[-1], y.shape[1])

    def add(total: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        return total + _inner_in_pieces(*group), None

    start = jnp.zeros((*x.shape[1:-1], y.shape[2]), x.dtype)
    return lax.scan(add, start, (x, y, scales))[0]


def _inner_in_pieces(x: jax.Array, y: jax.Array, scales: jax.Array) -> jax.Array:
    """`_inner` in as many partial sums as ``scales``."""
    pieces = _pieces(len(y), len(scales))
    return _pairwise(
        [
            jnp.matmul(x[..., piece] * scale, y[piece], precision="highest") * (1 / scale)
            for piece, scale in zip(pieces, scales, strict=True)
        ]
    )


def _squared_norm(x: jax.Array) -> jax.Array:
    pieces = _pieces(x.shape[-1], math.ceil(x.shape[-1] / 56))
    return _pairwise([jnp.sum(x[..., piece] ** 2, -1) for piece in pieces])


def _pieces(size: int, count: int) -> list[slice]:
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def _scales(count: int) -> np.ndarray:
    """Factors for partial sums, which make their rounding errors independent.

    All terms of a constant image are equal. The roundings in a sum of k equal terms may all have
    one sign, up to k eps / 8 together. Partial sums would repeat that error, but not if their terms
    are multiplied by different factors.
    """
    return np.random.default_rng(0).uniform(1, 2, count) if count > 1 else np.ones(1)


def _pairwise(terms: list[jax.Array]) -> jax.Array:
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return _pairwise(terms[:middle]) + _pairwise(terms[middle:])


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis, by halves: its error grows with the logarithm of the length."""
    size = 1 << max(len(x) - 1, 0).bit_length()
    x = jnp.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]
