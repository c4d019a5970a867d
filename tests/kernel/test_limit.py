import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.kernel import arccos1, limit, limit_ntk


def slow_expectation(var_x, var_y, cov):
    """E[relu relu] and E[step step] by the textbook formula, one pair at a time."""
    sine = math.sqrt(max(var_x * var_y - cov**2, 0.0))
    angle = math.atan2(sine, cov)
    return (sine + (math.pi - angle) * cov) / (2 * math.pi), (math.pi - angle) / (2 * math.pi)


def slow_mlp(x1, x2, rho, beta, d_out):
    def pair(x, y):
        var_x, var_y, cov = (
            rho**2 * (a @ b) / len(x) + beta**2 for a, b in ((x, x), (y, y), (x, y))
        )
        return x @ y + d_out + slow_expectation(var_x, var_y, cov)[0]

    return np.array([[pair(x, y) for y in x2] for x in x1])


def slow_cnn(x1, x2, rho, beta, d_out, kernel_size):
    """The definition: a sum over shifts, over positions that stay inside, over pairs of patches."""
    height, width = x1.shape[1:3]
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    positions = list(itertools.product(range(height), range(width)))

    def inside(i, j):
        return 0 <= i < height and 0 <= j < width

    def patch(x, i, j):
        zero = np.zeros(x.shape[2])
        cells = [(i + s, j + u) for s in reach for u in reach]
        return np.concatenate([x[cell] if inside(*cell) else zero for cell in cells])

    def pair(x, y):
        patches = [[patch(z, i, j) for i, j in positions] for z in (x, y)]
        expectation = {
            (p, q): slow_expectation(
                *(rho**2 * (a @ b) + beta**2 for a, b in ((u, u), (v, v), (u, v)))
            )[0]
            for (p, u), (q, v) in itertools.product(*(enumerate(side) for side in patches))
        }
        total = 0.0
        for s, u in itertools.product(reach, reach):
            psi = [p for p, (i, j) in enumerate(positions) if inside(i + s, j + u)]
            shifted = [(positions[p][0] + s, positions[p][1] + u) for p in psi]
            total += d_out * len(psi) ** 2
            total += (
                sum(x[cell] for cell in shifted) @ sum(y[cell] for cell in shifted) if psi else 0
            )
            total += sum(expectation[p, q] for p in psi for q in psi)
        return total / (height * width) ** 2

    return np.array([[pair(x, y) for y in x2] for x in x1])


def inputs(shape, seed=0, dtype=np.float64):
    """Two batches of signed inputs with a zero in the first and a coincident pair."""
    rng = np.random.default_rng(seed)
    x1, x2 = rng.normal(size=(3, *shape)), rng.normal(size=(2, *shape))
    x1[0], x2[1] = 0, x1[1]
    return x1.astype(dtype), x2.astype(dtype)


def in_float64(*args, **options):
    with jax.enable_x64(True):
        return np.asarray(limit_ntk(*(np.asarray(x, np.float64) for x in args), **options))


# ---- the limit kernel: values

MLP_CASES = [
    (1, 1.0, 1.0, 1, np.float64),
    (3, 0.5, 0.0, 2, np.float32),
    (300, 2.0, 0.3, 10, np.float32),
    (784, 10.0, 1.0, 3, np.float64),
]
CNN_CASES = [  # (H, W, c), kernel_size, rho, beta, d_out
    ((4, 6, 2), 5, 0.7, 0.9, 3),
    ((3, 2, 1), 7, 0.5, 0.0, 4),
    ((6, 1, 1), 3, 0.0, 2.0, 5),
    ((3, 2, 30), 3, 0.4, 0.1, 1),
]


