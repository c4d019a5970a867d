"""Runs as files, small, and a report's page read back: every tag closed, every anchor found."""

import base64
import json
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from dnntk import TrainConfig
from dnntk.report import markup, write_report

EVIL = '</td></style></title><script>alert(1)</script><img src="x" onerror=\'y\'>&amp;"'
DATA = "data:image/png;base64,"


class Page(HTMLParser):
    """A page's elements; every tag closed in order, every id once, every anchor there."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.source = Path(file).read_text(encoding="utf-8")
        self.open, self.elements, self.text, self.cells = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        for name, attributes in self.elements:
            assert name != "script" and not any(key.startswith("on") for key in attributes)
            assert attributes.get("src", DATA).startswith(DATA)
            href = attributes.get("href", "./")
            assert href.startswith("./") or href[1:] in ids, href
        self.words = " ".join(self.text)

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((name, dict(attributes)))
        if name not in markup.VOID:
            self.open.append(name)
        if name in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name, self.getpos()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def all(self, name):
        return [attributes for kind, attributes in self.elements if kind == name]

    @property
    def images(self):
        return [base64.b64decode(image["src"].partition(",")[2]) for image in self.all("img")]


def png(width=30, height=20, shade=0):
    """A grey PNG; other shades are other bytes."""

    def chunk(kind, data):
        tail = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + tail

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([shade]) * width) * height)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def history(count=8):
    return [
        {
            "step": 10 * i,
            "time": 1.5 * i,
            "train_loss": 0.5 / (1 + i),
            "test_loss": 0.6 / (1 + i),
            "train_accuracy": i / count,
            "test_accuracy": None if i < 2 else i / (2 * count),
            "seconds": 0.25 * i,
        }
        for i in range(count)
    ]


def write(folder, **files):
    """``config={...}`` to config.json, ``metrics=[...]`` to metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        if isinstance(content, list):
            lines = "".join(json.dumps(line) + "\n" for line in content)
            (folder / f"{stem}.jsonl").write_text(lines)
        else:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def trained(folder, depth, **more):
    """A workdir as scripts/train.py leaves it, without figures."""
    summary = {
        "train_loss": 0.00455,
        "test_loss": 0.00512,
        "train_accuracy": 1.0,
        "test_accuracy": 0.98765,
        "steps": 300,
        "time": 42.6,
        "seconds": 7384.0,
        "peak_memory_bytes": 530_000_000,
        "versions": {"jax": "0.10.2"},
    }
    config = TrainConfig(depth=depth).to_json() | {"plan": {"reason": "below the stable limit"}}
    return write(folder, config=config, metrics=history(), summary=summary, **more)


def spread(*samples):
    middle = sorted(samples)[len(samples) // 2]
    return {"median": middle, "quartiles": [min(samples), max(samples)], "samples": samples}


def page_of(folder, **kwargs):
    return Page(write_report([folder], folder.parent / "report", progress=False, **kwargs))
