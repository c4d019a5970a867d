"""The largest eigenvalue of the network's own kernel, whatever engine and mesh compute it."""

import numpy as np
import pytest
from reference import drawn_network, explicit_kernel, tree_map

from dnntk.training.pipeline import make_mesh
from dnntk.training.step_size import largest_eigenvalue


@pytest.mark.parametrize(
    ("arch", "mesh"), [("mlp", "data:1"), ("cnn", "data:2"), ("mlp", "depth:2")]
)
def test_power_iteration_finds_the_largest_eigenvalue(arch, mesh, x64):
    model, params, frozen, x, _ = drawn_network(arch, examples=11, scale=50.0)
    expected = np.linalg.eigvalsh(explicit_kernel(model, params, frozen, x) / len(x))[-1]
    variables = {"params": params, **frozen}
    found = largest_eigenvalue(model, variables, x, make_mesh(mesh), tolerance=1e-8)
    assert found.converged
    np.testing.assert_allclose(found.value, expected, rtol=1e-6)
    assert found.value <= expected * (1 + 1e-12)


def test_a_vanished_kernel_is_reported_not_divided_by():
    model, params, frozen, x, _ = drawn_network("mlp", init="he_uniform", scale=1.0)
    silent = tree_map(lambda a: np.zeros_like(a, np.float32), {"params": params, **frozen})
    found = largest_eigenvalue(model, silent, 0 * x, make_mesh(""))
    # Only the last bias is left: its kernel is the identity's block of ones over depth.
    np.testing.assert_allclose(found.value, 1 / model.depth, rtol=1e-5)
