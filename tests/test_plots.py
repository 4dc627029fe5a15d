"""The pictures of toy/plots.py as files: size, frames, colours, determinism.

Against: the pixels that follow from what is drawn, and a second drawing. Run with
`python -m pytest tests/test_plots.py`; 20 seconds.
"""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from toy import plots
from toy.metrics import Metrics
from toy.mixtures import ring, videos


def titled(mixture, count, n):
    rngs = [torch.Generator().manual_seed(k) for k in range(count)]
    return [(f"step {k}\nW2 0.{k}", mixture.sample(n, rng)) for k, rng in enumerate(rngs)]


def drawn(folder, draw, name, *args):
    """The picture, after drawing it twice: equal bytes, and nothing else in the folder."""
    path = folder / name
    assert draw(path, *args) == path
    first = path.read_bytes()
    draw(str(path), *args)
    assert path.read_bytes() == first and [p.name for p in folder.iterdir()] == [name]
    return iio.imread(path)


def test_panels_of_points_wrap_and_have_their_number_in_the_title(tmp_path):
    points, measure = titled(ring(), 7, 300), Metrics(ring(), 300)
    one = drawn(tmp_path, plots.samples_2d, "a.png", ring(), points[:6])
    for two in ((points,), (points[:6], 3)):
        two = drawn(tmp_path, plots.samples_2d, "a.png", ring(), *two)
        assert two.shape[1] < one.shape[1] and two.shape[0] > one.shape[0]
    ((title, x),) = plots.scored(measure, points[:1])
    assert title == f"step 0\nW2 0.0\nKL {measure(x)['kl']:.2f}" and x is points[0][1]


def test_a_gif_of_points_has_a_frame_for_each_title_and_holds_the_last(tmp_path):
    points = titled(ring(), 4, 300)
    gif = drawn(tmp_path, plots.training_gif_2d, "a.gif", ring(), points)
    durations = [iio.immeta(tmp_path / "a.gif", index=k)["duration"] for k in range(4)]
    assert gif.shape[0] == 4 and durations == [400] * 3 + [2000]
    assert (gif[:, 0, 0] == 255).all(), "white turned grey"
    assert iio.immeta(tmp_path / "a.gif")["loop"] == 0
    together = drawn(tmp_path, plots.samples_gif_2d, "a.gif", ring(), [points[:2], points[2:]])
    assert together.shape[0] == 2 and together.shape[2] > 1.5 * gif.shape[2]


def test_arrows_go_from_the_first_points_along_the_vectors_and_end_on_the_frame(tmp_path):
    def ink(right):
        """The dark pixels of the panel's inside, (n, 2): rows and columns."""
        panel = [("an arrow", torch.tensor([[0.0, 0.0], [-1.0, 1.5]]), torch.tensor([[right, 0]]))]
        picture = drawn(tmp_path, plots.arrows_2d, "a.png", ring(), panel)
        return np.argwhere((picture[80:380, 100:410] < 80).all(axis=2))

    one, longer = ink(1.0), ink(1.5)
    assert np.ptp(one[:, 1]) > 3 * np.ptp(one[:, 0]) > 0, "not along the first axis"
    assert np.ptp(longer[:, 1]) == pytest.approx(1.5 * np.ptp(one[:, 1]), abs=3)
    assert longer[:, 1].min() == pytest.approx(one[:, 1].min(), abs=1), "starts at the point"
    assert np.array_equal(ink(5.0), ink(50.0))


def test_a_stray_point_stays_visible_on_the_frame():
    exact = plots._density(ring())
    stray = plots._inside(torch.tensor([[100.0, 0.0]]), exact)
    assert stray[0, 0] == exact["x1"][-1] and stray[0, 1] == 0


def test_clips_stand_in_rows_and_play_in_their_own_colours(tmp_path):
    clips = titled(videos(), 3, 9)
    three = drawn(tmp_path, plots.samples_videos, "a.png", clips)
    two = drawn(tmp_path, plots.samples_videos, "a.png", clips[:2])
    assert three.shape[1] == two.shape[1]
    assert three.shape[0] - two.shape[0] == 80 + 13  # a frame of 8 x 10 pixels and a gap
    (tmp_path / "a.png").unlink()
    training = drawn(tmp_path, plots.training_gif_videos, "a.gif", clips)
    assert training.shape[0] == 3 and training.shape[2] == 8 * 64 + 7 * 4 + 20
    gif = drawn(tmp_path, plots.clips_gif, "a.gif", clips[:2])
    left = gif.shape[2] - 8 - 8 * 64 - 7 * 4  # of the first clip in the first row
    for t, frame in enumerate(gif):
        seen = frame[12:, left + 4 :][:64:8, :64:8].astype(int)
        assert np.abs(seen - plots._rgb(clips[0][1][:1])[0, t]).max() < 40
    assert len(gif) == 8


