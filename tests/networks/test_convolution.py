import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.networks.convolution import RowLayout, arrange, convolve, correlate, transpose_filter

SHAPES = [
    (5, 5, 1, 3, 3),
    (4, 6, 2, 3, 5),
    (7, 3, 3, 1, 3),
    (1, 1, 2, 2, 5),
    (2, 9, 1, 1, 1),
    (3, 3, 12, 12, 3),
]


def unpack(layout, h):
    grid = h.reshape(h.shape[0], layout.height, layout.row, h.shape[2])
    return grid[:, :, : layout.width].transpose(3, 1, 2, 0)


@jax.jit
def plain(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.jit, static_argnums=0)
def ours(layout, images, kernel):
    return unpack(layout, convolve(layout.pack(images), arrange(kernel), layout.row))


def example(height, width, c, k, q, dtype, batch=4):
    keys = jax.random.split(jax.random.key(height * width + q), 2)
    images = jax.random.normal(keys[0], (batch, height, width, c), dtype)
    return RowLayout(height, width, q), images, jax.random.normal(keys[1], (q, q, c, k), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_library_convolution(shape, x64):
    layout, images, kernel = example(*shape, jnp.float64)
    np.testing.assert_allclose(ours(layout, images, kernel), plain(images, kernel), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_derivatives_of_both_modes_equal_the_librarys(shape, x64):
    layout, images, kernel = example(*shape, jnp.float64)

    def derivatives(convolution):
        """First by both arguments, second by each, and along a tangent."""

        def loss(images, kernel):
            return jnp.sum(jnp.sin(convolution(images, kernel)))

        def second(n):
            size = lambda *a: jnp.sum(jax.grad(loss, n)(*a) ** 2)  # noqa: E731
            return jax.grad(size, n)(images, kernel)

        tangents = jnp.sin(images), jnp.sin(kernel)
        along = jax.jvp(convolution, (images, kernel), tangents)[1]
        return jax.grad(loss, (0, 1))(images, kernel), second(0), second(1), along

    found = jax.jit(lambda: derivatives(functools.partial(ours, layout)))()
    expected = jax.jit(lambda: derivatives(plain))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())


def test_convolve_and_correlate_are_adjoint(x64):
    layout, images, kernel = example(4, 6, 2, 3, 5, jnp.float64)
    h, w = layout.pack(images), arrange(kernel)
    g = jnp.where(layout.mask[None, :, None], jnp.cos(convolve(h, w, layout.row)), 0)
    inner = jnp.sum(g * convolve(h, w, layout.row))
    by_filter = jnp.sum(w * correlate(g, h, layout.row, layout.kernel_size))
    by_image = jnp.sum(h * convolve(g, transpose_filter(w), layout.row))
    np.testing.assert_allclose([by_filter, by_image], [inner, inner], rtol=1e-12)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (4, None)])
def test_vmap_equals_a_loop(axes, x64):
    layout, images, kernel = example(3, 4, 2, 2, 3, jnp.float64)
    stacked = [
        array if axis is None else jnp.stack([array, 2 * array + 1, -array], axis)
        for array, axis in zip((images, kernel), axes, strict=True)
    ]
    mapped = jax.vmap(functools.partial(ours, layout), axes)(*stacked)
    for i in range(3):
        one = [
            a if axis is None else jnp.take(a, i, axis)
            for a, axis in zip(stacked, axes, strict=True)
        ]
        np.testing.assert_allclose(mapped[i], plain(*one), atol=1e-12)


def test_float32_is_exact_to_rounding():
    layout, images, kernel = example(7, 7, 12, 12, 3, jnp.float32, batch=16)
    exact = plain(np.asarray(images, np.float64), np.asarray(kernel, np.float64))
    error = np.abs(ours(layout, images, kernel) - exact).max()
    assert error < 12 * 9 * np.finfo(np.float32).eps * np.abs(exact).max()
