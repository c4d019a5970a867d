"""A network's Jacobian in factors, for kernels that never form its rows.

With A a layer's inputs and B the derivatives of the network's outputs by the layer's, at positions
p, a dense or convolutional layer's part of the Jacobian is the sum of A_p^T B_p, and its part of
the kernel that of (A_p . A'_q) (B_p . B'_q): often far less work than products of rows as long as
the layer has weights (Novak, Sohl-Dickstein, Schoenholz 2022, Fast finite width neural tangent
kernel). `factors` finds such layers in the network's jaxpr, where they are a parameter's only use,
and the order of products that is the least work for each. Other parameters have their rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from dnntk.ntk.layerwise import Outputs

__all__ = ["Factors", "factors", "inner", "rows"]

# Primitives that only arrange a weight's entries, or convert them.
ARRANGE = {"reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "convert_element_type"}
# Calls whose derivatives are those of the function they call.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


class Factors(NamedTuple):
    """A Jacobian in parts.

    Attributes:
        of: (variables, parameters, x [n, ...]) -> parts, each a tree of arrays [n, ...].
        products: for each part, the function of its trees for n and m examples that is its term of
            the kernel.
        elements: numbers in an example's parts.
        pair_elements: most numbers of a term before its sums, for a pair of examples.
    """

    of: Callable[[Any, Any, Any], list[Any]]
    products: list[Callable[[Any, Any], jax.Array]]
    elements: int
    pair_elements: int

    def most_examples(self, budget: int) -> int:
        """The largest n with at most ``budget`` numbers for the kernel of n x n examples."""
        both = self.elements + math.sqrt(self.elements**2 + self.pair_elements * budget)
        return max(1, int(budget / max(1, both)))


def rows(
    differentiate: Callable[..., Any],
    outputs_of: Callable[[Any, Any, Any], jax.Array],
    variables: Any,
    params: Any,
    x: Any,
    outputs: Outputs,
) -> Factors:
    """The Jacobian itself, by `jax.jacrev` or `jax.jacfwd`; arguments as in `factors`."""
    k = jax.eval_shape(outputs_of, variables, params, x).size
    jacobian, leaves = differentiate(outputs_of, argnums=1), jax.tree.leaves(params)

    def of_one(variables: Any, params: Any, x: Any) -> list[Any]:
        found = jax.tree.leaves(jacobian(variables, params, x))
        return [j.reshape(k, p.size) for j, p in zip(found, leaves, strict=True)]

    products = [partial(inner, outputs=outputs) for _ in leaves]
    elements = k * sum(p.size for p in leaves)
    return Factors(jax.vmap(of_one, (None, None, 0)), list(products), elements, 0)


def factors(
    outputs_of: Callable[[Any, Any, Any], jax.Array],
    variables: Any,
    params: Any,
    x: Any,
    counts: tuple[int, int],
    outputs: Outputs,
) -> Factors:
    """The Jacobian by ``params`` in the parts of least work for n x m examples.

    Args:
        outputs_of: (variables, parameters, an example) -> [k], real.
        variables: of ``outputs_of``.
        params: tree of real arrays.
        x: an example's shapes.
        counts: n and m.
        outputs: as in `dnntk.empirical_ntk`.
    """
    program, result = jax.make_jaxpr(outputs_of, return_shape=True)(variables, params, x)
    k, leaves = result.size, jax.tree.leaves(params)
    found = _Trace({})
    weights = [_Weight(i, p, 1.0) for i, p in enumerate(leaves)]
    jax.eval_shape(lambda v, x: found.outputs(program, v, weights, x), variables, x)
    layers = {i: use[0] for i, use in found.uses.items() if len(use) == 1 and use[0]}
    orders = {
        i: min(layer.orders(k, counts, outputs), key=lambda order: order.work)
        for i, layer in layers.items()
    }
    rest = [i for i in found.uses or (0,) if i not in layers]  # what is of no use has no term
    of_one = partial(_parts, program, layers, rest, {i for i in orders if orders[i].by_rows})
    by_rows = partial(inner, outputs=outputs)
    return Factors(
        jax.vmap(of_one, (None, None, 0)),
        [*(order.product for order in orders.values()), *(by_rows for _ in rest)],
        sum(order.elements for order in orders.values()) + k * sum(leaves[i].size for i in rest),
        max((order.pair_elements for order in orders.values()), default=0),
    )


def _parts(
    program: core.ClosedJaxpr,
    layers: dict[int, "_Layer"],
    rest: list[int],
    by_rows: set[int],
    variables: Any,
    params: Any,
    x: Any,
) -> list[Any]:
    """An example's parts: of its layers, rows for those in ``by_rows``, and rows of the rest."""
    leaves = jax.tree.leaves(params)
    dtype = leaves[0].dtype

    def tapped(taps: Any, others: Any) -> tuple[jax.Array, Any]:
        trace = _Trace(taps)
        weights = [
            _Weight(i, leaf, 1.0) if i in layers else others.get(i, leaf)
            for i, leaf in enumerate(leaves)
        ]
        return trace.outputs(program, variables, weights, x), trace.inputs

    taps = {i: jnp.zeros(layer.shape, layer.dtype) for i, layer in layers.items()}
    y, pull, inputs = jax.vjp(tapped, taps, {i: leaves[i] for i in rest}, has_aux=True)
    by_layer, by_rest = jax.vmap(pull)(jnp.eye(len(y), dtype=y.dtype))
    parts: list[Any] = []
    for i, layer in layers.items():
        a = layer.inputs(inputs[i]).astype(dtype)
        b = layer.derivatives(by_layer[i]).astype(dtype)
        parts.append(_gradients(a, b) if i in by_rows else (a, b))
    return [*parts, *(by_rest[i].reshape(len(y), leaves[i].size) for i in rest)]


