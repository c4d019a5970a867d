"""A deep narrow network evaluated at all its layers at once, instead of one after another.

In the ``ntk`` form a layer is h' = max(h + b(h), floor) for the units whose state it carries over,
and h' = max(b(h), floor) for the others; b is affine in h and depends on a carried h only through
h / C. So from a guess of all layers' states, one batched product computes every b. The carried
states then follow from a recurrence, separate for each unit and example:

    h_{l+1} = max(h_l + b_l, floor)      (b1, f1), then (b2, f2): (b1 + b2, max(f1 + b2, f2))

It is associative, so a parallel scan computes it, ReLUs included. A *sweep* is one product and one
scan. Sweeps repeat until the states no longer change (Picard's iteration for a discrete Volterra
equation: with K the sum of the layers' weights over C, the error falls as K^s / s! in s sweeps).
The backward pass is the same with known ReLUs: g = carry g' + column W^T g', masked.

A sweep has the arithmetic of the forward pass, but O(log(depth)) consecutive stages instead of
depth. It is faster if a turn of the layer loop costs more than its arithmetic: for small widths and
batches, on accelerators above all. `scripts/parallel_depth.py` measures when.

A fixed point iteration that treats the diagonal of the Jacobian exactly is the quasi-Newton case of
Lim et al. 2024 (Parallelizing non-linear sequential models over the sequence length) and Gonzalez
et al. 2024 (Towards scalable and stable parallelization of nonlinear RNNs). Here that diagonal is
``carry`` and the ReLU, whose kink the scan treats exactly, too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_rows, real_array, real_number
from dnntk.errors import InputError
from dnntk.networks.initializers import Layer
from dnntk.networks.layers import Form, Network, in_segments
from dnntk.networks.models import DeepNarrow, Variables, network_of

__all__ = ["Report", "outputs"]

# Numbers in one array of states of all layers of a chunk.
CHUNK_SIZE = 1 << 22
SWEEPS = 24
# A state has converged if a sweep changes it by at most this many rounding units.
ROUNDINGS = 16

StackedLayers = tuple[Layer, Layer | None]


class Report(NamedTuple):
    """The sweeps over each chunk of layers, [chunks] each.

    Attributes:
        sweeps: number of sweeps.
        change: the last sweep's largest change of a state h, relative to 1 + |h|.
        sequential: True if the states did not converge and the layer loop computed the chunk.
    """

    sweeps: jax.Array
    change: jax.Array
    sequential: jax.Array


def outputs(
    model: DeepNarrow,
    variables: Variables,
    x: ArrayLike,
    *,
    iterations: int | None = None,
    tolerance: float | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Report]:
    """``model.apply(variables, x)``, up to rounding, at all layers of a chunk at once.

    Works under jit. The outputs can be differentiated once, in reverse mode, by the variables and
    by x; the backward pass is parallel over depth, too. A chunk whose states do not converge is
    computed layer by layer, so the result is right in every regime; see ``report.sequential``.

    Args:
        model: either architecture, ``deep_narrow`` in the ``ntk`` form.
        variables: of ``model``, trained or not.
        x: inputs of ``model``, [n, d_in] or [n, H, W, c].
        iterations: largest number of sweeps over a chunk; None is 24.
        tolerance: a state has converged if a sweep changes it by at most this, relative to 1 + |h|
            (a cotangent: relative to the largest of its unit); None is 16 times the dtype's
            rounding unit. The error is smaller than the last change.
        chunk: layers at a time; None is as many as keep one array of states under 4 million
            numbers. About eight such arrays are in memory, and for a gradient one state per chunk.

    Returns:
        (outputs [n, d_out] in the dtype of ``model.apply``, `Report`).

    Raises:
        InputError: the model is not as above, or a number out of its range.
    """
    if model.parametrization != "ntk" or model.initialization != "deep_narrow":
        raise InputError(
            "model: parallel evaluation needs init='deep_narrow' in parametrization='ntk', whose "
            "layers change their states by little; got "
            f"init={model.initialization!r}, parametrization={model.parametrization!r}"
        )
    iterations = SWEEPS if iterations is None else check_count("iterations", iterations)
    chunk = None if chunk is None else check_count("chunk", chunk)
    tolerance = None if tolerance is None else real_number("tolerance", tolerance)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance: expected None or a number >= 0, got {tolerance}")
    x = real_array("x", x)
    check_rows("x", x)
    return _outputs(model, variables, x, iterations, tolerance, chunk)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _outputs(
    model: DeepNarrow,
    variables: Variables,
    x: jax.Array,
    iterations: int,
    tolerance: float | None,
    chunk: int | None,
) -> tuple[jax.Array, Report]:
    network, params, initial = network_of(model, variables, x)
    form = network.form
    z = network.first(network.weights("first", params["first"], initial.get("first")))
    h = network.activate(z)
    if tolerance is None:
        tolerance = ROUNDINGS * float(jnp.finfo(h.dtype).eps)
    solve = _solver(network, iterations, tolerance)
    solve_chunk = lambda h, layers: solve(h, layers, form.base, form.floor)  # noqa: E731
    reports = []
    chunk = chunk or max(1, CHUNK_SIZE // max(1, h.size))
    blocks, rest = in_segments((params["middle"], initial.get("middle")), chunk)
    if blocks is not None:
        h, report = jax.lax.scan(solve_chunk, h, blocks)
        reports.append(report)
    if rest is not None:
        h, report = solve_chunk(h, rest)
        reports.append(jax.tree.map(lambda a: a[None], report))
    z = network.last(h, network.weights("last", params["last"], initial.get("last")))
    none = Report(jnp.zeros(0, jnp.int32), jnp.zeros(0, h.dtype), jnp.zeros(0, bool))
    report = jax.tree.map(lambda *parts: jnp.concatenate(parts), none, *reports)
    return network.affine.read_out(z), report


def _solver(
    network: Network, iterations: int, tolerance: float
) -> Callable[[jax.Array, StackedLayers, Any, Any], tuple[jax.Array, Report]]:
    """The function (state, stacked layers, base, floor) -> (state after the layers, report).

    ``base`` and ``floor`` depend on the input, so `jax.custom_vjp` needs them as arguments.
    """
    affine, form = network.affine, network.form

    def parts(base: Any, floor: Any) -> "_Chunk":
        pieces = dataclasses.replace(form, base=base, floor=floor, start=0.0)
        return _Chunk(Network(affine, pieces, jnp.zeros(())), iterations, tolerance)

    def weights(layers: StackedLayers) -> Layer:
        return {
            "kernel": affine.arrange(form.weights("middle", *layers)["kernel"]),
            "bias": form.weights("middle", *layers)["bias"],
        }

    @jax.custom_vjp
    def solve(
        h: jax.Array, layers: StackedLayers, base: Any, floor: Any
    ) -> tuple[jax.Array, Report]:
        states, report = parts(base, floor).states(h, weights(layers))
        return states[-1], report

    def forward(*args: Any) -> tuple[tuple[jax.Array, Report], Any]:
        return solve(*args), args

    def backward(args: Any, cotangent: Any) -> Any:
        h, layers, base, floor = args
        w, pull_weights = jax.vjp(weights, layers)
        part = parts(base, floor)
        after, _ = part.states(h, w)
        active = jax.vmap(part.network.active)(after)
        before = jnp.concatenate([h[None], after[:-1]])
        back = part.cotangents(before, w, active, cotangent[0])
        down = jnp.concatenate([back[1:], cotangent[0][None]])

        def products(w: Layer, base: Any) -> jax.Array:
            return parts(base, floor).products(before, w)

        _, pull = jax.vjp(products, w, base)
        by_weights, by_base = pull(jnp.where(active, down, 0))
        by_floor = jnp.where(active, 0, down)
        by_floor = jnp.where(_over_layers(affine.mask), by_floor, 0).sum(0)
        return back[0], *pull_weights(by_weights), by_base, by_floor

    solve.defvjp(forward, backward)
    return solve


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk of layers; states and cotangents are [layers, units, ...]."""

    network: Network
    iterations: int
    tolerance: float

    @property
    def form(self) -> Form:
        return self.network.form

    @property
    def carries(self) -> np.ndarray:
        """[1, units, 1, 1] bool."""
        return np.asarray(self.form.carry)[None] != 0

    @property
    def floor(self) -> jax.Array:
        """[1, units, ...], the same for all layers."""
        return _over_layers(self.form.floor)

    def products(self, before: jax.Array, weights: Layer) -> jax.Array:
        """``W q + b`` of every layer, 0 at the padding positions."""

        def product(h: jax.Array, layer: Layer) -> jax.Array:
            z = self.network.affine.linear(self.form.read(h), layer["kernel"])
            return z + layer["bias"][:, None, None]

        mask = _over_layers(self.network.affine.mask)
        return jnp.where(mask, jax.vmap(product)(before, weights), 0)

    def states(self, start: jax.Array, weights: Layer) -> tuple[jax.Array, Report]:
        """The state after each layer."""

        def shift(after: jax.Array) -> jax.Array:
            return jnp.concatenate([start[None], after[:-1]])

        def sweep(after: jax.Array) -> jax.Array:
            added = self.products(shift(after), weights)
            carried = _reflect(start[None], added, self.floor, self.carries)
            return jnp.where(self.carries, carried, jnp.maximum(added, self.floor))

        def change(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.max(jnp.abs(new - old) / (1 + jnp.abs(new)))

        # Units that are not carried are nearly right if their layer's input is.
        guess = jnp.broadcast_to(start, (len(weights["bias"]), *start.shape))
        fresh = jnp.maximum(self.products(guess, weights), self.floor)
        guess = jnp.where(self.carries, guess, fresh)
        after, count, error = self._converge(sweep, guess, change)
        converged = error <= self.tolerance

        def one_by_one() -> jax.Array:
            def one_layer(h: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
                h = self.network.activate(self.network.middle(h, layer))
                return h, h

            return jax.lax.scan(one_layer, start, weights)[1]

        after = jax.lax.cond(converged, lambda: after, one_by_one)
        return after, Report(count, error, ~converged)

    def cotangents(
        self, before: jax.Array, weights: Layer, active: jax.Array, end: jax.Array
    ) -> jax.Array:
        """Derivatives by the state before each layer; ``end`` is that by the last layer's state."""
        _, pull = jax.vjp(lambda h: self.products(h, weights), before)
        keep = active & self.carries

        def shift(back: jax.Array) -> jax.Array:
            return jnp.where(active, jnp.concatenate([back[1:], end[None]]), 0)

        def sweep(back: jax.Array) -> jax.Array:
            return _collect(end[None], pull(shift(back))[0], keep, self.carries)

        def change(new: jax.Array, old: jax.Array) -> jax.Array:
            by_unit = (0, *range(2, new.ndim))
            largest = jnp.max(jnp.abs(new), by_unit)
            moved = jnp.max(jnp.abs(new - old), by_unit)
            return jnp.max(jnp.where(moved > 0, moved / largest, 0))

        guess = jnp.broadcast_to(jnp.where(self.carries, end[None], 0), before.shape)
        guess = jnp.where(self.carries, guess, pull(shift(guess))[0])
        back, _, error = self._converge(sweep, guess, change)

        def one_by_one() -> jax.Array:
            def one_layer(g: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
                h, weights, active = layer
                _, pull = jax.vjp(lambda h: self.network.middle(h, weights), h)
                (g,) = pull(jnp.where(active, g, 0))
                return g, g

            layers = (before, weights, active)
            return jax.lax.scan(one_layer, end, layers, reverse=True)[1]

        return jax.lax.cond(error <= self.tolerance, lambda: back, one_by_one)

    def _converge(
        self,
        sweep: Callable[[jax.Array], jax.Array],
        guess: jax.Array,
        change: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Repeat sweeps until the states converge: (states, number of sweeps, last change)."""

        def go_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return (carry[2] > self.tolerance) & (carry[1] < self.iterations)

        def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            new = sweep(carry[0])
            return new, carry[1] + 1, change(new, carry[0])

        first = (guess, jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, guess.dtype))
        return jax.lax.while_loop(go_on, body, first)


def _over_layers(values: Any) -> jax.Array:
    """An array that all layers share, with a leading axis of layers; numbers unchanged."""
    array = jnp.asarray(values)
    return array[None] if array.ndim else array


def _reflect(start: jax.Array, added: jax.Array, floor: Any, carries: np.ndarray) -> jax.Array:
    """h_{l+1} = max(h_l + added_l, floor) for every l, elementwise, from h_0 = start.

    ``start`` and ``floor`` have an axis of layers, of size 1.
    """
    free = start + jnp.cumsum(added, 0)

    def compose(first: Any, second: Any) -> Any:
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    def reflected() -> jax.Array:
        lowest = jnp.broadcast_to(jnp.asarray(floor, added.dtype), added.shape)
        total, low = jax.lax.associative_scan(compose, (added, lowest))
        return jnp.maximum(start + total, low)

    above = jnp.all((free >= floor) | ~carries)
    return jax.lax.cond(above, lambda: free, reflected)


def _collect(end: jax.Array, added: jax.Array, keep: jax.Array, carries: np.ndarray) -> jax.Array:
    """g_l = keep_l g_{l+1} + added_l for every l, elementwise, down from g_{layers} = end."""

    def compose(first: Any, second: Any) -> Any:
        return first[0] & second[0], jnp.where(second[0], first[1], 0) + second[1]

    def interrupted() -> jax.Array:
        kept, total = jax.lax.associative_scan(compose, (keep, added), reverse=True)
        return total + jnp.where(kept, end, 0)

    def whole() -> jax.Array:
        return jnp.where(carries, end, 0) + jnp.where(
            carries, jax.lax.cumsum(added, 0, reverse=True), added
        )

    return jax.lax.cond(jnp.all(keep | ~carries), whole, interrupted)
