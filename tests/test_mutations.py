"""The tests notice what they are for: tests/mutations.py breaks the code on purpose, many times.

Against: the unmutated files, on which the same tests pass. Run: python -m pytest
tests/test_mutations.py, half a minute, with -m slow 6 minutes on two cores; python
tests/mutations.py shows which test notices what.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, mutate


def killed(*names):
    """How many mutations with these in their names there are; all must be noticed."""
    script = [sys.executable, Path(__file__).with_name("mutations.py"), *names]
    run = subprocess.run(script, capture_output=True, text=True, timeout=900)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr
    assert any(line.startswith("unmutated: ") and line.endswith(" pass") for line in lines)
    return sum(": killed by " in line for line in lines)


def test_a_flipped_sign_and_a_rollout_under_the_average_are_noticed():
    assert killed("the DMD gradient's sign is flipped", "rollouts are under the average") == 2


@pytest.mark.slow
def test_every_mutation_is_noticed_by_its_tests_and_the_unmutated_project_passes():
    assert killed() == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_s_text_is_there_once_and_the_mutant_is_python(mutation):
    source = (ROOT / mutation.file).read_text()
    compile(mutate(source, mutation.where, mutation.old, mutation.new), mutation.where, "exec")
