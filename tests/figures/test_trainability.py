"""Every run of figure 4.2 can be told from the others."""

import pytest

from dnntk.experiments.trainability_config import TrainabilityConfig, runs_of
from dnntk.figures.trainability import row_figure, trainability_figure


@pytest.mark.parametrize("archs", [("mlp",), ("mlp", "cnn")])
def test_the_legend_fits_the_picture(archs):
    runs = runs_of(TrainabilityConfig(archs=archs, steps=10))
    rows = [
        {"arch": run.arch, "init": run.init, "lr": run.lr, "ended": "diverged"}
        | {"history": [{"step": 0, "train_loss": 0.5}, {"step": 1, "train_loss": 0.4}]}
        for _, run in runs
    ]
    figure = trainability_figure(rows, dict.fromkeys(archs, 0.45))
    figure.canvas.draw()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == 11  # the kernel's step, 3 initializations, 6 rates, diverged
    assert 0 <= box.x0 and box.x1 <= whole.x1 and 0 <= box.y0 and box.y1 <= whole.y1


def test_an_initialization_of_ones_own_has_a_line_style_too():
    history = [{"step": step, "train_loss": 0.5} for step in range(2)]
    row = {"arch": "mlp", "lr": 0.1, "ended": "finished", "history": history}
    rows = [row | {"init": init} for init in ("deep_narrow", "mine", "he_uniform", "other")]
    axes = trainability_figure(rows, {"mlp": 0.4}).axes[0]
    assert len({line.get_linestyle() for line in axes.lines[:4]}) == 4


def test_a_row_is_in_the_thesis_s_units():
    line = {"step": 4, "time": 2.0, "train_loss": 0.5, "test_accuracy": 0.75}
    start = line | {"step": 0, "time": 0.0, "train_loss": 9.0}
    error, accuracy = row_figure([start, line], [line], (0.03, None), 10, "title").axes
    assert [plot.get_ydata()[0] for plot in error.lines] == [0.1, 0.1, 0.03]  # 2 / d_out of a loss
    assert [plot.get_ydata()[0] for plot in accuracy.lines] == [75, 75]
    assert error.lines[0].get_xdata() == [2.0]  # a logarithmic axis has no start
