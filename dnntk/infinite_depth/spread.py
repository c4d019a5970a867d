"""The spread of trained networks of finite depth around their infinitely deep limit.

If C is large enough, a network of L layers is linear in its parameters, and its kernel is a fixed
part plus (1/L) times the sum of L - 1 random kernels g(x).g(x'), one of the random unit of each
layer. So the network's prediction has a standard deviation of O(1 / sqrt(L)) around the f_t of
Theorems 3.3 and 4.3. Two functions compute it without training a network:

* `initialization_spread`: to first order in the change of the kernel. One sample of random units
  gives the standard deviation at every depth, and the shift of the mean, which is O(1/L).
* `linear_predictions`: without an expansion. Random kernels of one depth are drawn, and the
  gradient flow of each is solved.

First order. A layer changes the kernel by g(x) g(x') / L, and `MatrixFlow.changes` is the change of
f_t by it. Layers are independent, so the variance over networks is the variance of one layer's
change over L. All outputs have the same random units g. The mean kernel of L layers is 1/L from the
limit, as L - 2 layers have random units, L - 1 have copied inputs, and the first layer's unit has a
bias alone; this shifts the mean of the predictions.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from dnntk.checks import (
    check_count,
    check_deviation,
    checked_pair,
    host_targets,
    host_times,
    number_within,
    real_number,
)
from dnntk.errors import InputError
from dnntk.infinite_depth.matrix_flow import MatrixFlow
from dnntk.kernel import limit_ntk
from dnntk.kernel.limit import shifts_inside
from dnntk.networks.initializers import Layer
from dnntk.networks.models import DeepNarrow, DeepNarrowCNN, DeepNarrowMLP
from dnntk.networks.random_units import check_features, random_units
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runs import fields

__all__ = ["Spread", "initialization_spread", "linear_predictions"]

# Array elements of one block of random units on all inputs: 130 MB.
BLOCK_ELEMENTS = 1 << 24
_random_units = jax.jit(random_units, static_argnums=range(1, 8))
MOST_LAYERS = 1 << 53  # beyond it float64 has no odd numbers


@dataclasses.dataclass(frozen=True)
class Spread:
    """A prediction of the limit, and the variance that each layer adds to it.

    Attributes:
        prediction: [n, d_out], or [T, n, d_out] for T times: the limit's f_t(x).
        layer_variance: [as prediction], L^2 times what one middle layer adds to the variance.
        first_variance: [as prediction], L^2 times what the first layer adds, whose unit has the
            inputs divided by C.
        shift: [as prediction], L times the mean's distance from the prediction.
    """

    prediction: np.ndarray
    layer_variance: np.ndarray
    first_variance: np.ndarray
    shift: np.ndarray

    __repr__ = fields.short_repr

    def std(self, depth: int) -> np.ndarray:
        """Standard deviation over initializations at ``depth``, in the shape of ``prediction``.

        Raises:
            InputError: the depth is below 2.
        """
        depth = _checked_depth(depth)
        return np.sqrt((depth - 2) * self.layer_variance + self.first_variance) / depth

    def depth(self, epsilon: float) -> int | np.ndarray:
        """The depth from which on networks are within ``epsilon`` of the limit.

        The distance is the root mean square, over initializations, examples and outputs, of a
        network's prediction minus the limit's, relative to that of ``prediction``: its square is
        the mean of ``std(depth)**2 + (shift / depth)**2`` over that of ``prediction**2``. The
        shift decides at short times, where few layers suffice.

        Returns:
            An int of at least 2, or [T] integers for T times.

        Raises:
            InputError: epsilon is not a positive number, or more than 2^53 layers would be needed.
        """
        valid = lambda number: 0 < number < math.inf  # noqa: E731
        epsilon = number_within("epsilon", epsilon, valid, "a finite number above 0")
        sizes = self.layer_variance, self.first_variance + self.shift**2, self.prediction**2
        each = zip(*(np.atleast_1d(np.mean(size, axis=(-2, -1))) for size in sizes), strict=True)
        found = [_least_depth(epsilon, *map(float, one)) for one in each]
        return np.array(found) if self.prediction.ndim > 2 else found[0]


def initialization_spread(
    x_train: ArrayLike,
    y_train: ArrayLike,
    x: ArrayLike,
    time: float | Sequence[float] = math.inf,
    *,
    rho: float = 1.0,
    beta: float = 1.0,
    kernel_size: int = 3,
    samples: int = 4096,
    key: jax.Array | None = None,
) -> Spread:
    """Predictions of infinitely deep networks, and the spread of deep ones around them.

    To first order in the change of the kernel: a standard deviation that falls as depth^-1/2, and a
    shift of the mean that falls as 1/depth. `linear_predictions` is right at small depths too. C
    must be large (the theorems need depth^2 / C -> 0), and inputs not negative.

    Args:
        x_train: [N, d_in] for the MLP, NHWC images [N, H, W, c] for the CNN.
        y_train: [N, d_out] targets, or [N] for one output.
        x: [n, ...], inputs to predict at.
        time: kernel time t >= 0 of gradient flow on 1/2 E ||f - y||^2; or a sequence of T times.
        rho: standard deviation of the random weights (the MLP's times sqrt(d_in)).
        beta: standard deviation of the random biases over C.
        kernel_size: side of the CNN's filters, odd.
        samples: random units in the Monte Carlo; the deviation's relative error is a few
            percent at 4096, and falls as 1 / sqrt(samples).
        key: random key of the units; None is ``jax.random.key(0)``.

    Returns:
        Float64 `Spread`; ``spread.std(depth)`` is the deviation at any depth. Time is of order
        N^3 + samples N^2 d_out, times kernel_size^2 for a CNN and T; memory 130 MB and a few
        matrices [N, N].

    Raises:
        InputError: an argument has the wrong shape, type or range; or the kernel is singular and
            the time infinite.
    """
    problem = _Problem(x_train, y_train, x, rho, beta, kernel_size)
    samples, times = check_count("samples", samples), host_times(time)
    key = jax.random.key(0) if key is None else key
    limit = problem.limit_kernel()
    flow, kernel_shift = MatrixFlow(limit, problem.y), problem.kernel_shift(limit)
    filters = [flow.filters(t) for t in times]
    first = np.stack([flow.changes(problem.sums(problem.ones), f)[0] for f in filters])
    totals = np.zeros((2, *first.shape))
    for g in problem.middle_sums(problem.draw(key, samples + 2)):
        for i, one in enumerate(filters):
            changes = flow.changes(g, one)
            totals[:, i] += changes.sum(0), (changes**2).sum(0)
    mean, square = totals / samples
    parts = (
        np.stack([flow.predict(t) for t in times]),
        np.maximum(square - mean**2, 0) * (samples / max(samples - 1, 1)),
        # The first layer's map is relu(v) everywhere: E relu^4 - (E relu^2)^2 = 5/4 beta^4.
        1.25 * problem.beta**4 * first**2,
        np.stack([flow.change(kernel_shift, f) for f in filters]),
    )
    return Spread(*(part if np.ndim(time) else part[0] for part in parts))


def linear_predictions(
    x_train: ArrayLike,
    y_train: ArrayLike,
    x: ArrayLike,
    time: float | Sequence[float] = math.inf,
    *,
    depth: int,
    scale: float | None = None,
    rho: float = 1.0,
    beta: float = 1.0,
    kernel_size: int = 3,
    features: str = "gaussian",
    draws: int = 16,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Predictions of ``draws`` linearized networks of one depth, trained by gradient flow.

    A linearized network is the first-order Taylor expansion at the initialization, from which the
    network differs by O(1 / C); the exact kernel of each is drawn, and its flow is solved.

    Args:
        x_train: [N, d_in] for the MLP, NHWC images [N, H, W, c] for the CNN; not negative.
        y_train: [N, d_out] targets, or [N] for one output.
        x: [n, ...], inputs to predict at.
        time: kernel time t >= 0; or a sequence of T times.
        depth: weight layers L >= 2.
        scale: C; None is depth^2.2.
        rho: standard deviation of the random weights (the MLP's times sqrt(d_in)).
        beta: standard deviation of the random biases over C.
        kernel_size: side of the CNN's filters, odd.
        features: draw of the layers' random units, as in `DeepNarrowMLP`.
        draws: independent networks.
        key: random key of the units; None is ``jax.random.key(0)``.

    Returns:
        [draws, n, d_out] float64, or [draws, T, n, d_out] for T times. Time is of order N^3 +
        depth N^2 a draw (times kernel_size^2 in a CNN).

    Raises:
        InputError: as in `initialization_spread`.
    """
    problem = _Problem(x_train, y_train, x, rho, beta, kernel_size)
    depth, draws = _checked_depth(depth), check_count("draws", draws)
    check_features(features, 1, "deep_narrow")
    scale = float(depth) ** 2.2 if scale is None else real_number("scale", scale)
    if not scale > 0:
        raise InputError(f"scale: expected a positive number, got {scale}; leave it out")
    times = host_times(time)
    key = jax.random.key(0) if key is None else key
    found = []
    for draw_key in jax.random.split(key, draws):
        drawn = problem.draw(draw_key, depth, features)
        flow = MatrixFlow(problem.network_kernel(drawn, depth, scale), problem.y)
        found.append(np.stack([flow.predict(t) for t in times]))
    predictions = np.stack(found)
    return predictions if np.ndim(time) else predictions[:, 0]


class _Problem:
    """Training inputs [N, ...] and others [n, ...], and values of random units on them.

    A unit's values on the inputs are a map: [n, units, positions], with one position in an MLP. The
    kernel depends on sums of a map over windows, [n, units, shifts]: the map itself in an MLP.
    """

    def __init__(
        self,
        x_train: ArrayLike,
        y_train: ArrayLike,
        x: ArrayLike,
        rho: float,
        beta: float,
        kernel_size: int,
    ) -> None:
        """Check the arguments of the public functions, and convert them to float64."""
        with jax.enable_x64(True):
            left, right = checked_pair(x_train, x, names=("x_train", "x"))
        self.rho, self.beta = (
            float(check_deviation(*pair)) for pair in (("rho", rho), ("beta", beta))
        )
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {kernel_size}; take {kernel_size + 1}")
        self.y = host_targets("y_train", y_train, len(left))
        self.train = np.asarray(left, float)
        test = self.train if right is None else np.asarray(right, float)
        self.inputs = np.concatenate([self.train, test])  # [N + n, ...]

    @property
    def ones(self) -> np.ndarray:
        """The map of an output at initialization: 1 everywhere."""
        positions = math.prod(self.train.shape[1:3]) if self.train.ndim == 4 else 1
        return np.ones((len(self.inputs), 1, positions))

    def draw(self, key: jax.Array, depth: int, features: str = "gaussian") -> dict[str, Layer]:
        """The random units of a network: u in ``kernel``, v / C in ``bias``."""
        window = (self.kernel_size,) * 2 if self.train.ndim == 4 else ()
        sizes = depth, self.train.shape[-1], window, self.rho, self.beta, np.dtype(float)
        with jax.enable_x64(True):
            drawn = _random_units(key, features, *sizes)
        return jax.tree.map(np.asarray, drawn)

    def maps(self, units: Layer) -> np.ndarray:
        """relu(u * x + v) of some units on all inputs: [n, units, positions]."""
        u = np.asarray(units["kernel"])
        weights = u.reshape(len(u), -1).T
        x = self.inputs
        if x.ndim == 2:
            return np.maximum(x @ weights + units["bias"], 0)[:, :, None]
        reach = self.kernel_size // 2
        padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (self.kernel_size,) * 2, (1, 2))
        patches = np.moveaxis(windows, 3, -1).reshape(len(x), x.shape[1] * x.shape[2], -1)
        return np.maximum(patches @ weights + units["bias"], 0).swapaxes(1, 2)

    def sums(self, maps: np.ndarray) -> np.ndarray:
        """For each shift, the sum over positions that stay inside, / (H W): [n, units, shifts]."""
        if self.train.ndim == 2:
            return maps
        rows, columns = (shifts_inside(size, self.kernel_size) for size in self.train.shape[1:3])
        return maps @ (np.kron(rows, columns) / (len(rows) * len(columns)))

    def middle_sums(self, drawn: dict[str, Layer]) -> Iterator[np.ndarray]:
        """`sums` of the middle layers' units, a block of units at a time."""
        units, size = drawn["middle"], max(1, BLOCK_ELEMENTS // self.inputs.size)
        for start in range(0, len(units["bias"]), size):
            block = {name: array[start : start + size] for name, array in units.items()}
            yield self.sums(self.maps(block))

    def limit_kernel(self, units: bool = True) -> np.ndarray:
        """The limit kernel of all inputs by the training ones, or its part without units."""
        sizes = {"d_out": self.y.shape[1], "kernel_size": self.kernel_size}
        rho, beta = (self.rho, self.beta) if units else (0.0, 0.0)
        with jax.enable_x64(True):
            return np.asarray(limit_ntk(self.inputs, self.train, rho=rho, beta=beta, **sizes))

    def kernel_shift(self, limit: np.ndarray) -> np.ndarray:
        """Depth times the mean of deep networks' kernels minus the limit: [N + n, N]."""
        ones = self.sums(self.ones).reshape(len(self.inputs), -1)
        first = self.beta**2 / 2 * (ones @ ones[: len(self.train)].T)  # E relu(v)^2
        return self.limit_kernel(units=False) - 2 * limit + first

    def network_kernel(self, drawn: dict[str, Layer], depth: int, scale: float) -> np.ndarray:
        """The NTK of one network at initialization: [N + n, N]; all inputs by the training ones."""
        fields: dict[str, Any] = {"rho": self.rho, "beta": self.beta}
        architecture: type[DeepNarrow] = DeepNarrowMLP
        if self.train.ndim == 4:
            architecture, fields["kernel_size"] = DeepNarrowCNN, self.kernel_size
        model = architecture(depth, self.y.shape[1], scale, **fields)
        with jax.enable_x64(True):
            kernel = RandomFeatures(model, {"initial": drawn})(self.inputs, self.train)
        return np.asarray(kernel)


def _checked_depth(depth: int) -> int:
    depth = check_count("depth", depth)
    if depth < 2:
        raise InputError(f"depth: expected at least 2 layers, got {depth}")
    return depth


def _least_depth(epsilon: float, layer: float, first: float, square: float) -> int:
    """The least depth from which on (depth - 2) layer + first <= epsilon^2 square depth^2."""
    allowed = epsilon * epsilon * square
    if math.isinf(allowed):
        return 2
    within = lambda depth: (depth - 2) * layer + first <= allowed * depth**2  # noqa: E731
    if not within(MOST_LAYERS):
        raise InputError(f"epsilon: expected one that 2^53 layers reach, got {epsilon:g}; raise it")
    root = math.sqrt(max(layer**2 - 4 * allowed * (2 * layer - first), 0.0))
    depth = max(2, math.ceil((layer + root) / (2 * allowed))) if allowed else 2
    while not within(depth):  # which rounding allows
        depth += 1
    while depth > 2 and within(depth - 1):
        depth -= 1
    return depth
