"""The CPU library against a network written out in numpy: values, gradients and tangents."""

import math

import jax
import numpy as np
import pytest
from reference import Reference, assert_close, moved_network, tree_map

from dnntk.native import blocks, build, ops
from dnntk.native.blocks import CpuBudget

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not build.available(), reason="needs a C++ compiler"
)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}

# Shape with the batch first, outputs, depth, dtype, fields of the model.
CASES = {
    "rectangle, odd batch": ((33, 5, 8, 2), 3, 20, "float64", {}),
    "one image, 5 x 5": ((1, 7, 7, 1), 1, 9, "float32", {"kernel_size": 5}),
    "5 x 5 on 2 x 3": ((18, 2, 3, 1), 2, 9, "float64", {"kernel_size": 5, "scale": math.inf}),
    "1 x 1, literal": ((20, 4, 3, 1), 1, 12, "float64", {"kernel_size": 1, "literal": True}),
    "12 channels": ((70, 7, 7, 1), 10, 6, "float32", {}),
    "baseline CNN": ((40, 9, 2, 1), 2, 8, "float64", {"init": "he_uniform"}),
    "toy": ((200, 2), 1, 40, "float32", {"negative": True}),
    "digits, baseline": ((47, 64), 1, 7, "float64", {"init": "torch_default", "literal": True}),
    "wide, odd batch": ((37, 130), 3, 9, "float64", {}),
    "wide, few digits matter": ((37, 130), 3, 9, "float64", {"scale": 1e9}),
    "wide, dark pixels": ((37, 130), 3, 9, "float64", {"dark": True}),
    "wide, dark pixels, many examples": ((290, 640), 2, 4, "float32", {"dark": True}),
    "wide, dark pixels in the regime": ((37, 130), 1, 9, "float32", {"dark": True, "scale": 1e5}),
    "wide, dark pixels, C infinite": (
        (130, 255),
        2,
        9,
        "float64",
        {"dark": True, "scale": math.inf},
    ),
    "wide, matrices": ((70, 200), 1, 8, "float64", {"init": "he_uniform", "negative": True}),
    "wide, one example": ((1, 201), 2, 9, "float64", {"init": "he_uniform", "negative": True}),
    "wide, literal": ((5, 301), 10, 7, "float64", {"literal": True, "scale": 30.0}),
    "wide": ((130, 255), 10, 12, "float32", {"scale": math.inf}),
    "wide, many examples, literal": ((300, 131), 5, 7, "float32", {"literal": True}),
    "3 units": ((20, 1), 1, 12, "float64", {}),
    "6 units": ((130, 3), 2, 40, "float64", {"init": "he_uniform", "negative": True}),
    "8 units, many examples": ((70, 5), 2, 40, "float64", {}),
    "66 units, many examples": ((323, 64), 1, 4, "float32", {"init": "he_uniform"}),
    "shallowest": ((3, 5), 2, 3, "float64", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_tangents_are_those_of_the_reference(case, x64):
    model, params, frozen, x, y = moved_network(*CASES[case])
    assert ops.supports(model, params, x)
    tolerance = TOLERANCE[x.dtype.name]
    rng = np.random.default_rng(1)
    weight = rng.uniform(0, 1, len(x)).astype(x.dtype)
    direction = tree_map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), params)
    reference = Reference(model, frozen, x)
    expected = (
        *reference.gradient(params, lambda f: weight[:, None] * (f - y)),
        reference.tangent(params, direction),
    )
    shift = -weight[:, None] * y

    @jax.jit
    def fast(params):
        f, gradient = ops.gradient(model, params, frozen, x, weight, shift, CpuBudget(2))
        along = ops.tangent(model, params, frozen, x, direction, CpuBudget(2))
        return (f, gradient, along), ops.forward(model, params, frozen, x, CpuBudget(2))

    found, outputs = fast(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, outputs))} == {x.dtype}
    assert_close(found, expected, tolerance)
    assert_close(outputs, expected[0], tolerance)
    if "dark" in case:
        d_in = x.shape[1]
        for gradient in (found[1], expected[1]):
            read = np.asarray(gradient["middle"]["kernel"]).any(-1)[:, :d_in]
            lit = read[:, 3::6]
            assert not read[:, ::6].any() and not lit[0].any() and read[:, 1::3].any()
            assert math.isinf(model.scale) or lit[1:].any()
            assert not gradient["middle"]["bias"][:-1, :d_in:6].any()


