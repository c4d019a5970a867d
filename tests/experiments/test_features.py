"""Distances from the limit are those of the definition; Sobol's fall; a run can be resumed."""

import json

import jax
import numpy as np
import processes
import pytest

from dnntk import figures
from dnntk.experiments import features
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.features import QUANTITIES, Distances, compare_features
from dnntk.experiments.features_config import FeaturesConfig

SMALL = FeaturesConfig(
    case="toy", features="sobol", depths=(6, 18, 66), trials=2, examples=6, time=5.0,
    trained_depths=(18,), trained=1,
)  # fmt: skip
FLAGS = (
    *("--case=toy", "--features=sobol", "--depths=6,18,66", "--trials=2", "--examples=6"),
    *("--time=5", "--trained_depths=18", "--trained=1"),
)
BAD_FLAGS = {
    "draw": (["--features=halton"], "features"),
    "depths": (["--depths=2"], "depths"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--seed=1", "--workdir=out", "--resume"], "resume"),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcome) of the script, small, and of the bad flags after it."""
    folder = tmp_path_factory.mktemp("features")
    return folder / "out", *processes.good_and_bad("features.py", FLAGS, BAD_FLAGS, folder)


@pytest.fixture(scope="module")
def found(scripted):
    """The distances that the script left: a finished run is read and not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script draws
        patch.setattr(features, "RandomFeatures", None)
        return compare_features(SMALL, scripted[0], resume=True, progress=False)["toy"]["sobol"]


def test_the_script_leaves_a_picture_and_powers(scripted, found):
    out, outcome, _ = scripted
    assert (out / "features.png").stat().st_size > 10_000
    kept = json.loads((out / "summary.json").read_text())["toy"]["sobol"]
    assert kept["random"]["fit"] == found.fit("random")
    assert kept["kernel"]["distance"]["66"] == found.mean("kernel")[2]
    assert "toy        sobol      random" in outcome.stdout
    difference = found.trained[18]["sgd"] - found.trained[18]["kernel flow"]
    assert kept["training_difference"] >= np.abs(difference).max()


def test_sobol_units_come_nearer_faster_than_independent_ones(found):
    assert all(found.values[name].shape == (3, 2) for name in QUANTITIES)
    assert found.fit("random")["exponent"] < -0.6 and found.fit("kernel")["exponent"] < -0.6
    # Whatever the draw, the first and the last layer leave a part of 1 / depth.
    assert (found.mean("random") < found.mean("kernel"))[1:].all()


def test_trained_networks_predict_what_their_kernel_says(found):
    trained = found.trained[18]
    np.testing.assert_allclose(trained["kernel flow"], found.values["predictions"][1, :1])
    # C = depth^2.2 adds 1 / C = 0.2%; steps of descent add their own error.
    np.testing.assert_allclose(trained["solve"], trained["kernel flow"], atol=0.01)
    np.testing.assert_allclose(trained["sgd"], trained["kernel flow"], atol=0.05)


def test_distances_are_those_of_the_definition():
    with jax.enable_x64(True):
        case = features._Case("toy", 3, SMALL, ExperimentFolder("features", {}, None))
        assert case._key("sobol") == "sobol-3"
        measured = case._measure(6, "sobol")
        units = case._units(6, "sobol")[1]
        x, n = case.all, len(case.x)
        relu = np.einsum("xi,lim->xlm", x, units["middle"]["kernel"]) + units["middle"]["bias"]
        relu = np.maximum(relu, 0).reshape(len(x), -1)
        assert relu.shape == (len(x), 4 * 3)
        first = np.sum(np.maximum(units["first"]["bias"], 0) ** 2)
        kernel = (relu @ relu.T + 5 * (np.maximum(x, 0) @ np.maximum(x, 0).T + 1) + first) / 6
        even = relu @ relu.T / 4 + x @ x.T + 1
        for name, other in (("kernel", kernel), ("random", even)):
            distance = np.linalg.norm(other - case.limit) / np.linalg.norm(case.limit)
            np.testing.assert_allclose(measured[name][1], distance, rtol=1e-9)
        values, vectors = np.linalg.eigh(kernel[:n, :n])
        learnt = (1 - np.exp(-values * SMALL.time / n)) / values
        outputs = kernel[n:, :n] @ vectors @ np.diag(learnt) @ vectors.T @ case.y
        distance = np.linalg.norm(outputs - case.predicted) / np.linalg.norm(case.predicted)
        np.testing.assert_allclose(measured["predictions"][1], distance, rtol=1e-6)


def test_powers_and_the_depth_of_one_percent():
    depths = np.array([10, 100, 1000, 10_000])
    values = np.array([[1.0, 1.0], [0.1, 0.1], [0.001, 0.001], [1e-5, 1e-5]])
    found = Distances(
        "sobol", 1, depths, {"kernel": values, "random": values / 1000, "other": 1 / values}, {}
    )
    np.testing.assert_allclose(found.near("kernel"), 10**2.5)  # halfway on logarithmic scales
    assert found.near("random") is None and found.near("other") is None
    assert -2 < found.fit("kernel")["exponent"] < -1


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[2][name], "features.py", BAD_FLAGS[name][1])
