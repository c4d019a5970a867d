"""What all scripts share: flags from configurations, and errors as one line and a status."""

import dataclasses
import inspect
import itertools
import logging
import math
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, NoReturn, TypeVar

import absl.logging
import jax
from absl import flags

import dnntk
from dnntk import Diverged, InputError
from dnntk.data.datasets import DATASETS
from dnntk.errors import Interrupted, Stopped
from dnntk.infinite_depth.config import SELECTIONS
from dnntk.infinite_depth.kernel_flow import SOLVERS
from dnntk.networks.initializers import INITS
from dnntk.networks.models import PARAMETRIZATIONS
from dnntk.networks.random_units import FEATURES
from dnntk.runs.interruption import raise_on_sigterm
from dnntk.runs.paths import as_path
from dnntk.runtime import processes
from dnntk.runtime.progress import SafeStream
from dnntk.training.config import ARCHITECTURES, DTYPES, OPTIMIZERS, SCHEDULES, parse_classes
from dnntk.training.pipeline import parse_mesh

__all__ = [
    *("chosen", "define", "define_processes", "depths", "from_flags", "listed"),
    *("new_workdir", "run", "values", "words", "workdir"),
]

MOST_HOST_DEVICES = 8  # beyond it the parts of a batch become too small
MOST_HOST_DEVICES_ASKED = 64  # by a mesh, for trials
# Words in JAX's errors about a process that does not answer.
LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection")
ALONE = "another process of the job is gone; go on with --resume and the same --workdir"
# The start of JAX's report of a lost process, after which JAX ends this process.
REPORT = re.compile(
    rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service\w*|preemption_sync_manager|client)\.(cc|h)"
)
INTERRUPTED = (130, 143)
HELP = {"-h", "--help", "--helpshort", "--helpfull"}
# The values of fields that are a choice, whatever the configuration.
CHOICES: dict[str, Sequence[str]] = {
    **{"arch": ARCHITECTURES, "dataset": DATASETS, "dtype": DTYPES, "features": FEATURES},
    **{"init": INITS, "optimizer": OPTIMIZERS, "parametrization": PARAMETRIZATIONS},
    **{"schedule": SCHEDULES, "select": SELECTIONS, "solver": SOLVERS},
}
EXAMPLES = {int: "whole numbers like 100,1000", float: "numbers like 1,100", str: "words like a,b"}
# A docstring's section of fields or arguments, and one entry in it: `names: description`.
SECTION = re.compile(r"^(?:Args|Attributes):\n((?: .*\n|\n(?= ))*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", re.MULTILINE)
# How Python begins its message about a text that is no number.
FLOAT_ERROR = "could not convert string to float: "
Config = TypeVar("Config")

flags.disclaim_key_flags()  # the flags defined here belong to the calling script


def define(config: type, **choices: Sequence[str]) -> None:
    """A flag for every field of a configuration, with its type, default and documentation.

    ``choices`` are the values of fields that are a choice in this configuration, beside `CHOICES`.
    """
    documented = _documentation(config)
    for field in dataclasses.fields(config):
        name, text = field.name, documented.get(field.name, "")
        default: Any = field.default
        kinds, allowed = _kinds(field.type), (CHOICES | choices).get(field.name)
        if allowed:
            flags.DEFINE_enum(name, default, allowed, text)
        elif str in kinds:
            flags.DEFINE_string(name, ",".join(words(default)) if tuple in kinds else default, text)
        elif tuple in kinds:
            flags.DEFINE_list(name, None if default is None else words(default), text)
        else:
            (flags.DEFINE_integer if int in kinds else flags.DEFINE_float)(name, default, text)


def values(config: type) -> dict[str, Any]:
    """The fields of a configuration as the flags of `define` give them."""
    found = {}
    for field in dataclasses.fields(config):
        name, kinds = field.name, _kinds(field.type)
        found[name] = value = flags.FLAGS[name].value
        if tuple in kinds and value is not None:
            entry = kinds[tuple]
            found[name] = (
                parse_classes(value) if str in kinds else listed(name, entry, EXAMPLES[entry])
            )
    return found


def from_flags(config: type[Config]) -> Config:
    """The configuration that the flags of `define` describe."""
    return config(**values(config))


def define_processes() -> None:
    """The flags by which several processes of a script become one job."""
    flags.DEFINE_bool("distributed", False, "One of several processes, as the cluster says.")
    flags.DEFINE_string("coordinator", None, "First process's host:port, where no cluster says.")
    flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Number of this process, from 0 on.", lower_bound=0)


