"""The notebook runs from its first cell to its last, small and with few steps, in an empty
folder."""

from pathlib import Path

import pytest
from helpers import REPOSITORY, TINY, make_corpus

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")

pytestmark = pytest.mark.slow


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: value for name, value in TINY.items() if name.startswith("Model.")}
    fields = {"Data.source": make_corpus(tmp_path / "text"), **sizes, "Training.eval_rows": 8}
    monkeypatch.setenv("PLDR_STEPS", "5")
    monkeypatch.setenv("PLDR_FIELDS", " ".join(f"{k}={v}" for k, v in fields.items()))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(REPOSITORY / "notebooks" / "nano.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is kept without them
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert (tmp_path / "runs" / "notebook" / "analysis" / "report.html").exists()
    pictures = sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert pictures == 2