@pytest.mark.parametrize(("d_in", "rho", "beta", "d_out", "dtype"), MLP_CASES)
def test_mlp_agrees_with_its_definition(x64, d_in, rho, beta, d_out, dtype):
    x1, x2 = inputs((d_in,), dtype=dtype)
    value = limit_ntk(x1, x2, rho=rho, beta=beta, d_out=d_out)
    expected = slow_mlp(x1.astype(float), x2.astype(float), rho, beta, d_out)
    assert value.dtype == dtype
    # Some ten roundings, each of a few units in the last place for it ends a sum.
    np.testing.assert_allclose(
        value, expected, rtol=0, atol=16 * np.finfo(dtype).eps * abs(expected).max()
    )


@pytest.mark.parametrize(("shape", "kernel_size", "rho", "beta", "d_out"), CNN_CASES)
def test_cnn_agrees_with_its_definition(x64, shape, kernel_size, rho, beta, d_out):
    x1, x2 = inputs(shape)
    options = {"rho": rho, "beta": beta, "d_out": d_out, "kernel_size": kernel_size}
    expected = slow_cnn(x1, x2, **options)
    value = limit_ntk(x1, x2, **options)
    np.testing.assert_allclose(value, expected, rtol=0, atol=4e-15 * abs(expected).max())


def test_values_known_in_closed_form():
    x = np.array([[3.0, 4.0], [4.0, -3.0]], np.float32)
    variance = 0.5**2 * 25 / 2 + 2.0**2
    value = limit_ntk(x, rho=0.5, beta=2.0, d_out=7)
    np.testing.assert_allclose(np.diag(value), 25 + 7 + variance / 2, rtol=1e-6)
    # Orthogonal inputs without bias: E = n n' / (2 pi).
    value = limit_ntk(x, rho=0.5, beta=0.0, d_out=7)
    np.testing.assert_allclose(value[0, 1], 7 + 0.5**2 * 25 / 2 / (2 * np.pi), rtol=1e-6)
    # An image of one pixel: only the central shift keeps it inside.
    value = limit_ntk(x.reshape(2, 1, 1, 2), rho=0.5, beta=2.0, d_out=7)
    np.testing.assert_allclose(np.diag(value), 25 + 7 + (0.5**2 * 25 + 2.0**2) / 2, rtol=1e-6)
    # Blank images without weights: every expectation is beta^2 / 2, and each of the sums over
    # psi counts (7 * 7)^2, 4 times (7 * 6)^2 and 4 times (6 * 6)^2 pairs.
    value = limit_ntk(np.zeros((1, 7, 7, 1), np.float32), rho=0.0, beta=2.0, d_out=3)
    pairs = 49**2 + 4 * 42**2 + 4 * 36**2
    np.testing.assert_allclose(value, [[(3 + 2.0**2 / 2) * pairs / 49**2]], rtol=1e-6)


def near(x, distance, seed=3):
    return x * (1 + distance * np.random.default_rng(seed).normal(size=x.shape))


@pytest.mark.parametrize("rho", [1.0, 100.0])
@pytest.mark.parametrize("distance", [None, 0.0, 1e-7, 1e-5])
def test_float32_is_within_a_millionth_of_float64(rho, distance):
    rng = np.random.default_rng(4)
    strokes = rng.uniform(size=(120, 784)) * (rng.uniform(size=(120, 784)) < 0.2)  # as in digits
    for x in (strokes, rng.uniform(size=(120, 784))):
        x1 = x.astype(np.float32)
        x2 = (x[::-1] if distance is None else near(x, distance)).astype(np.float32)
        expected = in_float64(x1, x2, rho=rho)
        np.testing.assert_allclose(limit_ntk(x1, x2, rho=rho), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3072,), (14, 14, 1)])
def test_float32_of_flat_images_is_within_a_millionth_of_float64(shape):
    """All roundings of a sum of equal terms go one way, unless the sum is taken in pieces."""
    rng = np.random.default_rng(15)
    count = 80 if len(shape) == 1 else 8
    levels = np.concatenate([[0.1, 0.3, 1.0, 25.5, 255.0], rng.uniform(size=count - 5)])
    x = (levels.reshape(-1, *[1] * len(shape)) * np.ones(shape)).astype(np.float32)
    spotted = x.copy()
    spotted.reshape(count, -1)[range(count), rng.integers(x[0].size, size=count)] = 0.5
    both = np.concatenate([x, spotted])
    expected = in_float64(both, rho=10.0)
    np.testing.assert_allclose(limit_ntk(both, rho=10.0), expected, rtol=1e-6)


