"""Clips, captions and their cache: what is read, what is left out and said, what is encoded again.

Against: the tiny pipeline's own VAE and text encoders, films drawn here, a cache made before. Run
with `python -m pytest tests/test_data.py`; about 20 seconds.
"""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from helpers import run, same_bits

import w2svd
from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny
from w2svd import Config, find_clips, read_clip

SMALL = ["--lora-rank", 2, "--fake-updates", 1, "--iterations", 2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """One film and its end cut off, to copy from."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "good.mp4")
    film(folder / "short.mp4", frames=5)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", TEMPLATE)


@pytest.fixture
def clips(films):
    """clips(a="caption", ...): a folder of films with their captions."""

    def make(**captions):
        folder = Path("clips")
        folder.mkdir(exist_ok=True)
        for name, caption in captions.items():
            (folder / f"{name}.mp4").write_bytes((films / "good.mp4").read_bytes())
            (folder / f"{name}.txt").write_text(caption + "\n")
        return folder

    return make


@pytest.fixture
def encode(tiny, monkeypatch, capsys):
    """encode(*flags): what the command printed, and how many clips it encoded."""
    encoded, encode_clip = [], w2svd.encode_clip

    def spy(*args):
        tensors = encode_clip(*args)
        encoded.append(tensors)
        return tensors

    monkeypatch.setattr(w2svd, "encode_clip", spy)

    def make(*flags, code=0, data="clips", command="encode"):
        encoded.clear()
        capsys.readouterr()
        fixed = ["--model", "hunyuan", "--data", data, "--checkpoint", tiny, *SIZE]
        run(command, *fixed, *flags, code=code)
        said = capsys.readouterr()
        return said.out + said.err, len(encoded)

    return make


def cached(folder="clips/.w2svd"):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


# ---- what a folder may look like -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["txt", "jsonl", "csv", "excel", "lists"])
def test_every_convention_of_folders_is_read(how):
    folder, rows = (
        Path("clips").resolve(),
        [("a.mp4", "a dog"), ("b.mp4", 'a "red, blue" square, é')],
    )
    folder.mkdir()
    for name, text in rows:
        (folder / name).touch()
        if how == "txt":
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    if how == "jsonl":
        made = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
        (folder / "metadata.jsonl").write_text("\n".join(made))
    if how in ("csv", "excel"):
        encoding = {"csv": "utf-8", "excel": "utf-8-sig"}[how]  # Excel begins with a mark
        with open(folder / "metadata.csv", "w", newline="", encoding=encoding) as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    if how == "lists":
        (folder / "videos.txt").write_text("".join(f"{name}\n" for name, _ in rows))
        (folder / "prompt.txt").write_text("".join(f"{text}\n" for _, text in rows))
    found, beside = find_clips(folder)
    assert [path for path, _ in found] == [folder / name for name, _ in rows]
    captions = [c.read_text().strip() if isinstance(c, Path) else c for _, c in found]
    assert captions == [text for _, text in rows] and not beside


def test_films_of_every_usual_ending_are_found():
    Path("clips").mkdir()
    for name in ("a.MP4", "b.mov", "c.webm", "d.mkv", "e.avi"):
        Path("clips", name).touch()
    found, beside = find_clips(Path("clips"))
    assert [path.name for path, _ in found] == ["a.MP4", "b.mov", "c.webm", "d.mkv", "e.avi"]
    assert not beside


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": null}', ", line 1"),
        ("metadata.jsonl", '\n{"file_name": "a.mp4", "text": ["a", "b"]}', ", line 2"),
        ("metadata.jsonl", "{'file_name': 'a.mp4', 'text': 'x'}", ", line 1"),
        ("metadata.jsonl", "[1]", ", line 1"),
        ("metadata.csv", "name,description\na.mp4,a dog", ", line 2"),
        ("metadata.csv", "file_name,text\na.mp4,a red ball, which moves", ", line 2"),
        ("metadata.csv", 'file_name,text\nb.mp4,"a\nred\ndog"\na.mp4', ", line 5"),
        ("metadata.csv", b"\xff\xfef\0i\0l\0e\0\n\0a\0", ", line 2"),
    ],
)
def test_a_loose_row_is_listed_with_its_line_and_the_good_ones_are_used(
    encode, clips, name, content, line
):
    folder = clips(a="beside it", b="a woman")
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)
    (folder / "a.txt").unlink()
    said, n = encode()
    assert n == 1 and f"left out, {name}{line}: " in said and "left out, a.mp4: " in said


def test_of_two_lists_of_different_lengths_the_whole_rows_are_used(encode, clips):
    folder = clips(a="a dog", b="a dog")
    for text in folder.glob("*.txt"):
        text.unlink()
    (folder / "videos.txt").write_text("a.mp4\r\nb.mp4\r\n\r\n")
    (folder / "prompt.txt").write_text("a dog\n")
    said, n = encode()
    assert n == 1 and "left out, videos.txt, line 2: " in said
    (folder / "prompt.txt").write_text("a dog\na woman")  # no line feed at its end
    said, n = encode()
    assert n == 1 and "left out" not in said


@pytest.mark.parametrize("name", ["metadata.csv", "videos.txt"])
def test_a_list_that_cannot_be_read_is_named(encode, clips, name):
    """A cell of a million letters; films whose captions' list is missing."""
    folder = clips(a="a dog")
    (folder / name).write_text("file_name,text\na.mp4," + 1_000_000 * "a")
    said, _ = encode(code=2)
    assert f"{name} cannot be read" in said and "Traceback" not in said


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables_are_read_as_spreadsheets_write_them(separator, end, mark):
    Path("clips").mkdir()
    names = ["a.mp4", "b.mp4", "c.mp4"]
    texts = ["a dog, red; blue", 'two\nlines, a "quote"', "\u2028 \x85 \v é"]
    rows = [("id", "file_name", "text", "seconds")]
    rows += [(str(i), name, text, "3") for i, (name, text) in enumerate(zip(names, texts))]
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=separator, lineterminator=end).writerows(rows)
    Path("clips/metadata.csv").write_bytes(mark + table.getvalue().encode())
    for name in names:
        Path("clips", name).touch()
    found, beside = find_clips(Path("clips"))
    assert [path.name for path, _ in found] == names and not beside
    assert [text for _, text in found] == [text.strip() for text in texts]


