"""The empirical neural tangent kernel (NTK): products of the rows of a network's Jacobian.

`empirical_ntk` is the thesis's scaled NTK of a deep narrow network, (1 / (L C^2)) J(x) J(x')^T, at
any time of its training; `empirical_ntk_fn` is the plain J(x) J(x')^T of any Flax module or apply
function. All methods give the same numbers:

* ``jacfwd``: the definition, `jax.jacfwd` under `jax.vmap`. Cost: a forward pass a parameter.
* ``jacrev``: a backward pass an output. Memory: outputs x parameters an example.
* ``layerwise``: deep narrow networks only; see `dnntk.ntk.layerwise`. It never forms the network's
  Jacobian, and its compile time does not grow with depth.
* ``structured``: any other network; dense and convolutional layers are products of their inputs
  and of derivatives by their outputs where that is less work; see `dnntk.ntk.structured`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dnntk.checks import check_choice, check_count, checked_pair, common_dtype, real_array
from dnntk.errors import InputError
from dnntk.kernel.gram import blockwise
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP, Variables
from dnntk.ntk.functional import (
    Params,
    as_apply_fn,
    check_collections,
    checked_batches,
    flat_outputs,
    merged,
    parameters,
    split_variables,
)
from dnntk.ntk.layerwise import Outputs, choose_segments, layerwise
from dnntk.ntk.structured import factors, rows

__all__ = ["empirical_ntk", "empirical_ntk_fn"]

Method = Literal["auto", "layerwise", "jacfwd", "jacrev"]
AnyNetworksMethod = Literal["auto", "structured", "jacrev", "jacfwd"]

# Array elements that a block of examples may take in addition to the result: 1 GB in float32.
BLOCK_ELEMENTS = 1 << 28
# Fewer examples than this are multiplied with themselves in one product.
FEW_EXAMPLES = 32


def empirical_ntk(
    model: DeepNarrow,
    variables: Variables,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    method: Method = "auto",
    outputs: Outputs = "full",
    block_size: int | None = None,
) -> jax.Array:
    """Scaled NTK of a deep narrow network, (1 / (L C^2)) J(x) J(x')^T (section 3.1.1).

    Args:
        model: `DeepNarrowMLP` or `DeepNarrowCNN`; any initialization, either parametrization.
        variables: of ``model``, trained or not.
        x1: [n1, d_in], or NHWC images [n1, H, W, c].
        x2: [n2, ...]; None means x1, and each pair of blocks is then computed once.
        method: "layerwise", "jacfwd" or "jacrev" (see the module's docstring; they agree to
            rounding); "auto" is "layerwise".
        outputs: "full" for all pairs of outputs, "diagonal" for each output with itself, "trace"
            for the sum of these.
        block_size: largest number of examples of x1, and of x2, at a time; None is as many as take
            about 1 GB beside the result. The result does not depend on it, up to rounding.

    Returns:
        [n1, n2, d_out, d_out] ("full"), [n1, n2] ("trace") or [n1, n2, d_out] ("diagonal"), in the
        dtype of inputs and parameters together, float32 at least; empty without examples. The
        layerwise method takes time of order n1 n2 (width + d_out^2 width) L for an MLP and
        n1 n2 d_out^2 width^2 q^2 L for a CNN.

    Raises:
        InputError: an argument has the wrong shape, type or range, or an input is not finite.
    """
    if not isinstance(model, DeepNarrowMLP | DeepNarrowCNN):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(
            f"model: expected a DeepNarrowMLP or DeepNarrowCNN, got {got}; "
            "dnntk.empirical_ntk_fn takes any Flax module"
        )
    left, right = checked_pair(x1, x2)
    check_choice("method", method, get_args(Method))
    check_choice("outputs", outputs, get_args(Outputs))
    if block_size is not None:
        block_size = check_count("block_size", block_size)
    check_collections(variables, ("params",))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, v: real_array(f"variables{jax.tree_util.keystr(path)}", v), variables
    )
    method = "layerwise" if method == "auto" else method
    return _empirical_ntk(model, method, outputs, block_size, variables, left, right)


def empirical_ntk_fn(
    apply_fn: Any,
    *,
    method: AnyNetworksMethod = "auto",
    outputs: Outputs = "full",
    block_size: int | None = None,
) -> Callable[..., jax.Array]:
    """The unscaled NTK J(x) J(x')^T of any Flax module or apply function.

    Args:
        apply_fn: a linen module, its ``apply``, an NNX module, or a function (variables, x [n,
            ...]) -> [n, ...]. It gets one example at a time, as a batch of one under `jax.vmap`:
            an example's outputs must not depend on other examples, so batch normalization must use
            its running averages. Of NNX modules a copy in evaluation mode (``eval()``) is used.
        method: "structured", "jacrev" or "jacfwd" (see the module's docstring; they agree to
            rounding); "auto" is "structured".
        outputs: as in `empirical_ntk`.
        block_size: as in `empirical_ntk`: how many examples' Jacobians, or factors, are in memory.

    Returns:
        ntk(variables, x1, x2=None): [n1, n2, k, k], [n1, n2] or [n1, n2, k], with k the number of
        outputs of an example, flattened and joined; in the parameters' dtype, float32 at least;
        x2=None means x1. The function is pure and jitted: use the same one again, and it is
        compiled once for each shape. It works under vmap over variables. Memory beyond the result:
        2 block_size k parameters, or less in factors, and the passes over the network.

        ``variables`` is the first argument of apply_fn. The derivative is by its entry "params" if
        it is a mapping with such an entry, like linen's variables, else by all its floating-point
        arrays. A complex parameter counts as two: its real and its imaginary part. For NNX,
        ``variables`` is the module itself, ``nnx.state(module)`` or ``nnx.state(module,
        nnx.Param)``; the derivative is by ``nnx.Param`` alone, and a function gets a module:
        ``lambda m, x: m.encode(x)``.

        x1 and x2 are arrays, or tuples or mappings of arrays [n, ...] for several inputs: apply_fn
        gets the tuple or mapping as one argument (``lambda v, x: net.apply(v, *x)`` unpacks a
        tuple). A list is one array. Integers stay integers, for embeddings.

    Raises:
        InputError: an argument has the wrong type or range, an input is not finite, integers do
            not fit JAX's, inputs are complex or of different lengths, or apply_fn does not return
            real [n, ...].
    """
    apply = as_apply_fn(apply_fn)
    check_choice("method", method, get_args(AnyNetworksMethod))
    method = "structured" if method == "auto" else method
    check_choice("outputs", outputs, get_args(Outputs))
    if block_size is not None:
        block_size = check_count("block_size", block_size)

    @partial(jax.jit, static_argnums=0)
    def compute(graph: Any, variables: Any, x1: Any, x2: Any) -> jax.Array:
        pure = lambda variables, x: apply(merged(graph, variables), x)  # noqa: E731
        return _explicit_ntk(pure, method, outputs, block_size, variables, x1, x2)

    def ntk(variables: Any, x1: Any, x2: Any = None) -> jax.Array:
        return compute(*split_variables(apply_fn, variables), *checked_batches(x1, x2))

    return ntk


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empirical_ntk(
    model: DeepNarrow,
    method: Method,
    outputs: Outputs,
    block_size: int | None,
    variables: Variables,
    x1: jax.Array,
    x2: jax.Array | None,
) -> jax.Array:
    leaves, structure = jax.tree.flatten((variables, x1, x2))
    dtype = common_dtype(*leaves)
    variables, x1, x2 = jax.tree.unflatten(structure, [leaf.astype(dtype) for leaf in leaves])
    if method != "layerwise":
        kernel = _explicit_ntk(model.apply, method, outputs, block_size, variables, x1, x2)
        return kernel * (model.parameter_scale**2 if model.parametrization == "standard" else 1.0)
    segments = choose_segments(model, x1.shape[1:])
    block = block_size or max(1, BLOCK_ELEMENTS // (2 * segments.elements))
    pair = partial(layerwise, model, outputs, segments, variables)
    return blockwise(pair, x1, x2, block**2, most=block)


# ---- any network


def _explicit_ntk(
    apply: Callable[..., Any],
    method: str,
    outputs: Outputs,
    block_size: int | None,
    variables: Any,
    x1: Any,
    x2: Any,
) -> jax.Array:
    """J(x) J(x')^T, a block of examples at a time."""
    params, _ = parameters(variables)

    def outputs_of(variables: Any, params: Params, x: Any) -> jax.Array:
        network = parameters(variables)[1](params)
        outputs = apply(network, jax.tree.map(lambda a: a[None], x))
        return flat_outputs(outputs, variables, params[0][0].dtype)

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), x1)
    if method == "structured":
        counts = len(jax.tree.leaves(x1)[0]), len(jax.tree.leaves(x1 if x2 is None else x2)[0])
        parts = factors(outputs_of, variables, params, one, counts, outputs)
    else:
        differentiate = jax.jacfwd if method == "jacfwd" else jax.jacrev
        parts = rows(differentiate, outputs_of, variables, params, one, outputs)

    def product(left: list[Any], right: list[Any]) -> jax.Array:
        terms = [of(a, b) for of, a, b in zip(parts.products, left, right, strict=True)]
        return sum(terms[1:], start=terms[0])

    def pair(x1: Any, x2: Any) -> jax.Array:
        n = len(jax.tree.leaves(x1)[0])
        if x2 is x1:
            return _above_diagonal(product, parts.of(variables, params, x1), n)
        if jax.tree.map(jnp.dtype, x1) == jax.tree.map(jnp.dtype, x2):  # traced once
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
            both = parts.of(variables, params, both)
            return product(jax.tree.map(lambda j: j[:n], both), jax.tree.map(lambda j: j[n:], both))
        return product(*(parts.of(variables, params, x) for x in (x1, x2)))

    block_size = block_size or parts.most_examples(BLOCK_ELEMENTS)
    return blockwise(pair, x1, x2, block_size**2, most=block_size)


def _above_diagonal(product: Callable[..., jax.Array], parts: list[Any], n: int) -> jax.Array:
    """The product of n examples with themselves, with zeros in some places below its diagonal.

    `blockwise` puts the mirror image there. A few rows at a time are multiplied with what is right
    of the diagonal.
    """
    size = n if n < FEW_EXAMPLES else -(-n // 4)
    rows = [
        product(
            *(jax.tree.map(lambda j, s=s: j[s], parts) for s in (slice(i, i + size), slice(i, n)))
        )
        for i in range(0, n, size)
    ]
    pads = [((0, 0), (n - row.shape[1], 0), *((0, 0),) * (row.ndim - 2)) for row in rows]
    return jnp.concatenate([jnp.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
