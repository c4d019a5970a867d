"""What a kernel says about learning: agreement with labels or another kernel, size, movement.

A kernel of n examples is a Gram matrix [n, n], or [n, n, k, k] over k outputs as `empirical_ntk`
returns it. All functions take NumPy's or JAX's arrays, and are pure: they work under jit, vmap and
grad, in the dtype of their arguments, float32 at least. A number has no units unless it says so.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dnntk.checks import checked_array, common_dtype, native_numbers
from dnntk.errors import InputError

__all__ = ["alignment", "cka", "effective_dimension", "kernel_movement"]


def alignment(kernel: ArrayLike, y: ArrayLike, *, centred: bool = False) -> jax.Array:
    """Kernel-target alignment: the cosine of the angle between K and the targets' y y^T.

    <K, T>_F / (||K||_F ||T||_F) with T = y y^T (Cristianini, Shawe-Taylor, Elisseeff & Kandola
    2001, "On kernel-target alignment"). With ``centred``, K and T are H K H and H T H, with
    H = I - 1 1^T / n, so that adding a constant to the kernel or to the targets changes nothing
    (Cortes, Mohri & Rostamizadeh 2012, "Algorithms for learning kernels based on centered
    alignment", definition 4).

    Args:
        kernel: [n, n], symmetric; [n, n, k, k] is replaced by its trace over the outputs.
        y: [n] or [n, d_out], targets: one-hot classes, -1 and 1, or numbers.
        centred: see above. The constant part of a deep narrow network's kernel, which is d_out,
            is large; take the centred alignment to see what it has beside that part.

    Returns:
        A number: 1 where K is T up to a factor, at least 0 for a positive semidefinite kernel. NaN
        if the kernel or the targets are 0, or, centred, constant up to rounding.

    Raises:
        InputError: an argument has the wrong shape, or an entry that is not finite.
    """
    gram = _over_examples("kernel", kernel)
    targets = checked_array("y", y)
    targets = targets[:, None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or len(targets) != len(gram) or not targets.shape[1]:
        raise InputError(
            f"y: expected [n] or [n, d_out] with n = {len(gram)}, as kernel has, got shape "
            f"{list(jnp.shape(y))}; give a row an example"
        )
    return _alignment(gram, targets, bool(centred))


def cka(kernel1: ArrayLike, kernel2: ArrayLike) -> jax.Array:
    """Centred kernel alignment, the similarity of two kernels or representations.

    <H K H, H K' H>_F over the product of their norms, with H = I - 1 1^T / n (Kornblith, Norouzi,
    Lee & Hinton 2019, "Similarity of neural network representations revisited"; HSIC is the biased
    estimate, as theirs). For representations Z [n, d] give the kernels Z Z^T: linear CKA.

    Args:
        kernel1: [n, n], symmetric; [n, n, k, k] is replaced by its trace over the outputs.
        kernel2: a kernel on the same n examples; it may have another k.

    Returns:
        A number, from 0 to 1 for positive semidefinite kernels: 1 where they are equal up to a
        factor and a constant. NaN if one is constant up to rounding.

    Raises:
        InputError: an argument has the wrong shape, or an entry that is not finite.
    """
    one, other = _over_examples("kernel1", kernel1), _over_examples("kernel2", kernel2)
    if len(one) != len(other):
        raise InputError(
            f"kernel2: expected a kernel of {len(one)} examples, as kernel1 is, got {len(other)}; "
            "give both on the same examples"
        )
    return _cosine(one, other, True)


def effective_dimension(kernel: ArrayLike, time: ArrayLike) -> jax.Array:
    """How many directions of the targets a kernel has learnt at a time: sum of s t / (1 + s t).

    With s the eigenvalues of K/N (of N examples, and of all their outputs) it is the trace of
    K (K + N lambda)^-1 at the ridge lambda = 1/t: the degrees of freedom of ridge regression (Zhang
    2005, "Learning bounds for kernel regression using effective data dimensionality"; Caponnetto &
    De Vito 2007, "Optimal rates for the regularized least-squares algorithm"). This form is the
    literature's, and it says how many random features, or layers, stand in for the kernel up to
    time t. Gradient flow itself has the degrees of freedom sum of 1 - exp(-s t), which are between
    this number and 1.3 times it for any kernel.

    Args:
        kernel: [n, n], or [n, n, k, k] as the matrix [n k, n k]; symmetric, positive semidefinite.
            Eigenvalues below rounding, 2 sqrt(n k) eps of the largest, count as 0.
        time: kernel time t >= 0, a number or an array of any shape; may be infinite.

    Returns:
        In the shape of ``time``: from 0 at t = 0 to the kernel's rank at infinity. It takes
        O((n k)^3) operations, whatever the number of times. NaN if an eigenvalue is negative by
        more than rounding, n k eps of the largest: no kernel has one.

    Raises:
        InputError: an argument has the wrong shape, a time is negative or NaN, or an entry of the
            kernel is not finite.
    """
    gram = _square("kernel", kernel)
    times = time if isinstance(time, jax.Array) else native_numbers("time", time)
    if not isinstance(times, jax.core.Tracer) and not (times >= 0).all():
        raise InputError(f"time: expected numbers >= 0, or infinity, got {times.min()}")
    return _effective_dimension(gram, jnp.asarray(times))


def kernel_movement(kernel_t: ArrayLike, kernel_0: ArrayLike) -> jax.Array:
    """How far training moved a kernel: ||K_t - K_0||_F / ||K_0||_F.

    0 is the kernel regime, lazy training (Chizat, Oyallon & Bach 2019, "On lazy training in
    differentiable programming"), in which `dnntk.KernelFlow` predicts a network; features are
    learnt where it is of order 1.

    Args:
        kernel_t: the kernel after training, of any shape: [n1, n2], [n1, n2, k, k] ...
        kernel_0: the kernel before, of the same shape.

    Returns:
        A number; infinite or NaN if kernel_0 is 0.

    Raises:
        InputError: the shapes differ, or an entry is not finite.
    """
    after, before = checked_array("kernel_t", kernel_t), checked_array("kernel_0", kernel_0)
    if after.shape != before.shape:
        raise InputError(
            f"kernel_0: expected the shape of kernel_t, {list(after.shape)}, got "
            f"{list(before.shape)}; give both on the same examples"
        )
    return _movement(after, before)


def _square(name: str, kernel: ArrayLike) -> jax.Array:
    """A kernel [n, n] or [n, n, k, k]."""
    gram = checked_array(name, kernel)
    if (
        gram.ndim not in (2, 4)
        or gram.shape[0] != gram.shape[1]
        or gram.shape[2:3] != gram.shape[3:]
    ):
        raise InputError(
            f"{name}: expected [n, n], or [n, n, k, k] over k outputs, got shape "
            f"{list(gram.shape)}; give the kernel of one batch with itself"
        )
    return gram


def _over_examples(name: str, kernel: ArrayLike) -> jax.Array:
    """A kernel as [n, n], its trace over the outputs."""
    gram = _square(name, kernel)
    return gram if gram.ndim == 2 else jnp.trace(gram, axis1=2, axis2=3)


@partial(jax.jit, static_argnums=2)
def _alignment(gram: jax.Array, targets: jax.Array, centred: bool) -> jax.Array:
    targets = _scaled(targets)
    return _cosine(gram, jnp.matmul(targets, targets.T, precision="highest"), centred)


@partial(jax.jit, static_argnums=2)
def _cosine(one: jax.Array, other: jax.Array, centred: bool) -> jax.Array:
    """The cosine of the angle between two matrices [n, n]."""
    units, dtype = [], common_dtype(one, other)
    for matrix in (_scaled(one.astype(dtype)), _scaled(other.astype(dtype))):
        whole = _norm(matrix)
        if centred:
            matrix = matrix - jnp.mean(matrix, 0, keepdims=True)
            matrix = matrix - jnp.mean(matrix, 1, keepdims=True)
        size = _norm(matrix)
        # What centring leaves of a constant matrix is rounding.
        kept = size > 4 * jnp.finfo(matrix.dtype).eps * whole
        units.append(matrix / jnp.where(kept, size, jnp.nan))
    return jnp.sum(units[0] * units[1])


@jax.jit
def _effective_dimension(gram: jax.Array, times: jax.Array) -> jax.Array:
    n = len(gram)
    if gram.ndim == 4:
        gram = gram.transpose(0, 2, 1, 3).reshape(2 * (n * gram.shape[2],))
    times = times.astype(gram.dtype)
    if not len(gram):
        return jnp.zeros_like(times)
    values = jnp.linalg.eigvalsh(gram / n)
    rounding = 2 * math.sqrt(len(gram)) * jnp.finfo(gram.dtype).eps * values[-1]
    # Double where, so that derivatives are finite: by t at infinity, and by eigenvalues at 0.
    positive = values > rounding
    least, largest = values[0], jnp.max(jnp.abs(values))
    is_kernel = least >= -len(gram) * jnp.finfo(gram.dtype).eps * largest
    values = jnp.where(positive, values, 1.0)

    def at(time: jax.Array) -> jax.Array:
        finite = jnp.isfinite(time)
        product = jnp.where(finite, time, 0.0) * values
        shares = jnp.where(finite, product / (1 + product), 1.0)
        return jnp.where(is_kernel, jnp.sum(jnp.where(positive, shares, 0.0)), jnp.nan)

    return jax.vmap(at)(times.ravel()).reshape(times.shape)


@jax.jit
def _movement(after: jax.Array, before: jax.Array) -> jax.Array:
    dtype = common_dtype(after, before)
    after, before = after.astype(dtype), before.astype(dtype)
    size = _largest(before)
    return _norm((after - before) / size) / _norm(before / size)


def _scaled(values: jax.Array) -> jax.Array:
    """Values over the largest, so that no square leaves the dtype."""
    return values / _largest(values)


def _largest(values: jax.Array) -> jax.Array:
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(values), initial=0.0))
    return jnp.where(size > 0, size, 1.0)


def _norm(values: jax.Array) -> jax.Array:
    """The Frobenius norm, whose derivative at 0 is 0."""
    square = jnp.sum(values**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
