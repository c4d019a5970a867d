"""Whatever engine computes it: outputs, gradients, products with the Jacobian."""

import jax
import numpy as np
import pytest
from reference import Reference, assert_close, moved_network, tree_map

from dnntk.native import build
from dnntk.native.blocks import CpuBudget
from dnntk.networks import layers
from dnntk.training import engine as engines
from dnntk.training import gradient_flow, placement
from dnntk.training.engine import PART_SCRATCH_BYTES, NativeEngine, PlainEngine, engine_for

needs_a_compiler = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


@pytest.mark.parametrize(
    ("native", "part_bytes"),
    [
        (False, PART_SCRATCH_BYTES),
        pytest.param(True, PART_SCRATCH_BYTES, marks=needs_a_compiler),
        pytest.param(True, 30_000, marks=needs_a_compiler),
    ],
)
def test_an_engine_computes_what_the_reference_does(native, part_bytes, monkeypatch, x64):
    monkeypatch.setattr(engines, "PART_SCRATCH_BYTES", part_bytes)
    model, params, frozen, x, y = moved_network((20, 4, 4, 1), 2, 9, "float64", {})
    monkeypatch.setattr(build, "available", lambda: native)
    engine = engine_for(model, params, x, devices=1)
    assert isinstance(engine, NativeEngine) == engine.threaded == native
    reference = Reference(model, frozen, x)
    f, gradient = reference.gradient(params, lambda f: f - y)
    rng = np.random.default_rng(1)
    direction = tree_map(lambda p: rng.standard_normal(p.shape), params)

    @jax.jit
    def found(params):
        batch = placement.Batch(x, y, np.ones(len(x)))
        pulled = engine.vjp(params, frozen, x, y)
        pushed = engine.jvp(params, frozen, x, direction)
        return engine.outputs_and_gradient(params, frozen, batch), (pulled, pushed)

    products = reference.gradient(params, lambda f: y)[1], reference.tangent(params, direction)
    assert_close(found(params), ((f, gradient), products), 1e-12)


def test_an_accelerators_loop_over_layers_computes_the_same(monkeypatch, x64):
    # Segments of 5 layers and 3 more, in loops of 4.
    model, params, frozen, x, y = moved_network((6, 3, 4, 1), 2, 30, "float64", {})
    batch = placement.Batch(x, y, np.ones(len(x)))
    f, gradient = Reference(model, frozen, x).gradient(params, lambda f: f - y)
    monkeypatch.setattr(layers, "LAYERS_TO_UNROLL", 3)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cpu, default: default(*given))
    monkeypatch.setattr(build, "available", lambda: False)
    found = jax.jit(lambda p: gradient_flow.loss_and_gradient(model, p, frozen, batch, 1))(params)
    assert_close(found, (0.5 * np.sum((f - y) ** 2), gradient), 1e-12)


def test_an_engine_alone_has_all_cores_and_the_same_memory():
    model, params, _, x, _ = moved_network((20, 2), 1, 9, "float32", {})
    if isinstance(engine := engine_for(model, params, x, devices=2, state_bytes=123), NativeEngine):
        assert not engine.budget.alone and engine.alone().budget == CpuBudget.of(1, 123)


@needs_a_compiler
def test_the_platform_is_that_of_the_mesh_and_not_the_default_backend(monkeypatch):
    model, params, _, x, _ = moved_network((20, 2), 1, 9, "float32", {})
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert type(engine_for(model, params, x)) is PlainEngine
    assert engine_for(model, params, x, mesh).budget == CpuBudget.of(2)
