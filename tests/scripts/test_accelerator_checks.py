"""Compiled for an H100 and a TPU that are not there, where JAX's plug-ins are installed."""

import importlib.util
import json
import os
import subprocess
import sys

import processes
import pytest

SPEC = importlib.util.spec_from_file_location(
    "accelerator_checks", processes.SCRIPTS / "accelerator_checks.py"
)
checks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(checks)

CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import accelerator_checks
print(json.dumps(accelerator_checks.accelerators(None)))
"""
# A loop of 3 turns with a loop of 5 in it.
THUNKS = """
001: kCustomKernel [source] fusion
002: kWhile        [prev=001]
condition:
    003: kCustomKernel [source] compare
  body:
    004: kDynamicSliceFusion [source]
        005: kCopy [source] kCopy
    006: kWhile [prev=004]
condition:
        007: kCustomKernel [source] compare
      body:
        008: kCustomKernel [source] fusion
009: kCublasLtMatmul [prev=002]
"""
PROGRAM = """
%inner (p: f32[]) -> f32[] {
}
%outer (p: f32[]) -> f32[] {
  %w = f32[] while(%p), condition=%c, body=%inner, config={"known_trip_count":{"n":"5"}}
}
ENTRY %main (p: f32[]) -> f32[] {
  %w = f32[] while(%p), condition=%c, body=%outer, config={"known_trip_count":{"n":"3"}}
}
"""


def test_launches_in_loops_count_as_often_as_the_loops_turn():
    assert checks._total(THUNKS, PROGRAM) == 2 + 3 * (2 + 5 * 2)


@pytest.mark.skipif(bool(checks.missing()), reason="needs JAX's plug-ins for CUDA and TPU")
def test_all_programs_compile_and_a_layer_is_few_launches():
    command = [sys.executable, "-c", CODE, str(processes.SCRIPTS)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["compile_seconds"]) == 30
    for name, counted in found["launches_a_step"].items():
        assert counted["launches_a_layer"] <= checks.MOST_LAUNCHES[name.split(",")[0]], name
