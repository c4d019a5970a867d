"""Finds workdirs and reads their files: sizes are capped, and damage is reported in a sentence.

Runs are killed, disks fill up, and a folder may hold any file, so no content of a file raises an
error here: a function returns the content, or a sentence that says what is wrong with the file.
"""

import dataclasses
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnntk.errors import InputError
from dnntk.runs.folder import CONFIG, SUMMARY, metrics_line
from dnntk.runs.paths import as_path

__all__ = [
    "Figure",
    "Workdir",
    "find_workdirs",
    "is_result",
    "read_figure",
    "read_json",
    "read_lines",
]

# Parsed JSON takes up to thirty times the file's size in memory.
JSON_BYTES = 4 << 20
FIGURE_BYTES, FIGURE_PIXELS = 16 << 20, 50_000_000
FOLDERS, ENTRIES = 20_000, 20_000
SUFFIXES = (".json", ".jsonl", ".png", ".pdf")
# Folders that may have thousands of files, none of interest to a reader.
SKIPPED = ("checkpoints", "kernel", "node_modules", "__pycache__")
RESULT = re.compile(rb'"(benchmark|promised|rows)"\s*:')
PNG_HEADER = struct.Struct(">8sI4sII")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder with results.

    Attributes:
        path: of the folder.
        name: unique and short: the path from the deepest folder that holds all workdirs.
        files: results in the folder, and in subfolders that are not workdirs themselves.
    """

    path: Path
    name: str
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """The bytes of a PNG file, with ``width`` and ``height`` in pixels."""

    content: bytes
    width: int
    height: int


def find_workdirs(roots: Sequence[str | os.PathLike[str]]) -> list[Workdir]:
    """The workdirs at and below ``roots``, by name.

    A workdir holds config.json, summary.json or a JSON file of results (`is_result`).

    Raises:
        InputError: a root is no folder, or there are too many folders below the roots.
    """
    folders = [as_path("runs", root) for root in roots]
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"runs: expected folders, {folder} is none; name those with results")
    found: dict[Path, list[Path]] = {}
    for owner, files in _walk(folders):
        found.setdefault(owner, []).extend(files)
    paths = [os.path.abspath(path) for path in found]
    top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    workdirs = [
        Workdir(folder, os.path.relpath(path, top), tuple(sorted(files)))
        for path, (folder, files) in zip(paths, found.items(), strict=True)
    ]
    return sorted(workdirs, key=lambda workdir: _natural(workdir.name))


def _walk(roots: list[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield (workdir, files of the workdir in one folder); every folder once."""
    stack: list[tuple[Path, Path | None]] = [(root, None) for root in reversed(roots)]
    seen: set[tuple[int, int]] = set()
    while stack:
        folder, owner = stack.pop()
        files, folders, identity = _listed(folder)
        if identity in seen:
            continue
        seen.add(identity)
        if len(seen) > FOLDERS:
            raise InputError(f"runs: expected at most {FOLDERS:,} folders, found more; name fewer")
        if any(is_result(file) for file in files):
            owner = folder
        if owner is not None:
            yield owner, files
        stack += [(inner, owner) for inner in sorted(folders, reverse=True)]


def _listed(folder: Path) -> tuple[list[Path], list[Path], tuple[int, int]]:
    """Files, folders and identity of a folder; empty if the folder cannot be opened."""
    files, folders = [], []
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, ENTRIES):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() and entry.name not in SKIPPED:
                    folders.append(folder / entry.name)
                # Pipes and devices, which have no end, are not files for `is_file`.
                elif entry.is_file() and entry.name.endswith(SUFFIXES):
                    files.append(folder / entry.name)
    except OSError:
        return [], [], (0, 0)
    return sorted(files), folders, (status.st_dev, status.st_ino)


def is_result(file: Path) -> bool:
    """Does this file make its folder a workdir?"""
    if file.suffix != ".json":
        return False
    if file.name in (CONFIG, SUMMARY) or file.with_suffix(".png").exists():
        return True
    try:
        with file.open("rb") as opened:
            return RESULT.search(opened.read(4096)) is not None
    except OSError:
        return False


def read_json(file: Path) -> tuple[Any, str | None]:
    """(content, None), or (None, what is wrong)."""
    try:
        with file.open("rb") as opened:
            data = opened.read(JSON_BYTES + 1)
        if len(data) > JSON_BYTES:
            return None, f"{file.name}: more than the {JSON_BYTES >> 20} MB that a report reads"
        return json.loads(data), None
    except OSError as error:
        return None, f"{file.name}: cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return None, f"{file.name}: damaged, expected JSON"


def read_lines(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The intact lines, and what is wrong with others; of a long file, only lines at both ends."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            texts = opened.read(JSON_BYTES).splitlines()
            if size > JSON_BYTES:
                # The middle is left out, and so are the two lines that are cut there.
                opened.seek(max(JSON_BYTES, size - JSON_BYTES))
                texts = texts[:-1] + opened.read(JSON_BYTES).splitlines()[1:]
    except OSError as error:
        return [], f"{file.name}: cannot be read ({error.strerror})"
    lines, damaged = [], 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(metrics_line(line))
        else:
            damaged += 1
    said = []
    if size > JSON_BYTES:
        said.append(f"of its {size / 1e6:,.0f} MB, {JSON_BYTES >> 20} MB at each end are read")
    if damaged:
        said.append(f"{damaged:,} damaged line{'s' if damaged > 1 else ''} left out")
    return lines, f"{file.name}: {'; '.join(said)}" if said else None


def read_figure(file: Path) -> Figure | str:
    """A PNG, or what is wrong with it."""
    try:
        with file.open("rb") as opened:
            content = opened.read(FIGURE_BYTES + 1)
    except OSError as error:
        return f"{file.name}: cannot be read ({error.strerror})"
    if len(content) > FIGURE_BYTES:
        return f"{file.name}: more than the {FIGURE_BYTES >> 20} MB that a report embeds"
    if len(content) < PNG_HEADER.size:
        return f"{file.name}: damaged, expected a PNG"
    magic, _, kind, width, height = PNG_HEADER.unpack_from(content)
    if magic != b"\x89PNG\r\n\x1a\n" or kind != b"IHDR" or not width * height:
        return f"{file.name}: damaged, expected a PNG"
    if width * height > FIGURE_PIXELS:
        return f"{file.name}: {width:,} x {height:,} pixels, more than a report embeds"
    return Figure(content, width, height)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts depth100 before depth1000 before mnist."""
    return [(int(p[:18]) if p.isdecimal() else -1, p) for p in re.split(r"(\d+)", name)]
