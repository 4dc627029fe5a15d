"""The pictures of toy/plots.py show what they are given, and are the same bytes each time.

Against: the colours that follow from what is drawn, and a second drawing. Run with
`python -m pytest tests/test_plots.py`; 20 seconds.
"""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from toy import plots
from toy.metrics import Metrics
from toy.mixtures import ring, videos

LINE = ("backbone", [0.1, 0.5, 0.9], [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.5, 2.5, 3.5])
POINTS = ("step 1", ring().sample(300, torch.Generator().manual_seed(0)))
CLIPS = ("step 1", videos().sample(9, torch.Generator().manual_seed(0)))
PICTURES = [
    (plots.samples_2d, "a.png", ring(), [POINTS] * 7),
    (plots.arrows_2d, "a.png", ring(), [("an arrow", POINTS[1][:2], POINTS[1][2:3])]),
    (plots.samples_gif_2d, "a.gif", ring(), [[POINTS, POINTS]]),
    (plots.training_gif_2d, "a.gif", ring(), [POINTS, POINTS]),
    (plots.race_gif_2d, "a.gif", ring(), [("a", [POINTS] * 2, [0, 1], [1, 0.1], 9)], [("b", 0.1)]),
    (plots.videos, "a.png", Metrics(videos(), 64), [CLIPS, CLIPS]),
    (plots.training_gif_videos, "a.gif", [CLIPS, CLIPS]),
    (plots.curves, "a.png", [("ring", [LINE])], "sigma", ["error"]),
]


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case[0].__name__)
def test_a_picture_is_not_empty_and_the_same_bytes_each_time(tmp_path, case):
    draw, name, *args = case
    path = draw(tmp_path / name, *args)
    first = path.read_bytes()
    draw(path, *args)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [name]
    assert iio.imread(path).min() < 80


def test_clips_play_in_their_own_colours_by_one_map(tmp_path):
    gif = iio.imread(plots.clips_gif(tmp_path / "a.gif", [CLIPS]))
    left = gif.shape[2] - 8 - 8 * 64 - 7 * 4  # of the first clip
    seen = gif[:, 12:, left + 4 :][:, :64:8, :64:8].astype(int)
    assert np.abs(seen - plots._rgb(CLIPS[1][:1])[0]).max() < 40
    assert (plots._rgb(CLIPS[1])[1] == plots._rgb(CLIPS[1][1:])[0]).all()
