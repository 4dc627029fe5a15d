"""Clips drawn by formula, 'a red disc moves left slowly', and what a film shows, by formula too.

`judge` measures what frames show, without any learning, and `right` compares it with a caption.
"""

import itertools
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

from w2svd import BT709

FRAMES, HEIGHT, WIDTH, FPS = 9, 48, 64, 8
GROUND = (-0.7, -0.7, -0.7)  # colours in [-1, 1]
COLOURS = {"red": (1, -0.8, -0.8), "green": (-0.8, 0.8, -0.8)}
COLOURS.update({"blue": (-0.8, -0.5, 1), "yellow": (1, 0.9, -0.8)})
SIZES = {"disc": 8.0, "square": 7.0}  # radius; half a side
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": (0.9, 1.3), "fast": (2.2, 2.7)}  # pixels a frame
CAPTIONS = [
    f"a {colour} {shape} moves {direction} {speed}"
    for colour, shape, direction, speed in itertools.product(COLOURS, SIZES, DIRECTIONS, SPEEDS)
]


def draw_shape(shape, x, y):
    """How much of each pixel the shape covers, its centre at x, y (...): (..., H, W) in [0, 1]."""
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    dx, dy = columns - x[..., None, None], rows - y[..., None, None]
    if shape == "disc":
        distance = (dx**2 + dy**2).sqrt()
    else:
        distance = torch.maximum(dx.abs(), dy.abs())
    return torch.sigmoid(2 * (SIZES[shape] - distance))  # an edge about two pixels wide


