"""The NTK of whatever a user calls a network: modules of both kinds, trees of inputs, any dtype."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from networks import drawn

from dnntk import DeepNarrowMLP, InputError, empirical_ntk, empirical_ntk_fn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype(np.float32)
W = RNG.normal(size=(3, 2)).astype(np.float32)


def linear(w, x):
    return x @ w


def kernel_of_linear(x1, x2):
    """J J^T of x W: x . x' times the identity, in float64."""
    return np.einsum("ni,mi,kl->nmkl", np.float64(x1), np.float64(x2), np.eye(2))


def close(found, expected, rtol=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def refused(words, call, *arguments):
    with pytest.raises(InputError, match=words) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# ---- modules


class Encoder(nnx.Module):
    """Shares a layer, normalizes, drops, and holds a variable that is no parameter."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.first
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.shift = nnx.Variable(jnp.ones(3))

    def encode(self, x):
        return self.drop(self.again(jnp.tanh(self.norm(self.first(x))) + self.shift[None]))

    def __call__(self, x):
        return self.encode(x)


def encoder():
    module = Encoder(nnx.Rngs(0))
    module.norm.mean[...] = jnp.array([0.3, -0.2, 0.1])
    return module


def encoder_by_hand(params, x):
    """`Encoder` in evaluation mode, written out."""
    layer, norm = params["again"], params["norm"]
    once = lambda h: h @ layer["kernel"] + layer["bias"][None]  # noqa: E731
    h = (once(x) - jnp.array([[0.3, -0.2, 0.1]])) / jnp.sqrt(1 + 1e-5)
    return once(jnp.tanh(h * norm["scale"][None] + norm["bias"][None]) + 1)


def test_an_nnx_module_its_state_and_its_parameters_give_the_kernel_by_its_parameters():
    module = encoder()
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.Not(nnx.RngState)))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    expected = empirical_ntk_fn(encoder_by_hand)(params, X, X[:2])
    kernel = empirical_ntk_fn(module)
    for variables in (module, nnx.state(module), nnx.state(module, nnx.Param)):
        close(kernel(variables, X, X[:2]), expected)
    graph, state = nnx.split(module)

    def merged(state, x):
        module = nnx.merge(graph, state)
        module.eval()
        return module(x)

    close(empirical_ntk_fn(merged)(state, X, X[:2]), expected)
    encode = empirical_ntk_fn(lambda m, x: m.encode(x))
    close(encode(module, X, X[:2]), expected)
    assert module.drop.deterministic is False  # the caller's module stays in training mode
    after = jax.tree.map(np.asarray, nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    module.first.kernel[...] *= 2
    close(kernel(module, X, X[:2]), encode(module, X, X[:2]))
    assert np.abs(kernel(module, X, X[:2]) - expected).max() > 0.1
    refused("variables: expected an NNX module", kernel, params, X)
    refused("another state", kernel, nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), X)
    another = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    refused("like apply_fn, Encoder, got Linear", kernel, another, X)
    refused("got a method of Encoder", empirical_ntk_fn, module.encode)
    refused("class Encoder; give an instance", empirical_ntk_fn, Encoder)


class Two(nn.Module):
    """One argument of two inputs; reports beside its outputs what it is asked to."""

    @nn.compact
    def __call__(self, inputs):
        h = nn.Embed(5, 3)(inputs["token"]) * inputs["x"]
        self.sow("intermediates", "h", h)
        return nn.Dense(2)(h)


def test_linen_modules_take_collections_and_say_so():
    net = nn.Dense(2)
    variables = jax.jit(net.init)(jax.random.key(0), X)
    expected = kernel_of_linear(X, X) + np.eye(2)
    bound = net.bind(variables)
    for apply_fn in (net, bound, net.apply, jax.jit(net.apply)):
        close(empirical_ntk_fn(apply_fn)(variables, X), expected)
    state = TrainState.create(apply_fn=net.apply, params=variables["params"], tx=optax.sgd(1.0))
    words = r"got TrainState; give \{'params': state.params\}"
    refused(words, empirical_ntk_fn(state.apply_fn), state, X)
    refused(words, empirical_ntk, DeepNarrowMLP(3, 2, 1.0), state, X)
    refused("got a mapping of bias, kernel", empirical_ntk_fn(net), variables["params"], X)
    refused("apply_fn must be", empirical_ntk_fn, state)
    refused("class Dense; give an instance", empirical_ntk_fn, nn.Dense)
    refused("got a method of Dense", empirical_ntk_fn, bound.__call__)


# ---- inputs


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, y, train=False):
        return nn.Dense(2, use_bias=False)(x - y)


def test_several_arguments_are_taken_by_a_function():
    net = Pair()
    variables = jax.jit(net.init)(jax.random.key(0), X, X)
    found = empirical_ntk_fn(lambda v, x: net.apply(v, *x))(variables, (X, X[::-1]))
    close(found, kernel_of_linear(X - X[::-1], X - X[::-1]))
    refused(r"which needs x, y; give .* net.apply\(m, \*x\)", empirical_ntk_fn, net)


def test_several_inputs_are_a_tree_and_tokens_stay_integers():
    net = Two()
    inputs = {"x": X, "token": np.array([0, 3, 3, 1])}
    variables = jax.jit(net.init)(jax.random.key(0), inputs)
    kernel = empirical_ntk_fn(net)
    whole = kernel(variables, inputs)

    def rows(params, x, token):
        h = params["Embed_0"]["embedding"][token] * x
        return h @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    jacobian = jax.jit(jax.vmap(jax.jacrev(rows), (None, 0, 0)))
    jacobian = jacobian(variables["params"], X, inputs["token"])
    flat = np.concatenate([j.reshape(4, 2, -1) for j in jax.tree.leaves(jacobian)], 2)
    close(whole, np.einsum("nkp,mlp->nmkl", flat, flat))
    blocks = empirical_ntk_fn(net, block_size=3)
    close(blocks(variables, inputs), whole)
    tuples = empirical_ntk_fn(lambda v, x: net.apply(v, {"x": x[0], "token": x[1]}))
    first = jax.tree.map(lambda a: a[:1], inputs)
    close(tuples(variables, (X, inputs["token"]), (X[:1], first["token"])), whole[:, :1])
    assert kernel(variables, jax.tree.map(lambda a: a[:0], inputs), inputs).shape == (0, 4, 2, 2)

    refused("x1 must have the same number", kernel, variables, {**inputs, "x": X[:2]})
    refused(r"x1\['x'\] must be finite", kernel, variables, {**inputs, "x": X * np.nan})
    refused(r"x1\['x'\] must be a batch", kernel, variables, {**inputs, "x": 1.0})
    refused(r"x1\['token'\] must be integers within int32", kernel, variables,
            {**inputs, "token": np.array([0, 3, 3, 2**32 + 1])})  # fmt: skip
    refused("x2 must hold inputs of shape", kernel, variables, inputs, X)
    refused("x1 must be an array", kernel, variables, {})
    refused("x1 must be an array", kernel, variables, None)
    refused("x1 must have keys", kernel, variables, {**inputs, 1: X})
    reporting = empirical_ntk_fn(lambda v, x: net.apply(v, x, mutable="intermediates"))
    refused("updated collections intermediates; leave mutable", reporting, variables, inputs)


def test_lists_and_tuples_of_numbers_are_one_array():
    kernel = empirical_ntk_fn(linear)
    expected = kernel_of_linear(X, X)
    for x in (X.tolist(), list(X), list(jnp.asarray(X)), tuple(map(tuple, X.tolist()))):
        close(kernel(W, x), expected)


@pytest.mark.parametrize(
    ("method", "outputs", "rest"),
    [
        ("layerwise", "full", (2, 2)),
        ("layerwise", "diagonal", (2,)),
        ("jacrev", "trace", ()),
    ],
)
def test_no_examples_give_an_empty_kernel(method, outputs, rest):
    model = DeepNarrowMLP(3, 2, 1.0)
    variables = drawn(model, X)
    for x1, x2, size in ((X[:0], X, None), (X, X[:0], 2), (X[:0], None, None)):
        options = {"method": method, "outputs": outputs, "block_size": size}
        kernels = [empirical_ntk(model, variables, x1, x2, **options)]
        if method != "layerwise":
            kernels.append(empirical_ntk_fn(linear, **options)(W, x1, x2))
        for found in kernels:
            assert found.shape == (len(x1), len(x1 if x2 is None else x2), *rest)
            assert found.dtype == np.float32


def test_parameters_without_entries_have_a_zero_kernel():
    found = empirical_ntk_fn(lambda p, x: x @ (p @ p.T))(np.ones((3, 0), np.float32), X)
    np.testing.assert_array_equal(found, np.zeros((4, 4, 3, 3)))
    assert empirical_ntk_fn(lambda w, x: (x @ w)[:, :0])(W, X).shape == (4, 4, 0, 0)


# ---- numbers


def test_complex_parameters_count_by_both_parts():
    w = (W + 1j * RNG.normal(size=W.shape)).astype(np.complex64)
    both = {"w": w, "c": np.float32(0.5)}

    def network(p, x):
        return jnp.abs(jnp.sin(x @ p["w"])) ** 2 * p["c"]

    def rewritten(p, x):
        a, b = x @ p["re"], x @ p["im"]  # |sin(a + ib)|^2
        return (jnp.sin(a) ** 2 + jnp.sinh(b) ** 2) * p["c"]

    parts = {"re": w.real, "im": w.imag, "c": np.float32(0.5)}
    expected = empirical_ntk_fn(rewritten)(parts, X, X[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("jacrev", "jacfwd"):
            kernel = empirical_ntk_fn(network, method=method)
            for variables in (
                both,
                jax.tree.map(jnp.asarray, both),
                {**both, "w": w.astype(">c8")},
            ):
                found = kernel(variables, X, X[:2])
                assert found.dtype == np.float32
                close(found, expected)
    refused("expected real floating-point outputs, got complex64", empirical_ntk_fn(linear), w, X)
    refused("outputs, got int32", empirical_ntk_fn(lambda w, x: (x @ w).argmax(1)), W, X)
    model = DeepNarrowMLP(3, 2, 1.0)
    variables = jax.tree.map(lambda p: np.asarray(p) + 0j, drawn(model, X))
    refused(r"variables\['initial'\].* must be real", empirical_ntk, model, variables, X)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_accumulated_and_returned_in_float32(dtype):
    x = np.full((2, 1000), 16, np.float32)
    with jax.numpy_dtype_promotion("strict"):
        kernel = empirical_ntk_fn(linear)
        for inputs in (jnp.asarray(x, dtype), x.astype(dtype)):
            found = kernel(np.ones((1000, 1), dtype), inputs)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, np.full((2, 2, 1, 1), 256_000))
    model = DeepNarrowMLP(3, 1, 1.0)
    wide = drawn(model, x[:, :2])
    half = jax.tree.map(lambda p: np.asarray(p, dtype), wide)
    rounded = jax.tree.map(lambda p: np.asarray(p, np.float32), half)
    expected = empirical_ntk(model, rounded, 16 * x[:, :2])
    for method in ("layerwise", "jacrev"):
        found = empirical_ntk(model, half, jnp.asarray(16 * x[:, :2], dtype), method=method)
        assert found.dtype == np.float32
        close(found, expected)
    assert found.max() > 65504  # float16's largest number


def test_integers_are_their_values_or_refused():
    kernel = empirical_ntk_fn(linear)
    close(kernel(W, np.array([[3, 1, 2]])), kernel_of_linear([[3, 1, 2]], [[3, 1, 2]]))
    refused(
        "x1 must be integers within int32, got 4294967296", kernel, W, np.array([[2**32, 1, 1]])
    )
    refused("x1 must be integers within int32", kernel, W, [[2**32, 1, 1]])
    refused(r"variables\['n'\] must be integers", kernel, {"n": np.int64(2**40), "w": W}, X)
    model = DeepNarrowMLP(3, 2, 1.0)
    x = np.array([[2**32, 1, 1]])
    variables = drawn(model, X)
    np.testing.assert_array_equal(
        empirical_ntk(model, variables, x), empirical_ntk(model, variables, x.astype(np.float32))
    )


def test_dtypes_may_be_mixed_and_promotion_strict():
    model = DeepNarrowMLP(4, 2, 10.0)
    variables = jax.tree.map(np.asarray, drawn(model, X))
    expected = empirical_ntk(model, variables, X)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for x, dtype in ((X, np.float32), (X.astype(np.float64), np.float64)):
            method = "layerwise" if dtype == np.float32 else "jacrev"
            found = empirical_ntk(model, variables, x, method=method)
            assert found.dtype == dtype
            close(found, expected)
        parts = {"a": W, "b": W.astype(np.float64)}
        sum_of = lambda p, x: x @ p["a"] + (x.astype(p["b"].dtype) @ p["b"]).astype(x.dtype)  # noqa: E731
        for method in ("jacrev", "jacfwd"):
            found = empirical_ntk_fn(sum_of, method=method)(parts, X)
            assert found.dtype == np.float64
            close(found, 2 * kernel_of_linear(X, X))
