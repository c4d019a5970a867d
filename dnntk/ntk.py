"""The empirical neural tangent kernel: what a network's Jacobian says that training will do.

`empirical_ntk` is the thesis's scaled NTK of a deep narrow network, (1 / (L C^2)) J(x) J(x')^T, at
any time of its training; `empirical_ntk_fn` is the plain J(x) J(x')^T of any Flax module or apply
function. Three methods give the same numbers:

* ``jacfwd``: the definition, `jax.jacfwd` under `jax.vmap`. Cost: a forward pass a parameter.
* ``jacrev``: a backward pass an output. Memory: outputs x parameters an example.
* ``layerwise``: deep narrow networks only. With A a layer's inputs and B the outputs' derivative by
  its pre-activations, a layer adds (A A'^T + 1) * (B B'^T): one scan over depth adds them up. The
  Jacobian of the network is never there, and compile time does not grow with depth.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_choice, check_count, checked_array, checked_pair
from dnntk.errors import InputError
from dnntk.gram import blockwise
from dnntk.layerwise import Outputs, layerwise, plan
from dnntk.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP, Variables

Method = Literal["auto", "layerwise", "jacfwd", "jacrev"]

# Array elements that a block of examples may take, beside the result: 1 GB in float32.
BLOCK_ELEMENTS = 1 << 28


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
        x2: [n2, ...]; None means x1, and then each pair of blocks is computed once.
        method: "layerwise", "jacfwd" or "jacrev" (see the module's docstring; they agree to
            rounding); "auto" is "layerwise".
        outputs: "full" is the kernel matrix of all pairs of outputs, "trace" the sum of its
            diagonal, "diagonal" an output with itself only.
        block_size: most examples of x1, and of x2, at a time; None is as many as fit in about 1 GB
            beside the result. The result does not depend on it, up to rounding.

    Returns:
        [n1, n2, d_out, d_out] ("full"), [n1, n2] ("trace") or [n1, n2, d_out] ("diagonal"), in the
        dtype of inputs and parameters together. Layerwise, time is of order n1 n2 (width + d_out^2
        width) L for an MLP, n1 n2 d_out^2 width^2 q^2 L for a CNN.

    Raises:
        InputError: an argument has the wrong shape, type or range, or an input is not finite.
    """
    if not isinstance(model, DeepNarrowMLP | DeepNarrowCNN):
        raise InputError(
            "model: expected a DeepNarrowMLP or DeepNarrowCNN, got "
            f"{type(model).__name__}; dnntk.empirical_ntk_fn takes any Flax module"
        )
    left, right = checked_pair(x1, x2)
    check_choice("method", method, get_args(Method))
    check_choice("outputs", outputs, get_args(Outputs))
    if block_size is not None:
        check_count("block_size", block_size)
    method = "layerwise" if method == "auto" else method
    return _empirical_ntk(model, method, outputs, block_size, variables, left, right)


def empirical_ntk_fn(
    apply_fn: nn.Module | Callable[..., Any],
    *,
    method: Literal["jacrev", "jacfwd"] = "jacrev",
    outputs: Outputs = "full",
    block_size: int | None = None,
) -> Callable[..., jax.Array]:
    """The unscaled NTK J(x) J(x')^T of any Flax module or apply function.

    Args:
        apply_fn: a flax module, its ``apply``, or a function (variables, x [n, ...]) -> [n, ...].
            It is given one example at a time, as a batch of one under `jax.vmap`, so that examples
            must not see each other: call batch normalization with its running averages.
        method: "jacrev" (a backward pass an output) or "jacfwd" (a forward pass a parameter).
        outputs: as in `empirical_ntk`.
        block_size: most examples of x1, and of x2, whose Jacobians are held at a time; None is as
            many as take about 1 GB. The result does not depend on it, up to rounding.

    Returns:
        ntk(variables, x1, x2=None): [n1, n2, k, k], [n1, n2] or [n1, n2, k], k the outputs of an
        example, flattened and joined. ``variables`` is whatever apply_fn takes first; the
        derivative is by its entry "params" where it is a mapping that has one, as flax's
        variables, else by all its floating-point arrays. x2=None means x1. Pure and jitted: keep
        the function, and it is compiled once a shape; it works under vmap over variables. Memory
        beyond the result: 2 block_size k parameters, and the passes over the network.

    Raises:
        InputError: an argument has the wrong type or range, an input is not finite, or apply_fn
            does not return [n, ...].
    """
    apply = apply_fn.apply if isinstance(apply_fn, nn.Module) else apply_fn
    if not callable(apply):
        raise InputError(f"apply_fn must be a flax module or a function, got {apply_fn!r:.60}")
    check_choice("method", method, ("jacrev", "jacfwd"))
    check_choice("outputs", outputs, get_args(Outputs))
    if block_size is not None:
        check_count("block_size", block_size)
    compute = jax.jit(partial(_explicit_ntk, apply, method, outputs, block_size))

    def ntk(variables: Any, x1: ArrayLike, x2: ArrayLike | None = None) -> jax.Array:
        return compute(variables, *checked_pair(x1, x2, _batch))

    return ntk


