"""Depth or width? The question that the thesis's conclusion leaves open, put to an experiment.

`compare` has two parts. The first trains deep narrow networks (C = depth^2.2, the theorems' regime,
and a small fixed C) and two-layer networks of as many parameters by plain full-batch gradient
descent on the same images, and compares both with their limits of infinite depth and width.
The second leaves the kernel regime: at one depth, C falls from depth^2.2 to 1, where features are
learned. It measures accuracy, the kernel's movement, and its alignment with the labels.

A network is called ahead only if it leads by more than twice the combined error of the seeds and
of the test set (see `dnntk.experiments.depth_or_width.findings`).
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dnntk.experiments.depth_or_width.config import DepthOrWidthConfig
from dnntk.experiments.depth_or_width.findings import points, statements
from dnntk.experiments.depth_or_width.runs import ImageData, Row, run
from dnntk.experiments.experiment_folder import ExperimentFolder
from dnntk.experiments.shallow import shallow_limit_ntk
from dnntk.figures.depth_or_width import regime_figure, size_figure
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.kernel import limit_ntk
from dnntk.ntk.measures import alignment
from dnntk.runs import fields
from dnntk.runs.locks import freeing_folders
from dnntk.training.evaluation import split_scores

__all__ = ["DepthOrWidth", "compare"]

log = logging.getLogger("dnntk")

ROWS = "rows.jsonl"
# The limits' curves go on beyond the networks' times, until after their best accuracy.
CURVE_END, CURVE_POINTS = 1e5, 26


@dataclasses.dataclass(frozen=True)
class DepthOrWidth:
    """The result of `compare`.

    Attributes:
        rows: one per network, from `dnntk.experiments.depth_or_width.runs.run`.
        limits: by dataset: ``ratio`` of the clocks, and for "deep" and "wide" the limit's
            ``records`` (as a row's, at the times of both parts), ``curve`` over longer times,
            ``mean_diagonal``, ``lambda_max``, ``alignment``. "linear" is a control: the deep
            limit's kernel without its random features, x.x' + d_out, which can only learn a linear
            function.
        points: means over rows that differ only in their trial.
        statements: the findings, one sentence each.
    """

    rows: list[Row]
    limits: dict[str, dict[str, Any]]
    points: list[Row]
    statements: list[str]

    __repr__ = fields.short_repr


@freeing_folders()
def compare(
    config: DepthOrWidthConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> DepthOrWidth:
    """Train all networks, compute the limits, state and draw the findings.

    Args:
        config: the experiment; None is the default one, on scikit-learn's digits.
        workdir: folder for configuration, rows, summary, figures; None writes nothing.
        resume: keep the finished networks in ``workdir`` and train the others.
        progress: show a progress bar per network.

    Returns:
        Rows, limits, means and statements.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
    """
    config = config or DepthOrWidthConfig()
    folder = ExperimentFolder("depth_or_width", dataclasses.asdict(config), workdir, resume=resume)
    image_data = {name: ImageData(config, name) for name in config.datasets}
    folder.write_config()
    limits = {name: _limits(images, config, progress) for name, images in image_data.items()}
    for name, images in image_data.items():
        log.info("%s", images.description)
        log.info("%s", _limits_line(limits[name], config.times[-1]))
    rows = _rows(config, image_data, limits, folder, progress)
    means = points(rows)
    said = statements(means, limits, {name: len(p.x_test) for name, p in image_data.items()})
    result = DepthOrWidth(rows, limits, means, said)
    measured = {
        "data": {name: images.description for name, images in image_data.items()},
        "training_seconds": sum(r["records"][-1]["seconds"] for r in rows if r["records"]),
    }
    folder.finish(dataclasses.asdict(result) | measured)
    _draw(result, config, folder)
    return result


def _rows(
    config: DepthOrWidthConfig,
    image_data: dict[str, ImageData],
    limits: dict[str, dict[str, Any]],
    folder: ExperimentFolder,
    progress: bool,
) -> list[Row]:
    """One row per setting: read if the workdir has the row, else computed and saved."""
    found = {row["name"]: row | {"scale": _number(row["scale"])} for row in folder.rows(ROWS)}
    settings = config.network_settings()
    for place, setting in enumerate(settings, 1):
        if setting.name in found:
            continue
        row = run(
            setting, image_data[setting.dataset], config, limits[setting.dataset]["ratio"], progress
        )
        folder.append(ROWS, row)
        log.info("%d of %d, %s: %s", place, len(settings), setting.name, _row_line(row))
        found[setting.name] = row
    return [found[setting.name] for setting in settings]


def _number(scale: float | str | None) -> float | None:
    return None if scale is None else float(scale)


def _limits(images: ImageData, config: DepthOrWidthConfig, progress: bool) -> dict[str, Any]:
    """The limits of one dataset: records at the networks' times by either clock, and curves."""
    options: dict[str, Any] = {"rho": config.rho, "beta": config.beta}
    kernels: dict[str, Callable[..., jax.Array]] = {
        "deep": partial(limit_ntk, d_out=images.y.shape[1], **options),
        "wide": partial(shallow_limit_ntk, **options),
        "linear": lambda x1, x2=None: x1 @ (x1 if x2 is None else x2).T + images.y.shape[1],
    }
    at = sorted({*config.times, config.regime_time})
    sizes = {name: _mean_diagonal(kernel, images.x) for name, kernel in kernels.items()}
    ratio = sizes["deep"] / sizes["wide"]
    found: dict[str, Any] = {"ratio": ratio}
    for name, kernel in kernels.items():
        flow = KernelFlow(kernel, images.x, images.y, progress=progress)
        clocks = {"equal": 1.0} | ({"matched": ratio} if name == "wide" else {})
        times = np.geomspace(config.times[0], max(CURVE_END, config.times[-1]), CURVE_POINTS)
        with jax.enable_x64(True):
            probed = kernel(images.probes.astype(np.float64))
            aligned = float(alignment(probed, images.probe_labels, centred=True))
        found[name] = {
            "mean_diagonal": sizes[name],
            "lambda_max": float(flow.eigenvalues[-1]),
            "alignment": aligned,
            "records": [
                {"clock": clock, **line, "time": t}
                for clock, factor in clocks.items()
                for t, line in zip(
                    at, _scores_at(flow, images, [t * factor for t in at]), strict=True
                )
            ],
            "curve": _scores_at(flow, images, times.tolist()),
        }
    return found


def _scores_at(flow: KernelFlow, images: ImageData, times: list[float]) -> list[Row]:
    tested, trained = flow.predict(images.x_test, times), flow.train_predictions(times)
    return [
        {"time": t}
        | split_scores("test", test, images.y_test, True)
        | split_scores("train", train, images.y, True)
        for t, test, train in zip(times, tested, trained, strict=True)
    ]


def _mean_diagonal(kernel: Callable[..., jax.Array], x: np.ndarray, block: int = 256) -> float:
    parts = [x[i : i + block] for i in range(0, len(x), block)]
    return float(np.mean(np.concatenate([np.diag(kernel(part)) for part in parts])))


def _limits_line(limits: dict[str, Any], last: float) -> str:
    accuracies = ", ".join(
        f"{name} {100 * line['test_accuracy']:.1f}% ({line['clock']} clock)"
        for name in ("deep", "wide")
        for line in limits[name]["records"]
        if line["time"] == last
    )
    sizes = " and ".join(f"{limits[name]['mean_diagonal']:.3g}" for name in ("deep", "wide"))
    return (
        f"limits at t = {last:g}: {accuracies}; mean diagonals {sizes}, matched clock "
        f"t x {limits['ratio']:.3g}"
    )


def _row_line(row: Row) -> str:
    if row["diverged"]:
        return f"diverged with every time_step down to {row['time_step']:.3g}"
    halved = f", step halved {row['halvings']} times" if row["halvings"] else ""
    lines = [line for line in row["records"] if "movement" in line]
    seen = "; ".join(
        f"test {100 * line['test_accuracy']:.1f}% at t = {line['time']:g} ({line['clock']} clock), "
        f"kernel moved {100 * line['movement']:.2g}%, {line['seconds']:.0f} s"
        for line in lines
    )
    return seen + halved


def _draw(result: DepthOrWidth, config: DepthOrWidthConfig, folder: ExperimentFolder) -> None:
    sized = (result.points, result.limits, config.times[-1], config.small_scale)
    folder.draw("depth-or-width", size_figure, *sized)
    regime = [point for point in result.points if point["part"] == "regime"]
    if any(np.isfinite(point["scale"]) for point in regime):  # else all of them diverged
        name = config.datasets[0]
        title = f"{name}, depth {config.regime_depth}, t = {config.regime_time:g}"
        shown = (regime, result.limits[name], config.regime_time, title)
        folder.draw("regime", regime_figure, *shown)
