"""The workdir of an experiment: its settings, rows, arrays, summary and figures."""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnntk import figures
from dnntk.runs.folder import SUMMARY, RunFolder, as_json, peak_memory_bytes, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ExperimentFolder"]


class ExperimentFolder:
    """The files of one experiment. Without a workdir nothing is written and nothing is read.

    Attributes:
        path: the workdir, or None.
        resumes: whether the workdir holds an unfinished or finished run of the same settings.
        begun: `time.perf_counter` at the start; an experiment that knows the seconds of the runs
            that it resumes takes them off.
    """

    def __init__(
        self,
        experiment: str,
        settings: dict[str, Any],
        workdir: str | os.PathLike[str] | None,
        *,
        resume: bool = False,
        free: Collection[str] = (),
    ) -> None:
        """Claim the workdir for the experiment; `write_config` then writes the first file.

        Args:
            experiment: name of the experiment.
            settings: every field of the configuration.
            workdir: the folder, or None.
            resume: continue the run in the folder.
            free: names of settings whose values may differ from those of the run in the folder.

        Raises:
            InputError: the folder cannot be used, or holds another run.
        """
        self.begun, self.resumes = time.perf_counter(), False
        self._experiment, self._settings = experiment, as_json(settings)
        self._folder = None if workdir is None else RunFolder(workdir)
        self.path: Path | None = None
        self._made: dict[str, dict[str, np.ndarray]] = {}  # without a workdir
        if self._folder is not None:
            self.path = self._folder.path
            named = {"experiment": experiment, **self._settings}
            self.resumes = self._folder.claim(named, resume, free)

    def write_config(self) -> None:
        """Write config.json. Call this after reading the data: bad data then leave no run."""
        if self._folder is not None:
            self._folder.write_config(self._experiment, self._settings)

    def training(self) -> tuple[Path | None, bool]:
        """(workdir, resume) of a training run inside the workdir."""
        if self.path is None:
            return None, False
        inner = RunFolder(self.path / "training")
        return inner.path, inner.holds_run

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows that the resumed run left in ``name``; incomplete lines are dropped."""
        if self._folder is None or not self.resumes:
            return []
        return self._folder.keep_lines(name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line to ``name``, a file of JSON lines."""
        if self._folder is not None:
            self._folder.append(name, row)

    def arrays(
        self, name: str, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The arrays of runs/``name``.npz, or in memory; if missing, ``compute`` makes them."""
        if self.path is None:
            if name not in self._made:
                self._made[name] = compute()
            return self._made[name]
        file = self.path / "runs" / f"{name}.npz"
        if not file.exists():
            self.write_arrays(f"runs/{name}.npz", compute())
        with np.load(file, allow_pickle=False) as saved:
            return dict(saved)

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays to ``name``, an npz file, atomically."""
        if self.path is None:
            return
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".partial.{file.name}")
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(file)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write and return summary.json's content: ``summary``, seconds, peak memory, versions.

        The seconds are those since ``begun``, and so without an earlier process's of a resumed run.
        """
        measured = {
            "seconds": round(time.perf_counter() - self.begun, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
        }
        whole: dict[str, Any] = summary | measured
        if self._folder is not None:
            self._folder.write_json(SUMMARY, as_json(whole))
        return whole

    def draw(self, name: str, make_figure: Callable[..., "Figure"], *args: Any) -> None:
        """Write ``make_figure(*args)`` as ``name``.png and ``name``.pdf."""
        if self.path is not None:
            figures.draw(self.path / name, make_figure, *args)
