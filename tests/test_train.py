"""train and sample as commands, on a toy of seconds: files, seeds, resuming, what may change.

Against: an undisturbed run of the same seed, bit for bit, and the stored files. Run with
`python -m pytest tests/test_train.py`; 10 seconds.
"""

import json
import os

import helpers
import pytest
import torch
from helpers import lines, names, raising, resume, run, same_bits, same_run, tensors, train, watch

import toy.tasks
import w2svd

CONSTANT = helpers.CONSTANT


@pytest.fixture(autouse=True)
def small(monkeypatch):
    helpers.make_small(monkeypatch.setattr, measured=False)


def saved(kind, *iterations):
    return [f"{kind}-{i:06}.safetensors" for i in iterations]


def same_generator(*runs):
    return same_bits(*(f"{run}/generator.safetensors" for run in runs))


def drawn(*flags):
    run("sample", "--n", 8, "--out", "drawn.safetensors", "--run", *flags)
    return tensors("drawn.safetensors")["samples"]


def test_a_run_leaves_the_files_that_the_readme_names(monkeypatch, capsys, tmp_path):
    run("train", "--dry-run", "--cache", "cache")
    assert "parameters" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(toy.tasks.Task, "pictures", helpers.PICTURES)
    monkeypatch.setattr(toy.tasks.Task, "finish", helpers.FINISH)
    train("r", "--iterations", 4)
    assert set(names("r")) == {
        *("config.json", "metrics.jsonl", "result.json", "samples.png", "training.gif"),
        *saved("checkpoint", 2, 4),
        *saved("generator", 2, 4),
        "generator.safetensors",
        *(f"frames/00000{i}.safetensors" for i in (0, 2, 4)),
    }
    result = json.load(open("r/result.json"))
    rows = {"student", "euler", "euler_student_grid", "floor", "impostor"}
    assert result.keys() == rows | {"seconds", "peak_rss_mb", "seed"}
    assert json.load(open("r/config.json"))["config"]["iterations"] == 4
    assert [row["step"] for row in lines("r")] == [2, 4]
    (tmp_path / "plain.txt").touch()  # files are readable by whom the umask allows
    assert {os.stat(f"r/{n}").st_mode for n in names("r")} == {os.stat("plain.txt").st_mode}


def test_two_checkpoints_stay_without_random_state_and_every_generator():
    train("r", "--iterations", 4, "--save-every", 1)
    assert names("r", "checkpoint-*") == saved("checkpoint", 3, 4)
    assert names("r", "generator-*") == saved("generator", 1, 2, 3, 4)
    held, info = w2svd.read_safetensors("r/checkpoint-000004.safetensors")
    assert {n.split("/")[0] for n in held} == {"generator", "fake", "average", "optimizer"}
    assert len(json.dumps(info)) < 400  # a digest of the clips' names, not the names


def test_without_out_the_next_free_folder_is_taken():
    for folder in ("runs/toy", "runs/toy-2"):
        run("train", "--cache", "cache", *helpers.SMALL, "--iterations", 1)
        assert "result.json" in names(folder)


def test_a_run_folder_belongs_to_one_process_at_a_time():
    config = w2svd.Config()
    with w2svd.claimed(config, False) as first, w2svd.claimed(config, False) as second:
        assert (first.out, second.out) == ("runs/toy", "runs/toy-2")
        for resume in (False, True):
            with pytest.raises(w2svd.Refused, match="in use"), w2svd.claimed(first, resume):
                pass
    assert not os.path.exists("runs")


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(monkeypatch):
    monkeypatch.setattr(toy.tasks.Task, "finish", helpers.FINISH)
    for out, seed, cache in (("a", 0, "c1"), ("b", 0, "c2"), ("c", 1, "c1")):
        train(out, "--iterations", 2, "--seed", seed, "--cache", cache)
    same_run("a", "b")  # the backbone trained twice
    assert not same_generator("a", "c")
    train("less", "--iterations", 2, "--cache", "c1", "--checkpointing")
    assert same_generator("a", "less")


HARD = {
    "full": "--generator full --fake full",
    "judged": "--gan-weight .5",
    "ring": "--alpha-weak-schedule cosine --fake-warmup 3",
    "videos": "--data videos --generator-input paired --gt-weight .1 --guidance 2 --accumulate 2",
}


@pytest.mark.parametrize("kind", HARD)
def test_a_run_cut_off_between_two_checkpoints_goes_on_to_the_same_bits(kind, monkeypatch):
    flags = ["--iterations", 8, "--save-every", 3, *HARD[kind].split()]
    train("whole", *flags)
    with monkeypatch.context() as patch:
        watch(patch, w2svd.State, "update_average", 6, raising(KeyboardInterrupt()))
        train("cut", *flags, code=130)  # after the log line of 4 and the checkpoint of 3
    resume("cut")
    same_run("whole", "cut")
    assert names("whole") == names("cut")


def test_what_a_resume_may_change_also_in_a_folder_that_moved(tmp_path):
    train("whole", "--iterations", 6, *CONSTANT, "--alpha-weak", 0.5)
    for out in ("parts", "slower"):
        train(out, "--iterations", 2, *CONSTANT, "--alpha-weak", 0.5)
    before, flags = w2svd.read_run("parts"), ["--log-every", 1, "--save-every", 3]
    resume("parts", "--iterations", 6, *flags, "--checkpointing")
    assert same_generator("whole", "parts")
    assert names("parts", "generator-*") == saved("generator", 2, 3, 6)
    assert [row["step"] for row in lines("parts")] == [2, 3, 4, 5, 6]
    changed = {"iterations": 6, "log_every": 1, "save_every": 3, "checkpointing": True}
    assert w2svd.read_run("parts") == w2svd.dataclasses.replace(before, **changed)
    (tmp_path / "slower").rename("moved")
    resume("moved", "--iterations", 6, "--generator-lr", 0.01)
    assert w2svd.read_run("moved").generator_lr == 0.01
    assert not same_generator("whole", "moved")


@pytest.mark.parametrize("data", ["ring", "videos"])
def test_sample_draws_tensors_pictures_and_animations(data):
    train("r", "--data", data, "--iterations", 2)
    for suffix in (".png", ".gif"):
        run("sample", "--run", "r", "--n", 8, "--out", f"s{suffix}")
        assert os.path.getsize(f"s{suffix}") > 100
    samples = drawn("r")
    assert samples.shape == (8, *((2,) if data == "ring" else (4, 8, 8, 8)))
    assert torch.equal(samples, drawn("r", "--seed", 0))
    assert not torch.equal(samples, drawn("r", "--seed", 1))


def test_a_damaged_backbone_is_trained_anew_and_a_whole_one_read(tmp_path, monkeypatch):
    train("a", "--iterations", 1)
    (backbone,) = (tmp_path / "cache").iterdir()
    backbone.write_bytes(backbone.read_bytes()[:1000])
    train("b", "--iterations", 1)
    monkeypatch.setattr(toy.tasks, "train_backbone", None)
    train("c", "--iterations", 1)
    same_run("a", "b")
    same_run("a", "c")
