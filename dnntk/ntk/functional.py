"""Any network as a pure function of its arrays, for both of Flax's kinds of module.

A linen module is a function of its variables already. An NNX module contains its arrays, which
`nnx.split` separates from the graph definition; that is hashable and so may be static under `jit`.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dnntk.checks import brief, checked_array, common_dtype, native_numbers, real_array
from dnntk.errors import InputError

__all__ = [
    "Params",
    "as_apply_fn",
    "check_collections",
    "checked_batch",
    "checked_batches",
    "flat_outputs",
    "has_collections",
    "merged",
    "parameters",
    "split_variables",
]

ApplyFn = Callable[[Any, Any], Any]
Params = list[tuple[jax.Array, ...]]  # each parameter's value, or its real and imaginary part
BY_FUNCTION = "give the module, or a function (variables, x) -> outputs"


def as_apply_fn(apply_fn: Any) -> ApplyFn:
    """A module, its ``apply`` or a function as a function (variables, x) -> outputs.

    Raises:
        InputError: it is something else.
    """
    expected = "apply_fn must be a flax module or a function"
    if isinstance(apply_fn, type):
        raise InputError(f"{expected}, got the class {apply_fn.__name__}; give an instance of it")
    owner = getattr(apply_fn, "__self__", None)
    if _is_nnx(owner) or (
        isinstance(owner, nn.Module) and getattr(apply_fn, "__name__", "") != "apply"
    ):
        raise InputError(f"{expected}, got a method of {type(owner).__name__}; {BY_FUNCTION}")
    if isinstance(apply_fn, nn.Module) or _is_nnx(apply_fn):
        _check_one_argument(apply_fn)
    if isinstance(apply_fn, nn.Module):
        return apply_fn.apply
    if not callable(apply_fn):
        raise InputError(f"{expected}, got {brief(apply_fn)}; {BY_FUNCTION}")
    return (lambda module, x: module(x)) if _is_nnx(apply_fn) else apply_fn


def split_variables(apply_fn: Any, variables: Any) -> tuple[Any, Any]:
    """(graph definition of an NNX module or None, variables as a tree of arrays).

    NumPy's arrays become JAX's on the host, before JAX could wrap integers; half precision and
    complex numbers keep their dtype.

    Args:
        apply_fn: the user's module or function.
        variables: for a linen module, a mapping of collections; for an NNX module, a module of its
            class, its `nnx.state`, or a part of that state; for a function, any tree.

    Raises:
        InputError: ``variables`` are not as above, or contain integers that JAX would wrap.
    """
    graph = None
    if isinstance(getattr(apply_fn, "__self__", apply_fn), nn.Module):
        check_collections(variables, ("params",))
    elif _is_nnx(apply_fn) or _is_nnx(variables):
        graph, variables = _split_nnx(apply_fn, variables)
    return graph, jax.tree_util.tree_map_with_path(_variable, variables)


def check_collections(variables: Any, names: tuple[str, ...]) -> None:
    """Raise `InputError` unless ``variables`` is a mapping with at least these collections."""
    if isinstance(variables, Mapping) and set(names) <= set(variables):
        return
    expected = "{" + ", ".join(f"{name!r}: ..." for name in names) + "}"
    if isinstance(variables, Mapping):
        got = "a mapping of " + (", ".join(map(str, variables))[:60] or "nothing")
    else:
        got = type(variables).__name__
    source = "state.params" if hasattr(variables, "params") else "..."
    raise InputError(
        f"variables: expected the collections {expected} that the module's init returned, got "
        f"{got}; give {{'params': {source}}} and the module's other collections"
    )


def has_collections(variables: Any) -> bool:
    """Are these linen's collections, or a function's alike: a mapping with the entry "params"?"""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(variables, nnx.State):
        return False
    return isinstance(variables, Mapping) and "params" in variables


def merged(graph: Any, variables: Any) -> Any:
    """An apply function's first argument: variables, or their NNX module in evaluation mode."""
    if graph is None:
        return variables
    module = sys.modules["flax.nnx"].merge(graph, variables)
    module.eval()
    return module


