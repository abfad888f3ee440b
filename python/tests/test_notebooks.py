"""The notebooks of examples/notebooks: every code cell runs, in order, as a user would run them."""

from __future__ import annotations

import ast
import json
import sys

import pytest

from conftest import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NEEDS = {"generate": [], "kernels_in_your_own_model": ["torch"], "analyse": ["matplotlib"]}
"""Besides numpy and Pillow, which the package brings."""


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]


def test_all_are_here():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_runs(name, model, monkeypatch):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{name}.ipynb needs {package}, which is not installed")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if "matplotlib" in NEEDS[name]:
        from matplotlib import pyplot

        pyplot.switch_backend("Agg")
    monkeypatch.chdir(FOLDER)  # where Jupyter runs them
    first, *rest = code(name)
    space: dict = {"__name__": "__main__"}
    exec(compile(first, f"{name}.ipynb", "exec"), space)
    assert (FOLDER / space["MODEL"] / "config.json").exists(), "the model's path is in the first cell"
    for number, cell in enumerate(rest, 2):
        exec(compile(cell, f"{name}.ipynb, code cell {number}", "exec"), space)
    if "matplotlib" in NEEDS[name]:
        assert len(pyplot.get_fignums()) >= 5
        for figure in pyplot.get_fignums():
            pyplot.figure(figure).canvas.draw()
        pyplot.close("all")


@pytest.mark.parametrize("name", NEEDS)
def test_says_what_it_needs_and_holds_no_outputs(name):
    imported = set()
    for cell in code(name):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"numpy", "PIL", "sparvar", *NEEDS[name]}
    assert not any("models/" in cell for cell in code(name)[1:])
    for cell in cells(name):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
