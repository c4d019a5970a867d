"""What a user sees at work in a notebook: lines, short reprs, names, and what went wrong."""

import logging
import threading

import jax
import numpy as np
import pytest

import dnntk
from dnntk import Dataset, InputError, TrainConfig, train
from dnntk.runtime.log_lines import printed_lines
from dnntk.training.evaluation import constant_loss
from dnntk.training.plan import Job
from dnntk.training.reporting import LEAST_LEARNED, verdict

SMALL = TrainConfig(depth=5, steps=2)
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
    result = train(SMALL, progress=False, verbose=True)
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


def test_the_package_lists_its_public_names_alone():
    assert dir(dnntk) == sorted(dnntk.__all__)
    assert {"InfiniteDepthClassifier", "InfiniteDepthRegressor"} <= set(dir(dnntk))
    assert all(hasattr(dnntk, name) for name in dir(dnntk))


def test_without_compilation_a_run_is_refused_at_once():
    with jax.disable_jit(), pytest.raises(InputError, match="^JAX_DISABLE_JIT: ") as caught:
        train(TrainConfig(depth=10**6), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [(TrainConfig(time=1e300, depth=5), "time"), (TrainConfig(epochs=2**31 - 1, batch_size=9), "")],
)
def test_more_steps_than_can_be_counted_are_refused(config, name):
    job = Job(config, config.model(1), 100, config.batch_size)
    with pytest.raises(InputError, match=f"^{name or 'epochs'}: expected at most"):
        job._steps(0.1)


def test_arguments_without_effect_are_refused():
    with pytest.raises(InputError, match=r"^resume: .*workdir"):
        train(SMALL, resume=True, progress=False)
    with pytest.raises(InputError, match=r"^config: "):
        train({"depth": 5}, progress=False)


def test_learned_is_better_than_the_best_constant():
    y = np.random.default_rng(0).normal(3, 1, (50, 2))
    constant = constant_loss(y, y)
    assert constant == pytest.approx(0.5 * y.var(axis=0).sum())
    for share in (0.0, 1 - 2 * LEAST_LEARNED, 1 - LEAST_LEARNED / 2, 1.0, 2.0):
        found = verdict(share * constant, y, y)
        assert found["constant_loss"] == constant and found["learned"] == (share < 0.95)
    assert verdict(0.0, np.ones((5, 1)), np.ones((5, 1)))["learned"]


def test_a_vanished_kernel_and_a_run_that_learned_nothing_are_said(caplog):
    x = np.random.default_rng(0).random((30, 3))
    data = Dataset(x_train=x, y_train=x[:, 0] > 0.5)
    with caplog.at_level(logging.WARNING, "dnntk"):
        config = TrainConfig(depth=60, steps=5, init="he_uniform")
        result = train(config, dataset=data, progress=False)
        assert not result.summary["learned"]
        said = [record.getMessage() for record in caplog.records]
        assert [line.split(":")[0] for line in said] == ["kernel", "nothing learned"]
        assert "vanished" in said[0] and all("init=deep_narrow" in line for line in said)
        caplog.clear()
        result = train(TrainConfig(depth=60, steps=30), dataset=data, progress=False)
        assert result.summary["learned"] and not caplog.records