def workdir(default: Callable[[], Path] | None = None) -> Path:
    """The folder for all results: what ``--workdir`` says, else ``default()``."""
    given = flags.FLAGS.workdir
    path = default() if given is None and default else as_path("workdir", given)
    flags.FLAGS["workdir"].value = str(path)  # for messages that advise --resume
    return path


def new_workdir(stem: str) -> Path:
    """A folder under runs/ that does not exist yet: ``stem``, ``stem-2``, ``stem-3``, ..."""
    suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    paths = (Path("runs") / (stem + suffix) for suffix in suffixes)
    return next(path for path in paths if not path.exists())


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call ``main``; bad input ends with exit status 2 and one line."""
    _make_output_safe()
    if HELP & set(sys.argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}")
        return
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise InputError(f"expected flags like --depth=1000, got {' '.join(rest)!r}")
        raise_on_sigterm(lambda: f"SIGTERM: stopped; {_go_on()}")
        _log_lines()
        _one_host_device_a_core()
        _join_others()
        main()
    except InputError as error:
        _stop(_naming_flags(str(error)), 2)
    except flags.Error as error:
        _stop(_naming_numbers(str(error)), 2)
    except Diverged as error:
        _stop(str(error), 1)
    except Interrupted as interrupted:
        _stop(_naming_workdir(interrupted.message), 130)
    except KeyboardInterrupt:
        _stop(f"interrupted; {_go_on()}", 130)
    except Stopped as stopped:
        _stop(_naming_workdir(stopped.message), 143)
    except jax.errors.JaxRuntimeError as error:
        if not processes.is_multiprocess() or not any(word in str(error) for word in LOST):
            raise
        print(f"{os.path.basename(sys.argv[0])}: {ALONE}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for the other processes
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _stop(f"{error.strerror or error}{where}; fix the cause, and {_go_on()}", 1)


def words(values: Sequence[float | str]) -> list[str]:
    """The default of a list flag, as text."""
    return [value if isinstance(value, str) else f"{value:.12g}" for value in values]


def listed(name: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    """The entries of a list flag, each converted by ``kind``."""
    words = [word for word in flags.FLAGS[name].value or () if word]
    try:
        return tuple(kind(word) for word in words)
    except ValueError:
        raise InputError(f"{name}: expected {example}, got {','.join(words)!r}") from None


def chosen(name: str, known: Collection[str], without: Collection[str] = ()) -> list[str]:
    """The names of a list flag, all in ``known``; "all" means ``known`` except ``without``."""
    names: list[str] = flags.FLAGS[name].value or []
    if names == ["all"]:
        return [one for one in known if one not in without]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def depths(name: str, least: int) -> list[int]:
    """The depths of a list flag, at least ``least``, ascending and without repeats."""
    found = sorted(set(listed(name, int, "numbers like 10,100,1000")))
    if not found or found[0] < least:
        given = ",".join(flags.FLAGS[name].value or ())
        raise InputError(f"{name}: expected numbers from {least} on, got {given!r}")
    return found


def _kinds(annotation: Any) -> dict[type, Any]:
    """The types that a field may have, except None: {type: the type of its entries, if any}."""
    union = not isinstance(annotation, type) and typing.get_origin(annotation) is not tuple
    members = typing.get_args(annotation) if union else (annotation,)
    return {
        typing.get_origin(member) or member: next(iter(typing.get_args(member)), None)
        for member in members
        if member is not NoneType
    }


def _documentation(owner: type) -> dict[str, str]:
    """{field or argument: its description in the docstring, as plain text}.

    "As in" another class is replaced by that class's description, a constant's name by its value.
    """
    docstrings = f"{inspect.getdoc(owner)}\n\n{inspect.getdoc(vars(owner)['__init__'])}\n"
    return {
        name: _plain(" ".join(text.split()), name, sys.modules[owner.__module__])
        for section in SECTION.findall(docstrings)
        for names, text in ENTRY.findall(section)
        for name in names.split(", ")
    }


def _plain(text: str, name: str, module: ModuleType) -> str:
    if other := re.match(r"as in `(\w+)`", text):
        text = _documentation(getattr(dnntk, other[1]))[name].rstrip(".") + text[other.end() :]

    def value(constant: re.Match[str]) -> str:
        held = getattr(module, constant[1])
        return f"{held:.12g}" if isinstance(held, int | float) else ", ".join(words(held))

    text = re.sub(r"`([A-Z_]+)`", value, text).replace("`", "")
    return text[0].upper() + text[1:]


def _go_on() -> str:
    # Scripts without --resume always continue in their workdir.
    resume = ["--resume"] if "resume" in flags.FLAGS else []
    values = flags.FLAGS.flag_values_dict() if flags.FLAGS.is_parsed() else {}
    if values.get("workdir") is None:
        return f"go on with {' and '.join([*resume, 'the same --workdir'])}"
    named = f"--workdir={values['workdir']}"
    # With all that was given: nothing may be written yet, and predictions keep no flags.
    return f"go on with {shlex.join([*resume, named, *_other_arguments(sys.argv[1:])])}"


def _other_arguments(arguments: list[str]) -> list[str]:
    """The arguments of a command line without --resume and --workdir."""
    others, skip = [], False
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if not skip and name not in ("resume", "noresume", "workdir"):
            others.append(argument)
        skip = not skip and argument in ("--workdir", "-workdir")
    return others


def _naming_workdir(message: str) -> str:
    """Advise the script's workdir: a run inside an experiment names its own inner folder."""
    done, kept, _ = message.partition("; go on with")
    return f"{done}; {_go_on()}" if kept else message


