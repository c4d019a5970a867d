"""Scripts through their real command line: one process each, or many for the price of one import.

`run` starts a script as a user does. `outcomes` has one process a session that imports what scripts
import, before JAX has a backend or a thread, and forks a child for every case; the child then runs
the whole script under its own command line, as ``python script.py`` would.
"""

import contextlib
import functools
import gc
import importlib
import json
import math
import os
import pkgutil
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import pictures

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
    """A script as so many processes of one job, `Running`."""
    meet = (f"--coordinator=127.0.0.1:{_free_port()}", f"--processes={count}")
    running = []
    try:
        for process in range(count):
            running.append(Running(script, *meet, f"--process={process}", *flags, cwd=cwd))
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def _free_port():
    """One that no other process is given meanwhile: the system gives none below 32768 unasked."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port found")


def take_interrupts():
    """Let SIGINT through, which a shell has what it runs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def compile_fast():
    """Let this process and its children compile fast rather than well."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"


def cache_without_compressing():
    """Compressing what XLA compiled took 5% of the tests' time; readers take either."""
    from jax._src import compilation_cache

    compilation_cache.compress_executable = functools.partial(zlib.compress, level=0)


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


def outcomes(script, cases, cwd, code=None, first=None):
    """{name: flags} -> {name: Outcome} of forked processes; ``code`` runs in the script's place.

    The case called ``first`` ends before the others begin; it is the first of ``cases``.
    Without a ``script``, the first of each case's flags is its own.
    """
    assert first in (None, next(iter(cases)))
    cases = {name: [script, *flags] if script else flags for name, flags in cases.items()}
    with tempfile.TemporaryDirectory() as kept:
        job = _job(cases.values(), cwd, kept) | {"code": code, "alone": first is not None}
        statuses = _ask(job)
        texts = [_texts(kept, index) for index in range(len(cases))]
    return {
        name: Outcome(status, *both)
        for name, status, both in zip(cases, statuses, texts, strict=True)
    }


def good_and_bad(script, flags, bad_flags, folder):
    """(outcome with --workdir=out, {name: outcome} of the bad flags after it)."""
    cases = {"good": [*flags, "--workdir=out"]} | {
        name: bad for name, (bad, _) in bad_flags.items()
    }
    found = outcomes(script, cases, folder, first="good")
    good = found.pop("good")
    assert good.returncode == 0, good.stderr
    return good, found


def check_refusal(outcome, script, part):
    """Bad input: status 2, and one line that begins with the script's name and holds ``part``."""
    assert outcome.returncode == 2 and "Traceback" not in outcome.stdout, outcome
    line = outcome.stderr.strip()
    assert "\n" not in line and line.startswith(script) and part in line, outcome


def outcome(script, *flags, cwd):
    """As `run`, of a forked process."""
    return outcomes(script, {"": flags}, cwd)[""]


class Running:
    """A script in a forked process that goes on meanwhile; in part a `subprocess.Popen`."""

    def __init__(self, script, *flags, cwd):
        self.returncode, self._kept = None, tempfile.TemporaryDirectory()
        job = _job([[script, *flags]], cwd, self._kept.name)
        self.pid = _ask(job | {"go on": True})

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def until(self, there):
        """Wait until ``there()`` is true; the process must still be running then."""
        while not there():
            ended = _ask({"wait for": self.pid, "timeout": 0})
            if ended is not None:
                self.returncode = ended
                words = _texts(self._kept.name, 0)[1]
                raise AssertionError(f"ended too soon, with status {ended}: {words}")
            time.sleep(0.02)

    def wait(self, timeout=SECONDS):
        """The last words, on standard error."""
        if self.returncode is None:
            found = _ask({"wait for": self.pid, "timeout": timeout})
            assert found is not None, f"not at its end after {timeout} s"
            self.returncode = found
            self._words = _texts(self._kept.name, 0)[1]
            self._kept.cleanup()
        return self._words


def _job(cases, cwd, kept):
    cases = [[str(SCRIPTS / script), *flags] for script, *flags in cases]
    return {"cases": cases, "cwd": str(cwd), "kept": str(kept), "code": None}


def _texts(kept, index):
    return [Path(kept, f"{index}.{end}").read_text() for end in ("out", "err")]


def _ask(job):
    server = _server()
    print(json.dumps(job), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    """The process that forks; it ends with this one, for its standard input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], text=True, **pipes)


def _import_what_scripts_import():
    """All but the scripts' own modules, which define flags."""
    sys.path.insert(0, str(SCRIPTS))
    import numpy as np
    import sklearn.datasets  # noqa: F401

    import dnntk.experiments

    for module in pkgutil.walk_packages(dnntk.__path__, "dnntk."):
        importlib.import_module(module.name)
    pictures.render_once()
    told = ("step", "time", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
    drawn = {
        "loss": (dnntk.figures.loss_figure, [dict.fromkeys(told, 1)], ""),
        "confusion": (dnntk.figures.confusion_figure, np.eye(2), "ab", ""),
    }
    with tempfile.TemporaryDirectory() as folder:  # the first picture of a process takes longer
        for name, figure in drawn.items():
            dnntk.figures.draw(Path(folder, name), *figure)


def _become(index, job):
    """Turn the forked child into the process of one case, and run the script to its end."""
    for number, end in ((1, "out"), (2, "err")):
        file = os.open(Path(job["kept"], f"{index}.{end}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    sys.argv = job["cases"][index]
    signal.alarm(SECONDS)
    if job["code"] is None:
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        exec(job["code"], {"__name__": "__main__"})


class _Server:
    """What forks, and knows how its children ended."""

    def __init__(self):
        self.ended = {}

    def fork(self, index, job):
        """The child's number; the child itself ends as the process of its case."""
        child = os.fork()
        if not child:
            raise _Child(index, job)
        return child

    def wait(self, children, timeout=math.inf):
        """The first of these children that ends, None if none does."""
        deadline = time.monotonic() + timeout
        while not (found := children & self.ended.keys()):
            child, status = os.waitpid(-1, 0 if timeout == math.inf else os.WNOHANG)
            if child:
                self.ended[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.02)
        return found.pop()

    def all_of(self, job):
        """The statuses of a job's cases."""
        statuses, running = [None] * len(job["cases"]), {}
        for index in range(len(statuses)):
            running[self.fork(index, job)] = index
            while len(running) == AT_ONCE or (running and job["alone"] and index == 0):
                self._take(statuses, running)
        while running:
            self._take(statuses, running)
        return statuses

    def _take(self, statuses, running):
        child = self.wait(running.keys())
        statuses[running.pop(child)] = self.ended.pop(child)

    def answer(self, job):
        if "wait for" in job:
            child = self.wait({job["wait for"]}, job["timeout"])
            return None if child is None else self.ended.pop(child)
        return self.fork(0, job) if job.get("go on") else self.all_of(job)


class _Child(BaseException):
    """Raised in a forked child, to leave the server's loop."""


def _serve():
    take_interrupts()
    _import_what_scripts_import()
    cache_without_compressing()
    gc.freeze()  # children end sooner: they leave alone what was imported
    server = _Server()
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    try:
        _serve()
    except _Child as child:
        case = child.args
    else:
        sys.exit()
    # Its end is the process's own, status and traceback included.
    _become(*case)
