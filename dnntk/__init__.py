"""Deep narrow neural networks: train, analyse and predict them, at any depth."""

from typing import TYPE_CHECKING, Any

from dnntk import kernel, lyapunov, ntk, parallel
from dnntk.data.datasets import Dataset, load_dataset
from dnntk.errors import Diverged, InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.prediction import predict
from dnntk.infinite_depth.spread import initialization_spread
from dnntk.networks.models import DeepNarrowCNN, DeepNarrowMLP, to_standard
from dnntk.ntk.empirical import empirical_ntk, empirical_ntk_fn
from dnntk.training.config import TrainConfig
from dnntk.training.run import TrainResult, train
from dnntk.training.solve import SolveReport, solve

if TYPE_CHECKING:
    from dnntk.estimators import (
        DeepNarrowClassifier,
        DeepNarrowRegressor,
        InfiniteDepthClassifier,
        InfiniteDepthFeatures,
        InfiniteDepthKernel,
        InfiniteDepthRegressor,
    )

__all__ = [
    "Dataset",
    "DeepNarrowCNN",
    "DeepNarrowClassifier",
    "DeepNarrowMLP",
    "DeepNarrowRegressor",
    "Diverged",
    "InfiniteDepthClassifier",
    "InfiniteDepthFeatures",
    "InfiniteDepthKernel",
    "InfiniteDepthRegressor",
    "InputError",
    "KernelFlow",
    "PredictConfig",
    "SolveReport",
    "TrainConfig",
    "TrainResult",
    "empirical_ntk",
    "empirical_ntk_fn",
    "initialization_spread",
    "kernel",
    "load_dataset",
    "lyapunov",
    "ntk",
    "parallel",
    "predict",
    "solve",
    "to_standard",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the estimators on first use: scikit-learn takes long to import."""
    if name in __all__:
        from dnntk import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone."""
    return __all__
