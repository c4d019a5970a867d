"""The network's own kernel at initialization, against its gradients."""

import numpy as np
import pytest
from networks import initialized

from dnntk import DeepNarrowCNN, DeepNarrowMLP, empirical_ntk
from dnntk.ntk import random_features
from dnntk.ntk.random_features import RandomFeatures

MLP, CNN = (7, 3), (5, 6, 4, 2)
NETWORKS = [
    (DeepNarrowMLP(9, 2, 2.0, rho=1.5, beta=0.3), MLP),
    (DeepNarrowCNN(7, 3, 3.0, kernel_size=3, pool=2), CNN),
    (DeepNarrowMLP(6, 2, 2.0, features="sobol", random_units=3), MLP),
    (DeepNarrowCNN(4, 1, 3.0, random_units=2), (5, 2, 3, 1)),
]


@pytest.mark.parametrize(("model", "shape"), NETWORKS)
def test_it_is_the_empirical_ntk_at_initialization(model, shape, x64, monkeypatch):
    monkeypatch.setattr(random_features, "BLOCK_ELEMENTS", 150)  # a few units at a time
    x = np.random.default_rng(0).uniform(0, 1, shape)
    variables = initialized(model, x, seed=1)
    expected = np.asarray(empirical_ntk(model, variables, x[:4], x[2:]))
    found = RandomFeatures(model, variables)(x[:4], x[2:])
    np.testing.assert_allclose(found, expected[:, :, 0, 0], rtol=1e-12)
    assert not (expected * ~np.eye(model.d_out, dtype=bool)).any()


@pytest.mark.parametrize("change", [{"parametrization": "standard"}, {"init": "he_uniform"}])
def test_other_networks_are_refused(change):
    model = DeepNarrowMLP(5, 1, 2.0, **change)
    variables = initialized(model, np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="model: expected a deep_narrow"):
        RandomFeatures(model, variables)


def test_without_initial_values_it_says_what_is_missing():
    with pytest.raises(ValueError, match="'initial'"):
        RandomFeatures(DeepNarrowMLP(5, 1, 2.0), {"params": {}})
