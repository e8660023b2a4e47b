"""examples/notebook.ipynb does what it says, from its first cell to its last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cells after all of them have run, in a copy of examples/."""
    folder = tmp_path_factory.mktemp("notebook") / "examples"
    shutil.copytree(EXAMPLES, folder)
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return list(notebook.cells)


def output(cells: list[Any], source: str) -> str:
    """What the cell that begins with `source` gave."""
    (cell,) = (each for each in cells if each.source.startswith(source))
    return "".join(
        (each.get("data") or {}).get("text/plain", "") + (each.get("text") or "")
        for each in cell.outputs
    )


@pytest.mark.timeout(600)
def test_the_notebook_teaches_and_says_so(cells: list[Any]) -> None:
    """A digest, a loss that fell, the taught answer; the chart is one figure that was redrawn."""
    assert "sha256:" in output(cells, "question =")
    first, last = eval(output(cells, "result.losses"))  # the repr of two pairs of numbers
    assert last[1] < first[1] / 100
    assert "bassoon" in output(cells, 'result.training["answers"]')
    (cell,) = (each for each in cells if each.source.startswith("question ="))
    (figure,) = (each for each in cell.outputs if each.output_type == "display_data")
    assert "polyline" in figure["data"]["text/html"]


def test_it_is_kept_without_output() -> None:
    """Output would be a copy of what a run says, and change with each one."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)

    assert [] == [c for c in notebook.cells if c.cell_type == "code" and c.outputs]
