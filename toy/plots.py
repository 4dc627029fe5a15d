"""Pictures of the toy: samples over the exact density, clips as coloured frames, GIFs of training.

    python -m toy.plots RUN...           the curves of any run, into RUN/curves.png

Every function takes a path, plain tensors and titles, and writes one PNG or GIF: points are
(n, 2), clips are (n, 4, T, H, W). The same input gives the same bytes, and a file appears only
when it is whole; its path comes back. Colours and limits never depend on the samples shown, so
pictures compare.
"""

import json
import os
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from toy.metrics import travel, travel_of

INK = "#222222"
DOT = "#a83200"  # dark on light shades, orange on blue: told apart in grey and by colour-blind eyes
SHADES = ["#dfe9f2", "#bdd3e6", "#8fb4d3"]
MASS = [0.999, 0.9, 0.5]  # each shade is the smallest region with this much of the exact mass
MAX_DOTS = 1000  # more of them hide the density
KEY_HEIGHT = 0.32  # inches of a line of the key below a picture

# Latents to colours: one colour for each of four orthogonal directions of the channels. The first
# two are the looks of mixtures.videos(), yellow and blue, about 7 at a blob's centre; the data has
# nothing along the others, so pink, green and violet are errors.
DIRECTIONS = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
COLOURS = torch.tensor([[0.85, 0.65, 0.15], [0.1, 0.4, 0.85], [0.6, -0.6, 0.6], [-0.5, 0.0, 0.7]])
TO_RGB = DIRECTIONS.T @ COLOURS / 7
ZERO_RGB = torch.tensor([0.13, 0.13, 0.17])


# ---------------------------------------------------------------------------------- 2-D points


def samples_2d(path, mixture, panels, columns=6):
    """PNG of square panels, one for each (title, points), all over the same exact density."""
    return _write_png(path, _pixels(_panels_2d(mixture, panels, columns)))


def scored(measure, rows):
    """Rows (title, samples) with numbers of toy.metrics below each title: the KL, and of clips the
    dynamic degree, which is 1 if they move as much as the data."""

    def lines(numbers):
        if "clip_frechet" not in numbers:
            return f"KL {numbers['kl']:z.2f}"
        return "KL {kl:z.2f}, motion {dynamic_degree:.2f}".format(**numbers)

    return [(f"{title}\n{lines(measure(x))}", x) for title, x in rows]


def samples_gif_2d(path, mixture, frames):
    """GIF of panels beside each other, as in samples_2d; a frame is a list of (title, points)."""
    pictures = [_pixels(_panels_2d(mixture, frame, len(frame), "left")) for frame in frames]
    return _write_gif(path, pictures, _durations(len(pictures)))


def arrows_2d(path, mixture, panels, columns=4):
    """PNG of panels (title, points, vectors): samples_2d, with arrows that start at the first
    len(vectors) points, in the units of the axes."""
    faint = [(title, points[len(vectors) :]) for title, points, vectors in panels]
    figure, exact = _panels_2d(mixture, faint, columns, alpha=0.25), _density(mixture)
    for ax, (_, points, vectors) in zip(figure.axes, panels, strict=True):
        start = _inside(points[: len(vectors)], exact)
        along = _inside(points[: len(vectors)] + vectors, exact) - start
        units = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        head = {"headwidth": 5, "headlength": 6, "headaxislength": 5, "minlength": 0}
        ax.quiver(*start.T, *along.T, color=INK, zorder=4, **units, **head)
        ax.scatter(*start.T, s=11, c=DOT, linewidths=0, zorder=5, clip_on=False)
    return _write_png(path, _pixels(figure))


