"""The spread over initializations: closed forms, finite networks at t = 0, and trained ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, kernel
from dnntk.infinite_depth import spread
from dnntk.infinite_depth.spread import Spread, initialization_spread, linear_predictions
from dnntk.training import engine
from dnntk.training.ensemble import Ensemble

OPTIONS = {"rho": 0.8, "beta": 0.9}
SHAPES = {"mlp": (3,), "cnn": (3, 4, 2)}
NETWORKS = {"mlp": DeepNarrowMLP, "cnn": DeepNarrowCNN}
TRIALS, DEPTH, TIME_STEP, STEPS = 64, 24, 0.05, 20


def problem(arch, d_out=2, train=6, test=3):
    """Inputs x_train and x, and targets, positive as the theorems' inputs are."""
    rng = np.random.default_rng(7)
    x_train, x = (rng.uniform(0.1, 1, (n, *SHAPES[arch])) for n in (train, test))
    return x_train, rng.standard_normal((train, d_out)), x


def checked(arch, **kwargs):
    return spread._Problem(*problem(arch, **kwargs), *OPTIONS.values(), 3)


def limit_gram(held):
    with jax.enable_x64(True):
        return np.asarray(
            kernel.limit_ntk(held.inputs, held.train, d_out=held.y.shape[1], **OPTIONS)
        )


@pytest.mark.parametrize("arch", SHAPES)
def test_the_first_order_is_the_spread_of_deep_linear_networks(arch):
    data, times = problem(arch), [0.5, 5.0]
    found = initialization_spread(*data, times, key=jax.random.key(0), **OPTIONS)
    drawn = linear_predictions(
        *data, times, depth=1000, draws=100, key=jax.random.key(1), **OPTIONS
    )
    assert drawn.shape == (100, 2, 3, 2)
    ratio = drawn.std(0, ddof=1) / found.std(1000)
    # A deviation from 100 draws is good to 1 / sqrt(200) = 7%; four of these, and the sample's 3%.
    assert 0.7 < ratio.min() and ratio.max() < 1.3
    # The mean is the limit's, up to its own error of a tenth of the deviation.
    assert np.abs(drawn.mean(0) - found.prediction).max() < 0.5 * found.std(1000).max()


@pytest.mark.parametrize("arch", SHAPES)
def test_predictions_are_the_limits_and_samples_do_not_depend_on_blocks(arch, monkeypatch):
    data, times = problem(arch), [0.0, 2.0, math.inf]
    whole = initialization_spread(*data, times, samples=50, **OPTIONS)
    gram = limit_gram(checked(arch))
    a = gram[:6] / 6
    for found, time in zip(whole.prediction, times, strict=True):
        unlearnt = expm(-time * a) if time < math.inf else 0 * a
        expected = gram[6:] @ np.linalg.solve(6 * a, data[1] - unlearnt @ data[1])
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert not whole.std(10)[0].any()
    monkeypatch.setattr(spread, "BLOCK_ELEMENTS", 1)
    one = initialization_spread(*data, 2.0, samples=50, **OPTIONS)
    np.testing.assert_allclose(one.std(9), whole.std(9)[1], rtol=1e-9)
    assert one.std(9).shape == (3, 2)
    ratio = one.std(40_000) / one.std(10_000)
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-3)  # depth^-1/2, up to the first layer's share


def spread_of(layer, first, prediction=1.0, shift=0.0):
    """A spread with these mean squares at T times: three examples and two outputs."""
    uneven = np.array([0.2, 0.8, 2.0])[:, None] * np.array([0.5, 1.5])  # of mean 1
    means = np.broadcast_arrays(prediction**2, layer, first, shift**2)
    square, *squares = (np.multiply.outer(mean, uneven) for mean in means)
    return Spread(-np.sqrt(square), *squares[:2], np.sqrt(squares[2]))


@pytest.mark.parametrize("epsilon", [0.7, 0.3, 0.033, 0.01])
def test_the_depth_is_the_least_from_which_on_networks_are_within_epsilon(epsilon):
    # The last three: a first layer or a shift that dominates, and a rise from depth 2 to 4.
    layer, first = np.array([[1.0, 0.021, 1e-4, 1e-4, 1.0], [0.8, 0.021, 3.0, 0.1, 0.0]])
    found = spread_of(layer, first, shift=np.array([0.0, 0.5, 0.0, 2.0, 0.0]))
    least, depths = found.depth(epsilon), np.arange(2, 11_000)
    rms = lambda values: np.sqrt(np.mean(values**2, axis=(1, 2)))  # noqa: E731
    squares = (found.std(depth) ** 2 + (found.shift / depth) ** 2 for depth in depths)
    distances = np.stack([rms(np.sqrt(square)) for square in squares]) / rms(found.prediction)
    beyond = [depths[far] for far in (distances > epsilon).T]
    expected = [far[-1] + 1 if far.size else 2 for far in beyond]
    np.testing.assert_array_equal(least, expected)
    assert least.shape == (5,) and least.dtype.kind == "i"
    one = spread_of(0.021, 0.021, shift=0.5).depth(epsilon)
    assert type(one) is int and one == expected[1]


def test_the_depth_of_exact_networks_is_two_and_of_others_finite():
    assert spread_of(0.0, 0.0, prediction=0.0).depth(0.01) == 2  # at t = 0 all outputs are 0
    assert spread_of(1.0, 1.0).depth(1e-3) == 10**6 - 1  # epsilon^2 L^2 >= L - 1
    np.testing.assert_allclose(spread_of(1.0, 1.0).depth(1e-7), 1e14)
    assert spread_of(1.0, 1.0).depth(1e200) == 2
    for found, epsilon in (
        (spread_of(1.0, 1.0), 1e-9),
        (spread_of(1.0, 1.0, prediction=0.0), 0.1),
        *((spread_of(1.0, 1.0), bad) for bad in (0.0, -1.0, math.nan, math.inf, True, "1%")),
    ):
        with pytest.raises(InputError, match=r"^epsilon: expected .*, got [^\n]*$"):
            found.depth(epsilon)


