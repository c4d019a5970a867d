"""The forecast of a prediction."""

import math

import processes
import pytest

from dnntk import InputError
from dnntk.infinite_depth import forecast as forecasting
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.forecast import forecast

SHORT = {
    **{"SECONDS": 0.02, "SAMPLE_SECONDS": 0.02, "TILED_ROWS": 300, "BASIS_ROWS": 600},
    **{"MATRIX_ROWS": (20, 60), "FILE_BYTES": 1 << 12},
}
SHORT_SCRIPT = f"""
import runpy, sys
from dnntk.infinite_depth import forecast
vars(forecast).update({SHORT})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def short(monkeypatch):
    """Trials of milliseconds."""
    for name, value in SHORT.items():
        monkeypatch.setattr(forecasting, name, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rho": (0.5, 1.0), "times": (10.0,)},
        {"solver": "krylov", "times": (10.0, 1e3), "memory_gb": 1e-4},
        {"solver": "krylov", "times": (math.inf,), "gram_dir": "none/yet"},
    ],
    ids=["search", "recomputed", "in files"],
)
def test_a_prediction_is_forecast_and_no_file_remains(fields, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = forecast(PredictConfig(**fields))
    assert found.workload.stored == ("memory_gb" not in fields)
    assert bool(found.workload.iterations) == ("solver" in fields)
    assert (found.cost.disk > 0) == ("gram_dir" in fields)
    assert 0 < found.choice_seconds < found.total_seconds < math.inf
    assert "a process at the peak" in str(found)
    assert list(tmp_path.iterdir()) == []


def test_a_choice_without_held_out_examples_diagonalizes_for_each_pair(short):
    found = forecast(PredictConfig(select="loo", rho=(0.5, 1.0), beta=(1.0, 2.0), times=(10.0,)))
    assert found.choice_seconds > 4 * found.cost.seconds["eigenvectors"] > 0


def test_what_cannot_be_predicted_has_no_forecast():
    with pytest.raises(InputError, match="train_examples: expected at most"):
        forecast(PredictConfig(train_examples=10**6))


def test_a_dry_run_writes_nothing(tmp_path):
    flags = {"": ["--dry_run", "--workdir=w"]}
    done = processes.outcomes("predict.py", flags, tmp_path, code=SHORT_SCRIPT)[""]
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines()]
    names = "data matrix solver memory arithmetic traffic disk time calibrated"
    assert heads == names.split()
    assert list(tmp_path.iterdir()) == []
