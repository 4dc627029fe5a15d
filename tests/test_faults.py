"""What goes wrong in a long run: numbers, disks, files, being killed.

Against: an undisturbed run of the same seed, bit for bit: both adapters, optimizers, average,
random streams, log and result. Run with `python -m pytest tests/test_faults.py`; a minute, with
`-m slow` two more.
"""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SMALL, lines, resume, said, same_run, small_toy, tensors, train  # noqa: F401

import toy.tasks
import w2svd

pytestmark = pytest.mark.usefixtures("small_toy")
HERE = Path(__file__).parent


@pytest.fixture
def whole(tmp_path):
    """A run of six iterations that nothing disturbs."""
    train("whole", "--iterations", 6)
    return tmp_path / "whole"


# ---- numbers that go wrong -----------------------------------------------------------------------


def spoil(monkeypatch, owner, name, nth, bad):
    """The nth call of owner.name returns `bad` at one place."""
    original, calls = getattr(owner, name), []

    def spoilt(*args, **how):
        out = original(*args, **how)
        calls.append(1)
        if len(calls) == nth:
            out.view(-1)[0] = bad
        return out

    monkeypatch.setattr(owner, name, spoilt)


def spoil_data(monkeypatch, nth, bad):
    original = toy.tasks.Task.batches

    def batches(self, *args):
        for k, batch in enumerate(original(self, *args), start=1):
            if k == nth:
                batch["x0"].view(-1)[0] = bad
            yield batch

    monkeypatch.setattr(toy.tasks.Task, "batches", batches)


def spoil_gradient(monkeypatch, role, nth, bad):
    """The nth backward of the role leaves a gradient with `bad` in it."""
    original, calls = getattr(w2svd, f"{role}_step"), []

    def spoilt(roles, *args, **how):
        stats = original(roles, *args, **how)
        calls.append(1)
        if len(calls) == nth:
            roles.parameters(role)[1].grad.view(-1)[0] = bad
        return stats

    monkeypatch.setattr(w2svd, f"{role}_step", spoilt)


