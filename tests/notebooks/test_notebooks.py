# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom on a short training of the demo, and is stored with what it printed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


pytestmark = pytest.mark.one_major


FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="session")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebooks") / "demo"  # shared: what one has trained the next one loads


def test_there_are_notebooks():
    assert {"quickstart", "exits_and_figures", "edge_export"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, output, tmp_path):
    if name == "edge_export":
        pytest.importorskip("onnxscript")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings = {"OUTPUT": str(output), "EXPORTED": str(tmp_path / "onnx"), "EPOCHS": 2}
    assert {line.split(" = ")[0] for line in parameters.source.splitlines()} <= set(settings)
    quick = [
        "import modeling_mevit.onnx.benchmark as runs",
        "runs.MEMORY_PROCESSES = 1",
    ]  # each takes seconds to start
    lines = [f"{setting} = {value!r}" for setting, value in settings.items()]
    parameters.source = "\n".join([*lines, *(quick if name == "edge_export" else [])])
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == {"quickstart": 1, "exits_and_figures": 3, "edge_export": 0}[name]


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_with_its_output(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    # warnings name the machine that ran it
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
