"""The empirical NTK: every method against the definition, on every network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn

from dnntk import (
    DeepNarrowCNN,
    DeepNarrowMLP,
    InputError,
    empirical_ntk,
    empirical_ntk_fn,
    to_standard,
)

MLP, WIDE, CNN = "mlp", "mlp of 24 inputs", "cnn 4 x 6, two channels, 5 x 5 filters"
CASES = {
    MLP: (DeepNarrowMLP, (4,), {"d_out": 3}),
    WIDE: (DeepNarrowMLP, (24,), {"d_out": 2}),
    CNN: (DeepNarrowCNN, (4, 6, 2), {"d_out": 2, "kernel_size": 5}),
}


def make(case, parametrization="ntk", trained=True, depth=6, scale=6.0, **fields):
    """A network, its variables (as training might leave them), two batches."""
    kind, shape, extra = CASES[case]
    rng = np.random.default_rng(0)
    x1, x2 = rng.uniform(0.1, 1, (5, *shape)), rng.uniform(0.1, 1, (3, *shape))
    model = kind(depth=depth, scale=scale, parametrization=parametrization, **extra, **fields)
    variables = drawn(model, x1, seed=1)
    if trained:
        size = 4.0 if parametrization == "ntk" else 0.2
        move = lambda p: np.asarray(p) + size * rng.standard_normal(p.shape)  # noqa: E731
        variables = {**variables, "params": jax.tree.map(move, variables["params"])}
    return model, variables, x1, x2


def close(found, expected, dtype=np.float64, layers=9):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=8 * layers * np.finfo(dtype).eps * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("case", "definition"), [(MLP, "jacfwd"), (WIDE, "jacrev"), (CNN, "jacrev")]
)
def test_all_methods_agree_with_the_definition(case, definition, x64):
    # Forward mode compiles for long; test_models.py has the CNN's beside its reverse mode.
    model, variables, x1, x2 = make(case)
    expected = empirical_ntk(model, variables, x1, x2, method=definition)
    assert expected.shape == (5, 3, model.d_out, model.d_out)
    for method in ("auto", "layerwise", "jacrev"):
        close(empirical_ntk(model, variables, x1, x2, method=method), expected)


@pytest.mark.parametrize("case", [MLP, CNN])
def test_both_parametrizations_have_the_same_kernel(case, x64):
    model, variables, x1, x2 = make(case)
    found = empirical_ntk(*to_standard(model, variables), x1, x2)
    close(found, empirical_ntk(model, variables, x1, x2))


@pytest.mark.parametrize(
    ("depth", "init", "parametrization"),
    [(2, "deep_narrow", "ntk"), (3, "torch_default", "standard"), (6, "he_uniform", "ntk")],
)
def test_shallow_networks_and_baselines_too(depth, init, parametrization, x64):
    model, variables, x1, _ = make(MLP, parametrization, depth=depth, initialization=init)
    expected = empirical_ntk(model, variables, x1, method="jacrev")
    close(empirical_ntk(model, variables, x1), expected)


def test_scaled_by_the_thesis(x64):
    model, variables, x1, x2 = make(MLP)
    standard, literal = to_standard(model, variables)
    unscaled = empirical_ntk_fn(standard.apply)(literal, x1, x2)
    close(
        unscaled / (model.depth * model.scale**2),
        empirical_ntk(model, variables, x1, x2),
    )


@pytest.mark.parametrize(
    ("case", "method"), [(MLP, "layerwise"), (MLP, "jacrev"), (WIDE, "layerwise")]
)
def test_trace_and_diagonal_are_parts_of_the_full_kernel(case, method, x64):
    model, variables, x1, x2 = make(case)
    full = np.asarray(empirical_ntk(model, variables, x1, x2))
    trace = empirical_ntk(model, variables, x1, x2, method=method, outputs="trace")
    diagonal = empirical_ntk(model, variables, x1, x2, method=method, outputs="diagonal")
    close(trace, np.trace(full, axis1=2, axis2=3))
    close(diagonal, np.diagonal(full, axis1=2, axis2=3))


@pytest.mark.parametrize(("method", "outputs"), [("layerwise", "full"), ("jacrev", "diagonal")])
def test_blocks_do_not_change_the_kernel_and_x2_none_is_symmetric(method, outputs, x64):
    model, variables, x1, _ = make(MLP)
    options = {"method": method, "outputs": outputs}
    some = x1[:3].copy()
    expected = empirical_ntk(model, variables, x1, some, **options)
    found = np.asarray(empirical_ntk(model, variables, x1, block_size=2, **options))
    close(found[:, :3], expected)
    swapped = found.transpose(1, 0, *range(found.ndim - 1, 1, -1))
    np.testing.assert_array_equal(found, swapped)
    if method == "layerwise":
        close(empirical_ntk(model, variables, x1, some, block_size=2, **options), expected)
        close(empirical_ntk(model, variables, x1, **options), found)


def test_zero_and_negative_inputs_and_infinite_scale(x64):
    model, variables, x1, _ = make(MLP, scale=np.inf)
    x1[0], x1[1] = 0, -x1[1]
    expected = empirical_ntk(model, variables, x1, method="jacrev")
    close(empirical_ntk(model, variables, x1), expected)


def test_float32_in_the_theorems_regime():
    with jax.enable_x64(True):
        model, variables, x1, x2 = make(CNN, depth=200, scale=200**2.2)
        variables = jax.tree.map(lambda p: np.asarray(p, np.float32), variables)
        exact = jax.tree.map(lambda p: np.asarray(p, np.float64), variables)
        x1, x2 = x1.astype(np.float32), x2.astype(np.float32)
        expected = empirical_ntk(model, exact, x1.astype(np.float64), x2.astype(np.float64))
    found = empirical_ntk(model, variables, x1, x2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_under_jit_vmap_and_grad(x64):
    model, variables, x1, x2 = make(MLP, depth=3)
    both = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), variables)
    kernel = lambda v: empirical_ntk(model, v, x1, x2)  # noqa: E731
    found = jax.jit(jax.vmap(kernel))(both)
    close(found[0], kernel(variables))
    close(found[1], kernel(jax.tree.map(lambda p: 0.5 * p, variables)))
    total = lambda method: jax.jit(  # noqa: E731
        jax.grad(lambda x: jnp.sum(empirical_ntk(model, variables, x, x2, method=method)))
    )(jnp.asarray(x1))
    close(total("layerwise"), total("jacrev"))


# ---- any network


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(self.features, (3, 3))(nn.GroupNorm(2)(x)))
        return x + nn.Conv(self.features, (3, 3))(h)


class ResNet(nn.Module):
    """A small residual network with running averages and several outputs."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (3, 3))(x)
        h = nn.BatchNorm(use_running_average=True)(h)
        return nn.Dense(3)(Block(4)(h).mean((1, 2)))


