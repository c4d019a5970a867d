import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn, initialized, moved
from networks import outputs as apply

import dnntk
from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, to_standard

INITS = ("deep_narrow", "he_uniform", "torch_default")
CASES = {
    "mlp": (DeepNarrowMLP, (7, 5), {}),
    "mlp of one input": (DeepNarrowMLP, (3, 1), {}),
    "cnn": (DeepNarrowCNN, (3, 5, 5, 1), {}),
    "cnn 4 x 6, two channels, 5 x 5 filters": (DeepNarrowCNN, (3, 4, 6, 2), {"kernel_size": 5}),
    "cnn of one pixel": (DeepNarrowCNN, (2, 1, 1, 1), {"kernel_size": 3}),
    "mlp, three random units": (DeepNarrowMLP, (3, 2), {"random_units": 3}),
    "cnn, two random units": (DeepNarrowCNN, (2, 3, 3, 2), {"random_units": 2}),
    "cnn with 1 x 1 filters": (DeepNarrowCNN, (2, 3, 2, 2), {"kernel_size": 1}),
}


def plain_forward(params, x):
    """The thesis's definition, layer after layer, by JAX's own products and convolutions."""

    def layer(h, kernel, bias):
        if h.ndim == 2:
            return h @ kernel + bias[None]
        out = jax.lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out + bias[None, None, None]

    h = jax.nn.relu(layer(x, **params["first"]))
    h, _ = jax.lax.scan(lambda h, p: (jax.nn.relu(layer(h, **p)), None), h, params["middle"])
    out = layer(h, **params["last"])
    return out if out.ndim == 2 else out.mean((1, 2))


def make(case, dtype=np.float64, depth=8, d_out=3, scale=7.0, **fields):
    kind, shape, extra = CASES[case]
    x = np.random.default_rng(1).uniform(0.1, 1.0, shape).astype(dtype)
    model = kind(depth=depth, d_out=d_out, scale=scale, **extra, **fields)
    return model, drawn(model, x), x


def _grad(loss):
    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    ("case", "init"),
    [*((case, "deep_narrow") for case in CASES), ("mlp", "he_uniform"), ("cnn", "torch_default")],
)
def test_both_forms_equal_the_plain_network(case, init, x64):
    model, variables, x = make(case, init=init)
    variables = moved(variables)
    standard, literal = to_standard(model, variables)
    expected = jax.jit(plain_forward)(literal["params"], x)
    tolerance = 1e-12 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(apply(model, variables, x), expected, atol=tolerance)
    np.testing.assert_allclose(apply(standard, literal, x), expected, atol=tolerance)


@pytest.mark.parametrize("case", ["mlp", "cnn 4 x 6, two channels, 5 x 5 filters"])
def test_zero_and_negative_inputs_are_taken_as_the_plain_network_takes_them(case, x64):
    model, variables, x = make(case)
    x = np.sign(np.sin(7 * np.arange(x.size))).reshape(x.shape) * x
    x.ravel()[::5] = 0
    variables = moved(variables)
    standard, literal = to_standard(model, variables)
    expected = jax.jit(plain_forward)(literal["params"], x)
    assert (x < 0).any() and np.abs(expected).max() > 0.01
    np.testing.assert_allclose(apply(model, variables, x), expected, atol=1e-11)
    by_d = _grad(lambda p: jnp.sum(model.apply({**variables, "params": p}, x)))(variables["params"])
    by_w = _grad(lambda p: jnp.sum(standard.apply({"params": p}, x)))(literal["params"])
    for a, b in zip(jax.tree.leaves(by_d), jax.tree.leaves(by_w), strict=True):
        atol = 1e-11 * max(1.0, np.abs(a).max())
        np.testing.assert_allclose(a, b * model.parameter_scale, atol=atol)


@pytest.mark.parametrize(
    "case", ["mlp", "cnn 4 x 6, two channels, 5 x 5 filters", "cnn of one pixel"]
)
def test_gradients_equal_the_plain_networks_and_by_d_they_are_scaled(case, x64):
    model, variables, x = make(case)
    variables = moved(variables)
    standard, literal = to_standard(model, variables)
    expected = _grad(lambda p: jnp.sum(plain_forward(p, x) ** 2))(literal["params"])
    by_matrices = _grad(lambda p: jnp.sum(standard.apply({"params": p}, x) ** 2))
    by_d = _grad(lambda p: jnp.sum(model.apply({**variables, "params": p}, x) ** 2))
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    for found, factor in (
        (by_matrices(literal["params"]), 1),
        (by_d(variables["params"]), model.parameter_scale),
    ):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a / factor, b, atol=1e-11 * scale)


