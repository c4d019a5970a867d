"""A workdir's row in the overview, and its section of the page."""

import base64
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dnntk.report.benchmarks import benchmark_table, is_benchmark, promises
from dnntk.report.curves import course
from dnntk.report.markup import Html, collapsed, joined, tag
from dnntk.report.reading import Figure, Workdir, read_figure, read_json, read_lines
from dnntk.report.values import cut, mapping, properties, records, rendered, shown, title
from dnntk.runs.folder import CONFIG, DIVERGED, METRICS, SUMMARY

__all__ = ["Budget", "Section", "caption", "experiment", "slug"]

# `dnntk.figures.draw` draws 150 pixels per inch, a browser 96.
SCREEN = 96 / 150
OVERVIEW = (
    *("experiment", "architecture", "depth", "data", "train_loss", "test_loss"),
    *("train_accuracy", "test_accuracy", "steps", "time", "seconds", "peak_memory_bytes", "state"),
)
CAPTIONS = {
    "loss": "Losses and accuracies against kernel time",
    "attribution": "Training examples that decided some test examples",
    "confusion": "Test examples by true and predicted class",
    "fit": "Target and outputs on the arc",
    "curve": "Losses and accuracies of the limit against kernel time",
    "figure_4_1": "Figure 4.1: trained networks, and their kernels before and after training",
    "shares": "Shares that layers have in the output",
    "rates": "Rates of convergence with depth",
    "depth_transfer_mlp": "MLPs of many depths at constant C: loss curves, rates, distances",
    "depth_transfer_cnn": "CNNs of many depths at constant C: loss curves, rates, distances",
    "features": "Distance from the limit against depth for each draw of the random units",
    "cross_entropy": "Networks on cross-entropy: distance from the limit, and kernel movement",
    "catapult": "Gradient descent at steps too large for the kernel",
    "limit_convergence": "Distance of trained networks from their limit against depth",
    "regimes": "What moves in training against C at each depth, with the predicted powers",
    "required_depth": "Depth near the limit, predicted and measured, against kernel time",
    "scores": "Training loss and held-out accuracy against depth, beside the limit",
    "parallel_depth": "Modelled time of all layers at once, and layer by layer",
}
# Settings that only one experiment has: older runs do not say which experiment they are.
OWN_FIELDS = {
    "train": {"parametrization", "dataset", "time_step"},
    "predict": {"solver", "dataset", "times"},
    "accumulation": {"points", "output", "time_step"},
    "catapult": {"ratios", "scales"},
    "cross_entropy": {"smoothings", "power"},
    "depth_or_width": {"datasets", "regime_depth"},
    "errata": {"networks", "depth", "seed"},
    "features": {"case", "trained_depths"},
    "initialization": {"channels", "d_in", "depth"},
    "limit_convergence": {"draws", "depths"},
    "ntk_convergence": {"sweep_depths", "depths"},
    "regimes": {"fit_from", "records"},
    "required_depth": {"epsilons", "depths"},
    "trainability": {"preset", "archs"},
}


@dataclasses.dataclass
class Budget:
    """Bytes of figures that the page may still embed."""

    left: int


