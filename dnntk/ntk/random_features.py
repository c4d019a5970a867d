"""The NTK of a deep narrow network at initialization, without a gradient.

At a ``deep_narrow`` initialization every layer hands on its inputs, and has one random unit whose
output no later layer reads yet. So the outputs' derivatives by a layer's weights are the layer's
inputs, and the kernel is a sum over layers of their products (Theorems 3.1 and 4.1, before the
mean over the random units), at any C:

    K(x, x') = (1/L) sum over layers of [q_l(x).q_l(x') + 1/C^2],   q_l = [x, relu(u_l x + v_l), 1]

times the identity over the outputs, with a 1 an output; the first layer has x / C alone. A CNN's
q_l are means over the image, for each shift of the filter, of the pixels that stay inside. A
network of large C is linear in its parameters, so this is its kernel at any time.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dnntk.errors import InputError
from dnntk.kernel.limit import padded_patches, shifts_inside
from dnntk.networks.convolution import average_pool
from dnntk.networks.initializers import Layer
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN

__all__ = ["RandomFeatures"]

# Array elements of one block of units on one batch of inputs: 32 MB in float64.
BLOCK_ELEMENTS = 1 << 22


class RandomFeatures:
    """The NTK of one network at initialization: a kernel [n1, ...], [n2, ...] -> [n1, n2].

    It is `empirical_ntk` at initialization without the identity over the outputs, to rounding, for
    O(depth n^2) operations (times kernel_size^2 in a CNN). `KernelFlow` takes it as its kernel.
    """

    def __init__(self, model: DeepNarrow, variables: Any) -> None:
        """Read the random units from ``variables["initial"]``.

        Raises:
            InputError: the network is not ``deep_narrow`` in the ntk form, or "initial" is missing.
        """
        if model.parametrization != "ntk" or model.initialization != "deep_narrow":
            raise InputError(
                "model: expected a deep_narrow initialization in the ntk form, got "
                f"init={model.initialization!r}, parametrization={model.parametrization!r}"
            )
        if "initial" not in variables:
            raise InputError("variables: expected the collection 'initial', as model.init gives")
        self._model = model
        units = jax.tree.map(np.asarray, variables["initial"])
        first, self._middle = units["first"], units["middle"]
        self._first = {"kernel": first["kernel"][None] / model.scale, "bias": first["bias"][None]}

    def __call__(self, x1: ArrayLike, x2: ArrayLike) -> jax.Array:
        """K between two batches, in their dtype."""
        x1, x2 = jnp.asarray(x1), jnp.asarray(x2)
        maps = max(len(x1), len(x2)) * math.prod(x1.shape[1:-1])
        count = len(self._middle["bias"])
        block = min(max(1, BLOCK_ELEMENTS // maps), max(1, count))
        extra = -count % block  # units of zeros add nothing

        def blocks(units: np.ndarray) -> np.ndarray:
            padded = np.pad(units, ((0, extra), *((0, 0),) * (units.ndim - 1)))
            return padded.reshape(-1, block, *units.shape[1:]).astype(x1.dtype)

        middle = jax.tree.map(blocks, self._middle)
        first = jax.tree.map(lambda u: u.astype(x1.dtype), self._first)
        return _kernel(self._model, first, middle, x1, x2)


@functools.partial(jax.jit, static_argnums=0)
def _kernel(model: DeepNarrow, first: Layer, middle: Layer, x1: jax.Array, x2: jax.Array) -> Any:
    left, right = _Batch.of(model, x1), _Batch.of(model, x2)
    above = left.after_relu(), right.after_relu()
    inverse, others = model.scale**-2, model.depth - 1

    def units(batches: tuple[_Batch, _Batch], layer: Layer) -> jax.Array:
        return _products(*(batch.units(layer) for batch in batches))

    total = inverse * _products(left.inputs(), right.inputs()) + units((left, right), first)
    total += others * _products(*(batch.inputs() for batch in above))
    total += others * model.d_out * _products(left.ones(), right.ones()) + model.depth * inverse
    add = lambda total, layers: (total + units(above, layers), None)  # noqa: E731
    return jax.lax.scan(add, total, middle)[0] / model.depth


class _Batch(NamedTuple):
    """Inputs as a layer sees them: maps [n, positions, channels] and their means over the image.

    Attributes:
        maps: [n, positions, channels]; one position in an MLP.
        patches: [n, positions, inputs of a unit].
        windows: [positions, shifts]: which pixels a shift leaves inside, over their number.
    """

    maps: jax.Array
    patches: jax.Array
    windows: jax.Array

    @classmethod
    def of(cls, model: DeepNarrow, x: jax.Array) -> "_Batch":
        """Inputs [n, d_in] or [n, H, W, c], pooled."""
        if not isinstance(model, DeepNarrowCNN):
            return cls(x[:, None], x[:, None], jnp.ones((1, 1), x.dtype))
        x, size = average_pool(x, model.pool), model.kernel_size
        inside = [shifts_inside(side, size) for side in x.shape[1:3]]
        windows = jnp.asarray(np.kron(*inside) / math.prod(x.shape[1:3]), x.dtype)
        maps = x.reshape(len(x), -1, x.shape[-1])
        return cls(maps, padded_patches(x, size).swapaxes(0, 1), windows)

    def after_relu(self) -> "_Batch":
        """What the layers after the first one see."""
        return self._replace(maps=jax.nn.relu(self.maps), patches=jax.nn.relu(self.patches))

    def inputs(self) -> jax.Array:
        """The inputs' means: [n, features]."""
        return self._means(self.maps)

    def ones(self) -> jax.Array:
        """The means of an output's map, which is 1 everywhere."""
        return self._means(jnp.ones_like(self.maps[:, :, :1]))

    def units(self, layer: Layer) -> jax.Array:
        """The means of relu(u x + v) of some units: [n, features]."""
        weights = layer["kernel"].reshape(len(layer["bias"]), -1).T
        maps = jnp.einsum("npi,iu->npu", self.patches, weights, precision="highest")
        return self._means(jax.nn.relu(maps + layer["bias"][None, None]))

    def _means(self, maps: jax.Array) -> jax.Array:
        found = jnp.einsum("npu,ps->nus", maps, self.windows, precision="highest")
        return found.reshape(len(maps), -1)


def _products(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right.T, precision="highest")
