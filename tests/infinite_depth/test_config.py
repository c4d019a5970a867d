import math

import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.config import DEFAULT_TIMES, PredictConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"times": (0.0,)}, "times: expected numbers above 0"),
        ({"rho": (-1.0,)}, "rho, a standard deviation"),
        ({"beta": ()}, "beta: expected"),
        ({"ridge": math.nan}, "ridge: expected"),
        ({"tolerance": 2.0}, "tolerance: expected"),
        ({"memory_gb": 0.0}, "memory_gb: expected"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"search_examples": 1}, "search_examples: expected at least 2"),
        ({"solver": "lu"}, "solver: expected one of"),
        ({"select": "lo"}, "select: expected one of validation, loo"),
        ({"select": "loo", "validation": 9}, "validation: expected 0, as select=loo"),
        ({"select": "evidence", "ridge": 0.1}, "ridge: expected 0, as select=evidence"),
        ({"select": "loo", "solver": "krylov"}, "solver: expected auto or eigh"),
        ({"dataset": "toy", "arch": "cnn"}, "toy has no images"),
        ({"arch": "cnn", "kernel_size": 2}, "kernel_size"),
    ],
)
def test_bad_values_are_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        PredictConfig(**fields)
    assert "\n" not in str(caught.value)


def test_times_have_a_default_and_infinity_is_text():
    assert PredictConfig().to_json()["times"] == list(DEFAULT_TIMES)
    assert PredictConfig(times=(1.0, math.inf)).to_json()["times"] == [1.0, "inf"]
