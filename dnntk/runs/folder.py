"""The folder of a run: configuration, metrics, summary. Every file is whole at any moment."""

import json
import logging
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dnntk.errors import InputError
from dnntk.runs.locks import LOCK, FolderLock
from dnntk.runs.paths import as_path, make_folder
from dnntk.runtime import processes

__all__ = [
    *("CONFIG", "DIVERGED", "METRICS", "SUMMARY", "RunFolder", "as_json", "metrics_line"),
    *("parsed", "peak_memory_bytes", "replace_json", "resident_bytes", "versions"),
]

log = logging.getLogger("dnntk")

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
# Says that a run diverged, and why: a resumed run would diverge again.
DIVERGED = "diverged.json"


class RunFolder:
    """Reads and writes the files of a run in its workdir; only the primary process writes."""

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Name the folder, without reading or writing anything.

        Raises:
            InputError: ``workdir`` is no path.
        """
        self.path = as_path("workdir", workdir)
        self._made: list[Path] = []
        self._lock: FolderLock | None = None

    def make(self) -> None:
        """Make the folder if it is missing.

        Raises:
            InputError: it cannot be made, or is not a folder that can be written to.
        """
        self._made = [p for p in (self.path, *self.path.parents) if not os.path.lexists(p)]
        make_folder("workdir", self.path)
        if not os.access(self.path, os.W_OK):
            raise InputError(f"workdir: expected a folder that can be written to, got {self.path}")

    @property
    def holds_run(self) -> bool:
        """Has a run been started here?"""
        return (self.path / CONFIG).exists()

    @property
    def ended(self) -> bool:
        """Did the run finish or diverge?"""
        return any((self.path / name).exists() for name in (SUMMARY, DIVERGED))

    @property
    def vacant(self) -> bool:
        """Is the folder missing, or does it hold only leftovers of a run killed at its start?"""
        try:
            return all(map(_is_leftover, os.listdir(self.path)))
        except OSError as error:
            return isinstance(error, FileNotFoundError)

    def claim(self, config: dict[str, Any], resume: bool, free: Collection[str] = ()) -> bool:
        """Lock the folder for a run of ``config``, and check what it holds.

        The lock lasts as long as this object; a folder that was made for the run and is empty at
        the end is removed. All processes of a job must call this method.

        Args:
            config: the run's configuration, as JSON holds it.
            resume: True expects a run of ``config`` or no run in the folder, False no run.
            free: fields of ``config`` that may differ from the saved ones.

        Returns:
            Is there a run to continue? Without one, ``resume`` starts it: a job may be stopped
            before it writes anything, and is then submitted again by the same command.

        Raises:
            InputError: the folder cannot be used, holds another run, or is used by another process.
        """
        starts = not resume or bool(processes.broadcast(int(self.vacant)))
        saved = None if starts else self.read_config()
        if processes.is_primary():
            if starts:
                self.make()
            self._lock = FolderLock(self.path, self._made)
        if saved is None:
            if processes.is_primary() and self.holds_run:
                raise InputError(
                    f"workdir: expected one without a run, {self.path} holds one; "
                    "give resume=True to go on with it, or choose another"
                )
            if resume:
                log.info("resume: %s holds no run yet; starting one", self.path)
            return False
        for name, value in json.loads(json.dumps(config)).items():
            if name not in free and saved.get(name, value) != value:
                raise InputError(
                    f"resume: {self.path} was started with {name}={saved[name]}, got {value}; "
                    "leave it out, or use another workdir"
                )
        return True

    def write_config(self, experiment: str, config: dict[str, Any]) -> None:
        """Write config.json: which experiment the run is, its settings, and the versions in use."""
        self.write_json(CONFIG, {"experiment": experiment, **config, "versions": versions()})

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write ``content`` to the file ``name``, as `replace_json` does."""
        if processes.is_primary():
            replace_json(self.path / name, content)

    def read_config(self, argument: str = "resume") -> dict[str, Any]:
        """The content of `CONFIG`; ``argument`` named the folder, for messages.

        Raises:
            InputError: no run was started here, or the file is damaged.
        """
        file = self.path / CONFIG
        try:
            content = parsed(file.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{argument}: expected a run in {self.path}, found no {CONFIG}; give the workdir "
                f"of one, or leave {argument} out"
            ) from None
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise InputError(f"{argument}: expected JSON in {file}, found something else")
        return content

    def keep_metrics_to(self, step: int) -> list[dict[str, Any]]:
        """Drop the metrics after ``step`` and all damaged lines; return the remaining ones."""

        def kept(line: dict[str, Any]) -> bool:
            numbers = (line.get(name) for name in ("step", "train_loss", "seconds"))
            return all(type(n) in (int, float) for n in numbers) and line["step"] <= step

        return self.keep_lines(METRICS, kept)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line of JSON to the file ``name``, on disk before this returns."""
        if not processes.is_primary():
            return
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_lines(
        self, name: str, kept: Callable[[dict[str, Any]], bool] = lambda line: True
    ) -> list[dict[str, Any]]:
        """Drop the lines of the file ``name`` that are damaged or not ``kept``; return the rest."""
        file = self.path / name
        lines = []
        for text in file.read_bytes().splitlines() if file.exists() else []:
            try:
                line = parsed(text)
            except ValueError:
                continue
            if isinstance(line, dict) and kept(line := metrics_line(line)):
                lines.append(line)
        if processes.is_primary():
            _replace(file, "".join(json.dumps(as_json(line)) + "\n" for line in lines))
        return lines


def replace_json(file: Path, content: dict[str, Any]) -> None:
    """Write ``file`` atomically, on disk before this returns."""
    _replace(file, json.dumps(content, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _is_leftover(name: str) -> bool:
    """May a run that was killed before its first write leave a file of this name?"""
    return name == LOCK or bool(re.fullmatch(r"\..+\.partial|\.nfs.+", name))


def parsed(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def metrics_line(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl in today's names, with an infinite time as a number.

    Older runs wrote ``train_loss`` as ``loss``; `as_json` writes infinity as text.
    """
    time = line.get("time")
    if isinstance(time, str) and time == "inf":
        line = line | {"time": math.inf}
    if "loss" not in line or "train_loss" in line:
        return line
    return {"train_loss" if name == "loss" else name: value for name, value in line.items()}


def as_json(content: Any) -> Any:
    """``content`` with infinity as text, since JSON has none, and tuples as lists."""
    if isinstance(content, dict):
        return {name: as_json(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_json(value) for value in content]
    return "inf" if isinstance(content, float) and math.isinf(content) else content


def peak_memory_bytes() -> int:
    """Peak memory of the first device if it counts its memory, else of this process (resident)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(statistics.get("peak_bytes_in_use", resident))


def resident_bytes() -> int:
    """Resident memory of this process now, or its peak if the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes()
    return pages * resource.getpagesize()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("dnntk", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
