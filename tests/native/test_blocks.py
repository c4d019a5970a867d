"""How a call of the CPU library is split, by shapes alone."""

import numpy as np
import pytest

from dnntk import DeepNarrowMLP
from dnntk.native.blocks import Blocks, CpuBudget


@pytest.mark.parametrize(
    "shape, depth, products",
    [
        ((60, 49), 9, True),
        ((60, 49), 20_000, False),
        ((60, 17), 9, False),
        ((9, 17), 9, True),
        ((2000, 138), 20_000, True),
    ],
)
def test_few_examples_take_the_matrix_products_sooner(shape, depth, products):
    x = np.zeros(shape, np.float32)
    assert (Blocks.for_batch(DeepNarrowMLP(depth, 1, 2.0), x, CpuBudget(2)).number == 0) == products


def test_smaller_budgets_keep_fewer_states():
    split = [
        Blocks.of(10_000, 4, 1, 200, 4, False, CpuBudget(2, state_bytes=b)) for b in (0, 1 << 30)
    ]
    assert split[0].segment < split[1].segment == 10_000
    assert split[0].recomputed(10_000) > 0 == split[1].recomputed(10_000)
    assert split[0].scratch_bytes(10_000, 2) < split[1].scratch_bytes(10_000, 2)
