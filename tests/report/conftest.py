"""Varied runs, small, and their report."""

import pytest
from report_pages import Page, history, png, spread, trained, write

from dnntk import TrainConfig, figures
from dnntk.report import write_report


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of varied runs, small."""
    folder = tmp_path_factory.mktemp("made")
    runs = folder / "runs"
    one = trained(runs / "mlp-depth1000", 1000)
    figures.draw(one / "loss", figures.loss_figure, history()[2:], "title")
    trained(runs / "mlp-depth200", 200)
    write(runs / "cut-off", config=TrainConfig(arch="cnn").to_json(), metrics=history(3))
    rows = [{"depth": d, "fit": {"exponent": -0.5 * d}, "diverged": d > 5} for d in (3, 30)]
    sweep = write(runs / "sweep", config={"depths": [3, 30]}, summary={"rows": rows, "seconds": 3})
    (sweep / "panels").mkdir()
    (sweep / "panels" / "a_panel.png").write_bytes(png(shade=1))
    inner = write(sweep / "he-depth3", config={"arch": "mlp", "depth": 3}, summary={})
    (inner / "fit.png").write_bytes(png(shade=2))
    measured = {"what": "step <1>", "unit": "s", **spread(0.1, 0.2, 0.4), "promise": "fast"}
    memory = {"what": "peak", "unit": "bytes", **spread(2e9), "promise": None, "met": None}
    beside = {"peer": {"name": "PyTorch loop", **spread(1.0, 2.0, 4.0)}, "ratio": spread(0.1)}
    write(
        runs / "benchmark",
        train_cnn={
            "benchmark": "train_cnn",
            "settings": {"batch": 512},
            "rows": [measured | beside | {"met": False}, memory],
        },
    )
    (folder / "empty").mkdir()
    (folder / "afile").write_text("")
    write_report([runs], folder / "report", progress=False)
    return folder, Page(folder / "report" / "report.html")
