"""Mini-batches, and over how many devices a batch is split."""

import itertools

import numpy as np

from dnntk.training import placement


def test_batches_cover_an_epoch_once_and_depend_on_the_step_alone():
    from_start = list(itertools.islice(placement.mini_batches(23, 5, seed=3), 12))
    for epoch in range(3):
        seen = np.concatenate(from_start[epoch * 4 : epoch * 4 + 4])
        assert len(np.unique(seen)) == 20
    for first in (1, 4, 7):
        resumed = itertools.islice(placement.mini_batches(23, 5, seed=3, first_step=first), 5)
        np.testing.assert_array_equal(list(resumed), from_start[first : first + 5])
    other = next(placement.mini_batches(23, 5, seed=4))
    assert not np.array_equal(other, from_start[0])


def test_small_batches_and_large_networks_stay_on_one_device():
    assert placement.data_mesh(640, 1000).size == 2
    assert placement.data_mesh(640, 1000, threaded=True).size == 1
    assert placement.data_mesh(40, 1000).size == 1
    assert placement.data_mesh(1, 1000).size == 1
    assert placement.data_mesh(640, placement.MAX_REPLICATED_BYTES + 1).size == 1
