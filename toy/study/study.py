"""When does weak-to-strong matching help? The runs behind toy/study/README.md.

    python -m toy.study               all of them, on one CPU core; goes on where it stopped
    python -m toy.study --quick       few lanes and iterations, in runs/study; under 3 minutes
    python -m toy.study --only fast   one group; their names stand in GROUPS

A GROUP is a question's runs on one toy: settings that all share, and CELLS, named rows of settings.
A job is a group and a seed: it trains a backbone for the seed, then a few lanes of every cell side
by side (stack.py), and measures each by noise of its own. study.json keeps the results job by job;
report.py makes the tables and the figure of them.
"""

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import w2svd
from toy import mixtures
from toy.metrics import Metrics
from toy.study import probes, report
from toy.study.stack import Lane, Stack, StackedRoles
from toy.tasks import RECIPES, Task, preset

ALPHAS = (0.0, 0.25, 0.5, 0.75)
KNOBS = {"dmd_scale", "numerator", "denominator", "waits"}  # of a Lane, not of a Config
SAMPLES = {"ring": 8192, "grid": 8192, "videos": 2048}  # of a lane, measured
QUICK = {"iterations": 8, "batch": 32}
KEYS = ("kl", "weight_tv", "clip_frechet", "dynamic_degree")  # kept


def alphas(values=ALPHAS):
    """A cell for each alpha_weak."""
    return {f"alpha {alpha:g}": {"alpha_weak": alpha} for alpha in values}


def beside(loss, weights, shifts, scaled=True):
    """W2SVD beside a second loss, and, if scaled, DMD beside it with its gradient times 1 - alpha.

    As Adam undoes a common factor, the latter is DMD with the loss's weight over 1 - alpha.
    """
    cells = {}
    for weight in weights:
        for name, cell in alphas(shifts).items():
            cells[f"{loss} {weight:g} {name}"] = cell | {loss: weight}
        for alpha in shifts if weight and scaled else ():
            if alpha:
                cell = {"alpha_weak": 0.0, loss: weight, "dmd_scale": 1 - alpha}
                cells[f"{loss} {weight:g} DMD times {1 - alpha:g}"] = cell
    return cells


def halves(alpha):
    """alpha_weak in one of the two places alone where DMD's gradient reads the real DiT."""
    return {
        "numerator alone": {"alpha_weak": 0.0, "numerator": alpha},
        "denominator alone": {"alpha_weak": 0.0, "denominator": alpha},
    }


def controls(alpha, lr):
    """What might do the same as the shift: a smaller step, or half of the shift."""
    left = 1 - alpha
    return {
        "alpha 0": {"alpha_weak": 0.0},
        "gradient scaled": {"alpha_weak": 0.0, "dmd_scale": left},
        "rate scaled": {"alpha_weak": 0.0, "generator_lr": lr * left},
        **halves(alpha),
    }


FAKE_CONTROLS = {  # in place of the shift
    "alpha 0": {"alpha_weak": 0.0},
    "fake first": {"alpha_weak": 0.0, "waits": 30},  # an eighth of the run
    # by five times the preset's decay the fake's adapter ends about half as large
    "fake's decay": {"alpha_weak": 0.0, "fake_weight_decay": 0.5},
}


@dataclass(frozen=True)
class Group:
    """A question's runs: the cells, what all of their lanes share, and how many there are."""

    cells: dict
    shared: dict = field(default_factory=dict)  # beside the preset's
    data: str = "ring"
    replicas: int = 4  # lanes of a cell on each backbone
    seeds: range = range(201, 207)  # of a backbone each; no trial used them
    training: int = 0  # iterations of the backbone; the recipe's if 0
    mixture: tuple = ()  # arguments of the data's
    moved: float = 0.0  # how far the data lie from those that the backbone learnt
    probed: bool = False  # are the errors of both scores measured along the runs?


