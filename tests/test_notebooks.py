"""The notebooks of docs/, executed at a small size."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
SMALL = {"PROMPTS": 6, "HELD_OUT": 4, "STEPS": 2, "PAIRS_A_STEP": 2}
SAYS_NO = re.compile(r"(Error: |Traceback|ended with status)")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_runs(path, tmp_path, python, monkeypatch):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "diffalign").write_text(f'#!/bin/sh\nexec {python} -m diffalign "$@"\n')
    (commands / "diffalign").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in {**SMALL, "FOLDER": repr(str(tmp_path))}.items():
        line = re.compile(rf"(?m)^{name} = \S+")
        parameters.source, found = line.subn(f"{name} = {value}", parameters.source)
        assert found == 1
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert not SAYS_NO.search(said), said
    assert (tmp_path / "aligned.safetensors").is_file()
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_output_is_kept(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)
