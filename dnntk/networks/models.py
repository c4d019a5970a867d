"""Deep narrow networks as flax modules: one scan over depth, any depth.

`DeepNarrowMLP` (thesis section 3) and `DeepNarrowCNN` (section 4) share everything but the affine
map of a layer. Two parametrizations of the same function:

* ``standard``: the thesis's literal matrices.
* ``ntk`` (default): every weight and bias is its initial value + D / (C sqrt(depth)), and D is what
  trains. Hidden states are stored as deviations from their initial values, so that no number of
  size 1 is added to one of size C: float32 trains in the theorems' regime, and C may be infinite.
  Gradient flow of the thesis, at rate 1 / (depth C^2), is plain gradient flow of D.

Variables: ``params`` (the standard matrices, or D) and, in the ``ntk`` form, ``initial`` (the
random units u and v / C, or a baseline's initial matrices). Both hold ``first``, ``middle``
(stacked on a leading axis of depth - 2) and ``last``, each with ``kernel`` and ``bias``.

Memory: activations of O(sqrt(depth)) layers; the backward pass recomputes the others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dnntk.checks import brief, common_dtype, integer, real_array, real_number
from dnntk.errors import InputError
from dnntk.networks import convolution, initializers, random_units
from dnntk.networks.layers import (
    Affine,
    Convolution,
    Dense,
    Network,
    forward,
    literal_form,
    ntk_form,
)

__all__ = [
    "PARAMETRIZATIONS",
    "DeepNarrow",
    "DeepNarrowCNN",
    "DeepNarrowMLP",
    "Variables",
    "network_of",
    "to_standard",
]

PARAMETRIZATIONS = ("ntk", "standard")
Variables = dict[str, Any]


def _with_init_argument(constructor: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor take ``init=`` for ``initialization``.

    A field named ``init`` would hide flax's method of that name.
    """

    @functools.wraps(constructor)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "init" in kwargs:
            kwargs["initialization"] = kwargs.pop("init")
        constructor(self, *args, **kwargs)

    return construct


