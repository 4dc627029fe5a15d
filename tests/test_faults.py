"""What goes wrong in a long run: numbers, disks, damaged files, being stopped or killed.

Against: an undisturbed run of the same seed, bit for bit: both adapters, optimizers, average, log
and result. Run with `python -m pytest tests/test_faults.py`; 20 seconds.
"""

import errno
import os
import re
import signal
from pathlib import Path

import helpers
import pytest
import safetensors.torch
from helpers import lines, names, raising, resume, said, same_run, tensors, train, watch

import w2svd
from toy.mixtures import GaussianMixture

SIX = ["--iterations", 6]
PAIRED = ["--iterations", 4, "--generator-input", "paired", "--accumulate", 2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a backbone and two runs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        helpers.make_small(patch.setattr, measured=False)
        patch.chdir(folder)
        train("whole", *SIX)
        train("paired", *PAIRED)
    return folder


@pytest.fixture
def whole(undisturbed, elsewhere, monkeypatch):
    """The undisturbed run of six iterations."""
    helpers.make_small(monkeypatch.setattr, measured=False)
    Path("cache").symlink_to(undisturbed / "cache")
    return undisturbed / "whole"


def go_on(out, *flags):
    """The same run once more: with --resume, if it had come so far that it can."""
    resume(out) if Path(out, "config.json").exists() else train(out, *flags)


# the nth call of a function returns, or leaves as a gradient, a number that is not finite, in the
# third iteration, of six batches; which were read so far. test_updates.py has all stages of a step
STAGES = {
    "the data": (GaussianMixture, "sample", 14, ["12"]),
    "gradient of the fake": (w2svd, "fake_step", 9, ["12", "13"]),
    "the generator's gradient": (w2svd, "dmd_gradient", 5, ["16"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_is_not_finite_stops_the_run_with_stage_iteration_clips_and_level_named(
    whole, capsys, monkeypatch, stage
):
    owner, name, nth, read = STAGES[stage]
    original, calls = getattr(owner, name), []

    def spoilt(*args, **how):
        out = original(*args, **how)
        calls.append(1)
        if len(calls) == nth:
            role = name.removesuffix("_step")
            x = out if role == name else args[0].parameters(role)[1].grad
            x.view(-1)[0] = float("nan")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, spoilt)
        train("r", *PAIRED, code=2)
    sentence = said(capsys)
    assert stage in sentence and "iteration 3" in sentence
    assert re.findall(r"batch (\d+)", sentence) == read
    assert " at 0." in sentence or stage == "the data"  # which is read at no level
    assert [row["step"] for row in lines("r")] == [2] and "result.json" not in names("r")
    resume("r")
    same_run(whole.with_name("paired"), "r")


FULL = OSError(errno.ENOSPC, "No space left on device")
TORN = safetensors.SafetensorError("I/O error: No space left on device")  # as save_file says it
DISKS = [
    *((os, "fsync", n, FULL) for n in (1, 2, 4, 12)),
    *((os, "replace", n, FULL) for n in (1, 6)),
    (safetensors.torch, "save_file", 2, TORN),
]


@pytest.mark.parametrize("owner, name, nth, error", DISKS, ids=lambda x: str(x)[:12])
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_once_there_is_room(
    whole, capsys, monkeypatch, owner, name, nth, error
):
    with monkeypatch.context() as patch:
        watch(patch, owner, name, nth, raising(error))
        train("r", *SIX, code=2)
    assert "No space left" in said(capsys) and not names("r", ".part*")
    assert all(tensors(f"r/{file}") for file in names("r", "*.safetensors"))  # whole
    go_on("r", *SIX)
    same_run(whole, "r")
    assert names("r") == names(whole)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_the_newest_checkpoint_damaged_is_named_and_the_one_before_it_used(whole, capsys, size):
    train("r", *SIX)
    newest = Path("r/checkpoint-000006.safetensors")
    newest.write_bytes(newest.read_bytes()[:size])
    resume("r")
    printed = capsys.readouterr().out
    assert newest.name in printed and "goes on from iteration 4" in printed
    same_run(whole, "r")
    for name in names("r", "checkpoint*"):  # all of them: from the beginning
        Path("r", name).write_bytes(b"")
    resume("r")
    same_run(whole, "r")


@pytest.mark.parametrize("number, nth", [(signal.SIGTERM, 3), (signal.SIGINT, 6)])
def test_a_signal_finishes_the_iteration_saves_and_stops(whole, capsys, monkeypatch, number, nth):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        watch(patch, w2svd, "generator_step", nth, lambda: os.kill(os.getpid(), number))
        train("r", *SIX, code=128 + number)
    assert "--resume" in said(capsys) and signal.getsignal(number) == handler
    assert {f"{kind}-{nth:06}.safetensors" for kind in ("checkpoint", "generator")} < {*names("r")}
    resume("r")
    same_run(whole, "r")


def dies_at(monkeypatch, nth):
    """Before the nth rename or deletion, and later, nothing is written any more, as if killed."""
    calls = []

    def die():
        calls.append(1)
        if len(calls) >= nth:
            raise KeyboardInterrupt

    watch(monkeypatch, os, "replace", 1, die)
    watch(monkeypatch, Path, "unlink", 1, die)
    return calls


def test_a_run_that_ends_before_any_of_its_writes_goes_on_to_the_same_bits(whole, monkeypatch):
    three = "--iterations 3 --save-every 1 --log-every 1".split()
    with monkeypatch.context() as patch:
        operations = dies_at(patch, 10**6)
        train("count", *three)
    for nth in range(1, len(operations) + 1):
        with monkeypatch.context() as patch:
            dies_at(patch, nth)
            train(f"r{nth}", *three, code=130)
        go_on(f"r{nth}", *three)
        same_run("count", f"r{nth}")
        assert {*names("count")} <= {*names(f"r{nth}")}, nth  # an old checkpoint may stay
