"""Kernels with known features: the same flow without the Gram matrix."""

import logging

import numpy as np
import pytest
from networks import drawn

from dnntk import DeepNarrowCNN, DeepNarrowMLP, KernelFlow
from dnntk.infinite_depth import feature_gram
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.feature_gram import FeatureGram
from dnntk.infinite_depth.gram_matrix import SymmetricGram
from dnntk.infinite_depth.spectral_filter import SpectralFilter
from dnntk.ntk import random_features
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runtime import processes

FLOWS = [(1.0, 0.0), (1e2, 0.0), (1e4, 0.0), (1e3, 1e-4), (np.inf, 1e-4)]


def problem(model, shape, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 1, shape), rng.normal(size=(shape[0], model.d_out))
    return RandomFeatures(model, drawn(model, x, seed)), x, y


def dense(kernel, x, y, time, ridge):
    """Coefficients and outputs of the flow by NumPy."""
    matrix = np.asarray(kernel(x, x)) / len(x)
    values, vectors = np.linalg.eigh(matrix)
    gains = SpectralFilter(time, ridge)(np.maximum(values, 0))
    coefficients = vectors @ (gains[:, None] * (vectors.T @ y))
    return coefficients / len(x), matrix @ coefficients


@pytest.mark.parametrize(
    ("model", "shape", "solver"),
    [
        (DeepNarrowMLP(20, 3, np.inf), (70, 4), "auto"),
        (DeepNarrowMLP(20, 3, np.inf), (70, 4), "krylov"),
        (DeepNarrowCNN(4, 2, 30.0, pool=2), (90, 4, 6, 1), "krylov"),
    ],
)
def test_flows_are_those_of_the_dense_matrix(model, shape, solver, x64, monkeypatch):
    monkeypatch.setattr(random_features, "BLOCK_ELEMENTS", 1000)  # a few units at a time
    monkeypatch.setattr(random_features, "PART_BLOCKS", 2)
    monkeypatch.setattr(feature_gram, "EXPECTED_PRODUCTS", 0)
    monkeypatch.setattr(feature_gram, "BLOCK_ROWS", 32)
    monkeypatch.setattr(feature_gram, "HELD_BYTES", 1 << 15 if model.d_out == 3 else 0)
    kernel, x, y = problem(model, shape)
    flow = KernelFlow(kernel, x, 2 * y, solver=solver, tolerance=1e-10, progress=False)
    gram = flow.gram
    assert isinstance(gram, FeatureGram) and gram.diagonalized == (solver == "auto")
    flow.solution(1.0)
    for time, ridge in FLOWS:
        flow = flow.for_targets(y, ridge=ridge)
        coefficients, outputs = dense(kernel, x, y, time, ridge)
        found = flow.solution(time)
        np.testing.assert_allclose(found.coefficients, coefficients, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(flow.train_predictions(time), outputs, atol=1e-9)
        expected = 0.5 * np.sum((y - outputs) ** 2) / len(x)
        np.testing.assert_allclose(flow.loss(time), expected, rtol=1e-7)


def test_processes_share_the_layers(x64, monkeypatch):
    monkeypatch.setattr(random_features, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(random_features, "PART_BLOCKS", 2)
    kernel, x, y = problem(DeepNarrowMLP(40, 2, np.inf), (30, 2))
    gram = FeatureGram(
        CrossKernel(kernel, x, "float64"), kernel, diagonalized=False, progress=False
    )
    monkeypatch.setattr(processes, "count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        shares.append(gram.product(y))
    assert all(np.linalg.norm(share) > 0 for share in shares)
    np.testing.assert_allclose(sum(shares), kernel(x, x) @ y, rtol=1e-12)


def test_float32_features_keep_long_times(monkeypatch):
    """Products in float32 would be 1e-3 wrong here."""
    monkeypatch.setattr(feature_gram, "EXPECTED_PRODUCTS", 0)
    kernel, x, y = problem(DeepNarrowMLP(60, 1, np.inf), (50, 3))
    options = {"solver": "krylov", "progress": False}
    half, full = (KernelFlow(kernel, x, y, dtype=d, **options) for d in ("float32", "float64"))
    gap = half.train_predictions(1e4) - full.train_predictions(1e4)
    assert np.linalg.norm(gap) < 1e-5 * np.linalg.norm(y)


def test_without_enough_features_infinite_time_needs_a_ridge():
    kernel, x, y = problem(DeepNarrowMLP(5, 1, np.inf), (30, 2))
    with pytest.raises(ValueError, match="time: expected a finite one, or a ridge"):
        KernelFlow(kernel, x, y, progress=False).predict(x)


def test_the_choice_is_by_operations_and_said(caplog, monkeypatch):
    monkeypatch.setattr(feature_gram, "MAX_EIGH_ROWS", 10)
    kernel, x, y = problem(DeepNarrowMLP(40, 1, np.inf), (30, 2))

    def chosen(expected, **options):
        caplog.clear()
        monkeypatch.setattr(feature_gram, "EXPECTED_PRODUCTS", expected)
        with caplog.at_level(logging.INFO, "dnntk"):
            options = {"solver": "krylov", "progress": False} | options
            return type(KernelFlow(kernel, x, y, **options).gram), caplog.text

    kind, said = chosen(1e9)
    assert (
        kind is SymmetricGram and "gram: formed" in said and "30 examples with 44 features" in said
    )
    kind, said = chosen(1e9, memory=10.0)
    assert kind is FeatureGram and "gram: multiplied" in said and "not fit into memory" in said
    kind, said = chosen(0.0)
    assert kind is FeatureGram and "gram: multiplied" in said and "memory" not in said
    assert chosen(0.0, solver="eigh")[0] is SymmetricGram


def test_a_saved_flow_goes_on_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_gram, "EXPECTED_PRODUCTS", 0)
    kernel, x, y = problem(DeepNarrowMLP(40, 1, np.inf), (30, 2))
    options = {"solver": "krylov", "folder": tmp_path, "progress": False}
    first = KernelFlow(kernel, x, y, **options).solution(10.0)
    monkeypatch.setattr(FeatureGram, "product", lambda *_: pytest.fail("computed again"))
    again = KernelFlow(kernel, x, y, **options).solution(10.0)
    np.testing.assert_array_equal(first.coefficients, again.coefficients)