def inner(a: jax.Array, b: jax.Array, outputs: Outputs) -> jax.Array:
    """Products over p of the rows of [n, k, p] and [m, k, p] that ``outputs`` names."""
    indices = {"full": "nmkl", "trace": "nm", "diagonal": "nmk"}[outputs]
    row = "l" if outputs == "full" else "k"
    return jnp.einsum(f"nkp,m{row}p->{indices}", a, b, precision=lax.Precision.HIGHEST)


# ---- products of factors


def _gradients(a: jax.Array, b: jax.Array) -> jax.Array:
    """By the weights of a layer: [k, weights]."""
    gradients = jnp.einsum("gpa,kgpb->kgab", a, b, precision="highest")
    return gradients.reshape(len(b), math.prod(gradients.shape[1:]))


class _Order(NamedTuple):
    """How a layer's term is computed; fields as in `Factors`."""

    work: float
    product: Callable[[Any, Any], jax.Array]
    elements: int
    pair_elements: int
    by_rows: bool = False


class _Layer(NamedTuple):
    """A dense or convolutional layer, or a group of them side by side.

    Attributes:
        sizes: groups g, positions p, inputs a and outputs b of a group at a position.
        shape, dtype: of its outputs.
        inputs: its inputs as [g, p, a].
        derivatives: the derivatives [k, *shape] as [k, g, p, b].
    """

    sizes: tuple[int, int, int, int]
    shape: tuple[int, ...]
    dtype: Any
    inputs: Callable[[jax.Array], jax.Array]
    derivatives: Callable[[jax.Array], jax.Array]

    def orders(self, k: int, counts: tuple[int, int], outputs: Outputs) -> list[_Order]:
        """The orders of products, with their work for a pair of the n x m examples."""
        g, p, a, b = self.sizes
        full = outputs == "full"
        rows = k * g * a * b
        forming = rows * p * sum(1 / max(1, n) for n in counts)
        # Numbers of B B'^T for a pair of examples at a pair of positions, and its products.
        entries, products = {"full": (k * k, k * k), "trace": (1, k), "diagonal": (k, k)}[outputs]
        orders = [
            _Order(
                rows * (k if full else 1) + forming,
                partial(inner, outputs=outputs),
                rows + g * p * (a + k * b),
                entries,
                by_rows=True,
            ),
            _Order(
                g * p**2 * (a + b * products + entries),
                partial(_by_positions, outputs=outputs),
                g * p * (a + k * b),
                g * p**2 * (1 + entries),
            ),
        ]
        if full and p > 1:
            orders.append(
                _Order(
                    g * p * (p * a + k * p * b + k * k * b),
                    _in_turn,
                    g * p * (a + k * b),
                    g * p * (p + k * b),
                )
            )
        return orders


