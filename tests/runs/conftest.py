"""A finished run, for all tests of this folder."""

import pytest

from dnntk import TrainConfig, train


@pytest.fixture(scope="session")
def small():
    """A configuration of 12 steps and 3 checkpoints."""
    return TrainConfig(depth=8, steps=12, eval_every=4, checkpoint_every=4, batch_size=64)


@pytest.fixture(scope="session")
def run(small, tmp_path_factory):
    """(workdir, result) of a run of ``small``; not to be changed."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    return workdir, train(small, workdir, progress=False)
