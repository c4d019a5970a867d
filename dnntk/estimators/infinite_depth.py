"""The infinitely deep network as scikit-learn estimators.

`InfiniteDepthClassifier` and `InfiniteDepthRegressor` predict as an infinitely deep narrow network
does at time t of its training (Theorems 3.3 and 4.3). No network is trained: each is a kernel
machine with `limit_ntk`. Use them beside other estimators, in pipelines and searches; use
`dnntk.KernelFlow`, on which they are built, for many times of one flow or for other kernels.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from dnntk.checks import check_count, check_deviation
from dnntk.estimators.base import (
    DEFAULT_TIME,
    NarrowEstimator,
    check_filter,
    checked_image,
    image_of,
    typed,
)
from dnntk.estimators.targets import NarrowClassifier, NarrowRegressor
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.kernel_flow import MAX_ITERATIONS, KernelFlow
from dnntk.kernel import limit_ntk

__all__ = ["InfiniteDepthClassifier", "InfiniteDepthRegressor", "LimitKernel"]

BLOCK_SIZE = 1024
Rows = jax.Array | NDArray
_KERNEL = {"rho": float, "beta": float, "d_out": int, "kernel_size": int}


@dataclasses.dataclass(frozen=True)
class LimitKernel:
    """`limit_ntk` of one network on flat inputs: [n1, d], [n2, d] -> [n1, n2].

    Attributes:
        rho: standard deviation of the Gaussian weights.
        beta: standard deviation of the Gaussian biases.
        d_out: outputs of the network.
        image_shape: (H, W, c) to which the CNN's inputs are reshaped; None is the MLP.
        kernel_size: side of the CNN's filters, odd.
    """

    rho: float
    beta: float
    d_out: int
    image_shape: tuple[int, int, int] | None
    kernel_size: int

    def __post_init__(self) -> None:
        """Check types and ranges, and convert to Python's own numbers, which a file can hold."""
        for name in ("rho", "beta"):
            object.__setattr__(self, name, float(check_deviation(name, getattr(self, name))))
        object.__setattr__(self, "d_out", check_count("d_out", self.d_out))
        size = check_filter(self.kernel_size, self.image_shape)
        object.__setattr__(self, "kernel_size", size)

    def __call__(self, x1: Rows, x2: Rows) -> jax.Array:
        """The kernel's values."""
        return self.scaled(x1, x2)

    def scaled(
        self, x1: Rows, x2: Rows | None, rho: ArrayLike = 1.0, beta: ArrayLike = 1.0
    ) -> jax.Array:
        """The kernel whose rho and beta are these times this one's, which may be traced."""
        shape = self.image_shape
        left, right = (x if x is None or shape is None else x.reshape(-1, *shape) for x in (x1, x2))
        assert left is not None
        return limit_ntk(
            left,
            right,
            rho=self.rho * rho,
            beta=self.beta * beta,
            d_out=self.d_out,
            kernel_size=self.kernel_size,
        )


