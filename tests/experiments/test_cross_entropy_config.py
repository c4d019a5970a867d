"""The configuration of the experiment on cross-entropy refuses what cannot be measured."""

import pytest

from dnntk import InputError
from dnntk.experiments.cross_entropy_config import CrossEntropyConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("smoothings", (1.0,)),
        ("smoothings", (0.1, 0.1)),
        ("smoothings", (-0.1,)),
        ("depths", (1,)),
        ("times", (3.0, 1.0)),
        ("times", ()),
        ("fraction", 1.0),
        ("trials", 0),
        ("classes", "some"),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field}"):
        CrossEntropyConfig(**{field: value})


def test_a_run_has_the_experiments_loss():
    run = CrossEntropyConfig(classes=(3, 5), seed=4).run(0.1)
    assert (run.loss, run.label_smoothing, run.classes, run.seed) == (
        "cross_entropy",
        0.1,
        (3, 5),
        4,
    )