@pytest.mark.parametrize(
    ("case", "init"),
    [*(("mlp", init) for init in INITS), ("cnn 4 x 6, two channels, 5 x 5 filters", INITS[0])],
)
def test_one_key_gives_one_network_in_either_form(case, init, x64):
    model, _, x = make(case, init=init)
    standard, converted = to_standard(model, initialized(model, x))
    direct = initialized(standard, x)
    for a, b in zip(jax.tree.leaves(converted), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=4 * np.finfo(np.float64).eps)


@pytest.mark.parametrize(
    ("case", "dtype", "form"),
    [
        ("mlp", "float16", "ntk"),
        ("mlp", "float64", "ntk"),
        ("mlp", "float32", "standard"),
        ("cnn 4 x 6, two channels, 5 x 5 filters", "float32", "ntk"),
        ("cnn 4 x 6, two channels, 5 x 5 filters", "float64", "standard"),
    ],
)
def test_output_is_exactly_zero_at_initialization(case, dtype, form, x64):
    model, _, x = make(case, jnp.dtype(dtype), parametrization=form, scale=300.0)
    out = apply(model, initialized(model, x), x)
    assert out.dtype == jnp.promote_types(x.dtype, np.float32) and out.shape == (len(x), 3)
    np.testing.assert_array_equal(np.asarray(out, np.float64), 0)


@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_infinite_scale_is_linear_in_the_parameters_and_the_limit_of_large_ones(case, x64):
    model, variables, x = make(case, scale=float("inf"))
    once, thrice = moved(variables, 1.0), moved(variables, 3.0)
    outputs = apply(model, thrice, x)
    assert np.abs(outputs).max() > 0.03
    np.testing.assert_allclose(3 * apply(model, once, x), outputs, rtol=1e-10)
    np.testing.assert_allclose(apply(model.clone(scale=1e9), thrice, x), outputs, rtol=1e-6)


def test_forward_mode_agrees_with_reverse_mode_under_vmap(x64):
    """Of a CNN; test_empirical.py holds the same of an MLP."""
    model, variables, x = make("cnn 4 x 6, two channels, 5 x 5 filters", depth=4)
    variables = moved(variables)
    rng = np.random.default_rng(0)
    tangents = jax.tree.map(lambda p: rng.standard_normal((2, *p.shape)), variables["params"])
    cotangents = rng.standard_normal((2, model.d_out))
    one = lambda p, x: model.apply({**variables, "params": p}, x[None])[0]  # noqa: E731

    @jax.jit
    def products(x, tangents, cotangents):
        def of_example(x):
            outputs = lambda p: one(p, x)  # noqa: E731
            forward = lambda v: jax.jvp(outputs, (variables["params"],), (v,))[1]  # noqa: E731
            reverse = jax.vjp(outputs, variables["params"])[1]
            return jax.vmap(forward)(tangents), jax.vmap(reverse)(cotangents)[0]

        return jax.vmap(of_example)(x)

    forward, reverse = products(x, tangents, cotangents)
    left = np.einsum("nik,jk->nij", forward, cotangents)
    pairs = zip(jax.tree.leaves(tangents), jax.tree.leaves(reverse), strict=True)
    right = sum(
        np.einsum("ip,njp->nij", v.reshape(2, -1), g.reshape(len(x), 2, -1)) for v, g in pairs
    )
    np.testing.assert_allclose(left, right, atol=1e-11 * np.abs(right).max())


