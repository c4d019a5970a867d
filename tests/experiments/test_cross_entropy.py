"""Trained networks are near the limit on cross-entropy; a run can be resumed."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dnntk import figures
from dnntk.errors import InputError
from dnntk.experiments import cross_entropy
from dnntk.experiments.cross_entropy import Smoothed, measure_cross_entropy
from dnntk.experiments.cross_entropy_config import CrossEntropyConfig

SMALL = CrossEntropyConfig(
    smoothings=(0.1,), depths=(60,), trials=3, examples=5, classes=(0, 1, 2), times=(1.0, 8.0)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("cross_entropy") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # tests/figures draws
        measure_cross_entropy(SMALL, out, progress=False)
    return out


@pytest.fixture(scope="module")
def found(folder):
    """What it measured: a finished run is read and not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)
        patch.setattr(cross_entropy, "Ensemble", None)
        return measure_cross_entropy(SMALL, folder, resume=True, progress=False)[0.1]


def test_the_summary_is_what_was_measured(folder, found):
    kept = json.loads((folder / "summary.json").read_text())["0.1"]
    np.testing.assert_allclose(kept["integral"], found.integral)
    np.testing.assert_allclose(kept["movement"], np.exp(np.log(found.movement).mean(-1)))
    with pytest.raises(InputError, match="^resume: .*seed"):
        measure_cross_entropy(dataclasses.replace(SMALL, seed=1), folder, resume=True)


def test_deep_networks_follow_the_limit_and_keep_their_kernel(found):
    assert found.distance.shape == found.movement.shape == (1, 2, 3)
    assert (1e-4 < found.distance).all() and (found.distance < 0.05).all()
    assert (found.movement < 0.01).all() and (found.movement[:, 1] > found.movement[:, 0]).all()
    assert (found.by_steps < 0.3).all() and found.by_steps[1] < found.by_steps[0]


def test_the_integral_is_that_of_the_derivative():
    with jax.enable_x64(True):
        case = cross_entropy._Case(0.1, SMALL)
        integral = case.integral()
        # A plain descent of tiny steps with the limit's kernel.
        a, step, total = np.zeros_like(case.y), 2e-3, 0.0
        for _ in range(round(SMALL.times[0] / step)):
            slope = case.pointwise.gradient(case.kernel @ a)
            total += step * np.sqrt(np.mean(np.sum(slope**2, 1)))
            a -= step / len(case.x) * slope
    np.testing.assert_allclose(integral[0], total, rtol=5e-3)


def test_powers_are_those_of_depth():
    depths = np.array([10, 100, 1000])
    values = np.tile((depths**-0.5)[:, None, None], (1, 2, 4))
    one = Smoothed(depths, np.array([1.0, 2.0]), values, values**4, np.ones(2), np.ones(2))
    assert one.fit("distance")["exponent"] == pytest.approx(-0.5)
    assert "depth^-2.00" in one.described("movement")
    assert one.summary()["distance_fit"][0]["exponent"] == pytest.approx(-0.5)
