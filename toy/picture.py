"""The READMEs' pictures: first.png, ring.png and videos.png.

    python w2svd.py train --model toy --alpha-weak 0 --out runs/dmd
    python w2svd.py train --model toy --out runs/w2svd
    python w2svd.py train --model toy --data videos --out runs/videos
    python -m toy.picture runs/dmd runs/w2svd runs/videos

The last command draws what the first three have trained; tests/remake.py runs all four.
"""

import argparse
import shutil
from pathlib import Path

import torch

import w2svd
from toy import plots
from toy.metrics import Metrics
from toy.tasks import SAMPLES
from w2svd import euler_sample, few_step_sigmas


def samples(run, student):
    """The run's task, and its rows (title, samples): exact, the backbone's 4 steps, the student."""
    task = w2svd.load_task(w2svd.read_run(run))
    task.load()
    n, four = SAMPLES[task.config.data], few_step_sigmas(4, task.config.shift)
    cond, noise = task.start(n, seed=2)
    rows = [
        ("exact", task.mixture.sample(n, torch.Generator().manual_seed(3), cond)),
        ("backbone, 4 steps", euler_sample(task.backbone.velocity, noise, four, cond)),
    ]
    generator = task.trained_generator(*w2svd.read_generator(run))
    rows.append((student, task.few_step(generator, task.sigmas, n, seed=2)))
    return task, plots.scored(Metrics(task.mixture, n), rows)


def first(path, dmd, ours, videos):
    """Exact density, the backbone, DMD and W2SVD on the ring; below, frames of the video toy."""
    ring, points = samples(dmd, "DMD, 4 steps")
    points += samples(ours, "W2SVD, 4 steps")[1][-1:]
    _, clips = samples(videos, "W2SVD, 4 steps")
    top = plots.samples_2d(path.with_suffix(".top.png"), ring.mixture, points)
    bottom = plots.samples_videos(path.with_suffix(".bottom.png"), clips)
    plots.stacked(path, [top, bottom])
    top.unlink()
    bottom.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for run in ("dmd", "ours", "videos"):
        parser.add_argument(run, type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="a folder [assets]")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    first(options.out / "first.png", options.dmd, options.ours, options.videos)
    shutil.copy(options.ours / "samples.png", options.out / "ring.png")
    shutil.copy(options.videos / "samples.png", options.out / "videos.png")


if __name__ == "__main__":
    main()
