"""A network as a polynomial in its parameters: the Taylor expansion around given ones.

The expansion of degree 1 is the linear network whose training the neural tangent kernel describes
(Lee et al. 2019, "Wide neural networks of any depth evolve as linear models under gradient
descent"): a trained network far from it has left the kernel regime. Higher degrees say how
(Bai & Lee 2020, "Beyond linearization: on quadratic and higher-order approximation of wide neural
networks").
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dnntk.checks import brief, integer
from dnntk.errors import InputError
from dnntk.ntk.functional import (
    Params,
    as_apply_fn,
    checked_batch,
    has_collections,
    merged,
    parameters,
    split_variables,
)

__all__ = ["linearize", "taylor_expand"]


def linearize(apply_fn: Any, variables: Any) -> Callable[[Any, Any], Any]:
    """The network that is linear in its parameters, f(x; p_0) + J(x; p_0) (p - p_0).

    It is `taylor_expand` of degree 1; arguments and errors are those of that function.

    Returns:
        f(variables, x) -> outputs, for the price of one forward-mode derivative (`jax.jvp`), about
        three evaluations; a Jacobian is never formed.
    """
    return taylor_expand(apply_fn, variables, 1)


def taylor_expand(apply_fn: Any, variables: Any, degree: int) -> Callable[[Any, Any], Any]:
    """The Taylor polynomial of a network in its parameters, around those of ``variables``.

        f(p, x) = sum over k <= degree of (1/k!) (d/ds)^k apply_fn(p_0 + s (p - p_0), x) at s = 0

    Args:
        apply_fn: a linen module, its ``apply``, an NNX module, or a function (variables, x) ->
            outputs, any tree. Of NNX modules a copy in evaluation mode (``eval()``) is used.
        variables: the centre p_0: a linen module's mapping of collections, an NNX module or its
            state, or any tree of arrays for a function.
        degree: of the polynomial, at least 0. 1 is `linearize`; from 2 on, a ReLU counts as
            linear on either side of its kink.

    Returns:
        f(variables, x) -> outputs, with the tree, shapes and dtypes of those of apply_fn; outputs
        that are no floating-point numbers are those at p_0. f is pure and jitted, also under grad
        and vmap; use the same f again, and it is compiled once for each shape.

        Its ``variables`` are like those of the centre. Their parameters move: the entry "params"
        of a mapping that has one, ``nnx.Param`` of NNX, all floating-point arrays otherwise. Other
        collections are taken as f gets them, or from the centre where f gets none. ``x`` is an
        array [n, ...], or a tuple or mapping of arrays. An evaluation takes the time and memory of
        ``degree`` nested forward-mode derivatives: each doubles the work at most.

    Raises:
        InputError: an argument has the wrong type or range; and, from f, its variables are not
            those of the centre's network, or an input is not finite.
    """
    apply = as_apply_fn(apply_fn)
    degree = integer("degree", degree, "an integer >= 0")
    if degree < 0:
        raise InputError(f"degree must be an integer >= 0, got {degree}; 1 is the linear network")
    _, centre = split_variables(apply_fn, variables)
    start, _ = parameters(centre)

    @partial(jax.jit, static_argnums=0)
    def polynomial(graph: Any, start: Params, variables: Any, x: Any) -> Any:
        params, rebuild = parameters(variables)
        start = jax.tree.map(lambda a, b: a.astype(b.dtype), start, params)
        steps = jax.tree.map(jnp.subtract, params, start)
        outputs = lambda params: apply(merged(graph, rebuild(params)), x)  # noqa: E731
        leaves, structure = jax.tree.flatten(outputs(start))
        expanded = iter(_polynomial(lambda p: _inexact(outputs(p)), start, steps, degree))
        leaves = [next(expanded) if _is_inexact(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, leaves)

    def expansion(variables: Any, x: Any) -> Any:
        graph, given = split_variables(apply_fn, variables)
        return polynomial(graph, start, _completed(given, centre), checked_batch("x", x))

    return expansion


def _polynomial(
    fn: Callable[[Params], list[jax.Array]], start: Params, steps: Params, degree: int
) -> list[jax.Array]:
    """The Taylor polynomial of ``fn`` around ``start``, at ``start + steps``."""

    def derivatives(order: int) -> Callable[[Params], tuple[list[jax.Array], ...]]:
        """The directional derivatives of ``fn`` up to an order."""
        if order == 0:
            return lambda params: (fn(params),)

        def of_params(params: Params) -> tuple[list[jax.Array], ...]:
            lower, slopes = jax.jvp(derivatives(order - 1), (params,), (steps,))
            return (lower[0], *slopes)

        return of_params

    terms = derivatives(degree)(start)
    return [
        sum((term / math.factorial(k) for k, term in enumerate(each[1:], 1)), start=each[0])
        for each in zip(*terms, strict=True)
    ]


def _inexact(outputs: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(outputs) if _is_inexact(leaf)]


def _is_inexact(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _completed(given: Any, centre: Any) -> Any:
    """Variables with the collections that they lack, if they are of the centre's network."""
    if has_collections(given) and has_collections(centre):
        given = {**centre, **given}
    found, expected = _by_path(given), _by_path(centre)
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            raise InputError(
                f"variables{path}: expected {expected.get(path, 'no entry')}, as at the centre of "
                f"the expansion, got {found.get(path, 'none')}; give variables of the same network"
            )
    return given


def _by_path(variables: Any) -> dict[str, str]:
    """{path to each array: its kind and shape}."""
    return {
        jax.tree_util.keystr(path): ("floats " if _is_inexact(leaf) else "integers ")
        + brief(list(leaf.shape))
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
    }