def _by_positions(left: Any, right: Any, outputs: Outputs) -> jax.Array:
    """Sums over positions of (A . A') (B . B'), whose factors have all pairs of positions."""
    (a1, b1), (a2, b2) = left, right
    inputs = jnp.einsum("ngpa,mgqa->nmgpq", a1, a2, precision="highest")
    indices = {"full": "nmklgpq", "trace": "nmgpq", "diagonal": "nmkgpq"}[outputs]
    row = "l" if outputs == "full" else "k"
    both = jnp.einsum(f"nkgpb,m{row}gqb->{indices}", b1, b2, precision="highest")
    inputs = jnp.expand_dims(inputs, tuple(range(2, both.ndim - 3)))
    return jnp.sum(inputs * both, (-3, -2, -1))


def _in_turn(left: Any, right: Any) -> jax.Array:
    """The same sums, B' first."""
    (a1, b1), (a2, b2) = left, right
    inputs = jnp.einsum("ngpa,mgqa->nmgpq", a1, a2, precision="highest")
    summed = jnp.einsum("nmgpq,mlgqb->nmlgpb", inputs, b2, precision="highest")
    return jnp.einsum("nkgpb,nmlgpb->nmkl", b1, summed, precision="highest")


# ---- layers in a jaxpr


class _Weight(NamedTuple):
    """A parameter on its way to a layer: its number, its value, what it was multiplied by."""

    number: int
    value: jax.Array
    scale: Any


class _Trace:
    """An evaluation of a jaxpr that finds the layers of weights.

    Attributes:
        taps: zeros by parameter, which are added to the outputs of its layer.
        uses: by parameter, its layers; None for any other use.
        inputs: by parameter, its layer's inputs, times the weight's scale.
    """

    def __init__(self, taps: dict[int, jax.Array]) -> None:
        self.taps = taps
        self.uses: dict[int, list[_Layer | None]] = {}
        self.inputs: dict[int, jax.Array] = {}

    def outputs(
        self, program: core.ClosedJaxpr, variables: Any, weights: list[Any], x: Any
    ) -> jax.Array:
        """The network's outputs [k]."""
        arguments = [*jax.tree.leaves(variables), *weights, *jax.tree.leaves(x)]
        return self.value(self.run(program.jaxpr, program.consts, arguments)[0])

    def run(self, jaxpr: core.Jaxpr, consts: Any, arguments: list[Any]) -> list[Any]:
        """The jaxpr's results, which may be weights."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else known[v]  # noqa: E731
        for equation in jaxpr.eqns:
            results = self._results(equation, [read(v) for v in equation.invars])
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def value(self, v: Any) -> Any:
        """The value of anything, a weight's being used."""
        if not isinstance(v, _Weight):
            return v
        self.uses.setdefault(v.number, []).append(None)
        return v.value

    def _results(self, equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
        name = equation.primitive.name
        weights = [v for v in values if isinstance(v, _Weight)]
        if not weights:
            return _bind(equation, values)
        if name in CALLS:
            called: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            return self.run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), values)
        real = jnp.issubdtype(_shapes(equation.outvars[0])[0].dtype, np.floating)
        if len(weights) == 1 and real:
            (weight,) = weights
            side = next(i for i, v in enumerate(values) if v is weight)
            plain = [weight.value if v is weight else v for v in values]
            if name in ARRANGE:
                return [weight._replace(value=_bind(equation, plain)[0])]
            if len(values) == 2:
                return self._of_two(equation, weight, side, plain)
        return _bind(equation, [self.value(v) for v in values])

    def _of_two(
        self, equation: core.JaxprEqn, weight: _Weight, side: int, values: list[Any]
    ) -> list[Any]:
        """The results for a weight, operand ``side`` of two."""
        name, other = equation.primitive.name, values[1 - side]
        (y,) = _bind(equation, values)
        if np.ndim(other) == 0 and name == "mul":
            return [_Weight(weight.number, y, weight.scale * other)]
        if np.ndim(other) == 0 and name == "div" and side == 0:
            return [_Weight(weight.number, y, weight.scale / other)]
        layer = _layer(equation, side)
        self.uses.setdefault(weight.number, []).append(layer)
        if layer is None:
            return [y]
        self.inputs[weight.number] = other * jnp.asarray(weight.scale, other.dtype)
        return [y + self.taps[weight.number] if self.taps else y]


