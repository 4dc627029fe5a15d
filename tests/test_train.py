"""train and sample as commands, on a toy of seconds: files, seeds, resuming, what may change.

Against: an undisturbed run of the same seed, bit for bit, and the stored files. Run with
`python -m pytest tests/test_train.py`; half a minute on one core.
"""

import gc
import json
import math
import os
import shutil
import sys

import pytest
import torch
from helpers import (  # noqa: F401
    CONSTANT,
    PICTURES,
    SMALL,
    lines,
    names,
    resume,
    run,
    same_bits,
    same_run,
    small_toy,
    tensors,
    train,
)

import toy.tasks
import w2svd

pytestmark = pytest.mark.usefixtures("small_toy")


def saved(kind, *iterations):
    return [f"{kind}-{i:06}.safetensors" for i in iterations]


def same_generator(*runs):
    return same_bits(*(f"{run}/generator.safetensors" for run in runs))


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_the_files_that_the_readme_names(monkeypatch, capsys):
    monkeypatch.setattr(toy.tasks.Task, "pictures", PICTURES)
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
    assert result["euler"].keys() == {"1", "4", "28"} and result["student"]["steps"] == 4
    assert {row["shift"] for row in result["euler_student_grid"].values()} == {0.5}
    assert all(math.isfinite(result[row]["kl"]) for row in ("student", "floor", "impostor"))
    stored = json.load(open("r/config.json"))
    assert stored["config"]["iterations"] == 4 and stored["plan"]["versions"]["torch"]
    assert "student, 4 steps" in capsys.readouterr().out


def test_a_run_of_videos_leaves_its_clips_and_their_metrics(monkeypatch):
    monkeypatch.setattr(toy.tasks.Task, "pictures", PICTURES)
    train("v", "--data", "videos", "--iterations", 2, "--guidance", 2)
    assert {"clips.gif", "samples.png", "training.gif"} < set(names("v"))
    student = json.load(open("v/result.json"))["student"]
    assert student.keys() >= {"clip_frechet", "frame_frechet", "dynamic_degree"}
    last = lines("v")[-1]
    for name in ("std", "motion"):
        assert last[f"{name}_ratio"] == last[f"gen_{name}"] / last[f"data_{name}"]


def test_two_checkpoints_and_every_generator_stay():
    train("r", "--iterations", 5, "--save-every", 1)
    assert names("r", "checkpoint-*") == saved("checkpoint", 4, 5)
    assert names("r", "generator-*") == saved("generator", 1, 2, 3, 4, 5)
    assert same_bits("r/generator-000005.safetensors", "r/generator.safetensors")


def test_of_a_full_generator_two_stay():
    train("r", "--iterations", 4, "--save-every", 1, "--generator", "full")
    assert names("r", "generator-*") == saved("generator", 3, 4)


def test_a_generator_is_the_average_of_its_iteration_and_its_header_says_how_to_sample():
    train("r", "--iterations", 4)
    for i in (2, 4):
        state = tensors(f"r/checkpoint-{i:06}.safetensors")
        generator, info = w2svd.read_safetensors(f"r/generator-{i:06}.safetensors")
        assert info["rank"] == info["lora_alpha"] == 4 and info["kind"] == "lora"
        assert info["step"] == i and info["sigmas"] == pytest.approx([1, 3 / 5, 1 / 3, 1 / 7, 0])
        for name, x in generator.items():
            name = name.removeprefix("transformer.")
            assert torch.equal(x, state[f"average/{name}"])
            assert "lora_B" not in name or not torch.equal(x, state[f"generator/{name}"])


def test_without_out_the_next_free_folder_is_taken():
    for folder in ("runs/toy", "runs/toy-2"):
        run("train", "--cache", "cache", *SMALL, "--iterations", 1)
        assert "result.json" in names(folder)


def test_what_must_follow_the_adapters_is_prepared_after_them(monkeypatch):
    seen = []

    def prepare(task):
        seen.append(any("lora_" in name for name, _ in task.backbone.module.named_parameters()))

    monkeypatch.setattr(toy.tasks.Task, "prepare", prepare)
    train("r", "--iterations", 1)
    assert seen == [True]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    run("train", "--dry-run", "--cache", "cache")
    assert "generator_parameters" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    train("r", "--iterations", 1)
    (tmp_path / "plain.txt").touch()
    for name in names("r"):
        assert os.stat(f"r/{name}").st_mode == os.stat("plain.txt").st_mode, name


def test_no_fcntl_no_resource_and_no_folder_that_opens_are_needed(monkeypatch):
    """As on Windows, and in part on macOS."""
    real_open = os.open

    def opens_no_folder(path, *args, **how):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **how)

    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(os, "open", opens_no_folder)
    train("r", "--iterations", 2, *CONSTANT)
    resume("r", "--iterations", 4)
    run("sample", "--run", "r", "--n", 8, "--out", "s.png")
    assert json.load(open("r/result.json"))["peak_rss_mb"] == 0


