"""Wide networks of two layers and their infinite-width limit, to compare deep narrow ones with.

`ShallowMLP` is the network of Jacot, Gabriel & Hongler (2018) with one hidden layer in NTK
parametrization, minus its own initial function, so that it starts at 0, as deep narrow networks do:

    h(x) = rho W x / sqrt(d_in) + beta b,    g(x) = A^T relu(h(x)) / sqrt(width) + beta c,

f = g - g_0. At initialization W, b, A are standard normal and c = 0; all four are trained. A step
of gradient descent with learning rate ``time_step`` takes that much kernel time. `shallow_ntk` is
the network's kernel at any time, `shallow_limit_ntk` its kernel at infinite width, which training
does not change, and `descend` trains the network.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dnntk.checks import check_count, check_deviation, checked_pair
from dnntk.errors import InputError
from dnntk.experiments.chunked_steps import chunked_steps
from dnntk.kernel.arccos import arccos0, arccos1

__all__ = ["ShallowMLP", "Stop", "descend", "shallow_limit_ntk", "shallow_ntk", "width_for"]


class ShallowMLP(nn.Module):
    """A hidden layer of ``width`` ReLU units in NTK parametrization, 0 at initialization.

    Attributes:
        width: hidden units.
        d_out: output dimension.
        rho, beta: standard deviations of the hidden weights (times sqrt(d_in)) and biases; beta
            also multiplies the output bias, which starts at 0.

    Apply it to x [n, d_in], floating point; the result is [n, d_out]. The variables are as in the
    ntk form of `dnntk.DeepNarrowMLP`: ``initial`` has the initial values, ``params`` what training
    has added to them. Subtracting the initial outputs does not change the kernel, and all units are
    independent; starting at 0 by pairs of mirrored units would halve the independent ones.

    Raises:
        InputError: a field or the input's shape is not as above.
    """

    width: int
    d_out: int
    rho: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_count("width", self.width)
        check_count("d_out", self.d_out)
        check_deviation("rho", self.rho)
        check_deviation("beta", self.beta)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs to outputs [n, d_out]."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"x: expected [n, d_in], floating point, got {x.dtype} {x.shape}")
        moved, start = self._variables(x.shape[1], x.dtype)
        now = jax.tree.map(jnp.add, start, moved)
        return _outputs(self, now, x) - _outputs(self, start, x)

    def _variables(self, d_in: int, dtype: jnp.dtype) -> tuple[Any, Any]:
        if not self.is_initializing():
            return self._stored("params"), self._stored("initial")
        keys = jax.random.split(self.make_rng("params"), 3)
        shapes = (d_in, self.width), (self.width,), (self.width, self.d_out)
        weights, biases, last = (
            jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
        )
        start = {
            "first": {"kernel": weights, "bias": biases},
            "last": {"kernel": last, "bias": jnp.zeros(self.d_out, dtype)},
        }
        moved = jax.tree.map(jnp.zeros_like, start)
        for name in start:
            self.param(name, lambda _, layer: layer, moved[name])
            self.variable("initial", name, lambda layer: layer, start[name])
        return moved, start

    def _stored(self, collection: str) -> dict[str, Any]:
        return {name: self.get_variable(collection, name) for name in ("first", "last")}


def width_for(parameters: int, d_in: int, d_out: int) -> int:
    """The number of hidden units for which the network has about ``parameters`` parameters.

    Raises:
        InputError: ``parameters`` is less than one unit needs.
    """
    width = round((parameters - d_out) / (d_in + 1 + d_out))
    if width < 1:
        raise InputError(
            f"parameters: expected at least {d_in + 1 + 2 * d_out}, one unit's, got {parameters}"
        )
    return width


def shallow_limit_ntk(
    x1: ArrayLike, x2: ArrayLike | None = None, *, rho: float = 1.0, beta: float = 1.0
) -> jax.Array:
    """NTK of `ShallowMLP` at infinite width (Jacot, Gabriel & Hongler 2018, Theorem 1, L = 2).

    The hidden units h(x) are Gaussian, with covariance S(x, x') = rho^2 x.x' / d_in + beta^2, and
    independent. With H the Heaviside function, the derivatives of output k are relu(h_i) /
    sqrt(width) by A_ik, A_ik H(h_i) / sqrt(width) times rho x_j / sqrt(d_in) by W_ij and times beta
    by b_i, and beta by c_k. Sums over i of their products are averages over the units, which
    converge to expectations:

        Theta(x, x') = E[relu relu] + S(x, x') E[H H] + beta^2,  times I_{d_out},

    as E[A_ik A_il] is 1 for k = l and 0 otherwise.

    Args:
        x1: [n1, d_in].
        x2: [n2, d_in]; None means x1.
        rho: as in `ShallowMLP`.
        beta: as in `ShallowMLP`.

    Returns:
        [n1, n2] in the inputs' dtype. E[H H] has a corner where x = x': rounding by eps causes an
        error of about sqrt(eps) there, so compute Gram matrices for linear systems in float64.

    Raises:
        InputError: an argument has the wrong shape, type or range, or an input is not finite.
    """
    left, right = checked_pair(x1, x2)
    if left.ndim != 2:
        raise InputError(f"x1: expected [n, d_in], got shape {left.shape}; flatten images")
    check_deviation("rho", rho)
    check_deviation("beta", beta)
    return _limit(left, left if right is None else right, rho, beta)


@jax.jit
def _limit(x1: jax.Array, x2: jax.Array, rho: jax.Array, beta: jax.Array) -> jax.Array:
    def covariance(inner: jax.Array) -> jax.Array:
        return rho**2 * inner / x1.shape[1] + beta**2

    var1, var2 = (covariance(jnp.sum(x**2, axis=1)) for x in (x1, x2))
    cov = covariance(jnp.matmul(x1, x2.T, precision=lax.Precision.HIGHEST))
    moments = var1[:, None], var2[None, :], cov
    kernel = arccos1(*moments) + cov * arccos0(*moments) + beta**2
    return kernel.astype(jnp.promote_types(x1.dtype, x2.dtype))


@partial(jax.jit, static_argnums=0)
def shallow_ntk(model: ShallowMLP, variables: Any, x1: jax.Array, x2: jax.Array) -> jax.Array:
    """NTK of `ShallowMLP` at any time: the finite-width sums behind `shallow_limit_ntk`.

    Args:
        model: the network.
        variables: the network's variables, trained or not.
        x1: [n1, d_in].
        x2: [n2, d_in].

    Returns:
        [n1, n2, d_out, d_out]. Time is of order n1 n2 width d_out^2, memory (n1 + n2) width: no
        Jacobian is formed.
    """
    now = jax.tree.map(jnp.add, variables["initial"], variables["params"])
    hidden1, hidden2 = (_hidden(model, now, x) for x in (x1, x2))
    slopes1, slopes2 = ((h > 0).astype(h.dtype) for h in (hidden1, hidden2))
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    inputs = model.rho**2 * product(x1, x2.T) / x1.shape[1] + model.beta**2
    weights = now["last"]["kernel"].T

    def pair(left: jax.Array, right: jax.Array) -> jax.Array:
        return inputs * product(slopes1 * (left * right)[None, :], slopes2.T)

    blocks = lax.map(lambda left: lax.map(partial(pair, left), weights), weights)
    same = product(jax.nn.relu(hidden1), jax.nn.relu(hidden2).T) / model.width + model.beta**2
    eye = jnp.eye(model.d_out, dtype=same.dtype)
    return blocks.transpose(2, 3, 0, 1) / model.width + same[:, :, None, None] * eye[None, None]


class Stop(NamedTuple):
    """A run's state after ``step`` steps, the loss before the last step, seconds of training."""

    step: int
    params: Any
    loss: float
    seconds: float


def descend(
    model: ShallowMLP,
    variables: Any,
    x: jax.Array,
    y: jax.Array,
    time_step: float,
    stops: Sequence[int],
    label: str,
    progress: bool = True,
) -> Iterator[Stop]:
    """Full-batch gradient descent on the loss 1/2 E ||f - y||^2, observed at each of ``stops``.

    Args:
        model: the network.
        variables: the network's variables; they are not modified.
        x: [n, d_in].
        y: [n, d_out].
        time_step: learning rate, which is also the kernel time of a step.
        stops: numbers of steps, ascending.
        label: text of the progress bar.
        progress: show the bar.

    Yields:
        A `Stop` at each; its ``params`` are valid until the next `Stop` is requested. If the loss
        is not finite, a last `Stop` is yielded and the run ends.
    """
    params, seconds = jax.tree.map(jnp.copy, variables["params"]), 0.0

    def take_steps(count: int) -> float:
        nonlocal params, seconds
        start = time.perf_counter()
        params, loss = _steps(model, params, variables["initial"], x, y, time_step, count)
        value = float(loss)
        seconds += time.perf_counter() - start
        return value

    for step, loss in chunked_steps(take_steps, stops, label, progress):
        if step in stops or not math.isfinite(loss):
            yield Stop(step, params, loss, seconds)
        if not math.isfinite(loss):
            return


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _steps(
    model: ShallowMLP,
    params: Any,
    initial: Any,
    x: jax.Array,
    y: jax.Array,
    time_step: jax.Array,
    count: jax.Array,
) -> tuple[Any, jax.Array]:
    """(params after ``count`` steps, loss before the last of them)."""
    target = y + _outputs(model, initial, x)

    def loss(params: Any) -> jax.Array:
        outputs = _outputs(model, jax.tree.map(jnp.add, initial, params), x)
        return 0.5 * jnp.mean(jnp.sum((outputs - target) ** 2, axis=1))

    def step(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(carry[0])
        return jax.tree.map(lambda p, g: p - time_step * g, carry[0], gradient), value

    return lax.fori_loop(0, count, step, (params, jnp.zeros((), y.dtype)))


def _hidden(model: ShallowMLP, weights: Any, x: jax.Array) -> jax.Array:
    first = weights["first"]
    scale = model.rho / math.sqrt(x.shape[1])
    return (scale * x) @ first["kernel"] + (model.beta * first["bias"])[None, :]


def _outputs(model: ShallowMLP, weights: Any, x: jax.Array) -> jax.Array:
    """g(x): [n, d_in] -> [n, d_out]."""
    last = weights["last"]
    read = jax.nn.relu(_hidden(model, weights, x)) @ last["kernel"] / math.sqrt(model.width)
    return read + (model.beta * last["bias"])[None, :]