@pytest.mark.parametrize(
    ("examples", "d_in", "d_out", "scale"),
    [(70, 140, 3, 1e5), (9, 97, 2, 1e5), (300, 129, 40, 1e5), (300, 129, 40, math.inf)],
)
def test_what_rounding_hides_is_left_out_and_nothing_else(examples, d_in, d_out, scale):
    rng = np.random.default_rng(2)
    positive = rng.uniform(0.02, 1, (examples, d_in)).astype(np.float32)
    zero = rng.uniform(size=positive.shape) < 0.5
    model, trained, frozen, _, y = moved_network(
        (examples, d_in), d_out, 20, "float32", {"scale": scale}
    )
    weight = np.ones_like(y[:, 0]) / len(y)

    def blocks(f, gradient):
        """Each kind of unit for itself, though most are 1 / C of the others."""
        by_unit = ((0, d_in), (d_in, d_in + 1), (d_in + 1, None))
        names = ("kernel", "bias")
        parts = [gradient["middle"][name][..., a:b] for name in names for a, b in by_unit]
        ends = [gradient[end][name] for end in ("first", "last") for name in names]
        return f, parts, ends

    def plain(params, x, dtype):
        reference = Reference(model, frozen, x, dtype)
        return blocks(*reference.gradient(params, lambda f: weight[:, None] * (f - y)))

    @jax.jit
    def fast(params, x):
        shift, budget = -weight[:, None] * y, CpuBudget(2)
        found = ops.gradient(model, params, frozen, x, weight, shift, budget)
        return ops.forward(model, params, frozen, x, budget), blocks(*found)

    for size in (1e-3, 1.0, 300.0):
        params = tree_map(lambda p, size=size: (size * p).astype(np.float32), trained)
        for x in (positive, np.where(zero, 0, positive)):
            outputs, found = fast(params, x)
            exact, single = (plain(params, x, dtype) for dtype in (np.float64, np.float32))
            for a, b, c in zip(*map(jax.tree.leaves, (found, single, exact)), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                # In single precision the reference too takes a number near zero for one of the
                # other sign.
                most = 2 * np.linalg.norm(b - c) + 5e-7 * np.linalg.norm(c)
                assert np.linalg.norm(a - c) <= most
            assert_close(outputs, exact[0], 3e-6)


def gradient_of(model, params, frozen, x, y, threads, state_bytes=8 << 20):
    """Outputs and the gradient, of a function that is compiled for this call."""
    weight, budget = np.ones_like(y[:, 0]), CpuBudget(threads, state_bytes=state_bytes)
    call = jax.jit(lambda p: ops.gradient(model, p, frozen, x, weight, -y, budget))
    return jax.device_get(call(params))


@pytest.mark.parametrize(
    ("shape", "depth", "options"),
    [
        *(((150, 3), 70, {}), ((150, 4, 5, 1), 70, {}), ((150, 126), 70, {})),
        *(((290, 126), 12, {}), ((290, 132), 12, {"scale": 1e5})),
        ((150, 126), 70, {"scale": 3e3, "negative": True}),
        ((290, 132), 12, {"dark": True, "scale": 1e5}),
    ],
)
def test_neither_threads_nor_segments_change_a_bit(shape, depth, options, monkeypatch):
    network = moved_network(shape, 1, depth, "float32", options)
    expected = gradient_of(*network, threads=1)
    assert_close(gradient_of(*network, threads=7), expected, 0)
    for name in ("LEAST_STATE_BYTES", "STATE_BYTES_PER_PARAMETER_BYTE"):
        monkeypatch.setattr(blocks, name, 0)
    assert_close(gradient_of(*network, threads=2, state_bytes=0), expected, 0)


@pytest.mark.parametrize(
    ("size", "options", "dtype"),
    [
        pytest.param(0.0, {}, "float32", id="nothing trained"),
        pytest.param(1e-3, {}, "float64", id="little"),
        pytest.param(1.0, {}, "float32", id="much"),
        pytest.param(1.0, {"init": "he_uniform"}, "float32", id="no state like another"),
        pytest.param(1.0, {"init": "he_uniform"}, "float64", id="nor of 64 bits"),
        pytest.param(1e18, {"negative": True}, "float32", id="beyond all bounds"),
    ],
)
def test_a_state_comes_back_as_it_was(size, options, dtype, monkeypatch, x64):
    model, params, frozen, x, y = moved_network((260, 126), 2, 40, dtype, options)
    params = tree_map(lambda p: (size * p).astype(dtype), params)
    of = blocks.Blocks.of

    def gradient(**split):
        # At most as many states as that below the highest of a segment are kept, in fewer bytes.
        monkeypatch.setattr(blocks.Blocks, "of", lambda *shapes: of(*shapes)._replace(**split))
        return gradient_of(model, params, frozen, x, y, threads=2)

    # Two layers together: the state that the higher one read was computed, the other one stored.
    expected = gradient(kept=1, segment=2)
    assert size > 1 or np.isfinite(jax.tree.leaves(expected)[0]).all()
    for kept, segment in ((38, 1), (13, 7), (1, 37)):
        found = gradient(kept=kept, segment=segment)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_the_library_has_no_code_for_runs_in_the_plain_code():
    for shape, options in (((4, 3, 3, 260), {}), ((4, 9, 9, 1), {"kernel_size": 7})):
        model, params, _, x, _ = moved_network(shape, 1, 4, "float32", options)
        assert not ops.supports(model, params, x)
    model, params, _, x, _ = moved_network((4, 3), 1, 4, "float32", {"random_units": 2})
    assert not ops.supports(model, params, x)
    model, params, _, x, _ = moved_network((4, 3), 1, 2, "float32", {})  # no middle layers
    assert not ops.supports(model, params, x)
    model, params, _, x, _ = moved_network((4, 3), 1, 4, "float32", {})
    assert not ops.supports(model, params, x.astype(np.float16))
