import dataclasses
import functools

import numpy as np
import pytest

from dnntk.data.datasets import Dataset
from dnntk.infinite_depth import attribution
from dnntk.infinite_depth.attribution import decisions
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.kernel import limit_ntk

SHAPE, TIME = (2, 3, 1), 50.0
RNG = np.random.default_rng(0)
X, NEW = RNG.uniform(0, 1, (30, 6)), RNG.uniform(0, 1, (8, 6))
LABELS, NEW_LABELS = RNG.integers(0, 3, 30), RNG.integers(0, 3, 8)
CODES = np.array([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])  # of own data: neither 0 and 1 nor one-hot


@functools.cache
def _data(classes, targets):
    labels, of_test = LABELS % classes, NEW_LABELS % classes
    known = {"one output": np.arange(classes)[:, None], "one-hot": np.eye(classes), "codes": CODES}
    y = known[targets].astype(float)
    arrays = {"x_train": X, "y_train": y[labels], "x_test": NEW, "y_test": y[of_test]}
    named = {"labels_train": labels, "labels_test": of_test, "classes": tuple("abc"[:classes])}
    data = Dataset("own", **arrays, **named)
    flow = KernelFlow(limit_ntk, X, data.y_train, progress=False)
    return data, flow, (y if targets == "codes" else None)


@pytest.mark.parametrize(("classes", "targets"), [(2, "one output"), (3, "one-hot"), (3, "codes")])
def test_the_contributions_are_those_of_other_targets(classes, targets, monkeypatch):
    monkeypatch.setattr(attribution, "EXAMPLES", 30)
    data, flow, known = _data(classes, targets)
    outputs = flow.predict(NEW, TIME)
    rows = decisions(flow, TIME, data, shape=SHAPE, targets=known)
    assert 2 <= len(rows) <= 4
    codes = np.stack([data.y_train[data.labels_train == c][0] for c in range(classes)])
    for row in rows:
        i = next(i for i in range(8) if np.array_equal(NEW[i].reshape(SHAPE), row.image))
        assert row.name == data.classes[data.labels_test[i]]
        near = np.argsort(((outputs[i] - codes) ** 2).sum(1))
        assert (row.decided, row.second) == tuple(data.classes[c] for c in near[:2])
        assert sum(abs(one.share) for one in row.examples) == pytest.approx(1)
        # A target that moves to the middle between both classes takes its contribution away.
        j = next(j for j in range(30) if np.array_equal(X[j].reshape(SHAPE), row.examples[0].image))
        best, second = codes[near[0]], codes[near[1]]
        y = data.y_train.copy()
        y[j] = (best + second) / 2
        change = (outputs - KernelFlow(limit_ntk, X, y, progress=False).predict(NEW, TIME))[i]
        toward = (data.y_train - (best + second) / 2) @ (best - second)
        total = np.abs(flow.influence(NEW[i : i + 1], TIME)[0] * toward).sum()
        assert row.examples[0].share == pytest.approx(change @ (best - second) / total, rel=1e-6)


def test_mistakes_come_first_and_then_other_classes():
    data, flow, _ = _data(3, "one-hot")
    outputs = np.eye(3)[NEW_LABELS] * RNG.uniform(0.6, 1, (8, 1))
    wrong = 5
    outputs[wrong] = np.roll(outputs[wrong], 1)
    rows = decisions(flow, TIME, data, shape=SHAPE, outputs=outputs)
    assert rows[0].name != rows[0].decided
    assert all(row.name == row.decided for row in rows[1:])
    assert np.array_equal(rows[0].image.ravel(), NEW[wrong])
    assert len({row.name for row in rows[2:]}) == len(rows[2:])


def test_there_is_none_without_images_or_where_it_takes_long(monkeypatch):
    data, flow, _ = _data(3, "one-hot")
    assert decisions(flow, TIME, data, shape=(6,)) == []
    empty = dataclasses.replace(data, x_test=NEW[:0])
    assert decisions(flow, TIME, empty, shape=SHAPE) == []
    krylov = KernelFlow(limit_ntk, X, data.y_train, solver="krylov", progress=False)
    assert len(decisions(krylov, TIME, data, shape=SHAPE)) > 1
    monkeypatch.setattr(attribution, "MOST_READ", 1.0)
    assert decisions(krylov, TIME, data, shape=SHAPE) == []
