"""The claims that the project makes about itself: size, imports, commands, numbers, links.

Reference: the files as they are, and tests/remake.py for what follows from code. Run:
python -m pytest tests/test_house.py, half a minute on one core.
"""

import ast
import dataclasses
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import w2svd
from toy.table import CASES, METHOD_SEEDS, METHODS, SEEDS

BUDGET = 1500  # lines of w2svd.py as ruff formats them, in the end
CEILING = 2337  # where it stands, to be lowered with it
PAPER = 520  # of them in sections 2 to 6, the paper
SETTINGS = 50
README_LINES = 130

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "w2svd.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOY, TESTS = sorted((ROOT / "toy").rglob("*.py")), sorted((ROOT / "tests").glob("*.py"))
CODE = [ROOT / "w2svd.py", *TOY]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *(ROOT / n for n in ("toy", "toy/study", "tests"))]
PAGES = [path if path.is_file() else path / "README.md" for path in PAGES]


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def read(path):
    """The text of a file; of a notebook its cells, without their outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def code_of(path):
    """The syntax tree of a file, or of a notebook's code."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    else:
        text = read(path)
    return ast.parse(text)


def depth(node, level=0):
    """How deep if, for, while, with and try are nested below a function."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    inner = []
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        if not isinstance(child, ast.FunctionDef):
            inner.append(depth(child, level + (isinstance(child, blocks) and not is_elif)))
    return max(inner, default=level)


def run(*command, cwd=ROOT):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# ---- size and form -------------------------------------------------------------------------------


@pytest.mark.xfail(reason="it has 2,300 lines: a budget that is missed", strict=True)
def test_the_file_is_within_its_budget():
    assert len(SOURCE.splitlines()) <= BUDGET


def test_the_file_does_not_grow_unnoticed_and_the_paper_in_it_is_short():
    assert len(SOURCE.splitlines()) <= CEILING
    paper = SOURCE[SOURCE.index("# ---- 2. ") : SOURCE.index("# ---- 7. ")]
    assert len(paper.splitlines()) <= PAPER


def test_the_readme_is_short():
    assert len(README.splitlines()) <= README_LINES


@named(CODE)
def test_functions_and_nesting_stay_small(path):
    for f in ast.walk(code_of(path)):
        if isinstance(f, ast.FunctionDef):
            limit = 75 if f.name == "train" else 42  # 'about 40'
            assert f.end_lineno - f.lineno + 1 <= limit, f.name
            assert depth(f) <= 3 + (f.name in ("train", "distil")), f.name  # their loops


@named([*CODE, *TESTS])
def test_no_line_is_packed_against_the_formatter(path):
    assert not re.search(r"#\s*fmt:\s*(skip|off)", read(path))


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_finds_nothing(command):
    done = run(sys.executable, "-m", "ruff", *command.split(), "--no-cache", ".")
    assert done.returncode == 0, done.stdout


def test_every_setting_says_what_it_means_and_where_it_comes_from():
    fields = dataclasses.fields(w2svd.Config)
    assert len(fields) <= SETTINGS
    for field in fields:
        meaning, source = field.metadata["text"].rsplit(" / ", 1)
        assert meaning and re.match(r"(paper|author-code|peer|ours)\b", source), field.name


# ---- imports -------------------------------------------------------------------------------------


def modules(node):
    """The top modules that the imports below a node name."""
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            names |= {alias.name.split(".")[0] for alias in n.names}
        elif isinstance(n, ast.ImportFrom):
            names.add(n.module.split(".")[0])
    return names


def imported_at_once(tree):
    """The top modules imported at module level."""
    return set().union(
        *(modules(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
    )


def test_the_file_imports_torch_alone_and_the_rest_where_it_is_needed():
    assert imported_at_once(code_of(CODE[0])) - set(sys.stdlib_module_names) == {"torch"}
    look = "print([m for m in ('peft', 'diffusers', 'toy') if m in sys.modules])"
    for used in ("", "w2svd.parse(['train', '--seed', '1']); "):
        done = run(sys.executable, "-c", f"import sys, w2svd; {used}{look}")
        assert done.stdout.strip() == "[]", done.stderr


def test_imports_go_one_way():
    """notebooks, tests -> toy -> w2svd, which imports the toy in one `if`."""
    inside = {"w2svd", "toy", *(path.stem for path in TESTS)}
    for path in TOY:
        assert modules(code_of(path)) & inside <= {"w2svd", "toy"}, path.name
    for path in NOTEBOOKS:
        assert modules(code_of(path)) & inside <= {"w2svd", "toy"}, path.name
    conditions = [n for n in ast.walk(code_of(CODE[0])) if isinstance(n, ast.If)]
    assert len([n for n in conditions if "toy" in modules(n)]) == 1
    assert SOURCE.count("import toy") == 1 and "from toy" not in SOURCE


def test_test_files_do_not_import_each_other():
    files = {path.stem for path in TESTS if path.stem.startswith("test_")}
    for path in TESTS:
        assert not modules(code_of(path)) & (files | {"tests"}), path.name


def test_sections_2_to_6_run_with_the_imports_that_the_readme_names(tmp_path):
    place = README[README.index("## Copying") :]
    imports = re.findall(r"`((?:import|from) [^`]+)`", place[: place.index("Sections 2 to 6")])
    assert len(imports) >= 4
    paper = SOURCE[SOURCE.index("# ---- 2. ") : SOURCE.index("# ---- 7. ")]
    copied = "\n".join([*imports, "class Refused(ValueError): ...", paper])
    (tmp_path / "copied.py").write_text(copied, encoding="utf-8")
    rules = ["--isolated", "--no-cache", "--select", "F821"]  # names that nobody defines
    done = run(sys.executable, "-m", "ruff", "check", *rules, "copied.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    use = "import copied; assert copied.few_step_sigmas(4, 5.0)[-1] == 0; copied.Roles"
    assert run(sys.executable, "-c", use, cwd=tmp_path).returncode == 0


# ---- what the READMEs say ------------------------------------------------------------------------


def test_what_follows_from_code_is_stored_as_code_makes_it(tmp_path):
    """`python tests/remake.py --quick` leaves the tree unchanged."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "venv")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    files = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    done = run(sys.executable, "-B", "tests/remake.py", "--quick", cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    changed = [path.name for path in files if path.read_bytes() != before[path]]
    assert not changed and not done.stdout, f"run python tests/remake.py --quick: {done.stdout}"