SMALL = {"batch": 64}  # in place of 1,536: the study is to be run on one core
INPUT = {"generator_input": "paired", "fake_samples": "all"}
PAIRED = {**SMALL, **INPUT}
SHORT = {"batch": 16, "iterations": 120}
CLIPS = {**PAIRED, **SHORT}
FAST, LAGGING = {"generator_lr": 4e-3, "fake_lr": 4e-3}, {"generator_lr": 4e-3, "fake_lr": 1e-3}
ONE = {"generator_lr": 1.5e-3, "fake_updates": 1, "reuse": 1}
NARROW = (8, 2**0.5, 0.05)  # modes a quarter as wide as the ring's
GROUPS = {  # in the order in which they run
    "gt": Group(beside("gt_weight", (0.0, 0.05, 0.2), (0.0, 0.5, 0.75)), PAIRED, replicas=2),
    "lagging": Group(alphas(), SMALL | LAGGING),
    "fast": Group(alphas(), SMALL | FAST, probed=True),
    "one": Group(alphas(), SMALL | ONE),
    "controls": Group(controls(0.5, 4e-3), SMALL | FAST, replicas=2, seeds=range(201, 213)),
    "small": Group(alphas(), SMALL),
    "videos": Group(
        beside("gt_weight", (0.05, 1.0), (0.0, 0.5)), CLIPS, "videos", 1, seeds=range(40, 45)
    ),
    "clips": Group(alphas((0.0, 0.25, 0.5)), CLIPS, "videos", 1, seeds=range(40, 45)),
    "again": Group(alphas((0.0, 0.25)), SMALL | LAGGING, seeds=range(207, 213)),
    "narrow again": Group(alphas(), SMALL, replicas=2, mixture=NARROW, seeds=range(207, 213)),
    "rollout": Group(alphas((0.0, 0.25, 0.5)), SHORT, "videos", 1, seeds=range(40, 45)),
    "narrow": Group(alphas(), SMALL, replicas=2, mixture=NARROW),
    "gan": Group(beside("gan_weight", (3.0,), (0.0, 0.5)), SMALL, replicas=2),
    "ladder": Group({}, SMALL, replicas=1, seeds=range(201, 205)),
    "step": Group(alphas(), SMALL | {"steps": 1}, replicas=2),
    "weak": Group(alphas(), SMALL, replicas=2, training=150),
    "moved": Group(alphas(), SMALL, replicas=2, moved=0.5**0.5),
    "full": Group(alphas(), SMALL | {"generator": "full", "generator_lr": 5e-4}, replicas=2),
    "two steps": Group(alphas(), SMALL | {"steps": 2}, replicas=2),
    "grid": Group(beside("gt_weight", (0.0, 0.05, 0.2), (0.0, 0.5)), PAIRED, "grid", 2),
    "fake": Group(FAKE_CONTROLS, SMALL | FAST, replicas=2, seeds=range(201, 213)),
    "ablation": Group(
        beside("gt_weight", (0.0, 0.05), ALPHAS, scaled=False),
        CLIPS,
        "videos",
        1,
        seeds=range(45, 50),
    ),
    "gan clips": Group(
        beside("gan_weight", (3.0,), (0.0, 0.5)), SHORT, "videos", 1, seeds=range(45, 50)
    ),
    "halves": Group(alphas((0.0, 0.75)) | halves(0.75), CLIPS, "videos", 1, seeds=range(45, 50)),
    "preset": Group(alphas((0.0, 0.25))),
}


RUNGS = {  # of the ladder, above particles: settings, and what evaluates the roles
    "exact scores": ({}, probes.ExactScores),
    "exact real": ({}, probes.ExactReal),
    "full fake": ({"fake": "full", "fake_weight_decay": 0.0}, StackedRoles),
    "LoRA fake (DMD)": ({}, StackedRoles),
    "W2SVD": ({"alpha_weak": 0.25}, StackedRoles),
}


def task_of(group, config, quick=False):
    """The group's data and backbone as a task of w2svd."""
    recipe = RECIPES[group.data]
    if group.training or quick:
        recipe = dataclasses.replace(recipe, iterations=50 if quick else group.training)
    learnt = mixture = getattr(mixtures, group.data)(*group.mixture)
    if group.moved:
        means = learnt.means + torch.tensor([group.moved, 0.0])
        mixture = mixtures.GaussianMixture(learnt.weights, means, learnt.rest)
    return Task(config, recipe, mixture, learnt)