def test_subfolders_and_links_are_followed_and_a_hub_s_cache_too(encode, clips, films):
    folder = clips(a="a dog")
    (folder / "scene/2").mkdir(parents=True)
    (folder / "scene/2/b.MP4").write_bytes((films / "good.mp4").read_bytes())
    (folder / "scene/2/b.txt").write_text("a woman")
    hub = Path("hub/blobs")
    hub.mkdir(parents=True)
    (hub / "0a1b").write_bytes((films / "good.mp4").read_bytes())
    (hub / "2c3d").write_text("a red square")
    (folder / "snapshots").mkdir()
    (folder / "snapshots/c.mp4").symlink_to(Path("../../hub/blobs/0a1b"))
    (folder / "snapshots/c.txt").symlink_to(Path("../../hub/blobs/2c3d"))
    (folder / "round").symlink_to(Path("."))  # a loop
    Path("elsewhere").mkdir()
    (Path("elsewhere") / "d.mp4").write_bytes((films / "good.mp4").read_bytes())
    (Path("elsewhere") / "d.txt").write_text("a dog by a link")
    (folder / "linked").symlink_to(Path("../elsewhere"))
    (folder / ".thumbs").mkdir()
    for name in "12":
        (folder / ".thumbs" / name).write_text("listed with its folder")
    (folder / ".e.mp4").write_bytes((films / "good.mp4").read_bytes())
    (folder / ".e.txt").write_text("hidden")
    said, n = encode()
    assert n == 4 and "4 clips" in said
    left_out = {line.partition("left out, ")[2].split(":")[0] for line in said.splitlines()} - {""}
    assert left_out == {"round", ".thumbs", ".e.mp4", ".e.txt"}
    sources = {w2svd.read_safetensors(f)[1]["source"] for f in Path("clips/.w2svd").iterdir()}
    assert sources == {"a.mp4", "scene/2/b.MP4", "snapshots/c.mp4", "linked/d.mp4"}


def test_a_folder_in_the_folder_has_a_list_of_its_own(encode, clips, films):
    folder = clips(a="a dog")
    (folder / "more").mkdir()
    (folder / "more/b.mp4").write_bytes((films / "good.mp4").read_bytes())
    (folder / "more/metadata.csv").write_text("file_name,text\nb.mp4,a woman\n")
    said, n = encode()
    assert n == 2 and "left out" not in said


