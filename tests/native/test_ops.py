"""The CPU library against the plain code: values, gradients, tangents, over shapes and forms."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import initialized

from dnntk import DeepNarrowCNN, DeepNarrowMLP
from dnntk.native import build, ops
from dnntk.training import gradient_flow
from dnntk.training.ensemble import Ensemble

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not build.available(), reason="needs a C++ compiler"
)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}

# Shape with the batch first, outputs, depth, dtype, fields of the model.
CASES = {
    "rectangle, odd batch": ((33, 5, 8, 2), 3, 20, "float64", {}),
    "one image, 5 x 5": ((1, 7, 7, 1), 1, 9, "float32", {"kernel_size": 5}),
    "5 x 5 on 2 x 3": ((18, 2, 3, 1), 2, 9, "float64", {"kernel_size": 5, "scale": math.inf}),
    "1 x 1, literal": ((20, 4, 3, 1), 1, 12, "float64", {"kernel_size": 1, "literal": True}),
    "12 channels": ((70, 7, 7, 1), 10, 6, "float32", {}),
    "baseline CNN": ((40, 9, 2, 1), 2, 8, "float64", {"init": "he_uniform"}),
    "toy": ((200, 2), 1, 40, "float32", {"negative": True}),
    "digits, baseline": ((47, 64), 1, 7, "float64", {"init": "torch_default", "literal": True}),
    "wide, odd batch": ((37, 130), 3, 9, "float64", {}),
    "wide, few digits matter": ((37, 130), 3, 9, "float64", {"scale": 1e9}),
    "wide, dark pixels": ((37, 130), 3, 9, "float64", {"dark": True}),
    "wide, dark pixels, many examples": ((290, 640), 2, 4, "float32", {"dark": True}),
    "wide, dark pixels in the regime": ((37, 130), 1, 9, "float32", {"dark": True, "scale": 1e5}),
    "wide, dark pixels, C infinite": (
        (130, 255),
        2,
        9,
        "float64",
        {"dark": True, "scale": math.inf},
    ),
    "wide, matrices": ((70, 200), 1, 8, "float64", {"init": "he_uniform", "negative": True}),
    "wide, one example": ((1, 201), 2, 9, "float64", {"init": "he_uniform", "negative": True}),
    "wide, literal": ((5, 301), 10, 7, "float64", {"literal": True, "scale": 30.0}),
    "wide": ((130, 255), 10, 12, "float32", {"scale": math.inf}),
    "wide, many examples, literal": ((300, 131), 5, 7, "float32", {"literal": True}),
    "3 units": ((20, 1), 1, 12, "float64", {}),
    "6 units": ((130, 3), 2, 40, "float64", {"init": "he_uniform", "negative": True}),
    "8 units, many examples": ((70, 5), 2, 40, "float64", {}),
    "66 units, many examples": ((323, 64), 1, 4, "float32", {"init": "he_uniform"}),
    "shallowest": ((3, 5), 2, 3, "float64", {}),
}


def network(shape, d_out, depth, dtype, options):
    options = dict(options)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1 if options.pop("negative", False) else 0, 1, shape).astype(dtype)
    dark = options.pop("dark", False)
    if dark:
        x[:, ::3] = 0
    y = rng.standard_normal((len(x), d_out)).astype(dtype)
    literal = options.pop("literal", False)
    fields = {"scale": 20.0, "parametrization": "standard" if literal else "ntk"} | options
    kind = DeepNarrowMLP if len(shape) == 2 else DeepNarrowCNN
    model = kind(depth=depth, d_out=d_out, **fields)
    variables = jax.device_get(initialized(model, x[:1]))
    # Away from the initialization, where signs change and every weight matters.
    size = 0.02 if literal else 1.0
    params = jax.tree.map(
        lambda p: (p + size * rng.standard_normal(p.shape)).astype(dtype), variables.pop("params")
    )
    if dark:
        # No layer lights every second of these pixels; the others are lit further up.
        d_in = shape[-1]
        for leaf in params["first"].values():
            leaf[..., :d_in:3] = 0
        for leaf in params["middle"].values():
            leaf[..., :d_in:6] = -np.abs(leaf[..., :d_in:6])
    return model, params, variables, x, y


def loss_and_gradient(model, *given):
    return jax.jit(lambda *given: gradient_flow.loss_and_gradient(model, *given, 1))(*given)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_tangents_are_those_of_the_plain_code(case, x64):
    model, params, frozen, x, y = network(*CASES[case])
    assert ops.supports(model, params, x)
    tolerance = TOLERANCE[x.dtype.name]
    rng = np.random.default_rng(1)
    weight = rng.uniform(0, 1, len(x)).astype(x.dtype)
    direction = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), params)

    @jax.jit
    def plain(params):
        outputs = lambda p: gradient_flow.apply(model, p, frozen, x)  # noqa: E731
        f, pull = jax.vjp(outputs, params)
        return f, pull(weight[:, None] * (f - y))[0], jax.jvp(outputs, (params,), (direction,))[1]

    expected = plain(params)
    shift = -weight[:, None] * y

    @jax.jit
    def fast(params):
        f, gradient = ops.gradient(model, params, frozen, x, weight, shift, ops.Share(2))
        along = ops.tangent(model, params, frozen, x, direction, ops.Share(2))
        return (f, gradient, along), ops.outputs(model, params, frozen, x, ops.Share(2))

    found, outputs = fast(params)
    assert_close(found, expected, tolerance)
    assert_close(outputs, expected[0], tolerance)
    if "dark" in case:
        d_in = x.shape[1]
        for gradient in (found[1], expected[1]):
            read = gradient["middle"]["kernel"].any(-1)[:, :d_in]
            lit = read[:, 3::6]
            assert not read[:, ::6].any() and not lit[0].any() and read[:, 1::3].any()
            assert math.isinf(model.scale) or lit[1:].any()
            assert not gradient["middle"]["bias"][:-1, :d_in:6].any()


@pytest.mark.parametrize(
    ("examples", "d_in", "d_out", "scale"),
    [(70, 140, 3, 1e5), (9, 97, 2, 1e5), (300, 129, 40, 1e5), (300, 129, 40, math.inf)],
)
def test_what_rounding_hides_is_left_out_and_nothing_else(examples, d_in, d_out, scale, x64):
    rng = np.random.default_rng(2)
    positive = rng.uniform(0.02, 1, (examples, d_in)).astype(np.float32)
    zero = rng.uniform(size=positive.shape) < 0.5
    given = network((examples, d_in), d_out, 20, "float32", {"scale": scale})
    model, trained, frozen, _, y = given
    weight = np.ones_like(y[:, 0]) / len(y)

    def blocks(f, gradient):
        """Each kind of unit for itself, though most are 1 / C of the others."""
        by_unit = ((0, d_in), (d_in, d_in + 1), (d_in + 1, None))
        names = ("kernel", "bias")
        parts = [gradient["middle"][name][..., a:b] for name in names for a, b in by_unit]
        ends = [gradient[end][name] for end in ("first", "last") for name in names]
        return f, parts, ends

    @jax.jit
    def plain(params, x):
        v = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), frozen)
        f, pull = jax.vjp(lambda p: gradient_flow.apply(model, p, v, x), params)
        return blocks(f, pull(weight[:, None].astype(x.dtype) * (f - y))[0])

    @jax.jit
    def fast(params, x):
        shift, share = -weight[:, None] * y, ops.Share(2)
        found = ops.gradient(model, params, frozen, x, weight, shift, share)
        return ops.outputs(model, params, frozen, x, share), blocks(*found)

    for size in (1e-3, 1.0, 300.0):
        for x in (positive, np.where(zero, 0, positive)):
            params = jax.tree.map(lambda p, size=size: (size * p).astype(np.float32), trained)
            wide = jax.tree.map(lambda p: p.astype(np.float64), (params, x))
            outputs, found = fast(params, x)
            exact, reference = plain(*wide), plain(params, x)
            for a, b, c in zip(*map(jax.tree.leaves, (found, reference, exact)), strict=True):
                a, b, c = (np.asarray(part, np.float64) for part in (a, b, c))
                # The plain code too takes a number near zero for one of the other sign.
                most = 2 * np.linalg.norm(b - c) + 5e-7 * np.linalg.norm(c)
                assert np.linalg.norm(a - c) <= most
            assert_close(outputs, np.asarray(exact[0], np.float32), 3e-6)


@pytest.mark.parametrize(
    ("shape", "depth", "options"),
    [
        *(((150, 3), 70, {}), ((150, 4, 5, 1), 70, {}), ((150, 126), 70, {})),
        *(((290, 126), 12, {}), ((290, 132), 12, {"scale": 1e5})),
        *(((150, 126), 70, {"scale": 1e5}), ((150, 126), 70, {"scale": 3e3, "negative": True})),
        *(((290, 132), 12, {"dark": True}), ((290, 132), 12, {"dark": True, "scale": 1e5})),
    ],
)
def test_neither_threads_nor_segments_change_a_bit(shape, depth, options, monkeypatch):
    model, params, frozen, x, y = network(shape, 1, depth, "float32", options)

    def gradient(threads):
        call = jax.jit(
            lambda p: ops.gradient(
                model, p, frozen, x, np.ones_like(y[:, 0]), -y, ops.Share(threads)
            )
        )
        return call(params)

    expected = gradient(1)
    for threads in (2, 7):
        assert_close(gradient(threads), expected, 0)
    for name in ("BUDGET", "ROOM", "KEPT"):
        monkeypatch.setattr(ops, name, 0)
    assert_close(gradient(2), expected, 0)


@pytest.mark.parametrize(
    ("size", "options", "dtype"),
    [
        pytest.param(0.0, {}, "float32", id="nothing trained"),
        pytest.param(1e-3, {}, "float64", id="little"),
        pytest.param(1.0, {}, "float32", id="much"),
        pytest.param(1.0, {"init": "he_uniform"}, "float32", id="no state like another"),
        pytest.param(1.0, {"init": "he_uniform"}, "float64", id="nor of 64 bits"),
        pytest.param(1e18, {"negative": True}, "float32", id="beyond all bounds"),
    ],
)
def test_a_state_comes_back_as_it_was(size, options, dtype, monkeypatch, x64):
    model, params, frozen, x, y = network((260, 126), 2, 40, dtype, options)
    params = jax.tree.map(lambda p: (size * p).astype(dtype), params)
    of = ops.Blocks.of

    def gradient(**split):
        # At most as many states as that below the highest of a segment are kept, in fewer bytes.
        monkeypatch.setattr(ops.Blocks, "of", lambda *shapes: of(*shapes)._replace(**split))
        weight, share = np.ones_like(y[:, 0]), ops.Share(2)
        call = jax.jit(lambda p: ops.gradient(model, p, frozen, x, weight, -y, share))
        return jax.device_get(call(params))

    # Two layers together: the state that the higher one read was computed, the other one stored.
    expected = gradient(kept=1, segment=2)
    assert size > 1 or np.isfinite(jax.tree.leaves(expected)[0]).all()
    for kept, segment in ((38, 1), (13, 7), (1, 37)):
        found = gradient(kept=kept, segment=segment)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "shape, depth, products",
    [
        ((60, 49), 9, True),
        ((60, 49), 20_000, False),
        ((60, 17), 9, False),
        ((9, 17), 9, True),
        ((2000, 138), 20_000, True),
    ],
)
def test_few_examples_take_the_matrix_products_sooner(shape, depth, products):
    x = np.zeros(shape, np.float32)
    assert (ops.Blocks.for_batch(DeepNarrowMLP(depth, 1, 2.0), x).number == 0) == products


@pytest.mark.parametrize(
    ("examples", "kept", "dark"), [(70, 0.0, False), (260, 0.5, True), (70, 9.0, True)]
)
def test_descent_without_a_stored_gradient_is_the_same_step(examples, kept, dark, monkeypatch):
    model, params, frozen, x, y = network((examples, 140), 3, 23, "float32", {"dark": dark})
    monkeypatch.setattr(ops, "BUDGET", 0)
    monkeypatch.setattr(ops, "KEPT", kept)
    assert ops.descends(model, params, x)
    mesh = gradient_flow.data_mesh(len(x), 0, threaded=True)
    batch = gradient_flow.put_batch(x, y, mesh)
    moved = {}
    for kind in (gradient_flow.sgd, optax.sgd):
        optimizer = kind(0.3)
        state = gradient_flow.TrainState(jax.tree.map(jnp.array, params), optimizer.init(params))
        step = gradient_flow.make_step(model, optimizer, mesh)
        for _ in range(3):
            state, loss = step(state, frozen, batch)
        moved[kind] = state.params, loss
    assert_close(moved[gradient_flow.sgd], moved[optax.sgd], 1e-6)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), moved[gradient_flow.sgd][0], params)
    assert min(jax.tree.leaves(change)) > 0


@pytest.mark.parametrize("scale", [20.0, math.inf])
def test_what_weighs_dark_pixels_decays_as_all_else(scale, x64):
    given = network((150, 133), 2, 7, "float64", {"dark": True, "scale": scale})
    model, params, frozen, x, y = given
    given = model, params, frozen, x, np.ones(len(x)), -y
    f, gradient = jax.jit(lambda: ops.gradient(*given, ops.Share(2)))()
    moved = jax.jit(lambda: ops.descent(*given, 0.01, ops.Share(2), 0.75))()
    expected = jax.tree.map(lambda p, g: 0.75 * p - 0.01 * np.asarray(g), params, gradient)
    assert_close(moved, (f, expected), 1e-14)


@pytest.mark.parametrize("threads", [1, 2])
def test_narrow_layers_descend_without_a_stored_gradient_where_all_blocks_run_at_once(
    threads, monkeypatch, x64
):
    model, params, frozen, x, y = network((200, 2), 1, 700, "float64", {})
    monkeypatch.setattr(ops, "threads", lambda devices: threads)
    assert ops.Blocks.for_batch(model, x).number == 2
    assert ops.descends(model, params, x) == (threads == 2)
    given = model, params, frozen, x, np.ones(len(x)), -y
    f, gradient = jax.jit(lambda: ops.gradient(*given, ops.Share(threads)))()
    # As many threads as blocks, or a gradient that is stored in the library after all.
    f_before, moved = jax.jit(lambda: ops.descent(*given, 0.1, ops.Share(threads)))()
    expected = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), params, gradient)
    assert_close((f_before, moved), (f, expected), 1e-14)


@pytest.mark.parametrize(
    ("shape", "d_out", "depth", "options"),
    [
        ((200, 2), 1, 40, {"negative": True}),
        ((1, 1), 1, 3, {}),
        ((130, 3), 2, 70, {"init": "he_uniform", "negative": True}),
        ((37, 3), 3, 9, {"literal": True}),
        ((70, 5), 2, 600, {"scale": math.inf}),
        ((450, 64), 10, 4, {"init": "torch_default", "literal": True}),
    ],
)
def test_steps_in_one_call_are_those_of_the_plain_code(
    shape, d_out, depth, options, monkeypatch, x64
):
    model, params, frozen, x, y = network(shape, d_out, depth, "float64", options)
    # Several segments, and as many threads as there are blocks of examples.
    monkeypatch.setattr(ops, "threads", lambda devices: 8)
    monkeypatch.setattr(ops, "BUDGET", 0)
    assert ops.repeats(model, params, x)
    mesh = gradient_flow.data_mesh(len(x), 0, threaded=True)
    batch = gradient_flow.put_batch(x, y, mesh)
    rate = 0.01 * gradient_flow.learning_rate(model, 1.0) if math.isfinite(model.scale) else 0.01

    def after(kind, counts):
        state = gradient_flow.TrainState(jax.tree.map(jnp.array, params), kind(rate).init(params))
        step = gradient_flow.make_steps(model, kind(rate), mesh)
        for count in counts:
            state, loss = step(state, frozen, batch, count)
        return state.params, loss

    together = after(gradient_flow.sgd, (5,))
    with monkeypatch.context() as plain:
        plain.setattr(ops, "supports", lambda *given: False)
        expected = after(optax.sgd, (5,))
    assert_close(together, expected, 1e-12)
    assert_close(after(gradient_flow.sgd, (1, 3, 1)), together, 0)
    for name in ("middle", "last"):  # the first layer and biases do not, where C is infinite
        assert np.any(np.asarray(together[0][name]["kernel"]) != params[name]["kernel"])


@pytest.mark.parametrize("init", ["deep_narrow", "he_uniform"])
def test_host_devices_take_the_steps_of_one(init):
    model, params, frozen, x, y = network((200, 2), 1, 40, "float32", {"init": init})

    def after(devices, counts):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
        state = gradient_flow.TrainState(
            jax.tree.map(jnp.array, params), gradient_flow.sgd(0.01).init(params)
        )
        state, others = (gradient_flow.put_replicated(tree, mesh) for tree in (state, frozen))
        step, batch = (
            gradient_flow.make_steps(model, gradient_flow.sgd(0.01), mesh),
            gradient_flow.put_batch(x, y, mesh),
        )
        for count in counts:
            state, loss = step(state, others, batch, count)
        copies = [p.addressable_shards for p in jax.tree.leaves(state.params)]
        assert all(len(shards) == devices for shards in copies)
        return [[np.asarray(shard.data) for shard in shards] for shards in copies], loss

    assert gradient_flow.BY_FIRST < 39
    expected, loss = after(1, (39,))
    for counts in ((39,), (1, 20, 18)):
        found, its_loss = after(2, counts)
        np.testing.assert_allclose(its_loss, loss, rtol=1e-6)
        for (own,), copies in zip(expected, found, strict=True):
            for copy in copies:  # save the sign of a zero
                np.testing.assert_array_equal(copy, own)


def test_of_several_devices_the_first_keeps_the_parameters(x64):
    model, params, frozen, x, y = network((50, 130), 2, 9, "float64", {})
    found, need = {}, {}
    for devices, kind in ((1, optax.sgd), (2, gradient_flow.sgd), (2, optax.sgd)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
        state = gradient_flow.TrainState(jax.tree.map(jnp.array, params), kind(0.01).init(params))
        state, others = (gradient_flow.put_replicated(tree, mesh) for tree in (state, frozen))
        batch = gradient_flow.put_batch(x, y, mesh)
        step = (
            gradient_flow.make_step(model, kind(0.01), mesh).lower(state, others, batch).compile()
        )
        need[devices, kind] = gradient_flow.step_bytes(step, model, params, x, mesh)
        for _ in range(3):
            state, loss = step(state, others, batch)
        found[devices, kind] = state.params, loss
    assert_close(found[2, gradient_flow.sgd], found[1, optax.sgd], 1e-12)
    moved = found[2, gradient_flow.sgd][0]["middle"]["kernel"] - params["middle"]["kernel"]
    assert np.abs(moved).max() > 1e-6
    held = sum(p.nbytes for p in jax.tree.leaves(params))
    assert need[2, gradient_flow.sgd] < need[2, optax.sgd] - held


def test_a_wide_step_holds_its_parameters_once():
    model, params, frozen, x, y = network((64, 500), 3, 40, "float32", {})
    mesh = gradient_flow.data_mesh(len(x), 0, threaded=True)
    batch = gradient_flow.put_batch(x, y, mesh)
    need = {}
    for kind in (gradient_flow.sgd, optax.sgd):
        state = gradient_flow.TrainState(params, kind(0.1).init(params))
        compiled = (
            gradient_flow.make_step(model, kind(0.1), mesh).lower(state, frozen, batch).compile()
        )
        need[kind] = gradient_flow.step_bytes(compiled, model, params, x, mesh)
    held = sum(p.nbytes for p in jax.tree.leaves(params))
    assert need[gradient_flow.sgd] < 1.6 * held
    assert need[optax.sgd] > need[gradient_flow.sgd] + 0.9 * held


def test_networks_side_by_side_are_each_one_alone():
    model, _, _, x, y = network((30, 2), 1, 25, "float32", {})
    ensemble = Ensemble(model, 4, x, y)
    params, frozen = ensemble.init(0)
    together, losses = ensemble.descent(0.1)(jax.tree.map(jnp.copy, params), frozen, 3)
    alone = Ensemble(model, 1, x, y)
    for trial in range(4):
        own = alone.init(0, first=trial)
        moved, loss = alone.descent(0.1)(*own, 3)
        assert_close(jax.tree.map(lambda p, t=trial: p[t : t + 1], together), moved, 1e-5)
        np.testing.assert_allclose(losses[trial], loss[0], rtol=1e-5)


def test_without_the_library_training_is_the_same_to_rounding(monkeypatch, x64):
    model, params, frozen, x, y = network((20, 4, 4, 1), 2, 9, "float64", {})
    batch = gradient_flow.Batch(x, y, np.ones(len(x)))
    expected = loss_and_gradient(model, params, frozen, batch)
    monkeypatch.setattr(build, "available", lambda: False)
    assert not ops.supports(model, params, x)
    assert_close(loss_and_gradient(model, params, frozen, batch), expected, 1e-12)
    assert_close(
        gradient_flow.outputs(model, params, frozen, x, 1),
        gradient_flow.apply(model, params, frozen, x),
        1e-12,
    )


@pytest.mark.parametrize("depth", [5, 31])
def test_an_accelerators_loop_over_layers_computes_the_same(depth, monkeypatch, x64):
    model, params, frozen, x, y = network((6, 3, 4, 1), 2, depth, "float64", {})
    batch = gradient_flow.Batch(x, y, np.ones(len(x)))
    monkeypatch.setattr(build, "available", lambda: False)
    expected = loss_and_gradient(model, params, frozen, batch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_close(loss_and_gradient(model, params, frozen, batch), expected, 1e-12)


def test_what_the_library_has_no_code_for_runs_in_the_plain_code():
    for shape, options in (((4, 3, 3, 260), {}), ((4, 9, 9, 1), {"kernel_size": 7})):
        model, params, _, x, _ = network(shape, 1, 4, "float32", options)
        assert not ops.supports(model, params, x)
    model, params, _, x, _ = network((4, 3), 1, 2, "float32", {})  # no middle layers
    assert not ops.supports(model, params, x)
    model, params, _, x, _ = network((4, 3), 1, 4, "float32", {})
    assert not ops.supports(model, params, x.astype(np.float16))


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_without_a_compiler_one_line_says_so(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, "dnntk"):
        assert not build.available.__wrapped__()
    (record,) = caplog.records
    assert "plain JAX" in record.getMessage() and "\n" not in record.getMessage()


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DNNTK_NATIVE", "0")
    assert not build.available.__wrapped__()


def test_code_is_never_loaded_from_a_folder_that_others_can_write_to(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = build._folder()
    assert own == tmp_path / "dnntk" and own.stat().st_mode & 0o077 == 0
    own.chmod(0o777)
    assert build._folder() != own