@pytest.mark.parametrize("rho", [3**-0.5, 10.0])
def test_float32_of_images_is_within_a_millionth_of_float64(rho):
    rng = np.random.default_rng(5)
    x = rng.uniform(size=(24, 7, 7, 1)) * (rng.uniform(size=(24, 7, 7, 1)) < 0.5)
    x1 = np.concatenate([x, rng.normal(size=x.shape)]).astype(np.float32)
    x2 = np.concatenate([x[:12], near(x[12:], 1e-5), x1[24:]]).astype(np.float32)
    expected = in_float64(x1, x2, rho=rho)
    np.testing.assert_allclose(limit_ntk(x1, x2, rho=rho), expected, rtol=1e-6)


# ---- the limit kernel: structure


@pytest.mark.parametrize(
    ("shape", "dtype"), [((20,), np.float32), ((20,), np.float64), ((4, 3, 2), np.float32)]
)
def test_symmetric_positive_semidefinite_and_equal_to_the_general_call(x64, dtype, shape):
    x = np.random.default_rng(6).normal(size=(21, *shape)).astype(dtype)
    gram = np.asarray(limit_ntk(x, d_out=2))
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_array_equal(gram, limit_ntk(x, x, d_out=2))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(
        gram, limit_ntk(x, x.copy(), d_out=2), rtol=0, atol=8 * eps * gram.max()
    )
    eigenvalues = np.linalg.eigvalsh(gram.astype(np.float64))
    assert eigenvalues[0] > -8 * eps * len(x) * eigenvalues[-1]


def test_independent_of_the_block_size():
    rng, elements = np.random.default_rng(7), 8
    x1 = jnp.asarray(rng.normal(size=(17, 3, 2, 2)), jnp.float32)
    x2 = jnp.asarray(rng.normal(size=(10, 3, 2, 2)), jnp.float32)

    def value(right, size):
        return np.asarray(limit._limit_ntk(x1, right, 1.0, 0.5, 2, 3, size))

    for right in (None, x2):
        whole = value(right, 10**6)
        # The blocks' products may be summed in another order.
        np.testing.assert_allclose(value(right, elements), whole, rtol=0, atol=1e-6 * whole.max())
    symmetric = value(None, elements)
    np.testing.assert_array_equal(symmetric, symmetric.T)


def test_large_results_take_no_more_than_themselves():
    x = jax.ShapeDtypeStruct((8000, 30), jnp.float32)
    compiled = jax.jit(limit_ntk).lower(x).compile()
    result = 4 * 8000**2
    assert compiled.memory_analysis().temp_size_in_bytes < result / 8


def test_empty_batches():
    x = np.zeros((0, 3), np.float32)
    assert limit_ntk(x).shape == (0, 0)
    assert limit_ntk(np.zeros((2, 4, 4, 1), np.float32), np.zeros((0, 4, 4, 1))).shape == (2, 0)


@pytest.mark.parametrize("shape", [(6,), (3, 2, 1)])
def test_jit_vmap_and_numpy_inputs_agree(shape):
    x = np.random.default_rng(8).normal(size=(4, 5, *shape)).astype(np.float32)
    one_by_one = np.stack([limit_ntk(batch, x[0]) for batch in x])
    mapped = jax.vmap(limit_ntk, (0, None))(jnp.asarray(x), x[0])
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-5, atol=1e-5)
    traced = jax.jit(lambda a, b, rho: limit_ntk(a, b, rho=rho))(x[1], x[0], 1.0)
    np.testing.assert_allclose(traced, one_by_one[1], rtol=1e-5, atol=1e-5)
    assert isinstance(limit_ntk(x[0].tolist() if len(shape) == 1 else x[0]), jax.Array)


