"""The CPU library's products at every processor level, its build, and errors at its boundary."""

import logging
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import moved_network

from dnntk.native import build, ops
from dnntk.native.blocks import CpuBudget
from dnntk.networks.models import network_of

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not build.available(), reason="needs a C++ compiler"
)
# What a level needs of a processor, and its bytes in a vector.
LEVELS = {
    "x86-64-v2": ("ssse3 sse4_1 sse4_2 popcnt", 16),
    "x86-64-v3": ("avx2 fma bmi1 bmi2 f16c movbe", 32),
    "x86-64-v4": ("avx512f avx512bw avx512cd avx512dq avx512vl", 64),
}


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_those_of_plain_loops_at_every_level_of_the_processor(
    level, tmp_path, monkeypatch
):
    needs, bytes_in_vector = LEVELS[level]
    if not set(needs.split()) <= set(build._processor().split()):
        pytest.skip(f"this processor is not {level}")
    monkeypatch.setenv("DNNTK_MARCH", level)
    program = tmp_path / "products"
    source = Path(__file__).with_name("products.cc")
    flags = *build.FLAGS, *build.machine_flags(), "-O0", f"-I{build.CPP}"
    build._output([*build._compiler(), *flags, str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == f"{bytes_in_vector} bytes, 0 failures\n"


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("i8086-v9", "i8086-v9"),
        ("x86-64-v3", "DNNTK_MARCH=x86-64-v3 needs avx, avx2, fma, which this processor lacks"),
    ],
    ids=["unknown to the compiler", "beyond the processor"],
)
def test_a_processor_level_that_does_not_exist_here_is_one_line_and_plain_jax(
    level, message, monkeypatch, tmp_path, caplog
):
    if build.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("levels of x86-64")
    monkeypatch.setenv("DNNTK_MARCH", level)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_processor", lambda: "flags : sse4_2")
    with caplog.at_level(logging.WARNING, "dnntk"):
        assert not build.available.__wrapped__()
    (record,) = caplog.records
    found = record.getMessage()
    assert "plain JAX" in found and message in found and "\n" not in found


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_without_a_compiler_one_line_says_so(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, "dnntk"):
        assert not build.available.__wrapped__()
    (record,) = caplog.records
    assert "plain JAX" in record.getMessage() and "\n" not in record.getMessage()


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DNNTK_NATIVE", "0")
    assert not build.available.__wrapped__()


def test_code_is_never_loaded_from_a_folder_that_others_can_write_to(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = build._folder()
    assert own == tmp_path / "dnntk" and own.stat().st_mode & 0o077 == 0
    own.chmod(0o777)
    assert build._folder() != own


@pytest.fixture(scope="module")
def call():
    model, params, frozen, x, _ = moved_network((3, 2), 1, 5, "float32", {})
    network, layers, initial = network_of(model, {"params": params, **frozen}, x)
    h = ops._first_z(network, layers["first"], initial)
    return ops._common(network, layers, initial, h, CpuBudget(1))


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"side": np.int64(7)}, "float32", "side must be 1, 3 or 5, got 7"),
        ({"initial": "orthogonal"}, "float32", "initial must be none, matrices or features"),
        ({}, "float16", "arrays must be float32 or float64"),
        ({}, "int32", "arrays must be float32 or float64"),
    ],
)
def test_what_the_library_has_no_code_for_is_an_error_in_one_line(settings, dtype, message, call):
    operands = [jnp.asarray(a).astype(dtype) for a in call.operands]
    common = ops._Common(call.settings | settings, operands)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: .*{message}") as error:
        jax.block_until_ready(ops._call("forward", operands[-1], common))
    assert "\n" not in str(error.value).strip()


def test_arrays_of_two_dtypes_are_an_error(call):
    operands = [*call.operands[:-1], call.operands[-1].astype("float16")]
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected all arrays of one dtype"):
        common = ops._Common(call.settings, operands)
        jax.block_until_ready(ops._call("forward", call.operands[-1], common))
