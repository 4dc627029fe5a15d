"""The small HunyuanVideo distilled over seeds, in float32 and in bf16, with and without the cures.

    python -m toy.small_table SMALL/ CLIPS/ [--rows float32 bf16 ...] [--seeds 3]
    python -m toy.small_table SMALL/ CLIPS/ --study             alpha_weak, for toy/study/
    python -m toy.small_table SMALL/ CLIPS/ --picture films.png --run RUN

SMALL/ and CLIPS/ as `python -m toy.small_hunyuan SMALL/ --clips CLIPS/` writes them. A row is
`w2svd.py train --model hunyuan` for each seed. Its student films the 64 captions twice, and
toy/shapes.py says which films show what was asked; so does the backbone by Euler, in 28 steps and,
on several grids, in 4. Results go to toy/results/small.json, run by run, and are kept there;
those of an image-to-video pipeline (`--first-frame`), whose films continue the first frames of
unseen clips, to small_first_frame.json.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch

import w2svd
from toy import plots
from toy.metrics import distances
from toy.shapes import CAPTIONS, draw_clip, draw_clips, right, shares
from toy.small_hunyuan import encode_captions
from toy.study import report
from toy.table import spread
from w2svd import few_step_sigmas

STORED = Path(__file__).parent / "results/small.json"
FIRST_FRAME = STORED.with_name("small_first_frame.json")
SEEDS = range(60, 64)  # no trial used them; the table has three of them, the study all
EULER = [(28, 3.0), (28, 5.0), (4, 1.0), (4, 3.0), (4, 5.0), (4, 7.0)]  # steps, shift
PICTURED = 16  # prompts
SHOWN = {  # a number's name in the table
    "all": "shows all that was asked",
    "colour": "colour",
    "shape": "shape",
    "direction": "direction",
    "speed": "speed",
    "frechet": "Frechet",
    "sharpness": "sharpness",
    "motion": "pixels a frame",
}
FIRST = {"all": 2, "first": 3}  # in so many digits


class InBf16(w2svd.HunyuanVideo):
    """The model in bf16 under autocast, as on a GPU; here the CPU's."""

    def load(self, place=None):
        return type(self)(super().load(place).module.bfloat16(), self.config)


class StreamInBf16(InBf16):
    """The same, and what is added up between its blocks is rounded to bf16 too."""

    @staticmethod
    def stream_in_float32(_, args, out):
        return out

    @staticmethod
    def head_in_float32(head, args, out):
        return out


class UsualEpsilon(w2svd.State):
    """A State whose Adam has its usual epsilon."""

    def __init__(self, config, roles, device):
        super().__init__(config, roles, device)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["eps"] = 1e-8


ROWS = {  # name: the model's class, flags beside the folder's settings, the class of the state
    "float32": (w2svd.HunyuanVideo, "", w2svd.State),
    "bf16": (InBf16, "", w2svd.State),
    "bf16, stream in bf16": (StreamInBf16, "", w2svd.State),
    "bf16, epsilon 1e-8": (InBf16, "", UsualEpsilon),
    "bf16, warm-up of 100": (InBf16, "--fake-warmup 100", w2svd.State),
    "alpha_weak 0": (w2svd.HunyuanVideo, "--alpha-weak 0", w2svd.State),
    "paired": (w2svd.HunyuanVideo, "--generator-input paired", w2svd.State),
    "paired, GT loss": (
        w2svd.HunyuanVideo,
        "--generator-input paired --gt-weight .05",
        w2svd.State,
    ),
    "discriminator": (w2svd.HunyuanVideo, "--gan-weight .03", w2svd.State),
}
INPUTS = {  # of the study's rows, in bf16: flags
    "rollout": "",
    "lagging": "--fake-lr 2e-4",  # a fifth of the folder's
    "paired": "--generator-input paired",
}
STUDY = {
    f"{name} alpha {alpha}": (InBf16, f"{flags} --alpha-weak {alpha}", w2svd.State)
    for alpha in (0, 0.25, 0.5)
    for name, flags in INPUTS.items()
}


