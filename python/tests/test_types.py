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


def test_mypy(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    # As one folder: in a build tree the Python files are links to the sources, where the stub is not.
    folder = tmp_path / "sparvar"
    folder.mkdir()
    for file in PACKAGE.iterdir():
        if file.suffix in (".py", ".pyi", ".typed"):
            (folder / file.name).write_bytes(file.read_bytes())
    done = run("mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (("check",), ("format", "--check")):
        done = run("ruff", *command, "--no-cache", ROOT / "python")
        assert done.returncode == 0, done.stdout + done.stderr
