"""The Gaussian process of a kernel: what is believed of a function whose noisy values are known.

With the prior f ~ GP(f_0, k), the same for every output, and targets y = f(X) + noise of variance
sigma^2 (Rasmussen & Williams 2006, chapters 2 and 5),

    mean(x) = f_0(x) + k(x, X) A^-1 r,    covariance(x, x') = k(x, x') - k(x, X) A^-1 k(X, x')
    log p(y) = -1/2 sum over outputs of [r^T A^-1 r + log det(2 pi A)]

with A = K + sigma^2 I and r = y - f_0(X). The mean is the flow at t = infinity
with the ridge sigma^2 / n. The evidence log p(y) chooses a kernel's parameters and the noise
without a validation set.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnntk.checks import brief, check_count, check_key, not_negative
from dnntk.errors import InputError
from dnntk.infinite_depth.cross_kernel import CrossKernel, Kernel, balanced, padded, padded_rows
from dnntk.infinite_depth.gram_matrix import SymmetricGram
from dnntk.infinite_depth.kernel_system import KernelSystem
from dnntk.infinite_depth.outputs import OutputLayout
from dnntk.infinite_depth.solvers import Eigendecomposition
from dnntk.infinite_depth.spectral_filter import SpectralFilter

__all__ = ["GaussianProcess", "GaussianProcessMixin", "draw", "parameters_of"]

Array = NDArray[np.float64]


class GaussianProcess:
    """The process whose prior covariance is a kernel, given targets with noise."""

    def __init__(self, system: KernelSystem, residual: Array, noise: float) -> None:
        """``residual`` [n k, c] are the targets less the prior mean, by row of the kernel matrix.

        ``noise`` is their variance.
        """
        self._system, self._residual, self._noise = system, residual, noise
        self._filters = [SpectralFilter(math.inf, noise / len(system.x))]

    def posterior(self, points: Array) -> tuple[Array, Array]:
        """The mean at new points [n', ...] less the prior's, [n' k, c]; covariance [n' k, n' k].

        Raises:
            InputError: memory is too small; or there is no noise, and K is singular.
        """
        system, k = self._system, self._system.cross.matrix_size
        rows, columns = len(points) * k, len(self._residual)
        needed = 8 * (2 * rows * columns + 3 * rows**2)
        if needed > system.memory:
            raise InputError(
                f"x: expected points whose covariance fits into memory, {system.memory / 1e9:.3g} "
                f"GB, got {len(points):,}, which need {needed / 1e9:.3g} GB; take fewer at a time"
            )
        own = CrossKernel(system.cross.kernel, points, system.cross.dtype)
        prior = SymmetricGram(own, block_size=system.block_size, progress=False).dense()
        cross = system.cross.matrix(points, len(system.x), system.block_size)
        found = system.solutions(self._residual, self._filters, noisy=True)[0]
        mean = cross @ found.coefficients.reshape(columns, -1)
        # A residual R of the solver changes the covariance by R^T A^-1 R, at most |R|^2 / noise.
        size = float(np.linalg.norm(cross)) or 1.0
        tight = self._noise * math.sqrt(system.tolerance) / size
        tolerance = min(system.tolerance, tight)
        found = system.solutions(cross.T, self._filters, noisy=True, tolerance=tolerance)[0]
        covariance = prior - cross @ found.coefficients.reshape(columns, rows)
        return mean, (covariance + covariance.T) / 2

    def log_marginal_likelihood(self) -> float:
        """The evidence, log p(y).

        Raises:
            InputError: not all eigenvectors are known; or there is no noise, and K is singular.
        """
        solver, total, others = self._eigenvalues()
        log_det = np.log(total).sum() + (others * math.log(self._noise) if others else 0.0)
        log_det += len(self._residual) * math.log(2 * math.pi)
        fit = (solver.targets**2 / total[:, None]).sum()
        return float(-0.5 * (fit + self._residual.shape[1] * log_det))

    def gradient(self) -> dict[str, float]:
        """The derivatives of log p(y) by "noise" and by `parameters_of` the kernel.

        Raises:
            InputError: as above; or the kernel cannot be differentiated.
        """
        solver, total, others = self._eigenvalues()
        n, outputs = len(self._system.x), self._residual.shape[1]
        trace = (1 / total).sum() + (others / self._noise if others else 0.0)
        fit = (solver.targets**2 / total[:, None] ** 2).sum()
        found = {"noise": float(0.5 * (fit - outputs * trace))}
        parameters = parameters_of(self._system.cross.kernel)
        if parameters:
            weights = solver.from_eigenbasis(solver.targets / total[:, None])
            whole = solver.for_targets(np.eye(len(weights)))
            inverse = whole.targets / (n * whole.values + self._noise)[:, None]
            by_entry = 0.5 * (weights @ weights.T - outputs * whole.from_eigenbasis(inverse))
            found |= _contracted(self._system, parameters, by_entry)
        return found

    def _eigenvalues(self) -> tuple[Eigendecomposition, Array, int]:
        """The solver; eigenvalues of A that it has; how many others are the noise alone."""
        solver = self._system.solver_of(self._residual)
        if not isinstance(solver, Eigendecomposition):
            raise InputError(
                "solver: expected eigh, as the evidence needs all eigenvalues, got krylov for "
                f'{len(self._system.x):,} examples; give solver="eigh", or fewer examples'
            )
        self._system.refine(solver, self._filters, noisy=True)
        total = len(self._system.x) * solver.values + self._noise
        return solver, total, len(self._residual) - len(total)


class GaussianProcessMixin:
    """The methods of a `dnntk.KernelFlow` that read its kernel as a prior covariance."""

    ridge: float
    _system: KernelSystem
    _layout: OutputLayout
    _residual: Array
    _check_squared: Callable[[str], None]

    def posterior(
        self, x: ArrayLike, noise: float | None = None, *, initial: ArrayLike = 0.0
    ) -> tuple[Array, Array]:
        """Mean and covariance of the Gaussian process with this kernel, given the targets.

        Belief about one function whose values are y plus noise (Rasmussen & Williams 2006, chapter
        2), its prior mean f_0; `dnntk.initialization_spread` is something else, how trained
        networks of one depth scatter, which vanishes with depth.

        Args:
            x: [n', ...], examples as the training ones.
            noise: variance of the targets' noise, >= 0; None is n times the flow's ridge, with
                which the mean is ``predict(x)``.
            initial: f_0 at these points, [n', d_out].

        Returns:
            ([n', d_out], [n', n']) float64, one covariance for all outputs; of a matrix-valued
            kernel the covariance is [n', d_out, n', d_out]. By a Krylov method every point is a
            right-hand side, and covariances are within tolerance * noise, or a warning is logged.

        Raises:
            InputError: an argument is not as above; the covariance does not fit into memory; or
                the noise is 0, and the Gram matrix singular to working precision.
        """
        mean, covariance = self._posterior(x, noise, initial)
        k = self._layout.matrix_size
        by_output = (len(mean), k) * 2 if k > 1 else (len(mean),) * 2
        return mean, covariance.reshape(by_output)

    def sample(
        self,
        key: jax.Array,
        x: ArrayLike,
        noise: float | None = None,
        samples: int = 1,
        *,
        initial: ArrayLike = 0.0,
    ) -> Array:
        """Functions drawn from `posterior`, without noise: [samples, n', d_out] float64.

        ``key`` is a random key of JAX; all other arguments and errors are those of `posterior`.
        """
        mean, covariance = self._posterior(x, noise, initial)
        rows = mean.reshape(len(covariance), -1)
        return draw(key, rows, covariance, check_count("samples", samples)).reshape(-1, *mean.shape)

    def log_marginal_likelihood(
        self, noise: float | None = None, *, eval_gradient: bool = False
    ) -> float | tuple[float, dict[str, float]]:
        """The evidence: log density of the targets under the Gaussian process, summed over outputs.

        A further noise costs little, as the eigenvectors are kept.

        Args:
            noise: as in `posterior`.
            eval_gradient: return (value, {name: derivative}) instead, by "noise" and by each float
                keyword of the kernel: "rho" and "beta" of `limit_ntk`, bound by
                `functools.partial` or not. It costs a few products of n x n matrices.

        Raises:
            InputError: as `posterior`; or the solver is a Krylov one: give ``solver="eigh"``.
        """
        process = self._process(noise)
        value = process.log_marginal_likelihood()
        return (value, process.gradient()) if eval_gradient else value

    def _process(self, noise: float | None) -> GaussianProcess:
        self._check_squared("posterior, sample, log_marginal_likelihood")
        noise = len(self._system.x) * self.ridge if noise is None else not_negative("noise", noise)
        return GaussianProcess(self._system, self._layout.by_kernel_row(self._residual), noise)

    def _posterior(
        self, x: ArrayLike, noise: float | None, initial: ArrayLike
    ) -> tuple[Array, Array]:
        """Mean [n', d_out] and covariance by row of the kernel matrix."""
        process, points = self._process(noise), self._system.points(x)
        start = self._layout.checked("initial", initial, len(points))
        mean, covariance = process.posterior(points)
        return mean.reshape(start.shape) + start, covariance


def parameters_of(kernel: Kernel) -> dict[str, float]:
    """The parameters by which a kernel is differentiated, and their values.

    They are the keywords that `functools.partial` has bound to a float, and the keyword-only
    arguments whose default is one: rho and beta of `limit_ntk`, bound or not.
    """
    function, _, bound = _taken_apart(kernel)
    try:
        arguments = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        arguments = {}
    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = {name: a.default for name, a in arguments.items() if a.kind is keyword}
    return {
        name: float(value)
        for name, value in (defaults | bound).items()
        if _is_float(value) or (_is_float(defaults.get(name)) and np.ndim(value) == 0)
    }


def _is_float(value: object) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating)
    return isinstance(value, float | np.floating)


def _taken_apart(kernel: Kernel) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function of a `functools.partial`, and what it binds."""
    if isinstance(kernel, functools.partial):
        return kernel.func, kernel.args, kernel.keywords
    return kernel, (), {}


@dataclasses.dataclass(frozen=True)
class _Unbound:
    """A kernel without its parameters: equal for all their values, so that it is compiled once."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Kernel, parameters: dict[str, float]) -> Callable[..., Any]:
        function, arguments, bound = _taken_apart(kernel)
        rest = tuple((name, value) for name, value in bound.items() if name not in parameters)
        unbound = cls(function, arguments, rest)
        try:
            hash(unbound)
        except TypeError:  # an array is bound
            return kernel
        return unbound

    def __call__(self, x1: jax.Array, x2: jax.Array, **parameters: jax.Array) -> jax.Array:
        found = self.function(*self.arguments, x1, x2, **dict(self.keywords), **parameters)
        return cast(jax.Array, found)


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(
    kernel: Callable[..., jax.Array],
    parameters: dict[str, Any],
    x1: jax.Array,
    x2: jax.Array,
    weights: jax.Array,
) -> dict[str, jax.Array]:
    """The derivatives of sum(weights * kernel), with weights by row of the kernel matrix."""

    def total(values: dict[str, Any]) -> jax.Array:
        tile = kernel(x1, x2, **values)
        if tile.ndim == 4:
            tile = tile.transpose(0, 2, 1, 3).reshape(weights.shape)
        return jnp.sum(tile * weights)

    return jax.grad(total)(parameters)


def _contracted(
    system: KernelSystem, parameters: dict[str, float], by_entry: Array
) -> dict[str, float]:
    """The derivatives of sum(by_entry * K) by the parameters, a tile of K at a time, in float64."""
    kernel, k = system.cross.kernel, system.cross.matrix_size
    unbound = _Unbound.of(kernel, parameters)
    pieces = balanced(len(system.x), system.block_size)
    pairs = [(a, b) for i, a in enumerate(pieces) for b in pieces[: i + 1]]

    def begin(number: int) -> dict[str, jax.Array]:
        (a, b), (c, d) = pairs[number]
        x1, x2 = (padded(system.x[rows]) for rows in (slice(a, b), slice(c, d)))
        weights = np.zeros([k * padded_rows(stop - start) for start, stop in pairs[number]])
        weights[: k * (b - a), : k * (d - c)] = by_entry[k * a : k * b, k * c : k * d]
        with jax.enable_x64(True):
            return _derivatives(unbound, parameters, x1, x2, weights if a == c else 2 * weights)

    def finish(number: int, found: dict[str, jax.Array]) -> Array:
        return np.array([float(found[name]) for name in parameters])

    try:
        terms = sum(system.cross.devices.map(begin, finish, len(pairs)), np.zeros(len(parameters)))
    except TypeError as error:
        raise InputError(
            f"kernel: expected one that JAX differentiates by {', '.join(parameters)}, got "
            f"{brief(kernel)} ({brief(str(error))}); give such numbers as integers, or bind them "
            "inside of it"
        ) from None
    return dict(zip(parameters, terms.tolist(), strict=True))


def draw(key: jax.Array, mean: Array, covariance: Array, samples: int) -> Array:
    """Normal draws with this mean [m, c] and covariance [m, m], alike for c: [samples, m, c].

    Raises:
        InputError: ``key`` is no random key.
    """
    check_key("key", key)
    with jax.enable_x64(True):
        normal = np.asarray(jax.random.normal(key, (samples, *mean.shape), jnp.float64))
    values, vectors = np.linalg.eigh(covariance)
    # Where the function is known, rounding may push a variance below 0.
    return mean + (vectors * np.sqrt(np.maximum(values, 0))) @ normal