def draw_clip(caption, rng, below=None, motion=1.0):
    """A clip (3, T, H, W) in [-1, 1] that shows the caption, at a random place and exact speed.

    It is drawn on the dark ground, or on another clip that lies below; motion 0 is a still.
    """
    _, colour, shape, _, direction, speed = caption.split()
    low, high = SPEEDS[speed]
    u, v, w = torch.rand(3, generator=rng).tolist()
    step = motion * (low + (high - low) * u)
    path = step * (torch.arange(FRAMES) - FRAMES // 2)  # the clip's middle is at 0
    dx, dy = DIRECTIONS[direction]
    margin = SIZES[shape] + 1
    reach_x = margin + abs(dx) * path[-1]
    reach_y = margin + abs(dy) * path[-1]
    x = reach_x + v * (WIDTH - 1 - 2 * reach_x) + dx * path
    y = reach_y + w * (HEIGHT - 1 - 2 * reach_y) + dy * path
    cover = draw_shape(shape, x, y)  # (T, H, W)
    colour = torch.tensor(COLOURS[colour])[:, None, None, None]
    if below is None:
        below = torch.tensor(GROUND)[:, None, None, None]
    return below + (colour - below) * cover


def draw_clips(number, rng):
    """`number` random clips (N, 3, T, H, W) and their captions."""
    chosen = torch.randint(len(CAPTIONS), (number,), generator=rng)
    captions = [CAPTIONS[i] for i in chosen]
    return torch.stack([draw_clip(caption, rng) for caption in captions]), captions


def draw_crowds(number, shapes, rng, motion=1.0):
    """Clips (N, 3, T, H, W) of several shapes each, one over the other."""
    crowds = []
    for _ in range(number):
        clip = None
        for k in torch.randint(len(CAPTIONS), (shapes,), generator=rng):
            clip = draw_clip(CAPTIONS[k], rng, below=clip, motion=motion)
        crowds.append(clip)
    return torch.stack(crowds)


def write_clips(folder, number, seed=1000):
    """Write random clips as .mp4 with their captions as .txt."""

    videos, captions = draw_clips(number, torch.Generator().manual_seed(seed))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (video, caption) in enumerate(zip(videos, captions)):
        frames = (127.5 * (video.permute(1, 2, 3, 0) + 1)).round().byte().numpy()
        # at this size half as many pixels for colour would show
        how = {"quality": 10, "pixelformat": "yuv444p", "output_params": BT709}
        iio.imwrite(folder / f"{i:04}.mp4", frames, plugin="FFMPEG", fps=FPS, **how)
        (folder / f"{i:04}.txt").write_text(caption + "\n")


def judge(frames):
    """What frames (T, H, W, 3) in [0, 1] show, measured: a dictionary.

    colour, shape, direction, speed: the nearest words. distance: of the mean colour to that
    word's, 0 to 1.7. fit: overlap of each frame with the drawn shape at the same centre, the mean
    over frames, 1 is perfect. sharpness: the energy of the edges by that of the drawn shape's.
    squareness: see below. motion: pixels a frame. straight: share of it along the direction.
    """
    frames = torch.as_tensor(np.asarray(frames), dtype=torch.float32)
    ground = (torch.tensor(GROUND) + 1) / 2
    palette = (torch.tensor(list(COLOURS.values())) + 1) / 2  # (4, 3)
    away = frames - ground
    strength = away.norm(dim=-1)  # (T, H, W), how far from the ground
    strength = strength * (strength > 0.25)
    mean = (frames * strength[..., None]).sum(dim=(0, 1, 2)) / (strength.sum() + 1e-6)
    distances = (palette - mean).norm(dim=-1)
    k = int(distances.argmin())
    ray = palette[k] - ground
    cover = ((away @ ray) / (ray @ ray)).clamp(0, 1)  # (T, H, W), by the nearest colour
    cover = cover * (cover > 0.15)

    x, y, squareness = moments(cover)
    shape = "square" if squareness > 0.8 else "disc"
    drawn = draw_shape(shape, x, y)
    overlap = torch.minimum(cover, drawn).sum(dim=(1, 2))
    overlap = overlap / torch.maximum(cover, drawn).sum(dim=(1, 2))

    moved = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    along = {name: float(moved @ torch.tensor(d).float()) for name, d in DIRECTIONS.items()}
    direction = max(along, key=along.get)
    motion = along[direction] / (len(frames) - 1)
    return {
        "colour": list(COLOURS)[k],
        "shape": shape,
        "direction": direction,
        "speed": "fast" if motion > 1.75 else "slowly",
        "distance": float(distances[k]),
        "fit": float(overlap.mean()),
        "sharpness": edge_energy(cover) / edge_energy(drawn),
        "squareness": squareness,
        "motion": motion,
        "straight": along[direction] / (float(moved.abs().sum()) + 1e-6),
    }


def moments(cover):
    """Of what covers (T, H, W): centres x, y (T,), and the mean of E[x^2 y^2] / E[x^2] E[y^2].

    The last is 1 for a square, also a blurred one, whose x and y are independent, and 2/3 for a
    disc. It reads what is near the centre.
    """
    columns, rows = torch.arange(WIDTH), torch.arange(HEIGHT)[:, None]

    def expectation(weight, of):
        return (weight * of).sum(dim=(1, 2)) / (weight.sum(dim=(1, 2)) + 1e-6)

    x, y = expectation(cover, columns), expectation(cover, rows)
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    near = cover * (dx.abs() < 11) * (dy.abs() < 11)
    both = expectation(near, dx**2 * dy**2)
    squareness = both / (expectation(near, dx**2) * expectation(near, dy**2) + 1e-6)
    return x, y, float(squareness.mean())


def edge_energy(cover):
    """The squared differences of neighbouring pixels of (T, H, W), summed over the clip."""
    return float(cover.diff(dim=1).square().sum() + cover.diff(dim=2).square().sum())


def right(frames, caption):
    """Which words of the caption the frames (T, H, W, 3) in [0, 1] show: a dictionary of bools.

    A word counts where it can be seen: a colour near the word's, one shape that fits, a motion of
    at least .3 pixels a frame that is mostly straight.
    """
    _, colour, shape, _, direction, speed = caption.split()
    seen = judge(frames)
    moves = seen["motion"] > 0.3 and seen["straight"] > 0.7
    words = {
        "colour": seen["colour"] == colour and seen["distance"] < 0.25,
        "shape": seen["shape"] == shape and seen["fit"] > 0.7,
        "direction": seen["direction"] == direction and moves,
        "speed": seen["speed"] == speed,
    }
    words["all"] = all(words.values())
    return words


def shares(films, captions):
    """How many of the films show each word of their captions, and the mean of what was measured."""
    words = [right(film, caption) for film, caption in zip(films, captions)]
    seen = [judge(film) for film in films]
    numbers = ("fit", "sharpness", "distance", "motion")
    table = {name: float(np.mean([one[name] for one in words])) for name in words[0]}
    return {**table, **{name: float(np.mean([one[name] for one in seen])) for name in numbers}}
