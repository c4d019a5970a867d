"""The neural tangent kernel of n examples as a linear operator, without kernel or Jacobian.

A product J (J^T v) is a gradient pass, which sums J^T v over chunks of examples, and a tangent
pass, which gives J u chunk by chunk. Use it where the kernel, n k x n k numbers, is too large:
for leading eigenpairs, traces, and iterative solvers (`Operator.to_scipy`).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_key, check_rows, checked_array, common_dtype, on_host
from dnntk.errors import InputError
from dnntk.networks.models import DeepNarrowCNN, DeepNarrowMLP
from dnntk.ntk.functional import (
    Params,
    as_apply_fn,
    checked_batch,
    flat_outputs,
    merged,
    parameters,
    split_variables,
)
from dnntk.ntk.structured import Factors, factors

__all__ = ["Operator", "operator"]

# Array elements that the passes over a chunk of examples store: 64 MB in float32. Chunks ten times
# as large are no faster on a CPU.
CHUNK_ELEMENTS = 1 << 24


def operator(
    model_or_apply_fn: Any, variables: Any, x: Any, *, block_size: int | None = None
) -> "Operator":
    """The NTK of examples x, as a symmetric linear operator on vectors of n k numbers.

    Args:
        model_or_apply_fn: a `DeepNarrowMLP` or `DeepNarrowCNN` for the scaled NTK of
            `dnntk.empirical_ntk`, (1 / (L C^2)) J J^T; any other linen module, a linen module's
            ``apply``, an NNX module or a function for the unscaled one of
            `dnntk.empirical_ntk_fn`, J J^T. Each example is given alone, as a batch of one.
        variables: as in `dnntk.empirical_ntk_fn`.
        x: [n, ...], or a tuple or mapping of such arrays. NumPy arrays stay in the host's memory; a
            chunk at a time is moved to the device.
        block_size: examples in a chunk; None is as many as store about 64 MB (in float32) between
            the passes. Results do not depend on it, up to rounding.

    Returns:
        An `Operator`; entry i k + j of a vector belongs to output j of example i.

    Raises:
        InputError: as `dnntk.empirical_ntk_fn`, or x has no examples.
    """
    apply = as_apply_fn(model_or_apply_fn)
    graph, variables = split_variables(model_or_apply_fn, variables)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = checked_batch("x", x)
    check_rows("x", jax.tree.leaves(x)[0])
    x = jax.tree.map(lambda a: a if isinstance(a, jax.core.Tracer) else on_host(a), x)
    scale = 1.0
    if isinstance(model_or_apply_fn, DeepNarrowMLP | DeepNarrowCNN):
        dtype = common_dtype(*jax.tree.leaves((variables, x)))
        variables = jax.tree.map(lambda p: p.astype(dtype), variables)
        if model_or_apply_fn.parametrization == "standard":
            scale = model_or_apply_fn.parameter_scale**2
    dtype = parameters(variables)[0][0][0].dtype

    def outputs_of(variables: Any, params: Params, x: Any) -> jax.Array:
        network = merged(graph, parameters(variables)[1](params))
        outputs = apply(network, jax.tree.map(lambda a: a[None], x))
        return flat_outputs(outputs, variables, dtype)

    (stored, k), (stored_by_two, _) = (_sizes(outputs_of, variables, x, n) for n in (1, 2))
    if block_size is None:
        block_size = CHUNK_ELEMENTS // max(1, stored_by_two - stored)
    else:
        block_size = check_count("block_size", block_size)
    n = len(jax.tree.leaves(x)[0])
    return Operator(variables, x, outputs_of, k, scale, max(1, min(n, block_size)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables", "x"],
    meta_fields=["outputs_of", "outputs", "scale", "block_size"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Operator:
    """The NTK of n examples with k outputs each, scale * J J^T; made by `operator`.

    It is a pytree of its variables and examples: ``jax.jit(lambda op, v: op @ v)`` takes it as an
    argument, and ``jax.jit(op.matvec)`` contains the examples as constants. Outside transformations
    one compiled program runs chunk after chunk. Inside of them the chunks are a scan, whose
    convolutions are several times slower on a CPU.

    Attributes:
        variables: of the network.
        x: the examples, [n, ...] or a tree of such arrays.
        outputs_of: (variables, parameters, one example) -> [k].
        outputs: k, the number of outputs of an example.
        scale: the factor of J J^T.
        block_size: most examples in a chunk.
    """

    variables: Any
    x: Any
    outputs_of: Callable[[Any, Params, Any], jax.Array]
    outputs: int
    scale: float
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n k, n k)."""
        size = len(jax.tree.leaves(self.x)[0]) * self.outputs
        return size, size

    @property
    def dtype(self) -> np.dtype:
        """The dtype of products: the parameters', float32 at least."""
        return self._parameters()[0][0].dtype

    def matvec(self, v: ArrayLike) -> jax.Array:
        """The product with v [n k], or with each column of v [n k, c] in turn.

        It is pure and works under jit, vmap and grad. Time: about two gradients of all examples a
        column. Memory: a chunk's, and three times that of the parameters.

        Raises:
            InputError: v has another shape, or an entry is not a finite real number.
        """
        v = checked_array("v", v).astype(self.dtype)
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise InputError(
                f"v: expected [{self.shape[0]}] or [{self.shape[0]}, c], an entry an output of an "
                f"example, got shape {v.shape}; flatten [n, k] by reshape(-1)"
            )
        if v.ndim == 1:
            return self._product(v)
        if self._is_traced(v):
            return lax.map(self._product, v.T).T
        columns = [self._product(column) for column in v.T]
        return jnp.stack(columns, 1) if columns else v

    def __repr__(self) -> str:
        """Shape, dtype and chunks."""
        return f"Operator(shape={self.shape}, dtype={self.dtype}, block_size={self.block_size})"

    def __matmul__(self, v: ArrayLike) -> jax.Array:
        """`matvec`."""
        return self.matvec(v)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """As a symmetric operator for SciPy's solvers: NumPy vectors in and out."""
        product = lambda v: np.asarray(self.matvec(v))  # noqa: E731
        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, dtype=self.dtype
        )

    def diagonal(self) -> jax.Array:
        """The diagonal [n k], exactly: each output's squared gradient norm.

        Time: k gradients of each example. Memory: a chunk's, with dense and convolutional layers in
        factors (`dnntk.ntk.structured`).
        """
        parts = _parts(self.outputs_of, self.variables, self.x)
        size = CHUNK_ELEMENTS // (parts.elements + parts.pair_elements + 1)

        def step(_: None, x: Any, v: None) -> tuple[None, jax.Array]:
            return None, _squared_norms(self.outputs_of, self.variables, x)

        _, norms = self._fold(step, None, min(self.block_size, size))
        return self.scale * norms

    def trace(self, key: jax.Array, samples: int) -> jax.Array:
        """An unbiased estimate of the trace by ``samples`` products; exact from n k samples on.

        XNysTrace, for positive semidefinite operators (Epperly, Tropp, Webber 2024, XTrace: making
        the most of every sample in stochastic trace estimation), by `matfree`. The error falls with
        the eigenvalues beyond the first ``samples``.

        Args:
            key: random key.
            samples: products, 1 or more.

        Raises:
            InputError: samples is not a positive integer, or ``key`` is no random key.
        """
        check_key("key", key)
        from matfree import stochtrace  # slow to import

        samples = check_count("samples", samples)
        if samples >= self.shape[0]:
            return jnp.sum(self.diagonal())
        products: list[jax.Array] = []

        def columns_in_turn(size: int, batched: Any, v: jax.Array) -> tuple[jax.Array, bool]:
            products.append(self.matvec(v.T).T)
            return products[-1], True

        product = jax.custom_batching.custom_vmap(self.matvec)
        product.def_vmap(columns_in_turn)
        sampler = stochtrace.sampler_normal(jnp.zeros(self.shape[0], self.dtype), num=samples)
        estimate = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xnystrace(), sampler)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            found = estimate(product, key)
        return jnp.where(jnp.any(products[0] != 0), found, 0)  # matfree divides by a zero kernel

    def eigsh(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The leading eigenpairs, by the implicitly restarted Lanczos method (ARPACK).

        Args:
            count: 1 to n k.

        Returns:
            (values [count], largest first; vectors [n k, count], orthonormal), to rounding.

        Raises:
            InputError: count is not within its range.
        """
        count, size = check_count("count", count), self.shape[0]
        if count > size:
            raise InputError(f"count: expected at most n k = {size}, got {count}; ask for fewer")
        if count < size - 1:
            start = np.random.default_rng(0).standard_normal(size).astype(self.dtype)
            try:
                values, vectors = scipy.sparse.linalg.eigsh(self.to_scipy(), count, v0=start)
            except scipy.sparse.linalg.ArpackError:  # also for a kernel of zeros
                if np.any(self @ start):
                    raise
                values, vectors = np.zeros(count, self.dtype), np.eye(size, count, dtype=self.dtype)
        else:  # ARPACK finds fewer than n k
            values, vectors = np.linalg.eigh(np.asarray(self @ np.eye(size)))
        return values[::-1][:count], vectors[:, ::-1][:, :count]

    def _parameters(self) -> Params:
        return parameters(self.variables)[0]

    def _is_traced(self, *arrays: Any) -> bool:
        leaves = jax.tree.leaves((self.variables, self.x, arrays))
        return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)

    def _product(self, v: jax.Array) -> jax.Array:
        """The product with one vector."""

        def pull(total: Params, x: Any, v: Any) -> tuple[Params, None]:
            return _pull(self.outputs_of, self.variables, total, x, v), None

        def push(direction: Params, x: Any, v: None) -> tuple[Params, jax.Array]:
            return direction, _push(self.outputs_of, self.variables, direction, x)

        zeros = jax.tree.map(jnp.zeros_like, self._parameters())
        direction, _ = self._fold(pull, zeros, self.block_size, v)
        _, product = self._fold(push, direction, self.block_size)
        return self.scale * product

    def _fold(
        self, step: Callable[..., Any], carry: Any, size: int, v: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Carry ``step``, (carry, examples, rows of v) -> (carry, rows), through all chunks.

        All chunks have one length. The last one begins with examples of the one before it, whose
        rows of v are zeros and whose rows are left out.

        Returns:
            (the last carry, all rows [n k] or None).
        """
        traced = self._is_traced(carry, v)
        xp: Any = jnp if traced else np  # NumPy compiles nothing for each shape
        n = len(jax.tree.leaves(self.x)[0])
        count = math.ceil(n / max(1, size))
        size = math.ceil(n / count)
        starts = np.minimum(size * np.arange(count), n - size)
        last, repeated = size * (count - 1), size * count - n
        if v is not None:
            v = xp.asarray(v).reshape(n, self.outputs)
            v = xp.concatenate([v[:last], xp.zeros((repeated, self.outputs), v.dtype), v[last:]])
            v = v.reshape(count, size, self.outputs)

        def chunk(x: Any, start: Any) -> Any:
            return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), x)

        if traced:
            x = jax.tree.map(jnp.asarray, self.x)
            body = lambda carry, at: step(carry, chunk(x, at[0]), at[1])  # noqa: E731
            carry, rows = lax.scan(body, carry, (starts, v))
        else:
            found = []
            for i, start in enumerate(starts):
                x = jax.tree.map(
                    lambda a, s=start: (
                        a[s : s + size] if isinstance(a, np.ndarray) else chunk(a, s)
                    ),
                    self.x,
                )
                # A chunk is waited for, since each that is under way takes memory.
                carry, row = jax.block_until_ready(step(carry, x, None if v is None else v[i]))
                found.append(row)
            rows = None if found[0] is None else np.stack(found)
        if rows is not None:
            rows = rows.reshape(count * size, -1)
            rows = jnp.asarray(xp.concatenate([rows[:last], rows[last + repeated :]]).reshape(-1))
        return carry, rows