class Section:
    """A workdir's files, read once; ``headline`` is the overview's row, ``html`` the section."""

    def __init__(self, workdir: Workdir, anchor: str, below: str, budget: Budget) -> None:
        """Read the files; a PDF is linked only if it lies ``below``, in the report's folder."""
        self.workdir, self.anchor, self.below, self.budget = workdir, anchor, below, budget
        self.problems: list[str] = []
        self.others = {
            file: self._json(file)
            for file in workdir.files
            if file.suffix == ".json" and file not in map(self._own, (CONFIG, SUMMARY, DIVERGED))
        }
        self._diverged = self._message()
        self.config, self.summary = self._run_json(CONFIG), self._run_json(SUMMARY)
        self.lines = {file: self._lines(file) for file in workdir.files if file.suffix == ".jsonl"}
        self.headline = self._headline()

    def html(self) -> Html:
        """The section; problems come first, then figures before numbers, settings last."""
        figures = self._figures()
        parts = [
            tag("div", *figures, class_="figures") if figures else "",
            *self._results(),
            *self._courses(),
            *self._settings(),
        ]
        known = [self.headline[name] for name in ("experiment", "state")]
        what = "".join(f"{shown('', value)} \u00b7 " for value in known if value is not None)
        said = [tag("li", problem) for problem in self.problems]
        return tag(
            "section",
            tag("h2", self.workdir.name, id=self.anchor),
            tag("p", what, tag("code", self.workdir.path), class_="what"),
            tag("ul", *said, class_="problems") if said else "",
            *parts,
            tag("p", tag("a", "Overview", href="#overview"), class_="up"),
        )

    def _own(self, name: str) -> Path:
        return self.workdir.path / name

    def _json(self, file: Path) -> Any:
        content, problem = read_json(file)
        self._note(problem)
        return content

    def _run_json(self, name: str) -> Any:
        """Content of a file that every run writes."""
        file = self._own(name)
        if file in self.workdir.files:
            return self._json(file)
        if not self.others and not (name == SUMMARY and self._diverged is not None):
            fate = "; the run is unfinished, or has failed" if name == SUMMARY else ""
            self._note(f"{name}: missing{fate}")
        return None

    def _message(self) -> str | None:
        """Why the run diverged; None if it did not, or if it finished later."""
        file = self._own(DIVERGED)
        if file not in self.workdir.files or self._own(SUMMARY) in self.workdir.files:
            return None
        content = self._json(file)
        message = shown("", content.get("message") if isinstance(content, dict) else None)
        self._note(f"diverged: {message}")
        return message

    def _lines(self, file: Path) -> list[dict[str, Any]]:
        lines, problem = read_lines(file)
        self._note(problem)
        return lines

    def _note(self, problem: str | None) -> None:
        if problem is not None:
            self.problems.append(problem)

    def _headline(self) -> dict[str, Any]:
        config = self.config if isinstance(self.config, dict) else {}
        metrics = self.lines.get(self._own(METRICS))
        last = metrics[-1] if metrics else {}
        found = self.summary if isinstance(self.summary, dict) else last
        arch = config.get("arch")
        headline = {name: found.get(name) for name in OVERVIEW} | {
            "experiment": experiment(config) if config else None,
            "architecture": title(arch) if isinstance(arch, str) else arch,
            "depth": config.get("depth", config.get("depths", found.get("depth"))),
            "data": _data(config),
            "steps": found.get("steps", found.get("step", config.get("steps"))),
            "state": self._state(),
        }
        benchmarks = [content for content in self.others.values() if is_benchmark(content)]
        if benchmarks and not config:
            met, made = (sum(n) for n in zip(*map(promises, benchmarks), strict=True))
            headline |= {"experiment": "benchmark", "state": f"{met} of {made} promises met"}
        return headline

    def _state(self) -> str:
        if isinstance(self.summary, dict) and self.summary.get("learned") is False:
            return "finished, no better than a constant"
        if self.summary is not None:
            return "finished"
        if self._diverged is not None:
            return "diverged"
        present = self._own(SUMMARY) in self.workdir.files
        return "damaged" if present else "results" if self.others else "unfinished"

    def _results(self) -> Iterator[Html]:
        if isinstance(self.summary, dict):
            content = {name: v for name, v in self.summary.items() if name != "versions"}
            yield joined(tag("h3", "Summary"), mapping(f"Summary of {self.workdir.name}", content))
        elif self.summary is not None:
            yield rendered("summary", self.summary)
        for file, content in self.others.items():
            if content is not None:
                yield self._other(file, content)

    def _other(self, file: Path, content: Any) -> Html:
        """A file of results, of a benchmark or of any other kind."""
        name = os.path.relpath(file, self.workdir.path)
        if not is_benchmark(content):
            return rendered(name.removesuffix(".json"), content)
        rest = {key: value for key, value in content.items() if key not in ("rows", "description")}
        return joined(
            tag("h3", name.removesuffix(".json")),
            tag("p", shown("", content["description"])) if content.get("description") else "",
            benchmark_table(content, name),
            collapsed(f"Settings and machine ({name})", properties(rest, f"Settings, {name}", cut)),
        )

    def _figures(self) -> list[Html]:
        stems = {f.with_suffix("") for f in self.workdir.files if f.suffix in (".png", ".pdf")}
        return [self._figure(stem) for stem in sorted(stems)]

    def _figure(self, stem: Path) -> Html:
        png, pdf = (stem.with_name(stem.name + end) for end in (".png", ".pdf"))
        words = CAPTIONS.get(stem.name, caption(os.path.relpath(stem, self.workdir.path)))
        parts = [self._image(png, words)] if png in self.workdir.files else []
        where = [" \u00b7 PDF: ", self._link(pdf)] if pdf in self.workdir.files else []
        return tag("figure", *parts, tag("figcaption", words, *where))

    def _image(self, file: Path, words: str) -> Html:
        figure: Figure | str = read_figure(file)
        if isinstance(figure, Figure) and len(figure.content) > self.budget.left:
            figure = f"{file.name}: left out, the page holds as many figures as a browser can take"
        if isinstance(figure, str):
            self._note(figure)
            return tag("p", figure, class_="note")
        self.budget.left -= len(figure.content)
        return tag(
            "img",
            src="data:image/png;base64," + base64.b64encode(figure.content).decode(),
            alt=f"{words}, {self.workdir.name}",
            width=round(figure.width * SCREEN),
            height=round(figure.height * SCREEN),
        )

    def _link(self, file: Path) -> Html:
        path = os.path.relpath(os.path.realpath(file), self.below)
        if path.startswith(".."):
            return tag("code", file)
        # With "./" no file name can be read as a URL's scheme.
        return tag("a", file.name, href="./" + quote(os.fsencode(path)))

    def _courses(self) -> Iterator[Html]:
        """Files of JSON lines: as curves if no figure shows them, and as collapsed tables."""
        drawn = self._own("loss.png") in self.workdir.files
        for file, lines in self.lines.items():
            name = os.path.relpath(file, self.workdir.path)
            if not lines:
                self._note(f"{name}: no lines")
                continue
            if file.name == METRICS and not (drawn and file == self._own(METRICS)):
                yield course(lines) or Html()
            count = f"{len(lines):,} line{'s' if len(lines) > 1 else ''}"
            yield collapsed(f"{name} ({count})", records(lines, name))

    def _settings(self) -> Iterator[Html]:
        if isinstance(self.config, dict) and self.config:
            table = properties(self.config, f"Settings of {self.workdir.name}", cut)
            yield collapsed(f"Settings ({CONFIG})", table)
        elif self.config is not None:
            yield collapsed(f"Settings ({CONFIG})", rendered("settings", self.config))
        versions = self.summary.get("versions") if isinstance(self.summary, dict) else None
        if isinstance(versions, dict) and versions:
            yield collapsed(f"Versions ({SUMMARY})", properties(versions, "Versions"))