def _batch(name: str, value: ArrayLike) -> jax.Array:
    x = checked_array(name, value)
    if x.ndim == 0:
        raise InputError(f"{name} must be a batch [n, ...], got one number; add an axis")
    return x


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
    if method != "layerwise":
        kernel = _explicit_ntk(model.apply, method, outputs, block_size, variables, x1, x2)
        return kernel * (model.step**2 if model.parametrization == "standard" else 1.0)
    held = plan(model, x1.shape[1:])
    block = block_size or max(1, BLOCK_ELEMENTS // (2 * held.elements))
    pair = partial(layerwise, model, outputs, held, variables)
    return blockwise(pair, x1, x2, block**2, most=block)


# ---- any network: Jacobians held explicitly


def _explicit_ntk(
    apply: Callable[..., Any],
    method: Method,
    outputs: Outputs,
    block_size: int | None,
    variables: Any,
    x1: jax.Array,
    x2: jax.Array | None = None,
) -> jax.Array:
    """J(x) J(x')^T, a block of examples at a time."""
    params, rebuild = _trainable(variables)

    def outputs_of(params: list[jax.Array], x: jax.Array) -> jax.Array:
        leaves = [jnp.asarray(y) for y in jax.tree.leaves(apply(rebuild(params), x[None]))]
        for y in leaves:
            if y.ndim == 0 or len(y) != 1:
                raise InputError(
                    "apply_fn: expected outputs [n, ...] for inputs [n, ...], got shape "
                    f"{y.shape} for n = 1; return an entry an example"
                )
        return jnp.concatenate([y.reshape(-1) for y in leaves])

    differentiate = jax.jacfwd if method == "jacfwd" else jax.jacrev
    jacobian = jax.vmap(differentiate(outputs_of), (None, 0))

    def pair(x1: jax.Array, x2: jax.Array) -> jax.Array:
        left = jacobian(params, x1)
        right = left if x2 is x1 else jacobian(params, x2)
        flat = lambda j: j.reshape(*j.shape[:2], -1)  # noqa: E731
        products = [_inner(flat(a), flat(b), outputs) for a, b in zip(left, right, strict=True)]
        return sum(products[1:], start=products[0])

    if block_size is None:
        k = jax.eval_shape(outputs_of, params, jax.eval_shape(lambda x: x[0], x1)).size
        block_size = max(1, BLOCK_ELEMENTS // (2 * k * sum(p.size for p in params)))
    return blockwise(pair, x1, x2, block_size**2, most=block_size)


def _inner(a: jax.Array, b: jax.Array, outputs: Outputs) -> jax.Array:
    """[n1, k, p], [n2, k, p] -> the products of rows that ``outputs`` asks for."""
    indices = {"full": "nmkl", "trace": "nm", "diagonal": "nmk"}[outputs]
    row = "l" if outputs == "full" else "k"
    return jnp.einsum(f"nkp,m{row}p->{indices}", a, b, precision=lax.Precision.HIGHEST)


def _trainable(variables: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The arrays to differentiate by, and how to put them back among ``variables``."""
    nested = isinstance(variables, Mapping) and "params" in variables
    leaves, structure = jax.tree.flatten(variables["params"] if nested else variables)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not moving:
        raise InputError("variables: expected floating-point arrays to differentiate by, got none")

    def rebuild(params: list[jax.Array]) -> Any:
        whole = list(leaves)
        for i, value in zip(moving, params, strict=True):
            whole[i] = value
        tree = jax.tree.unflatten(structure, whole)
        return {**variables, "params": tree} if nested else tree

    return [leaves[i] for i in moving], rebuild
