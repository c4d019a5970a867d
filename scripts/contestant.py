"""Both ends of the pipe between a benchmark and a contestant in a process of its own.

A process each, so that neither threads nor peak memory mix. `Contestant` is the benchmark's end,
and `serve` that of the contestant's script, which is a fresh interpreter: it reads one line of
JSON, the job, and then numbers of steps, a line each; every line is answered by one. No framework
is imported here, so that a contestant holds its own alone.
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
from types import TracebackType
from typing import Any, Protocol, Self

SCRIPTS = Path(__file__).parent
# A compilation is repeated as long as that has taken less than so many seconds.
COMPILING = 10.0
Answer = dict[str, Any]


class Gone(Exception):
    """A contestant took longer than it may, or its process ended."""


class Contestant:
    """The benchmark's end; ``facts`` is what the contestant said when it was ready."""

    def __init__(self, script: str, job: dict[str, Any], seconds_allowed: float = math.inf) -> None:
        """Start ``script`` on ``job``; no answer may take longer than ``seconds_allowed``.

        Raises:
            Gone: it was not ready in time, or ended.
        """
        self._allowed = seconds_allowed
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A cache on disk would pass for fast compilation.
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
            start_new_session=True,  # an interrupt is the benchmark's, which ends the contestants
        )
        try:
            self.facts = self._ask(job)
        except BaseException:
            self.close()
            raise

    def take(self, steps: int) -> Answer:
        """Take training steps: the ``loss`` before the last of them, ``seconds``, memory, ....

        Raises:
            Gone: it took longer than it may, or ended.
        """
        return self._ask(steps)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

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
            raise Gone(f"not done in {self._allowed:g} s")
        raise Gone(f"its process ended with status {self._process.wait()}")


class Steps(Protocol):
    """What a contestant's script makes of its job.

    Attributes:
        facts: for the benchmark, as JSON takes it; ``gradient_bytes`` is a gradient's size.
    """

    facts: dict[str, Any]

    def take(self, steps: int) -> float:
        """Take training steps; the loss before the last of them."""


def serve(make: Callable[[dict[str, Any]], Steps], peak: Callable[[], int] | None = None) -> None:
    """Answer the benchmark until it closes the pipe; ``peak`` is memory counted elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not pass for an answer
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
    """What ``compile`` makes and the seconds that it takes: the least of so many ``times``.

    Other work on the machine, and what a process's first compilation sets up, only add to it.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < times and sum(seconds) < COMPILING):
        begun = time.perf_counter()
        made = compile()
        seconds.append(time.perf_counter() - begun)
    return made, min(seconds)


def peak_bytes() -> int:
    """Peak resident memory of this process alone."""
    # Linux hands the peak of `getrusage` down from the process that started this one.
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    """Let the peak be that of what follows, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
