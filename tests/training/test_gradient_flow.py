import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import initialized

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, TrainConfig
from dnntk.training import engine, gradient_flow, placement
from dnntk.training.optimizers import optimizer_of
from dnntk.training.pipeline import make_mesh
from dnntk.training.step_size import largest_eigenvalue


def network(arch, depth=6, d_out=2, scale=float("inf"), examples=12, **fields):
    rng = np.random.default_rng(0)
    shape = (examples, 3) if arch == "mlp" else (examples, 3, 4, 1)
    x = rng.uniform(0.1, 1, shape)
    y = rng.standard_normal((examples, d_out))
    kind = DeepNarrowMLP if arch == "mlp" else DeepNarrowCNN
    model = kind(depth, d_out, scale, **fields)
    return model, jax.device_get(initialized(model, x)), x, y


def mesh_of(count):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def explicit_kernel(model, variables, x):
    """J J^T over all examples and outputs, [n k, n k], from the Jacobian itself."""
    frozen = {n: v for n, v in variables.items() if n != "params"}
    apply = lambda p: model.apply({"params": p, **frozen}, x).reshape(-1)  # noqa: E731
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(apply))(variables["params"]))
    jacobian = np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)
    return jacobian @ jacobian.T


def descend(model, variables, x, y, devices, steps, **sgd):
    mesh = mesh_of(devices)
    frozen = {n: v for n, v in variables.items() if n != "params"}
    optimizer = optax.sgd(**sgd)
    state = gradient_flow.TrainState(variables["params"], optimizer.init(variables["params"]))
    state, frozen = placement.put_replicated((state, frozen), mesh)
    step, batch = (
        gradient_flow.make_step(model, optimizer, mesh),
        placement.put_batch(x, y, mesh),
    )
    losses = []
    for _ in range(steps):
        state, loss = step(state, frozen, batch)
        losses.append(float(loss))
    return losses, gradient_flow.make_predict(model, mesh)(state.params, frozen, x)


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_descent_of_the_linear_network_is_kernel_gradient_descent(arch, x64):
    """C = infinity: f after s steps is (I - (I - eta K / N)^s) Y, exactly."""
    model, variables, x, y = network(arch)
    kernel = explicit_kernel(model, variables, x) / len(x)
    eta, steps = 1.5 / np.linalg.eigvalsh(kernel)[-1], 7
    power = np.linalg.matrix_power(np.eye(len(kernel)) - eta * kernel, steps)
    expected = (y.ravel() - power @ y.ravel()).reshape(y.shape)
    losses, outputs = descend(model, variables, x, y, 1, steps, learning_rate=eta)
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)
    np.testing.assert_allclose(losses[0], 0.5 * np.mean(np.sum(y**2, 1)), rtol=1e-12)


