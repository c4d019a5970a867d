"""Gradient descent inside the CPU library: in place, many steps in one call, over host devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import Reference, assert_close, moved_network, tree_map

from dnntk.native import blocks, build, ops
from dnntk.native.blocks import Blocks, CpuBudget
from dnntk.training import gradient_flow, placement
from dnntk.training.ensemble import Ensemble

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not build.available(), reason="needs a C++ compiler"
)


def after(model, params, frozen, batch, optimizer, mesh, counts, **budget):
    """Parameters and loss after steps of `make_steps`, as many a call as ``counts`` says."""
    state = gradient_flow.TrainState(jax.tree.map(jnp.array, params), optimizer.init(params))
    state, frozen = (placement.put_replicated(tree, mesh) for tree in (state, frozen))
    step = gradient_flow.make_steps(model, optimizer, mesh, **budget)
    for count in counts:
        state, loss = step(state, frozen, batch, count)
    return state.params, loss


def mesh_of(devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))


def descended(model, params, frozen, x, y, rate, steps):
    """As `after`, by the reference."""
    reference = Reference(model, frozen, x)
    for _ in range(steps):
        f, gradient = reference.gradient(params, lambda f: (f - y) / len(x))
        params = tree_map(lambda p, g: p - rate * g, params, gradient)
    return params, 0.5 * np.sum((f - y) ** 2) / len(x)


@pytest.mark.parametrize(
    ("examples", "kept", "dark"), [(70, 0.0, False), (260, 0.5, True), (70, 9.0, True)]
)
def test_descent_without_a_stored_gradient_is_the_same_step(examples, kept, dark, monkeypatch):
    model, params, frozen, x, y = moved_network((examples, 140), 3, 23, "float32", {"dark": dark})
    monkeypatch.setattr(blocks, "STATE_BYTES_PER_PARAMETER_BYTE", kept)
    assert ops.supports_sgd_step(model, x)
    mesh = placement.data_mesh(len(x), 0, threaded=True)
    batch = placement.put_batch(x, y, mesh)
    given = model, params, frozen, batch, gradient_flow.sgd(0.3), mesh, (3,)
    moved = after(*given, state_bytes=0)
    assert_close(moved, descended(model, params, frozen, x, y, 0.3, 3), 2e-6)
    change = tree_map(lambda a, b: np.abs(a - b).max(), moved[0], params)
    assert min(jax.tree.leaves(change)) > 0


@pytest.mark.parametrize("scale", [20.0, math.inf])
def test_what_weighs_dark_pixels_decays_as_all_else(scale, x64):
    given = moved_network((150, 133), 2, 7, "float64", {"dark": True, "scale": scale})
    model, params, frozen, x, y = given
    given = model, params, frozen, x, np.ones(len(x)), -y
    f, gradient = jax.jit(lambda: ops.gradient(*given, CpuBudget(2)))()
    moved = jax.jit(lambda: ops.sgd_step(*given, 0.01, CpuBudget(2), 0.75))()
    expected = jax.tree.map(lambda p, g: 0.75 * p - 0.01 * np.asarray(g), params, gradient)
    assert_close(moved, (f, expected), 1e-14)


@pytest.mark.parametrize("threads", [1, 2])
def test_narrow_layers_descend_without_a_stored_gradient_where_all_blocks_run_at_once(
    threads, monkeypatch, x64
):
    model, params, frozen, x, y = moved_network((200, 2), 1, 700, "float64", {})
    monkeypatch.setattr(blocks, "threads", lambda devices: threads)
    assert Blocks.for_batch(model, x, CpuBudget(threads)).number == 2
    assert ops.supports_sgd_step(model, x) == (threads == 2)
    given = model, params, frozen, x, np.ones(len(x)), -y
    f, gradient = jax.jit(lambda: ops.gradient(*given, CpuBudget(threads)))()
    # As many threads as blocks, or a gradient that is stored in the library after all.
    f_before, moved = jax.jit(lambda: ops.sgd_step(*given, 0.1, CpuBudget(threads)))()
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
def test_steps_in_one_call_are_those_of_the_reference(
    shape, d_out, depth, options, monkeypatch, x64
):
    model, params, frozen, x, y = moved_network(shape, d_out, depth, "float64", options)
    # Several segments, and as many threads as there are blocks of examples.
    monkeypatch.setattr(blocks, "threads", lambda devices: 8)
    assert ops.supports_sgd_steps(model, x)
    mesh = placement.data_mesh(len(x), 0, threaded=True)
    batch = placement.put_batch(x, y, mesh)
    rate = 0.01 * gradient_flow.learning_rate(model, 1.0) if math.isfinite(model.scale) else 0.01
    given = model, params, frozen, batch, gradient_flow.sgd(rate), mesh
    together = after(*given, (5,), state_bytes=0)
    assert_close(together, descended(model, params, frozen, x, y, rate, 5), 1e-12)
    assert_close(after(*given, (1, 3, 1), state_bytes=0), together, 0)
    for name in ("middle", "last"):  # the first layer and biases do not, where C is infinite
        assert np.any(np.asarray(together[0][name]["kernel"]) != params[name]["kernel"])


@pytest.mark.parametrize("init", ["deep_narrow", "he_uniform"])
def test_host_devices_take_the_steps_of_one(init):
    model, params, frozen, x, y = moved_network((200, 2), 1, 40, "float32", {"init": init})

    def on(devices, counts):
        batch = placement.put_batch(x, y, mesh_of(devices))
        optimizer = gradient_flow.sgd(0.01)
        moved, loss = after(model, params, frozen, batch, optimizer, mesh_of(devices), counts)
        copies = [p.addressable_shards for p in jax.tree.leaves(moved)]
        assert all(len(shards) == devices for shards in copies)
        return [[np.asarray(shard.data) for shard in shards] for shards in copies], loss

    assert gradient_flow.STEPS_ON_FIRST_DEVICE < 39
    expected, loss = on(1, (39,))
    for counts in ((39,), (1, 20, 18)):
        found, its_loss = on(2, counts)
        np.testing.assert_allclose(its_loss, loss, rtol=1e-6)
        for (own,), copies in zip(expected, found, strict=True):
            for copy in copies:  # save the sign of a zero
                np.testing.assert_array_equal(copy, own)


def compiled_step(model, params, frozen, x, y, optimizer, mesh):
    """A step of `make_step` for these arrays, what it takes them as, and its bytes."""
    state = gradient_flow.TrainState(jax.tree.map(jnp.array, params), optimizer.init(params))
    state, frozen = (placement.put_replicated(tree, mesh) for tree in (state, frozen))
    given = state, frozen, placement.put_batch(x, y, mesh)
    step = gradient_flow.make_step(model, optimizer, mesh).lower(*given).compile()
    return step, given, gradient_flow.step_bytes(step, model, params, x, mesh)


def test_of_several_devices_the_first_keeps_the_parameters(x64):
    network = moved_network((50, 130), 2, 9, "float64", {})
    params, need = network[1], {}
    for kind in (gradient_flow.sgd, optax.sgd):
        step, (state, frozen, batch), need[kind] = compiled_step(*network, kind(0.01), mesh_of(2))
        for _ in range(3):
            state, loss = step(state, frozen, batch)
        assert_close((state.params, loss), descended(*network, 0.01, 3), 1e-12)
    moved = state.params["middle"]["kernel"] - params["middle"]["kernel"]
    assert np.abs(moved).max() > 1e-6
    held = sum(p.nbytes for p in jax.tree.leaves(params))
    assert need[gradient_flow.sgd] < need[optax.sgd] - held


def test_a_wide_step_holds_its_parameters_once():
    network = moved_network((64, 500), 3, 40, "float32", {})
    mesh = placement.data_mesh(64, 0, threaded=True)
    plain, own = (
        compiled_step(*network, kind(0.1), mesh)[-1] for kind in (optax.sgd, gradient_flow.sgd)
    )
    held = sum(p.nbytes for p in jax.tree.leaves(network[1]))
    assert own < 1.6 * held
    assert plain > own + 0.9 * held


def test_networks_side_by_side_are_each_one_alone():
    model, _, _, x, y = moved_network((30, 2), 1, 25, "float32", {})
    ensemble = Ensemble(model, 4, x, y)
    params, frozen = ensemble.init(0)
    together, losses = ensemble.descent(0.1)(jax.tree.map(jnp.copy, params), frozen, 3)
    alone = Ensemble(model, 1, x, y)
    descend = alone.descent(0.1)
    for trial in (0, 3):
        own = jax.tree.map(lambda p, t=trial: np.asarray(p)[t : t + 1], (params, frozen))
        assert_close(alone.init(0, first=trial), own, 0)
        moved, loss = descend(*alone.put(own), 3)
        assert_close(jax.tree.map(lambda p, t=trial: p[t : t + 1], together), moved, 1e-5)
        np.testing.assert_allclose(losses[trial], loss[0], rtol=1e-5)