def _bind(equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """The results of an equation, for any values."""
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*values, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _shapes(*variables: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def _layer(equation: core.JaxprEqn, side: int) -> _Layer | None:
    """The layer whose weights are operand ``side`` of an equation, or None."""
    name = equation.primitive.name
    if name == "dot_general":
        return _dense(equation, side)
    if name == "conv_general_dilated" and side == 1 and equation.params["batch_group_count"] == 1:
        return _convolution(equation)
    return None


def _dense(equation: core.JaxprEqn, side: int) -> _Layer:
    contracting, batch = (sides[1 - side] for sides in equation.params["dimension_numbers"])
    x, y = _shapes(equation.invars[1 - side], equation.outvars[0])
    free = [axis for axis in range(x.ndim) if axis not in (*contracting, *batch)]
    g, p, a = (math.prod(x.shape[axis] for axis in axes) for axes in (batch, free, contracting))
    b = y.size // max(1, g * p)

    def derivatives(d: jax.Array) -> jax.Array:
        if side == 1:
            return d.reshape(len(d), g, p, b)
        return d.reshape(len(d), g, b, p).swapaxes(2, 3)

    def inputs(x: jax.Array) -> jax.Array:
        return x.transpose(*batch, *free, *contracting).reshape(g, p, a)

    return _Layer((g, p, a, b), y.shape, y.dtype, inputs, derivatives)


def _convolution(equation: core.JaxprEqn) -> _Layer:
    of = equation.params
    x_spec, w_spec, y_spec = of["dimension_numbers"]
    x, w, y = _shapes(*equation.invars, *equation.outvars)
    n, channels = (x.shape[axis] for axis in x_spec[:2])
    window = [w.shape[axis] for axis in w_spec[2:]]
    sides = [y.shape[axis] for axis in y_spec[2:]]
    g = of["feature_group_count"]
    a, b = channels // g * math.prod(window), y.shape[y_spec[1]] // g
    spatial, p = range(len(window)), n * math.prod(sides)

    def inputs(x: jax.Array) -> jax.Array:
        pads = [(*ends, d - 1) for ends, d in zip(of["padding"], of["lhs_dilation"], strict=True)]
        x = lax.pad(x.transpose(x_spec), jnp.zeros((), x.dtype), [(0, 0, 0)] * 2 + pads)
        for i in spatial:  # an axis of pixels becomes two, of positions and of the window
            stride, dilation = of["window_strides"][i], of["rhs_dilation"][i]
            at = stride * np.arange(sides[i])[:, None] + dilation * np.arange(window[i])
            x = jnp.take(x, at, 2 + 2 * i, mode="clip")
        x = x.reshape(n, g, channels // g, *x.shape[2:])
        order = (1, 0, *(3 + 2 * i for i in spatial), 2, *(4 + 2 * i for i in spatial))
        return x.transpose(order).reshape(g, p, a)

    def derivatives(d: jax.Array) -> jax.Array:
        d = d.transpose(0, *(1 + axis for axis in y_spec))
        d = d.reshape(len(d), n, g, b, math.prod(sides))
        return d.transpose(0, 2, 1, 4, 3).reshape(len(d), g, p, b)

    return _Layer((g, p, a, b), y.shape, y.dtype, inputs, derivatives)