# all in the third iteration; two fake updates in each, four evaluations of a picture after the 2nd
STAGES = {
    "the data": lambda p, bad: spoil_data(p, 7, bad),
    "sample in the fake": lambda p, bad: spoil(p, w2svd, "x0_from_velocity", 15, bad),
    "the generator's sample is": lambda p, bad: spoil(p, w2svd, "x0_from_velocity", 17, bad),
    "the fake's velocity": lambda p, bad: spoil(p, w2svd.Roles, "fake", 7, bad),
    "gradient of the fake": lambda p, bad: spoil_gradient(p, "fake", 5, bad),
    "the real DiT's velocity": lambda p, bad: spoil(p, w2svd.Roles, "real", 3, bad),
    "the generator's gradient": lambda p, bad: spoil(p, w2svd, "dmd_gradient", 3, bad),
    "gradient of the generator": lambda p, bad: spoil_gradient(p, "generator", 3, bad),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_is_not_finite_stops_the_run_with_its_stage_named(
    tmp_path, capsys, monkeypatch, stage, bad
):
    flags = ["--iterations", 4, "--generator-input", "paired", "--fake-samples", "all"]
    with monkeypatch.context() as patch:
        STAGES[stage](patch, bad)
        train("r", *flags, code=2)
    sentence = said(capsys)
    assert stage in sentence and "iteration 3" in sentence and " at 0." in sentence
    assert [row["step"] for row in lines(tmp_path / "r")] == [2]
    assert not (tmp_path / "r/result.json").exists()
    train("whole", *flags)
    resume("r")
    same_run("whole", "r")


# ---- disks and files -----------------------------------------------------------------------------


def full(*args, **how):
    raise OSError(errno.ENOSPC, "No space left on device")


def places():
    """Where a disk may turn out to be full: (owner, function, which call of it)."""
    import safetensors.torch as st

    return [(os, "fsync", n) for n in (1, 2, 3, 5, 7)] + [(st, "save_file", n) for n in (2, 3, 5)]


@pytest.mark.parametrize("place", range(8))
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_once_there_is_room(
    whole, capsys, monkeypatch, place
):
    owner, name, nth = places()[place]
    original, calls = getattr(owner, name), []

    def fails(*args, **how):
        calls.append(1)
        return full() if len(calls) >= nth else original(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        train("r", "--iterations", 6, code=2)
    assert "No space left" in said(capsys)
    assert not list(Path("r").rglob(".part*"))
    for path in Path("r").glob("*.safetensors"):
        assert tensors(path)  # whole
    if (Path("r") / "config.json").exists():
        resume("r")
    else:
        train("r", "--iterations", 6)
    same_run(whole, "r")


def test_a_file_system_that_takes_small_files_only_is_survived(whole, capsys):
    """The writes themselves fail, in the middle of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the checkpoint is larger
        train("r", "--iterations", 6, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "too large" in said(capsys)
    assert not list(Path("r").glob("checkpoint*"))
    resume("r")
    same_run(whole, "r")


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_the_newest_checkpoint_damaged_is_named_and_the_one_before_it_used(whole, capsys, size):
    train("r", "--iterations", 6)
    newest = Path("r/checkpoint-000006.safetensors")
    newest.write_bytes(newest.read_bytes()[:size])
    capsys.readouterr()
    resume("r")
    assert newest.name in capsys.readouterr().err
    same_run(whole, "r")


def test_with_every_checkpoint_damaged_a_run_starts_at_the_beginning(whole, capsys):
    train("r", "--iterations", 6)
    for path in Path("r").glob("checkpoint*"):
        path.write_bytes(b"")
    capsys.readouterr()
    resume("r")
    assert "the beginning" in capsys.readouterr().err
    same_run(whole, "r")


# ---- being stopped -------------------------------------------------------------------------------


def test_an_interrupt_ends_in_one_sentence_and_the_run_can_go_on(whole, capsys, monkeypatch):
    def interrupt(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "generator_step", interrupt)
        train("r", "--iterations", 6, code=130)
    assert "--resume" in said(capsys)
    resume("r")
    same_run(whole, "r")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_iteration_saves_and_stops(whole, monkeypatch, number, status):
    step, calls = w2svd.generator_step, []

    def signalled(*args, **how):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "generator_step", signalled)
        train("r", "--iterations", 6, code=status)
    assert Path("r/checkpoint-000003.safetensors").exists()
    assert Path("r/generator-000003.safetensors").exists()
    resume("r")
    same_run(whole, "r")


# a run of its own, which a signal that nobody can catch may end at any moment
CHILD = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import toy.tasks, w2svd
recipe = toy.tasks.Recipe(width=16, batch=32, iterations=10)
toy.tasks.RECIPES, toy.tasks.SAMPLES = {{"ring": recipe}}, {{"ring": 256}}
print("ready", flush=True)
sys.exit(w2svd.main(sys.argv[1:]))
"""


def killed_until_done(out, delays):
    """The run in a process that is killed after each of the delays, and then goes on."""
    code = CHILD.format(paths=[str(HERE.parent), str(HERE)])
    kills = 0
    for delay in [*delays, None]:
        flags = ["--model", "toy", "--cache", "cache", *SMALL, "--out", out, "--iterations", "6"]
        if (Path(out) / "config.json").exists():
            flags = ["--resume", "--out", out]
        child = [sys.executable, "-c", code, "train", *flags]
        process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        if delay is not None:
            time.sleep(delay)
            kills += process.poll() is None
            process.kill()
        process.communicate()
    assert process.returncode == 0
    return kills


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_a_run_that_is_killed_at_any_moment_and_resumed_has_the_same_bits(whole, seed):
    rng = random.Random(seed)
    assert killed_until_done("r", [rng.uniform(0.2, 1.2) for _ in range(3)]) > 0
    same_run(whole, "r")


@pytest.mark.parametrize("write", range(1, 10))
def test_a_run_that_ends_before_any_of_its_writes_has_the_same_bits(whole, monkeypatch, write):
    """As if killed just before the nth file got its name."""
    replace, calls = os.replace, []

    def ends(*args):
        calls.append(1)
        if len(calls) == write:
            raise KeyboardInterrupt
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ends)
        train("r", "--iterations", 6, code=130)
    if Path("r/config.json").exists():
        resume("r")
    else:
        train("r", "--iterations", 6)
    same_run(whole, "r")