def experiment(config: dict[str, Any]) -> str | None:
    """The experiment that a configuration names or, without a name, whose fields it has.

    Returns None if no experiment of `OWN_FIELDS` fits.
    """
    if isinstance(config.get("experiment"), str):
        return config["experiment"]
    return next((name for name, own in OWN_FIELDS.items() if own <= config.keys()), None)


def caption(stem: str) -> str:
    """``figure_5_1`` -> ``Figure 5.1``, ``panels/by_depth`` -> ``Panels/by depth``."""
    words = title(re.sub(r"\b(figure|table)[-_ ](\d+)[-_.](\d+)", r"\1 \2.\3", stem))
    return words[:1].upper() + words[1:]


def slug(name: str) -> str:
    """An HTML anchor made from ``name``."""
    return "run-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]


def _data(config: dict[str, Any]) -> str | None:
    if isinstance(own := config.get("own"), dict):  # `dnntk.data.own_data.record`
        shape = shown("", own.get("x_train")).replace(", ", " x ")
        digest = shown("", own.get("sha256"))[:8]
        return f"own data: {shown('', own.get('name'))}, {shape}, sha256 {digest}"
    dataset, classes = config.get("dataset"), config.get("classes")
    if dataset is None:
        several = config.get("datasets")
        return None if several is None else shown("", several)
    said = shown("", classes).replace(", ", "/") if classes is not None else ""
    return shown("", dataset) + (f" {said}" if said and dataset != "toy" else "")
