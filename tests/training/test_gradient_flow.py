"""Steps of gradient flow: the closed form, any optimizer, devices, one by one or many at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from networks import initialized
from reference import Reference, assert_close, drawn_network, explicit_kernel, tree_map

from dnntk import InputError, TrainConfig
from dnntk.training import gradient_flow, placement
from dnntk.training.losses import mean_loss
from dnntk.training.optimizers import optimizer_of


def mesh_of(count):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def started(params, frozen, x, y, optimizer, mesh):
    """(state, frozen, batch) on a mesh, which steps may donate."""
    state = gradient_flow.TrainState(params, optimizer.init(params))
    placed = jax.tree.map(jnp.array, placement.put_replicated((state, frozen), mesh))
    return *placed, placement.put_batch(x, y, mesh)


def descend(model, params, frozen, x, y, devices, steps, **sgd):
    """Losses before each step, and outputs after the last one."""
    mesh, optimizer = mesh_of(devices), optax.sgd(**sgd)
    state, frozen, batch = started(params, frozen, x, y, optimizer, mesh)
    step, losses = gradient_flow.make_step(model, optimizer, mesh), []
    for _ in range(steps):
        state, loss = step(state, frozen, batch)
        losses.append(float(loss))
    return losses, gradient_flow.make_predict(model, mesh)(state.params, frozen, x)


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_descent_of_the_linear_network_is_kernel_gradient_descent(arch, x64):
    """C = infinity: f after s steps is (I - (I - eta K / N)^s) Y, exactly."""
    model, params, frozen, x, y = drawn_network(arch)
    kernel = explicit_kernel(model, params, frozen, x) / len(x)
    eta, steps = 1.5 / np.linalg.eigvalsh(kernel)[-1], 7
    power = np.linalg.matrix_power(np.eye(len(kernel)) - eta * kernel, steps)
    expected = (y.ravel() - power @ y.ravel()).reshape(y.shape)
    losses, outputs = descend(model, params, frozen, x, y, 1, steps, learning_rate=eta)
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)
    np.testing.assert_allclose(losses[0], 0.5 * np.mean(np.sum(y**2, 1)), rtol=1e-12)


@pytest.mark.parametrize(("arch", "examples"), [("mlp", 11), ("cnn", 12)])
def test_two_devices_do_what_one_does(arch, examples, x64):
    case = drawn_network(arch, scale=9.0, examples=examples)
    one = descend(*case, 1, 3, learning_rate=0.05, momentum=0.5)
    two = descend(*case, 2, 3, learning_rate=0.05, momentum=0.5)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-11)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-10)


@pytest.mark.parametrize(("arch", "devices"), [("mlp", 2), ("cnn", 1)])
def test_steps_on_cross_entropy_are_those_of_its_derivative(arch, devices, x64):
    model, params, frozen, x, _ = drawn_network(arch, scale=9.0, examples=11)
    y = np.random.default_rng(0).dirichlet(np.ones(model.d_out), 11) if model.d_out > 1 else 0.3
    y = np.broadcast_to(y, (11, model.d_out))
    reference, mesh, optimizer = (
        Reference(model, frozen, x),
        mesh_of(devices),
        gradient_flow.sgd(0.2),
    )
    to_p = (
        scipy.special.expit
        if model.d_out == 1
        else functools.partial(scipy.special.softmax, axis=1)
    )
    slope = lambda f: (to_p(f) - y) / len(x)  # noqa: E731
    expected = params
    for _ in range(2):
        f, gradient = reference.gradient(expected, slope)
        expected = tree_map(lambda p, g: p - 0.2 * g, expected, gradient)
    step = gradient_flow.make_steps(model, optimizer, mesh, loss="cross_entropy")
    state, loss = step(*started(params, frozen, x, y, optimizer, mesh), 2)
    assert_close(state.params, expected, 1e-11)
    assert loss == pytest.approx(mean_loss("cross_entropy", np.asarray(f), y), rel=1e-11)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_sharpness_aware_step_takes_the_gradient_uphill(devices, x64):
    """p - eta g(p + r g(p) / ||g(p)||) (Foret et al. 2021), in the reference's gradients."""
    model, params, frozen, x, y = drawn_network("mlp", scale=3.0, examples=11)
    config = TrainConfig(optimizer="lion", lr=0.1, sam_radius=0.5, weight_decay=0.0)
    reference = Reference(model, frozen, x)
    gradient = lambda p: reference.gradient(p, lambda f: (f - y) / len(x))[1]  # noqa: E731
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient(params))))
    uphill = gradient(tree_map(lambda p, g: p + 0.5 * g / norm, params, gradient(params)))
    # Lion's first step is the gradient's sign.
    expected = tree_map(lambda p, g: p - 0.1 * np.sign(g), params, uphill)
    here = tree_map(lambda p, g: p - 0.1 * np.sign(g), params, gradient(params))
    mesh, optimizer = mesh_of(devices), optimizer_of(config, 0.1, 1)
    step = gradient_flow.make_step(model, optimizer, mesh)
    state, loss = step(*started(params, frozen, x, y, optimizer, mesh))
    assert_close(state.params, expected, 1e-12)
    assert loss == pytest.approx(float(0.5 * np.mean(np.sum(y**2, 1))), rel=1e-9)
    differing = tree_map(lambda a, b: np.sum(a != b), expected, here)
    assert sum(jax.tree.leaves(differing)) > 0  # or the test could not tell


def test_predictions_do_not_depend_on_the_chunk(x64):
    model, params, frozen, x, _ = drawn_network("mlp", scale=9.0)
    predict = gradient_flow.make_predict(model, mesh_of(2))
    params = tree_map(lambda p: p + 1.0, params)
    expected = Reference(model, frozen, x).outputs(params)
    for chunk in (1, 5, 100):
        np.testing.assert_allclose(predict(params, frozen, x, chunk), expected, rtol=1e-11)


def test_both_forms_advance_kernel_time_alike(x64):
    model, _, _, x, y = drawn_network("mlp", scale=30.0)
    standard = model.clone(parametrization="standard")
    ends = []
    for form in (model, standard):
        frozen = jax.device_get(initialized(form, x))
        rate = gradient_flow.learning_rate(form, 0.1)
        params = frozen.pop("params")
        ends.append(descend(form, params, frozen, x, y, 1, 5, learning_rate=rate)[1])
    np.testing.assert_allclose(*ends, rtol=1e-9)
    np.testing.assert_allclose(gradient_flow.time_step_of(standard, rate), 0.1, rtol=1e-12)
    with pytest.raises(InputError, match="finite scale"):
        gradient_flow.time_step_of(model.clone(scale=float("inf")), 0.1)


def test_steps_at_once_are_the_steps_one_by_one():
    network = jax.tree.map(np.float32, drawn_network("mlp", scale=3.0)[1:])
    model, mesh, optimizer = drawn_network("mlp", scale=3.0)[0], mesh_of(1), optax.sgd(0.1, 0.5)
    steps, ends = gradient_flow.make_steps(model, optimizer, mesh), []
    for counts in ((1,) * 5, (5,), (2, 3)):
        state, frozen, batch = started(*network, optimizer, mesh)
        for count in counts:
            state, loss = steps(state, frozen, batch, count)
        ends.append((state, loss))
    losses, _ = descend(model, *network, 1, 5, learning_rate=0.1, momentum=0.5)
    assert float(ends[0][1]) == pytest.approx(losses[-1], rel=1e-6)
    for end in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, ends[0], end)