def test_dtype_follows_the_input_and_x64_stays_off():
    x = np.arange(6).reshape(2, 3)
    for dtype, expected in (
        (np.float16, np.float32),
        (jnp.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float32),  # x64 is off
        (np.uint8, np.float32),
        (bool, np.float32),
    ):
        assert limit_ntk(x.astype(dtype)).dtype == expected
        assert arccos1(*x.astype(dtype)[:, :1], x.astype(dtype)[0, :1]).dtype == expected
    assert not jax.config.jax_enable_x64
    # A kernel of numbers that half precision holds may be beyond it.
    half = np.full((1, 1), 500, np.float16)
    np.testing.assert_array_equal(limit_ntk(half), limit_ntk(half.astype(np.float32)))
    assert limit_ntk(jnp.asarray(half), half) > 250_000
    wrapped = limit_ntk(np.array([[2**32, 1]]))
    np.testing.assert_allclose(wrapped, limit_ntk(np.array([[2.0**32, 1]])), rtol=1e-6)
    np.testing.assert_allclose(wrapped, 2.3058e19, rtol=1e-4)
    with pytest.raises(InputError, match="^x2 must have squares within float32, got .* 1.18e.21;"):
        limit_ntk(np.ones((1, 2)), np.array([[2**70, 1]], object))


# ---- the limit kernel: derivatives


@pytest.mark.parametrize("shape", [(4,), (3, 2, 2)])
def test_gradients_agree_with_finite_differences(x64, shape):
    """At generic, zero, coincident and opposite inputs; at 0 without bias the mean slope."""
    x1, x2 = inputs(shape, seed=9)
    x2[0] = -x1[2]
    weights = np.random.default_rng(10).normal(size=(3, 2))

    @jax.jit
    def loss(x, rho, beta):
        return jnp.sum(weights * limit_ntk(x, x2, rho=rho, beta=beta, d_out=2))

    step = 1e-6
    cells = [np.eye(x1.size)[i].reshape(x1.shape) * step for i in range(x1.size)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for beta in (0.7, 0.0):
        gradients = gradient(x1, 0.8, beta)
        by_input = [(loss(x1 + e, 0.8, beta) - loss(x1 - e, 0.8, beta)) / (2 * step) for e in cells]
        # Slopes have kinks of size `step` at coincident inputs; rounding adds eps / step.
        np.testing.assert_allclose(gradients[0].ravel(), by_input, atol=2e-6)
        by_rho = (loss(x1, 0.8 + step, beta) - loss(x1, 0.8 - step, beta)) / (2 * step)
        np.testing.assert_allclose(gradients[1], by_rho, atol=2e-6)
        if beta:
            by_beta = (loss(x1, 0.8, beta + step) - loss(x1, 0.8, beta - step)) / (2 * step)
            np.testing.assert_allclose(gradients[2], by_beta, atol=2e-6)
        else:
            assert np.isfinite(gradients[2])


@jax.jit
def weighted_gradient(x1, x2, weights):
    return jax.grad(lambda x: jnp.sum(weights * limit_ntk(x, x2, rho=5.0)))(x1)


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, None])
def test_float32_gradients_agree_with_float64(distance):
    rng = np.random.default_rng(11)
    x = rng.uniform(size=(12, 50))
    x1 = x.astype(np.float32)
    x2 = (x[::-1] if distance is None else near(x, distance)).astype(np.float32)
    weights = rng.normal(size=(12, 12)).astype(np.float32)

    single = np.asarray(weighted_gradient(x1, x2, weights))
    with jax.enable_x64(True):
        double = weighted_gradient(*(a.astype(np.float64) for a in (x1, x2)), weights)
        double = np.asarray(double)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-6 * abs(double).max())


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_independent_of_the_block_size(x64, symmetric):
    x = jnp.asarray(np.random.default_rng(12).normal(size=(9, 3)))
    weights = np.random.default_rng(13).normal(size=(9, 9))

    def gradient(elements):
        def loss(x):
            right = None if symmetric else x[::-1] + x[:1]
            return jnp.sum(weights * limit._limit_ntk(x, right, 1.0, 0.5, 2, 3, elements))

        return jax.jit(jax.grad(loss))(x)

    np.testing.assert_allclose(gradient(24), gradient(10**6), atol=1e-12)


