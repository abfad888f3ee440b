"""docs/python-api.md is what scripts/python-docs makes of the docstrings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import sparvar
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "python-docs"
PAGE = ROOT / "docs" / "python-api.md"


def run(script: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(sparvar.__file__).parents[1])}
    return subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, env=environment)


def test_the_page_is_what_the_docstrings_say(tmp_path):
    done = run(SCRIPT)
    assert done.returncode == 0, done.stderr
    for folder in ("scripts", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts" / "python-docs").write_text(SCRIPT.read_text())
    (tmp_path / "docs" / "python-api.md").write_text(PAGE.read_text().replace("Draws pictures", "Draws"))
    assert run(tmp_path / "scripts" / "python-docs").returncode == 1, "another page is not taken for it"


def test_every_public_name_is_on_it():
    page = PAGE.read_text()
    names = [f"sparvar.{name}" for name in sparvar.__all__ if name != "__version__"]
    names += [f"{module.__name__}.{name}" for module in (sparvar.analysis, sparvar.plots) for name in module.__all__]
    names += [
        "sparvar.plans.csla",
        "sparvar.Pipeline.from_pretrained",
        "sparvar.Pipeline.analyze",
        "sparvar.Pipeline()",
    ]
    for name in names:
        own = f"sparvar.{name.rpartition('.')[2]}"
        assert f" {name}\n" in page or f" {own}\n" in page, name
