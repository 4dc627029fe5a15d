"""The READMEs' pictures: first.png, ring.png and videos.png.

    python w2svd.py train --model toy --out runs/ring
    python w2svd.py train --model toy --data videos --out runs/videos
    python -m toy.picture runs/ring runs/videos

The last command draws what the first two have trained; tests/remake.py runs all three.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

import w2svd
from toy import plots
from toy.metrics import Metrics
from toy.tasks import SAMPLES


def samples(run):
    """The run's task, and its rows (title, samples): exact, the backbone's 4 and 28 steps, each on
    its own best grid, and the student's 4."""
    task = w2svd.load_task(w2svd.read_run(run))
    task.load()
    n, best = SAMPLES[task.config.data], json.loads((run / "result.json").read_text())["euler"]
    cond, _ = task.start(n, seed=2)
    rows = [("exact", task.mixture.sample(n, torch.Generator().manual_seed(5), cond))]
    for k in (4, 28):
        rows.append((f"backbone, {k} steps", task.euler(k, best[str(k)]["shift"], n)))
    generator = task.trained_generator(*w2svd.read_generator(run))
    rows.append(("W2SVD, 4 steps", task.few_step(generator, task.sigmas, n, seed=2)))
    return task, plots.scored(Metrics(task.mixture, n), rows)


def first(path, ring, videos):
    """Exact samples, the backbone's and the student's on the ring; below, frames of videos."""
    task, points = samples(ring)
    _, clips = samples(videos)
    top = plots.samples_2d(path.with_suffix(".top.png"), task.mixture, points)
    bottom = plots.samples_videos(path.with_suffix(".bottom.png"), clips)
    plots.stacked(path, [top, bottom])
    top.unlink()
    bottom.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for run in ("ring", "videos"):
        parser.add_argument(run, type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="a folder [assets]")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    first(options.out / "first.png", options.ring, options.videos)
    shutil.copy(options.ring / "samples.png", options.out / "ring.png")
    shutil.copy(options.videos / "samples.png", options.out / "videos.png")


if __name__ == "__main__":
    main()
