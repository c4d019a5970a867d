import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.networks import narrow

SHAPES = {"plain": (), "few networks": (3,), "many networks": (5, 2)}


def arrays(lead):
    rng = np.random.default_rng(0)
    shapes = ((4, 2, 7), (4, 3), (3, 2, 7))
    return [rng.standard_normal((*lead, *shape)) for shape in shapes]


@pytest.mark.parametrize("lead", SHAPES.values(), ids=SHAPES)
def test_both_products_are_the_sums_they_stand_for(lead, x64):
    h, w, g = arrays(lead)
    product, outer = jax.jit(narrow.product)(h, w), jax.jit(narrow.outer)(h, g)
    np.testing.assert_allclose(product, np.einsum("...ipn,...io->...opn", h, w), atol=1e-13)
    np.testing.assert_allclose(outer, np.einsum("...ipn,...opn->...io", h, g), atol=1e-13)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0), (1, 1)])
def test_vmap_is_a_loop(in_axes, x64):
    lead = (3,) if in_axes != (1, 1) else ()
    h, w, g = arrays(lead)
    if in_axes == (1, 1):
        h, w, g = np.stack([h, -h], 1), np.stack([w, w], 1), np.stack([g, g + 1], 1)
    for function, other in ((narrow.product, w), (narrow.outer, g)):
        args = [a[0] if axis is None else a for a, axis in zip((h, other), in_axes, strict=True)]
        found = jax.jit(jax.vmap(function, in_axes))(*args)
        pick = lambda a, axis, i: a if axis is None else np.take(a, i, axis)  # noqa: E731
        for i in range(len(found)):
            one = [pick(a, axis, i) for a, axis in zip(args, in_axes, strict=True)]
            np.testing.assert_allclose(found[i], function(*one), atol=1e-13)


@pytest.mark.parametrize("name", ["product", "outer"])
def test_derivatives_of_both_modes_agree_with_plain_code(name, x64):
    h, w, g = arrays((3,))
    function, other, plain = {
        "product": (narrow.product, w, lambda h, w: jnp.einsum("bipn,bio->bopn", h, w)),
        "outer": (narrow.outer, g, lambda h, g: jnp.einsum("bipn,bopn->bio", h, g)),
    }[name]

    def loss(f, a, b):
        return jnp.sum(jnp.sin(f(a, b)))

    for derivative in (jax.grad, jax.jacfwd):
        found = jax.jit(derivative(lambda a, b: loss(function, a, b), (0, 1)))(h, other)
        expected = jax.jit(jax.grad(lambda a, b: loss(plain, a, b), (0, 1)))(h, other)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    second = jax.jit(jax.hessian(lambda a: loss(function, a, other)))(h)
    expected = jax.jit(jax.hessian(lambda a: loss(plain, a, other)))(h)
    np.testing.assert_allclose(second, expected, atol=1e-12)
