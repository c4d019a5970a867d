import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, to_standard
from dnntk.lyapunov import measure


def case(d_out, parametrization="ntk", depth=6, scale=9.0, arch="mlp"):
    kind, shape = {"mlp": (DeepNarrowMLP, (4, 2)), "cnn": (DeepNarrowCNN, (2, 2, 3, 1))}[arch]
    x = np.random.default_rng(1).uniform(0.1, 1.0, shape)
    model = kind(depth, d_out, scale, parametrization=parametrization)
    variables = drawn(model, x, seed=3)
    rng = np.random.default_rng(7)
    size = 6.0 if parametrization == "ntk" else 0.3
    moved = jax.tree.map(lambda p: p + size * rng.standard_normal(p.shape), variables["params"])
    return model, variables, {**variables, "params": moved}, x


def dense(layer, height, width):
    """A convolution, zero-padded, as a matrix from and to [pixels of channel 1, of 2, ...]."""
    kernel, reach = layer["kernel"], layer["kernel"].shape[0] // 2
    channels, pixels = kernel.shape[2:], np.indices((height, width)).reshape(2, -1).T
    matrix = np.zeros((channels[0], len(pixels), channels[1], len(pixels)))
    for i, to in enumerate(pixels):
        for j, read in enumerate(pixels):
            dy, dx = read - to + reach
            if 0 <= dy <= 2 * reach and 0 <= dx <= 2 * reach:
                matrix[:, j, :, i] = kernel[dy, dx]
    matrix = matrix.reshape(channels[0] * len(pixels), -1)
    return {"kernel": matrix, "bias": np.repeat(layer["bias"], len(pixels))}


def literal_layers(model, variables, x):
    """The matrices and biases of all layers, of flat inputs, and the number of pixels."""
    params = jax.tree.map(np.asarray, to_standard(model, variables)[1]["params"])
    layers = [params["first"]]
    layers += [{k: a[i] for k, a in params["middle"].items()} for i in range(model.depth - 2)]
    layers.append(params["last"])
    if x.ndim == 2:
        return layers, 1
    pixels = x.shape[1] * x.shape[2]
    layers = [dense(layer, *x.shape[1:3]) for layer in layers]
    average = np.repeat(np.eye(model.d_out), pixels, axis=0) / pixels
    return [*layers[:-1], {name: a @ average for name, a in layers[-1].items()}], pixels


def by_the_book(model, variables, trained, x):
    """Section 3.3 term by term, in NumPy, from the literal matrices."""
    depth, scale = model.depth, model.scale
    times = []
    for v in (variables, trained):
        layers, pixels = literal_layers(model, v, x)
        f, h = [None], np.moveaxis(x, -1, 1).reshape(len(x), -1)
        for layer in layers:
            f.append(h @ layer["kernel"] + layer["bias"])
            h = np.maximum(f[-1], 0)
        times.append(([None] + [layer["kernel"].T for layer in layers], f))

    def w(time, j, k, i):  # the product of layers k to j at x_i
        matrices, f = times[time]
        product = np.eye(matrices[k].shape[1])
        for layer in range(k, j + 1):
            product = matrices[layer] @ np.diag((f[layer - 1][i] > 0) * 1.0) @ product
        return product * (np.sqrt(pixels) if j == depth else 1)

    def norm(of_x):
        return np.sqrt(np.mean([np.linalg.norm(of_x(i), 2) ** 2 for i in range(len(x))]))

    def both(of_time):
        return norm(lambda i: of_time(0, i)) + norm(lambda i: of_time(1, i) - of_time(0, i))

    hidden = range(1, depth)
    phi_terms = np.array([both(lambda t, i, j=j: times[t][1][j][i]) for j in hidden])
    phi_terms = phi_terms / np.sqrt(pixels)  # a mean over pixels
    phi = [np.sum(phi_terms**j) / ((depth - 1) * scale**j) for j in range(1, 9)]
    above = range(2, depth + 1)
    psi_8 = sum(both(lambda t, i, k=k: w(t, depth, k, i)) ** 8 for k in above) / (depth - 1)
    psi_2 = (
        sum(
            (depth - 1)
            / (j - 1)
            * sum(both(lambda t, i, j=j, k=k: w(t, j, k, i)) ** 2 for k in range(2, j + 1))
            for j in above
        )
        / (depth - 1) ** 2
    )
    changed = np.mean([(times[0][1][j] > 0) != (times[1][1][j] > 0) for j in hidden])
    before, after = (np.array(f[1:depth]).reshape(depth - 1, len(x), -1, pixels) for _, f in times)
    kinds = np.split(np.arange(before.shape[2]), [x.shape[-1], x.shape[-1] + 1])
    movement = [np.abs(after - before)[:, :, kind].max() for kind in kinds]
    distance = [np.abs(after)[:, :, kind].min() for kind in kinds]
    return np.array(phi), psi_2, psi_8, changed, movement, distance


