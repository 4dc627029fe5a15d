"""train() and the command line: whole runs of a very small toy, compared bit for bit.

Against: a second run of the same seed, an uninterrupted run, the stored files. Run with
`python -m pytest tests/test_train.py`; about 30 seconds.
"""

import json

import pytest
import torch

import toy.tasks
import w2svd

SMALL = "--batch 16 --lora-rank 4 --log-every 2 --save-every 2 --fake-updates 2".split()


@pytest.fixture(autouse=True)
def small_toy(monkeypatch, tmp_path):
    """A backbone of seconds, few samples to measure, and runs/ in a folder of its own."""
    recipe = toy.tasks.Recipe(width=16, batch=32, iterations=10)
    video = toy.tasks.Recipe(width=16, batch=8, iterations=4, patch=(2, 4, 4), labels=2,
                             precondition=True, shift=3.0)  # fmt: skip
    monkeypatch.setattr(toy.tasks, "RECIPES", {"ring": recipe, "grid": recipe, "videos": video})
    monkeypatch.setattr(toy.tasks, "SAMPLES", {"ring": 256, "grid": 256, "videos": 128})
    monkeypatch.chdir(tmp_path)


def run(*flags, code=0):
    assert w2svd.main([str(f) for f in flags]) == code


def train(out, *flags, code=0):
    run("train", "--model", "toy", "--cache", "cache", *SMALL, "--out", out, *flags, code=code)


