"""What is installed: the whole package, found from every folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling import build

import dnntk

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_the_package_with_its_sources_and_styles_and_nothing_else(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    wheel = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path)))
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kinds = (".py", ".cc", ".h", ".css", ".typed")
    files = [file for file in (ROOT / "dnntk").rglob("*") if file.suffix in kinds]
    assert names == {str(file.relative_to(ROOT)) for file in files}
    assert {
        "dnntk/native/cpp/ffi.cc",
        "dnntk/native/cpp/simd.h",
        "dnntk/report/page.css",
        "dnntk/py.typed",
    } <= names


def test_the_package_is_found_in_a_folder_that_holds_a_clone(tmp_path):
    (tmp_path / "dnntk" / "dnntk").mkdir(parents=True)  # found as a package without a file
    code = "import importlib.util; print(importlib.util.find_spec('dnntk').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert Path(done.stdout.decode().strip()).name == "__init__.py", done.stderr


def test_the_package_lists_its_public_names_alone():
    assert dir(dnntk) == sorted(dnntk.__all__)
    assert {"InfiniteDepthClassifier", "InfiniteDepthRegressor"} <= set(dir(dnntk))
    assert all(hasattr(dnntk, name) for name in dir(dnntk))


def test_hosted_checks_call_the_same_script():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
