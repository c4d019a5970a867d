"""A run's steps, evaluations and checkpoints; see also test_run.py."""

import json

import jax
import numpy as np
import pytest

from dnntk import Diverged, TrainConfig, train
from dnntk.runs.checkpoints import Checkpoints


def test_too_large_a_step_stops_with_advice_and_keeps_good_checkpoints(tmp_path):
    config = TrainConfig(depth=20, time_step=0.5, steps=400, eval_every=4, checkpoint_every=1)
    with pytest.raises(Diverged, match="lower the time_step") as caught:
        train(config, tmp_path, progress=False)
    assert "\n" not in str(caught.value) and caught.value.history
    assert "lower the" in json.loads((tmp_path / "diverged.json").read_text())["message"]
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints._manager.restore(kept[-1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))
    assert not (tmp_path / "summary.json").exists()