def tensors(path):
    return w2svd.read_safetensors(path)[0]


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder):
    """metrics.jsonl without the fields that may differ: seconds and memory."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if "seconds" not in k and "_mb" not in k} for row in rows]


def test_a_run_leaves_every_file_that_the_readme_names(tmp_path, capsys):
    train("r", "--iterations", 4)
    folder = tmp_path / "r"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "result.json", "generator.safetensors",
                     "samples.png", "training.gif", "checkpoint-000004.safetensors"}  # fmt: skip
    assert not [n for n in names if ".part" in n]
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() == {"student", "euler", "floor", "seconds", "peak_rss_mb", "skipped",
                             "seed"}  # fmt: skip
    assert result["euler"].keys() == {"1", "4", "28"} and result["student"]["steps"] == 4
    _, info = w2svd.read_safetensors(folder / "generator.safetensors")
    assert info["rank"] == info["lora_alpha"] == 4 and info["kind"] == "lora"
    assert info["sigmas"] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["iterations"] == 4 and stored["plan"]["versions"]["torch"]
    assert "student, 4 steps" in capsys.readouterr().out


def test_videos_run_and_leave_a_strip_and_a_gif(tmp_path):
    train("v", "--data", "videos", "--iterations", 2, "--guidance", 2)
    assert (tmp_path / "v" / "clips.gif").exists() and (tmp_path / "v" / "samples.png").exists()
    student = json.loads((tmp_path / "v" / "result.json").read_text())["student"]
    assert student.keys() >= {"clip_frechet", "frame_frechet", "dynamic_degree"}


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for out, seed, cache in (("a", 0, "c1"), ("b", 0, "c2"), ("c", 1, "c1")):
        train(out, "--iterations", 2, "--seed", seed, "--cache", cache)
    name = "checkpoint-000002.safetensors"
    assert same_bits(tmp_path / "a" / name, tmp_path / "b" / name)  # the backbone trained twice
    assert not same_bits(tmp_path / "a" / name, tmp_path / "c" / name)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_n_iterations_resumed_for_n_more_equal_2n(tmp_path, kind):
    flags = ["--lr-schedule", "constant", "--generator", kind, "--fake", kind]
    train("whole", "--iterations", 8, *flags)
    train("parts", "--iterations", 4, *flags)
    train("parts", "--iterations", 8, *flags, "--resume")
    for name in ("checkpoint-000008.safetensors", "generator.safetensors"):
        assert same_bits(tmp_path / "whole" / name, tmp_path / "parts" / name)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert {n.split("/")[0] for n in tensors(tmp_path / "whole/checkpoint-000008.safetensors")} == {
        "generator", "fake", "ema", "optimizer", "rng"}  # fmt: skip


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_stopped_at_n_and_resumed_under_a_schedule_equals_an_unbroken_one(
    tmp_path, schedule, monkeypatch
):
    flags = ["--iterations", 8, "--alpha-weak-schedule", schedule, "--lr-schedule", "linear"]
    train("whole", *flags, "--fake-warmup", 3)
    tensors_of = w2svd.State.tensors

    def pull_the_plug(self):
        if self.iteration == 6:  # the checkpoint of 6 is not yet written, the log line of 6 is
            raise KeyboardInterrupt
        return tensors_of(self)

    with monkeypatch.context() as patch:
        patch.setattr(w2svd.State, "tensors", pull_the_plug)
        train("cut", *flags, "--fake-warmup", 3, code=130)
    train("cut", "--resume")
    name = "checkpoint-000008.safetensors"
    assert same_bits(tmp_path / "whole" / name, tmp_path / "cut" / name)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_the_second_run_reads_the_backbone_from_the_cache(tmp_path, monkeypatch):
    train("a", "--iterations", 1)
    monkeypatch.setattr(toy.tasks, "train_backbone", None)
    train("b", "--iterations", 1)
    assert same_bits(tmp_path / "a/generator.safetensors", tmp_path / "b/generator.safetensors")


def test_the_alpha_schedules_end_at_half_of_the_iterations():
    for schedule, quarter in (("constant", 0.25), ("linear", 0.125), ("cosine", 0.125)):
        config = w2svd.Config(alpha_weak_schedule=schedule, iterations=100)
        values = [w2svd.alpha_weak_at(config, i) for i in (0, 25, 50, 99)]
        end = 0.25 if schedule == "constant" else 0.0
        assert values == pytest.approx([0.25, quarter, end, end])


def test_without_out_the_next_free_folder_is_taken(tmp_path):
    for folder in ("runs/toy", "runs/toy-2"):
        run("train", "--cache", "cache", *SMALL, "--iterations", 1)
        assert (tmp_path / folder / "result.json").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    run("train", "--dry-run", "--cache", tmp_path / "cache")
    assert "backbone_parameters" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_gradient_checkpointing_gives_the_same_generator(tmp_path):
    train("plain", "--iterations", 2)
    train("less", "--iterations", 2, "--checkpointing")
    a, b = (tensors(tmp_path / x / "generator.safetensors") for x in ("plain", "less"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_gt_weight_changes_the_generator_and_trains(tmp_path):
    for out, weight in (("without", 0), ("with", 0.5)):
        train(out, "--iterations", 2, "--generator-input", "paired", "--gt-weight", weight)
    assert not same_bits(tmp_path / "without/generator.safetensors",
                         tmp_path / "with/generator.safetensors")  # fmt: skip


@pytest.mark.parametrize("data, suffixes", [
    ("ring", [".png", ".gif", ".safetensors"]), ("videos", [".png", ".gif", ".safetensors"]),
])  # fmt: skip
def test_sample_draws_from_a_finished_run(tmp_path, data, suffixes):
    train("r", "--data", data, "--iterations", 1)
    for suffix in suffixes:
        run("sample", "--run", "r", "--n", 8, "--out", tmp_path / f"s{suffix}")
        assert (tmp_path / f"s{suffix}").stat().st_size > 100
    samples = tensors(tmp_path / "s.safetensors")["samples"]
    assert samples.shape == (8, *((2,) if data == "ring" else (4, 8, 8, 8)))
    run("sample", "--run", "r", "--n", 8, "--seed", 1, "--out", tmp_path / "t.safetensors")
    assert not torch.equal(samples, tensors(tmp_path / "t.safetensors")["samples"])


def test_a_captioned_backbone_also_learns_without_captions():
    mixture = toy.tasks.mixtures.videos()
    recipe = toy.tasks.Recipe(width=16, batch=8, iterations=4, patch=(2, 4, 4), labels=2,
                              uncaptioned=2)  # fmt: skip
    torch.manual_seed(0)
    before = toy.tasks.build(mixture, recipe).text.weight.clone()
    after = toy.tasks.train_backbone(mixture, recipe, seed=0).text.weight
    assert (after != before).any(dim=1).all()  # the last row is 'no caption'