def checked_batch(name: str, value: Any) -> Any:
    """A batch, an array [n, ...] or a tree of them with one n, as JAX's arrays.

    Raises:
        InputError: it is none, or has entries that are not finite real numbers.
    """

    def checked(path: Any, leaf: Any) -> jax.Array:
        full_name = name + jax.tree_util.keystr(path)
        x = _in_own_dtype(checked_array(full_name, leaf, keep_integers=True), leaf)
        if x.ndim == 0:
            raise InputError(f"{full_name} must be a batch [n, ...], got one number; add an axis")
        return x

    try:
        batch = jax.tree_util.tree_map_with_path(checked, value, is_leaf=_is_one_array)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} must have keys that can be sorted, got {brief(value)}") from None
    lengths = sorted({len(x) for x in jax.tree.leaves(batch)})
    if not lengths:
        raise InputError(
            f"{name} must be an array [n, ...], or a tuple or mapping of some, got {brief(value)}"
        )
    if len(lengths) > 1:
        raise InputError(
            f"{name} must have the same number of examples in each array [n, ...], got "
            f"{' and '.join(map(str, lengths))}; give every input one entry per example"
        )
    return batch


def checked_batches(x1: Any, x2: Any) -> tuple[Any, Any]:
    """Two batches, arrays [n, ...] or trees of them, equal but for n; x2 is None if it is x1.

    Raises:
        InputError: the batches differ in more, or have entries that are not finite real numbers.
    """
    left = checked_batch("x1", x1)
    if x2 is None or x2 is x1:
        return left, None
    right = checked_batch("x2", x2)
    shapes = [jax.tree.map(lambda x: x.shape[1:], batch) for batch in (left, right)]
    if not _alike(left, right) or shapes[0] != shapes[1]:
        raise InputError(
            f"x2 must hold inputs of shape {brief(shapes[0])}, as x1 does, got {brief(shapes[1])}; "
            "reshape or resize one of them"
        )
    return left, right


def parameters(variables: Any) -> tuple[Params, Callable[[Params], Any]]:
    """The arrays to differentiate by, and the function that puts them back into ``variables``.

    The arrays are the floating-point ones of the entry "params" if there is one, of ``nnx.Param``
    in an NNX state, else all. A complex array counts as two real ones. All are converted to one
    dtype, float32 at least, and converted back to their own when they are put back.

    Raises:
        InputError: ``variables`` have no such array.
    """
    nnx, nested = sys.modules.get("flax.nnx"), has_collections(variables)
    tree = variables["params"] if nested else variables
    leaves, structure = jax.tree.flatten(tree)
    is_variable = lambda v: nnx is not None and isinstance(v, nnx.Variable)  # noqa: E731
    trainable = [
        not is_variable(node) or (nnx is not None and isinstance(node, nnx.Param))
        for node in jax.tree.leaves(tree, is_leaf=is_variable)
        for _ in jax.tree.leaves(node)
    ]
    moving = [i for i, leaf in enumerate(leaves) if trainable[i] and _is(leaf, np.inexact)]
    if not moving:
        raise InputError("variables: expected floating-point arrays to differentiate by, got none")
    parts = [
        (leaves[i].real, leaves[i].imag) if _is(leaves[i], np.complexfloating) else (leaves[i],)
        for i in moving
    ]
    dtype = common_dtype(*jax.tree.leaves(parts))

    def rebuild(params: Params) -> Any:
        whole = list(leaves)
        for i, parts in zip(moving, params, strict=True):
            value = jax.lax.complex(*parts) if len(parts) == 2 else parts[0]
            whole[i] = value.astype(leaves[i].dtype)
        tree = jax.tree.unflatten(structure, whole)
        return {**variables, "params": tree} if nested else tree

    return jax.tree.map(lambda p: p.astype(dtype), parts), rebuild


