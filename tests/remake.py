"""Remakes everything stored in the repository that follows from its code, with one command.

    python tests/remake.py --quick    tables, plans, links to lines: 20 seconds
    python tests/remake.py            also two runs of the toy, the pictures, the notebooks

The second takes about ten minutes on 2 CPU cores. Both change only what is out of date, and say
what they changed. In a README it is what stands between <!-- remade: NAME --> and <!-- end -->, and
the numbers of lines in links like [`Roles`](w2svd.py#L300), also in notebooks.

Results of hours are not remade but read, from toy/results and toy/study/results. The two runs of
the toy are kept in toy/results/default.json; where their numbers differ from those kept before by
more than other arithmetic would explain, toy/results/table.json is of older code.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before the imports below, wherever it is started from

import w2svd  # noqa: E402
from toy import moved, side_by_side, small_table, table, tasks  # noqa: E402
from toy.study import report  # noqa: E402

PLACES = ("README.md", "toy/README.md", "toy/study/README.md", "tests/README.md")
READMES = [ROOT / place for place in PLACES]
STORED = ROOT / "toy/results/table.json"
METHODS = ROOT / "toy/results/methods.json"
DEFAULT = ROOT / "toy/results/default.json"  # the two runs without a --seed
RUNS = {"ring": ("--log-every", "5"), "videos": ()}  # of the toy: for the first page, the pictures
COSTS = ("GiB in all", "GiB of disk", "seconds an iteration on an H100", "hours on an H100")


def write(path, text):
    """Write what has changed, and say so."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"remade {path.relative_to(ROOT)}")


def hunyuan_plan():
    """The numbers that `train --model hunyuan --dry-run` shows."""
    config = w2svd.resolve({"model": "hunyuan"})
    return w2svd.plan(config, w2svd.load_task(config).backbone, w2svd.Machine())


def in_short(rows):
    """The KLs of a table's methods, the first three columns but for the last row, in a sentence."""
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()[2:-1]]
    return "; ".join(f"{name} in {steps} steps {kl}" for name, steps, kl, *_ in cells) + "."


def code(text):
    return textwrap.indent(text.rstrip(), "    ")


def parts():
    """{name: text} of every marked place of a README."""
    results, plan = json.loads(STORED.read_text()), hunyuan_plan()
    return {
        "toy": code(tasks.table(json.loads(DEFAULT.read_text())["ring"])),
        "plan": code("\n".join(f"{name:38} {plan[name]:.4g}" for name in COSTS)),
        "films": small_table.in_short(json.loads(small_table.STORED.read_text())),
        "first_frame": small_table.first_frame(json.loads(small_table.FIRST_FRAME.read_text())),
        "small": small_table.table(json.loads(small_table.STORED.read_text())),
        "side": side_by_side.markdown(json.loads(side_by_side.STORED.read_text())),
        "expect": table.summary(results).rstrip(),
        "table": table.markdown(results).rstrip(),
        "methods": table.methods(json.loads(METHODS.read_text())),
        "moved": in_short(moved.markdown(json.loads(moved.STORED.read_text()))),
        **report.numbers(report.stored()),
    }


def filled(text, made):
    """`text` with each place of these names filled in; a name that nobody makes is an error."""

    def fill(place):
        text = made[place[2]]
        gap = "\n" if "\n" in text else ""  # a sentence stays in its line
        return place[1] + gap + text + gap + place[3]

    return re.sub(r"(<!-- remade: (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.S)


def line_of(path, name):
    """The number of the line that defines a function, class, method or constant."""
    lines = path.read_text(encoding="utf-8").splitlines()
    definition = re.compile(rf"\s*((def|class) {name}\b|{name} = )")
    found = [number for number, line in enumerate(lines, start=1) if definition.match(line)]
    if not found:
        raise SystemExit(f"remake: there is no {name} in {path.relative_to(ROOT)}, to link to")
    return found[0]


def linked(text, folder):
    """`text`, which lies in `folder`, with every link to a line leading to what it names."""

    def link(found):
        return f"{found[1]}#L{line_of((folder / found[3]).resolve(), found[2])}"

    return re.sub(r"(\[`(\w+)`\]\(([\w./]+\.py))#L\d+", link, text)


def tables():
    """Everything that is text: the tables of stored results, the READMEs, the links to lines."""
    write(STORED.with_suffix(".md"), table.markdown(json.loads(STORED.read_text())))
    report.write_tables(report.STORED)
    made = parts()
    for path in READMES:
        write(path, filled(path.read_text(encoding="utf-8"), made))
    for path in [*READMES, *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        write(path, linked(path.read_text(encoding="utf-8"), path.parent))


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"remake: {' '.join(arguments)}:\n{done.stderr[-3000:]}")


def toy_run(folder, name):
    """Train one of RUNS in `folder`; its result."""
    flags = "--model", "toy", "--data", name, "--out", str(folder / name), *RUNS[name]
    python("w2svd.py", "train", *flags)
    print(f"ran {name}")
    return name, json.loads((folder / name / "result.json").read_text())


def keep(results):
    """Put runs with new numbers into DEFAULT."""
    kept, parts = json.loads(DEFAULT.read_text()), ("student", "euler", "floor")
    for name, new in results.items():
        if any(kept[name][part] != new[part] for part in parts):
            kept[name] = new
            print(f"remade {DEFAULT.relative_to(ROOT)}: {name}; the table may be of older code")
    w2svd.write_json(DEFAULT, kept)


def notebook(path):
    """Run a notebook from top to bottom in a new kernel and keep its outputs."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(path, as_version=4)
    how = {"timeout": 1800, "startup_timeout": 300, "kernel_name": "python3"}
    how |= {"record_timing": False, "coalesce_streams": True}  # or no two runs would be the same
    NotebookClient(content, resources={"metadata": {"path": path.parent}}, **how).execute()
    content.metadata.language_info = {"name": "python"}  # not the version at hand
    write(path, nbformat.writes(content).rstrip() + "\n")
    print(f"ran {path.name}")


def everything():
    """The runs and notebooks, two at a time; then pictures, figures, and what hangs on them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(toy_run, Path(folder), name) for name in ("videos", "ring")]
        paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
        for done in [pool.submit(notebook, path) for path in paths]:
            done.result()
        results = dict(run.result() for run in runs)
        python("-m", "toy.picture", *(f"{folder}/{name}" for name in RUNS))
    report.write(report.STORED)
    keep(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("W2SVD_QUICK", None)  # of notebooks: small sizes, for tests
    if not options.quick:
        everything()
    tables()


if __name__ == "__main__":
    main()
