"""The notebooks: small, only method code of the repository, outputs stored; and they run.

Against: the rules of this file, and a fresh kernel in quick mode (W2SVD_QUICK=1). Run with
`python -m pytest tests/test_notebooks.py`; 10 to 30 seconds for each notebook on one quiet core,
and a minute more where the toy's backbones are not in their cache yet; all but the first are slow.
`python -m tests.test_notebooks` runs them in full, 4 to 6 minutes, and stores their outputs.
"""

import ast
import os
import re
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import w2svd

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
LINES = {"05_at_scale": 110}  # of code; 70 for the others
FIRST, *OTHERS = PATHS
SLOW = [FIRST, *[pytest.param(path, marks=pytest.mark.slow) for path in OTHERS]]


def execute(notebook, **environment):
    """Run all cells in a fresh kernel, as if it had been opened in its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | environment
    how = {"timeout": 1800, "startup_timeout": 300, "kernel_name": "python3"}
    how |= {"record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": FOLDER}}, **how)
    client.execute(env=environment)
    notebook.metadata.language_info = {"name": "python"}


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def words(node):
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def has_picture(cell):
    return any(mime.startswith("image/") for out in cell.outputs for mime in out.get("data", ()))


def test_there_are_notebooks():
    assert PATHS


@EACH
def test_a_notebook_is_small(path):
    cells = code_cells(read(path))
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    limit = LINES.get(path.stem, 70)
    assert len(cells) <= 12 and len(lines) <= limit, f"{len(cells)} cells, {len(lines)} lines"
    assert max(map(len, lines)) <= 100
    assert path.stat().st_size < 1.5e6


@EACH
def test_a_notebook_defines_nothing_but_a_velocity_and_draws_nothing_itself(path):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(read(path))))
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.ClassDef, ast.AsyncFunctionDef)), ast.unparse(node)
        if isinstance(node, ast.FunctionDef):
            assert node.name == "velocity", node.name
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), ast.unparse(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not re.search(r"matplotlib|\btests?\b|\btest_", ast.unparse(node))
    assert not words(tree) & {"backward", "Module", "mse_loss"}  # a reader's optimizer is allowed


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


@EACH
def test_a_question_in_prose_comes_before_each_picture(path):
    prose = ""
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            prose += cell.source
        elif has_picture(cell):
            assert "?" in prose, cell.source
            prose = ""


def prose(path):
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_sections_2_to_6_run_under_the_imports_that_the_fourth_notebook_names(new_backbone):
    needs = re.search(
        r"```python\n(import copy.*?)```", prose(FOLDER / "04_your_model.ipynb"), re.S
    )
    source = Path(w2svd.__file__).read_text()
    sections = source[source.index("# ---- 2.") : source.index("# ---- 7.")]
    copy = types.ModuleType("copy_of_sections")
    exec(compile(needs[1] + sections, "copy_of_sections", "exec"), vars(copy))

    settings = {"batch": 4, "iterations": 2, "generator_lr": 1e-3, "fake_lr": 1e-3}
    config = w2svd.Config(generator_input="rollout", fake_samples="final", **settings)
    roles = copy.Roles(new_backbone(), 2, config.alpha_weak, config.alpha_strong)
    roles.use_checkpointing()
    state = copy.State(config, roles, "cpu")
    data = iter(lambda: {"x0": copy.torch.randn(4, 2), "cond": None}, None)
    stats = list(copy.distil(config, roles, state, data))
    assert len(stats) == state.iteration == 2 and stats[1]["relative_gap"] > 0
    with pytest.raises(copy.Refused):
        roles.load("generator", {})

    loaded = {node.id for node in ast.walk(ast.parse(sections)) if isinstance(node, ast.Name)}
    assert not {name for name in loaded if name in vars(w2svd)} - set(vars(copy))


def test_what_the_fifth_notebook_says_of_memory_is_what_its_plan_printed():
    path = FOLDER / "05_at_scale.ipynb"
    said = "".join(out.get("text", "") for cell in code_cells(read(path)) for out in cell.outputs)
    needs = [float(gib) for gib in re.findall(r"at the least, GiB +([\d.]+)", said)]
    assert len(needs) == 2 and all(f"{gib:.0f} GiB" in prose(path) for gib in needs), needs


@pytest.mark.parametrize("path", SLOW, ids=[path.stem for path in PATHS])
def test_a_notebook_runs_in_quick_mode_and_leaves_nothing_behind(path):
    notebook, before = read(path), sorted(FOLDER.iterdir())
    assert 'os.environ.get("W2SVD_QUICK")' in code_cells(notebook)[0].source
    execute(notebook, W2SVD_QUICK="1")
    assert sorted(FOLDER.iterdir()) == before


if __name__ == "__main__":
    for path in PATHS:
        notebook = read(path)
        execute(notebook)
        nbformat.write(notebook, path)
        print(path.name)
