"""Measured depths are those of the definition; networks of a predicted depth are that near."""

import json
import math

import numpy as np
import processes
import pytest

from dnntk import figures
from dnntk.experiments import required_depth
from dnntk.experiments.required_depth import DRAWS, Requirement, Trained, required_depths
from dnntk.experiments.required_depth_config import RequiredDepthConfig

SMALL = RequiredDepthConfig(
    datasets=("digits_01",), train_examples=(60,), test_examples=30, times=(1e5,),
    epsilons=(0.1, 0.01), depths=(34,), trials=4, trained=1, samples=256,
)  # fmt: skip
FLAGS = (
    *("--datasets=digits_01", "--train_examples=60", "--test_examples=30", "--times=1e5"),
    *("--epsilons=0.1,0.01", "--depths=34", "--trials=4", "--trained=1", "--samples=256"),
)
BAD_FLAGS = {
    "dataset": (["--datasets=cifar"], "datasets"),
    "taken workdir": (["--workdir=out"], "workdir"),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("required")
    return folder / "out", *processes.good_and_bad("required_depth.py", FLAGS, BAD_FLAGS, folder)


@pytest.fixture(scope="module")
def found(scripted):
    """The requirements that the script left: a finished run is read and not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        patch.setattr(required_depth, "linear_predictions", None)
        return required_depths(SMALL, scripted[0], resume=True, progress=False)["digits_01"][60]


def test_the_script_leaves_a_picture_and_depths(scripted, found):
    out, outcome, _ = scripted
    assert (out / "required_depth.png").stat().st_size > 10_000
    kept = json.loads((out / "summary.json").read_text())
    for row, epsilon, (predicted,) in zip(
        kept["depths"], (0.1, 0.01), found.predicted, strict=True
    ):
        problem = {"data": "digits_01", "examples": 60, "time": 1e5, "epsilon": epsilon}
        assert row.items() >= (problem | {"predicted": predicted}).items()
        measured, low, high = found.measured("sobol", epsilon)[:, 0]
        expected = [float(row[f"measured_sobol{end}"]) for end in ("", "_low", "_high")]
        assert expected == [measured, low, high]
    (same,), (one,) = kept["99% of decisions"], kept["trained"]
    assert float(same["depth_low"]) == found.decided("gaussian")[1, 0]
    assert one["depth"] == found.predicted[0, 0] and one["data"] == "digits_01"
    assert all(f"digits_01 n=60     {line}" in outcome.stdout for line in found.described())


def test_networks_of_the_predicted_depth_are_as_near_as_predicted(found):
    (one,) = found.trained
    assert one.depth == found.predicted[0, 0] < 34 < found.predicted[1, 0]
    linear = found.distances["gaussian"][0, :, 0]
    for draw in DRAWS:
        assert 0.03 < one.distance(draw)[0] < 0.15  # predicted: 0.1
        assert one.distances[draw].shape == one.disagreements[draw].shape == (4,)
    assert (
        0.5
        < np.sqrt(np.mean(linear**2)) * math.sqrt(34 / one.depth) / one.distance("gaussian")[0]
        < 2
    )


def made(distances, disagreements=0.0, depths=(6, 10, 18, 34, 66)):
    """A requirement of networks at these distances [D] at one time: a third nearer, a third not."""
    spread = np.sqrt([0.5, 1.0, 1.5])
    each = np.multiply.outer(distances, spread)[:, :, None]
    shares = np.broadcast_to(np.multiply.outer(disagreements, spread**2)[..., None], each.shape)
    both = (dict.fromkeys(DRAWS, values) for values in (each, shares))
    return Requirement(
        np.array([5.0]), np.array([0.1]), np.ones((1, 1)), np.array(depths), *both, []
    )


def test_a_depth_is_measured_between_two_others_with_an_interval():
    depths = np.array([6, 10, 18, 34, 66])
    found = made(0.5 / np.sqrt(depths), 0.2 / depths)
    depth, low, high = found.measured("gaussian", 0.1)[:, 0]
    np.testing.assert_allclose(depth, 25.0)  # where 0.5 / sqrt(L) is 0.1
    assert 12 < low < 22 and 28 < high < 38
    assert found.measured("sobol", 0.01)[0] == math.inf and found.measured("sobol", 1.0)[0] == 6
    np.testing.assert_allclose(found.decided("gaussian")[0], 20.0)
    np.testing.assert_allclose(found.power("gaussian", 0)["exponent"], -0.5)
    assert [found.shown(d) for d in (6.0, 25.2, math.inf)] == ["<=6", "25", ">66"]


def test_distances_are_relative_and_decisions_are_compared():
    limit = np.array([[[0.6], [0.2]], [[3.0], [-4.0]]])  # two times, two examples
    outputs = np.stack([limit, limit + [[[-0.3], [0.4]], [[0.0], [5.0]]]])
    found = required_depth._compared(outputs, limit)
    sizes = 0.5 / math.hypot(0.6, 0.2), 1.0
    np.testing.assert_allclose(found["distances"], [[0, 0], sizes])
    np.testing.assert_array_equal(found["disagreements"], [[0, 0], [1, 0.5]])


def test_trained_networks_are_summed_up():
    both = {"gaussian": np.array([0.03, 0.04]), "sobol": np.array([0.01, 0.01])}
    one = Trained(0.1, 5.0, 12, both, both)
    np.testing.assert_allclose(one.distance("gaussian"), [math.sqrt(0.00125), 0.03, 0.04])
    sobol = {"distance_sobol": 0.01, "distance_sobol_high": 0.01, "agreement_sobol": 0.99}
    assert one.summary().items() >= sobol.items() and one.summary()["distance_high"] == 0.04


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    outcome = scripted[2][name]
    assert outcome.returncode == 2, outcome.stderr
    line = outcome.stderr.strip()
    assert "\n" not in line and BAD_FLAGS[name][1] in line