@named(PAGES)
def test_the_commands_of_a_readme_are_ones_that_there_are(path):
    """Those of w2svd.py parse; of others the file or module exists."""
    text = read(path)
    for command in re.findall(r"python w2svd\.py (.+?)(?:  |`|\)|\n| &&)", text):
        flags = shlex.split(command)
        if flags[0] in ("train", "encode", "sample", "export") and "--help" not in flags:
            w2svd.parse(flags)
    for script in re.findall(r"python ((?:tests|toy)/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (toy[.\w]*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


def test_the_readme_has_a_command_of_each_kind():
    for command in ("train --model toy", "train --model hunyuan", "encode", "sample", "export"):
        assert f"python w2svd.py {command}" in README
    assert "pip install -r requirements.txt" in README and "python -m pytest" in README


def test_the_line_that_plots_a_log_plots_one(tmp_path):
    folder = tmp_path / "runs/toy"
    folder.mkdir(parents=True)
    lines = [{"step": 1, "relative_gap": 0.1}, {"step": 1, "changed": {}}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    program = re.search(r'python -c "(import json, pylab.*)"', README)[1]
    done = run(sys.executable, "-c", program, cwd=tmp_path)
    assert done.returncode == 0 and list(folder.glob("*.png")), done.stderr


def test_the_stored_results_meet_what_the_readmes_claim():
    results = json.loads(read(ROOT / "toy/results/table.json"))
    assert {case: list(runs) for case, runs in results.items()} == {
        case: [str(seed) for seed in SEEDS] for case in CASES
    }

    def mean(case, *path):
        rows = results[case].values()
        return sum(functools.reduce(dict.get, path, row)["kl"] for row in rows) / len(rows)

    ring = mean("ring-4", "student")
    assert ring < 0.11 and 4 * ring < mean("ring-4", "euler", "4")
    assert max(r["student"]["kl"] for r in results["ring-4"].values()) < 0.15
    assert mean("grid-4", "student") < mean("grid-4", "euler", "4")
    assert 3 * mean("videos-4", "student") < mean("videos-4", "euler", "4")
    for case in ("ring-4", "grid-4"):
        assert mean(case, "student") < mean(case, "impostor")
    for data in ("ring", "grid"):  # a fit in one step is as close as matching in four
        assert mean(f"{data}-1-regress", "student") < 1.3 * mean(f"{data}-4", "student")
        assert 2.5 * mean(f"{data}-1-regress", "student") < mean(f"{data}-1", "student")
    assert all(0.8 < r["student"]["dynamic_degree"] < 1.2 for r in results["videos-4"].values())


def test_the_stored_methods_meet_what_the_toy_s_readme_claims():
    results = json.loads(read(ROOT / "toy/results/methods.json"))
    seeds = [str(seed) for seed in METHOD_SEEDS]
    assert all(list(results[name]) == seeds for name in METHODS)
    kl = {name: [results[name][s]["student"]["kl"] for s in seeds] for name in METHODS}
    mean = {name: sum(kl[name]) / len(seeds) for name in METHODS}
    for name in ("DMD, LoRA fake", "W2SVD, discriminator", "DMD2", "LCM, 5 times the iterations"):
        assert abs(mean[name] - mean["W2SVD"]) < 0.02, name
    assert all(other > 1.5 * ours for ours, other in zip(kl["W2SVD"], kl["LCM"]))
    euler = [results["W2SVD"][s]["euler"] for s in seeds]
    assert all(run["4"]["kl"] > 1.5 * max(map(max, kl.values())) > run["28"]["kl"] for run in euler)
    assert results["seconds"]["LCM"] < results["seconds"]["W2SVD"] / 5


@named([*PAGES, *NOTEBOOKS])
def test_links_to_lines_lead_to_what_they_name(path):
    for name, file, number in re.findall(r"\[`(\w+)`\]\(([\w./]+)#L(\d+)\)", read(path)):
        line = read(path.parent / file).splitlines()[int(number) - 1]
        assert re.match(rf"\s*((def|class) {name}\b|{name} = )", line), f"{name}: {line}"


def test_the_readme_links_the_paper_s_parts_to_lines():
    linked = set(re.findall(r"\[`(\w+)`\]\(w2svd\.py#L\d+\)", README))
    assert {"Roles", "dmd_gradient", "gt_gradient", "fake_loss", "distil"} <= linked


@named([*PAGES, *NOTEBOOKS])
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if not link.startswith(("http", "#", "attachment:")):
            assert (path.parent / link.split("#")[0]).exists(), link


# ---- what has no place here ----------------------------------------------------------------------


def test_no_nan_is_hidden_and_nothing_is_unpickled():
    for word in ("nan_to_num", "torch.load", "pickle", "trust_remote_code"):
        assert not [path.name for path in CODE if word in read(path)], word


WORDS = (  # of how a text came about, of what is gone
    r"[Aa]gents?|A\.?I|LLMs?|[Cc]hatbots?|[Cc]laude|[Cc]odex|[Cc]opilot|hunyuan\.py"
    r"|(?<!scope=\")(?<!whole )[Ss]essions?|[Ii]ssue #?\d+|TODO|FIXME|XXX"
)
TEXTS = [path for path in [*CODE, *TESTS, *PAGES, *NOTEBOOKS] if path.name != "test_house.py"]


@named([*TEXTS, *(ROOT / name for name in ("CITATION.cff", "pyproject.toml", ".ci/run"))])
def test_words_that_have_no_place_here_are_not_here(path):
    assert not re.findall(rf"\b(?:{WORDS})\b", read(path))


def test_the_citation_file_is_whole():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    paper = citation["preferred-citation"]
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert "2503.13319" in paper["url"] and paper["title"] in README
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in README


def test_requirements_are_pinned_exactly():
    lines = read(ROOT / "requirements.txt").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
