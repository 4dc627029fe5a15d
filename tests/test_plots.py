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


@pytest.fixture(scope="module")
def points():
    return titled(ring(), 7, 300)


@pytest.fixture(scope="module")
def clips():
    return titled(videos(), 3, 9)


def drawn(folder, draw, name, *args):
    """The picture, after drawing it twice: equal bytes, and nothing else in the folder."""
    path = folder / name
    returned = draw(path, *args)
    assert returned == path
    first = path.read_bytes()
    draw(str(path), *args)
    assert path.read_bytes() == first
    assert [p.name for p in folder.iterdir()] == [name]
    return iio.imread(path)


def test_2d_panels_stand_in_one_row_up_to_six_and_then_in_two(tmp_path, points):
    two = drawn(tmp_path, plots.samples_2d, "a.png", ring(), points)
    plots.samples_2d(tmp_path / "a.png", ring(), points[:6])
    one = iio.imread(tmp_path / "a.png")
    assert one.shape[1] > two.shape[1] and one.shape[0] < two.shape[0]
    assert one.shape[2] == two.shape[2] == 3


def test_2d_training_has_a_frame_for_each_title_and_holds_the_last(tmp_path, points):
    gif = drawn(tmp_path, plots.training_gif_2d, "a.gif", ring(), points[:4])
    assert gif.shape[0] == 4 and gif.shape[3] == 3
    durations = [iio.immeta(tmp_path / "a.gif", index=k)["duration"] for k in range(4)]
    assert durations == [400] * 3 + [2000]
    assert (gif[:, 0, 0] == 255).all(), "white turned grey"
    assert iio.immeta(tmp_path / "a.gif")["loop"] == 0


def test_panels_wrap_where_told(tmp_path, points):
    plots.samples_2d(tmp_path / "a.png", ring(), points[:6])
    one = iio.imread(tmp_path / "a.png")
    two = drawn(tmp_path, plots.samples_2d, "a.png", ring(), points[:6], 3)
    assert two.shape[1] < one.shape[1] and two.shape[0] > one.shape[0]


def test_a_scored_panel_has_its_number_in_the_title(points):
    measure = Metrics(ring(), 300)
    panels = plots.scored(measure, points[:1])
    assert panels[0][0] == f"step 0\nW2 0.0\nKL {measure(points[0][1])['kl']:.2f}"
    assert panels[0][1] is points[0][1]


def test_2d_panels_move_together(tmp_path, points):
    frames = [points[k : k + 2] for k in range(3)]
    gif = drawn(tmp_path, plots.samples_gif_2d, "a.gif", ring(), frames)
    plots.samples_2d(tmp_path / "a.gif.png", ring(), points[:2])
    assert gif.shape == (3, *iio.imread(tmp_path / "a.gif.png").shape)
    assert iio.immeta(tmp_path / "a.gif", index=2)["duration"] == 2000


def ink(picture):
    """The dark pixels of a panel's inside, (n, 2): rows and columns."""
    return np.argwhere((picture[80:380, 100:410] < 80).all(axis=2))


def test_arrows_go_from_the_first_points_along_the_vectors(tmp_path):
    points, right = torch.tensor([[0.0, 0.0], [-1.0, 1.5]]), torch.tensor([[1.0, 0.0]])
    panel = [("one arrow", points, right)]
    dark = ink(drawn(tmp_path, plots.arrows_2d, "a.png", ring(), panel))
    assert np.ptp(dark[:, 1]) > 3 * np.ptp(dark[:, 0]) > 0, "not along the first axis"
    longer = ink(drawn(tmp_path, plots.arrows_2d, "a.png", ring(), [(*panel[0][:2], 1.5 * right)]))
    assert np.ptp(longer[:, 1]) == pytest.approx(1.5 * np.ptp(dark[:, 1]), abs=3)
    assert longer[:, 1].min() == pytest.approx(dark[:, 1].min(), abs=1), "starts at the point"


def test_an_arrow_that_leaves_the_picture_ends_on_its_frame(tmp_path):
    far = [[("far", torch.zeros(1, 2), torch.tensor([[x, 0.0]]))] for x in (5.0, 50.0)]
    five, fifty = (drawn(tmp_path, plots.arrows_2d, "a.png", ring(), panel) for panel in far)
    assert (five == fifty).all()


def test_a_stray_point_stays_visible_on_the_frame():
    exact = plots._density(ring())
    stray = plots._inside(torch.tensor([[100.0, 0.0]]), exact)
    assert stray[0, 0] == exact["x1"][-1] and stray[0, 1] == 0


def test_video_rows_grow_the_picture_by_one_row_each(tmp_path, clips):
    three = drawn(tmp_path, plots.samples_videos, "a.png", clips)
    two = drawn(tmp_path, plots.samples_videos, "a.png", clips[:2])
    assert three.shape[1] == two.shape[1]
    assert three.shape[0] - two.shape[0] == 80 + 13  # a frame of 8 x 10 pixels and a gap


