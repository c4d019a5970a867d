"""One HTML page about many workdirs: for a browser, a phone, a printer or a colleague.

`write_report` finds the workdirs below some folders. The page has an overview of all runs, and a
section for each run with its tables, figures and settings. The page is one file, and loads nothing
from the network.
"""

import datetime
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import IO, Any

from dnntk.errors import InputError
from dnntk.report.markup import Html, escaped, joined, table, tag
from dnntk.report.reading import Workdir, find_workdirs
from dnntk.report.sections import OVERVIEW, Budget, Section, slug
from dnntk.report.values import number, shown, title
from dnntk.runs.folder import RunFolder
from dnntk.runtime.progress import progress_bar

__all__ = ["write_report"]

PAGE = "report.html"
TITLE = "Deep narrow networks: runs"
# Most bytes of all figures together, before base64: phones cannot show larger pages.
FIGURES_BYTES = 96 << 20
# The browser enforces this policy, even if a file of a run contains markup.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
COLUMNS = {"time": "kernel time", "peak_memory_bytes": "peak memory", "seconds": "wall time"}


def write_report(
    runs: Sequence[str | os.PathLike[str]] = ("runs",),
    workdir: str | os.PathLike[str] = "runs/report",
    *,
    heading: str = TITLE,
    progress: bool = True,
) -> Path:
    """Write report.html about all workdirs at and below ``runs``.

    Memory is needed for one run at a time and for the overview, as the sizes of files are capped.
    A run's section names the files that are damaged, missing or left out.

    Args:
        runs: workdirs, or folders of workdirs.
        workdir: folder of the page, made if it is missing; an older page is replaced.
        heading: title of the page.
        progress: show a progress bar after one second.

    Returns:
        The page's path.

    Raises:
        InputError: there is no run below ``runs``, or the workdir cannot be written to.
    """
    found = find_workdirs(runs)
    if not found:
        named = ", ".join(str(run) for run in runs) or "no folder"
        raise InputError(f"runs: expected workdirs in {named}, found none; run an experiment first")
    folder = RunFolder(workdir)
    folder.make()
    partial, page = folder.path / f".{PAGE}.partial", folder.path / PAGE
    bar = progress_bar(found, desc="report", unit="run", delay=1.0, disable=not progress)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            _write(file, found, bar, os.path.realpath(folder.path), heading)
        partial.replace(page)
    except OSError as error:
        raise InputError(f"workdir: expected room for {page}, got {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return page


def _write(
    file: IO[str], found: list[Workdir], bar: Iterable[Workdir], folder: str, heading: str
) -> None:
    """Write the page; sections wait on disk, as the overview above them needs all runs."""
    budget, headlines = Budget(FIGURES_BYTES), []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as sections:
        for workdir, anchor in zip(bar, _anchors(found), strict=True):
            section = Section(workdir, anchor, folder, budget)
            sections.write(section.html() + "\n")
            headlines.append((workdir.name, anchor, section.headline))
        sections.seek(0)
        file.write(f'<!DOCTYPE html>\n<html lang="en">\n{_head(heading)}\n<body>\n')
        file.write(_top(headlines, heading) + "\n<main>\n")
        shutil.copyfileobj(sections, file)
        file.write("</main>\n</body>\n</html>\n")


def _anchors(found: Sequence[Workdir]) -> Iterator[str]:
    """An anchor for each run: its name's `slug`, numbered if an earlier run has the same one."""
    used: set[str] = set()
    for workdir in found:
        stem = anchor = slug(workdir.name)
        count = 1
        while anchor in used:
            count += 1
            anchor = f"{stem}-{count}"
        used.add(anchor)
        yield anchor


def _head(heading: str) -> Html:
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", heading),
        tag("style", Html(style)),
    )


def _top(headlines: list[tuple[str, str, dict[str, Any]]], heading: str) -> Html:
    """Title, contents and overview."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    count = f"{len(headlines):,} run{'s' if len(headlines) > 1 else ''}"
    made = f"{count}; made by dnntk {metadata.version('dnntk')}, {now}"
    links = [tag("li", tag("a", name, href=f"#{anchor}")) for name, anchor, _ in headlines]
    contents = tag("details", tag("summary", "Contents"), tag("ul", *links), open=True)
    return joined(
        tag("header", tag("h1", heading, id="top"), tag("p", made)),
        tag("nav", contents, aria_label="Contents"),
        tag(
            "section", tag("h2", "Overview", id="overview"), _overview(headlines), class_="overview"
        ),
    )


def _overview(headlines: list[tuple[str, str, dict[str, Any]]]) -> Html:
    """One row per run, without columns that are empty for all runs."""
    names = [n for n in OVERVIEW if any(line[n] is not None for _, _, line in headlines)]
    rows = [
        [tag("a", name, href=f"#{anchor}"), *(escaped(shown(n, line[n])) for n in names)]
        for name, anchor, line in headlines
    ]
    values = [[number(line[n]) for _, _, line in headlines] for n in names]
    numeric = {i for i, column in enumerate(values, 1) if any(v is not None for v in column)}
    heads = ["run", *(COLUMNS.get(n, title(n)) for n in names)]
    return table(heads, rows, "Overview of all runs", numeric)