@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_an_example_does_not_see_its_batch(case, x64):
    model, variables, x = make(case)
    variables = moved(variables)
    whole = apply(model, variables, x)
    alone = jnp.concatenate([apply(model, variables, x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(whole, alone, rtol=1e-11)


def test_float32_ntk_form_follows_float64_standard_form_in_the_theorems_regime():
    """At a size for every day; scripts/acceptance.py has depth 10,000."""
    depth, scale, steps, time_step = 300, 300.0**2.2, 20, 0.2
    angle = np.linspace(0, np.pi / 2, 22)[1:-1]
    x, y = (
        np.stack([np.cos(angle), np.sin(angle)], 1),
        np.prod([np.cos(angle), np.sin(angle)], 0)[:, None],
    )

    def outputs(form, dtype):
        model = DeepNarrowMLP(depth, 1, scale, parametrization=form)
        ntk, start = DeepNarrowMLP(depth, 1, scale), None
        start = jax.jit(ntk.init)(jax.random.key(0), jnp.asarray(x, "float32"))
        start = jax.tree.map(lambda p: p.astype(dtype), start)
        variables = start if form == "ntk" else to_standard(ntk, start)[1]
        rate = time_step * (1 if form == "ntk" else model.parameter_scale**2)

        def loss(p, v):
            out = model.apply({**v, "params": p}, x.astype(dtype))
            return 0.5 * jnp.mean(jnp.sum((out - y) ** 2, 1)), out

        @jax.jit
        def update(p, v):
            gradient, out = jax.grad(loss, has_aux=True)(p, v)
            return jax.tree.map(lambda w, g: w - rate * g, p, gradient), out

        params = variables["params"]
        for _ in range(steps + 1):
            params, out = update(params, variables)
        return out

    with jax.enable_x64(True):
        found, expected = outputs("ntk", "float32"), outputs("standard", "float64")
        assert found.dtype == jnp.float32 and np.abs(expected).max() > 0.2
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pooling_is_the_mean_of_blocks(x64):
    x = jax.random.uniform(jax.random.key(0), (2, 8, 4, 1), jnp.float64)
    pooled = x.reshape(2, 4, 2, 2, 2, 1).mean((2, 4))
    model = DeepNarrowCNN(5, 2, 10.0, pool=2)
    variables = moved(initialized(model, x))
    without = apply(model.clone(pool=1), variables, pooled)
    np.testing.assert_allclose(apply(model, variables, x), without, rtol=1e-12)


def test_numpy_integers_and_jit_are_accepted():
    model = DeepNarrowMLP(4, 1, 5.0)
    x = np.arange(6).reshape(3, 2)
    variables = moved(initialized(model, x))
    assert apply(model, variables, x).dtype == jnp.float32
    np.testing.assert_allclose(apply(model, variables, x), model.apply(variables, x), rtol=1e-5)


BAD = [
    (functools.partial(DeepNarrowMLP, 1, 1, 1.0), "depth"),
    (functools.partial(DeepNarrowMLP, 5, 0, 1.0), "d_out"),
    (functools.partial(DeepNarrowMLP, 5, 1, 0.0), "scale"),
    (functools.partial(DeepNarrowMLP, 5, 1, float("nan")), "scale"),
    (functools.partial(DeepNarrowMLP, 5, 1, 1.0, rho=-1.0), "rho"),
    (functools.partial(DeepNarrowMLP, 5, 1, 1.0, beta=float("inf")), "beta"),
    (functools.partial(DeepNarrowMLP, 5, 1, 1.0, init="xavier"), "init"),
    (functools.partial(DeepNarrowMLP, 5, 1, 1.0, parametrization="mup"), "parametrization"),
    (functools.partial(DeepNarrowMLP, 5, 1, float("inf"), parametrization="standard"), "scale"),
    (functools.partial(DeepNarrowMLP, 5, 1, float("inf"), init="he_uniform"), "scale"),
    (functools.partial(DeepNarrowMLP, 5, 1, 1.0, segment=0), "segment"),
    (functools.partial(DeepNarrowCNN, 5, 1, 1.0, kernel_size=4), "kernel_size"),
    (functools.partial(DeepNarrowCNN, 5, 1, 1.0, pool=0), "pool"),
]


@pytest.mark.parametrize(("build", "name"), BAD)
def test_bad_fields_are_named_in_one_line(build, name):
    with pytest.raises(InputError, match=f"^{name}: expected|^{name}: .* needs") as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (DeepNarrowMLP(4, 1, 1.0), (2, 3, 3, 1)),
        (DeepNarrowCNN(4, 1, 1.0), (2, 3)),
        (DeepNarrowCNN(4, 1, 1.0, pool=2), (2, 3, 3, 1)),
    ],
)
def test_bad_inputs_are_named_in_one_line(model, shape):
    with pytest.raises(InputError, match="^(x|pool): "):
        model.init(jax.random.key(0), np.ones(shape, np.float32))


def test_variables_of_another_network_are_refused():
    x = np.ones((2, 3), np.float32)
    model = DeepNarrowMLP(5, 1, 2.0)
    variables = initialized(model, x)
    for other in (model.clone(depth=6), model.clone(d_out=2)):
        with pytest.raises(InputError, match="^variables: "):
            other.apply(variables, x)
    with pytest.raises(InputError, match="initial"):
        model.apply({"params": variables["params"]}, x)


def test_the_public_surface_is_the_contract():
    model = dnntk.DeepNarrowMLP(4, 2, 3.0, 1.0, 1.0, "he_uniform", "standard")
    assert (model.rho, model.beta, model.initialization) == (1.0, 1.0, "he_uniform")
    assert model.clone(depth=9).initialization == "he_uniform"
    params = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 3), np.float32))["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "first": {"kernel": (3, 6), "bias": (6,)},
        "middle": {"kernel": (2, 6, 6), "bias": (2, 6)},
        "last": {"kernel": (6, 2), "bias": (2,)},
    }


def test_literal_matrices_of_a_scale_beyond_the_dtype_are_refused():
    x = np.ones((1, 3), np.float32)
    with pytest.raises(InputError, match="^scale: .*float32"):
        DeepNarrowMLP(5, 1, 1e39, parametrization="standard").init(jax.random.key(0), x)
    model = DeepNarrowMLP(5, 1, 1e30)
    assert not apply(model, initialized(model, x), x).any()
