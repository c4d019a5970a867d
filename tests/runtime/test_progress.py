"""A progress bar never ends the work that it shows."""

import io
import re
import sys
from pathlib import Path

import pytest

from dnntk.runtime.progress import duration, progress_bar

ROOT = Path(__file__).parents[2]


class Failing(io.StringIO):
    """A stream whose writes fail after the first few, as a pipe's do whose reader has gone."""

    def __init__(self, after, error):
        super().__init__()
        self.after, self.error = after, error

    def write(self, text):
        if self.after <= 0:
            raise self.error
        self.after -= 1
        return super().write(text)

    def flush(self):
        if self.after <= 0:
            raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": None,
    "closed": closed(),
    "broken pipe": Failing(0, BrokenPipeError(32, "Broken pipe")),
    "broken later": Failing(3, BrokenPipeError(32, "Broken pipe")),
    "no space": Failing(2, OSError(28, "No space left on device")),
    "any error": Failing(1, RuntimeError("detached")),
    "no stream at all": object(),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_work_goes_on_without_a_stderr_that_can_be_written_to(name, monkeypatch):
    monkeypatch.setattr(sys, "stderr", STREAMS[name])
    assert list(progress_bar(range(20), desc="é", mininterval=0)) == list(range(20))
    with progress_bar(total=3, initial=1, unit="step", mininterval=0) as bar:
        for _ in range(2):
            bar.set_postfix(loss="0.1")
            bar.update(1)
        bar.set_postfix_str("done")


def test_the_work_goes_on_without_stdout_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert sum(progress_bar(range(4))) == 6


def test_a_bar_is_drawn_where_there_is_a_stderr_and_nobody_disabled_it(monkeypatch):
    for disable in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in progress_bar(range(3), desc="steps", disable=disable):
            pass
        assert ("steps: 100%" in stream.getvalue()) == (not disable)


def test_no_other_module_makes_a_bar():
    sources = [*ROOT.glob("dnntk/**/*.py"), *ROOT.glob("scripts/*.py")]
    using = {file.name for file in sources if re.search(r"\btqdm\b", file.read_text())}
    assert using == {"progress.py"}


def test_a_duration_is_in_the_largest_unit_of_which_there_are_two():
    said = {0.0123: "0.0123 s", 119: "119 s", 120: "2 min", 7199: "120 min", 3 * 86400: "3 days"}
    assert {seconds: duration(seconds) for seconds in said} == said