def resnet():
    x = np.random.default_rng(0).uniform(size=(5, 6, 6, 2))
    model = ResNet()
    return model, jax.jit(model.init)(jax.random.key(0), x), x


def by_the_definition(outputs_of, params, x1, x2):
    """One pair and one parameter array at a time."""
    jacobian = jax.jit(jax.jacrev(outputs_of))
    rows = [jax.tree.leaves(jacobian(params, x)) for x in x1]
    columns = [jax.tree.leaves(jacobian(params, x)) for x in x2]
    k = len(rows[0][0])
    flat = lambda js: np.concatenate([np.reshape(j, (k, -1)) for j in js], 1)  # noqa: E731
    return np.array([[flat(a) @ flat(b).T for b in columns] for a in rows])


@jax.numpy_rank_promotion("allow")  # flax itself promotes ranks
def test_a_residual_network_by_module_apply_and_function():
    with jax.enable_x64(True):
        check_the_residual_network()


def check_the_residual_network():
    model, variables, x = resnet()
    variables = jax.tree.map(lambda p: np.asarray(p, np.float64), variables)
    assert "batch_stats" in variables
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def outputs_of(params, x):
        return model.apply({"params": params, **rest}, x[None])[0]

    expected = by_the_definition(outputs_of, variables["params"], x, x[:2])
    close(empirical_ntk_fn(model)(variables, x, x[:2]), expected, layers=50)
    for apply_fn, block_size in ((model.apply, 2), (lambda v, x: model.apply(v, x), None)):
        kernel = empirical_ntk_fn(apply_fn, outputs="trace", block_size=block_size)
        close(kernel(variables, x, x[:2]), np.trace(expected, axis1=2, axis2=3), layers=50)


