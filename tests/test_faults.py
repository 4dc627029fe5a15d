"""What goes wrong in a long run: numbers, disks, damaged files, being stopped or killed.

Against: an undisturbed run of the same seed, bit for bit: both adapters, optimizers, average,
random streams, log and result. Run with `python -m pytest tests/test_faults.py`; half a minute on
one core, with `-m slow` instead another half.
"""

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from helpers import (  # noqa: F401
    child,
    flags_of,
    lines,
    names,
    resume,
    said,
    same_run,
    small_toy,
    tensors,
    train,
)

import toy.tasks
import w2svd

pytestmark = pytest.mark.usefixtures("small_toy")
SIX = ["--iterations", 6]


@pytest.fixture
def whole(small_toy):  # noqa: F811
    """A run of six iterations that nothing disturbs; the backbone is in the cache after it."""
    train("whole", *SIX)
    return "whole"


def go_on(out):
    """The same run once more: with --resume, if it had come so far that it can."""
    resume(out) if Path(out, "config.json").exists() else train(out, *SIX)


# ---- numbers that are not finite -----------------------------------------------------------------


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
    """The nth batch has `bad` in it."""
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
    "sample in the fake's": lambda p, bad: spoil(p, w2svd, "x0_from_velocity", 19, bad),
    "the generator's sample is": lambda p, bad: spoil(p, w2svd, "x0_from_velocity", 21, bad),
    "the fake's velocity": lambda p, bad: spoil(p, w2svd.Roles, "fake", 7, bad),
    "gradient of the fake": lambda p, bad: spoil_gradient(p, "fake", 5, bad),
    "the real DiT's velocity": lambda p, bad: spoil(p, w2svd.Roles, "real", 3, bad),
    "the generator's gradient": lambda p, bad: spoil(p, w2svd, "dmd_gradient", 3, bad),
    "gradient of the generator": lambda p, bad: spoil_gradient(p, "generator", 3, bad),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_is_not_finite_stops_the_run_with_stage_iteration_and_level_named(
    capsys, monkeypatch, stage, bad
):
    flags = ["--iterations", 4, "--generator-input", "paired"]
    with monkeypatch.context() as patch:
        STAGES[stage](patch, bad)
        train("r", *flags, code=2)
    sentence = said(capsys)
    assert stage in sentence and "iteration 3" in sentence
    assert " at 0." in sentence or stage == "the data"  # which is read at no level
    assert [row["step"] for row in lines("r")] == [2] and "result.json" not in names("r")
    train("whole", *flags)
    resume("r")
    same_run("whole", "r")


# ---- disks ---------------------------------------------------------------------------------------


def fails_from(monkeypatch, owner, name, nth, error):
    """owner.name raises the error from its nth call on."""
    original, calls = getattr(owner, name), []

    def fails(*args, **how):
        calls.append(1)
        if len(calls) >= nth:
            raise error
        return original(*args, **how)

    monkeypatch.setattr(owner, name, fails)


FULL = OSError(errno.ENOSPC, "No space left on device")
TORN = safetensors.SafetensorError("I/O error: No space left on device")  # as save_file says it
DISKS = [
    *((os, "fsync", n, FULL) for n in (1, 2, 3, 4, 7, 11, 12)),
    *((os, "replace", n, FULL) for n in (1, 2, 3, 6, 12)),
    *((safetensors.torch, "save_file", n, TORN) for n in (1, 2, 5)),
    (safetensors.torch, "save_file", 5, FULL),
]


@pytest.mark.parametrize("owner, name, nth, error", DISKS, ids=lambda x: str(x)[:12])
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_once_there_is_room(
    whole, capsys, monkeypatch, owner, name, nth, error
):
    with monkeypatch.context() as patch:
        fails_from(patch, owner, name, nth, error)
        train("r", *SIX, code=2)
    assert "No space left" in said(capsys)
    assert not names("r", ".part*")
    for file in names("r", "*.safetensors"):
        assert tensors(f"r/{file}")  # whole
    go_on("r")
    same_run(whole, "r")
    assert names("r") == names(whole)


def test_a_log_that_finds_the_disk_full_in_the_middle_of_a_line_is_mended(
    whole, capsys, monkeypatch
):
    def half(line, file=None, **how):
        if getattr(file, "name", "").endswith("metrics.jsonl") and '"step": 4' in line:
            file.write(line[:40])
            file.flush()
            raise FULL

    def half_or_whole(*args, **how):
        half(*args, **how)
        print(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "print", half_or_whole, raising=False)
        train("r", *SIX, code=2)
    assert "No space left" in said(capsys)
    assert not Path("r/metrics.jsonl").read_text().endswith("\n")
    resume("r")
    same_run(whole, "r")


