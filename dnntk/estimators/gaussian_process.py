"""The limit kernel as a scikit-learn kernel, for Gaussian processes of infinitely deep networks.

`InfiniteDepthKernel` is `dnntk.kernel.limit_ntk` with rho and beta as hyperparameters, which
`GaussianProcessRegressor` chooses by the marginal likelihood. Combine it with scikit-learn's other
kernels: a factor scales the prior, a `WhiteKernel` is the targets' noise. `dnntk.KernelFlow` has
the posterior, too, for more examples than an n^3 method can take.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.gaussian_process.kernels import Hyperparameter, Kernel

from dnntk.checks import host_examples, host_numbers
from dnntk.errors import InputError
from dnntk.estimators.base import image_of
from dnntk.estimators.infinite_depth import LimitKernel

__all__ = ["InfiniteDepthKernel"]

BOUNDS = (1e-5, 1e5)  # as those of scikit-learn's kernels
DIAGONAL_ROWS = 64  # examples of the diagonal that are computed together


class InfiniteDepthKernel(Kernel):
    """`dnntk.kernel.limit_ntk` as a kernel of `sklearn.gaussian_process`, in float64.

    Its hyperparameters are ``beta`` and ``rho``, in this order in ``theta``, which are their
    logarithms. It is not stationary.
    """

    def __init__(
        self,
        rho: float = 1.0,
        beta: float = 1.0,
        rho_bounds: tuple[float, float] | str = BOUNDS,
        beta_bounds: tuple[float, float] | str = BOUNDS,
        *,
        d_out: int = 1,
        arch: str = "mlp",
        image_shape: tuple[int, ...] | None = None,
        kernel_size: int = 3,
    ) -> None:
        """Store the parameters; a call checks them.

        Args:
            rho: standard deviation of the network's Gaussian weights (the MLP's times sqrt(d_in)).
            beta: standard deviation of its Gaussian biases over its scale.
            rho_bounds: least and largest rho in a fit, or "fixed"; 0 must be fixed.
            beta_bounds: likewise, of beta.
            d_out: outputs of the network: the constant part of its kernel.
            arch: "mlp", or "cnn" with a global average pool, on images that are rows of X.
            image_shape: (H, W) or (H, W, channels) of the rows of X, channels innermost, for a CNN;
                None is square with one channel. Without effect on an MLP.
            kernel_size: side of the CNN's filters, odd.
        """
        self.rho = rho
        self.beta = beta
        self.rho_bounds = rho_bounds
        self.beta_bounds = beta_bounds
        self.d_out = d_out
        self.arch = arch
        self.image_shape = image_shape
        self.kernel_size = kernel_size

    @property
    def hyperparameter_rho(self) -> Hyperparameter:
        """The value's type and bounds."""
        return self._hyperparameter("rho")

    @property
    def hyperparameter_beta(self) -> Hyperparameter:
        """The value's type and bounds."""
        return self._hyperparameter("beta")

    def __call__(
        self,
        X: ArrayLike,  # noqa: N803
        Y: ArrayLike | None = None,  # noqa: N803
        eval_gradient: bool = False,
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The kernel's values, and their derivatives by ``theta``.

        Args:
            X: [n, n_features].
            Y: [m, n_features]; None means X.
            eval_gradient: return the derivatives as well; only without Y.

        Returns:
            [n, m]; with ``eval_gradient`` also [n, n, hyperparameters that are not fixed].

        Raises:
            InputError: a parameter has the wrong type or range, X or Y has the wrong shape or an
                entry that is not finite, or derivatives are asked for with a Y.
        """
        x = host_examples("X", X)
        kernel = self._kernel(x.shape[1:])
        with jax.enable_x64(True):
            if not eval_gradient:
                return np.array(kernel.scaled(x, None if Y is None else host_examples("Y", Y)))
            if Y is not None:
                raise InputError(
                    "eval_gradient: expected False with a Y, got True; leave Y out, or stack X and "
                    "Y and give both as X"
                )
            names = [each.name for each in self.hyperparameters if not each.fixed]

            def values(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
                found = kernel.scaled(x, None, **dict(zip(names, jnp.exp(logs), strict=True)))
                return found, found

            slopes, found = jax.jacfwd(values, has_aux=True)(jnp.zeros(len(names)))
            return np.array(found), np.array(slopes)

    def diag(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """The kernel of each example with itself: [n, n_features] -> [n].

        Raises:
            InputError: as a call.
        """
        x = host_examples("X", X)
        kernel = self._kernel(x.shape[1:])
        with jax.enable_x64(True):
            own = lambda row: kernel.scaled(row[None], None)[0, 0]  # noqa: E731
            return np.array(jax.lax.map(own, jnp.asarray(x), batch_size=DIAGONAL_ROWS))

    def is_stationary(self) -> bool:
        """False: the kernel depends on more than differences of inputs."""
        return False

    def __repr__(self) -> str:
        """The values of the hyperparameters."""
        return f"{type(self).__name__}(rho={self.rho:.3g}, beta={self.beta:.3g})"

    def _hyperparameter(self, name: str) -> Hyperparameter:
        """A parameter with its bounds, checked, as fits take logarithms of all three."""
        value, bounds = getattr(self, name), getattr(self, f"{name}_bounds")
        if isinstance(bounds, str) and bounds == "fixed":
            return Hyperparameter(name, "numeric", bounds)
        limits = host_numbers(f"{name}_bounds", bounds)
        if limits.shape != (2,) or not 0 < limits[0] <= limits[1]:
            raise InputError(
                f'{name}_bounds: expected (least, largest) above 0, or "fixed", got {bounds!r}'
            )
        if not value > 0:
            raise InputError(
                f"{name}: expected a number above 0, as a fit takes its logarithm, got {value!r}; "
                f'or give {name}_bounds="fixed"'
            )
        return Hyperparameter(name, "numeric", tuple(limits))

    def _kernel(self, shape: tuple[int, ...]) -> LimitKernel:
        """The kernel of examples of this shape, with its parameters checked."""
        image = image_of(self, math.prod(shape))
        return LimitKernel(self.rho, self.beta, self.d_out, image, self.kernel_size)