def stacked(group, lanes, quick=False, roles=StackedRoles):
    """A stack of the lanes on the group's task, whose backbone is read or trained."""
    first = lanes[0].config
    task = task_of(group, dataclasses.replace(first, batch=first.batch * len(lanes)), quick)
    task.load()
    return Stack(task, lanes, roles=roles)


def run(group, seed, quick=False):
    """One job: {"lanes": {cell: [metrics of each lane]}, "along": errors along the run}."""
    names, lanes = [], []
    replicas = 1 if quick else group.replicas
    for name, cell in group.cells.items():
        settings = {**preset(group.data), **group.shared, "seed": seed}
        settings.update((k, v) for k, v in cell.items() if k not in KNOBS)
        settings.update(QUICK if quick else {})
        knobs = {k: v for k, v in cell.items() if k in KNOBS}
        names += [name] * replicas
        lanes += [Lane(w2svd.Config(**settings), **knobs)] * replicas
    stack, along = stacked(group, lanes, quick), []
    iterations = stack.config.iterations
    while stack.iteration < iterations:
        stack.iterate()
        if group.probed and stack.iteration % (iterations // 8) == 0:
            for name, row in zip(names, probes.errors(stack, seed)):
                along.append({"cell": name, "iteration": stack.iteration, **rounded(row)})
    lanes = measured(stack, group, names, seed, 512 if quick else None)
    done = {"lanes": lanes, "along": along, "linear": {}}
    for name, row in zip(names, probes.linearity(stack, seed)):
        done["linear"].setdefault(name, []).append(rounded(row))
    return done


def measured(stack, group, names, seed, n=None):
    """{name: [metrics of each lane]} of the averaged generators, each by noise of its own."""
    samples, _ = probes.students(stack, n or SAMPLES[group.data], seed + 1_000_000)
    measure, found = Metrics(stack.task.mixture, samples.shape[1]), {}
    for name, own in zip(names, samples):
        found.setdefault(name, []).append(rounded(measure(own), KEYS))
    return found


def climb(group, seed, quick=False):
    """The ladder's job: from samples that exact scores move to W2SVD, each rung's KL."""
    settings = {**preset("ring"), **group.shared, "seed": seed, "alpha_weak": 0.0}
    config = w2svd.Config(**settings | (QUICK if quick else {}))
    mixture = task_of(group, config, quick).mixture
    moved = probes.particles(mixture, config, seed)
    found = {"particles": [rounded(Metrics(mixture, len(moved))(moved), KEYS)]}
    for name, (more, roles) in RUNGS.items():
        lane = Lane(dataclasses.replace(config, **more))
        stack = stacked(group, [lane] * group.replicas, quick, roles)
        stack.roles.mixture, stack.roles.sigmas = mixture, stack.task.sigmas
        while stack.iteration < stack.config.iterations:
            stack.iterate()
        n = 512 if quick else None
        found |= measured(stack, group, [name] * group.replicas, seed, n)
    return {"lanes": found, "along": []}


def rounded(row, keys=None):
    """The row's numbers, or those of the keys that it has, to five places."""
    return {key: round(float(row[key]), 5) for key in keys or row if key in row}


def main():
    parser = argparse.ArgumentParser("python -m toy.study", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sketch of each group")
    parser.add_argument("--out", type=Path, help="[toy/study/results; runs/study if --quick]")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS), help="groups")
    options = parser.parse_args()
    out = options.out or (Path("runs/study") if options.quick else report.STORED)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(1)
    jobs = [
        (name, seed)
        for name in options.only
        for seed in (GROUPS[name].seeds[:2] if options.quick else GROUPS[name].seeds)
        if str(seed) not in results.get(name, {})
    ]
    for name, seed in tqdm(jobs, unit="job"):
        started = time.process_time()
        done = (run if GROUPS[name].cells else climb)(GROUPS[name], seed, options.quick)
        done["seconds"] = round(time.process_time() - started)
        results.setdefault(name, {})[str(seed)] = done
        w2svd.write_json(path, results)
        print(name, seed, done["seconds"], "s", flush=True)
    report.write(out)
    print(f"wrote {out}/tables.md{', a sketch that shows no effect' if options.quick else ''}")
