"""The tests notice what they are for: tests/mutations.py breaks w2svd.py on purpose, many times.

Reference: the unmutated file, on which the same tests pass. Run: python -m pytest
tests/test_mutations.py, a minute on two cores; python tests/mutations.py shows who kills what.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, mutate

SCRIPT = Path(__file__).with_name("mutations.py")


def test_every_mutation_is_killed_by_its_test_and_the_unmutated_project_passes():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=900)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr
    assert lines[0].startswith("unmutated: ") and "passed" in lines[0]
    killed = [line for line in lines if line.startswith("mutation ") and " killed by " in line]
    assert len(killed) == len(MUTATIONS)


def test_mutations_change_text_that_occurs_exactly_once_and_have_names_of_their_own():
    for mutation in MUTATIONS:
        source = SCRIPT.parent.with_name(mutation.file).read_text()
        assert mutate(source, mutation.edits) != source
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    with pytest.raises(ValueError, match="not once"):
        mutate("a = 1\na = 1\n", [("a = 1", "a = 2")])