def flat_outputs(outputs: Any, variables: Any, dtype: np.dtype) -> jax.Array:
    """The outputs of one example, flattened and joined, in ``dtype``.

    Raises:
        InputError: an array has no axis of examples, or no real floating-point numbers; or the
            network returned updated variables, too.
    """
    if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Mapping):
        known = {"intermediates", *(variables if isinstance(variables, Mapping) else ())}
        if outputs[1] and set(outputs[1]) <= known:
            raise InputError(
                "apply_fn: expected outputs alone, got outputs and the updated collections "
                f"{', '.join(outputs[1])}; leave mutable= out, or return the outputs alone"
            )
    leaves = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    for y in leaves:
        if y.ndim == 0 or len(y) != 1:
            raise InputError(
                "apply_fn: expected outputs [n, ...] for inputs [n, ...], got shape "
                f"{y.shape} for n = 1; return an entry an example"
            )
        if not _is(y, np.floating):
            raise InputError(
                f"apply_fn: expected real floating-point outputs, got {y.dtype}; return what can "
                "be differentiated, and real and imaginary parts apart"
            )
    if not leaves:
        raise InputError("apply_fn: expected outputs [n, ...], got none; return an array")
    return jnp.concatenate([y.reshape(-1).astype(dtype) for y in leaves])


def _is_nnx(value: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # a user with an NNX module has imported it
    return nnx is not None and isinstance(value, nnx.Module)


def _alike(left: Any, right: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(left), jax.tree.structure(right)]
    return structures[0] == structures[1]


def _is(leaf: jax.Array, kind: type) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, kind)


def _check_one_argument(module: Any) -> None:
    needed = [
        name
        for name, argument in inspect.signature(type(module).__call__).parameters.items()
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    ][1:]
    if len(needed) > 1:
        call = "m(*x)" if _is_nnx(module) else "net.apply(m, *x)"
        raise InputError(
            f"apply_fn: expected a module that takes one argument, got {type(module).__name__}, "
            f"which needs {', '.join(needed)}; give a function of variables and one tuple, "
            f"lambda m, x: {call}"
        )


def _split_nnx(apply_fn: Any, variables: Any) -> tuple[Any, Any]:
    nnx = sys.modules["flax.nnx"]
    if isinstance(variables, nnx.Module):
        if _is_nnx(apply_fn) and type(variables) is not type(apply_fn):
            raise InputError(
                f"variables: expected an NNX module like apply_fn, {type(apply_fn).__name__}, got "
                f"{type(variables).__name__}; give the module itself"
            )
        return nnx.split(variables)
    graph, own = nnx.split(apply_fn)
    state = nnx.merge_state(own, variables) if isinstance(variables, nnx.State) else None
    if state is None or not _alike(state, own):
        raise InputError(
            "variables: expected an NNX module like apply_fn or its nnx.state(module), got "
            f"{'another state' if state is not None else type(variables).__name__}; give the "
            "module itself"
        )
    return graph, state


def _variable(path: Any, value: Any) -> Any:
    name = f"variables{jax.tree_util.keystr(path)}"
    if isinstance(value, jax.Array):
        return value  # complex numbers and random keys included
    if isinstance(value, np.ndarray | complex) and np.iscomplexobj(value):
        parts = [native_numbers(name, part) for part in (np.real(value), np.imag(value))]
        value = parts[0] + 1j * parts[1]
        return jnp.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
    return _in_own_dtype(real_array(name, value, keep_integers=True), value)


def _in_own_dtype(x: jax.Array, value: Any) -> jax.Array:
    """Half precision as given, so that a network's arrays keep the user's dtypes."""
    dtype = value.dtype if isinstance(value, jax.Array | np.ndarray) else x.dtype
    half = jax.dtypes.issubdtype(dtype, np.floating) and dtype.itemsize < 4
    return x.astype(dtype.newbyteorder("=")) if half else x


def _is_one_array(value: Any) -> bool:
    """True for an array, also as nested numbers; a tuple or a mapping of arrays is a tree."""
    if not isinstance(value, tuple):
        return isinstance(value, list) or hasattr(value, "shape")
    return not any(
        isinstance(v, Mapping)
        or getattr(v, "shape", ()) != ()
        or (isinstance(v, tuple) and not _is_one_array(v))
        for v in value
    )