class Judge:
    """The unseen data, and what is measured of a velocity's films of the captions."""

    def __init__(self, folder, task):
        self.model = task.backbone
        self.pipe = w2svd.load_pipeline(folder, w2svd.ENCODERS)
        self.captions, rng = 2 * CAPTIONS, torch.Generator().manual_seed(6)
        clips = [draw_clip(caption, rng) for caption in self.captions]
        self.firsts = torch.stack(clips)[:, :, :1]  # given to image-to-video alone
        self.cond = encode_captions(self.model, self.pipe, self.captions, self.firsts)
        videos, _ = draw_clips(256, torch.Generator().manual_seed(4))
        parts = [self.model.encode_video(self.pipe, part) for part in videos.split(32)]
        self.data = torch.cat(parts).flatten(1)

    def measure(self, velocity, sampler, sigmas, decode=True):
        """Shares, means and the Frechet distance of latents from unseen clips', a dictionary."""
        rng = torch.Generator().manual_seed(5)
        noise = torch.randn(len(self.captions), *self.model.shape, generator=rng)
        x0 = sampler(velocity, noise, sigmas, self.cond, rng)
        if self.model.form:
            x0 = torch.cat([self.cond["image"], x0], dim=2)
        (apart,), _ = distances(self.data, [x0.flatten(1)], 16)
        if not decode:
            return {"frechet": apart}
        films = [self.model.decode(self.pipe, one[None]) for one in x0]
        numbers = {"frechet": apart, **shares(films, self.captions)}
        if self.model.form:  # in [0, 1], the mean over pixels
            given = (self.firsts[:, :, 0].permute(0, 2, 3, 1) + 1) / 2
            first = torch.stack([torch.as_tensor(film[0]) for film in films])
            numbers["first"] = float((first - given).abs().mean())
        return numbers


def run(folder, clips, row, seed):
    """The numbers of one student, with its run's seconds."""
    Model, flags, State = {**ROWS, **STUDY}[row]
    flags = f"train --model hunyuan --checkpoint {folder} --data {clips} --seed {seed} {flags}"
    with tempfile.TemporaryDirectory() as out, mock.patch.object(w2svd, "State", State):
        with (
            mock.patch.object(w2svd.VideoTask, "on_log"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            status = w2svd.main([*flags.split(), "--out", f"{out}/run"], {"hunyuan": Model})
        if status:
            raise RuntimeError(f"{row}, seed {seed}: exit status {status}")
        result = json.loads(Path(out, "run/result.json").read_text())
        generator = w2svd.read_generator(f"{out}/run")
        task = w2svd.VideoTask(w2svd.read_run(f"{out}/run"), Model)
        task.backbone = task.backbone.load()
        student = task.student(*generator)
        judge = Judge(folder, task)
        sigmas = torch.tensor(generator[1]["sigmas"])
        numbers = judge.measure(student, w2svd.few_step_sample, sigmas)
    return {**numbers, "seconds": result["seconds"], "last": result["student"]}


def backbone(folder):
    """The numbers of the backbone by Euler, in 28 steps and, on several grids, in 4."""
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(folder)})
    task, found = w2svd.VideoTask(config, w2svd.HunyuanVideo), {}
    task.backbone = task.backbone.load()
    judge = Judge(folder, task)
    for steps, shift in EULER:
        numbers = judge.measure(
            task.backbone.velocity, w2svd.euler_sample, few_step_sigmas(steps, shift)
        )
        found[f"backbone, {steps} steps, shift {shift:g}"] = {"0": numbers}
    return found