# ---- bits ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    for out, seed, cache in (("a", 0, "c1"), ("b", 0, "c2"), ("c", 1, "c1")):
        train(out, "--iterations", 2, "--seed", seed, "--cache", cache)
    same_run("a", "b")  # the backbone trained twice
    assert not same_generator("a", "c")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_n_iterations_resumed_for_n_more_equal_2n(kind):
    flags = [*CONSTANT, "--generator", kind, "--fake", kind]
    train("whole", "--iterations", 8, *flags)
    train("parts", "--iterations", 4, *flags)
    resume("parts", "--iterations", 8)
    same_run("whole", "parts")
    assert names("whole") == names("parts")
    kinds = {name.split("/")[0] for name in tensors("whole/checkpoint-000008.safetensors")}
    assert kinds == {"generator", "fake", "average", "optimizer", "rng"}


def stops_at(monkeypatch, nth):
    """The nth update of the generator does not come any more."""
    step, calls = w2svd.generator_step, []

    def stops(*args, **how):
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return step(*args, **how)

    monkeypatch.setattr(w2svd, "generator_step", stops)


HARD = {
    "ring": "--alpha-weak-schedule cosine --fake-warmup 3".split(),
    "videos": "--generator-input paired --gt-weight .1 --guidance 2 --accumulate 2".split(),
}


@pytest.mark.parametrize("data", HARD)
def test_a_run_cut_off_between_two_checkpoints_goes_on_to_the_same_bits(data, monkeypatch):
    flags = ["--data", data, "--iterations", 8, "--save-every", 3, *HARD[data]]
    train("whole", *flags)
    with monkeypatch.context() as patch:
        stops_at(patch, 6)  # after the log line of 4 and the checkpoint of 3
        train("cut", *flags, code=130)
    resume("cut")
    same_run("whole", "cut")
    assert names("whole") == names("cut")


def test_gradient_checkpointing_gives_the_same_generator():
    train("plain", "--iterations", 2)
    train("less", "--iterations", 2, "--checkpointing")
    assert same_generator("plain", "less")


CHANGES = "--gt-weight .5,--alpha-weak .9,--shift 2,--ema .05,--accumulate 2,--sigma-shift 5"


@pytest.mark.parametrize("flag", CHANGES.split(","))
def test_a_setting_that_is_part_of_the_method_changes_the_generator(flag):
    paired = ["--generator-input", "paired", "--iterations", 2]
    train("without", *paired)
    train("with", *paired, *flag.split())
    assert not same_generator("without", "with")


# ---- going on: what may change -------------------------------------------------------------------


def test_a_resume_takes_the_run_s_settings_as_they_are():
    train("r", "--iterations", 2, "--alpha-weak", 0.5, *CONSTANT)
    before = w2svd.read_run("r")
    resume("r", "--iterations", 4)
    assert w2svd.read_run("r") == w2svd.dataclasses.replace(before, iterations=4)
    assert before.alpha_weak == 0.5 and before.batch == 16


def test_intervals_and_checkpointing_may_change_and_the_weights_stay():
    train("whole", "--iterations", 6, *CONSTANT)
    train("parts", "--iterations", 2, *CONSTANT)
    resume("parts", "--iterations", 6, "--log-every", 1, "--save-every", 3, "--checkpointing")
    assert same_generator("whole", "parts")
    assert names("parts", "generator-*") == saved("generator", 2, 3, 6)
    assert [row["step"] for row in lines("parts")] == [2, 3, 4, 5, 6]


def test_learning_rates_may_change_and_the_log_says_so(monkeypatch):
    train("r", "--iterations", 2, *CONSTANT)
    shutil.copytree("r", "cut")
    shutil.copytree("r", "plain")
    resume("plain", "--iterations", 4)
    resume("r", "--iterations", 4, "--generator-lr", 0.01)
    rows = lines("r")
    assert [row["step"] for row in rows] == [2, 2, 4]
    assert "0.02" in str(rows[1]["changed"]) and "0.01" in str(rows[1]["changed"])
    assert w2svd.read_run("r").generator_lr == 0.01 and not same_generator("plain", "r")
    with monkeypatch.context() as patch:
        stops_at(patch, 2)
        resume("cut", "--iterations", 4, "--generator-lr", 0.01, code=130)
    resume("cut")  # the log must say it once, although no checkpoint was written in between
    same_run("r", "cut")


