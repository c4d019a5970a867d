"""Many networks trained side by side."""

import jax
import jax.numpy as jnp
import numpy as np

from dnntk import DeepNarrowMLP, load_dataset
from dnntk.training.ensemble import Ensemble


def test_a_trial_depends_on_its_number_alone_and_steps_add_up():
    rng = np.random.default_rng(0)
    x, y = rng.random((5, 3), np.float32), rng.random((5, 1), np.float32)
    model = DeepNarrowMLP(4, 1, 20.0)
    four, two = Ensemble(model, 4, x, y), Ensemble(model, 2, x, y)
    params, frozen = four.init(seed=1)
    last, _ = two.init(seed=1, first=2)
    assert frozen
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), frozen, two.init(1, 2)[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), params, last)
    descend = four.descent(0.5)
    once, losses = descend(jax.tree.map(np.array, params), frozen, 5)
    twice, start = descend(jax.tree.map(np.array, params), frozen, 1)
    twice, again = descend(twice, frozen, 4)
    np.testing.assert_array_equal(losses, again)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    np.testing.assert_allclose(start, 0.5 * np.mean(y**2), rtol=1e-6)  # outputs are 0 at first
    assert (again < start).all()


def test_an_ensemble_is_its_networks_trained_one_by_one(x64):
    data = load_dataset("toy")
    x, y = data.x_train[::20].astype(np.float64), data.y_train[::20].astype(np.float64)
    model = DeepNarrowMLP(5, 1, 9.0)
    ensemble = Ensemble(model, 3, x, y)
    params, frozen = ensemble.init(seed=4)
    one = jax.tree.map(lambda p: np.asarray(p[1]), {"params": params, **frozen})
    params, losses = ensemble.descent(0.3)(params, frozen, 4)

    def loss(p):
        return 0.5 * jnp.mean(jnp.sum((model.apply({**one, "params": p}, x) - y) ** 2, 1))

    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(4):
        value, gradient = step(one["params"])
        one["params"] = jax.tree.map(lambda p, g: p - 0.3 * g, one["params"], gradient)
    np.testing.assert_allclose(losses[1], value, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(one["params"]), strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-12)


def test_trials_one_by_one_may_take_different_numbers_of_steps():
    x = np.ones((2, 3), np.float32)
    ensemble = Ensemble(DeepNarrowMLP(3, 1, 2.0), 4, x, x[:, :1])

    def doubled(value, limit):
        step = lambda carry: (carry[0] + 1, 2 * carry[1])  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[1] < limit, step, (0, value))

    limits = ensemble.put(jnp.array([1.0, 2.0, 9.0, 100.0]))
    steps, values = ensemble.one_by_one(doubled)(ensemble.put(jnp.ones(4)), limits)
    assert steps.tolist() == [0, 1, 4, 7] and values.tolist() == [1, 2, 16, 128]
