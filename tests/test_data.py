"""Clips, captions and their cache: what is read, what is left out and said, what is encoded again.

Against: films drawn here, a cache made before. Run with `python -m pytest tests/test_data.py`; 15
seconds.
"""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import contents, raising, run, tensors, watch

import w2svd
from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny
from w2svd import Config, HunyuanVideo, find_clips, latents_file, read_caption, read_clip

SMALL = "--lora-rank 2 --fake-updates 1 --iterations 2".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline and a film."""
    save_tiny(folder := tmp_path_factory.mktemp("made") / "tiny")
    film(folder.with_name("good.mp4"))
    return folder


@pytest.fixture(autouse=True)
def small(elsewhere, monkeypatch):
    monkeypatch.setattr(HunyuanVideo, "prompt_template", TEMPLATE)
    monkeypatch.setattr(w2svd.VideoTask, "on_log", lambda *_: None)
    Path("clips").mkdir()


@pytest.fixture
def put(made):
    """put("a", "a dog"): clips/a.mp4 with its caption."""

    def make(name, caption):
        path = Path("clips", f"{name}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.with_name("good.mp4"), path)
        path.with_suffix(".txt").write_text(caption + "\n")

    return make


@pytest.fixture
def encode(made, monkeypatch, capsys):
    """encode(*flags): what the command said, and how many clips it encoded."""
    encoded = watch(monkeypatch, w2svd, "encode_clip")

    def make(*flags, code=0, data="clips", command="encode"):
        encoded.clear()
        fixed = ["--model", "hunyuan", "--data", data, "--checkpoint", made, *SIZE]
        run(command, *fixed, *flags, code=code)
        said = capsys.readouterr()
        return said.out + said.err, len(encoded)

    return make


def left_out(said):
    """{name: reason} of what a command listed."""
    rows = [line.partition("left out, ")[2] for line in said.splitlines()]
    return {row.split(": ")[0]: row.partition(": ")[2] for row in rows if row}


@pytest.mark.parametrize("how", ["txt", "jsonl", ",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_convention_of_folders_is_read_with_its_whole_captions(how, end):
    rows = {"a.mp4": 'a "dog", red; blue', "b.MP4": "\u2028 \x85 \v é"}
    for name, text in rows.items():
        Path("clips", name).touch()
        if how == "txt":
            Path("clips", name).with_suffix(".txt").write_bytes((text + end).encode())
    lines = [json.dumps({"file_name": name, "text": text}) + end for name, text in rows.items()]
    if how == "jsonl":
        Path("clips/metadata.jsonl").write_bytes(end.join(lines).encode())
    if len(how) == 1:  # a table, as a spreadsheet writes it, with its mark
        table = io.StringIO(newline="")
        writer = csv.writer(table, delimiter=how, lineterminator=end)
        writer.writerows([("id", "file_name", "text"), *((1, *row) for row in rows.items())])
        Path("clips/metadata.csv").write_bytes(table.getvalue().encode("utf-8-sig"))
    found = find_clips("clips")
    assert [clip.name for clip in found] == list(rows) and not any(c.left_out for c in found)
    assert [read_caption(c.caption) for c in found] == [text.strip() for text in rows.values()]


def test_tables_of_spreadsheets_and_names_of_other_systems_are_understood():
    """UTF-16, spaces behind commas, headers of other tools, accents as two signs or as one."""
    for name in ("a.mp4", "e\u0301.mp4"):
        Path("clips", name).touch()
    Path("clips/metadata.csv").write_bytes(
        'video, caption\na.mp4, "a dog, runs"\n'.encode("utf-16")
    )
    Path("clips/\xe9.txt").write_text("a woman")
    found = {clip.name: clip for clip in find_clips("clips")}
    assert not any(clip.left_out for clip in found.values())
    texts = [read_caption(clip.caption) for clip in found.values()]
    assert sorted(texts) == ["a dog, runs", "a woman"] and len(found) == 2


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": ["a", "b"]}'),
        ("metadata.jsonl", "{'file_name': 'a.mp4', 'text': 'x'}"),
        ("metadata.csv", "name,description\na.mp4,a dog"),
        ("metadata.csv", "file_name,text\na.mp4,a red ball, which moves"),
    ],
)
def test_a_loose_row_is_listed_and_the_good_ones_are_used(put, name, content):
    put("b", "a woman")
    Path("clips", name).write_text(content)
    good, loose = sorted(find_clips("clips"), key=lambda clip: clip.name)
    assert good.name == "b.mp4" and not good.left_out
    assert loose.name.startswith(name) and loose.left_out


def test_subfolders_and_links_are_followed_once_and_the_rest_is_listed(put):
    put("a", "a dog")
    put("scene/2/b", "a woman")
    for folder in ("hub", "clips/.thumbs"):
        Path(folder).mkdir()
    for name in ("hub/0a1b", "hub/d.mp4", "hub/d.txt", "clips/.e.mp4", "clips/.thumbs/f.mp4"):
        Path(name).touch()
    Path("clips/c.mp4").symlink_to(Path("../hub/0a1b"))
    Path("clips/round").symlink_to(Path("."))
    Path("clips/linked").symlink_to(Path("../hub"))
    clips = find_clips("clips")
    assert {c.name for c in clips if c.film} == {"a.mp4", "scene/2/b.mp4", "c.mp4", "linked/d.mp4"}
    assert {c.name for c in clips if c.left_out} == {".e.mp4", ".thumbs", "linked/0a1b"}


def test_each_unusable_clip_is_an_island_and_nothing_is_left_out_without_a_word(
    put, encode, monkeypatch
):
    for name in "good torn playlist latin silent nan still short".split():
        put(name, "a red square")
    whole = Path("clips/good.mp4").read_bytes()
    Path("clips/torn.mp4").write_bytes(whole[: len(whole) // 3])
    Path("clips/playlist.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    Path("clips/latin.txt").write_bytes(b"the dog\x92s")
    Path("clips/silent.txt").rename("clips/silent.mp4.txt")
    film("clips/still.mp4", fps=1)
    film("clips/short.mp4", frames=5)
    rows = [("good.mp4", "the red one"), ("good.mp4", "the red one"), ("gone.mp4", "a dog")]
    made = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    Path("clips/metadata.jsonl").write_text("\n".join(made))
    Path("clips/a.png").touch()

    def broken(path, config):
        return read_clip(path, config) * (float("nan") if path.stem == "nan" else 1)

    monkeypatch.setattr(w2svd, "read_clip", broken)
    said, n = encode()
    assert n == 1 and "1 clips, 1 encoded now" in said and "1 clips: listed twice" in said
    reasons = left_out(said)
    for name, word in {
        "torn.mp4": "damaged",
        "playlist.mp4": "damaged",  # ffmpeg would follow it
        "latin.mp4": "UTF-8",
        "silent.mp4": "silent.txt",
        "short.mp4": "2 of 9 frames",
        "still.mp4": "1 fps",
        "nan.mp4": "finite",
        "gone.mp4": "",
        "silent.mp4.txt": "caption",
        "a.png": "no clip",
    }.items():
        assert word in reasons.pop(name), name
    assert not reasons


def test_no_usable_clip_ends_with_1_and_a_missing_folder_or_list_with_2(encode):
    Path("clips/a.mp4").write_text("no film")
    Path("clips/a.txt").write_text("a dog")
    Path("empty.txt").touch()
    for data in ("clips", "empty.txt"):
        assert "can be used" in encode(code=1, data=data, command="train")[0]
    for data in ("nowhere", ""):
        assert "folder of clips" in encode(code=2, data=data)[0]
    Path("clips/metadata.csv").write_text("file_name,text\na.mp4," + 1_000_000 * "a")
    assert "metadata.csv" in encode(code=2)[0] and not Path("runs").exists()


def test_captions_alone_train_from_rollouts_and_long_ones_are_counted(encode):
    texts = ["a\u2028red dog", "", "red " * 300, "blue " * 300]
    Path("captions.txt").write_text("\r\n".join(texts))
    said, n = encode(*SMALL, "--out", "r", data="captions.txt", command="train")
    assert n == 3 and said.count("256 tokens") == 1
    config = w2svd.read_run("r")
    assert config.generator_input == "rollout" and config.fake_samples == "final"
    for file in Path(".w2svd").glob("*.safetensors"):
        assert tensors(file).keys() == {"prompt_embeds", "pooled"}
    assert encode("--height", 48, data="captions.txt")[1] == 0  # a text has no size


def test_a_plan_says_what_it_would_use_of_a_folder_and_writes_nothing(put, encode):
    put("a", "a dog")
    put("b", " ")
    put("short", "a dog")
    film("clips/short.mp4", frames=4)
    said, n = encode("--dry-run", command="train")
    assert n == 0 and "2 clips" in said and left_out(said).keys() == {"short.mp4"}
    assert "1 clips: the caption is empty" in said and not Path("clips/.w2svd").exists()


def test_what_a_killed_encode_left_is_deleted_and_another_machine_s_work_is_not(put, encode):
    put("a", "a dog")
    Path("clips/.w2svd").mkdir()
    others = f".part-1-{'0' * 8}-a.safetensors"
    for name in (".part-9999999-a.safetensors", f".part-9999999-{w2svd.HOST}-a", others):
        Path("clips/.w2svd", name).touch()
    encode()
    assert [p.name for p in Path("clips/.w2svd").glob(".part*")] == [others]


def test_what_is_lost_of_a_film_is_said_with_the_size_that_keeps_it(encode):
    film("clips/high.mp4", size=(80, 48), frames=24)
    Path("clips/high.txt").write_text("a dog")
    said, n = encode()
    assert n == 1 and f"{32 / 48 / (80 / 48):.0%}" in said  # by height
    assert "--height 48 --width 32" in said  # of the same area


def test_one_film_is_one_file_named_after_all_that_it_depends_on(put, made, monkeypatch):
    put("a", "a dog")
    put("more/a", "a dog")  # of the same name and content

    def name(film="a.mp4", **how):
        config = Config(**{"checkpoint": str(made), "data": "clips", **how})
        (clip,) = [clip for clip in find_clips(config.data) if clip.name == film]
        model = HunyuanVideo.outline(config)
        return latents_file(config, model, clip, read_caption(clip.caption)).name

    path, one, seen = Path("clips/a.mp4"), name(), {name(), name("more/a.mp4")}
    before = path.stat().st_mtime_ns
    shutil.copytree("clips", "copied", copy_function=shutil.copyfile)  # without its times
    Path("copied/a.txt").write_text("  a dog \n\n")
    assert name(data="copied", seed=3, out="r", lora_rank=3, cache="c") == one
    seen |= {name(**{size: 80}) for size in ("height", "width", "frames", "fps")}
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before, before))
    seen.add(name())  # replaced by one of the same size and time
    Path("clips/a.txt").write_text("a red dog")
    seen.add(name())
    monkeypatch.setattr(HunyuanVideo, "prompt_template", None)
    seen.add(name())
    monkeypatch.setattr(w2svd, "READING", w2svd.READING + 1)
    seen.add(name())
    assert len(seen) == 2 + 4 + 4


def test_encoding_goes_on_with_what_is_missing_and_then_loads_no_encoder(put, encode, monkeypatch):
    for name in "abc":
        put(name, "a dog")
    with monkeypatch.context() as patch:
        watch(patch, w2svd, "encode_clip", 2, raising(KeyboardInterrupt()))
        encode("--cache", "kept", code=130)
    assert encode("--cache", "kept")[1] == 2 and not Path("clips/.w2svd").exists()
    before = contents("kept")
    monkeypatch.setattr(w2svd, "ENCODERS", None)  # cannot be loaded
    Path("clips").rename("moved")
    assert encode("--cache", "kept", data="moved")[1] == 0 and contents("kept") == before
    encode(*SMALL, "--cache", "kept", "--out", "r", data="moved", command="train")


def test_a_full_disk_and_a_damaged_file_are_not_the_clip_s_fault(put, encode, monkeypatch):
    put("a", "a dog")
    put("b", "a dog")
    full = raising(OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        watch(patch, w2svd, "write_safetensors", 1, full)
        said, n = encode(code=2)
    assert "No space left" in said and not left_out(said) and n == 1
    assert encode()[1] == 2
    file = next(Path("clips/.w2svd").glob("a-*"))
    file.write_bytes(file.read_bytes()[:-4])
    assert file.name in encode(*SMALL, "--out", "r", command="train", code=2)[0]


def test_data_that_changed_are_said_when_a_run_goes_on(put, encode, capsys):
    put("a", "a dog")
    encode(*SMALL, "--out", "r", command="train")
    put("b", "a dog")
    for said in (True, False):
        run("train", "--resume", "--out", "r", "--iterations", 3)
        assert ("1 clips then, 2 now" in capsys.readouterr().out) == said