def test_clips_play_in_their_own_colours(tmp_path, clips):
    gif = drawn(tmp_path, plots.clips_gif, "a.gif", clips[:2])
    assert len(gif) == 8
    corner = 8, gif.shape[2] - 8 - 8 * 64 - 7 * 4  # of the first clip in the first row
    for t in range(8):
        seen = gif[t, corner[0] + 4 :, corner[1] + 4 :][:64:8, :64:8].astype(int)
        assert np.abs(seen - plots._rgb(clips[0][1][:1])[0, t]).max() < 40


def test_video_training_has_a_frame_for_each_title(tmp_path, clips):
    gif = drawn(tmp_path, plots.training_gif_videos, "a.gif", clips)
    assert gif.shape[0] == 3 and gif.shape[2] == 8 * 64 + 7 * 4 + 20


def test_one_map_colours_every_clip_the_same():
    flat = torch.zeros(2, 4, 1, 1, 2)
    flat[1] = 3.0
    both, alone = plots._rgb(flat), plots._rgb(flat[1:])
    assert (both[1] == alone[0]).all()
    looks = plots._rgb(7 * plots.DIRECTIONS[:2].reshape(2, 4, 1, 1, 1))
    yellow, blue = looks[:, 0, 0, 0].astype(int)
    assert yellow[0] > yellow[2] + 100 and blue[2] > blue[0] + 100


def charts():
    rows = [("alpha .25, rate 1e-3", 0.1, -0.1, 0.3), ("alpha .5, rate 1e-3", 0.2, 0.1, 0.3)]
    line = ("backbone", [0.1, 0.5, 0.9], [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.5, 2.5, 3.5])
    points = [("0", (0.9, 0.8, 1.0), (1.0, 0.9, 1.1)), ("1", (0.5, 0.4, 0.6), (0.6, 0.5, 0.7))]
    cells = [[0.0, 1.0], [0.5, 0.25]], [["0/8", "8/8"], ["4/8", "2/8"]]
    return [
        (plots.heatmaps, [("ring", "rate", ["1", "2"], ["0", ".5"], *cells)], "alpha", "note"),
        (plots.forest, [("ring", rows), ("weak", rows)], "difference"),
        (plots.curves, [("ring", [line])], "sigma", ["error"]),
        (plots.trade, [("videos", [("at all levels", points)])], "motion", "quality"),
    ]


def test_curves_on_a_logarithmic_axis_look_different(tmp_path):
    panels = [("ring", [("gap", [1, 2], [0.01, 1.0], [0.01, 0.9], [0.02, 1.1])])]
    plain = drawn(tmp_path, plots.curves, "a.png", panels, "iteration", ["gap"])
    logarithmic = drawn(tmp_path, plots.curves, "a.png", panels, "iteration", ["gap"], True)
    assert (logarithmic != plain).any()


def test_the_spread_of_runs_is_their_mean_least_and_greatest():
    name, x, *numbers = plots.spread("a", [1, 2], torch.tensor([[0.0, 4.0], [2.0, 6.0]]))
    assert (name, x) == ("a", [1, 2])
    assert [part.tolist() for part in numbers] == [[1, 5], [0, 4], [2, 6]]


@pytest.mark.parametrize("chart", charts(), ids=lambda chart: chart[0].__name__)
def test_charts_are_drawn_and_show_their_numbers(tmp_path, chart):
    draw, panels, *labels = chart
    picture = drawn(tmp_path, draw, "a.png", panels, *labels)
    assert picture.min() < 80 and picture.shape[1] > 300
    title, content, *rest = panels[0]
    changed = [(title + "?", content, *rest), *panels[1:]]
    assert (drawn(tmp_path, draw, "a.png", changed, *labels) != picture).any()


def test_an_interval_that_holds_0_is_drawn_hollow(tmp_path):
    def dots(low):
        picture = drawn(tmp_path, plots.forest, "a.png", [("x", [("a", 1.0, low, 2.0)])], "d")
        orange = (picture[..., 0] > 150) & (picture[..., 1] < 80) & (picture[..., 2] < 40)
        return int(orange.sum())

    assert dots(-1.0) == 0 < dots(0.5)


def test_films_stand_under_each_other_frame_by_frame(tmp_path):
    pictures = np.full((3, 32, 48, 3), 100, np.uint8)
    iio.imwrite(tmp_path / "a.mp4", pictures, plugin="FFMPEG", fps=12)
    from_file, decoded = plots._film(tmp_path / "a.mp4"), torch.zeros(1, 3, 3, 32, 48)
    assert from_file.shape == pictures.shape and np.abs(from_file.astype(int) - 100).max() < 8
    decoded[:, 0], decoded[:, 2] = 1.5, -1
    folder = tmp_path / "out"
    folder.mkdir()
    rows = [("file", str(tmp_path / "a.mp4")), ("decoded", decoded)]
    two = drawn(folder, plots.film_frames, "a.png", rows)
    assert (two[-40, -40] == (255, 128, 0)).all(), "neither clipped nor rounded"
    one = drawn(folder, plots.film_frames, "a.png", rows[:1])
    assert two.shape[0] - one.shape[0] == 3 * 32 + 11  # a frame and a gap