def picture(path, folder, run):
    """PNG of films of some prompts, from one noise each: the backbone in 28 and 4 steps, the run's.

    The prompts are drawn, not chosen; a frame marks a film that is not right, and the columns'
    names have the stored shares. Image-to-video shows the clip whose first frame is given.
    """
    generator = w2svd.read_generator(run)
    task = w2svd.VideoTask(w2svd.read_run(run), w2svd.HunyuanVideo)
    model = task.backbone = task.backbone.load()
    pipe, student = w2svd.load_pipeline(folder, w2svd.ENCODERS), task.student(*generator)
    sigmas = torch.tensor(generator[1]["sigmas"])
    stored = json.loads((FIRST_FRAME if model.form else STORED).read_text())
    methods = {}
    for steps, shift in EULER:
        row = f"backbone, {steps} steps, shift {shift:g}"
        if row == best(stored, steps):
            methods[row] = model.velocity, w2svd.euler_sample, few_step_sigmas(steps, shift)
    methods["float32"] = student, w2svd.few_step_sample, sigmas
    columns = ["a clip, its first frame given"] if model.form else []
    for row in methods:
        share = sum(one["all"] for one in stored[row].values()) / len(stored[row])
        name = "student, 4 steps" if row == "float32" else row.rpartition(",")[0]
        columns.append(f"{name}: {share:.0%} right")
    clips, captions = draw_clips(PICTURED, torch.Generator().manual_seed(7))
    rows = []
    for seed, (clip, caption) in enumerate(zip(clips, captions)):
        cond, films = model.encode_text(pipe, caption, clip[None, :, :1]), []
        if model.form:
            films.append(((clip.permute(1, 2, 3, 0).numpy() + 1) / 2, False))
        for velocity, sampler, grid in methods.values():
            frames = model.decode(pipe, model.draw(sampler, velocity, grid, cond, seed))
            films.append((frames, not right(frames, caption)["all"]))
        rows.append((caption, films))
    plots.films_table(path, columns, rows)


def best(results, steps):
    """The name of the backbone's row of so many steps with the most right films; the nearest."""
    rows = [name for name in results if name.startswith(f"backbone, {steps} steps")]
    return max(rows, key=lambda row: (results[row]["0"]["all"], -results[row]["0"]["frechet"]))


def in_short(results):
    """The share of right films, in one sentence."""
    ours = spread([one["all"] for one in results["float32"].values()], 2)
    many, few = (results[best(results, steps)]["0"]["all"] for steps in (28, 4))
    student = f"{ours} of the student's in 4 steps"
    return f"{student}, {few:.2f} of the backbone's in 4 on its best grid, {many:.2f} in 28."


def first_frame(results):
    """What image-to-video reaches, in one sentence."""
    ours = results["float32"].values()
    all_, first = (spread([one[n] for one in ours], places) for n, places in FIRST.items())
    few = results[best(results, 4)]["0"]
    return (
        f"{all_} of the student's films are right, and {few['all']:.2f} of the backbone's in 4 "
        f"steps; their first frame is {first} and {few['first']:.3f} from the given one, of 1."
    )


def table(results):
    """The mean over seeds of every number, with half a 95 % interval where there are several.

    Of the backbone's grids the best is shown.
    """
    lines = [f"| the student, and its backbone | seeds | {' | '.join(SHOWN.values())} |"]
    lines.append("|---" * (len(SHOWN) + 2) + "|")
    euler = [best(results, steps) for steps in (28, 4)]
    for row in [*euler, *(row for row in results if row in ROWS)]:
        seeds = results[row]
        cells = [spread([one[name] for one in seeds.values()], 2) for name in SHOWN]
        cells = cells if len(seeds) > 1 else [cell.split(" ± ")[0] for cell in cells]
        lines.append(f"| {row} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the pipeline")
    parser.add_argument("clips")
    rows = {"choices": ROWS, "default": list(ROWS)[:2], "metavar": "ROW"}
    parser.add_argument("--rows", nargs="+", help="; ".join(ROWS), **rows)
    parser.add_argument("--study", action="store_true", help="the study's rows, 4 seeds")
    parser.add_argument("--seeds", type=int, default=3, help="so many at most")
    parser.add_argument("--out", type=Path, help="where results are kept")
    parser.add_argument("--picture", type=Path, help="a .png of the films of --run, and no table")
    parser.add_argument("--run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it is held on a CPU
    if given.picture:
        return picture(given.picture, given.folder, given.run)
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(given.folder)})
    form = w2svd.HunyuanVideo.outline(config).form
    if given.study:
        given.rows, given.seeds = list(STUDY), len(SEEDS)
        given.out = given.out or Path(__file__).parent / "study/results/small.json"
    given.out = given.out or (FIRST_FRAME if form else STORED)
    results = json.loads(given.out.read_text()) if given.out.exists() else backbone(given.folder)
    for row in given.rows:
        for seed in SEEDS[: given.seeds]:
            if str(seed) not in results.setdefault(row, {}):
                results[row][str(seed)] = run(given.folder, given.clips, row, seed)
                w2svd.write_json(given.out, results)
                print(row, seed, results[row][str(seed)], flush=True)
    print(report.small_table(results) if given.study else table(results))


if __name__ == "__main__":
    main()