def test_any_function_any_tree_of_parameters_any_outputs(x64):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "steps": 7, "list": [rng.normal(size=4)]}
    x1, x2 = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"]) * p["list"][0][None]
        return {"a": h.reshape(len(x), 2, 2), "b": h.sum(1)}

    def outputs_of(moving, x):
        tree = apply_fn({**moving, "steps": 7}, x[None])
        return jnp.concatenate([tree["a"].reshape(-1), tree["b"]])

    expected = by_the_definition(outputs_of, {k: params[k] for k in ("w", "list")}, x1, x2)
    found = empirical_ntk_fn(apply_fn)(params, x1, x2)
    assert found.shape == (4, 2, 5, 5)
    close(found, expected)
    for options in ({"method": "jacfwd"}, {"block_size": 3}):
        close(empirical_ntk_fn(apply_fn, **options)(params, x1, x2), expected)


def test_the_function_is_compiled_once_a_shape_and_works_under_vmap(x64):
    traces = []

    def apply_fn(p, x):
        traces.append(1)
        return jnp.sin(x @ p)

    kernel = empirical_ntk_fn(apply_fn, block_size=2)
    w = np.random.default_rng(0).normal(size=(2, 3, 1))
    x = np.random.default_rng(1).normal(size=(5, 3))
    one = kernel(w[0], x)
    count = len(traces)
    kernel(w[1], x)
    assert len(traces) == count
    close(jax.vmap(lambda w: kernel(w, x))(w)[0], one)


# ---- bad input


BAD = {
    "nan": ({"x1": np.full((2, 4), np.nan)}, "x1 must be finite"),
    "infinite": ({"x2": np.full((2, 4), np.inf)}, "x2 must be finite"),
    "rank": ({"x1": np.ones(4)}, "x1 must be"),
    "mismatch": ({"x2": np.ones((2, 5))}, "x2 must hold inputs of shape"),
    "other d_in": ({"x1": np.ones((2, 5)), "x2": None}, "variables: "),
    "images": ({"x1": np.ones((2, 4, 4, 1)), "x2": None}, "x: an MLP expects"),
    "method": ({"method": "fast"}, "method: expected one of"),
    "outputs": ({"outputs": "all"}, "outputs: expected one of"),
    "block": ({"block_size": 0}, "block_size must be a positive"),
    "model": ({"model": nn.Dense(3)}, "empirical_ntk_fn"),
    "complex": ({"x1": np.ones((2, 4)) * 1j}, "x1 must be real"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    model, variables, x1, x2 = make(MLP, trained=False)
    changes, words = BAD[name]
    arguments = {"model": model, "variables": variables, "x1": x1, "x2": x2} | changes
    with pytest.raises(InputError, match=words) as caught:
        empirical_ntk(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_any_network():
    x = np.ones((2, 3))
    with pytest.raises(InputError, match="apply_fn must be"):
        empirical_ntk_fn(3)
    with pytest.raises(InputError, match="method: expected one of"):
        empirical_ntk_fn(jnp.sin, method="layerwise")
    with pytest.raises(InputError, match="block_size"):
        empirical_ntk_fn(jnp.sin, block_size=1.5)
    with pytest.raises(InputError, match="return an entry an example"):
        empirical_ntk_fn(lambda p, x: jnp.sum(x @ p))(np.ones((3, 1)), x)
    with pytest.raises(InputError, match="floating-point"):
        empirical_ntk_fn(lambda p, x: x)({"n": 3}, x)
    kernel = empirical_ntk_fn(lambda p, x: x @ p)
    with pytest.raises(InputError, match="x1 must be finite"):
        kernel(np.ones((3, 1)), x * np.nan)
    with pytest.raises(InputError, match="x2 must hold"):
        kernel(np.ones((3, 1)), x, np.ones((2, 4)))
    with pytest.raises(InputError, match="x1 must be a batch"):
        kernel(np.ones((3, 1)), 1.0)
