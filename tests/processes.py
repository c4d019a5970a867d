"""Scripts through their real command line: one process each, or many for the price of one import.

`run` starts a script as a user does. `outcomes` starts one process that imports what the script
imports, before JAX has a backend or a thread, and forks a child for every case; the child then runs
the whole script under its own command line, as ``python script.py`` would.
"""

import ast
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).parents[1] / "scripts"
AT_ONCE = 2
SECONDS = 300
# Most of the suite's time is XLA's, and two thirds of that went into its newer code generator.
COMPILE_FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


class Outcome(NamedTuple):
    """What a process leaves behind."""

    returncode: int
    stdout: str
    stderr: str


def command(script, *flags):
    """The command line of ``scripts/<script>``."""
    return [sys.executable, str(SCRIPTS / script), *flags]


@contextlib.contextmanager
def joined(count, *flags, cwd, script="train.py"):
    """A script as so many processes of one job, running: their Popen objects."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    meet = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}")
    running = [
        subprocess.Popen(
            command(script, *meet, f"--process={process}", *flags),
            **{"cwd": cwd, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
            env=environment(),
        )
        for process in range(count)
    ]
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.communicate()


def compile_fast():
    """Let this process and its children compile fast rather than well."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"


def environment(optimized=False):
    """That of a script's process; ``optimized`` is as a user's."""
    if not optimized:
        return dict(os.environ)
    flags = os.environ["XLA_FLAGS"].replace(COMPILE_FAST, "").strip()
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": flags}


def run(script, *flags, cwd, optimized=False):
    """The outcome of a script in a fresh process."""
    done = subprocess.run(
        command(script, *flags),
        **{"cwd": cwd, "capture_output": True, "text": True, "timeout": SECONDS},
        env=environment(optimized),
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def outcomes(script, cases, cwd, code=None, first=None, optimized=False):
    """{name: flags} -> {name: Outcome} of forked processes; ``code`` runs in the script's place.

    The case called ``first`` ends before the others begin; it is the first of ``cases``.
    Without a ``script``, the first of each case's flags is its own.
    """
    assert first in (None, next(iter(cases)))
    cases = {name: [script, *flags] if script else flags for name, flags in cases.items()}
    with tempfile.TemporaryDirectory() as kept:
        job = {
            "script": str(SCRIPTS / script) if script else None,
            "cases": [[str(SCRIPTS / first), *flags] for first, *flags in cases.values()],
            "cwd": str(cwd),
            "code": code,
            "alone": first is not None,
            "kept": kept,
        }
        parent = subprocess.run(
            [sys.executable, __file__],
            **{"input": json.dumps(job), "capture_output": True, "text": True},
            env=environment(optimized),
        )
        assert parent.returncode == 0, parent.stderr
        statuses = json.loads(parent.stdout)
        texts = [[Path(kept, f"{i}.{end}").read_text() for end in ("out", "err")]
                 for i in range(len(cases))]  # fmt: skip
    return {
        name: Outcome(status, *both)
        for name, status, both in zip(cases, statuses, texts, strict=True)
    }


def _import_what_it_imports(script):
    """Run the import statements at the top of a script, of dnntk alone without one."""
    sys.path.insert(0, str(SCRIPTS))
    if script is None:  # those of several scripts would define the same flags
        import matplotlib.pyplot  # noqa: F401

        import dnntk.experiments.training  # noqa: F401

        return
    tree = ast.parse(Path(script).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(tree, script, "exec"), {})


def _become(index, job):
    """Turn the forked child into the process of one case, and run the script to its end."""
    for number, end in ((1, "out"), (2, "err")):
        file = os.open(Path(job["kept"], f"{index}.{end}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.chdir(job["cwd"])
    sys.argv = job["cases"][index]
    signal.alarm(SECONDS)
    if job["code"] is None:
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        exec(job["code"], {"__name__": "__main__"})


def _fork_all():
    job = json.load(sys.stdin)
    _import_what_it_imports(job["script"])
    gc.freeze()  # children end sooner: they leave alone what was imported
    statuses, running = [None] * len(job["cases"]), {}
    waiting = iter(range(len(job["cases"])))
    while (index := next(waiting, None)) is not None or running:
        if index is not None:
            child = os.fork()
            if not child:
                # Its end is the process's own, status and traceback included.
                return _become(index, job)
            running[child] = index
        if index is None or len(running) == AT_ONCE or (index == 0 and job["alone"]):
            child, status = os.wait()
            statuses[running.pop(child)] = os.waitstatus_to_exitcode(status)
    print(json.dumps(statuses))


if __name__ == "__main__":
    _fork_all()
