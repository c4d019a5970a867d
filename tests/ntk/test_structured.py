"""A Jacobian in factors beside the Jacobian: the same kernel, on networks of many odd layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dnntk import empirical_ntk_fn
from dnntk.ntk import structured

RNG = np.random.default_rng(0)


@jax.custom_vjp
def doubled(w, x):
    """A layer whose derivative by its weights is twice what its product says."""
    return x @ w


doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (2 * kept[1].T @ g, g @ kept[0].T))


def dense(p, x):
    """Layers that are factors, and uses of weights that are none."""
    h = jnp.tanh(x["a"] @ (p["scaled"] / 3) * 2 + p["table"][x["n"]])
    h = jax.checkpoint(jax.jit(lambda w, h: jnp.tanh(h @ w)))(p["called"], h)
    h = h + jnp.einsum("oi,ni->no", 2 * p["left"], h)
    h = jnp.tanh(h @ p["tied"]) @ p["tied"].T
    h = doubled(p["custom"], h) + lax.scan(lambda h, w: (h @ w, None), h, p["scan"])[0]
    tokens = jnp.tanh(jnp.einsum("nsi,gio->gnso", h.reshape(len(h), 3, 2), p["groups"]))
    return {"tokens": tokens.sum(0).reshape(len(h), -1), "norm": jnp.sum(h**2, 1) * p["gain"]}


def convolutional(p, x):
    convolve = partial(lax.conv_general_dilated, x)
    h = convolve(p["grouped"], (2, 1), [(1, 0), (0, 2)], (1, 2), (1, 2), ("NHWC", "HWIO", "NHWC"),
                 feature_group_count=2)  # fmt: skip
    h = jnp.tanh(h).reshape(len(h), -1, h.shape[-1])
    h = lax.conv_general_dilated(
        h, p["line"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(h).mean(1) @ p["last"]


def case(apply_fn):
    """(parameters, inputs, those of another batch, how many parameters have factors)."""
    normal = lambda *shape: RNG.normal(size=shape)  # noqa: E731
    if apply_fn is convolutional:
        params = {"grouped": normal(2, 3, 2, 6), "line": normal(3, 6, 5), "last": normal(5, 2)}
        return params, normal(3, 5, 4, 4), normal(2, 5, 4, 4)
    params = {
        **{"scaled": normal(4, 6), "table": normal(5, 6), "called": normal(6, 6)},
        **{"left": normal(6, 6), "tied": normal(6, 5), "custom": normal(6, 6), "gain": normal()},
        **{"scan": normal(2, 6, 6), "groups": normal(2, 2, 3), "unused": normal(3)},
    }
    batch = lambda n: {"a": normal(n, 4), "n": RNG.integers(0, 5, n)}  # noqa: E731
    return params, batch(4), batch(3)


@pytest.mark.parametrize("apply_fn", [dense, convolutional])
def test_the_kernel_is_that_of_the_jacobian(apply_fn, x64):
    params, x1, x2 = case(apply_fn)
    expected = np.asarray(empirical_ntk_fn(apply_fn, method="jacrev")(params, x1, x2))
    found = empirical_ntk_fn(apply_fn)(params, x1, x2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_layers_have_factors_where_they_are_a_weights_only_use():
    params, x, _ = case(dense)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)

    def outputs_of(_, params, x):
        found = dense(params, jax.tree.map(lambda a: a[None], x))
        return jnp.concatenate([y.reshape(-1) for y in jax.tree.leaves(found)])

    found = structured.factors(outputs_of, None, params, one, (100, 100), "full")
    parts = jax.eval_shape(
        found.of, None, params, jax.tree.map(lambda a: np.ones((2, *a.shape), a.dtype), one)
    )
    assert (
        sum(isinstance(part, tuple) for part in parts) == 3
    )  # scaled, called, left; rows are less for groups
    assert len(parts) == len(found.products) == len(params) - 1  # without the unused one
    assert found.most_examples(1 << 20) < found.most_examples(1 << 24)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_every_order_of_products_gives_a_layers_term(outputs, x64):
    g, p, a, b, k = 2, 3, 4, 5, 2
    layer = structured._Layer((g, p, a, b), (), None, None, None)
    left, right = (
        (RNG.normal(size=(n, g, p, a)), RNG.normal(size=(n, k, g, p, b))) for n in (3, 2)
    )
    rows = [
        np.einsum("ngpa,nkgpb->nkgab", *side).reshape(-1, k, g * a * b) for side in (left, right)
    ]
    indices = {"full": "nkr,mlr->nmkl", "trace": "nkr,mkr->nm", "diagonal": "nkr,mkr->nmk"}
    expected = np.einsum(indices[outputs], *rows)
    orders = layer.orders(k, (3, 2), outputs)
    assert len(orders) == (3 if outputs == "full" else 2)
    for order in orders:
        found = order.product(*(rows if order.by_rows else (left, right)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_many_examples_are_multiplied_with_themselves_above_the_diagonal():
    w, x = RNG.normal(size=(3, 2)), RNG.normal(size=(45, 3))
    found = empirical_ntk_fn(lambda w, x: x @ w)(w, x)
    expected = np.einsum("nm,kl->nmkl", x @ x.T, np.eye(2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
