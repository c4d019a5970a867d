"""Each layer's contribution to the output: by the thesis's matrices, and by linear theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, empirical_ntk, to_standard
from dnntk.shares import accumulated, coefficients, layer_shares

MLP = DeepNarrowMLP(10, 2, 30.0, rho=1.3, beta=0.7)
CNN = DeepNarrowCNN(4, 2, 30.0, rho=0.4, beta=0.7)


def moved(model, x, size=0.3, dtype=np.float64):
    """The model's variables, away from initialization."""
    variables = drawn(model, x, seed=3)
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda d: size * rng.standard_normal(d.shape), variables["params"])
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), variables | {"params": params})


def literal_curve(model, variables, x):
    """Figure 5.1 by the thesis's matrices in NumPy: [depth, n, d_out] and [depth - 1, n]."""
    _, literal = to_standard(model, variables)
    p = jax.tree.map(np.asarray, literal["params"])
    middle = zip(p["middle"]["kernel"], p["middle"]["bias"], strict=True)
    curve, off, h = [], [], x
    for kernel, bias in [(p["first"]["kernel"], p["first"]["bias"]), *middle]:
        h = np.maximum(h @ kernel + bias, 0)
        curve.append(h[:, -model.d_out :] - model.scale)
        random = slice(-model.d_out - model.random_units, -model.d_out)
        off.append(np.mean(h[:, random] == 0, 1))
    curve.append(h @ p["last"]["kernel"] + p["last"]["bias"])
    return np.stack(curve), np.stack(off)


def test_the_curve_is_that_of_the_literal_matrices_with_several_random_units_too(x64):
    x = np.random.default_rng(0).uniform(0.1, 1, (5, 3))
    several = MLP.clone(random_units=3)
    variables = moved(several, x)
    curve, off = accumulated(several, variables, x)
    expected, expected_off = literal_curve(several, variables, x)
    np.testing.assert_allclose(curve, expected, atol=1e-12 * MLP.scale)
    np.testing.assert_allclose(off, expected_off, atol=1e-12)
    variables = moved(MLP, x)
    expected, expected_off = literal_curve(MLP, variables, x)
    assert 0.1 < expected_off.mean() < 0.9 and np.abs(expected).max() > 0.1
    curve, off = accumulated(MLP, variables, x)
    np.testing.assert_allclose(curve, expected, atol=1e-12 * MLP.scale)
    np.testing.assert_array_equal(off, expected_off)
    single = jax.tree.map(lambda a: a.astype(np.float32), (variables, x))
    curve, _ = accumulated(MLP, *single)
    assert curve.dtype == np.float32
    # As float32 carries the deviation and never C.
    np.testing.assert_allclose(curve, expected, atol=30 * np.finfo(np.float32).eps)


def test_both_forms_of_a_cnn_have_one_curve_and_it_ends_in_the_output(x64):
    x = np.random.default_rng(1).uniform(0, 1, (3, 4, 5, 2))
    variables = moved(CNN, x, size=0.2)
    curve, off = accumulated(CNN, variables, x)
    literal, literal_off = accumulated(*to_standard(CNN, variables), x)
    assert curve.shape == (CNN.depth, 3, 2) and off.shape == (CNN.depth - 1, 3)
    np.testing.assert_allclose(curve, literal, atol=1e-11)
    np.testing.assert_allclose(off, literal_off, atol=1e-12)
    np.testing.assert_allclose(curve[-1], jax.jit(CNN.apply)(variables, x), atol=1e-13)


def test_a_cnns_shares_add_up_to_its_own_kernel(x64):
    rng = np.random.default_rng(2)
    x_train, x = rng.uniform(0, 1, (4, 4, 5, 2)), rng.uniform(0, 1, (3, 4, 5, 2))
    variables = jax.jit(CNN.init)(jax.random.key(3), x)
    alpha = rng.standard_normal((4, 3))
    shares = layer_shares(CNN, variables, x_train, x, alpha)
    assert shares.shape == (CNN.depth, 3, 3)
    kernel = empirical_ntk(CNN, variables, x, x_train, outputs="diagonal")[:, :, 1]
    np.testing.assert_allclose(shares.sum(0), kernel @ alpha, rtol=1e-9)


def test_a_layers_share_is_what_the_docstring_says(x64):
    rng = np.random.default_rng(3)
    x_train, x, alpha = (
        rng.uniform(0, 1, (4, 3)),
        rng.uniform(0, 1, (2, 3)),
        rng.normal(size=(4, 1)),
    )
    variables = jax.jit(MLP.init)(jax.random.key(6), x)
    start = jax.tree.map(np.asarray, variables["initial"])
    units = [start["first"]["kernel"] / MLP.scale, *start["middle"]["kernel"]]
    biases = [start["first"]["bias"], *start["middle"]["bias"]]
    inner, small = x @ x_train.T, MLP.scale**-2
    expected = [small * (inner + 1)]
    for u, v in zip(units, biases, strict=True):
        m, m_train = (np.maximum(points @ u + v, 0) for points in (x, x_train))
        expected.append(inner + MLP.d_out + np.outer(m, m_train) + small)
    shares = layer_shares(MLP, variables, x_train, x, alpha)
    np.testing.assert_allclose(shares, np.stack(expected) @ alpha / MLP.depth, atol=1e-12)


def test_coefficients_are_those_of_gradient_descent():
    rng = np.random.default_rng(5)
    features = rng.standard_normal((6, 4))  # singular: two directions are never learnt
    kernel, y, rate, alpha = features @ features.T, rng.standard_normal(6), 0.6, np.zeros(6)
    assert 1 < rate * np.linalg.eigvalsh(kernel / 6)[-1] < 2
    for _ in range(7):
        alpha = alpha + rate / 6 * (y - kernel @ alpha)
    np.testing.assert_allclose(coefficients(kernel, y, rate, 7)[:, 0], alpha, atol=1e-12)
    finer = coefficients(kernel, y, rate * 1e-4, 70_000)
    np.testing.assert_allclose(finer[:, 0], finer[:, 1], rtol=1e-3)


def test_other_initializations_are_refused():
    with pytest.raises(InputError, match="init"):
        accumulated(MLP.clone(initialization="he_uniform"), {}, np.zeros((1, 3)))
