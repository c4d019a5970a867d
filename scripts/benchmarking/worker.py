"""Both ends of the pipe between a benchmark and a worker, a process that takes training steps.

Every network has a process of its own, so that neither threads nor peak memory mix. `Worker` is the
benchmark's end. `serve` is the end of the worker's script, a fresh interpreter: it reads one line
of JSON, the job, and then a number of steps per line; it answers every line with one line. This
module imports no framework, so that a worker's memory holds its own framework only.
"""

import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Steps", "Worker", "WorkerExited", "compiled", "peak_bytes", "serve"]

FOLDER = Path(__file__).parent
# A compilation is repeated until all repetitions together have taken this many seconds.
COMPILING = 10.0
Answer = dict[str, Any]


class WorkerExited(Exception):
    """A worker took longer than allowed, or its process ended."""


class Worker:
    """The benchmark's end; ``facts`` is the worker's answer to its job, when it was ready."""

    def __init__(self, script: str, job: dict[str, Any], seconds_allowed: float = math.inf) -> None:
        """Start ``script`` on ``job``; no answer may take longer than ``seconds_allowed``.

        Raises:
            WorkerExited: the worker was not ready in time, or its process ended.
        """
        self._allowed = seconds_allowed
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(FOLDER / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            start_new_session=True,  # Ctrl-C interrupts the benchmark alone, which ends its workers
        )
        try:
            self.facts = self._ask(job)
        except BaseException:
            self.close()
            raise

    def take(self, steps: int) -> Answer:
        """Take training steps: the ``loss`` before the last step, ``seconds``, memory, ....

        Raises:
            WorkerExited: the worker took longer than allowed, or its process ended.
        """
        return self._ask(steps)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: Any) -> Answer:
        assert self._process.stdin and self._process.stdout
        watch, answer = None, ""
        if math.isfinite(self._allowed):
            watch = threading.Timer(self._allowed, self._process.kill)
            watch.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            in_time = watch is None or not watch.finished.is_set()
            if watch:
                watch.cancel()
        if answer:
            return json.loads(answer)
        if not in_time:
            raise WorkerExited(f"not done in {self._allowed:g} s")
        raise WorkerExited(f"its process ended with status {self._process.wait()}")


def _environment() -> dict[str, str]:
    """A worker's environment: it imports from scripts/, and compiles without a cache on disk."""
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false"}


class Steps(Protocol):
    """A network and its optimizer, which a worker's script creates from its job.

    Attributes:
        facts: facts for the benchmark, as JSON; ``gradient_bytes`` is a gradient's size.
    """

    facts: dict[str, Any]

    def take(self, steps: int) -> float:
        """Take training steps; return the loss before the last one."""


def serve(make: Callable[[dict[str, Any]], Steps], peak: Callable[[], int] | None = None) -> None:
    """Answer the benchmark until it closes the pipe.

    ``peak`` returns the peak memory in bytes, where it is not this process's resident memory.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # printed text must not be read as an answer
    peak = peak or peak_bytes
    job = json.loads(sys.stdin.readline())
    start = peak()
    steps = make(job)
    before_steps = peak()
    _forget_peak()
    # From here on the peak is that of the steps, above code, data and parameters.
    facts = {**steps.facts, "start_bytes": start, "ready_bytes": peak()}
    print(json.dumps(facts), file=answers, flush=True)
    idle_since = time.process_time()
    for line in sys.stdin:
        idle_cpu = time.process_time() - idle_since
        begun = time.perf_counter()
        loss = steps.take(json.loads(line))
        seconds = time.perf_counter() - begun
        stepping = peak()
        answer: Answer = {
            "loss": loss,
            "seconds": seconds,
            "peak_bytes": max(stepping, before_steps),
            "step_bytes": stepping,
            "idle_cpu_seconds": idle_cpu,
        }
        print(json.dumps(answer), file=answers, flush=True)
        idle_since = time.process_time()


def compiled(compile: Callable[[], Any], times: int) -> tuple[Any, float]:
    """The result of ``compile``, and the seconds of its fastest call of ``times``.

    Other work on the machine and the set-up of a process's first compilation only add time.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < times and sum(seconds) < COMPILING):
        begun = time.perf_counter()
        result = compile()
        seconds.append(time.perf_counter() - begun)
    return result, min(seconds)


def peak_bytes() -> int:
    """Peak resident memory of this process alone."""
    # On Linux a process inherits the peak of `getrusage` from the process that started it.
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    """Reset the peak memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