class _DeepNarrow(nn.Module):
    """Fields and checks that both architectures share."""

    depth: int
    d_out: int
    scale: float
    rho: float = 1.0
    beta: float = 1.0
    initialization: str = "deep_narrow"
    parametrization: str = "ntk"
    segment: int | None = None
    features: str = dataclasses.field(default="gaussian", kw_only=True)
    random_units: int = dataclasses.field(default=1, kw_only=True)

    def network(self, x: jax.Array) -> tuple[Network, initializers.Layers, initializers.Layers]:
        """As `network_of`."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = _with_init_argument(cls.__init__)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        self._convert("depth", "d_out", "random_units", to=integer)
        self._convert("scale", "rho", "beta", to=real_number)
        if self.segment is not None:
            self._convert("segment", to=integer)
        super().__post_init__()
        if self.depth < 2:
            raise InputError(f"depth: expected at least 2 layers, got {self.depth}")
        if self.depth >= 2**31:
            raise InputError(f"depth: expected fewer than 2^31 layers, got {self.depth}")
        if self.d_out < 1:
            raise InputError(f"d_out: expected at least 1 output, got {self.d_out}")
        if not self.scale > 0:
            raise InputError(f"scale: expected a positive number, got {self.scale}")
        for name in ("rho", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{name}: expected a finite number >= 0, got {getattr(self, name)}"
                )
        known = isinstance(self.parametrization, str) and self.parametrization in PARAMETRIZATIONS
        if not known:
            raise InputError(
                f"parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, "
                f"got {brief(self.parametrization)}"
            )
        if self.segment is not None and self.segment < 1:
            raise InputError(f"segment: expected None or at least 1 layer, got {self.segment}")
        initializers.check_init(self.initialization, self.scale, self.parametrization)
        random_units.check_features(self.features, self.random_units, self.initialization)

    def _convert(self, *names: str, to: Callable[[str, Any], Any]) -> None:
        """Make fields Python's own numbers, so that equal modules have equal hashes."""
        for name in names:
            object.__setattr__(self, name, to(name, getattr(self, name)))

    @property
    def parameter_scale(self) -> float:
        """1 / (C sqrt(depth)): a weight is its initial value + ``parameter_scale`` D."""
        return 1 / (self.scale * math.sqrt(self.depth))

    def _shapes(self, d_in: int, window: tuple[int, ...]) -> dict[str, tuple]:
        return initializers.layer_shapes(self.depth, d_in, self.d_out, window, self.random_units)

    def _initialize(
        self, key: jax.Array, d_in: int, window: tuple[int, ...], dtype: jnp.dtype
    ) -> tuple[initializers.Layers, initializers.Layers]:
        """(params, initial); the same key gives the same network in either parametrization."""
        shapes = self._shapes(d_in, window)
        if self.parametrization == "standard":
            _check_representable(self.scale, dtype)
        if self.initialization == "deep_narrow":
            start = random_units.random_units(
                *(key, self.features, self.depth, d_in, window, self.rho, self.beta, dtype),
                self.random_units,
            )
            if self.parametrization == "standard":
                literal = initializers.deep_narrow(
                    start, self.depth, d_in, self.d_out, window, self.scale
                )
                return literal, {}
        else:
            start = initializers.baseline(key, shapes, self.initialization, dtype)
            if self.parametrization == "standard":
                return start, {}
        return initializers.zeros(shapes, dtype), start

    def _variables(
        self, d_in: int, window: tuple[int, ...], dtype: jnp.dtype
    ) -> tuple[initializers.Layers, initializers.Layers]:
        shapes = self._shapes(d_in, window)
        if self.is_initializing():
            params, initial = self._initialize(self.make_rng("params"), d_in, window, dtype)
            for name in shapes:
                self.param(name, lambda _, layer: layer, params[name])
                if name in initial:
                    self.variable("initial", name, lambda layer: layer, initial[name])
            return params, initial
        params = {name: self.get_variable("params", name) for name in shapes}
        for name, shape in shapes.items():
            found = None if params[name] is None else params[name]["kernel"].shape
            if found != shape:
                raise InputError(
                    f"variables: this network and input need params/{name}/kernel of shape "
                    f"{shape}, got {found}; initialize with the same fields and input shape"
                )
        if self.parametrization == "standard":
            return params, {}
        if not self.has_variable("initial", "first"):
            raise InputError(
                "variables: expected the collection 'initial' beside 'params' (the ntk form needs "
                "both); pass all that model.init returned"
            )
        names = [name for name in shapes if self.has_variable("initial", name)]
        return params, {name: self.get_variable("initial", name) for name in names}

    def _network(
        self, affine: Affine, x: jax.Array, d_in: int
    ) -> tuple[Network, initializers.Layers, initializers.Layers]:
        params, initial = self._variables(d_in, affine.window, x.dtype)
        dtype = common_dtype(x, params["first"]["kernel"])
        x, params, initial = jax.tree.map(lambda v: jnp.asarray(v, dtype), (x, params, initial))
        packed = affine.pack(x)
        if self.parametrization == "standard":
            form = literal_form(None)
        elif self.initialization == "deep_narrow":
            sizes = self.depth, d_in, self.d_out, self.scale, affine.mask, self.random_units
            form = ntk_form(packed, *sizes)
        else:
            form = literal_form(self.parameter_scale)
        return Network(affine, form, packed), params, initial

    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs to outputs [n, d_out]."""
        return forward(*self.network(x), self.layers_a_segment)

    @property
    def layers_a_segment(self) -> int:
        """``segment``, or the number of layers that takes the least memory."""
        return self.segment or max(1, round(math.sqrt(self.depth)))


class DeepNarrowMLP(_DeepNarrow):
    """A deep narrow multilayer perceptron, width d_in + 1 + d_out (thesis section 3).

    Attributes:
        depth: weight layers L >= 2 (first, L - 2 middle, last).
        d_out: output dimension.
        scale: C_L > 0; the theorems want L^2 / C_L -> 0. ``inf`` is allowed in the ntk form: the
            network is then exactly linear in its parameters.
        rho, beta: standard deviations of the Gaussian weight row (times sqrt(d_in)) and of the bias
            (over C).
        init: "deep_narrow", or the baselines "he_uniform", "torch_default"; the field that holds it
            is ``initialization``.
        parametrization: "ntk" or "standard"; see the module's docstring.
        segment: layers recomputed together in the backward pass; None is about sqrt(depth), the
            least memory. ``segment=depth`` recomputes once and stores every layer on the way.
        features: how a ``deep_narrow`` initialization draws the layers' random units: "gaussian",
            independently, or "antithetic", "orthogonal", "sobol", whose kernel is nearer to the
            limit at the same depth; see `dnntk.networks.random_units`. By keyword only.
        random_units: M >= 1 random units a layer, width d_in + M + d_out, with rho and beta over
            sqrt(M): the limit is the same, and the distance from it that of M times the layers, but
            for a part of 1 / depth. More than one is computed in plain JAX. By keyword only.

    Apply it to x [n, d_in]; the result is [n, d_out] in x's dtype, float32 for half precision and
    JAX's default float for integers, and exactly 0 at a ``deep_narrow`` initialization. Cost: O(n
    depth width^2) time, O(n sqrt(depth) width) memory for a gradient.

    Raises:
        InputError: a field or the input's shape is not as above.
    """

    @nn.compact
    def network(self, x: jax.Array) -> tuple[Network, initializers.Layers, initializers.Layers]:
        """As `network_of`, for x [n, d_in]."""
        x = real_array("x", x)
        if x.ndim != 2:
            raise InputError(f"x: an MLP expects [n, d_in], got shape {x.shape}")
        return self._network(Dense(), x, x.shape[1])


class DeepNarrowCNN(_DeepNarrow):
    """A deep narrow convolutional network, c + 1 + d_out channels (thesis section 4).

    Fields as in `DeepNarrowMLP` (rho is the standard deviation of every entry of the Gaussian
    filter), and:

    Attributes:
        kernel_size: side q of the filters, odd. Stride 1, zero padding that keeps the size; the
            mean over the image is the output.
        pool: side of an average pool before the first layer; image sides must be multiples of it.

    Apply it to x [n, H, W, c]; the result is [n, d_out].
    """

    kernel_size: int = 3
    pool: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        self._convert("kernel_size", "pool", to=integer)
        super().__post_init__()
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size: expected an odd number >= 1, got {self.kernel_size}")
        if self.pool < 1:
            raise InputError(f"pool: expected a side of at least 1, got {self.pool}")

    @nn.compact
    def network(self, x: jax.Array) -> tuple[Network, initializers.Layers, initializers.Layers]:
        """As `network_of`, for x [n, H, W, c]."""
        x = real_array("x", x)
        if x.ndim != 4:
            raise InputError(f"x: a CNN expects images [n, H, W, c], got shape {x.shape}")
        if x.shape[1] % self.pool or x.shape[2] % self.pool:
            raise InputError(
                f"pool: image sides {x.shape[1]} x {x.shape[2]} are not multiples of {self.pool}"
            )
        x = convolution.average_pool(x, self.pool)
        layout = convolution.RowLayout(x.shape[1], x.shape[2], self.kernel_size)
        return self._network(Convolution(layout), x, x.shape[3])


DeepNarrow = DeepNarrowMLP | DeepNarrowCNN


def network_of(
    model: DeepNarrow, variables: Variables, x: ArrayLike
) -> tuple[Network, initializers.Layers, initializers.Layers]:
    """The network on inputs ``x`` layer by layer, its parameters and its initial values.

    Raises:
        InputError: ``variables`` are not of ``model`` and inputs of this shape.
    """
    return cast(Any, model.apply(variables, x, method="network"))


def to_standard(model: DeepNarrow, variables: Variables) -> tuple[DeepNarrow, Variables]:
    """The same network in the thesis's literal matrices; exact to rounding.

    Args:
        model: either architecture, either parametrization (``standard`` is returned as it is).
        variables: of ``model``, trained or not.

    Returns:
        (model, variables) with ``parametrization="standard"``; ``variables["params"]`` as in the
        module's docstring, {"first": {"kernel", "bias"}, "middle": ..., "last": ...}.

    Raises:
        InputError: ``scale``, which the matrices contain, is infinite or beyond the dtype.
    """
    if model.parametrization == "standard":
        return model, variables
    initializers.check_init(model.initialization, model.scale, "standard")
    _check_representable(model.scale, common_dtype(variables["params"]["first"]["kernel"]))
    params = _literal(model, variables["params"], variables["initial"])
    return model.clone(parametrization="standard"), {"params": params}


def _check_representable(scale: float, dtype: np.dtype) -> None:
    largest = float(jnp.finfo(dtype).max)
    if scale > largest:
        raise InputError(
            f"scale: the literal matrices contain it, and {dtype} ends at {largest:.3g}, got "
            f"{scale:.3g}; use parametrization='ntk' or a wider dtype"
        )


@functools.partial(jax.jit, static_argnums=0)
def _literal(model: DeepNarrow, params: Any, start: Any) -> Any:
    """The literal matrices, from D and initial values, in one compiled program."""
    if model.initialization == "deep_narrow":
        kernel = params["first"]["kernel"]
        start = initializers.deep_narrow(
            start, model.depth, kernel.shape[-2], model.d_out, kernel.shape[:-2], model.scale
        )
    return jax.tree.map(lambda w, d: w + model.parameter_scale * d, start, params)