def _panels_2d(mixture, panels, columns, loc="center", alpha=0.45, **words):
    """Figure of square panels in as few rows as `columns` allows, over the exact density.

    words: `axes`, the two labels, and `dot`, what a dot is.
    """
    axes, dot = words.get("axes", ("$x_1$", "$x_2$")), words.get("dot", "a sample")
    columns = len(panels) if len(panels) <= columns else (len(panels) + 1) // 2
    rows = -(-len(panels) // columns)
    lines = max(title.count("\n") + 1 for title, _ in panels)
    pitch = 2.5 + 0.27 * lines + 0.35  # inches: panel, title and ticks
    key = 1 if columns > 2 else 4 // columns  # lines
    width, height = 0.7 + 2.65 * columns, rows * pitch + 0.3 + key * KEY_HEIGHT
    figure = Figure((width, height), dpi=130)
    _draw_key(figure, 4 // key, dot)
    exact = _density(mixture)
    for k, (title, points) in enumerate(panels):
        row, column = divmod(k, columns)
        left, bottom = 0.7 + 2.65 * column, height - (row + 1) * pitch + 0.25
        ax = figure.add_axes((left / width, bottom / height, 2.5 / width, 2.5 / height))
        lowest = k + columns >= len(panels)
        _draw_density(ax, exact)
        _draw_dots(ax, alpha).set_offsets(_inside(points, exact))
        ax.set_title(title, fontsize=14, color=INK, loc=loc)
        ax.tick_params(labelleft=column == 0, labelbottom=lowest)
        ax.set_xlabel(axes[0] if lowest else "", fontsize=14)
        ax.set_ylabel(axes[1] if column == 0 else "", fontsize=14)
    return figure


def training_gif_2d(path, mixture, frames):
    """GIF of samples moving over the exact density, one frame for each (title, points)."""
    lines = max(title.count("\n") + 1 for title, _ in frames)
    key = 2 * KEY_HEIGHT
    width, height = 4.2, 4.1 + 0.27 * lines + key
    figure = Figure((width, height), dpi=100)
    ax = figure.add_axes((0.65 / width, (0.55 + key) / height, 3.4 / width, 3.4 / height))
    _draw_key(figure, 2)
    exact = _density(mixture)
    _draw_density(ax, exact)
    ax.set_xlabel("$x_1$", fontsize=14)
    ax.set_ylabel("$x_2$", fontsize=14)
    dots = _draw_dots(ax)
    # Left-aligned at a fixed place: a centred title would jump as its number grows.
    label = figure.text(0.65 / width, 1 - 0.07 / height, "", fontsize=14, color=INK, va="top")
    pictures = []
    for title, points in frames:
        label.set_text(title)
        dots.set_offsets(_inside(points, exact))
        pictures.append(_pixels(figure))
    return _write_gif(path, pictures, _durations(len(pictures)))


def race_gif_2d(path, mixture, frames, levels):
    """GIF of two panels of points and, at their right, the KL over training as far as it has come.

    A frame is (heading, [(title, points), (title, points)], iterations, KLs, milliseconds);
    levels are the lines (name, KL) across the chart.
    """
    wide, high, side, base = 9.0, 3.95, 2.5, 0.8  # inches
    figure, exact = Figure((wide, high), dpi=130), _density(mixture)
    heading = figure.text(0.015, 0.985, "", fontsize=14, color=INK, va="top", weight="bold")
    titles, dots = [], []
    for left in (0.45, 3.1):
        ax = figure.add_axes((left / wide, base / high, side / wide, side / high))
        _draw_density(ax, exact)
        ax.tick_params(labelleft=left < 1)
        titles.append(ax.set_title("", fontsize=13, color=INK, loc="left"))
        dots.append(_draw_dots(ax))
    chart = figure.add_axes((6.35 / wide, base / high, 2.5 / wide, side / high))
    last_iterations, last_kls = frames[-1][2:4]
    for name, kl in levels:
        chart.axhline(kl, color="#7a7a7a", linestyle="--", linewidth=1.2)
        chart.text(last_iterations[-1], 1.1 * kl, name, fontsize=10, color=INK, ha="right")
    (line,) = chart.plot([], [], color=DOT, linewidth=2)
    (now,) = chart.plot([], [], "o", color=DOT, markersize=7, clip_on=False)
    lowest = min(kl for _, kl in levels)
    chart.set(xlim=(0, last_iterations[-1]), yscale="log")
    chart.set_ylim(lowest / 2, 2 * max(last_kls))
    chart.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
    chart.minorticks_off()
    _label(chart, "", "iteration of training", "")
    chart.set_title("KL of the student (0: exact)", fontsize=13, color=INK, loc="left")
    _draw_key(figure, 4)
    pictures = []
    for text, panels, iterations, kls, _ in frames:
        heading.set_text(text)
        for title, dot, (name, points) in zip(titles, dots, panels):
            title.set_text(name)
            dot.set_offsets(_inside(points, exact))
        line.set_data(iterations, kls)
        now.set_data(iterations[-1:], kls[-1:])
        pictures.append(_pixels(figure))
    return _write_gif(path, pictures, [milliseconds for *_, milliseconds in frames])


@torch.no_grad()
def _density(mixture, side=160):
    """Grid, log density, contour levels and limits of the exact mixture; the same at every call."""
    samples = mixture.sample(8192, torch.Generator().manual_seed(0))
    low, high = samples.min(0).values, samples.max(0).values
    centre, half = (low + high) / 2, 0.55 * (high - low).max()
    x1, x2 = (torch.linspace(c - half, c + half, side) for c in centre.tolist())
    grid = torch.stack(torch.meshgrid(x1, x2, indexing="xy"), dim=-1)
    log_p = mixture.log_prob(grid.reshape(-1, 2)).reshape(side, side)
    # The density exceeded by 90 % of the samples bounds the smallest region with 90 % of the mass.
    levels = [mixture.log_prob(samples).quantile(1 - mass).item() for mass in MASS]
    return {"x1": x1.numpy(), "x2": x2.numpy(), "log_p": log_p.numpy(), "levels": levels}


def _draw_density(ax, exact):
    levels = [*exact["levels"], max(exact["log_p"].max(), exact["levels"][-1]) + 1]
    ax.contourf(exact["x1"], exact["x2"], exact["log_p"], levels=levels, colors=SHADES)
    ax.set(xlim=exact["x1"][[0, -1]], ylim=exact["x2"][[0, -1]], aspect="equal")
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.tick_params(labelsize=11, length=3, color="#999999", labelcolor=INK)
    ax.spines[:].set_color("#999999")


def _draw_dots(ax, alpha=0.45):
    return ax.scatter([], [], s=4, c=DOT, alpha=alpha, linewidths=0, zorder=3, clip_on=False)


def _draw_key(figure, columns, dot="a sample"):
    """What dots and bands are, below the panels."""
    look = {"marker": "o", "linestyle": "", "color": DOT, "markersize": 5}
    names = ["half of the exact data", "90 %", "99.9 %"]
    handles = [Line2D([], [], label=dot, **look)]
    handles += [Patch(color=c, label=name) for c, name in zip(reversed(SHADES), names)]
    how = {"loc": "lower left", "bbox_to_anchor": (0, 0), "frameon": False, "fontsize": 11}
    figure.legend(handles=handles, ncols=columns, columnspacing=1.2, handlelength=1.2, **how)


def _inside(points, exact):
    """The first points; strays are put on the frame, as hiding them would flatter a method."""
    points = points[:MAX_DOTS].detach().float().cpu().numpy()
    low, high = ([exact["x1"][end], exact["x2"][end]] for end in (0, -1))
    return np.clip(points, low, high)


# --------------------------------------------------------------------------------------- clips


def videos(path, measure, rows):
    """PNG of what (title, clips) show, measured by a Metrics.

    Above, how far each clip's blob moves, over the exact clips' regions; below, the first clips of
    each row, those framed that are like none of the data. Titles get the share of these.
    """
    exact, panels = travel_of(measure.mixture), []
    framed = [measure.astray(clips) for _, clips in rows]
    for (title, clips), marks in zip(rows, framed):
        title = f"{title}\n{100 * marks.double().mean():.0f} % unlike any data"
        panels.append((title, travel(clips)))
    axes = "pixels to the right", "pixels up"
    top = _pixels(
        _panels_2d(exact, panels, len(panels), axes=axes, dot="a clip: how far its blob moves")
    )
    return _write_png(path, _stacked([top, _wall(rows, framed)]))


def samples_videos(path, rows):
    """PNG with the first clips of each (title, clips): their frames, left to right."""
    return _write_png(path, _wall(rows, [torch.zeros(len(clips)).bool() for _, clips in rows]))


def _wall(rows, framed, across=5, down=4):
    """Pixels with a few clips of each (title, clips), as strips of frames; some have a frame."""
    zoom, gap, between, size, top = 5, 2, 14, 28, 52
    pictures = []
    for (_, clips), marks in zip(rows, framed, strict=True):
        strips = [_beside(_enlarge(clip, zoom), gap) for clip in _rgb(clips[: across * down])]
        strips = [_framed(strip, mark) for strip, mark in zip(strips, marks.tolist())]
        lines = [strips[k : k + across] for k in range(0, len(strips), across)]
        pictures.append(_stacked([_beside(line, between) for line in lines]))
    titles = [title for title, _ in rows]
    left = _label_width(titles, size)
    words = "each strip is a clip, its 8 frames from left to right"
    if any(marks[: across * down].any() for marks in framed):
        words += "; framed: it is like none of the exact clips"
    marks = [(left, top / 2, words, "left")]
    return _with_titles(titles, pictures, size, top=top, marks=marks)[0]


def _framed(strip, mark, edge=4):
    """The strip (H, W, 3) within an edge of white, or of the dots' colour."""
    colour = [int(DOT[k : k + 2], 16) if mark else 255 for k in (1, 3, 5)]
    page = np.empty((strip.shape[0] + 2 * edge, strip.shape[1] + 2 * edge, 3), np.uint8)
    page[:] = colour
    page[edge:-edge, edge:-edge] = strip
    return page


def clips_gif(path, rows, per_row=8):
    """GIF of the first per_row clips of each (title, clips), playing in a loop, rows stacked."""
    zoom, gap, size = 8, 4, 16
    titles = [title for title, _ in rows]
    images = [_rgb(clips[:per_row]) for _, clips in rows]
    steps = range(images[0].shape[1])
    moments = [[_beside(_enlarge(row[:, t], zoom), gap) for row in images] for t in steps]
    page, corners = _with_titles(titles, moments[0], size)
    pages = [_paste(page, moment, corners) for moment in moments]
    return _write_gif(path, pages, [167] * len(pages))


def training_gif_videos(path, frames):
    """GIF of a student's clips as it trains: one sheet per (title, clips), one row per clip."""
    zoom, gap, size, margin = 8, 4, 18, 10
    pages = []
    for title, clips in frames:
        strips = [_beside(_enlarge(clip, zoom), gap) for clip in _rgb(clips[:6])]
        height, width, _ = strips[0].shape
        top = 1.3 * size * max(name.count("\n") + 1 for name, _ in frames) + margin
        corners = [(round(top) + k * (height + gap), margin) for k in range(len(strips))]
        marks = [
            (margin, top / 2, title, "left"),
            (margin + width, top - size, "time \u2192", "right"),
        ]
        page = _page(width + 2 * margin, corners[-1][0] + height + margin, marks, size)
        pages.append(_paste(page, strips, corners))
    return _write_gif(path, pages, _durations(len(pages)))


def film_frames(path, rows, zoom=3):
    """PNG with a row for each (title, film): its frames, left to right.

    A film is the path of a file, or (1, 3, T, H, W) in [-1, 1], as a VAE decodes it.
    """
    gap, size, top = 4, 22, 36
    titles, films = [title for title, _ in rows], [_film(film) for _, film in rows]
    pictures = [_beside(_enlarge(film, zoom), gap) for film in films]
    left, pitch = _label_width(titles, size), films[0].shape[2] * zoom + gap
    marks = [(left - 16, top / 2, "frame", "right")]
    marks += [
        (left + (k + 0.5) * pitch, top / 2, str(k + 1), "center") for k in range(len(films[0]))
    ]
    return _write_png(path, _with_titles(titles, pictures, size, top=top, marks=marks)[0])


def films_table(path, columns, rows, every=2):
    """PNG of films: a row for each prompt, a column for each method; framed where one is wrong.

    rows: [(prompt, [(frames (T, H, W, 3) in [0, 1], wrong)])]; every so many frames are shown.
    """
    gap, between, size, top = 2, 16, 22, 52
    pictures = []
    for _, films in rows:
        strips = [
            _framed(_beside((255 * frames[::every]).round().astype(np.uint8), gap), wrong)
            for frames, wrong in films
        ]
        pictures.append(_beside(strips, between))
    titles = [prompt for prompt, _ in rows]
    left, pitch = _label_width(titles, size), (pictures[0].shape[1] + between) / len(columns)
    marks = [(left + k * pitch, top / 2, name, "left") for k, name in enumerate(columns)]
    return _write_png(path, _with_titles(titles, pictures, size, top=top, marks=marks)[0])


def _film(film):
    """Frames (T, H, W, 3) in 0..255."""
    if not torch.is_tensor(film):
        return iio.imread(film, plugin="FFMPEG")
    assert film.dim() == 5 and film.shape[:2] == (1, 3), f"(1, 3, T, H, W), not {tuple(film.shape)}"
    film = film[0].detach().float().cpu().permute(1, 2, 3, 0)
    return (127.5 * (film.clamp(-1, 1) + 1)).round().byte().numpy()


def _rgb(clips):
    """Clips (n, 4, T, H, W) to colours (n, T, H, W, 3), by one fixed linear map."""
    assert clips.dim() == 5 and clips.shape[1] == 4, f"(n, 4, T, H, W), not {tuple(clips.shape)}"
    rgb = ZERO_RGB + torch.einsum("ncthw,cr->nthwr", clips.detach().float().cpu(), TO_RGB)
    return (255 * rgb.clamp(0, 1)).round().byte().numpy()


def _enlarge(images, zoom):
    return images.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def _beside(images, gap):
    """Images of one height in a row, white between them."""
    white = np.full((images[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, white)][:-1], axis=1)


def _label_width(titles, size):
    return round(0.6 * size * max(len(line) for t in titles for line in t.split("\n"))) + 2 * size


def _with_titles(titles, pictures, size, top=None, marks=()):
    """Page of pictures, one under the other, titles at their left; and each picture's corner."""
    left, gap = _label_width(titles, size), size // 2
    top = gap if top is None else top
    height, width, _ = pictures[0].shape
    corners = [(top + k * (height + gap), left) for k in range(len(pictures))]
    names = [(gap, y + height / 2, t, "left") for t, (y, _) in zip(titles, corners, strict=True)]
    page = _page(left + width + gap, corners[-1][0] + height + gap, [*names, *marks], size)
    return _paste(page, pictures, corners), corners


def _page(width, height, texts, size):
    """White pixels with texts (x, y of the middle, string, alignment), all in pixels."""
    # Half a pixel more, as matplotlib rounds width * dpi down: 1.15 * 100 would give 114.
    figure = Figure(((width + 0.5) / 100, (height + 0.5) / 100), dpi=100)
    for x, y, string, align in texts:
        style = {"fontsize": 0.72 * size, "color": INK, "linespacing": 1.15}
        figure.text(x / width, 1 - y / height, string, ha=align, va="center_baseline", **style)
    return _pixels(figure)


def _paste(page, pictures, corners):
    page = page.copy()
    for picture, (y, x) in zip(pictures, corners, strict=True):
        page[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return page


# ------------------------------------------------------------------------------ the study's charts

LINES = [(INK, "o", "-"), (DOT, "s", "--"), ("#2f6f9f", "^", "-."), ("#7a7a7a", "D", ":")]


def curves(path, panels, xlabel, ylabels, log=False, yticks=None, sharey=False):
    """PNG of panels (title, lines), lines (name, x, mean, low, high), in one row."""
    xlabels = [xlabel] * len(panels) if isinstance(xlabel, str) else xlabel
    figure = Figure((0.6 + 3.6 * len(panels), 3.7), dpi=130)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=sharey)[0]
    for ax, (title, lines), xlabel, ylabel in zip(axes, panels, xlabels, ylabels):
        for (name, x, mean, low, high), (colour, marker, style) in zip(lines, LINES):
            ax.plot(x, mean, style, marker=marker, color=colour, label=name, markersize=5)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.set_yscale("log" if log else "linear")
        if yticks:
            ax.set_yticks(yticks, yticks)
            ax.minorticks_off()
        ax.legend(fontsize=9, frameon=False)
        _label(ax, title, xlabel, ylabel)
    return _save(path, figure)


def spread(name, x, runs):
    """A line of curves: the mean of runs (runs, len(x)), between the least and the greatest."""
    return name, x, runs.mean(0), runs.amin(0), runs.amax(0)


def _label(ax, title, xlabel, ylabel):
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    ax.tick_params(labelsize=9, length=3, color="#999999", labelcolor=INK)
    ax.spines[:].set_color("#999999")


def _save(path, figure):
    figure.tight_layout()
    return _write_png(path, _pixels(figure))


# --------------------------------------------------------------------------------------- files


def _stacked(pages):
    """Pixels of pages, one under the other, white at their right."""
    width = max(page.shape[1] for page in pages)
    right = [((0, 0), (0, width - page.shape[1]), (0, 0)) for page in pages]
    padded = [np.pad(page, by, constant_values=255) for page, by in zip(pages, right)]
    return np.concatenate(padded)


def _pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _durations(count):
    """Milliseconds: about six seconds in all, the last frame held for two."""
    return [min(400, max(100, 6000 // count // 10 * 10))] * (count - 1) + [2000]


def _write_png(path, pixels):
    return _replace(path, Image.fromarray(pixels), format="PNG", optimize=True)


def _write_gif(path, pictures, milliseconds):
    """One palette for all frames and no dithering: neither colours nor text flicker."""
    pixels = np.stack(pictures).astype(np.int32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    palette, table = _palette(codes)
    frames = [Image.fromarray(table[code]) for code in codes]
    for frame in frames:
        frame.putpalette(palette)
    film = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    return _replace(path, frames[0], format="GIF", **film)


def _palette(codes):
    """256 colours for codes 0xRRGGBB, and a table from every code seen to the nearest of them."""
    ink = codes[codes != 0xFFFFFF]  # white is set apart: averaged with greys, the page turns grey
    ink = ink[:: 1 + len(ink) // 500_000]
    ink = np.stack([ink >> 16, ink >> 8 & 255, ink & 255], axis=-1).astype(np.uint8)
    palette = [255] * 3 + Image.fromarray(ink[None]).quantize(255, kmeans=2).getpalette()
    seen = np.zeros(1 << 24, bool)
    seen[codes] = True
    seen = torch.from_numpy(np.flatnonzero(seen))
    colours = torch.stack([seen >> 16, seen >> 8 & 255, seen & 255], dim=-1).float()
    nearest = torch.cdist(colours, torch.tensor(palette).reshape(-1, 3).float()).argmin(1)
    # Pillow's own matching rounds colours first, which moves white and the shades.
    table = np.zeros(1 << 24, np.uint8)
    table[seen.numpy()] = nearest.byte().numpy()
    return palette, table


def _replace(path, image, **options):
    """Write beside the path, then rename: a reader never sees half a picture."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    image.save(part, **options)
    os.replace(part, path)
    return path


def curves_of(run):
    """PNG of what a run logged, into its folder: the loss, the gap, the ratios to the data."""
    log = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    names = [n for n in ("fake_loss", "relative_gap", "std_ratio", "motion_ratio") if n in log[-1]]
    panels = []
    for name in names:
        y = [line[name] for line in log if name in line]
        steps = [line["step"] for line in log if name in line]
        title = f"{y[0]:.3f} at first, {y[-1]:.3f} at last"
        panels.append((title, [(name, steps, y, y, y)]))
    return curves(Path(run, "curves.png"), panels, "iteration", names)


if __name__ == "__main__":
    if not all(Path(folder, "metrics.jsonl").exists() for folder in sys.argv[1:]):
        sys.exit(f"no run with a metrics.jsonl: {' '.join(sys.argv[1:])}")
    for folder in sys.argv[1:] or sys.exit("python -m toy.plots RUN: name a run folder"):
        print(f"wrote {curves_of(folder)}")
