"""The READMEs' pictures: first.gif, ring.png and videos.png.

    python w2svd.py train --model toy --log-every 5 --out runs/ring
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
from toy.tasks import SAMPLES

SEED, DOTS = 2, 800  # of the noise; few enough dots for a small file
TWEENS, STEP, STILL = 8, 60, 1500  # pictures of a step, milliseconds of each, and of a halt


def shown_iterations(saved):
    """The iterations that are drawn: all of the first 40, later every twentieth."""
    return [k for k in saved if k <= 40 or k % 20 == 0]


def training(run):
    """What the run kept while it trained: [(iteration, points, KL)]."""
    kept = {}
    for path in (run / "frames").glob("[0-9]*.safetensors"):
        tensors, info = w2svd.read_safetensors(path)
        kept[info["step"]] = tensors["samples"], info["kl"]
    return [(k, *kept[k]) for k in shown_iterations(sorted(kept))]


def states(task, generator, shift):
    """Where 4 steps come to, one after the other: the backbone's on its best grid, and a student's.

    Each is the noise, then what follows a step, [(n, 2)] * 5, with the same noise for both.
    """
    cond, noise = task.start(SAMPLES[task.config.data], SEED)
    euler, student = [noise], [noise]
    sigmas = w2svd.few_step_sigmas(4, shift)
    for k in range(2, len(sigmas) + 1):
        euler.append(w2svd.euler_sample(task.backbone.velocity, noise, sigmas[:k], cond))
        rng = torch.Generator().manual_seed(SEED + 1)  # that of Task.few_step
        student.append(w2svd.few_step_sample(generator, noise, task.sigmas[:k], cond, rng))
    return euler, student


def first(path, run):
    """GIF: the student's samples and their KL in training, then noise that becomes samples."""
    task = w2svd.load_task(w2svd.read_run(run))
    task.load()
    best = json.loads((run / "result.json").read_text())["euler"]
    generator = task.trained_generator(*w2svd.read_generator(run))
    euler, student = states(task, generator, best["4"]["shift"])
    ours, theirs = (f"{task.measure.kl(x[-1]):.2f}" for x in (student, euler))
    kept, last = training(run), f"backbone, 4 steps: KL {theirs}"
    steps, kls = [k for k, _, _ in kept], [kl for _, _, kl in kept]

    def frame(heading, titles, points, seen, milliseconds):
        panels = [(title, x[:DOTS]) for title, x in zip(titles, points)]
        return heading, panels, steps[:seen], kls[:seen], milliseconds

    frames = []
    for seen, (k, points, kl) in enumerate(kept, start=1):
        titles = last, f"student, 4 steps: KL {kl:.2f}"
        heading = f"training the student: iteration {k} of {steps[-1]}"
        frames.append(frame(heading, titles, (euler[-1], points), seen, 250))
    titles = "backbone, 4 steps", "student, 4 steps"
    frames.append(frame("sampling: noise", titles, (euler[0], student[0]), len(kept), STILL))
    for k in range(1, 5):
        for part in range(1, TWEENS + 1):
            points = [torch.lerp(x[k - 1], x[k], part / TWEENS) for x in (euler, student)]
            heading = f"sampling: step {k} of 4"
            frames.append(frame(heading, titles, points, len(kept), STEP))
        frames[-1] = (*frames[-1][:-1], STILL // 2)
    titles = last, f"student, 4 steps: KL {ours}"
    ends = euler[-1], student[-1]
    frames.append(frame("after 4 steps, from the same noise", titles, ends, len(kept), 2 * STILL))
    levels = [(f"backbone, {k} steps", best[k]["kl"]) for k in ("4", "28")]
    return plots.race_gif_2d(path, task.mixture, frames, levels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for run in ("ring", "videos"):
        parser.add_argument(run, type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="a folder [assets]")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    first(options.out / "first.gif", options.ring)
    shutil.copy(options.ring / "samples.png", options.out / "ring.png")
    shutil.copy(options.videos / "samples.png", options.out / "videos.png")


if __name__ == "__main__":
    main()