def test_second_derivatives_and_forward_mode(x64):
    x1, x2 = inputs((3,), seed=14)
    slope = jax.jit(jax.grad(lambda x: limit_ntk(x[None], x2[:1])[0, 0]))
    curvature = jax.jit(jax.jacfwd(slope))
    step = 1e-5  # truncation step^2, rounding eps / step
    differences = [(slope(x1[1] + e) - slope(x1[1] - e)) / (2 * step) for e in step * np.eye(3)]
    np.testing.assert_allclose(curvature(x1[1]), differences, atol=1e-8)
    assert np.isfinite(curvature(x2[0])).all()


def test_second_derivative_at_right_angles(x64):
    """Where the absolute value of the correlation has a kink."""
    x = np.eye(3)
    curve = lambda t: limit_ntk(x[:1] + t * x[1:2], x[1:2], beta=0.0)[0, 0]  # noqa: E731
    # even(c) = (1 + c^2 / 2 + ...) / pi, c^2 = t^2 + ..., and n = (1 + t^2)^(1/2).
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(curve)))(0.0), 2 / (6 * np.pi), rtol=1e-12)


# ---- errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x1": np.zeros(3)}, ("x1", "(3,)", "[n, d_in]")),
        ({"x1": np.zeros((2, 3, 4))}, ("x1", "(2, 3, 4)")),
        ({"x1": np.zeros((2, 0))}, ("x1", "(2, 0)")),
        ({"x1": np.array([[1.0, np.nan, 0.0]])}, ("x1", "nan")),
        ({"x1": np.ones((2, 3), complex)}, ("x1", "complex")),
        ({"x1": "digits"}, ("x1", "digits")),
        ({"x2": np.zeros((2, 4))}, ("x2", "(3,)", "(4,)")),
        ({"x2": np.zeros((2, 3, 1, 1))}, ("x2", "(3, 1, 1)")),
        ({"x2": np.array([[np.inf, 0.0, 0.0]])}, ("x2", "inf")),
        ({"rho": -1.0}, ("rho", "-1.0", ">= 0")),
        ({"rho": np.nan}, ("rho", "nan")),
        ({"rho": "wide"}, ("rho", "wide")),
        ({"rho": np.ones(2)}, ("rho",)),
        ({"beta": -0.5}, ("beta", "-0.5", ">= 0")),
        ({"beta": np.inf}, ("beta", "inf")),
        ({"d_out": 0}, ("d_out", "0", "positive")),
        ({"d_out": 1.5}, ("d_out", "1.5")),
        ({"d_out": True}, ("d_out", "True")),
        ({"kernel_size": 4}, ("kernel_size", "4", "odd")),
        ({"kernel_size": -3}, ("kernel_size", "-3", "positive")),
        ({"kernel_size": 3.0}, ("kernel_size", "3.0")),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, words):
    arguments = {"x1": np.ones((2, 3)), "x2": None, **change}
    x1, x2 = arguments.pop("x1"), arguments.pop("x2")
    with pytest.raises(InputError) as caught:
        limit_ntk(x1, x2, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_constants_of_a_traced_function_are_checked():
    bad = np.array([[np.nan, 1.0]])
    for constant in (bad, jnp.asarray(bad)):
        with pytest.raises(InputError, match="x2 must be finite"):
            jax.jit(lambda x, c=constant: limit_ntk(x, c))(np.ones((1, 2), np.float32))
    # What is traced can't be looked at: it runs, and shows in the result.
    assert np.isnan(jax.jit(limit_ntk)(bad)).all()