@pytest.mark.parametrize(("arch", "examples"), [("mlp", 11), ("mlp", 12), ("cnn", 11)])
def test_two_devices_do_what_one_does(arch, examples, x64):
    case = network(arch, scale=9.0, examples=examples)
    one = descend(*case, 1, 3, learning_rate=0.05, momentum=0.5)
    two = descend(*case, 2, 3, learning_rate=0.05, momentum=0.5)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-11)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-10)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_sharpness_aware_step_takes_the_gradient_uphill(devices, x64):
    """p - eta g(p + r g(p) / ||g(p)||) (Foret et al. 2021), in the plain network's gradients."""
    model, variables, x, y = network("mlp", scale=3.0, examples=11)
    params = variables["params"]
    frozen = {n: v for n, v in variables.items() if n != "params"}
    config = TrainConfig(optimizer="lion", lr=0.1, sam_radius=0.5, weight_decay=0.0)

    @jax.jit
    @jax.grad
    def gradient(p):
        return 0.5 * jnp.mean(jnp.sum((engine.apply(model, p, frozen, x) - y) ** 2, 1))

    norm = optax.tree.norm(gradient(params))
    uphill = gradient(jax.tree.map(lambda p, g: p + 0.5 * g / norm, params, gradient(params)))
    # Lion's first step is the gradient's sign.
    expected = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), params, uphill)
    here = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), params, gradient(params))
    mesh, optimizer = mesh_of(devices), optimizer_of(config, 0.1, 1)
    state = gradient_flow.TrainState(params, optimizer.init(params))
    state, placed = placement.put_replicated((state, frozen), mesh)
    step, batch = (
        gradient_flow.make_step(model, optimizer, mesh),
        placement.put_batch(x, y, mesh),
    )
    state, loss = step(state, placed, batch)
    jax.tree.map(np.testing.assert_allclose, jax.device_get(state.params), expected)
    assert loss == pytest.approx(float(0.5 * np.mean(np.sum(y**2, 1))), rel=1e-9)
    differing = jax.tree.map(lambda a, b: np.sum(a != b), expected, here)
    assert sum(jax.tree.leaves(differing)) > 0  # or the test could not tell


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_predictions_do_not_depend_on_the_chunk(chunk, x64):
    model, variables, x, _ = network("mlp", scale=9.0)
    predict = gradient_flow.make_predict(model, mesh_of(2))
    params = jax.tree.map(lambda p: p + 1.0, variables["params"])
    found = predict(params, {"initial": variables["initial"]}, x, chunk)
    expected = model.apply({**variables, "params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("arch", "mesh"), [("mlp", "data:1"), ("cnn", "data:2"), ("mlp", "depth:2"), ("cnn", "depth:2")]
)
def test_power_iteration_finds_the_largest_eigenvalue(arch, mesh, x64):
    model, variables, x, _ = network(arch, examples=11, scale=50.0)
    expected = np.linalg.eigvalsh(explicit_kernel(model, variables, x) / len(x))[-1]
    found = largest_eigenvalue(model, variables, x, make_mesh(mesh), tolerance=1e-8)
    assert found.converged
    np.testing.assert_allclose(found.value, expected, rtol=1e-6)
    assert found.value <= expected * (1 + 1e-12)


def test_a_vanished_kernel_is_reported_not_divided_by():
    model, variables, x, _ = network("mlp", init="he_uniform", scale=1.0)
    silent = jax.tree.map(jnp.zeros_like, variables)
    found = largest_eigenvalue(model, silent, 0 * x, mesh_of(1))
    # The last bias alone is left: its kernel is the identity's block of ones over depth.
    np.testing.assert_allclose(found.value, 1 / model.depth, rtol=1e-5)


def test_both_forms_advance_kernel_time_alike(x64):
    model, variables, x, y = network("mlp", scale=30.0)
    standard = model.clone(parametrization="standard")
    literal = initialized(standard, x)
    found = descend(
        model, variables, x, y, 1, 5, learning_rate=gradient_flow.learning_rate(model, 0.1)
    )
    rate = gradient_flow.learning_rate(standard, 0.1)
    expected = descend(standard, literal, x, y, 1, 5, learning_rate=rate)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9)
    np.testing.assert_allclose(gradient_flow.time_step_of(standard, rate), 0.1, rtol=1e-12)
    with pytest.raises(InputError, match="finite scale"):
        gradient_flow.time_step_of(model.clone(scale=float("inf")), 0.1)


def test_batches_cover_an_epoch_once_and_depend_on_the_step_alone():
    from_start = list(itertools.islice(placement.mini_batches(23, 5, seed=3), 12))
    for epoch in range(3):
        seen = np.concatenate(from_start[epoch * 4 : epoch * 4 + 4])
        assert len(np.unique(seen)) == 20
    for first in (1, 4, 7):
        resumed = itertools.islice(placement.mini_batches(23, 5, seed=3, first_step=first), 5)
        np.testing.assert_array_equal(list(resumed), from_start[first : first + 5])
    other = next(placement.mini_batches(23, 5, seed=4))
    assert not np.array_equal(other, from_start[0])


def test_small_batches_and_large_networks_stay_on_one_device():
    assert placement.data_mesh(640, 1000).size == 2
    assert placement.data_mesh(40, 1000).size == 1
    assert placement.data_mesh(1, 1000).size == 1
    assert placement.data_mesh(640, placement.MAX_REPLICATED_BYTES + 1).size == 1


def test_steps_at_once_are_the_steps_one_by_one():
    model, variables, x, y = network("mlp", scale=3.0)
    x, y, variables = jax.tree.map(np.float32, (x, y, variables))
    mesh, optimizer = mesh_of(1), optax.sgd(0.1, momentum=0.5)
    params = variables.pop("params")
    batch = placement.put_batch(x, y, mesh)
    ends = []
    for counts in ((1,) * 5, (5,), (2, 3)):
        state = gradient_flow.TrainState(params, optimizer.init(params))
        state, frozen = jax.tree.map(jnp.array, (state, variables))
        step = gradient_flow.make_steps(model, optimizer, mesh)
        for count in counts:
            state, loss = step(state, frozen, batch, count)
        ends.append((state, loss))
    losses, _ = descend(
        model, {"params": params, **variables}, x, y, 1, 5, learning_rate=0.1, momentum=0.5
    )
    assert float(ends[0][1]) == pytest.approx(losses[-1], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[2])
