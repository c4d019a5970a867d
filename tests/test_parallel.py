import json

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from networks import drawn
from networks import outputs as apply

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, parallel

SHAPES = {
    "mlp": (DeepNarrowMLP, (7, 3), {}),
    "cnn-5x5": (DeepNarrowCNN, (1, 6, 5, 2), {"kernel_size": 5}),
}


def network(kind, depth, scale, shift):
    """A network whose D is no longer zero, and inputs of both signs."""
    make, shape, fields = SHAPES[kind]
    model = make(depth, 2, scale, **fields)
    x = np.random.default_rng(1).standard_normal(shape)
    variables = drawn(model, x, seed=1)
    leaves, tree = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(2)
    made = [leaf + shift * rng.standard_normal(leaf.shape) for leaf in leaves]
    return model, {**variables, "params": jax.tree.unflatten(tree, made)}, x


@pytest.mark.parametrize(
    ("kind", "scale", "chunks", "iterations"),
    [("mlp", 4.0, 4, None), ("cnn-5x5", 4.0, None, None), ("mlp", 0.3, 8, 1)],
)
def test_outputs_and_gradients_are_those_of_the_loop(kind, scale, chunks, iterations, x64):
    """Where sweeps converge, and where they do not."""
    model, variables, x = network(kind, 31, scale, {"mlp": 0.3, "cnn-5x5": 0.03}[kind])
    frozen = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(f):
        return jnp.sum(jnp.sin(f)), f

    def loop(params, x):
        return loss(model.apply({"params": params, **frozen}, x))

    def at_once(params, x):
        numbers = {"iterations": iterations, "depth_chunks": chunks}
        f, report = parallel.outputs(model, {"params": params, **frozen}, x, **numbers)
        return loss(f)[0], (f, report)

    both = [jax.jit(jax.value_and_grad(g, (0, 1), has_aux=True)) for g in (loop, at_once)]
    (_, expected), slopes = both[0](variables["params"], x)
    (_, (found, report)), found_slopes = both[1](variables["params"], x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slopes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10 * largest),
        found_slopes,
        slopes,
    )
    assert report.sequential == (iterations == 1) and report.sweeps == (iterations or report.sweeps)


def test_two_sweeps_at_the_initialization_and_few_near_it(x64):
    del x64
    for shift, most in ((0.0, 2), (0.1, 12)):
        model, variables, x = network("mlp", 3000, 20.0, shift)
        found, report = parallel.outputs(model, variables, x)
        assert int(report.sweeps) <= most
        again, _ = parallel.outputs(model, variables, x)
        np.testing.assert_array_equal(again, found)
        np.testing.assert_allclose(found, apply(model, variables, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({"parametrization": "standard"}, {}, "parametrization"),
        ({}, {"iterations": 0}, "iterations must be a positive integer, got 0"),
        ({}, {"depth_chunks": -1}, "depth_chunks"),
        ({}, {"tolerance": float("nan")}, "tolerance"),
    ],
)
def test_bad_input_is_one_line(fields, given, said):
    model, x = DeepNarrowMLP(5, 1, 2.0, **fields), np.ones((2, 2), np.float32)
    with pytest.raises(InputError, match=said) as error:
        parallel.outputs(model, drawn(model, x), x, **given)
    assert "\n" not in str(error.value)


def test_the_script_counts_sweeps_and_draws(tmp_path):
    small = ("--depths=20,60", "--scales=5", "--steps=20", "--inputs=16", "--workdir=out")
    cases = {"small": small} | {flag: [flag] for flag in ("--scales=x", "--scales=")}
    found = processes.outcomes("parallel_depth.py", cases, tmp_path, first="small")
    code, out, err = found.pop("small")
    assert code == 0, err
    rows = json.loads((tmp_path / "out/parallel_depth.json").read_text())
    assert [row["depth"] for row in rows] == [20, 60] and "times faster" in out
    for row in rows:
        assert not row["by_the_loop"] and 1 < row["sweeps"] < 12
        assert row["error"] < 1e-5
    assert (tmp_path / "out/parallel_depth.png").stat().st_size > 10_000
    for code, _, err in found.values():
        assert code == 2 and "scales: expected numbers" in err
