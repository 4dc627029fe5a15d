"""What test files share: commands as a function, a toy of seconds, files held together."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch

import toy.tasks
import w2svd

SMALL = "--batch 16 --lora-rank 4 --log-every 2 --save-every 2 --fake-updates 2 --reuse 1".split()
SMALL += "--generator-lr .02 --fake-lr .02".split()  # a few iterations change every sample
CONSTANT = ["--lr-schedule", "constant"]  # so that --iterations may be changed
PICTURES, FINISH = toy.tasks.Task.pictures, toy.tasks.Task.finish


def make_small(put=setattr, measured=True):
    """The toy's backbones of a second, few samples to measure or none, no pictures at the end."""
    ring = toy.tasks.Recipe(width=16, batch=32, iterations=10, lr=0.1)
    how = {"width": 16, "batch": 8, "iterations": 4, "patch": (2, 4, 4), "labels": 2}
    videos = toy.tasks.Recipe(precondition=True, shift=3.0, lr=0.1, **how)
    recipes = {"ring": ring, "grid": ring, "videos": videos}
    for form in toy.tasks.FORMS:
        recipes[f"videos-{form}"] = dataclasses.replace(videos, labels=0, condition=form)
    put(toy.tasks, "RECIPES", recipes)
    put(toy.tasks, "SAMPLES", {data: 128 if "videos" in data else 256 for data in recipes})
    put(toy.tasks.Task, "pictures", lambda *_: None)  # two thirds of the time of a small run
    if not measured:
        put(toy.tasks.Task, "finish", lambda *_: ({}, ""))  # half of the rest


def run(*flags, code=0):
    """A command of w2svd.py, which must end with this status."""
    assert w2svd.main([str(flag) for flag in flags]) == code


def flags_of(out, *flags):
    """What follows `train` for the small toy in ./out, with the backbone in ./cache."""
    return ["--model", "toy", "--cache", "cache", *SMALL, "--out", out, *flags]


def train(out, *flags, code=0):
    """A run of the small toy in ./out."""
    run("train", *flags_of(out, *flags), code=code)


def resume(out, *flags, code=0):
    """The run goes on, with the settings that it was made with."""
    run("train", "--resume", "--out", out, *flags, code=code)


class Call(NamedTuple):
    args: tuple
    how: dict
    result: object


def watch(monkeypatch, owner, name, nth=1, action=None):
    """The calls of owner.name from now on, a list; before the nth one the action comes."""
    original, calls, count = getattr(owner, name), [], itertools.count(1)

    def watched(*args, **how):
        if next(count) >= nth and action:
            action()
        calls.append(Call(args, how, original(*args, **how)))
        return calls[-1].result

    monkeypatch.setattr(owner, name, watched)
    return calls


def raising(error):
    def action():
        raise error

    return action


def said(capsys):
    """The last sentence on stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def contents(folder):
    """{path: bytes} of every file in a folder."""
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(capsys, folder, *flags, code=2):
    """The one sentence of a command that is refused; every file in `folder` is as before."""
    before = contents(folder)
    capsys.readouterr()
    run(*flags, code=code)
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("w2svd: ") and contents(folder) == before
    return sentence


def tensors(path):
    """The tensors of a safetensors file of ours."""
    return w2svd.read_safetensors(path)[0]


def same_bits(one, two):
    """Whether two files hold the same tensors."""
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def timeless(numbers):
    """Numbers, in dictionaries, without those that may differ: seconds and memory."""
    if not isinstance(numbers, dict):
        return numbers
    kept = (k for k in numbers if not k.endswith(("seconds", "_mb", "tflops", "hours_left")))
    return {k: timeless(numbers[k]) for k in kept}


def lines(folder):
    """metrics.jsonl, a list of dictionaries without seconds and memory."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [timeless(json.loads(line)) for line in text.splitlines()]


def names(folder, pattern="*"):
    """The names of the files in a folder, also in folders of it."""
    found = Path(folder).rglob(pattern)
    return sorted(str(p.relative_to(folder)) for p in found if p.is_file())


def same_run(one, two):
    """Assert that two runs hold the same checkpoint, generator, log and result."""
    one, two = Path(one), Path(two)
    newest = names(one, "checkpoint-*")[-1]
    for name in (newest, newest.replace("checkpoint", "generator"), "generator.safetensors"):
        assert same_bits(one / name, two / name), name
    assert lines(one) == lines(two)
    results = [timeless(json.loads((run / "result.json").read_text())) for run in (one, two)]
    assert results[0] == results[1]