def _batch(outputs_of: Callable[..., Any], variables: Any, x: Any) -> Callable[[Params], jax.Array]:
    """Parameters -> outputs [n, k]."""
    return lambda params: jax.vmap(outputs_of, (None, None, 0))(variables, params, x)


def _sizes(outputs_of: Callable[..., Any], variables: Any, x: Any, n: int) -> tuple[int, int]:
    """(numbers that a gradient stores for n examples on its way, outputs of an example)."""
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), x)

    def passes(variables: Any, x: Any) -> tuple[jax.Array, Any]:
        return jax.vjp(_batch(outputs_of, variables, x), parameters(variables)[0])

    outputs, stored = jax.eval_shape(passes, variables, batch)
    return sum(a.size for a in jax.tree.leaves(stored)), outputs.shape[1]


@partial(jax.jit, static_argnums=0)
def _pull(
    outputs_of: Callable[..., Any], variables: Any, total: Params, x: Any, v: jax.Array
) -> Params:
    """The sum of ``total`` and J^T v."""
    _, pull = jax.vjp(_batch(outputs_of, variables, x), parameters(variables)[0])
    return jax.tree.map(jnp.add, total, pull(v)[0])


@partial(jax.jit, static_argnums=0)
def _push(outputs_of: Callable[..., Any], variables: Any, direction: Params, x: Any) -> jax.Array:
    """J direction."""
    return jax.jvp(_batch(outputs_of, variables, x), (parameters(variables)[0],), (direction,))[1]


def _parts(outputs_of: Callable[..., Any], variables: Any, x: Any) -> Factors:
    """The Jacobian's parts for an example's products with itself."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)
    return factors(outputs_of, variables, parameters(variables)[0], one, (1, 1), "diagonal")


@partial(jax.jit, static_argnums=0)
def _squared_norms(outputs_of: Callable[..., Any], variables: Any, x: Any) -> jax.Array:
    """Of each output's gradient: [n, k]."""
    parts = _parts(outputs_of, variables, x)

    def of_one(x: Any) -> jax.Array:
        found = parts.of(variables, parameters(variables)[0], jax.tree.map(lambda a: a[None], x))
        terms = [product(a, a)[0, 0] for product, a in zip(parts.products, found, strict=True)]
        return sum(terms[1:], start=terms[0])

    return jax.vmap(of_one)(x)