def test_a_finished_run_may_be_resumed_and_stays_as_it_is():
    train("r", "--iterations", 2)
    before = names("r"), lines("r"), tensors("r/generator.safetensors")
    resume("r")
    assert (names("r"), lines("r")) == before[:2]
    after = tensors("r/generator.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before[2].items())


def test_a_run_may_be_moved_and_goes_on_where_it_lies(tmp_path):
    train("whole", "--iterations", 4, *CONSTANT)
    train("r", "--iterations", 2, *CONSTANT)
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    resume("elsewhere", "--iterations", 4)
    same_run("whole", "elsewhere")
    assert not (tmp_path / "r").exists()


# ---- sample --------------------------------------------------------------------------------------


def drawn(*flags):
    run("sample", "--n", 8, "--out", "drawn.safetensors", *flags)
    return tensors("drawn.safetensors")["samples"]


@pytest.mark.parametrize("data", ["ring", "videos"])
def test_sample_draws_tensors_pictures_and_animations(data):
    train("r", "--data", data, "--iterations", 1)
    for suffix in (".png", ".gif"):
        run("sample", "--run", "r", "--n", 8, "--out", f"s{suffix}")
        assert os.path.getsize(f"s{suffix}") > 100
    samples = drawn("--run", "r")
    assert samples.shape == (8, *((2,) if data == "ring" else (4, 8, 8, 8)))
    assert torch.equal(samples, drawn("--run", "r", "--seed", 0))
    assert not torch.equal(samples, drawn("--run", "r", "--seed", 1))


def test_any_saved_iteration_can_be_sampled_and_the_newest_is_the_default():
    train("short", "--iterations", 2, *CONSTANT)
    train("long", "--iterations", 4, *CONSTANT)
    at_2 = drawn("--run", "long", "--at", 2)
    assert torch.equal(at_2, drawn("--run", "short"))
    newest = drawn("--run", "long")
    assert not torch.equal(at_2, newest)
    assert torch.equal(newest, drawn("--run", "long", "--at", 4))


def test_a_run_that_was_cut_off_can_be_sampled(monkeypatch):
    def cut_off(task, step, generator):
        if step:
            raise KeyboardInterrupt

    train("whole", "--iterations", 2)
    with monkeypatch.context() as patch:
        patch.setattr(toy.tasks.Task, "on_log", cut_off)  # follows the first save
        train("cut", "--iterations", 2, code=130)
    assert "generator.safetensors" not in names("cut")
    assert torch.equal(drawn("--run", "cut"), drawn("--run", "whole"))


def test_the_sampling_grid_is_the_one_in_the_header():
    train("r", "--iterations", 2)
    before = drawn("--run", "r")
    path = w2svd.Path("r/generator-000002.safetensors")
    weights, info = w2svd.read_safetensors(path)
    w2svd.write_safetensors(path, weights, info | {"sigmas": [1.0, 0.5, 0.0]})
    assert not torch.equal(before, drawn("--run", "r"))


# ---- the backbone, schedules, length -------------------------------------------------------------


def test_the_second_run_reads_the_backbone_from_the_cache(monkeypatch):
    train("a", "--iterations", 1)
    monkeypatch.setattr(toy.tasks, "train_backbone", None)
    train("b", "--iterations", 1)
    same_run("a", "b")


def test_a_damaged_backbone_is_trained_anew(tmp_path):
    train("a", "--iterations", 1)
    (backbone,) = (tmp_path / "cache").iterdir()
    backbone.write_bytes(backbone.read_bytes()[:1000])
    train("b", "--iterations", 1)
    same_run("a", "b")


def test_the_alpha_schedules_end_at_half_of_the_iterations():
    for schedule, quarter in (("constant", 0.25), ("linear", 0.125), ("cosine", 0.125)):
        config = w2svd.Config(alpha_weak_schedule=schedule, iterations=100)
        values = [w2svd.alpha_weak_at(config, i) for i in (0, 25, 50, 99)]
        end = 0.25 if schedule == "constant" else 0.0
        assert values == pytest.approx([0.25, quarter, end, end])


def test_a_captioned_backbone_also_learns_without_captions():
    mixture = toy.tasks.mixtures.videos()
    recipe = w2svd.dataclasses.replace(toy.tasks.RECIPES["videos"], uncaptioned=2)
    torch.manual_seed(0)
    before = toy.tasks.build(mixture, recipe).text.weight.clone()
    after = toy.tasks.train_backbone(mixture, recipe, seed=0).text.weight
    assert (after != before).any(dim=1).all()  # the last row is 'no caption'


@pytest.mark.slow
def test_a_long_run_holds_no_more_tensors_files_or_memory_at_its_end(monkeypatch):
    found, on_log = [], toy.tasks.Task.on_log

    def watch(self, step, generator):
        on_log(self, step, generator)
        if step in (100, 200, 400):
            gc.collect()
            alive = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
            files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
            found.append((alive, files, w2svd.memory_mb("cpu")))

    monkeypatch.setattr(toy.tasks.Task, "on_log", watch)
    train("r", "--iterations", 400, "--save-every", 20, "--log-every", 20)
    assert found[0][:2] == found[1][:2] == found[2][:2]
    assert found[2][2] - found[0][2] < 4  # MB, of the peak
