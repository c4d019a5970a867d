"""The lines of a run, in a notebook and where logging takes them."""

import logging
import threading

import pytest

from dnntk import TrainConfig, train
from dnntk.runtime.log_lines import printed_lines

LOGGER = logging.getLogger("dnntk")


@pytest.fixture
def bare_logging(monkeypatch):
    """The package's logger as in a fresh interpreter; the root's level is WARNING."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "propagate", True)
    before = LOGGER.level
    LOGGER.setLevel(logging.NOTSET)
    yield
    assert not LOGGER.filters and LOGGER.level == logging.NOTSET
    LOGGER.setLevel(before)


def test_a_run_prints_its_lines_where_logging_does_not(bare_logging, capsys):
    result = train(TrainConfig(depth=5, steps=2), progress=False, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    for start in ("network: 5-layer MLP", "data: digits", "time_step: ", "done: train loss"):
        assert sum(line.startswith(start) for line in lines) == 1
    handler = logging.StreamHandler()
    handler.setLevel(logging.CRITICAL)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    with printed_lines(True):
        LOGGER.info("a line that a handler takes")
    LOGGER.setLevel(logging.NOTSET)
    assert capsys.readouterr().out == ""
    assert len(repr(result)) < 500 and "\n" not in repr(result)


def test_threads_print_their_lines_once_and_leave_logging_as_it_was(bare_logging, capsys):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with printed_lines(True):
            inside.set()
            leave.wait(30)
            LOGGER.info("second")

    with printed_lines(True):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        LOGGER.info("first")
    leave.set()
    thread.join()
    LOGGER.info("third")
    assert capsys.readouterr().out == "first\nsecond\n"


def test_warnings_stay_loggings(bare_logging, capsys):
    with printed_lines(True):
        LOGGER.warning("look here")
    assert capsys.readouterr().out == ""
