"""The wide network of two layers: its kernel, the kernel's limit, and steps in kernel time."""

import math

import jax
import numpy as np
import pytest
from networks import initialized
from networks import outputs as apply

import dnntk
from dnntk import InputError, KernelFlow
from dnntk.experiments.shallow import ShallowMLP, descend, shallow_limit_ntk, shallow_ntk, width_for


def inputs(n, d_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d_in))


def moved(variables, seed=1):
    """Parameters anywhere, as in the middle of a training."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape), variables["params"])
    return {**variables, "params": params}


def test_the_wide_networks_kernel_is_that_of_its_jacobian(x64):
    model = ShallowMLP(7, 3, rho=0.8, beta=0.6)
    x1, x2 = inputs(4, 5), inputs(3, 5, seed=2)
    variables = initialized(model, x1)
    assert not np.any(apply(model, variables, x1))
    variables = moved(variables)
    expected = dnntk.empirical_ntk_fn(model)(variables, x1, x2)
    np.testing.assert_allclose(shallow_ntk(model, variables, x1, x2), expected, atol=1e-12)


@pytest.mark.parametrize(("rho", "beta"), [(1.7, 0.4), (0.9, 0.0)])
def test_the_wide_networks_kernel_goes_to_its_limit(rho, beta, x64):
    x1, x2, width = np.abs(inputs(4, 3)), np.abs(inputs(5, 3, seed=2)), 40_000
    model = ShallowMLP(width, 2, rho=rho, beta=beta)
    ntk = np.asarray(shallow_ntk(model, initialized(model, x1, seed=3), x1, x2))
    limit = np.asarray(shallow_limit_ntk(x1, x2, rho=rho, beta=beta))
    # Averages over the units; a unit's share has a deviation of at most sqrt(3) (S S')^(1/2) by
    # either layer, as E[g^2 g'^2] is at most 3 S S'. Four deviations.
    sizes = [np.sqrt(rho**2 * np.sum(x**2, axis=1) / 3 + beta**2) for x in (x1, x2)]
    error = 4 * 2 * math.sqrt(3 / width) * sizes[0][:, None] * sizes[1][None, :]
    assert (np.abs(ntk[..., 0, 0] - limit) < error).all()
    assert (np.abs(ntk[..., 0, 1]) < error).all()
    assert np.abs(limit).max() > 5 * error.max()
    gram = np.asarray(shallow_limit_ntk(x1, rho=rho, beta=beta))
    np.testing.assert_allclose(gram, gram.T, atol=1e-12)
    assert np.linalg.eigvalsh(gram).min() > -1e-9


def test_a_step_is_kernel_time_and_wide_networks_follow_their_limit(x64):
    x, y, width, times = inputs(6, 3), inputs(6, 2, seed=4), 20_000, (1.0, 3.0)
    model = ShallowMLP(width, 2)
    variables = initialized(model, x)
    kernel = np.einsum("nmkk->nm", np.asarray(shallow_ntk(model, variables, x, x))) / 2
    (first,) = descend(model, variables, x, y, 1e-3, [1], "", progress=False)
    outputs = apply(model, {**variables, "params": first.params}, x)
    np.testing.assert_allclose(outputs, 1e-3 * kernel @ y / 6, atol=1e-4)
    assert first.loss == pytest.approx(0.5 * np.mean(np.sum(y**2, 1)))
    limit = KernelFlow(shallow_limit_ntk, x, y, progress=False).train_predictions(times)
    stops = descend(model, variables, x, y, 0.02, [50, 150], "", progress=False)
    for stop, expected in zip(stops, limit, strict=True):
        outputs = apply(model, {**variables, "params": stop.params}, x)
        # Random features are off by about 1 / sqrt(width) of the kernel, steps by half of one.
        assert np.linalg.norm(outputs - expected) < 0.03 * np.linalg.norm(expected)


def test_a_network_has_about_the_parameters_asked_for():
    for parameters in (1000, 12_345):
        wide = ShallowMLP(width_for(parameters, 9, 4), 4)
        shapes = jax.eval_shape(wide.init, jax.random.key(0), np.zeros((1, 9), np.float32))
        count = sum(p.size for p in jax.tree.leaves(shapes["params"]))
        assert abs(count - parameters) <= (9 + 1 + 4) / 2
    with pytest.raises(InputError, match="parameters"):
        width_for(10, 64, 10)