@pytest.mark.parametrize("arch", SHAPES)
def test_the_shift_is_that_of_networks_of_average_units(arch):
    held, depth, samples = checked(arch), 6, 20_000
    drawn = held.draw(jax.random.key(3), samples + 2)
    # The units' kernels are quadratic in them: so scaled, all together are depth - 2 average ones.
    middle = {name: a * math.sqrt((depth - 2) / samples) for name, a in drawn["middle"].items()}
    first = {"kernel": drawn["first"]["kernel"], "bias": np.sqrt(held.beta**2 / 2)}
    limit = held.limit_kernel()
    own = held.network_kernel({"first": first, "middle": middle}, depth, math.inf)
    np.testing.assert_allclose(held.kernel_shift(limit), depth * (own - limit), rtol=0.03)


def test_linear_networks_of_sobol_units_are_nearer_and_show_the_shift():
    data, options = problem("mlp"), OPTIONS | {"scale": math.inf, "features": "sobol"}
    found = initialization_spread(*data, 0.5, samples=500, **OPTIONS)
    drawn = linear_predictions(*data, 0.5, depth=34, draws=32, **options)
    error = drawn.std(0, ddof=1) / math.sqrt(32)
    assert (found.shift / 34 > 5 * error).all()
    np.testing.assert_allclose(
        drawn.mean(0) - found.prediction, found.shift / 34, atol=4 * error.max()
    )
    assert np.sqrt(np.mean(drawn.var(0))) < 0.8 * np.sqrt(np.mean(found.std(34) ** 2))


@pytest.fixture(scope="module", params=["cnn"])  # MLPs: tests/experiments/test_limit_convergence.py
def trained(request):
    """(problem, drawn units by trial, trained outputs [trials, n, d_out])."""
    x_train, y, x = problem(request.param)
    with jax.enable_x64(True):
        model = NETWORKS[request.param](DEPTH, 2, float(DEPTH) ** 2.2, **OPTIONS)
        ensemble = Ensemble(model, TRIALS, x_train, y)
        params, frozen = ensemble.init(0)
        params, _ = ensemble.descent(TIME_STEP)(params, frozen, STEPS)
        look = ensemble.measure(lambda p, f: engine.apply(model, p, f, jnp.asarray(x)))
        outputs = np.asarray(look(params, frozen))
    initial = jax.tree.map(np.asarray, frozen["initial"])
    drawn = [jax.tree.map(lambda a, i=i: a[i], initial) for i in range(TRIALS)]
    return spread._Problem(x_train, y, x, *OPTIONS.values(), 3), drawn, outputs


def test_trained_networks_scatter_as_predicted(trained):
    held, _, outputs = trained
    found = initialization_spread(
        held.train,
        held.y,
        held.inputs[len(held.train) :],
        TIME_STEP * STEPS,
        key=jax.random.key(2),
        **OPTIONS,
    )
    ratio = outputs.var(0, ddof=1) / found.std(DEPTH) ** 2
    # A variance of 64 Gaussian trials: chi-square with 63 degrees of freedom over 63, deviation
    # sqrt(2 / 63) = 0.18; four of it, for six numbers that move together, and O(1/depth).
    assert 1 - 4 * 0.18 < ratio.min() and ratio.max() < 1 + 4 * 0.18 + 2 / DEPTH


def test_a_trained_network_is_its_own_linearization(trained):
    held, drawn, outputs = trained
    scatter = outputs.std(0).min()
    for units, expected in zip(drawn[:8], outputs[:8], strict=True):
        gram = held.network_kernel(units, DEPTH, float(DEPTH) ** 2.2)
        # In steps, as it was trained; what is left is of order 1/C = 9e-4.
        linear, n = np.zeros((len(gram), held.y.shape[1])), len(held.y)
        for _ in range(STEPS):
            linear += TIME_STEP * gram @ (held.y - linear[:n]) / n
        linear = linear[n:]
        np.testing.assert_allclose(linear, expected, atol=0.2 * scatter)
        assert np.abs(linear - expected).max() < 20 * DEPTH**-2.2


def test_bad_arguments_are_named():
    x_train, y, x = problem("mlp")
    ask = partial(initialization_spread, x_train, y, x)
    twice = np.concatenate([x_train[:1], x_train[:-1]])
    for call, name in (
        (partial(ask, -1.0), "time"),
        (partial(ask, []), "time"),
        (partial(ask, samples=0), "samples"),
        (partial(ask, rho=-1.0), "rho"),
        (partial(ask, kernel_size=2), "kernel_size"),
        (partial(initialization_spread, x_train, y[1:], x), "y_train"),
        (partial(initialization_spread, x_train, y * np.nan, x), "y_train"),
        (partial(initialization_spread, x_train, y, x[:, 1:]), "x2|x must|x:"),
        (partial(initialization_spread, twice, y, x), "time"),
        (partial(linear_predictions, x_train, y, x, depth=1), "depth"),
        (partial(linear_predictions, x_train, y, x, depth=5, scale=-1.0), "scale"),
        (partial(linear_predictions, x_train, y, x, depth=5, draws=0), "draws"),
        (partial(linear_predictions, x_train, y, x, depth=5, features="halton"), "features"),
        (lambda: ask(1.0, samples=50).std(1), "depth"),
    ):
        with pytest.raises(InputError, match=name):
            call()
