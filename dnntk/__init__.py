"""Deep narrow neural networks: train, analyse and predict them, at any depth."""

from dnntk import kernel, lyapunov
from dnntk.config import TrainConfig
from dnntk.data import Dataset, load_dataset
from dnntk.errors import Diverged, InputError
from dnntk.experiments.training import TrainResult, train
from dnntk.models import DeepNarrowCNN, DeepNarrowMLP, to_standard
from dnntk.ntk import empirical_ntk, empirical_ntk_fn

__all__ = [
    "Dataset",
    "DeepNarrowCNN",
    "DeepNarrowMLP",
    "Diverged",
    "InputError",
    "TrainConfig",
    "TrainResult",
    "empirical_ntk",
    "empirical_ntk_fn",
    "kernel",
    "load_dataset",
    "lyapunov",
    "to_standard",
    "train",
]
