"""People's mistakes: one sentence with the cure, an exit status, nothing written. And `--help`.

Each case runs the real main() and compares every file before and after. Run with
`python -m pytest tests/test_refusals.py`; 5 seconds.
"""

from pathlib import Path

import pytest
import torch
from helpers import CONSTANT, raising, refused, resume, run, said, train, watch
from safetensors.torch import save_file

import w2svd

pytestmark = pytest.mark.usefixtures("small_toy")

# what is given, and what the sentence must name
REFUSED = {
    "": "--help",
    "train --sed 3": "--seed",
    "train --iter 3": "--iter",  # not taken for --iterations
    "train --alpha-weak nan": "--alpha-weak",
    "train --alpha-weak .5 --alpha-strong .4": "--alpha-strong",
    "train --fake full --alpha-weak .25": "--alpha-weak",
    "train --gt-weight .1 --generator-input rollout": "paired",
    "train --gt-weight .1 --generator-input paired --steps 1": "--steps",
    "train --generator-input paired --fake-samples final": "rollout",
    "train --sigma-low .9 --sigma-high .1": "--sigma-low",
    "train --data moons": "ring",
    "train --guidance 3": "captions",
    "train --compile": "--compile",
    "train --shard": "--shard",
    "train --offload": "--offload",
    "train --model wan": "toy",
    "train --resume --out typo": "typo",
    "train --model hunyuan --data x --height 481": "--height",
    "train --model hunyuan --data x --frames 60": "--frames",
    "train --model hunyuan --data x --guidance 2": "--guidance",
    "train --model hunyuan --data x --fp8-base --compile": "--fp8-base",
    "train --model hunyuan --data captions.txt --generator-input paired": "rollout",
    "train --model hunyuan --data captions.txt --gan-weight 1": "--gan-weight",
    "train --model hunyuan --data x --offload --shard": "--shard",
    "train --model hunyuan --data x --checkpoint nowhere": "nowhere",
    "train --cache file/cache": "--cache",
    "train --out file": "in use",
    "encode --model toy --data ring": "hunyuan",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(capsys, tmp_path, given):
    Path("file").write_text("x")
    cache = ["--cache", "cache"] if given[:5] == "train" and "--cache" not in given else []
    assert REFUSED[given] in refused(capsys, tmp_path, *given.split(), *cache)


@pytest.mark.parametrize("command", ["", "train", "encode", "sample", "export"])
def test_every_help_has_all_flags_in_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        w2svd.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 80
    for name in {**vars(w2svd.Config()), **vars(w2svd.Machine())} if command == "train" else ():
        assert f"  {w2svd.flag(name)}" in text


def test_a_run_folder_is_only_gone_on_with_by_what_fits_it(capsys, tmp_path):
    train("r", "--iterations", 4, *CONSTANT)
    train("scheduled", "--iterations", 2, *CONSTANT, "--alpha-weak-schedule", "cosine")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for used in ("r", "mine"):
        assert "in use" in refused(capsys, tmp_path, "train", "--out", used)
    again = ("train", "--resume", "--out")
    for text in ("", "[]", '{"config": {"learning_rate": 1}}'):
        Path("mine/config.json").write_text(text)
        assert "not a run" in refused(capsys, tmp_path, *again, "mine")
    for flags in ("--seed 7", "--lora-rank 7", "--alpha-weak 7", "--data grid"):
        assert flags.split()[0] in refused(capsys, tmp_path, *again, "r", *flags.split())
    for out, iterations in (("r", 2), ("scheduled", 9)):  # fewer than it has; a schedule's
        error = refused(capsys, tmp_path, *again, out, "--iterations", iterations)
        assert "--iterations" in error
    resume("r", "--seed", 0)  # what does not disagree may be said


def test_a_generator_or_backbone_that_does_not_fit_is_refused(capsys, tmp_path):
    train("r", "--iterations", 4)
    sample = ("sample", "--run", "r", "--out", "a.png")
    assert "2, 4" in refused(capsys, tmp_path, *sample, "--at", 7)  # those that there are
    for flags in ("--n 0", "--seed -1", "--prompt dog", "--image a.png", "--height 32"):
        assert flags.split()[0] in refused(capsys, tmp_path, *sample, *flags.split())
    path = Path("r/generator-000004.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(capsys, tmp_path, *sample)
    save_file({"x": torch.zeros(2)}, path)  # whole, but not ours
    assert path.name in refused(capsys, tmp_path, *sample)
    path.unlink()
    run(*sample)  # generator.safetensors is still there
    (backbone,) = Path("cache").iterdir()
    weights, info = w2svd.read_safetensors(backbone)
    w2svd.write_safetensors(backbone, {k: x + 0.1 for k, x in weights.items()}, info)
    for command in (sample, ("train", "--resume", "--out", "r")):
        assert "backbone" in refused(capsys, tmp_path, *command)
    assert "toy" in refused(capsys, tmp_path, "export", "--run", "r", "--out", "lora")


ENDS = [
    (w2svd.Refused("no", status=1), 1, "no"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--dry-run"),
    (ModuleNotFoundError("No module named 'peft'"), 2, "pip install"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "--resume"),
]


@pytest.mark.parametrize("error, status, word", ENDS, ids=lambda x: str(x))
def test_what_ends_a_run_has_its_status_and_sentence(monkeypatch, capsys, error, status, word):
    watch(monkeypatch, w2svd, "generator_step", 1, raising(error))
    train("r", "--iterations", 1, code=status)
    assert word in said(capsys)


def test_a_bug_shows_its_traceback(monkeypatch):
    watch(monkeypatch, w2svd, "generator_step", 1, raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        train("r", "--iterations", 1)