def test_prompts_that_are_not_there_are_refused_before_any_clip_is_encoded(encode, clips):
    clips(a="a dog")
    said, n = encode(*SMALL, "--sample-prompts", "gone.txt", command="train", code=2)
    assert n == 0 and "gone.txt' is no folder of clips" in said and "a .txt" in said


def test_names_of_captions_that_nobody_reads_are_listed(encode, clips):
    folder = clips(a="a dog", b="a dog", good="a dog")
    (folder / "a.txt").rename(folder / "a.caption")
    (folder / "b.txt").rename(folder / "b.mp4.txt")
    (folder / "c.png").touch()
    said, n = encode()
    assert n == 1
    for name in ("a", "b"):
        assert f"left out, {name}.mp4: it has no caption, {name}.txt" in said
    for name in ("a.caption", "b.mp4.txt", "c.png"):
        assert f"left out, {name}: no clip, nor a caption" in said


def test_only_line_feeds_end_a_caption_and_other_encodings_are_named(encode):
    texts = ["a\u2028red dog", "a\x85woman", "the\vsquare"]
    Path("captions.txt").write_bytes("\r\n".join(texts).encode() + b"\r\nthe dog\x92s\r\n")
    said, n = encode(data="captions.txt")
    assert n == 3 and "is not UTF-8" in said


def test_long_captions_are_counted_and_said_once(encode):
    Path("captions.txt").write_text("a dog\n" + "red " * 300 + "\n" + "blue " * 300 + "\n")
    said, n = encode(data="captions.txt")
    assert n == 3 and said.count("256 tokens") == 1 and "2 captions are longer" in said
    assert "CLIP" not in said


