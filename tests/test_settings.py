"""JAX's settings, and arrays of any kind, at every public entry that takes arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dnntk
from dnntk import lyapunov, parallel, shares
from dnntk.errors import InputError
from dnntk.infinite_depth import spread
from dnntk.kernel import arccos1, gram, limit_ntk

X = np.random.default_rng(0).uniform(0.1, 1, (2, 2)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(0.1, 1, (2, 4, 4, 1)).astype(np.float32)
Y = X[:, :1] - 0.5
MODEL = dnntk.DeepNarrowMLP(3, 1, 100.0)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)

# What takes inputs [n, 2], and returns numbers of them.
ENTRIES = {
    "limit_ntk": lambda x: limit_ntk(x),
    "x2 of limit_ntk": lambda x: limit_ntk(X, x),
    "arccos1": lambda x: arccos1(x, x, 0.0),
    "gram": lambda x: gram.gram(limit_ntk, x, progress=False),
    "init": lambda x: MODEL.init(jax.random.key(0), x)["initial"],
    "apply": lambda x: MODEL.apply(VARIABLES, x),
    "parallel": lambda x: parallel.outputs(MODEL, VARIABLES, x)[0],
    "accumulated": lambda x: shares.accumulated(MODEL, VARIABLES, x),
    "lyapunov": lambda x: lyapunov.measure(MODEL, VARIABLES, VARIABLES, x),
    "KernelFlow": lambda x: dnntk.KernelFlow(limit_ntk, x, [0, 1]).predict(x, 1.0),
    "targets": lambda x: dnntk.KernelFlow(limit_ntk, X, x).predict(X, 1.0),
    "predict": lambda x: dnntk.KernelFlow(limit_ntk, X, Y).predict(x, 1.0),
    "regression": lambda x: dnntk.InfiniteDepthRegressor(time=1).fit(x, x).predict(x),
    "classification": lambda x: dnntk.InfiniteDepthClassifier(time=1).fit(x, [0, 1]).predict(x),
    "spread": lambda x: spread.initialization_spread(x, [0, 1], x, 1.0, samples=2).prediction,
    "draws": lambda x: spread.linear_predictions(x, [0, 1], x, 1.0, depth=2, draws=1),
}
FLOATS = np.array([[2.0**32, 1.0], [1.0, 2.0]], np.float32)
ALIKE = {
    "integers": FLOATS.astype(np.int64),
    "big-endian": FLOATS.astype(">f8"),
    "objects": FLOATS.astype(int).astype(object),
}


@pytest.mark.filterwarnings("ignore:not converged")
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_takes_any_numbers_for_what_they_are_and_no_masked_ones(entry):
    expected = ENTRIES[entry](FLOATS)
    for value in ALIKE.values():
        found = ENTRIES[entry](value)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    masked = np.ma.array(FLOATS, mask=[[0, 1], [0, 0]])
    for value, words in ((masked, "masked"), ([[1j, 0], [0, 1]], "complex|real")):
        with pytest.raises((InputError, TypeError), match=words) as caught:
            ENTRIES[entry](value)
        assert "\n" not in str(caught.value)


def _everything():
    """Results in float32 and in float64 of float32 inputs."""
    cnn = dnntk.DeepNarrowCNN(3, 1, 100.0, pool=2)
    # Compiled as a whole: one by one, their operations would take longer than all else.
    networks = jax.jit(
        lambda x, images: (
            arccos1(x[:, 0], x[:, 1], 0.0),
            cnn.init_with_output(jax.random.key(0), images),
            dnntk.to_standard(MODEL, VARIABLES)[1],
        )
    )
    single = (
        limit_ntk(X),
        limit_ntk(X, rho=np.float64(2), beta=jnp.float32(1), d_out=2**40),
        networks(X, IMAGES),
        lyapunov.measure(MODEL, VARIABLES, VARIABLES, X),
        parallel.outputs(MODEL, VARIABLES, X)[0],
        shares.accumulated(MODEL, VARIABLES, X),
        gram.gram(limit_ntk, X),
    )
    double = (
        dnntk.KernelFlow(limit_ntk, X, Y).predict(X, 1.0),
        dnntk.KernelFlow(limit_ntk, X, Y, solver="krylov").loss(1.0),
        dnntk.InfiniteDepthRegressor().fit(X, Y).predict(X),
        spread.initialization_spread(X, Y, X, 1.0, samples=2).layer_variance,
    )
    return single, double


def test_results_are_the_same_under_strict_promotion_with_x64_on_and_float32_data():
    plain, with_x64 = _everything(), None
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        with_x64 = _everything()
    for found, expected, dtype in zip(with_x64, plain, (np.float32, np.float64), strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_training_works_under_strict_promotion():
    data = dnntk.Dataset("own", "", IMAGES, Y, IMAGES, Y)
    config = dnntk.TrainConfig(depth=3, arch="cnn", steps=1)
    with jax.numpy_dtype_promotion("strict"):
        assert dnntk.train(config, dataset=data).summary["steps"] == 1
        config = dnntk.TrainConfig(
            depth=3, steps=1, optimizer="adam", lr=0.01, schedule="cosine", sam_radius=0.1
        )
        assert dnntk.train(config, dataset=data).summary["steps"] == 1


def test_no_examples_are_one_line_where_nothing_follows_from_them():
    for call in (
        lambda x: dnntk.parallel.outputs(MODEL, VARIABLES, x),
        lambda x: dnntk.shares.accumulated(MODEL, VARIABLES, x),
        lambda x: dnntk.lyapunov.measure(MODEL, VARIABLES, VARIABLES, x),
    ):
        with pytest.raises(dnntk.InputError, match="^x must have at least one row, got shape"):
            call(X[:0])


def test_kernels_and_networks_work_without_jit():
    expected = limit_ntk(X), MODEL.apply(VARIABLES, X)
    with jax.disable_jit():
        np.testing.assert_allclose(limit_ntk(X), expected[0], rtol=1e-6)
        np.testing.assert_array_equal(MODEL.apply(VARIABLES, X), expected[1])


# ---- what is kept, and numbers that are not Python's


@pytest.mark.parametrize("order", ["C", "F", "memory map"])
def test_what_was_fitted_owns_its_data(order, tmp_path):
    rng = np.random.default_rng(2)
    x = np.asarray(rng.uniform(0.1, 1, (8, 2)), order="C" if order == "memory map" else order)
    if order == "memory map":
        x.tofile(tmp_path / "x")
        x = np.memmap(tmp_path / "x", float, "r+", shape=(8, 2))
    y, new = rng.normal(size=(8, 1)), X.astype(float)
    flow = dnntk.KernelFlow(limit_ntk, x.copy(), y.copy())
    kept = dnntk.KernelFlow(limit_ntk, x, y)
    models = (
        dnntk.InfiniteDepthRegressor(time=3.0).fit(x, y),
        dnntk.InfiniteDepthClassifier(time=3.0).fit(x, y[:, 0] > 0),
    )
    before = [flow.predict(new, 3.0), models[0].predict(new), models[1].decision_function(new)]
    x *= 16
    y += 1
    after = [kept.predict(new, 3.0), models[0].predict(new), models[1].decision_function(new)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fields_and_parameters_hold_numbers_of_any_library(tmp_path):
    model = dnntk.DeepNarrowMLP(np.int64(3), jnp.int32(1), jnp.float32(100), rho=np.float32(1))
    assert model == MODEL and hash(model) == hash(MODEL) and type(model.scale) is float
    np.testing.assert_array_equal(
        dnntk.empirical_ntk(model, VARIABLES, X), dnntk.empirical_ntk(MODEL, VARIABLES, X)
    )
    for fields in ({"depth": 3.0}, {"depth": 2**40}, {"scale": "9"}, {"segment": np.ones((9, 9))}):
        with pytest.raises(InputError, match=next(iter(fields))) as caught:
            dnntk.DeepNarrowMLP(**{"depth": 3, "d_out": 1, "scale": 9.0} | fields)
        assert "\n" not in str(caught.value)
    image_shape = (np.int64(2), jnp.int32(1))
    options = {"rho": jnp.float32(0.5), "time": np.float32(2), "ridge": jnp.float32(0.1)}
    fitted = dnntk.InfiniteDepthRegressor(arch="cnn", image_shape=image_shape, **options).fit(X, Y)
    fitted.save(tmp_path / "fitted")
    loaded = dnntk.InfiniteDepthRegressor.load(tmp_path / "fitted")
    assert loaded.rho == 0.5 and loaded.image_shape == (2, 1)
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
