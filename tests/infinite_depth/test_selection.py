import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats

from dnntk import figures
from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.prediction import Prediction, predict
from dnntk.kernel import limit_ntk


def test_kernel_and_time_are_chosen_on_a_validation_split(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    config = PredictConfig(rho=(1.0, 30.0), times=(1.0, 1e4), validation=40, search_examples=60)
    result = predict(config, tmp_path, progress=False)
    lines = [json.loads(text) for text in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [(line["rho"], line["examples"]) for line in lines[:2]] == [(1.0, 60), (30.0, 60)]
    assert lines[2]["examples"] == 200 and len(lines) == 3
    rank = lambda score: (score["accuracy"], -score["loss"])  # noqa: E731
    best = max(lines[:2], key=lambda line: max(map(rank, line["scores"])))
    assert result.summary["rho"] == best["rho"] == lines[2]["rho"]
    assert result.summary["time"] == max(lines[2]["scores"], key=rank)["time"]

    # Resumed, nothing is chosen anew; a score that was cut short is.
    text = (tmp_path / "search.jsonl").read_text()
    (tmp_path / "search.jsonl").write_text(text[:-30])
    again = predict(config, tmp_path, resume=True, progress=False)
    assert again.rows == result.rows
    assert (tmp_path / "search.jsonl").read_text() == text
    with pytest.raises(InputError, match="resume: .* was started with rho"):
        predict(PredictConfig(rho=(2.0,)), tmp_path, resume=True)


def test_kernel_and_time_are_chosen_by_leaving_one_out(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    times = (1.0, 1e4)
    config = PredictConfig(rho=(1.0, 30.0), times=times, select="loo", search_examples=50)
    result = predict(config, tmp_path, progress=False)
    lines = [json.loads(text) for text in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [(line["rho"], line["examples"]) for line in lines] == [(1.0, 50), (30.0, 50)]
    rank = lambda score: (score["accuracy"], -score["loss"])  # noqa: E731
    best = max(lines, key=lambda line: max(map(rank, line["scores"])))
    assert result.summary["rho"] == best["rho"]
    assert result.summary["time"] == max(best["scores"], key=rank)["time"]
    assert len(result.flow.solution(1.0).coefficients) == 240  # nothing is held out

    # The scores are those of what is predicted without each example.
    data = Prediction(config, None, None, progress=False).data
    flow = KernelFlow(limit_ntk, data.x_train[:50], data.y_train[:50], progress=False)
    labels = data.labels_train[:50]
    for score, f in zip(lines[0]["scores"], flow.leave_one_out(times), strict=True):
        assert score["accuracy"] == np.mean((f[:, 0] > 0.5) == labels)
        assert score["loss"] == pytest.approx(0.5 * np.mean((f[:, 0] - labels) ** 2))


def test_kernel_and_ridge_are_chosen_by_evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    config = PredictConfig(
        rho=(0.1, 2.0), times=(10.0,), select="evidence", search_examples=50, train_examples=90
    )
    result = predict(config, tmp_path, progress=False)
    lines = [json.loads(text) for text in (tmp_path / "search.jsonl").read_text().splitlines()]
    evidence = [line["scores"][0]["evidence"] for line in lines]
    (score,) = lines[int(np.argmax(evidence))]["scores"]
    assert result.summary["rho"] == config.rho[int(np.argmax(evidence))]
    assert result.summary["ridge"] == result.flow.ridge == pytest.approx(score["noise"] / 90)
    assert [row["time"] for row in result.rows] == [10.0, float("inf")]
    assert result.summary["time"] == "inf"

    # It is the density of the targets, and no other noise or scale has a larger one.
    data = Prediction(config, None, None, progress=False).data
    x, y = data.x_train[:50].astype(float), data.y_train[:50, 0]
    with jax.enable_x64(True):
        kernel = np.asarray(limit_ntk(x, rho=result.summary["rho"]))

    def density(noise, scale):
        covariance = scale * (kernel + noise * np.eye(50))
        return scipy.stats.multivariate_normal(cov=covariance).logpdf(y) / 50

    noise, scale = score["noise"], score["scale"]
    assert density(noise, scale) == pytest.approx(score["evidence"], abs=1e-6)
    others = [
        (1.3 * noise, scale),
        (noise / 1.3, scale),
        (noise, 1.3 * scale),
        (noise, scale / 1.3),
    ]
    assert max(density(*other) for other in others) < score["evidence"]


def test_infinity_is_left_out_where_the_matrix_is_singular(caplog):
    """Without random weights and biases all that is left is a kernel of rank d_in + 1."""
    config = PredictConfig(rho=(0.0,), beta=(0.0,), times=(100.0, float("inf")))
    result = predict(config, progress=False)
    assert [row["time"] for row in result.rows] == [100.0]
    assert "t = inf is left out: time: expected a finite one, or a ridge" in caplog.text
    with pytest.raises(InputError, match="not positive definite"):
        predict(dataclasses.replace(config, times=(float("inf"),)), progress=False)
