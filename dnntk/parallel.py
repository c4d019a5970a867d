"""A deep narrow network with chunks of its layers side by side, instead of one after another.

In the ``ntk`` form a layer is h' = max(h + b(h), floor) for the units whose state it carries over,
and h' = max(b(h), floor) for the others; b is affine in h and depends on a carried h only through
h / C. Multiple shooting: chunks of consecutive layers all start from guessed states, and each runs
its layers one by one. What a chunk does to a carried unit is, with the b that it found,

    h -> max(h + B, F)      B <- B + b,  F <- max(F + b, floor), layer by layer,

which is associative, so a parallel scan over chunks corrects their starts. A *sweep* is one run of
all chunks and one such scan. Sweeps repeat until no start moves. The first k chunks are exact after
k sweeps. The backward pass is the same with known ReLUs: a carried unit that is active in all
layers of a chunk passes the correction of a derivative on as it is.

A sweep has the arithmetic of the forward pass, in about sqrt(depth) consecutive stages instead of
depth. It is faster if a turn of the layer loop costs more than its arithmetic: for small widths and
batches, on accelerators above all. `scripts/parallel_depth.py` counts sweeps. In float32 the result
is nearer to the exact one than the loop's: sums of depth numbers become sums of sqrt(depth) sums.

Multiple shooting in deep networks: Massaroli et al. 2021 (Differentiable multiple shooting layers),
Lee et al. 2021 (Parareal neural networks); neither has the form of a chunk above.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_rows, real_array, real_number
from dnntk.errors import InputError
from dnntk.networks.initializers import Layer
from dnntk.networks.layers import (
    LAYERS_TO_UNROLL,
    Network,
    in_segments,
    middle_layers,
    scan_layers,
)
from dnntk.networks.models import DeepNarrow, Variables, network_of

__all__ = ["Report", "outputs"]

# Numbers in one array of the starts of all chunks, at most.
STARTS_SIZE = 1 << 22
SWEEPS = 24
# A start has converged if a sweep changes it by at most this many rounding units.
ROUNDINGS = 16

StackedLayers = tuple[Layer, Layer | None]


class Report(NamedTuple):
    """The sweeps, on the way up.

    Attributes:
        sweeps: number of sweeps.
        change: the last sweep's largest change of a chunk's start h, relative to 1 + |h|.
        sequential: True if the starts did not converge and the layer loop computed them.
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
    depth_chunks: int | None = None,
) -> tuple[jax.Array, Report]:
    """``model.apply(variables, x)``, up to rounding, with chunks of layers side by side.

    Works under jit. The outputs can be differentiated once, in reverse mode, by the variables and
    by x; the backward pass is parallel over depth, too. Where sweeps do not converge, layers are
    computed one by one, so the result is right in every regime; see ``report.sequential``.

    Args:
        model: either architecture, ``deep_narrow`` in the ``ntk`` form.
        variables: of ``model``, trained or not.
        x: inputs of ``model``, [n, d_in] or [n, H, W, c].
        iterations: largest number of sweeps; None is 24.
        tolerance: a start has converged if a sweep changes it by at most this, relative to 1 + |h|
            (a cotangent: relative to the largest of its unit); None is 16 times the dtype's
            rounding unit. The error is smaller than the last change.
        depth_chunks: number of chunks; None is sqrt(depth), or as many as keep an array of their
            starts under 4 million numbers. Layers that are left over come after them. A gradient
            takes the memory of 2 sqrt(layers) states for each chunk of so many layers.

    Returns:
        (outputs [n, d_out] in the dtype of ``model.apply``, `Report` of scalars).

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
    depth_chunks = None if depth_chunks is None else check_count("depth_chunks", depth_chunks)
    tolerance = None if tolerance is None else real_number("tolerance", tolerance)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance: expected None or a number >= 0, got {tolerance}")
    x = real_array("x", x)
    check_rows("x", x)
    return _outputs(model, variables, x, iterations, tolerance, depth_chunks)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _outputs(
    model: DeepNarrow,
    variables: Variables,
    x: jax.Array,
    iterations: int,
    tolerance: float | None,
    chunks: int | None,
) -> tuple[jax.Array, Report]:
    network, params, initial = network_of(model, variables, x)
    form, layers = network.form, (params["middle"], initial.get("middle"))
    h = network.activate(
        network.first(network.weights("first", params["first"], initial.get("first")))
    )
    if tolerance is None:
        tolerance = ROUNDINGS * float(jnp.finfo(h.dtype).eps)
    if chunks is None:
        chunks = max(1, min(round(math.sqrt(model.depth)), STARTS_SIZE // max(1, h.size)))
    report = Report(jnp.zeros((), jnp.int32), jnp.zeros((), h.dtype), jnp.zeros((), bool))
    blocks, rest = in_segments(layers, max(1, -(-(model.depth - 2) // chunks)))
    if blocks is not None:
        solve = _solver(network, iterations, tolerance)
        h, report = solve(h, blocks, form.base, form.floor)
    if rest is not None:
        h = middle_layers(network, h, rest, model.layers_a_segment)
    z = network.last(h, network.weights("last", params["last"], initial.get("last")))
    return network.affine.read_out(z), report


def _solver(
    network: Network, iterations: int, tolerance: float
) -> Callable[[jax.Array, StackedLayers, Any, Any], tuple[jax.Array, Report]]:
    """The function (state, layers [chunks, layers, ...], base, floor) -> (state after, report).

    ``base`` and ``floor`` depend on the input, so `jax.custom_vjp` needs them as arguments.
    """

    def chunks(base: Any, floor: Any, layers: StackedLayers) -> "_Chunks":
        form = dataclasses.replace(network.form, base=base, floor=floor, start=0.0)
        part = Network(network.affine, form, jnp.zeros(()))
        return _Chunks(part, layers, iterations, tolerance)

    def forward(h: jax.Array, layers: StackedLayers, base: Any, floor: Any) -> Any:
        starts, report = chunks(base, floor, layers).starts(h)
        return (starts[-1], report), (starts[:-1], layers, base, floor)

    @jax.custom_vjp
    def solve(h: jax.Array, layers: StackedLayers, base: Any, floor: Any) -> Any:
        return forward(h, layers, base, floor)[0]

    def backward(kept: Any, cotangent: Any) -> Any:
        starts, layers, base, floor = kept
        back = chunks(base, floor, layers).cotangents(starts, cotangent[0])
        run = lambda starts, layers, base, floor: chunks(base, floor, layers).ends(starts)  # noqa: E731
        by_starts, *others = jax.vjp(run, *kept)[1](back)
        return by_starts[0], *others

    solve.defvjp(forward, backward)
    return solve


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Chunks of layers [chunks, layers, ...]; states are [chunks, units, positions, batch]."""

    network: Network
    layers: StackedLayers
    iterations: int
    tolerance: float

    @property
    def carries(self) -> np.ndarray:
        """[units, 1, 1] bool."""
        return np.asarray(self.network.form.carry) != 0

    def one(self, h: jax.Array, layers: StackedLayers) -> jax.Array:
        """The state after one chunk."""
        segment = max(LAYERS_TO_UNROLL, round(math.sqrt(len(layers[0]["bias"]))))
        return middle_layers(self.network, h, layers, segment)

    def ends(self, starts: jax.Array) -> jax.Array:
        """The state after each chunk from the one before it, side by side."""
        return jax.vmap(self.one)(starts, self.layers)

    def maps(self, starts: jax.Array, weights: Layer) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The state after each chunk, B and F; ``weights`` are those of ``layers``."""
        network = self.network
        mask, floor = jnp.asarray(network.affine.mask), network.form.floor

        def one_layer(carry: Any, layer: Layer) -> tuple[Any, None]:
            h, total, lowest = carry
            added = network.added(h, layer)
            h = network.activate(added + network.form.carried(h))
            added = jnp.where(mask, added, 0)
            return (h, total + added, jnp.maximum(lowest + added, floor)), None

        def run(h: jax.Array, weights: Layer) -> Any:
            carry = h, jnp.zeros_like(h), jnp.full_like(h, -jnp.inf)
            return scan_layers(one_layer, carry, weights)

        return jax.vmap(run)(starts, weights)

    def starts(self, h: jax.Array) -> tuple[jax.Array, Report]:
        """The state before each chunk and after the last."""
        weights = self.network.weights("middle", *self.layers)

        def compose(first: Any, second: Any) -> Any:
            return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

        def sweep(starts: jax.Array) -> jax.Array:
            after, *maps = self.maps(starts[:-1], weights)
            total, lowest = jax.lax.associative_scan(compose, tuple(maps))
            carried = jnp.maximum(h[None] + total, lowest)
            ends = jnp.where(self.carries[None], carried, after)
            return jnp.concatenate([h[None], ends])

        def change(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.max(jnp.abs(new - old) / (1 + jnp.abs(new)))

        def one_by_one() -> jax.Array:
            step = lambda h, layers: (self.one(h, layers),) * 2  # noqa: E731
            return jnp.concatenate([h[None], jax.lax.scan(step, h, self.layers)[1]])

        chunks = len(self.layers[0]["bias"])
        guess = jnp.broadcast_to(h, (chunks + 1, *h.shape))
        return self._converge(sweep, guess, change, one_by_one)

    def cotangents(self, starts: jax.Array, end: jax.Array) -> jax.Array:
        """Derivatives by the state after each chunk; ``end`` is that by the last one."""
        _, pull = jax.vjp(self.ends, starts)
        _, total, lowest = self.maps(starts, self.network.weights("middle", *self.layers))
        passes = self.carries[None] & (starts + total > lowest)

        def compose(first: Any, second: Any) -> Any:
            return first[0] & second[0], jnp.where(second[0], first[1], 0) + second[1]

        def sweep(back: jax.Array) -> jax.Array:
            changes = pull(back)[0] - jnp.where(passes, back, 0)
            kept, total = jax.lax.associative_scan(compose, (passes, changes), reverse=True)
            below = total + jnp.where(kept, end[None], 0)
            return jnp.concatenate([below[1:], end[None]])

        def change(new: jax.Array, old: jax.Array) -> jax.Array:
            by_unit = (0, *range(2, new.ndim))
            largest = jnp.max(jnp.abs(new), by_unit)
            moved = jnp.max(jnp.abs(new - old), by_unit)
            return jnp.max(jnp.where(moved == 0, 0, moved / largest))

        def one_by_one() -> jax.Array:
            def step(g: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
                start, layers = chunk
                (below,) = jax.vjp(lambda h: self.one(h, layers), start)[1](g)
                return below, g

            return jax.lax.scan(step, end, (starts, self.layers), reverse=True)[1]

        guess = jnp.broadcast_to(jnp.where(self.carries, end, 0), starts.shape)
        guess = jnp.concatenate([guess[1:], end[None]])
        return self._converge(sweep, guess, change, one_by_one)[0]

    def _converge(
        self,
        sweep: Callable[[jax.Array], jax.Array],
        guess: jax.Array,
        change: Callable[[jax.Array, jax.Array], jax.Array],
        one_by_one: Callable[[], jax.Array],
    ) -> tuple[jax.Array, Report]:
        """Repeat sweeps until nothing changes; what does not converge is found one by one."""

        def go_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return (carry[2] > self.tolerance) & (carry[1] < self.iterations)

        def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            new = sweep(carry[0])
            return new, carry[1] + 1, change(new, carry[0])

        first = (guess, jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, guess.dtype))
        found, count, error = jax.lax.while_loop(go_on, body, first)
        converged = error <= self.tolerance
        found = jax.lax.cond(converged, lambda: found, one_by_one)
        return found, Report(count, error, ~converged)
