"""Taylor polynomials of networks, against `jax.jvp`, finite differences and the networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from dnntk import InputError
from dnntk.ntk import linearize, taylor_expand

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 4, 3, 2))


class Layers(nn.Module):
    """A layer of each kind that users ask about; its outputs are a tree, one of them integers."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, dtype=x.dtype)
        h = nn.LayerNorm(dtype=x.dtype)(nn.relu(norm(nn.Conv(3, (3, 3), dtype=x.dtype)(x))))
        h = nn.gelu(nn.Dense(3, dtype=x.dtype)(nn.max_pool(h, (2, 2)).reshape(len(x), -1)))
        return {"softmax": nn.softmax(h), "class": jnp.argmax(h, -1)}


@pytest.fixture(scope="module")
def layers():
    """A network in float64: (variables, parameters a step away, derivatives along the step)."""
    with jax.enable_x64(True):
        shapes = jax.eval_shape(Layers().init, jax.random.key(0), IMAGES)
        draw = lambda a: jnp.asarray(RNG.uniform(0.2, 0.6, a.shape))  # noqa: E731
        variables = jax.tree.map(draw, shapes)
        step = jax.tree.map(draw, shapes["params"])

        @jax.jit
        def along(s):
            params = jax.tree.map(lambda a, b: a + s * b, variables["params"], step)
            return Layers().apply({**variables, "params": params}, IMAGES)["softmax"]

        h = 1e-3  # the differences' errors: h^4, and rounding over h^2
        five = [np.asarray(along(s * h)) for s in (-2, -1, 0, 1, 2)]
        first = np.tensordot([1, -8, 0, 8, -1], five, 1) / (12 * h)
        second = np.tensordot([-1, 16, -30, 16, -1], five, 1) / (12 * h**2)
        slope = jax.jvp(along, (0.0,), (1.0,))[1]
        moved = jax.tree.map(lambda a, b: a + b, variables["params"], step)
        yield variables, moved, (five[2], first, second), slope


def test_expansions_of_usual_layers_have_the_derivatives_of_the_network(layers, x64):
    variables, moved, (value, first, second), slope = layers
    found = linearize(Layers(), variables)({**variables, "params": moved}, IMAGES)
    np.testing.assert_allclose(found["softmax"], value + slope, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["softmax"], value + first, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(found["class"], value.argmax(-1))
    # Collections that f does not get are those of the centre.
    quadratic = taylor_expand(Layers().apply, freeze(variables), 2)({"params": moved}, IMAGES)
    assert np.abs(second).max() > 1e-2
    np.testing.assert_allclose(quadratic["softmax"], value + first + second / 2, atol=2e-8)


def polynomial(params, x):
    """Of degree 3 in its parameters, at any x."""
    hidden = (x @ params["a"] + params["b"][None]) ** 2
    return {"out": hidden @ params["c"], "none": x}


def polynomial_at(dtype):
    rng = np.random.default_rng(1)
    draw = lambda: {  # noqa: E731
        name: rng.normal(size=shape).astype(dtype)
        for name, shape in (("a", (3, 4)), ("b", (4,)), ("c", (4, 2)))
    }
    return draw(), draw(), rng.normal(size=(5, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_expansion_of_a_polynomial_is_exact_from_its_degree_on(dtype, x64):
    centre, params, x = polynomial_at(dtype)
    expected = polynomial(params, x)["out"]
    size = np.abs(expected).max()
    for degree, exact in ((2, False), (4, True), (3, True)):
        found = taylor_expand(polynomial, centre, degree)(params, x)
        assert found["out"].dtype == dtype and found["none"].dtype == dtype
        error = np.abs(found["out"] - expected).max() / size
        assert error < 20 * np.finfo(dtype).eps if exact else error > 0.1
    np.testing.assert_array_equal(found["none"], x)


def test_expansions_work_under_jit_vmap_and_grad(x64):
    centre, params, x = polynomial_at(np.float64)
    f = linearize(polynomial, centre)
    half = jax.tree.map(lambda a, b: (a + b) / 2, centre, params)
    stacked = jax.tree.map(lambda *a: np.stack(a), centre, half, params)
    found = jax.jit(jax.vmap(f, (0, None)))(stacked, x)["out"]
    np.testing.assert_allclose(found[0], polynomial(centre, x)["out"], rtol=1e-13)
    np.testing.assert_allclose(found[1], (found[0] + found[2]) / 2, rtol=1e-12)
    # A linear function has one gradient: the network's at the centre.
    loss = lambda fn, p: jnp.sum(fn(p, x)["out"])  # noqa: E731
    gradients = [jax.grad(loss, 1)(fn, p) for fn, p in ((f, params), (polynomial, centre))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *gradients)
    # The centre may be traced, too.
    by_centre = jax.jit(lambda centre: linearize(polynomial, centre)(params, x)["out"])(centre)
    np.testing.assert_allclose(by_centre, found[2], rtol=1e-12)


class Shifted(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.shift = nnx.Variable(jnp.ones(2))

    def __call__(self, x):
        return self.drop(self.layer(x) ** 2 + self.shift[None])


def test_nnx_modules_move_by_their_parameters_alone():
    module, x = Shifted(), RNG.normal(size=(4, 3)).astype(np.float32)
    f = taylor_expand(module, module, 2)
    state = nnx.state(module, nnx.Param)
    larger = jax.tree.map(lambda a: 2 * a, state)
    expected = (2 * module.layer(x)) ** 2 + 1  # a quadratic polynomial of its parameters
    np.testing.assert_allclose(f(larger, x), expected, rtol=1e-5, atol=1e-5)
    whole = nnx.merge_state(nnx.state(module), larger)
    np.testing.assert_allclose(f(whole, x), expected, rtol=1e-5, atol=1e-5)
    assert module.drop.deterministic is False


def test_what_is_no_expansion_is_refused_in_a_line():
    centre, params, x = polynomial_at(np.float32)
    f = taylor_expand(polynomial, centre, 1)
    whole = jax.tree.map(lambda a: a.astype(int), params)
    for words, call in (
        ("degree must be an integer >= 0, got -1", lambda: taylor_expand(polynomial, centre, -1)),
        ("degree must be an integer >= 0, got 1.5", lambda: taylor_expand(polynomial, centre, 1.5)),
        (r"\['b'\]: expected floats \[4\].* got none", lambda: f({"a": params["a"]}, x)),
        (r"\['d'\]: expected no entry", lambda: f({**params, "d": x}, x)),
        (r"got floats \[1\]", lambda: f({**params, "b": params["b"][:1]}, x)),
        (r"expected floats \[3, 4\].*got integers", lambda: f(whole, x)),
        ("x must be finite", lambda: f(params, x * np.nan)),
        ("apply_fn must be", lambda: linearize(centre, centre)),
        ("expected the collections", lambda: linearize(nn.Dense(2), centre)),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
