"""README.md is true: its Python runs, in order, and its command lines parse."""

import re
import shlex
from pathlib import Path

import command_lines
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (scripts/\S+\.py)(?: (--.*))?$", README, re.MULTILINE)
# Parses a command line as the script does, and makes the configuration that it describes.
PARSE = """
import dataclasses, runpy, sys
script = runpy.run_path(sys.argv[0])
flags = script["FLAGS"]
flags(sys.argv)
for config in script.values():
    if isinstance(config, type) and dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
        if all(name in flags for name in names) and not getattr(flags, "resume", False):
            script["command_line"].from_flags(config)
"""


def test_its_python_runs_in_order_and_writes_nothing(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4 and "dnntk.train(" in blocks[0] and "KernelFlow" in blocks[0]
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "__main__"})
    assert list(tmp_path.iterdir()) == []


def test_it_is_read_in_minutes():
    assert README.count("\n") <= 220


@pytest.fixture(scope="module")
def parsed():
    """(script, flags) of every command line -> outcome of parsing it."""
    cases = {line: [Path(line[0]).name, *shlex.split(line[1])] for line in COMMANDS}
    return command_lines.outcomes(None, cases, ROOT, code=PARSE)


@pytest.mark.parametrize(("script", "flags"), COMMANDS)
def test_command_lines_are_understood(script, flags, parsed):
    assert parsed[script, flags].returncode == 0, parsed[script, flags].stderr
