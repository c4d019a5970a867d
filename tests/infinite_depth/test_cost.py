"""The forecast cost of a flow against the cost of the flow itself."""

import dataclasses
import math

import numpy as np
import pytest

from dnntk import KernelFlow
from dnntk.infinite_depth.cost import Rates, Workload, cost
from dnntk.infinite_depth.solvers import Krylov
from dnntk.kernel import limit_ntk

RATES = Rates(
    entries=1e6, recomputed=1e6, product=1e9, basis=1e9, columns=1e6, eigh=1e9, matrix=1e9
)
SIZES = {"d_out": 2, "tests": 7, "times": 1, "iterations": 0, "block_size": 32}


class Counted:
    """A kernel that knows how many entries it was asked for."""

    def __init__(self):
        self.blocks, self.entries = 0, 0

    def __call__(self, x1, x2):
        self.blocks += 1
        self.entries += len(x1) * len(x2)
        return limit_ntk(np.asarray(x1), np.asarray(x2))


def _flow(n, **options):
    rng = np.random.default_rng(0)
    kernel = Counted()
    options = {"block_size": 32, "solver": "krylov", "progress": False, "tolerance": 1e-3} | options
    flow = KernelFlow(kernel, rng.uniform(0, 1, (n, 3)), rng.normal(size=(n, 2)), **options)
    kernel.blocks = kernel.entries = 0
    return flow, kernel


@pytest.mark.parametrize("n", [20, 100, 301])
def test_tiles_are_those_of_the_matrix(n):
    flow, kernel = _flow(n)
    workload = Workload(n, (3,), **SIZES)
    nbytes = flow.gram.nbytes
    assert workload.tiles == kernel.blocks
    assert workload.tiles * workload.tile_entries == pytest.approx(kernel.entries, rel=0.2)
    assert workload.tile_bytes == pytest.approx(nbytes, rel=0.05)


def test_a_matrix_that_is_not_kept_is_computed_for_every_product():
    flow, kernel = _flow(100, memory=1e4)
    steps = flow.solution(10.0).iterations
    workload = Workload(100, (3,), **SIZES | {"iterations": steps, "stored": False})
    assert kernel.blocks == steps * workload.tiles
    once = cost(dataclasses.replace(workload, stored=True), RATES)
    again = cost(workload, RATES)
    assert again.seconds["kernel"] == pytest.approx(steps * once.seconds["kernel"])
    assert again.memory["tiles"] == 0 < once.memory["tiles"]


@pytest.mark.parametrize("most", [1, 2, 7, 12])
def test_the_solver_looks_as_often_as_is_counted(monkeypatch, most):
    sizes, diagonalize = [], Krylov._diagonalize
    monkeypatch.setattr(
        Krylov, "_diagonalize", lambda self: (sizes.append(len(self._small)), diagonalize(self))
    )
    flow, _ = _flow(200, max_iterations=most, tolerance=1e-15)
    assert flow.solution(1e6).iterations == most
    workload = Workload(200, (3,), **SIZES | {"iterations": most})
    # Two outputs are filled up to a block of eight vectors.
    assert cost(workload, RATES).seconds["eigenvectors"] == sum(d**3 for d in sizes) / 1e9


def test_processes_share_tiles_rows_and_points():
    one = Workload(1000, (3,), **SIZES | {"iterations": 9})
    four = dataclasses.replace(one, processes=4)
    assert four.tiles == math.ceil(one.tiles / 4) and four.tile_bytes == one.tile_bytes / 4
    assert cost(one, RATES).traffic == 0
    blocks, answers, points = 2 * 9 * 1000 * 8, 2 * 1000 * 2, 7 * 2
    assert cost(four, RATES).traffic == 3 / 4 * 8 * (blocks + answers + points)
    assert cost(four, RATES).memory["basis"] == cost(one, RATES).memory["basis"] / 4
    stages = ("product", "basis", "prediction")
    alone, shared = (sum(cost(p, RATES).seconds[s] for s in stages) for p in (one, four))
    assert shared == pytest.approx(alone / 4, rel=0.1)


def test_arithmetic_of_an_entry_is_that_of_its_cosines():
    mlp, cnn = (Workload(100, shape, **SIZES) for shape in ((784,), (7, 7, 1)))
    assert 2 * 784 < mlp.entry_operations < 2 * 784 + 100
    assert 49**2 * 20 < cnn.entry_operations < 49**2 * 100
