"""Each layer's contribution to a network's output: measured, and by linear theory.

`accumulated` measures the quantity of the thesis's figure 5.1, the values of the d_out output
units after every layer. To first order in D, which is exact at C = infinity, layer l >= 2 of a
network that gradient descent has trained contributes

    (1/L) sum_i [x.x_i + d_out + m(x) m(x_i) + 1/C^2] alpha_i

with m = relu(g) the random unit of layer l-1, and the first layer contributes
(1/(L C^2)) sum_i [x.x_i + 1] alpha_i (`layer_shares`). Weights into the random unit or the input
copies contribute nothing. In a CNN each product is a sum over the filter's shifts of means over the
image. With K the network's own kernel, n steps of size eta make
alpha = K^-1 (I - (I - eta K/N)^n) y (`coefficients`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_rows, common_dtype, real_array
from dnntk.errors import InputError
from dnntk.infinite_depth.spectral_filter import DescentFilter, SpectralFilter
from dnntk.networks.initializers import Layer
from dnntk.networks.layers import Network, in_segments
from dnntk.networks.models import DeepNarrow, Variables, network_of

__all__ = ["accumulated", "coefficients", "layer_shares"]


def accumulated(
    model: DeepNarrow, variables: Variables, x: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Outputs' neurons after every layer, and where the layers' random units are 0.

    Args:
        model: of the ``deep_narrow`` initialization, either architecture and parametrization.
        variables: of ``model``, trained or not.
        x: [n, ...].

    Returns:
        [depth, n, d_out]: sigma(f^(l))_{d_in+1+k} - C for 1 <= l < depth, in a CNN its mean over
        the image, and f^(depth); and [depth - 1, n]: the share of positions (one in an MLP) and
        random units where the unit is 0. In x's dtype. The standard form adds outputs to C, which
        rounds them; the ntk form does not.

    Raises:
        InputError: the model has another initialization, or x is no array of numbers.
    """
    if model.initialization != "deep_narrow":
        raise InputError(f"init: expected 'deep_narrow', got {model.initialization!r}")
    x = real_array("x", x)
    check_rows("x", x)
    return _accumulated(model, variables, x)


@partial(jax.jit, static_argnums=0)
def _accumulated(
    model: DeepNarrow, variables: Variables, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def observe(network: Network, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = model.scale if network.form.literal else 0.0
        outputs = network.affine.read_out(h[-model.d_out :]) - scale
        off = h[-model.d_out - model.random_units : -model.d_out] <= 0
        return outputs, jnp.mean(network.affine.read_out(off.astype(h.dtype)), 1)

    network, params, initial = network_of(model, variables, x)
    z, (curve, off) = _observed(network, params, initial, model.layers_a_segment, observe)
    return jnp.concatenate([curve, network.affine.read_out(z)[None]]), off


def layer_shares(
    model: DeepNarrow,
    variables: Variables,
    x_train: ArrayLike,
    x: ArrayLike,
    coefficients: ArrayLike,
) -> jax.Array:
    """Each layer's contribution to the outputs of a network that is linear in its parameters.

    Args:
        model: of the ``deep_narrow`` initialization, in the ntk form.
        variables: of ``model``, at initialization.
        x_train: [N, ...].
        x: [n, ...].
        coefficients: alpha [N, c], for c outputs or times.

    Returns:
        [depth, n, c], whose sum over layers is K(x, x_train) alpha with K the network's own kernel.
    """
    named = {"x_train": x_train, "x": x, "coefficients": coefficients}
    return _layer_shares(model, variables, *(real_array(*pair) for pair in named.items()))


@partial(jax.jit, static_argnums=0)
def _layer_shares(
    model: DeepNarrow,
    variables: Variables,
    x_train: jax.Array,
    x: jax.Array,
    coefficients: jax.Array,
) -> jax.Array:
    dtype = common_dtype(x_train, x)
    joined = jnp.concatenate([x_train.astype(dtype), x.astype(dtype)])
    network, params, initial = network_of(model, variables, joined)
    # All outputs have the same features, so one suffices.
    seeds = network.seeds(network.packed[:1])
    coefficients = coefficients.astype(seeds.dtype)

    def share(name: str, q: jax.Array) -> jax.Array:
        width = len(network.packed) + model.random_units + model.d_out
        slope, ratio = network.form.slope(name, width)
        rows = float(np.asarray(slope)[-1]) * network.affine.by_weight(ratio, q, seeds)[:, 0]
        learnt = jnp.matmul(rows[:, : len(x_train)], coefficients, precision="highest")
        return jnp.matmul(rows[:, len(x_train) :].T, learnt, precision="highest")

    def observe(network: Network, h: jax.Array) -> jax.Array:
        return share("middle", network.form.read(h))

    _, later = _observed(network, params, initial, model.layers_a_segment, observe)
    return jnp.concatenate([share("first", network.packed)[None], later])


def _observed(
    network: Network,
    params: dict[str, Layer],
    initial: dict[str, Layer],
    segment: int,
    observe: Callable[[Network, jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """The last layer's z, and ``observe``'s results for the state after each other layer."""

    def weights(name: str) -> Layer:
        return network.weights(name, params[name], initial.get(name))

    def up(h: jax.Array, layer: Layer) -> tuple[jax.Array, Any]:
        h = network.activate(network.middle(h, layer))
        return h, observe(network, h)

    # In segments: a scan that stacks few bytes for each layer copies all of them in every layer.
    def up_segment(h: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        return lax.scan(up, h, network.weights("middle", *layers))

    h = network.activate(network.first(weights("first")))
    seen = [jax.tree.map(lambda a: a[None], observe(network, h))]
    blocks, rest = in_segments((params["middle"], initial.get("middle")), segment)
    if blocks is not None:
        h, more = lax.scan(up_segment, h, blocks)
        seen.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), more))
    if rest is not None:
        h, more = up_segment(h, rest)
        seen.append(more)
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
    return network.last(h, weights("last")), together


def coefficients(kernel: np.ndarray, y: np.ndarray, time_step: float, steps: int) -> np.ndarray:
    """[N, 2]: alpha after steps of gradient descent, and after gradient flow for the same time.

    ``kernel`` [N, N] is positive semidefinite and constant in time, ``y`` [N] are targets.
    """
    values, vectors = np.linalg.eigh(kernel / len(y))
    values = np.maximum(values, 0)
    targets = vectors.T @ y
    time = time_step * steps
    filters = (DescentFilter(time, time_step=time_step), SpectralFilter(time))
    return np.stack([vectors @ (f(values) * targets) for f in filters], 1) / len(y)