def _naming_flags(message: str) -> str:
    """The library's message with ``--`` before the arguments that are flags.

    Messages start like "lr, time_step: expected ..." or "pool=3: expected ...".
    """
    message = message.replace("resume=True", "--resume")
    names, found, rest = message.partition(":")
    arguments = [part.partition("=")[0].strip() for part in names.split(",")]
    if not found or not all(name in flags.FLAGS for name in arguments):
        return message
    return f"{', '.join('--' + part.strip() for part in names.split(','))}:{rest}"


def _naming_numbers(message: str) -> str:
    """The flag parser's message with the kind of number that it expected."""
    kinds = {"invalid literal for int() with base 10: ": "a whole number", FLOAT_ERROR: "a number"}
    for error, kind in kinds.items():
        message = message.replace(error, f"expected {kind}, got ")
    return message


def _make_output_safe() -> None:
    """Print any character in any encoding, and go on after the reader of a pipe has ended."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # None if closed
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, SafeStream(stream))


def _stop(message: str, status: int) -> NoReturn:
    if sys.stderr is not None:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}", file=sys.stderr)
    if status in INTERRUPTED and not processes.is_multiprocess():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)  # an orderly exit crashes (139) if JAX's threads still compute
    sys.exit(status)


def _log_lines() -> None:
    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax logs every checkpoint
    _silence_orbax_threads()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dnntk")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _silence_orbax_threads() -> None:
    """Do not print the tracebacks of orbax's threads; orbax raises the same error in the caller.

    The threads may print at any time, even after the script's own error. Tensorstore's futures also
    print when they end after orbax has closed their event loop.
    """
    absl.logging.get_absl_logger().addFilter(
        lambda record: "_SignalingThread" not in record.getMessage()
    )
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _join_others() -> None:
    """Join the other processes that the flags name; only the first process logs progress."""
    values = flags.FLAGS.flag_values_dict()
    if not (values.get("distributed") or values.get("coordinator")):
        if values.get("processes") or values.get("process"):
            raise InputError(
                "coordinator: expected the first process's host:port beside --processes and "
                "--process, or --distributed, got neither"
            )
        return
    _shorten_reports_of_lost_processes()
    processes.join(values["coordinator"], values["processes"], values["process"])
    if not processes.is_primary():
        logging.getLogger("dnntk").setLevel(logging.WARNING)


def _shorten_reports_of_lost_processes() -> None:
    """Replace JAX's report of a lost process by one line, in a child that filters stderr.

    JAX's client prints a C++ stack trace and ends the process, which Python cannot catch.
    """
    if not hasattr(os, "fork"):
        return
    read, write = os.pipe()
    if os.fork() == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.close(write)
        shown = True
        while chunk := os.read(read, 1 << 16):
            report = REPORT.search(chunk)
            if shown:
                os.write(2, chunk[: report.start()] if report else chunk)
            if report and shown:
                os.write(2, f"\n{os.path.basename(sys.argv[0])}: {ALONE}\n".encode())
                shown = False
        os._exit(0)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)


def _one_host_device_a_core() -> None:
    """On CPU, give JAX one host device per core, as narrow layers are too small for threads.

    With ``--mesh``, give JAX the mesh's number of devices, divided by the number of processes.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    values = flags.FLAGS.flag_values_dict()
    asked = math.prod(parse_mesh(values.get("mesh") or "").values())
    devices = -(-asked // (values.get("processes") or 1))
    if devices > MOST_HOST_DEVICES_ASKED:
        raise InputError(
            f"mesh: expected at most {MOST_HOST_DEVICES_ASKED} devices a process on CPU, "
            f"got {devices}"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = devices if values.get("mesh") else min(cores or 1, MOST_HOST_DEVICES)
    jax.config.update("jax_num_cpu_devices", own)
