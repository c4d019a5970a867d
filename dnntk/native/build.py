"""The CPU library behind `dnntk.native.ops`: built from C++ at its first use, then kept.

A compiler (``c++``, ``g++`` or ``clang++``, or the command in ``CXX``, such as ``ccache g++``)
builds it for this machine's processor, or for ``DNNTK_MARCH`` (``x86-64-v3``, say), in 10 to 20
seconds on two cores. Without a compiler, or with ``DNNTK_NATIVE=0``, everything runs in plain JAX,
with the same results to rounding.
"""

import atexit
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

from dnntk.errors import InputError
from dnntk.runs.locks import fcntl
from dnntk.runs.paths import as_path

__all__ = ["SETTLE_LAYERS", "available", "machine_flags"]

log = logging.getLogger("dnntk")

CPP = Path(__file__).with_name("cpp")
SOURCES = sorted(CPP.glob("*.*"))
# Layers whose terms are added up before they go into a narrow network's state.
SETTLE_LAYERS = 16
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", f"-DDNNTK_SETTLE_LAYERS={SETTLE_LAYERS}")
# Compiled at the same time: JAX's side, and the layers in either precision.
PARTS = (
    ("-O1", str(CPP / "ffi.cc")),
    *(("-DDNNTK_REAL=" + real, str(CPP / "layers.cc")) for real in ("float", "double")),
)
FUNCTIONS = ("forward", "tangent", "gradient", "sgd_step", "sgd_steps")
SECONDS_ALLOWED = 300
# Instructions of x86-64 by the names that Linux and compilers give them.
VECTORS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")


@functools.cache
def available() -> bool:
    """Can the library be used? Builds and registers it, once a process."""
    if os.environ.get("DNNTK_NATIVE", "1") == "0":
        log.info("native: switched off by DNNTK_NATIVE=0; layers run in plain JAX")
        return False
    try:
        library = ctypes.CDLL(str(_built()))
        for name in FUNCTIONS:
            target = jax.ffi.pycapsule(getattr(library, f"dnntk_{name}"))
            jax.ffi.register_ffi_target(f"dnntk_{name}", target, platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        log.warning(
            "native: layers run in plain JAX, several times slower on CPU, since the C++ library "
            "could not be built: %s",
            why.strip().splitlines()[0] if why.strip() else error,
        )
        return False
    return True


def _built() -> Path:
    """The library's file, compiled unless it exists already."""
    compiler = _compiler()
    _check_level(compiler)
    command = [*compiler, *FLAGS, *machine_flags(), f"-I{jax.ffi.include_dir()}"]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    version = _output([*compiler, "--version"])
    for part in (*command, *sum(PARTS, ()), version, _processor(), jaxlib.__version__):
        key.update(os.fsencode(part) + b"\0")
    file = _folder() / f"layers-{key.hexdigest()[:24]}.so"
    if file.exists():
        return file
    with _one_at_a_time(file.parent):
        if file.exists():  # another process was faster
            return file
        log.info("native: compiling the CPU library, once (10 to 30 s)")
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            made = Path(scratch, file.name)
            objects = [str(made.with_suffix(f".{part}.o")) for part in range(len(PARTS))]
            commands = [
                [*command, *part, "-c", "-o", target]
                for part, target in zip(PARTS, objects, strict=True)
            ]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(_output, commands))
            _output([*compiler, "-shared", "-pthread", *objects, "-o", str(made)])
            made.replace(file)
    return file


def machine_flags() -> list[str]:
    """The compiler's options for the processor: of ``DNNTK_MARCH``, or of this machine."""
    flags = [f"-march={os.environ.get('DNNTK_MARCH', '').strip() or 'native'}"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    return flags


def _check_level(compiler: list[str]) -> None:
    """Raises an OSError if ``DNNTK_MARCH`` has vectors that this processor lacks."""
    level = os.environ.get("DNNTK_MARCH", "").strip()
    if not level or platform.machine() not in ("x86_64", "AMD64"):
        return
    macros = _output([*compiler, *machine_flags(), "-dM", "-E", "-xc++", os.devnull]).split()
    here = _processor().split()
    lacking = [kind for kind in VECTORS if f"__{kind.upper()}__" in macros and kind not in here]
    if lacking:
        raise OSError(f"DNNTK_MARCH={level} needs {', '.join(lacking)}, which this processor lacks")


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of one job that start together wait for the one that compiles."""
    with open(folder / ".lock", "w") as stream:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _output(command: list[str]) -> str:
    given: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
    done = subprocess.run(command, timeout=SECONDS_ALLOWED, check=True, **given)
    return str(done.stdout)


def _compiler() -> list[str]:
    """The command that compiles, in words: ``CXX`` may name a wrapper and options too."""
    named = os.environ.get("CXX", "").strip()
    if named and (found := shutil.which(named)):  # a path with spaces, unquoted
        return [found]
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise OSError(f"CXX={named} is no command ({error})") from None
    for name, *options in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(name):
            return [found, *options]
    raise OSError(f"no C++ compiler found{f' at CXX={named}' if words else ''}")


def _folder() -> Path:
    """A folder that only this user can write to: code is loaded from it."""
    try:
        base = as_path("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = base / "dnntk"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if (
            status.st_uid == os.getuid()
            and not status.st_mode & 0o022
            and os.access(folder, os.W_OK)
        ):
            return folder
    except (OSError, InputError):  # the latter where the user has no home
        pass
    return _scratch()


@functools.cache
def _scratch() -> Path:
    """Where no cache can be kept, the library is built anew by every process."""
    folder = tempfile.mkdtemp(prefix="dnntk-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
