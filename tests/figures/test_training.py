"""Any history, any classes: a run's and a prediction's figures show what there is to show."""

import warnings

import numpy as np
import pytest

from dnntk import figures


def line(step, **changed):
    made = {"step": step, "time": float(step), "train_loss": 0.5, "test_loss": 0.5}
    return made | {"train_accuracy": 0.5, "test_accuracy": 0.5} | changed


NO_TEST = {"test_loss": None, "test_accuracy": None}
HISTORIES = {
    "no line": [],
    "one line": [line(0)],
    "all equal": [line(step) for step in range(3)],
    "no test set": [line(step, **NO_TEST) for step in range(3)],
    "no numbers": [line(step, loss=np.nan, test_loss="inf") for step in range(3)],
    "zeros": [line(step, loss=0.0, test_loss=0.0) for step in range(3)],
    "extremes": [line(step, loss=[1e-320, 1e308, -np.inf][step]) for step in range(3)],
    "no time, no classes": [line(s, time=None, train_accuracy=None, **NO_TEST) for s in range(3)],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_any_history_is_drawn(name, caplog):
    history = HISTORIES[name]
    timed = [line for line in history if line["time"] is not None]
    for figure_of, *shown in (
        (figures.loss_figure, history, "title"),
        (figures.prediction_figure, timed, timed, "trained", "title"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as `draw` has it
            figure = figure_of(*shown)
            figure.set_layout_engine("none")  # it draws everything several times
            figure.draw_without_rendering()


def test_a_series_that_is_not_there_has_no_entry_in_the_legend():
    for history, expected in ((HISTORIES["no test set"], 1), (HISTORIES["all equal"], 2)):
        for axes in figures.loss_figure(history, "").axes:
            assert len(axes.lines) == len(axes.get_legend().get_texts()) == expected


@pytest.mark.parametrize(("k", "numbers", "named"), [(20, 400, 20), (21, 0, 21), (100, 0, 25)])
def test_a_picture_of_many_classes_has_neither_counts_nor_all_names(k, numbers, named):
    axes = figures.confusion_figure(np.eye(k), range(k), "").axes[0]
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(axes.texts) == numbers and len(shown) == named
    assert shown == [str(tick) for tick in np.asarray(axes.get_yticks(), int)]
