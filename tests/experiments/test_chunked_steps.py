"""Steps in few calls: every stop is met, and quick calls grow."""

import pytest

from dnntk.experiments import chunked_steps as module
from dnntk.experiments.chunked_steps import chunked_steps


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_every_stop_ends_a_call_and_only_quick_calls_grow(seconds, monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def take_steps(count):
        clock[0] += seconds
        calls.append(count)
        return 0.5

    found = list(chunked_steps(take_steps, [4, 7, 40], "label", False, first=1))
    steps = [step for step, _ in found]
    assert {4, 7, 40} <= set(steps) and steps == sorted(steps) and sum(calls) == 39
    assert all(loss == 0.5 for _, loss in found)
    assert max(calls) == (1 if seconds else 16)
