"""Features of the infinitely deep network, as a scikit-learn transformer.

`InfiniteDepthFeatures` makes linear models learn as the limit kernel does, in memory and time that
are linear in the number of examples: use it where there are too many for
`dnntk.InfiniteDepthClassifier` or `dnntk.KernelFlow`, which are exact.
"""

from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from dnntk.checks import check_choice, check_count
from dnntk.estimators.base import drawn_seed, image_of, validated
from dnntk.estimators.infinite_depth import LimitKernel
from dnntk.infinite_depth.cross_kernel import balanced, padded
from dnntk.networks.random_units import EVEN_FEATURES
from dnntk.ntk.limit_features import draw_units, limit_features

__all__ = ["InfiniteDepthFeatures"]

DTYPES = [np.float64, np.float32]
BLOCK_ELEMENTS = 1 << 23  # of the units' maps on the rows that are transformed together


class InfiniteDepthFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features Phi(x) whose products Phi(x) Phi(x')^T are the limit kernel, `kernel.limit_ntk`.

    The kernel's constant and linear parts are exact; ``count`` random units stand for the rest. Its
    error falls as 1/sqrt(count) with independent units. With Sobol points it falls as 1/count in
    few dimensions, on digits of 64 numbers too, and as count^-0.66 on MNIST's 784.

    A linear model behind it is the infinitely deep network: ``Ridge(alpha=n * ridge,
    fit_intercept=False)`` that of `dnntk.KernelFlow` at t = infinity with this ridge, and about
    that without a ridge at t = 1/ridge. `transform` takes a block of rows at a time, so that memory
    is that of its result; for more rows than fit, loop over chunks and call ``partial_fit`` of an
    `SGDClassifier` with each. `fit` only draws the units: any rows will do.

    Attributes:
        kernel_: the exact kernel, [n1, n_features_in_], [n2, n_features_in_] -> [n1, n2].
        units_: {"kernel": [count, n_features_in_], "bias": [count]}, float64; a CNN's kernel is
            [count, q, q, channels].
        n_features_in_: features seen in `fit`.
        feature_names_in_: [n_features_in_], where X had names that are all strings.
    """

    def __init__(
        self,
        count: int = 1024,
        rho: float = 1.0,
        beta: float = 1.0,
        features: str = "sobol",
        *,
        d_out: int = 1,
        arch: str = "mlp",
        image_shape: tuple[int, ...] | None = None,
        kernel_size: int = 3,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        """Store the parameters; `fit` checks them.

        Args:
            count: random units. An MLP's features are the n_features_in_ inputs, a constant, and
                one a unit; a CNN's are q^2 (c + q^2 c + count) + 1 for filters of side q. Sobol
                points are most even where it is a power of two.
            rho: standard deviation of the network's Gaussian weights (the MLP's times sqrt(d_in)).
            beta: standard deviation of its Gaussian biases over its scale.
            features: draw of the units, "gaussian", "orthogonal" or "sobol", as in
                `dnntk.networks.random_units`.
            d_out: outputs of the network: the constant part of its kernel.
            arch: "mlp", or "cnn" with a global average pool, on images that are rows of X.
            image_shape: (H, W) or (H, W, channels) of the rows of X, channels innermost, for a CNN;
                None is square with one channel. Without effect on an MLP.
            kernel_size: side q of the CNN's filters, odd.
            random_state: seed of the draw; a RandomState, or None, draws another a fit.
        """
        self.count = count
        self.rho = rho
        self.beta = beta
        self.features = features
        self.d_out = d_out
        self.arch = arch
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:  # noqa: N803
        """Draw the units for rows like those of X.

        Args:
            X: [n, n_features], of which only the number of features matters.
            y: ignored.

        Returns:
            The transformer itself.

        Raises:
            InputError: a parameter has the wrong type or range, or X is no array [n, n_features] of
                finite numbers.
        """
        x = validated(self, X, dtype=DTYPES)
        image = image_of(self, x.shape[1])
        kernel = LimitKernel(self.rho, self.beta, self.d_out, image, self.kernel_size)
        count = check_count("count", self.count)
        check_choice("features", self.features, EVEN_FEATURES)
        size = kernel.kernel_size
        shape = (x.shape[1],) if image is None else (size, size, image[2])
        with jax.enable_x64(True):
            key = jax.random.key(drawn_seed(self.random_state))
            units = draw_units(
                key, self.features, count, shape, kernel.rho, kernel.beta, jnp.dtype("float64")
            )
        self.kernel_, self.units_ = kernel, jax.device_get(units)
        return self

    def transform(self, X: ArrayLike) -> NDArray:  # noqa: N803
        """The features of rows.

        Args:
            X: [n, n_features_in_].

        Returns:
            [n, features], float32 if X is, else float64; see `__init__` for their number. The
            columns are as in `dnntk.ntk.limit_features`.

        Raises:
            InputError: X is no such array of finite numbers.
        """
        check_is_fitted(self)
        x = validated(self, X, dtype=DTYPES, reset=False)
        image, count = self.kernel_.image_shape, len(self.units_["bias"])
        positions = 1 if image is None else image[0] * image[1]
        out = np.empty((len(x), self._n_features_out), x.dtype)
        with jax.enable_x64(x.dtype == np.float64):
            units = jax.tree.map(lambda u: jnp.asarray(u, x.dtype), self.units_)
            kernel = self.kernel_
            for start, stop in balanced(len(x), max(16, BLOCK_ELEMENTS // (positions * count))):
                block = padded(x[start:stop]).reshape(-1, *(image or x.shape[1:]))
                found = _features(block, units, kernel.rho, kernel.beta, kernel.d_out)
                out[start:stop] = np.asarray(found)[: stop - start]
        return out

    @property
    def _n_features_out(self) -> int:
        count, size = len(self.units_["bias"]), self.kernel_.kernel_size
        if self.kernel_.image_shape is None:
            return self.n_features_in_ + 1 + count
        channels = self.kernel_.image_shape[2]
        return size**2 * (channels + size**2 * channels + count) + 1

    def __sklearn_tags__(self) -> Tags:
        """scikit-learn's record of what the transformer does: it keeps float32."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = [np.dtype(each).name for each in DTYPES]
        return tags


_features = partial(jax.jit, static_argnums=4)(limit_features)