def test_an_empty_caption_is_one(encode, clips, monkeypatch):
    template = {"template": "red {}", "crop_start": 0}
    monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", template)
    folder = clips(a=" ", b="a dog")
    said, n = encode()
    assert n == 2 and "left out" not in said
    (folder / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": ""}')
    assert encode()[1] == 1


def test_what_was_done_to_clips_is_said(encode):
    Path("clips").mkdir()
    for name, size, fps in (
        ("tall", (80, 48), 24),
        ("taller", (96, 32), 24),
        ("slow", (80, 48), 8),
    ):
        film(f"clips/{name}.mp4", size=size, fps=fps, frames=24)
        Path(f"clips/{name}.txt").write_text("a dog")
    said, n = encode()
    assert n == 3 and "slow.mp4: frames are repeated, 8 fps become 12" in said
    assert "tall.mp4: frames" not in said
    # 3 clips of 9 frames at 12 fps; 24 frames at 24, 24 and 8 fps
    assert "used: 2.2 of 5.0 s" in said
    kept = (2 * 48 / 80 + 32 / 96) / 3 * 32 / 48
    assert f"{kept:.0%} of the picture" in said and "--height 48 --width 32" in said
    Path("square").mkdir()
    film("square/one.mp4", size=(64, 96), fps=12)
    Path("square/one.txt").write_text("a dog")
    said, _ = encode(data="square")
    assert "100% of the picture" in said and "--height" not in said
    film("square/stills.mp4", fps=2, frames=30)
    Path("square/stills.txt").write_text("a dog")
    said, n = encode(data="square")
    assert n == 0 and "left out, stills.mp4: 2 fps" in said


def test_captions_alone_train_without_clips(encode):
    Path("captions.txt").write_text("a dog\n\na woman talks\n")
    said, n = encode(*SMALL, "--out", "r", data="captions.txt", command="train")
    assert n == 2 and "2 clips" in said
    config = w2svd.read_run("r")
    assert config.generator_input == "rollout" and config.fake_samples == "final"
    for file in Path(".w2svd").glob("*.safetensors"):
        assert w2svd.read_safetensors(file)[0].keys() == {"prompt_embeds", "pooled"}
    _, n = encode(*SMALL, "--out", "r2", "--height", 48, data="captions.txt", command="train")
    assert n == 0  # a caption's text has no size
    paired = ["--generator-input", "paired", "--out", "r3"]
    said, _ = encode(*paired, data="captions.txt", command="train", code=2)
    assert "--generator-input rollout" in said and not Path("r3").exists()


# ---- each clip is an island ----------------------------------------------------------------------


def test_each_unusable_clip_is_listed_with_its_reason_and_the_others_go_on(
    encode, clips, films, monkeypatch
):
    template = {"template": "red {}", "crop_start": 0}  # makes something of an empty caption
    monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", template)
    names = "short torn text playlist plain latin silent good".split()
    folder = clips(**dict.fromkeys(names, "a red square"))
    good, mp4 = (folder / "good.mp4").read_bytes(), {name: folder / f"{name}.mp4" for name in names}
    mp4["short"].write_bytes((films / "short.mp4").read_bytes())
    mp4["torn"].write_bytes(good[: len(good) // 3])
    mp4["text"].write_text("a red square")
    mp4["playlist"].write_text("ffconcat version 1.0\nfile good.mp4\n")  # ffmpeg would follow it
    mp4["plain"].write_text("#EXTM3U\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n")
    (folder / "latin.txt").write_bytes("ein Müller".encode("latin-1"))
    (folder / "silent.txt").unlink()
    (folder / "empty.mp4").write_bytes(good)
    (folder / "empty.txt").write_text(" \n")
    (folder / "notes.md").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more/b.md").touch()
    said, n = encode()
    assert n == 2 and "2 clips" in said  # an empty caption is one
    reasons = {}
    for line in said.splitlines():
        if "left out" in line:
            name, _, reason = line.partition("left out, ")[2].partition(": ")
            reasons[name] = reason
    bad = [f"{name}.mp4" for name in names[:-1]]
    assert reasons.keys() == {*bad, "notes.md", "more/b.md"} and all(reasons.values())
    assert "2 of 9 frames" in reasons["short.mp4"]
    assert "silent.txt" in reasons["silent.mp4"] and "UTF-8" in reasons["latin.mp4"]
    assert len(cached()) == 2
    assert encode(*SMALL, "--out", "r", command="train")[1] == 0
    assert len(w2svd.read_safetensors("r/checkpoint-000002.safetensors")[1]["clips"]) == 2


def test_what_lists_name_but_cannot_be_used_is_listed(encode, clips):
    folder = clips(a="a dog", b="a dog")
    rows = [("a.mp4", "a dog"), ("a.mp4", "a dog"), ("gone.mp4", "a dog"), ("b.mp4", None)]
    made = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(made))
    said, n = encode()
    assert n == 2  # the last one by its .txt
    for name in ("gone.mp4: ", "metadata.jsonl, line 4: "):
        assert f"left out, {name}" in said
    assert "2 clips, 2 encoded now" in said and "left out, a.mp4" not in said  # a row twice is one


def test_lists_may_name_clips_by_their_whole_path(encode, clips):
    folder = clips(a="a dog").resolve()
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": str(folder / "a.mp4"), "text": "a dog"})
    )
    said, n = encode()
    assert n == 1 and "left out" not in said
    (folder / "metadata.jsonl").unlink()
    assert encode()[1] == 0  # the same clip


def test_no_usable_clip_ends_with_1_and_a_missing_folder_with_2(encode, clips):
    folder = clips(a="a dog")
    (folder / "a.mp4").write_text("no film")
    for command in ("encode", "train"):
        said, _ = encode(code=1, command=command)
        assert "left out, a.mp4" in said and "can be used" in said
    Path("nothing").mkdir()
    assert encode(code=1, data="nothing")[1] == 0
    Path("empty.txt").touch()
    assert encode(code=1, data="empty.txt")[1] == 0
    for command in ("encode", "train"):
        assert "nowhere" in encode(code=2, data="nowhere", command=command)[0]
    assert "--data" in encode(code=2, data="")[0]
    assert not Path("runs").exists()


def test_a_clip_whose_latents_are_not_finite_is_left_out(encode, clips, monkeypatch):
    clips(a="a dog", b="a dog")

    def broken(path, config):
        return read_clip(path, config) * (float("nan") if path.stem == "a" else 1)

    monkeypatch.setattr(w2svd, "read_clip", broken)
    said, n = encode()
    assert n == 1 and "left out, a.mp4" in said and "finite" in said


# ---- what is encoded -----------------------------------------------------------------------------


def test_a_clip_is_the_vae_s_scaled_mode_and_its_trimmed_text(encode, clips, tiny):
    caption = "a red square moves to the left"
    clips(one=caption)
    encode()
    (path,) = Path("clips/.w2svd").glob("one-*.safetensors")
    clip, info = w2svd.read_safetensors(path)
    assert clip["latents"].shape == (4, 3, 4, 6) and clip["latents"].dtype == torch.float32
    assert clip["prompt_embeds"].shape == (7, 16) and clip["pooled"].shape == (8,)
    assert info == {"source": "one.mp4", "caption": caption}
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    config = Config(height=32, width=48, frames=9, fps=12.0)
    video = read_clip(Path("clips/one.mp4"), config)
    assert video.shape == (1, 3, 9, 32, 48) and -1 <= video.min() and video.max() <= 1
    with torch.no_grad():
        mode = pipe.vae.encode(video).latent_dist.mode()[0]
    torch.testing.assert_close(clip["latents"], mode * 0.476986)
    embeds, pooled, mask = pipe.encode_prompt(caption, prompt_template=TEMPLATE)
    assert int(mask.sum()) == 7 and torch.equal(embeds[0, :7], clip["prompt_embeds"])
    assert torch.equal(pooled[0], clip["pooled"])


def test_the_released_template_is_used_where_none_is_set(monkeypatch):
    seen = []

    class Pipe:
        def encode_prompt(self, prompt, **how):
            seen.append(how)
            return torch.ones(1, 3, 2), torch.ones(1, 2), torch.tensor([[1, 1, 0]])

    for template in (None, TEMPLATE):
        monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", template)
        assert w2svd.encode_text(Pipe(), "a dog")["prompt_embeds"].shape == (1, 2, 2)
    assert seen == [{}, {"prompt_template": TEMPLATE}]


def test_resampling_keeps_the_motion_s_speed(films):
    film("fast.mp4", frames=40, fps=40)
    slow = read_clip(Path("fast.mp4"), Config(height=48, width=80, frames=9, fps=10.0))
    edges = [(frame[0, 20] > 0).nonzero().min().item() for frame in slow[0].transpose(0, 1)]
    assert all(abs(edge - 4 * i) <= 2 for i, edge in enumerate(edges))


def test_the_picture_is_cropped_at_its_centre_and_not_stretched():
    film("wide.mp4", size=(48, 160), frames=12)  # the square begins at the left edge
    clip = read_clip(Path("wide.mp4"), Config(height=48, width=48, frames=9, fps=30.0))
    assert clip.shape[-2:] == (48, 48) and clip.max() < 0  # black: 56 columns of each side are cut
    film("tall.mp4", size=(96, 32), frames=12)
    clip = read_clip(Path("tall.mp4"), Config(height=32, width=32, frames=9, fps=30.0))
    red = clip[0, 0, 0] > 0
    assert not red[0].any() or not red[-1].any()


# ---- the cache -----------------------------------------------------------------------------------


def test_a_second_encode_encodes_nothing_and_loads_no_encoder(encode, clips, monkeypatch):
    clips(a="a dog", b="a woman talks")
    assert encode()[1] == 2
    before = cached()

    load = w2svd.load_pipeline

    def without_encoders(checkpoint, without, **how):
        assert {*w2svd.TEXT, "vae"} <= {*without}, "the encoders were loaded"
        return load(checkpoint, without, **how)

    monkeypatch.setattr(w2svd, "load_pipeline", without_encoders)
    assert encode()[1] == 0 and cached() == before
    monkeypatch.setattr(w2svd.HunyuanTask, "on_log", lambda *args: None)  # it loads the VAE
    encode(*SMALL, "--out", "r", command="train")


def test_what_a_clip_depends_on_makes_a_new_file_and_leaves_the_others(encode, clips, monkeypatch):
    folder = clips(a="a dog", b="a woman talks")
    encode()
    before = cached()

    def made_again():
        nonlocal before
        n, now = encode()[1], cached()
        assert n == len(now) - len(before) and before.items() <= now.items()
        before = now
        return n

    (folder / "a.txt").write_text("a red dog\n")
    assert made_again() == 1
    (folder / "a.txt").write_text("  a red dog \n\n")  # the same caption
    assert made_again() == 0
    stat = (folder / "a.mp4").stat()
    os.utime(folder / "a.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert made_again() == 1
    with open(folder / "a.mp4", "ab") as file:
        file.write(b"\0")
    os.utime(folder / "a.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert made_again() == 1
    for flags in (["--height", 48], ["--width", 64], ["--frames", 5], ["--fps", 15]):
        assert encode(*flags)[1] == 2 and encode(*flags)[1] == 0
    before = cached()
    assert made_again() == 0
    monkeypatch.setattr(w2svd, "READING", w2svd.READING + 1)
    assert made_again() == 2
    template = {"template": "a film of {}", "crop_start": 0}
    monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", template)
    assert made_again() == 2


def test_another_checkpoint_is_encoded_again(encode, clips):
    clips(a="a dog")
    encode()
    save_tiny("other", scaling=0.5)
    assert encode("--checkpoint", "other")[1] == 1 and len(cached()) == 2


def test_two_clips_of_one_name_in_two_folders_keep_a_file_each(encode, clips):
    folder = clips(a="a dog")
    (folder / "more").mkdir()
    (folder / "more/a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    rows = [{"file_name": name, "text": "a dog"} for name in ("a.mp4", "more/a.mp4")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stat = (folder / "a.mp4").stat()
    os.utime(folder / "more/a.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert encode()[1] == 2 and len(cached()) == 2


def test_the_cache_may_lie_elsewhere_and_a_moved_folder_keeps_it(encode, clips):
    clips(a="a dog")
    assert encode("--cache", "kept")[1] == 1
    assert len(cached("kept")) == 1 and not Path("clips/.w2svd").exists()
    Path("clips").rename("moved")
    assert encode("--cache", "kept", data="moved")[1] == 0
    assert encode(data="moved")[1] == 1 and len(cached("moved/.w2svd")) == 1
    Path("moved").rename("again")
    assert encode(data="again")[1] == 0


def test_a_damaged_file_of_the_cache_ends_in_a_sentence_that_names_it(encode, clips):
    clips(a="a dog")
    encode()
    (file,) = Path("clips/.w2svd").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    said, _ = encode(*SMALL, "--out", "r", command="train", code=2)
    assert file.name in said


def test_encode_stopped_half_way_goes_on_with_what_is_missing(encode, clips, monkeypatch):
    clips(a="a dog", b="a dog", c="a dog")
    with monkeypatch.context() as patch:
        encode_clip = w2svd.encode_clip

        def stop(pipe, video, caption, form):
            if len(cached()) == 1:
                raise KeyboardInterrupt
            return encode_clip(pipe, video, caption, form)

        patch.setattr(w2svd, "encode_clip", stop)
        encode(code=130)
    assert len(cached()) == 1
    assert encode()[1] == 2


def test_encode_and_then_train_equals_train_alone_bit_for_bit(encode, clips):
    clips(a="a dog", b="a woman talks")
    assert encode(*SMALL, "--out", "alone", "--cache", "one", command="train")[1] == 2
    assert encode("--cache", "two")[1] == 2
    assert encode(*SMALL, "--out", "then", "--cache", "two", command="train")[1] == 0
    assert cached("one") == cached("two")
    for name in ("checkpoint-000002.safetensors", "generator.safetensors"):
        assert same_bits(Path("alone", name), Path("then", name))


def test_data_that_changed_are_said_when_a_run_goes_on(encode, clips, capsys):
    folder = clips(a="a dog", b="a woman talks")
    encode(*SMALL, "--out", "r", command="train")
    (folder / "a.mp4").unlink()
    (folder / "a.txt").unlink()
    clips(c="a dog", d="a dog", e="a dog")
    run(*"train --resume --out r --iterations 3".split())
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "the data have changed" in line]
    assert "1 clips gone" in line and "3 new" in line
    run(*"train --resume --out r --iterations 4".split())
    assert "the data have changed" not in capsys.readouterr().out


def test_a_full_disk_is_not_the_clip_s_fault(encode, clips, monkeypatch):
    clips(a="a dog", b="a dog")

    def full(*args, **how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "write_safetensors", full)
        said, n = encode(code=2)
    assert "No space left" in said and "left out" not in said and n == 1
    assert encode()[1] == 2


def test_a_film_s_name_is_not_taken_for_what_ffmpeg_says(encode):
    Path("clips").mkdir()
    film("clips/alpha_mode rotation of 90.mp4")
    Path("clips/alpha_mode rotation of 90.txt").write_text("a dog")
    said, n = encode()
    assert n == 1 and "left out" not in said
    assert w2svd.look(Path("clips/alpha_mode rotation of 90.mp4")).aspect > 1
