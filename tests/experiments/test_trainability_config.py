"""The runs of figure 4.2 and the rows of table 4.1, as configurations."""

import math

import pytest

from dnntk.errors import InputError
from dnntk.experiments.trainability_config import TrainabilityConfig, row_of, runs_of


def test_another_optimizer_has_the_rates_alone():
    config = TrainabilityConfig(
        archs=("mlp",),
        inits=("deep_narrow", "he_uniform"),
        rates=(1e-3, 30.0),
        optimizer="adam",
        scale=1.0,
    )
    runs = dict(runs_of(config))
    assert len(runs) == 2 * 2
    assert {run.optimizer for run in runs.values()} == {"adam"}
    assert {run.lr for run in runs.values()} == set(config.rates)


@pytest.mark.parametrize("preset", ["mlp-4000", "cnn-4000", "cnn-20000-binary"])
def test_a_row_is_the_thesis_s(preset):
    config = row_of(TrainabilityConfig(preset=preset))
    d_out = 10 if config.classes == "all" else 1
    # The published learning rate, whose gradient is 2 / d_out times the thesis's.
    rate = config.time_step / (config.depth * config.scale**2) * d_out / 2
    assert math.isclose(rate, 1e-8 if d_out == 1 else 1e-5)
    assert config.depth == int(preset.split("-")[1])


def test_the_published_readme_s_run_is_in_closed_form_at_its_kernel_time():
    config = row_of(TrainabilityConfig(preset="cnn-12000-binary"))
    # lr x depth x C^2, twice for the published gradient, in 25 steps of each of 1000 epochs
    assert math.isclose(config.time, 1e-8 * 12_000 * 12**2 * 2 * 25 * 1000)
    assert (config.optimizer, config.depth, config.scale) == ("kernel", 12_000, 12.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"time_step": 0.1, "preset": "mlp-4000-small-c"},
        {"preset": "mlp-7"},
        {"archs": ()},
        {"inits": ("xavier",)},
        {"rates": (0.1, -1.0)},
        {"steps": 0},
        {"optimizer": "newton"},
        {"budget_minutes": -1.0},
        {"depth": 1},
    ],
)
def test_bad_settings_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        TrainabilityConfig(**fields)
