"""mypy and ruff over the package, where they are installed: with the stub that was generated for this build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sparvar
from conftest import ROOT

PACKAGE = Path(sparvar.__file__).parent


def run(*arguments):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists() and (PACKAGE / "_engine.pyi").exists()
    for name in sparvar.__all__:
        assert getattr(sparvar, name).__doc__, f"sparvar.{name} has no documentation"


def whole_package(tmp_path):
    """As one folder: in a build tree the Python files are links to the sources, where the stub is not."""
    folder = tmp_path / "sparvar"
    folder.mkdir()
    for file in PACKAGE.iterdir():
        if file.suffix in (".py", ".pyi", ".typed"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_mypy(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    folder = whole_package(tmp_path)
    done = run("mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", folder)
    assert done.returncode == 0, done.stdout + done.stderr


USERS = """
import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type  # comes with mypy

import sparvar

pipe = sparvar.Pipeline.from_pretrained("model", device="cpu")
assert_type(pipe("a red apple", seed=1).seeds[0].seed, int)
report = sparvar.analyze(sparvar.analysis.Captures(), sparvar.schedule("1:1", "1M"), scales=[3])
assert_type(report, sparvar.analysis.Report)
assert_type(pipe.analyze("a red apple"), sparvar.analysis.Report)
assert_type(report.to_json(), str)
sinks: NDArray[np.float64] = report.sinks
plan = sparvar.plans.csla([1, 2, (3, 4)])
assert_type(plan.lists(0, 1).share_of_pairs, float)
q = np.zeros((1, 2, 4, 8), np.float32)
out: NDArray[np.float32] = sparvar.attention(q, q, q, plan=plan)
"""


def test_mypy_of_a_users_script(tmp_path):
    """Strict, with the package as an installed one is: its types are used, and a wrong argument is found."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    whole_package(tmp_path)
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(USERS)
    wrong.write_text('import sparvar\n\nsparvar.analyze("maps", [1])\nsparvar.schedule(16, 9)\n')
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nfollow_imports_for_stubs = True\ncache_dir = cache\n"
    )
    results = [
        subprocess.run([sys.executable, "-m", "mypy", file], capture_output=True, text=True, cwd=tmp_path)
        for file in (right, wrong)
    ]
    assert results[0].returncode == 0, results[0].stdout + results[0].stderr
    assert results[1].returncode == 1 and results[1].stdout.count("[arg-type]") == 3, results[1].stdout


def test_ruff():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (("check",), ("format", "--check")):
        done = run("ruff", *command, "--no-cache", ROOT / "python")
        assert done.returncode == 0, done.stdout + done.stderr
