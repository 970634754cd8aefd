"""The notebook runs from top to bottom, in small."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_from_data_to_picture(monkeypatch):
    notebook = nbformat.read(DOCS / "from_data_to_picture.ipynb", as_version=4)
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for name, value in {"SCENES": "4", "ITERATIONS": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(DOCS)}}).execute()  # raises as cells do
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures == 2
    assert "scene_00011.png" in outputs[-1]["text"]  # the last label map's picture
