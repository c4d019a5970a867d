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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dnntk.checks import brief
from dnntk.errors import InputError
from dnntk.kernel.limit import padded_patches, shifts_inside
from dnntk.networks.convolution import average_pool
from dnntk.networks.initializers import Layer
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN

__all__ = ["Batch", "RandomFeatures"]

# Array elements of one block of units on one batch of inputs: 32 MB in float64.
BLOCK_ELEMENTS = 1 << 22
RELU_OPERATIONS = 16  # multiplications that take as long as a relu, its bias and its memory
PART_BLOCKS = 64  # of one call of `product`


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
        if not isinstance(model, DeepNarrow):
            raise InputError(
                f"model: expected a DeepNarrowMLP or DeepNarrowCNN, got {brief(model)}; for others "
                "there is dnntk.empirical_ntk_fn"
            )
        if model.parametrization != "ntk" or model.initialization != "deep_narrow":
            raise InputError(
                "model: expected a deep_narrow initialization in the ntk form, got "
                f"init={model.initialization!r}, parametrization={model.parametrization!r}"
            )
        initial = variables.get("initial") if isinstance(variables, Mapping) else None
        if not isinstance(initial, Mapping) or not initial.keys() >= {"first", "middle"}:
            raise InputError(
                "variables: expected the collection 'initial', as model.init gives, got "
                f"{brief(variables)}"
            )
        self._model = model
        layers = jax.tree.map(np.asarray, variables["initial"])
        if model.random_units == 1:
            layers = jax.tree.map(lambda u: u[..., None], layers)
        first = jax.tree.map(lambda u: np.moveaxis(u, -1, 0), layers["first"])
        self._first = {"kernel": first["kernel"] / model.scale, "bias": first["bias"]}
        self._middle = jax.tree.map(
            lambda u: np.moveaxis(u, -1, 1).reshape(-1, *u.shape[1:-1]), layers["middle"]
        )

    def __call__(self, x1: ArrayLike, x2: ArrayLike) -> jax.Array:
        """K between two batches, in their dtype."""
        x1, x2 = jnp.asarray(x1), jnp.asarray(x2)
        block = max(1, min(self._block(x1.shape), self._block(x2.shape), self._middle_units))
        first, middle = self._units(x1.dtype, 0, block, -(-self._middle_units // block))
        return _kernel(self._model, first, middle, x1, x2)

    def count(self, shape: tuple[int, ...]) -> int:
        """The features m of an example, for a batch of this shape; K has a rank of at most m."""
        return self._shifts * (2 * shape[-1] + self._model.random_units + self._middle_units) + 1

    def operations(self, shape: tuple[int, ...]) -> float:
        """Arithmetic operations for all features of a batch of this shape."""
        window = math.prod(self._middle["kernel"].shape[1:])
        each = window + RELU_OPERATIONS + (self._shifts if self._shifts > 1 else 0)
        return 2.0 * shape[0] * self._positions(shape) * each * self._middle_units

    def features(self, x: ArrayLike) -> jax.Array:
        """Phi(x) [n, m] in the dtype of x, with K(x, x') = Phi(x) Phi(x')^T."""
        x = jnp.asarray(x)
        first, middle = self._units(x.dtype, 0, self._middle_units, 1)
        return _features(self._model, first, middle, x)

    def parts(self, shape: tuple[int, ...]) -> int:
        """The number of terms of `product` for a batch of this shape."""
        return max(1, -(-self._middle_units // (PART_BLOCKS * self._block(shape))))

    def product(self, x: ArrayLike, vectors: ArrayLike, part: int) -> jax.Array:
        """A term of K(x, x) @ vectors [n, c]; K is the sum over `parts` parts of the units.

        K is not formed. All terms take O(depth n c) operations and those of the features, of
        which one block of units is in memory. Features are computed in the dtype of x, their
        products in that of ``vectors``: float32 products would add 3e-7 of K's largest eigenvalue.
        """
        x, vectors = jnp.asarray(x), jnp.asarray(vectors)
        blocks = max(1, min(PART_BLOCKS, -(-self._middle_units // self._block(x.shape))))
        block = max(1, -(-self._middle_units // (self.parts(x.shape) * blocks)))
        first, middle = self._units(x.dtype, part * blocks * block, block, blocks)
        return _product(self._model, first, middle, x, vectors, part == 0)

    @property
    def _middle_units(self) -> int:
        """The random units of the middle layers."""
        return len(self._middle["bias"])

    @property
    def _shifts(self) -> int:
        """The features of a unit: the shifts of a CNN's filter."""
        return self._model.kernel_size**2 if isinstance(self._model, DeepNarrowCNN) else 1

    def _positions(self, shape: tuple[int, ...]) -> int:
        pool = self._model.pool if isinstance(self._model, DeepNarrowCNN) else 1
        return math.prod(side // pool for side in shape[1:-1])

    def _block(self, shape: tuple[int, ...]) -> int:
        """The units whose maps on a batch of this shape fit into a block."""
        return max(1, BLOCK_ELEMENTS // (shape[0] * self._positions(shape)))

    def _units(self, dtype: Any, start: int, block: int, blocks: int) -> tuple[Layer, Layer]:
        """The first layer's units, and others from ``start`` on in blocks: [blocks, block, ...]."""

        def of_middle(units: np.ndarray) -> np.ndarray:
            units = units[start : start + blocks * block]
            extra = blocks * block - len(units)  # units of zeros add nothing
            padded = np.pad(units, ((0, extra), *((0, 0),) * (units.ndim - 1)))
            return padded.reshape(blocks, block, *units.shape[1:]).astype(dtype)

        first = jax.tree.map(lambda u: u.astype(dtype), self._first)
        return first, jax.tree.map(of_middle, self._middle)


@functools.partial(jax.jit, static_argnums=0)
def _kernel(model: DeepNarrow, first: Layer, middle: Layer, x1: jax.Array, x2: jax.Array) -> Any:
    batches = _batch(model, x1), _batch(model, x2)
    total = _products(*(_fixed(model, first, batch) for batch in batches))
    above = tuple(batch.after_relu() for batch in batches)
    add = lambda total, units: (total + _products(*(b.units(units) for b in above)), None)  # noqa: E731
    return jax.lax.scan(add, total, middle)[0] / model.depth


@functools.partial(jax.jit, static_argnums=0)
def _features(model: DeepNarrow, first: Layer, middle: Layer, x: jax.Array) -> jax.Array:
    batch, units = _batch(model, x), jax.tree.map(lambda u: u[0], middle)
    parts = _fixed(model, first, batch), batch.after_relu().units(units)
    return jnp.concatenate(parts, 1) / math.sqrt(model.depth)


@functools.partial(jax.jit, static_argnums=0)
def _product(
    model: DeepNarrow,
    first: Layer,
    middle: Layer,
    x: jax.Array,
    vectors: jax.Array,
    with_fixed: jax.Array,
) -> jax.Array:
    batch = _batch(model, x)
    above = batch.after_relu()

    def term(features: jax.Array) -> jax.Array:
        features = features.astype(vectors.dtype)
        inner = jnp.matmul(features.T, vectors, precision="highest")
        return jnp.matmul(features, inner, precision="highest")

    add = lambda total, units: (total + term(above.units(units)), None)  # noqa: E731
    total = with_fixed * term(_fixed(model, first, batch))
    return jax.lax.scan(add, total, middle)[0] / model.depth


def _fixed(model: DeepNarrow, first: Layer, batch: "Batch") -> jax.Array:
    """sqrt(depth) times the features beside those of the middle layers' units: [n, features]."""
    others, above = model.depth - 1, batch.after_relu()
    ones = above.ones()
    constant = jnp.sqrt(
        others * model.d_out * jnp.sum(ones[:1] ** 2, 1) + model.depth / model.scale**2
    )
    return jnp.concatenate(
        [
            batch.inputs() / model.scale,
            batch.units(first),
            math.sqrt(others) * above.inputs(),
            jnp.broadcast_to(constant, (len(ones), 1)),
        ],
        1,
    )


def _batch(model: DeepNarrow, x: jax.Array) -> "Batch":
    """The model's inputs, pooled."""
    if isinstance(model, DeepNarrowCNN):
        return Batch.of(average_pool(x, model.pool), model.kernel_size)
    return Batch.of(x, 1)


class Batch(NamedTuple):
    """Inputs as a layer sees them: maps and their means over the image.

    Attributes:
        maps: [positions, n, channels]; one position in an MLP.
        patches: [positions, n, inputs of a unit and a 1 for its bias].
        windows: [positions, shifts]: which pixels a shift leaves inside, over their number.
    """

    maps: jax.Array
    patches: jax.Array
    windows: jax.Array

    @classmethod
    def of(cls, x: jax.Array, size: int) -> "Batch":
        """Inputs [n, d_in], or images [n, H, W, c] as a filter of this side sees them."""
        maps, patches, windows = x[None], x[None], jnp.ones((1, 1), x.dtype)
        if x.ndim == 4:
            inside = [shifts_inside(side, size) for side in x.shape[1:3]]
            windows = jnp.asarray(np.kron(*inside) / math.prod(x.shape[1:3]), x.dtype)
            maps, patches = padded_patches(x, 1), padded_patches(x, size)
        return cls(maps, jnp.concatenate([patches, jnp.ones_like(patches[:, :, :1])], 2), windows)

    def after_relu(self) -> "Batch":
        """What the layers after the first one see."""
        return self._replace(maps=jax.nn.relu(self.maps), patches=jax.nn.relu(self.patches))

    def inputs(self) -> jax.Array:
        """The inputs' means: [n, features]."""
        return self.means(self.maps)

    def ones(self) -> jax.Array:
        """The means of an output's map, which is 1 everywhere."""
        return self.means(jnp.ones_like(self.maps[:, :, :1]))

    def units(
        self, layer: Layer, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    ) -> jax.Array:
        """The means of relu(u x + v), or another function of it, of some units: [n, features]."""
        bias = layer["bias"][:, None]
        weights = layer["kernel"].reshape(len(bias), self.patches.shape[2] - 1)
        weights = jnp.concatenate([weights, bias], 1).T
        maps = jnp.einsum("pni,iu->pnu", self.patches, weights, precision="highest")
        return self.means(activation(maps))

    def means(self, maps: jax.Array) -> jax.Array:
        """For each shift, means over the image of maps [positions, n, f]: [n, features]."""
        if self.windows.size == 1:
            return maps[0]
        found = jnp.einsum("pnu,ps->snu", maps, self.windows, precision="highest")
        return found.swapaxes(0, 1).reshape(maps.shape[1], -1)


def _products(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right.T, precision="highest")