def test_one_map_colours_every_clip_the_same():
    flat = torch.zeros(2, 4, 1, 1, 2)
    flat[1] = 3.0
    assert (plots._rgb(flat)[1] == plots._rgb(flat[1:])[0]).all()
    looks = plots._rgb(7 * plots.DIRECTIONS[:2].reshape(2, 4, 1, 1, 1))
    yellow, blue = looks[:, 0, 0, 0].astype(int)
    assert yellow[0] > yellow[2] + 100 and blue[2] > blue[0] + 100


ROWS = [("alpha .25, rate 1e-3", 0.1, -0.1, 0.3), ("alpha .5, rate 1e-3", 0.2, 0.1, 0.3)]
LINE = ("backbone", [0.1, 0.5, 0.9], [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.5, 2.5, 3.5])
POINTS = [("0", (0.9, 0.8, 1.0), (1.0, 0.9, 1.1)), ("1", (0.5, 0.4, 0.6), (0.6, 0.5, 0.7))]
CELLS = [[0.0, 1.0], [0.5, 0.25]], [["0/8", "8/8"], ["4/8", "2/8"]]
CHARTS = [
    (plots.heatmaps, [("ring", "rate", ["1", "2"], ["0", ".5"], *CELLS)], "alpha", "note"),
    (plots.forest, [("ring", ROWS), ("weak", ROWS)], "difference"),
    (plots.curves, [("ring", [LINE])], "sigma", ["error"]),
    (plots.curves, [("ring", [LINE])], "sigma", ["error"], True),  # logarithmic
    (plots.trade, [("videos", [("at all levels", POINTS)])], "motion", "quality"),
]


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_are_drawn_and_show_their_titles(tmp_path, chart):
    draw, panels, *labels = chart
    picture = drawn(tmp_path, draw, "a.png", panels, *labels)
    assert picture.min() < 80 and picture.shape[1] > 300
    (title, *content), *others = panels
    changed = [(title + "?", *content), *others]
    assert (drawn(tmp_path, draw, "a.png", changed, *labels) != picture).any()


def test_an_interval_that_holds_0_is_drawn_hollow(tmp_path):
    def dots(low):
        picture = drawn(tmp_path, plots.forest, "a.png", [("x", [("a", 1.0, low, 2.0)])], "d")
        return ((picture[..., 0] > 150) & (picture[..., 1:] < [80, 40]).all(2)).sum()

    assert dots(-1.0) == 0 < dots(0.5)


def test_the_spread_of_runs_is_their_mean_least_and_greatest():
    name, x, *numbers = plots.spread("a", [1, 2], torch.tensor([[0.0, 4.0], [2.0, 6.0]]))
    assert (name, x) == ("a", [1, 2])
    assert [part.tolist() for part in numbers] == [[1, 5], [0, 4], [2, 6]]


def test_films_stand_under_each_other_frame_by_frame(tmp_path):
    pictures = np.full((3, 32, 48, 3), 100, np.uint8)
    iio.imwrite(tmp_path / "a.mp4", pictures, plugin="FFMPEG", fps=12)
    from_file, decoded = plots._film(tmp_path / "a.mp4"), torch.zeros(1, 3, 3, 32, 48)
    assert from_file.shape == pictures.shape and np.abs(from_file.astype(int) - 100).max() < 8
    decoded[:, 0], decoded[:, 2] = 1.5, -1
    rows, folder = [("file", str(tmp_path / "a.mp4")), ("decoded", decoded)], tmp_path / "out"
    folder.mkdir()
    two = drawn(folder, plots.film_frames, "a.png", rows)
    assert (two[-40, -40] == (255, 128, 0)).all(), "neither clipped nor rounded"
    one = drawn(folder, plots.film_frames, "a.png", rows[:1])
    assert two.shape[0] - one.shape[0] == 3 * 32 + 11  # a frame and a gap
