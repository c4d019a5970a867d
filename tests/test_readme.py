"""README.md is true: its Python runs, in order, and its command lines parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (scripts/\S+\.py) (--.*)$", README, re.MULTILINE)
PARSE = """
import sys, runpy
sys.path.insert(0, "scripts")
script = runpy.run_path(sys.argv[1])
script["FLAGS"](["script"] + sys.argv[2:])
if not script["FLAGS"].resume:
    script["_config"]()
"""


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "flags"), COMMANDS)
def test_command_lines_are_understood(script, flags):
    line = [sys.executable, "-c", PARSE, script, *shlex.split(flags)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_flag_of_the_contract_exists_with_a_default_and_help():
    names = (
        "arch depth dataset classes data_dir pool scale rho beta init parametrization optimizer "
        "momentum time_step lr steps epochs batch_size eval_every checkpoint_every resume dtype "
        "seed workdir"
    ).split()
    source = (ROOT / "scripts" / "train.py").read_text()
    for name in names:
        assert re.search(rf'DEFINE_\w+\(\s*"{name}", [^,]+.*, "[A-Z].*\."\)', source), name
