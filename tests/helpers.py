"""What test files share: main() as a function, a toy of seconds, files compared bit for bit."""

import json
from pathlib import Path

import pytest
import torch

import toy.tasks
import w2svd

SMALL = "--batch 16 --lora-rank 4 --log-every 2 --save-every 2 --fake-updates 2".split()
CONSTANT = ["--lr-schedule", "constant"]  # so that --iterations may be raised


def run(*flags, code=0):
    """A command of w2svd.py, which must end with this status."""
    assert w2svd.main([str(flag) for flag in flags]) == code


def train(out, *flags, code=0):
    """A run of the small toy in ./out, with the backbone in ./cache."""
    run("train", "--model", "toy", "--cache", "cache", *SMALL, "--out", out, *flags, code=code)


def resume(out, *flags, code=0):
    """The run goes on, with the settings that it was made with."""
    run("train", "--resume", "--out", out, *flags, code=code)


@pytest.fixture
def small_toy(monkeypatch, tmp_path):
    """A backbone of seconds, few samples to measure, and ./ in a folder of its own."""
    recipe = toy.tasks.Recipe(width=16, batch=32, iterations=10)
    how = {"width": 16, "batch": 8, "iterations": 4, "patch": (2, 4, 4), "labels": 2}
    video = toy.tasks.Recipe(precondition=True, shift=3.0, **how)
    monkeypatch.setattr(toy.tasks, "RECIPES", {"ring": recipe, "grid": recipe, "videos": video})
    monkeypatch.setattr(toy.tasks, "SAMPLES", {"ring": 256, "grid": 256, "videos": 128})
    monkeypatch.chdir(tmp_path)


def tensors(path):
    return w2svd.read_safetensors(path)[0]


def same_bits(one, two):
    """Whether two files hold the same tensors."""
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def lines(folder):
    """metrics.jsonl without the fields that may differ: seconds and memory."""
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if "seconds" not in k and "_mb" not in k} for row in rows]


def same_run(one, two):
    """Two run folders hold the same newest checkpoint, generator, log and result."""
    one, two = Path(one), Path(two)
    newest = sorted(one.glob("checkpoint-*"))[-1].name
    for name in (newest, "generator.safetensors"):
        assert same_bits(one / name, two / name), name
    assert lines(one) == lines(two)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for name in ("student", "euler", "floor", "seed"):
        assert results[0].get(name) == results[1].get(name) or name == "student"
    numbers = [{k: v for k, v in r["student"].items() if k not in TIMES} for r in results]
    assert numbers[0] == numbers[1]


TIMES = ("seconds", "memory_mb")


def said(capsys):
    """The last sentence on stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def files(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(capsys, folder, *flags, code=2):
    """The one sentence of a command that is refused; every file in `folder` is as before."""
    before = files(folder)
    capsys.readouterr()
    run(*flags, code=code)
    error = said(capsys)
    assert error.startswith("w2svd: ") and "Traceback" not in error
    assert files(folder) == before
    return error
