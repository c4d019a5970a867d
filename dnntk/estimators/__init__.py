"""Deep narrow networks as scikit-learn estimators, and the files that hold them."""

from dnntk.estimators.deep_narrow import DeepNarrowClassifier, DeepNarrowRegressor
from dnntk.estimators.features import InfiniteDepthFeatures
from dnntk.estimators.gaussian_process import InfiniteDepthKernel
from dnntk.estimators.infinite_depth import InfiniteDepthClassifier, InfiniteDepthRegressor

__all__ = [
    "DeepNarrowClassifier",
    "DeepNarrowRegressor",
    "InfiniteDepthClassifier",
    "InfiniteDepthFeatures",
    "InfiniteDepthKernel",
    "InfiniteDepthRegressor",
]
