"""The notebook in docs/, run in a real kernel from the folder where it lies."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

from core.events import Result

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def test_the_notebook_runs_and_shows_its_pictures(
    draw: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))  # where no weights but the miniature's are
    monkeypatch.setenv("Z_IMAGE_MODELS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    data = [output.get("data", {}) for cell in outputs for output in cell]
    shown = [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]
    png = draw(prompt="a red apple on a blue background", seed=7).png
    assert shown == [png, png]
    printed = ["".join(output.get("text", "") for output in cell) for cell in outputs]
    assert "Step 8" in printed[2]
    assert printed[2].splitlines()[-1].startswith("Result")
    assert printed[4].startswith("steps: 1000 is not possible")
