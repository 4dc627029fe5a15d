"""The tests notice what they are for: tests/mutations.py breaks the code on purpose, many times.

Against: the unmutated files, on which the same tests pass. Run: python -m pytest
tests/test_mutations.py, with -m slow 6 minutes on two cores; python tests/mutations.py shows which
test notices what.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, mutate


@pytest.mark.slow
def test_every_mutation_is_noticed_by_its_tests_and_the_unmutated_project_passes():
    script = [sys.executable, Path(__file__).with_name("mutations.py")]
    run = subprocess.run(script, capture_output=True, text=True, timeout=900)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr
    assert any(line.startswith("unmutated: ") and line.endswith(" pass") for line in lines)
    assert sum(": killed by " in line for line in lines) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_s_text_is_there_once_and_the_mutant_is_python(mutation):
    source = (ROOT / mutation.file).read_text()
    compile(mutate(source, mutation.where, mutation.old, mutation.new), mutation.where, "exec")
