"""The calls that a process's devices share."""

import collections
import json

import jax
import numpy as np
import processes
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth import gram_matrix
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.gram_matrix import SymmetricGram
from dnntk.kernel import limit_ntk
from dnntk.runtime import devices

X = np.random.default_rng(0).uniform(0, 1, (60, 5))

# A flow on as many devices as the command line says; every tile's device is counted.
CODE = """
import collections, json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import numpy as np
from dnntk import KernelFlow
from dnntk.runtime import devices
from dnntk.kernel import limit_ntk

devices.worth = lambda work, compiling, most: most  # so little work is not worth a device
counts = collections.Counter()

def kernel(x1, x2):
    values = limit_ntk(x1, x2, d_out=3)
    if not isinstance(values, jax.core.Tracer):
        (device,) = values.devices()
        counts[device.id] += 1
    return values

rng = np.random.default_rng(0)
x, y, new = rng.uniform(0, 1, (301, 5)), rng.normal(size=(301, 3)), rng.uniform(0, 1, (70, 5))
found, shares = {}, {}
for memory in (1e9, 4e5):  # the tiles are kept, and computed for every product
    counts.clear()
    flow = KernelFlow(kernel, x, y, solver="krylov", block_size=32, memory=memory, tolerance=1e-3)
    found[f"{memory:g} outputs"] = flow.predict(new, 10.0)
    shares[flow.gram.stored] = sorted(counts.values())
    found[f"{memory:g} gram"] = flow.gram.dense()
np.savez(sys.argv[2], **found)
print(json.dumps(shares))
"""


def test_devices_share_the_tiles_and_change_no_bit(tmp_path):
    cases = {f"{n} devices": [str(n), f"{n}.npz"] for n in (1, 4)}
    ended = processes.outcomes("predict.py", cases, tmp_path, CODE)
    assert [one.returncode for one in ended.values()] == [0, 0], ended
    alone, shared = (np.load(tmp_path / f"{n}.npz") for n in (1, 4))
    for name in alone.files:
        np.testing.assert_array_equal(alone[name], shared[name], err_msg=name)
    one, four = (json.loads(each.stdout.splitlines()[-1]) for each in ended.values())
    for stored, counts in four.items():
        assert len(counts) == 4 and sum(counts) == one[stored][0]
        assert max(counts) <= 1.1 * sum(counts) / 4 + 2, counts


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(devices, "worth", lambda work, compiling, most: most)


def test_results_come_in_order_and_few_ahead(everywhere):
    begun, seen = [], []
    for i, result in enumerate(devices.Devices().map(begun.append, lambda i, _: i, 40)):
        assert result == i
        seen.append(len(begun) - i)
    assert max(seen) <= devices.AHEAD * len(jax.local_devices())
    assert begun == list(range(40))


def test_a_default_device_stays_the_only_one(everywhere):
    used = collections.Counter()

    def begin(i):
        used.update(jax.numpy.zeros(()).devices())

    with jax.default_device(jax.local_devices()[1]):
        list(devices.Devices().map(begin, lambda i, _: i, 9))
    assert used == {jax.local_devices()[1]: 9}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_calls(everywhere, count):
    assert list(devices.Devices().map(lambda i: i, lambda i, j: i + j, count)) == [
        2 * i for i in range(count)
    ]


def test_no_more_devices_than_the_work_is_worth():
    assert devices.worth(work=1.0, compiling=2.0, most=8) == 1
    assert devices.worth(work=60.0, compiling=2.0, most=8) == 5
    assert devices.worth(work=1e5, compiling=2.0, most=8) == 8


def _values(outputs):
    """A kernel of one output, or of several that are coupled."""
    if outputs == 1:
        return limit_ntk
    mix = np.eye(outputs) + 0.1

    return lambda x1, x2: limit_ntk(x1, x2)[:, :, None, None] * mix[None, None]


@pytest.mark.parametrize("outputs", [1, 3])
def test_devices_multiply_what_they_compute(monkeypatch, everywhere, outputs):
    monkeypatch.setattr(gram_matrix, "_device_multiplies", lambda: True)
    cross = CrossKernel(_values(outputs), X, "float64")
    gram = SymmetricGram(cross, block_size=7, stored=False, progress=False)
    full = gram.dense()
    vectors = np.random.default_rng(1).normal(size=(len(full), 4))
    for used in (len(full), 50, 3):
        expected = full[:used, :used] @ vectors[:used]
        np.testing.assert_allclose(gram.product(vectors[:used]), expected, rtol=1e-10)


@pytest.mark.parametrize("there", [False, True])
def test_a_kernel_that_is_not_finite_is_refused_by_a_product(monkeypatch, there):
    monkeypatch.setattr(gram_matrix, "_device_multiplies", lambda: there)

    def kernel(x1, x2):
        return jax.numpy.where(x1[:, :1] * x2[None, :, 0] > 0.9, np.nan, x1 @ x2.T)

    gram = SymmetricGram(
        CrossKernel(kernel, X, "float64"), block_size=7, stored=False, progress=False
    )
    with pytest.raises(InputError, match="kernel: expected finite values"):
        gram.product(np.ones((60, 2)))
