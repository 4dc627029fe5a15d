"""Hostile files, the fast part: every kind that tests/fuzz.py knows, once, and what it cannot see.

Against: fuzz.judge() (one sentence or a counted skip, no hang, bounded memory, nothing outside of
the output), the guards taken away, a film next to it. Run with `python -m pytest
tests/test_fuzz.py`; 45 seconds. `python tests/fuzz.py` tries thousands.
"""

import json
import os
import shutil
from pathlib import Path

import fuzz
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from fuzz import Case, Result
from tiny_hunyuan import film

import hunyuan
import w2svd

CLIP, DATA, RUN = "clips/one.mp4", "data/one*.safetensors", "run/generator.safetensors"
SIZE = w2svd.Config(height=32, width=48, frames=9, fps=12.0)
CASES = [
    *[(CLIP, how, "encode", 1) for how in (
        "truncated", "no frames", "text", "playlist", "fifo", "link to zeros", "link outside")],
    *[(CLIP, how, "encode", 0) for how in (
        "variable frame rate", "odd size", "1x1", "9000x2", "size not true", "matroska")],
    ("clips/one.txt", "100 kB", "encode", 0), ("clips/one.txt", "500 kB", "encode", 1),
    ("clips/one.txt", "control characters", "encode", 0), ("clips/one.txt", "fifo", "encode", 1),
    ("clips/one.txt", "link outside", "encode", 1), ("clips/one.txt", "surrogates", "encode", 1),
    ("clips/metadata.jsonl", "names", "encode", 1), ("clips/metadata.jsonl", "many", "encode", 1),
    ("clips/metadata.jsonl", "nested", "encode", 2), ("clips/metadata.jsonl", "fifo", "encode", 2),
    ("clips/metadata.csv", "link to zeros", "encode", 2), ("clips/videos.txt", "NUL", "encode", 2),
    ("prompts.txt", "100 kB in a word", "sample prompts", 0),
    (DATA, "bits flipped", "train", 2), (DATA, "crowded header", "train", 2),
    (DATA, "int64", "train", 2), (DATA, "fifo", "encode again", 0),
    ("data/index.json", "nested", "train", 2), ("data/index.json", "fifo", "train", 2),
    *[(RUN, how, "export comfyui", 2) for how in (
        "truncated", "bits flipped", "nan", "turned", "twice", "missing", "info nested")],
    ("run/checkpoint-000004.safetensors", "bits flipped", "resume", 0),
    ("toy/checkpoint-000004.safetensors", "truncated", "resume toy", 0),
    ("run/config.json", "nested", "sample", 2), ("toy/config.json", "truncated", "sample toy", 2),
    ("toy/generator.safetensors", "bits flipped", "sample toy", 2),
    ("tiny/transformer/config.json", "truncated", "train", 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command, *more):
    return w2svd.main([*fuzz.COMMANDS[command][0].split(), *more])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What every case starts from."""
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RECIPES", "SAMPLES"):  # small_toy() writes over them
            patch.setattr(fuzz.toy.tasks, name, {})
        fuzz.small_toy()
        assert fuzz.alone(fuzz.make_good, folder)[0] == 0
        yield folder


@pytest.mark.parametrize("target, how, command, status", CASES)
def test_a_hostile_file_ends_in_a_sentence_or_a_counted_skip(good, target, how, command, status):
    case = Case(target, how, command, seed=3)
    result = fuzz.play(case, good, good.parent / "case")
    assert not list(fuzz.judge(case, result))
    assert result.status == status, result.said


@pytest.mark.parametrize("change, says", [
    ({"status": -9}, "signal 9"), ({"status": 70}, "exit status"), ({"status": 1}, "counted"),
    ({"said": ("", "Traceback\nKeyError")}, "KeyError"), ({"status": 2}, "no sentence"),
    ({"said": ("\x1b[2J", "")}, "terminal"), ({"said": ("x" * 400_000, "")}, "printed"),
    ({"mb": 5000}, "MB more"), ({"changed": ["secret.txt"]}, "changed"), ({"parts": ["a"]}, "half"),
])  # fmt: skip
def test_the_judge_says_what_is_wrong(change, says):
    fine = Result(status=0, seconds=1, mb=1, said=("", ""), changed=[], parts=[])
    case = Case(CLIP, "text", "encode")
    assert not list(fuzz.judge(case, fine))
    assert says in "".join(fuzz.judge(case, fine._replace(**change)))


def test_a_hang_a_crash_and_a_flood_of_memory_are_noticed():
    assert fuzz.alone(lambda: 3)[0] == 3
    assert fuzz.alone(lambda: iter(int, 1).__next__() or sum(iter(int, 1)), seconds=1)[0] == -9
    assert fuzz.alone(lambda: os.kill(os.getpid(), 15))[0] == -15
    assert fuzz.alone(lambda: len(b"x" * 2**29) * 0)[2] > 500


# ---- films -----------------------------------------------------------------------------------


def test_a_script_that_calls_itself_a_film_does_not_read_another_file(monkeypatch):
    film("secret.mp4")
    Path("film.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(w2svd.Refused, match="decoded"):
        hunyuan.read_clip(Path("film.mp4"), SIZE)
    monkeypatch.setattr(hunyuan, "GUARD", [])  # without it, the secret is read
    assert hunyuan.read_clip(Path("film.mp4"), SIZE).shape == (1, 3, 9, 32, 48)


@pytest.mark.parametrize("name", ["concat:a.mp4", "http:a.mp4", "<video0>.mp4", "-i.mp4"])
def test_a_name_that_looks_like_a_protocol_or_a_camera_is_a_name(name):
    film("a.mp4")
    Path("a.mp4").rename(name)
    assert hunyuan.read_clip(Path(name), SIZE).shape == (1, 3, 9, 32, 48)


@pytest.mark.parametrize("size", [(48, 200), (200, 72)])
def test_a_clip_shows_the_middle_of_the_picture(size):
    frames = np.zeros((40, *size, 3), np.uint8)
    high, wide = min(size[0], size[1] * 32 // 48), min(size[1], size[0] * 48 // 32)
    top, left = (size[0] - high) // 2, (size[1] - wide) // 2
    frames[:, top : top + high, left : left + wide] = 255
    iio.imwrite("a.mp4", frames, plugin="FFMPEG", fps=12, macro_block_size=1)
    clip = hunyuan.read_clip(Path("a.mp4"), SIZE)
    assert clip.mean() > 0.95 and clip[..., 4:-4, 4:-4].min() > 0.9


def test_a_file_of_terabytes_is_skipped_unread():
    Path("a.mp4").touch()
    os.truncate("a.mp4", 2**42)
    with pytest.raises(w2svd.Refused, match="16 GiB"):
        hunyuan.describe(Path("a.mp4"), "a dog", Path(), {})


def test_a_name_that_is_no_utf_8_is_encoded_and_one_of_escapes_is_shown_escaped(good, capsys):
    shutil.copytree(good / "tiny", "tiny")
    Path("clips").mkdir()
    for name in (b"clips/\xff.mp4", b"clips/\x1b[2J.mp4"):
        film("a.mp4")
        os.rename("a.mp4", name)
    Path(os.fsdecode(b"clips/\xff.txt")).write_text("a dog")
    assert run("encode") == 1
    assert "\\x1b[2J.mp4: it has no caption" in capsys.readouterr().out
    (name,) = json.loads(Path("out/data/index.json").read_text())["clips"]
    assert name.startswith("_.mp4-") and (Path("out/data") / name).exists()


# ---- tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", sorted({*fuzz.TENSORS, *fuzz.BYTES} - {"sparse"}))
def test_a_hostile_clip_is_told_from_its_header_alone(good, how):
    (source,) = good.glob(DATA)
    Path("victim").mkdir()
    Path("victim/secret.txt").touch()
    path = Path(shutil.copy(source, "one.safetensors"))
    fuzz.MUTATORS["tensors"][how](path, fuzz.random.Random(0))
    info, tensors = hunyuan.header(path)
    fits = isinstance(info, dict) and hunyuan.fits_a_clip(tensors, info.get("shape"))
    # the rest is for the checksum, the model's widths of text, and the first forward
    assert not fits or how in ("bits flipped", "zeros", "info", "nan", "huge", "bfloat16",
                               "no numbers", "turned", "twice")  # fmt: skip


def test_a_clip_that_is_not_finite_is_named_and_left_out(good, capsys):
    for name in ("tiny", "data"):
        shutil.copytree(good / name, name)
    for path in Path("data").glob("*.safetensors"):
        tensors, info = w2svd.read_safetensors(path)
        w2svd.write_safetensors(path, tensors | {"latents": tensors["latents"] / 0}, info)
    assert run("train", "--fake-updates", "5") == 0
    error = capsys.readouterr().err
    assert error.count("left out") == 6 and "data/one" in error and "data/two" in error
    assert run("train", "--max-skipped", "1", "--out", "out/again") == 2
    assert "not finite" in capsys.readouterr().err


def test_weights_that_are_no_safetensors_are_not_unpickled(good, capsys):
    for name in ("tiny", "data"):
        shutil.copytree(good / name, name)
    (weights,) = Path("tiny/transformer").glob("*.safetensors")
    torch.save(fuzz.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert run("train") == 2
    assert "--checkpoint tiny" in capsys.readouterr().err