measured = jax.jit(measure, static_argnums=0)


@pytest.mark.parametrize(
    ("d_out", "parametrization", "arch"),
    [(3, "standard", "mlp"), (1, "ntk", "cnn")],
)
def test_agrees_with_section_3_3_term_by_term(d_out, parametrization, arch, x64):
    model, variables, trained, x = case(d_out, parametrization, arch=arch)
    found = measured(model, variables, trained, x)
    phi, psi_2, psi_8, changed, movement, distance = by_the_book(model, variables, trained, x)
    np.testing.assert_allclose(found.phi, phi, rtol=1e-10)
    np.testing.assert_allclose(found.psi_2, psi_2, rtol=1e-10)
    np.testing.assert_allclose(found.psi_8, psi_8, rtol=1e-10)
    np.testing.assert_allclose(found.gamma, phi.sum() + psi_2 + psi_8, rtol=1e-10)
    np.testing.assert_allclose(found.sign_changes, changed, rtol=1e-12)
    np.testing.assert_allclose(found.movement, movement, rtol=1e-10)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-10)
    assert changed > 0


def test_at_initialization_the_last_product_is_an_identity_and_nothing_has_moved(x64):
    model, variables, _, x = case(2, depth=30)
    found = measured(model, variables, variables, x)
    np.testing.assert_allclose(found.psi_8, 1.0, rtol=1e-12)  # [0 0 I] at every layer
    assert found.sign_changes == 0
    # The inputs and the ones in units of C, and the random neuron: E|f|^2 = |x|^2 + d_out + var.
    squares = np.sum(x**2, 1) + 2 + np.sum(x**2, 1) / 2 + 1
    assert abs(float(found.phi[1]) / squares.mean() - 1) < 0.3


def test_without_psi_2_the_rest_stays_and_the_scale_may_be_infinite(x64):
    model, variables, trained, x = case(1, scale=np.inf)
    jitted = jax.jit(measure, static_argnums=0, static_argnames="psi_2")
    found = jitted(model, variables, trained, x, psi_2=False)
    assert np.isnan(found.psi_2)
    np.testing.assert_allclose(found.gamma, found.phi.sum() + found.psi_8, rtol=1e-12)
    np.testing.assert_allclose(found.psi_8, 1.0, rtol=1e-12)
    with pytest.raises(InputError, match="finite scale"):
        measure(model, variables, trained, x)


def test_many_networks_at_once_by_vmap(x64):
    model, variables, trained, x = case(1)
    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), variables, trained)
    found = jax.jit(jax.vmap(lambda v: measure(model, variables, v, x)))(pair)
    for i, v in enumerate((variables, trained)):
        one = measured(model, variables, v, x)
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-10)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="expected a DeepNarrowMLP or DeepNarrowCNN.* got object"):
        measure(object(), {}, {}, np.ones((2, 2)))
    model, variables, trained, x = case(1)
    with pytest.raises(InputError, match="x must be finite"):
        measure(model, variables, trained, x * np.nan)
