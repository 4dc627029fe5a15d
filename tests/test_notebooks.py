"""The notebooks are small, are stored as they ran, and run.

Against: the rules of this file, and a fresh kernel in quick mode (W2SVD_QUICK=1). Run with
`python -m pytest tests/test_notebooks.py`; 10 to 30 seconds for each notebook on one quiet core,
and a minute more where the toy's backbones are not in their cache yet; all but the first are slow.
`python tests/remake.py` runs them in full and stores their outputs.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
LINES = {"05_at_scale": 110}  # of code; 70 for the others
FIRST, *OTHERS = PATHS
SLOW = [FIRST, *[pytest.param(path, marks=pytest.mark.slow) for path in OTHERS]]


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_picture(cell):
    return any(mime.startswith("image/") for out in cell.outputs for mime in out.get("data", ()))


@EACH
def test_a_notebook_is_small(path):
    cells = code_cells(read(path))
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    limit = LINES.get(path.stem, 70)
    assert len(cells) <= 12 and len(lines) <= limit, f"{len(cells)} cells, {len(lines)} lines"
    assert max(map(len, lines)) <= 100
    assert path.stat().st_size < 1.5e6


@EACH
def test_a_notebook_is_stored_as_it_ran_from_top_to_bottom(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert any(has_picture(cell) for cell in cells)
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]


@pytest.mark.parametrize("path", SLOW, ids=[path.stem for path in PATHS])
def test_a_notebook_runs_in_quick_mode_and_leaves_nothing_behind(path):
    notebook, before = read(path), sorted(FOLDER.iterdir())
    assert 'os.environ.get("W2SVD_QUICK")' in code_cells(notebook)[0].source
    quick = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "W2SVD_QUICK": "1"}
    how = {"timeout": 1800, "startup_timeout": 300, "kernel_name": "python3"}
    client = NotebookClient(notebook, resources={"metadata": {"path": FOLDER}}, **how)
    client.execute(env={**os.environ, **quick})
    assert sorted(FOLDER.iterdir()) == before