def test_a_file_system_that_takes_small_files_only_is_survived(whole, capsys):
    """The writes themselves fail, in the middle of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the checkpoint is larger
        train("r", *SIX, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "--resume" in said(capsys)
    assert not names("r", "*checkpoint*")
    resume("r")
    same_run(whole, "r")


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_the_newest_checkpoint_damaged_is_named_and_the_one_before_it_used(
    whole, capsys, monkeypatch, size
):
    train("r", *SIX)
    newest = Path("r/checkpoint-000006.safetensors")
    newest.write_bytes(newest.read_bytes()[:size])
    step, calls = w2svd.generator_step, []
    monkeypatch.setattr(w2svd, "generator_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    capsys.readouterr()
    resume("r")
    assert newest.name in capsys.readouterr().err
    assert len(calls) == 2  # from 4 to 6
    same_run(whole, "r")


def test_with_every_checkpoint_damaged_a_run_starts_at_the_beginning(whole, capsys):
    train("r", *SIX)
    damaged = names("r", "checkpoint*")
    for name in damaged:
        Path("r", name).write_bytes(b"")
    capsys.readouterr()
    resume("r")
    error = capsys.readouterr().err
    assert all(name in error for name in damaged) and "beginning" in error
    same_run(whole, "r")


# ---- being stopped -------------------------------------------------------------------------------


def at_update(monkeypatch, nth, action):
    """The action comes in the middle of the nth update of the generator."""
    step, calls = w2svd.generator_step, []

    def interrupted(*args, **how):
        calls.append(1)
        if len(calls) == nth:
            action()
        return step(*args, **how)

    monkeypatch.setattr(w2svd, "generator_step", interrupted)


@pytest.mark.parametrize("nth", [3, 4, 6])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_iteration_saves_and_stops(
    whole, capsys, monkeypatch, number, status, nth
):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_update(patch, nth, lambda: os.kill(os.getpid(), number))
        train("r", *SIX, code=status)
    assert "--resume" in said(capsys)
    assert {f"{kind}-{nth:06}.safetensors" for kind in ("checkpoint", "generator")} < {*names("r")}
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    resume("r")
    same_run(whole, "r")


def test_the_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with w2svd.signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM] and not ended
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


def test_an_interrupt_outside_of_the_loop_ends_in_a_sentence_too(whole, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        fails_from(patch, toy.tasks.Task, "finish", 1, KeyboardInterrupt())
        train("r", *SIX, code=130)
    assert "--resume" in said(capsys)
    resume("r")
    same_run(whole, "r")


# ---- being killed --------------------------------------------------------------------------------


def kept(out):
    """Its files; a checkpoint that was to be deleted when the run was killed may stay."""
    return [name for name in names(out) if not name.startswith("checkpoint-")]


def dies_at(monkeypatch, nth, after):
    """Before or after the nth rename or deletion nothing is written any more, as if killed."""
    calls = []

    def dying(original):
        def call(*args, **how):
            calls.append(1)
            if len(calls) < nth:
                return original(*args, **how)
            if len(calls) == nth and after:
                original(*args, **how)
            raise KeyboardInterrupt

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    return calls


def every_operation(monkeypatch):
    """How many renames and deletions a run has."""
    with monkeypatch.context() as patch:
        calls = dies_at(patch, 10**6, False)
        train("count", *SIX)
    return len(calls)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_that_ends_at_any_of_its_writes_goes_on_to_the_same_bits(whole, monkeypatch, after):
    for nth in range(1, every_operation(monkeypatch) + 1):
        out = f"r{nth}"
        with monkeypatch.context() as patch:
            dies_at(patch, nth, after)
            status = w2svd.main(["train", *map(str, flags_of(out, *SIX))])
        assert status == 130
        go_on(out)
        same_run(whole, out)
        assert kept(out) == kept(whole), nth


def started(argv):
    """A command as a child of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "peft"])
    process = context.Process(target=child, args=(os.getcwd(), argv))
    process.start()
    return process


def killed_until_done(out, rng, kills):
    """Kill the run with -9 a moment after it wrote so many files more, then let it end."""
    for nth in range(kills + 1):
        begun = Path(out, "config.json").exists()
        argv = ["--resume", "--out", out] if begun else flags_of(out, *SIX, "--save-every", 1)
        files = len(names(out)) + rng.randrange(8)
        process = started(["train", *argv])
        while process.is_alive() and (nth == kills or len(names(out)) < files):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
    assert process.exitcode == 0, Path("log").read_text()


SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_at_random_moments_goes_on_to_the_same_bits(monkeypatch, seed):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for what imports everything
    train("whole", *SIX, "--save-every", 1)
    killed_until_done("r", random.Random(seed), kills=4)
    same_run("whole", "r")
    assert kept("whole") == kept("r")
