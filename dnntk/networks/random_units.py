"""The random units (u, v) of a deep narrow network's layers: independent or quasi-random draws.

The kernel of a deep network is an average over its layers' random units, so the layers are the
samples of an expectation: the limit kernel. Every draw makes each unit exactly Gaussian, and so
has the same limit; they differ in how fast depth approaches it:

* ``gaussian``: independent units; the kernel's distance from the limit falls as depth^-1/2.
* ``antithetic``: each unit is followed by its negative.
* ``orthogonal``: blocks of as many orthogonal units as a unit has numbers (Yu et al. 2016,
  "Orthogonal random features"), uniformly rotated, with a Gaussian vector's lengths; each block is
  followed by its negative.
* ``sobol``: a scrambled Sobol sequence (Joe & Kuo 2008) through the normal quantile: depth^-1 for
  units of 3 and of 10 numbers, depth^-0.8 for 65. Scrambled by a random lower triangular matrix of
  bits and a digital shift (Matousek 1998).

The rest of the kernel, without random units, is 1 / depth from its limit whatever the draw.

The middle layers have the first depth - 2 points of a draw, in its order, and the first layer has
the next one; with M units a layer each has M points. No point is skipped (Owen 2020, "On dropping
the first Sobol' point"). Sobol points are most even in powers of two: at depths of 2^k + 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from dnntk.checks import brief
from dnntk.errors import InputError
from dnntk.networks.initializers import Layers

__all__ = ["EVEN_FEATURES", "FEATURES", "check_features", "random_units", "units_up_to_sign"]

FEATURES = ("gaussian", "antithetic", "orthogonal", "sobol")
EVEN_FEATURES = ("gaussian", "orthogonal", "sobol")
# Bits of a Sobol point's coordinates; as many layers have different points.
BITS = 32


def check_features(features: str, count: int, init: str) -> None:
    """Raise `InputError` for an unknown draw, or of units that ``init`` does not have."""
    if count < 1:
        raise InputError(f"random_units: expected an integer of at least 1, got {count}")
    if count > 1 and init != "deep_narrow":
        raise InputError(
            f"random_units: expected 1 with init={init!r}, which draws no random units, got "
            f"{count}; leave it out"
        )
    if not isinstance(features, str) or features not in FEATURES:
        raise InputError(f"features: expected one of {', '.join(FEATURES)}, got {brief(features)}")
    if features != "gaussian" and init != "deep_narrow":
        raise InputError(
            f"features: expected 'gaussian' with init={init!r}, which draws no random units, got "
            f"{features!r}; leave it out"
        )


def random_units(
    key: jax.Array,
    features: str,
    depth: int,
    d_in: int,
    window: tuple[int, ...],
    rho: float,
    beta: float,
    dtype: jnp.dtype,
    count: int = 1,
) -> Layers:
    """The random rows: u in ``kernel`` [(depth-2,) (q, q,) d_in], v / C in ``bias`` [(depth-2)].

    ``count`` > 1 units a layer are a last axis of both. u has standard deviation rho / sqrt(d_in)
    in an MLP and rho in a CNN, v / C has beta; both over sqrt(count).

    Raises:
        InputError: ``features="sobol"``, and a unit has more numbers than the sequence.
    """
    deviation = rho if window else rho / math.sqrt(d_in)
    deviation, beta = deviation / math.sqrt(count), beta / math.sqrt(count)
    each = (count,) if count > 1 else ()
    if features == "gaussian":
        drawn = _independent(key, depth, (*window, d_in), each, dtype)
    else:
        points = POINTS[features](key, (depth - 1) * count, math.prod(window) * d_in + 1, dtype)
        points = jnp.moveaxis(points.reshape(-1, *each, points.shape[1]), -1, 1)
        u, v = points[:, 1:].reshape(-1, *window, d_in, *each), points[:, 0]
        drawn = {"first": (u[-1], v[-1]), "middle": (u[:-1], v[:-1])}
    return {name: {"kernel": deviation * u, "bias": beta * v} for name, (u, v) in drawn.items()}


def units_up_to_sign(
    key: jax.Array, features: str, count: int, dimensions: int, dtype: jnp.dtype
) -> jax.Array:
    """Standard normal points [count, dimensions], of the draws that need no point's negative.

    For even functions of a unit, to which a negative adds nothing; so ``orthogonal`` has none.

    Raises:
        InputError: ``features="sobol"``, and a point has more numbers than the sequence.
    """
    if features == "gaussian":
        return jax.random.normal(key, (count, dimensions), dtype)
    if features == "orthogonal":
        return _orthogonal_blocks(key, count, dimensions, dtype).reshape(-1, dimensions)[:count]
    return _sobol(key, count, dimensions, dtype)


def _independent(
    key: jax.Array, depth: int, shape: tuple[int, ...], each: tuple[int, ...], dtype: jnp.dtype
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Independent (u, v) of unit variance."""
    drawn = {}
    for name, lead, layer_key in zip(
        ("first", "middle"), ((), (depth - 2,)), jax.random.split(key), strict=True
    ):
        key_u, key_v = jax.random.split(layer_key)
        drawn[name] = (
            jax.random.normal(key_u, (*lead, *shape, *each), dtype),
            jax.random.normal(key_v, (*lead, *each), dtype),
        )
    return drawn


