"""README.md is true: its Python runs, in order, and its command lines parse."""

import re
import shlex
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (scripts/\S+\.py)(?: (--.*))?$", README, re.MULTILINE)
PARSE = """
import runpy, sys
script = runpy.run_path(sys.argv[0])
script["FLAGS"](sys.argv)
flags = script["FLAGS"]
if "_config" in script and not flags.resume and not getattr(flags, "compare", None):
    script["_config"]()
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
    return processes.outcomes(None, cases, ROOT, code=PARSE)


@pytest.mark.parametrize(("script", "flags"), COMMANDS)
def test_command_lines_are_understood(script, flags, parsed):
    assert parsed[script, flags].returncode == 0, parsed[script, flags].stderr


def test_every_flag_of_the_contract_exists_with_a_default_and_help():
    names = (
        "arch depth dataset classes data_dir pool scale rho beta init parametrization optimizer "
        "momentum time_step lr steps epochs batch_size eval_every checkpoint_every resume dtype "
        "seed workdir"
    ).split()
    source = (ROOT / "scripts" / "train.py").read_text()
    for name in names:
        assert re.search(rf'DEFINE_\w+\(\s*"{name}", [^,]+.*, "[A-Z].*\."\)', source), name
