"""A film becomes the frames that a player shows: colours, shape, fields, rate, damage.

Against: the colours and shapes that ffmpeg was given when the film was made here. Run with
`python -m pytest tests/test_clips.py`; 10 seconds.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from toy.tiny_hunyuan import film
from w2svd import Config, look, read_clip, write_film

COLOURS = torch.tensor([[200, 40, 40], [40, 180, 60], [50, 60, 200], [210, 200, 60]])
X264 = "-c:v libx264 -crf 4".split()


def ffmpeg(*flags, **how):
    command = [get_ffmpeg_exe(), *"-y -v error".split(), *map(str, flags)]
    subprocess.run(command, check=True, **how)


def make(path, frames, *flags, fps=24):
    """A film out of frames (T, H, W, 3 or 4), 0 to 255, by ffmpeg with these flags."""
    kind, size = {3: "rgb24", 4: "rgba"}[frames.shape[-1]], f"{frames.shape[2]}x{frames.shape[1]}"
    given = f"-f rawvideo -pix_fmt {kind} -s {size} -r {fps} -i -".split()
    ffmpeg(*given, *flags, path, input=frames.to(torch.uint8).numpy().tobytes())
    return Path(path)


def read(path, height=64, width=96, frames=5, fps=24.0):
    """The frames (T, H, W, 3), 0 to 255."""
    config = Config(height=height, width=width, frames=frames, fps=fps)
    return ((read_clip(Path(path), config)[0] + 1) * 127.5).permute(1, 2, 3, 0)


def quarters(height=64, width=96, frames=12, colours=COLOURS):
    """A colour in each quarter of the picture."""
    picture = colours.reshape(2, 2, 3).repeat_interleave(height // 2, 0)
    return picture.repeat_interleave(width // 2, 1).expand(frames, -1, -1, -1)


def colours(clip):
    """The colours at the middle of each quarter (4, 3), of the last frame."""
    h, w = clip.shape[1:3]
    return torch.stack([clip[-1, y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)])


def moving(frames=24):
    """A white bar that moves by 3 columns a frame."""
    picture = torch.zeros(frames, 64, 96, 3)
    for t, frame in enumerate(picture):
        frame[:, 3 * t : 3 * t + 12] = 255
    return picture


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
    flags = ["-vf", filters + ",format=yuv444p", *X264]
    film = make("film.mp4", quarters(height, width, frames=6), *flags)
    assert (colours(read(film)) - COLOURS).abs().max() <= 4


@pytest.mark.parametrize("size", [(480, 832), (720, 1280)])
def test_a_film_of_ours_is_read_with_the_colours_that_were_drawn(size):
    write_film(Path("film.mp4"), quarters(*size, frames=5).numpy() / 255, fps=24)
    assert (colours(read("film.mp4")) - COLOURS).abs().max() <= 3


RGB = "format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
GREYS = torch.linspace(100, 255, 4)[:, None].expand(4, 3)


@pytest.mark.parametrize(
    "curve, nits", [("smpte2084", 203), ("arib-std-b67", 203), ("smpte2084", 800)]
)
def test_hdr_is_tone_mapped_and_light_above_white_is_compressed(curve, nits):
    """The colours as a phone would film them, with so many nits for what was put in as white."""
    up = f"zscale=t=linear:npl={nits},format=gbrpf32le,zscale=p=bt2020,zscale=t={curve}:npl={nits}"
    flags = ["-vf", f"{RGB},{up}:m=bt2020nc:r=tv,format=yuv420p10le", "-c:v", "ffv1"]
    given = COLOURS if nits == 203 else GREYS
    found = colours(read(make("film.mkv", quarters(colours=given), *flags)))
    if nits == 203:  # white, as ITU-R BT.2408 has it
        assert (found - COLOURS).abs().max() <= 12
    else:  # 140 to 800 nits stay apart
        assert (found[:, 0].diff() > 3).all() and found.max() <= 255


def test_what_is_transparent_is_black():
    picture = torch.full((12, 64, 96, 4), 255.0)
    picture[:, :, 48:, 3] = 0
    frame = read(make("film.mov", picture, *"-c:v png -pix_fmt rgba".split()))[-1]
    assert frame[32, 24].min() >= 251 and frame[32, 72].max() <= 4


@pytest.mark.parametrize("sar", ["32/27", "8/9", "1/1"])
def test_a_disc_of_oblong_pixels_is_round(sar):
    wide, high = map(int, sar.split("/"))
    y, x = torch.meshgrid(torch.arange(480) - 239.5, torch.arange(720) - 359.5, indexing="ij")
    inside = (y**2 + (x * wide / high) ** 2 < 140**2)[None, :, :, None].expand(6, -1, -1, 3)
    film = make("film.mp4", 255.0 * inside, "-vf", f"setsar={sar}", *X264)
    light = read(film, height=192, width=288)[-1].mean(-1)
    spread = []
    for axis in (0, 1):
        line, place = light.sum(axis), torch.arange(light.shape[1 - axis]).float()
        mean = (line * place).sum() / line.sum()
        spread.append(((line * (place - mean) ** 2).sum() / line.sum()).sqrt())
    assert float(spread[0] / spread[1]) == pytest.approx(1, abs=0.02)
    assert look(film)["aspect"] == pytest.approx(1.5 * wide / high, rel=0.01)


def test_a_turned_film_is_upright():
    picture = torch.zeros(12, 64, 96, 3)
    picture[:, :, :48] = 255  # its left half is white; turned by a quarter, the upper or lower one
    flat = make("flat.mp4", picture, *X264)
    ffmpeg("-display_rotation", 90, "-i", flat, "-c", "copy", "turned rotation of 0.mp4")
    assert look(Path("turned rotation of 0.mp4"))["aspect"] == pytest.approx(2 / 3)
    frame = read("turned rotation of 0.mp4", height=96, width=64)[-1]
    assert abs(float(frame[:40].mean() - frame[56:].mean())) > 200


def test_the_picture_is_cropped_at_its_centre():
    film("wide.mp4", size=(48, 160), frames=12)  # the square begins at the left edge
    assert read("wide.mp4", height=48, width=48, fps=30.0).max() < 127  # 56 columns are cut
    film("tall.mp4", size=(96, 32), frames=12)
    red = read("tall.mp4", height=32, width=32, fps=30.0)[0, :, :, 0] > 127
    assert not red[0].any() or not red[-1].any()


def test_fields_become_whole_frames():
    """Each frame shows the bar at two places, as a comb, if it is not told apart."""
    weave = ["-vf", "interlace=scan=tff:lowpass=off", *X264]
    tagged = ["-flags", "+ildct+ilme", "-x264-params", "tff=1"]
    combs = []
    for flags in (tagged, []):  # or said to be whole frames
        clip = read(make("film.mp4", moving(), *weave, *flags, fps=48))[1:4]
        between = (clip[:, :-2] + clip[:, 2:]) / 2
        combs.append((clip[:, 1:-1] - between).abs().mean())
    assert combs[0] < 2 and combs[1] > 3 * combs[0]


def test_motion_keeps_its_speed_and_stills_are_no_clip():
    clip = read(make("film.mp4", moving(), *X264), fps=12.0)
    edges = [(frame[32, :, 0] > 127).nonzero().min().item() for frame in clip]
    assert all(abs(edge - 6 * i) <= 3 for i, edge in enumerate(edges))
    assert look(make("slow.mp4", moving(), fps=10))["fps"] == 10 and len(read("slow.mp4")) == 5
    with pytest.raises(ValueError, match="1 fps"):
        read(make("stills.mp4", moving(), fps=1))


@pytest.mark.parametrize("name", ["film.mp4", "film.ts", "film.avi"])
def test_a_film_damaged_in_the_frames_that_are_taken_is_left_out(name):
    film, kind = Path(name), "mpeg4" if name.endswith("avi") else "libx264"
    drawn = "-f lavfi -i testsrc2=s=320x240:r=24:d=5 -g 24 -pix_fmt yuv420p -c:v".split()
    ffmpeg(*drawn, kind, film)
    data = film.read_bytes()
    for place in (0.9, 0.03):
        at = int(place * len(data))
        film.write_bytes(data[:at] + bytes(range(7, 47)) + data[at + 40 :])
        if place > 0.5:  # behind them
            assert len(read(film)) == 5
    with pytest.raises(ValueError, match="damaged"):
        read(film)


@pytest.mark.parametrize(
    "ending", "mp4 m4v mov mkv avi gif wmv flv ts mpg 3gp ogv m2ts webm".split()
)
def test_films_of_every_ending_are_read(ending):
    flags = {"3gp": ["-s", "176x144"], "mpg": ["-r", "25"]}.get(ending, [])
    assert len(read(make(f"a.{ending}", moving(30), *flags))) == 5