class InfiniteDepth(NarrowEstimator):
    """An infinitely deep network on flat rows: parameters, fit, outputs.

    A fitted estimator keeps only the arrays of its predictions.
    """

    RECORD = {"converged_": bool, "residual_": float, "n_iter_": int, "condition_": float}

    def __init__(
        self,
        *,
        rho: float = 1.0,
        beta: float = 1.0,
        time: float = DEFAULT_TIME,
        ridge: float = 0.0,
        arch: str = "mlp",
        image_shape: tuple[int, ...] | None = None,
        kernel_size: int = 3,
        solver: str = "auto",
        tolerance: float = 1e-6,
        max_iterations: int = MAX_ITERATIONS,
        memory: float | None = None,
        verbose: bool = False,
    ) -> None:
        """Store the parameters; `fit` checks them.

        Args:
            rho: standard deviation of the network's Gaussian weights (the MLP's times sqrt(d_in)).
            beta: standard deviation of its Gaussian biases over its scale.
            time: kernel time of the training, t >= 0, as in `dnntk.train`; may be infinite. The
                network has learnt the components of y whose eigenvalue of K/N is well above 1/t;
                eigenvalues grow with the square of the inputs' scale. The default suffices for
                nearly all components if inputs are of size 1. It is finite because duplicate inputs
                make K singular: t = infinity then needs a ridge.
            ridge: weight decay, in units of the eigenvalues of K/N.
            arch: "mlp", or "cnn" with a global average pool, on images that are rows of X.
            image_shape: (H, W) or (H, W, channels) of the rows of X, channels innermost, for a CNN;
                None is square with one channel. Without effect on an MLP.
            kernel_size: side of the CNN's filters, odd.
            solver: "eigh", "krylov", or "auto": the first up to 4,096 examples, the second beyond.
            tolerance: `fit` warns if the relative residual is larger.
            max_iterations: most iterations of the Krylov method.
            memory: bytes for the Gram matrix and the Krylov basis; None is 3/4 of this machine's.
            verbose: show progress bars on standard error for what takes longer than five seconds.
        """
        self.rho = rho
        self.beta = beta
        self.time = time
        self.ridge = ridge
        self.arch = arch
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.solver = solver
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.memory = memory
        self.verbose = verbose

    def _fit_outputs(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        kernel = LimitKernel(
            self.rho, self.beta, y.shape[1], image_of(self, x.shape[1]), self.kernel_size
        )
        flow = KernelFlow(
            kernel,
            x,
            y,
            ridge=self.ridge,
            solver=self.solver,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            memory=self.memory,
            block_size=BLOCK_SIZE,
            progress=bool(self.verbose),
        )
        solution = flow.solution(self.time)
        self.kernel_ = kernel
        # The flow's copy of X: the caller may change X.
        self.x_train_, self.coefficients_ = flow.gram.cross.x, solution.coefficients
        self.converged_, self.residual_ = bool(solution.converged), float(solution.residual)
        self.n_iter_, self.condition_ = int(solution.iterations), float(solution.condition)
        self._warn_unless_converged(
            "scale the inputs to size 1, add a ridge, or take a shorter time or more max_iterations"
        )

    def _outputs(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        cross = CrossKernel(self.kernel_, self.x_train_, "float64")
        return cross.product(x, self.coefficients_, BLOCK_SIZE)

    def _output_count(self) -> int:
        return self.coefficients_.shape[1]

    def _network_described(self) -> tuple[dict[str, NDArray], dict[str, Any]]:
        arrays = {"x_train": self.x_train_, "coefficients": self.coefficients_}
        return arrays, {"kernel": dataclasses.asdict(self.kernel_)}

    def _restore_network(self, arrays: dict[str, NDArray], about: dict[str, Any]) -> None:
        x, coefficients = arrays["x_train"], arrays["coefficients"]
        if x.ndim != 2 or coefficients.ndim != 2 or len(x) != len(coefficients):
            raise ValueError("arrays of different lengths")
        kernel, shape = typed(about["kernel"], _KERNEL), about["kernel"]["image_shape"]
        image_shape = None if shape is None else checked_image(shape, x.shape[1])
        self.kernel_ = LimitKernel(**kernel, image_shape=image_shape)
        if self.kernel_.d_out != coefficients.shape[1]:
            raise ValueError("another number of outputs than the kernel's")
        self.x_train_, self.coefficients_ = x, coefficients
        self.n_features_in_ = x.shape[1]


class InfiniteDepthClassifier(NarrowClassifier, InfiniteDepth):
    """Classification by the infinitely deep narrow network at a time of its training.

    The loss is least squares, as in the thesis: on one output with the targets 0 and 1 for two
    classes, with the threshold 1/2, and on one-hot targets for more classes. The outputs are not
    probabilities.

    Time is of order n^3 in the number of training examples, beyond 4,096 of n^2 an iteration;
    prediction takes n evaluations of the kernel a point. Everything is float64. A saved file takes
    8 (n_features + d_out) bytes a training example.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: features seen in `fit`.
        feature_names_in_: [n_features_in_], where X had names that are all strings.
        kernel_: the `LimitKernel` that was fitted.
        x_train_: [n, n_features_in_] float64.
        coefficients_: [n, d_out] float64: f_t(x) = kernel_(x, x_train_) coefficients_.
        converged_: is the residual within the tolerance?
        residual_: relative residual of the flow's differential equation, rounding included.
        n_iter_: products with the Gram matrix; 0 for an eigendecomposition.
        condition_: effective condition of the problem; see
            `dnntk.infinite_depth.kernel_flow.Solution`.
    """


class InfiniteDepthRegressor(NarrowRegressor, InfiniteDepth):
    """Regression by the infinitely deep narrow network at a time of its training.

    Targets are not scaled or centred: the network starts at 0, predictions are linear in y, and the
    mean of y is learnt early. Several outputs belong to one network: the constant part of its
    kernel is d_out; apart from this constant, every output is fitted independently.

    Time is of order n^3 in the number of training examples, beyond 4,096 of n^2 an iteration;
    prediction takes n evaluations of the kernel a point. Everything is float64. A saved file takes
    8 (n_features + d_out) bytes a training example.

    Attributes: those of `InfiniteDepthClassifier` without ``classes_``.
    """