def _antithetic(key: jax.Array, count: int, dimensions: int, dtype: jnp.dtype) -> jax.Array:
    """Normal points [count, dimensions], every other one the negative of the one before."""
    half = jax.random.normal(key, (-(-count // 2), dimensions), dtype)
    return jnp.stack([half, -half], axis=1).reshape(-1, dimensions)[:count]


def _orthogonal(key: jax.Array, count: int, dimensions: int, dtype: jnp.dtype) -> jax.Array:
    """Normal points [count, dimensions] in blocks: orthogonal ones, and then their negatives."""
    block = _orthogonal_blocks(key, -(-count // 2), dimensions, dtype)
    return jnp.concatenate([block, -block], axis=1).reshape(-1, dimensions)[:count]


def _orthogonal_blocks(key: jax.Array, count: int, dimensions: int, dtype: jnp.dtype) -> jax.Array:
    """At least ``count`` normal points [blocks, dimensions, dimensions], orthogonal in a block."""
    shape = (-(-count // dimensions), dimensions, dimensions)
    one, other = (jax.random.normal(k, shape, dtype) for k in jax.random.split(key))
    q, r = jnp.linalg.qr(one)
    # The signs of r's diagonal make q uniform over all rotations (Mezzadri 2007).
    rotation = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = jnp.linalg.norm(other, axis=2, keepdims=True)
    return lengths * rotation


def _sobol(key: jax.Array, count: int, dimensions: int, dtype: jnp.dtype) -> jax.Array:
    """Normal points [count, dimensions]: the first ones of a scrambled Sobol sequence."""
    if dimensions > qmc.Sobol.MAXDIM:
        raise InputError(
            f"features: sobol has {qmc.Sobol.MAXDIM:,} numbers for a random unit, got inputs that "
            f"need {dimensions:,}; pool the images, or give another draw"
        )
    return _normal(_scrambled(key, count, directions(dimensions, (count - 1).bit_length())), dtype)


@functools.lru_cache(maxsize=8)
def directions(dimensions: int, count: int) -> np.ndarray:
    """The first ``count`` direction numbers of each of a Sobol sequence's dimensions.

    Returns:
        [dimensions, count] uint32, binary fractions of `BITS` digits.
    """
    engine = qmc.Sobol(dimensions, scramble=False, bits=BITS)
    found = np.zeros((dimensions, count), np.uint32)
    for k in range(count):  # in Gray code, point 2^(k + 1) - 1 is the k-th number alone
        engine.fast_forward(2 ** (k + 1) - 1 - engine.num_generated)
        found[:, k] = np.ldexp(engine.random(1)[0], BITS)
    return found


def _scrambled(key: jax.Array, count: int, numbers: np.ndarray) -> jax.Array:
    """Points [count, dimensions] uint32 of the sequence with these direction ``numbers``."""
    key_matrix, key_shift = jax.random.split(key)
    dimensions = len(numbers)
    # Row i of a matrix makes digit i of that digit and the more significant ones.
    digit = jnp.arange(BITS, dtype=jnp.uint32)[None]
    lowest = jnp.uint32(1 << (BITS - 1)) >> digit
    rows = jax.random.bits(key_matrix, (dimensions, BITS), jnp.uint32) & ~(2 * lowest - 1)
    products = (rows | lowest)[:, :, None] & numbers[:, None]
    parities = jax.lax.population_count(products) & 1
    mixed = jnp.sum(parities * lowest[:, :, None], axis=1, dtype=jnp.uint32)
    shift = jax.random.bits(key_shift, (1, dimensions), jnp.uint32)
    points = jnp.broadcast_to(shift, (count, dimensions))
    number = jnp.arange(count, dtype=jnp.uint32)[:, None]
    for k in range(numbers.shape[1]):
        points ^= (number >> k & 1) * mixed[None, :, k]
    return points


def _normal(fractions: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The normal quantiles of binary fractions of `BITS` digits.

    The first digit is the sign, so that either tail has all digits of a float32; half a unit in the
    last place keeps the quantile finite, at 6.3 deviations at most.
    """
    half = jnp.uint32(1 << (BITS - 1))
    tail = jnp.where(fractions < half, fractions, ~fractions).astype(dtype)
    quantile = jax.scipy.special.ndtri((tail + 0.5) * 2.0**-BITS)
    return jnp.where(fractions < half, quantile, -quantile)


POINTS = {"antithetic": _antithetic, "orthogonal": _orthogonal, "sobol": _sobol}
