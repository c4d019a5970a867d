"""What a flow is said to cost, against what it goes through."""

import dataclasses
import math

import numpy as np
import processes
import pytest

from dnntk import InputError, KernelFlow
from dnntk.infinite_depth import forecast as predict_forecast
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.cost import Problem, Rates, cost
from dnntk.infinite_depth.forecast import forecast
from dnntk.infinite_depth.solvers import Krylov
from dnntk.kernel import limit_ntk

RATES = Rates(
    entries=1e6, recomputed=1e6, product=1e9, basis=1e9, columns=1e6, eigh=1e9, matrix=1e9
)
SIZES = {"outputs": 2, "tests": 7, "times": 1, "iterations": 0, "block_size": 32}


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
    problem = Problem(n, (3,), **SIZES)
    nbytes = flow.gram.nbytes
    assert problem.tiles == kernel.blocks
    assert problem.tiles * problem.tile_entries == pytest.approx(kernel.entries, rel=0.2)
    assert problem.tile_bytes == pytest.approx(nbytes, rel=0.05)


def test_a_matrix_that_is_not_kept_is_computed_for_every_product():
    flow, kernel = _flow(100, memory=1e4)
    steps = flow.solution(10.0).iterations
    problem = Problem(100, (3,), **SIZES | {"iterations": steps, "stored": False})
    assert kernel.blocks == steps * problem.tiles
    once = cost(dataclasses.replace(problem, stored=True), RATES)
    again = cost(problem, RATES)
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
    problem = Problem(200, (3,), **SIZES | {"iterations": most})
    # Two outputs are filled up to a block of eight vectors.
    assert cost(problem, RATES).seconds["eigenvectors"] == sum(d**3 for d in sizes) / 1e9


def test_processes_share_tiles_rows_and_points():
    one = Problem(1000, (3,), **SIZES | {"iterations": 9})
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
    mlp, cnn = (Problem(100, shape, **SIZES) for shape in ((784,), (7, 7, 1)))
    assert 2 * 784 < mlp.entry_operations < 2 * 784 + 100
    assert 49**2 * 20 < cnn.entry_operations < 49**2 * 100


@pytest.fixture
def quick(monkeypatch):
    for name, value in {
        "SECONDS": 0.02,
        "SAMPLE_SECONDS": 0.02,
        "TILED_ROWS": 300,
        "BASIS_ROWS": 600,
        "MATRIX_ROWS": (20, 60),
        "FILE_BYTES": 1 << 12,
    }.items():
        monkeypatch.setattr(predict_forecast, name, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rho": (0.5, 1.0), "times": (10.0,)},
        {"solver": "krylov", "times": (10.0, 1e3), "memory_gb": 1e-4},
        {"solver": "krylov", "times": (math.inf,), "gram_dir": "none/yet"},
    ],
    ids=["search", "recomputed", "in files"],
)
def test_a_prediction_is_told_and_nothing_left(fields, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = forecast(PredictConfig(**fields))
    assert told.problem.stored == ("memory_gb" not in fields)
    assert bool(told.problem.iterations) == ("solver" in fields)
    assert (told.cost.disk > 0) == ("gram_dir" in fields)
    assert 0 < told.choice_seconds < told.total_seconds < math.inf
    assert "a process at the peak" in str(told)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_predicted_is_not_told():
    with pytest.raises(InputError, match="train_examples: expected at most"):
        forecast(PredictConfig(train_examples=10**6))


def test_a_dry_run_writes_nothing(tmp_path):
    done = processes.outcome("predict.py", "--dry_run", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines()]
    names = "data matrix solver memory arithmetic traffic disk time calibrated"
    assert heads == names.split()
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_is_planned(tmp_path):
    cases = {"plan": ["--examples=100000"], "few": ["--examples=100"], "none": ["--nodes=0"]}
    ended = processes.outcomes("plan_gram.py", cases, tmp_path)
    assert [ended[name].returncode for name in cases] == [0, 2, 2], ended
    assert "modelled" in ended["plan"].stdout.splitlines()[0]
    assert all(len(ended[name].stderr.splitlines()) == 1 for name in ("few", "none"))
