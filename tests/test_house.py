"""The claims that the project makes about itself: size, imports, commands, numbers, links.

Reference: the files as they are, and tests/remake.py for what follows from code. Run:
python -m pytest tests/test_house.py, half a minute on one core.
"""

import ast
import dataclasses
import functools
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import remake
from scipy.stats import ttest_1samp

import w2svd
from toy import table

LINES, README_LINES = 2575, 100  # of w2svd.py and of the README; the first to be lowered
NODES, LONG = 8.4, 0.12  # of its syntax to a line of code; share of lines of 90 characters or more

ROOT = Path(__file__).resolve().parent.parent
FILE, TOY, TESTS = ROOT / "w2svd.py", [*ROOT.glob("toy/**/*.py")], [*ROOT.glob("tests/*.py")]
CODE, OTHERS = [FILE, *TOY], [*ROOT.glob("notebooks/*"), ROOT / "pyproject.toml", ROOT / ".ci/run"]
PAGES = remake.READMES
made = functools.cache(remake.parts)  # what their tables should be
LAYOUT = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
OURS = r"w2svd\.py ((?:train|encode|sample|export)\b.*?)(?:  |[`)\n]| &&)"  # commands
WORDS = (
    r"\b(?:[Aa]gents?|(?<!Wan-)A\.?I|LLMs?|[Cc]hatbots?|[Cc]laude|[Cc]odex|[Cc]opilot|TODO|FIXME"
)
WORDS += r"|XXX|(?<!scope=\")[Ss]essions?|[Ii]ssue #?\d+)\b"  # of how a text came about


def read(path):
    return path.read_text(encoding="utf-8")


def nodes(path):
    return list(ast.walk(ast.parse(read(path))))


def run(*arguments):
    """A command of this Python's, which must end well."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_is_short_and_not_packed_and_the_readme_is_short():
    """Loads and stores are no nodes; docstrings, comments and blank lines no code."""
    lines, code = read(FILE).splitlines(), set()
    for token in tokenize.generate_tokens(io.StringIO(read(FILE)).readline):
        if tokenize.tok_name[token.type] not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in nodes(FILE):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings
            code -= set(range(node.lineno, node.end_lineno + 1))
    counted = sum(not isinstance(node, ast.Load | ast.Store) for node in nodes(FILE))
    long = sum(len(lines[number - 1]) >= 90 for number in code)
    assert len(lines) <= LINES and len(read(PAGES[0]).split()) <= 1600
    assert all(len(read(page).splitlines()) <= README_LINES for page in PAGES[:2])
    assert counted / len(code) <= NODES
    assert long / len(code) <= LONG


def test_functions_are_short_and_nothing_is_excused_from_the_linter():
    for path in CODE:
        functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef)]
        assert all(f.end_lineno - f.lineno < 60 for f in functions), path
        assert not re.search(r"#\s*(noqa|fmt:)", read(path)), path
    run("-m", "ruff", "check", "--no-cache", ".")
    run("-m", "ruff", "format", "--check", "--no-cache", ".")


def test_the_settings_are_few_and_each_says_what_it_means_and_where_it_comes_from():
    assert 40 <= len(dataclasses.fields(w2svd.Config)) <= 45
    for field in (*dataclasses.fields(w2svd.Config), *dataclasses.fields(w2svd.Machine)):
        assert re.search(r".+ / (paper|author-code|peer|ours)\b", field.metadata["text"])


def imports(nodes):
    """Modules, with dots, that the import statements among the nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # a name may be a module, too
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


LOOK = """import os, signal, sys, warnings, torch
def seen():
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] + warnings.filters
    torchs = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state().sum()
    return handlers, torchs, sys.path[:], {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": 0}
before = seen()
import w2svd
w2svd.parse(["train", "--seed", "1"])
assert seen() == before and not {"peft", "diffusers", "toy"} & set(sys.modules)"""


def test_the_file_imports_torch_alone_and_is_imported_without_a_trace():
    at_once = {name.split(".")[0] for name in imports(ast.parse(read(FILE)).body)}
    assert at_once - set(sys.stdlib_module_names) == {"torch"}
    run("-c", LOOK)


def test_sections_2_to_6_run_with_the_imports_that_the_readme_names(tmp_path):
    place = read(PAGES[0]).split("## Copying")[1].split("Sections 2 to 6")[0]
    needs = re.findall(r"`((?:import|from) [^`]+)`", place)
    paper = "# " + read(FILE).split("# ---- 2. ")[1].split("# ---- 7. ")[0]
    copied = tmp_path / "copied.py"
    copied.write_text("\n".join([*needs, "class Refused(ValueError): ...", paper]))
    run("-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", copied)  # undefined
    run(copied)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_readme_s_numbers_commands_and_links_are_true(path):
    text = read(path)
    for flags in re.findall(OURS, text.replace("--help", "")):
        w2svd.parse(shlex.split(flags))
    for name in re.findall(r"python (?:-m )?((?:tests/|toy[/.])[\w/.]+\w)", text):
        place = ROOT / name.removesuffix(".py").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name
    for words, link in re.findall(r"\[([^\]]*)\]\(([^)\s:]+)\)", text):
        target, name = path.parent / link.split("#")[0], words.strip("`")
        assert target.exists(), link
        if "#L" in link:  # to a definition
            assert re.search(rf"^\s*((def|class) {name}\b|{name} = )", read(target), re.M), name
    assert remake.filled(text, made()) == text, "run python tests/remake.py --quick"


def told_apart(differences, least=0.0):
    """Whether a 95 % interval of paired differences leaves out 0, by more than `least`."""
    low, high = ttest_1samp(differences, 0).confidence_interval()
    return low * high > 0 and abs(sum(differences) / len(differences)) > least


def test_the_stored_results_meet_what_the_readmes_claim():
    stored = {**json.loads(remake.STORED.read_text()), **json.loads(remake.METHODS.read_text())}

    def kl(row, *path):
        found = [functools.reduce(dict.get, path, run)["kl"] for run in stored[row].values()]
        return sum(found) / len(found)

    for row, factor in (("ring-4", 4), ("videos-4", 3)):
        assert factor * kl(row, "student") < kl(row, "euler", "4")
    grid = stored["grid-4"].values()
    assert not told_apart([run["student"]["kl"] - run["euler"]["4"]["kl"] for run in grid])
    assert all(9 * run["student"]["sliced_w2"] < run["euler"]["4"]["sliced_w2"] for run in grid)
    assert kl("ring-1-regress", "student") < 1.3 * kl("ring-4", "student")
    ours = stored["W2SVD"]
    for row in table.METHODS:
        apart = [stored[row][seed]["student"]["kl"] - ours[seed]["student"]["kl"] for seed in ours]
        assert row in ("W2SVD", "LCM") or not told_apart(apart, 0.02), row


def test_no_nan_is_hidden_nothing_is_unpickled_and_no_text_tells_how_it_came_about():
    for path in CODE:
        assert not re.search(r"nan_to_num|torch\.load|pickle|trust_remote_code", read(path)), path
    for path in {*CODE, *TESTS, *PAGES, *OTHERS} - {Path(__file__)}:
        assert not re.search(WORDS, re.sub(r'"image/\w+": "[^"]*"', "", read(path))), path
