"""The paper's table at toy scale: every method has nine tries of its settings, then new backbones.

    python -m toy.study.paper          on one CPU core; goes on where it stopped

In 4 steps and in 1, on the ring and on clips. A method's TRIES run side by side on the backbones of
TUNING, one run each; the try of the lowest mean log KL runs on those of SEEDS, which no try has
seen. Euler has its best grid, of seven or four. The results go to results/paper.json.
"""

import itertools
import json
from pathlib import Path

import torch
from tqdm import tqdm

import w2svd
from toy.baselines import lcm
from toy.metrics import Metrics
from toy.study import report, study
from toy.study.stack import Lane, Stack
from toy.tasks import preset

STORED = Path(__file__).parent / "results/paper.json"
STEPS = (4, 1)
TUNING = range(100, 103)
SEEDS = {"ring": range(221, 227), "videos": range(45, 50)}
SIZE = {"ring": study.SMALL, "videos": study.SHORT}
LR_SCALE = {"ring": 1.0, "videos": 0.5}  # of all rates, as in the presets
DMD2 = {"generator": "full", "fake": "full", "alpha_weak": 0.0, "fake_weight_decay": 0.0}
LORA, FULL = (5e-4, 1e-3, 2e-3), (2e-4, 5e-4, 1e-3)  # rates of generators
RATES = {"generator_lr": LORA, "fake_lr": (1e-3, 2e-3, 4e-3)}
METHODS = {  # what differs from the preset, and the tries: three by three
    "LCM": ({}, {"generator_lr": (3e-3, 1e-2, 3e-2), "ema": (0.9, 0.95, 0.98)}),
    "DMD2": (DMD2 | {"gan_weight": 0.003}, {"generator_lr": FULL, "fake_lr": (5e-4, 1e-3, 2e-3)}),
    "W2SVD": ({}, RATES),
    "W2SVD, paired": (study.INPUT, RATES),
    "W2SVD, paired, GT loss": (study.INPUT, {"generator_lr": LORA, "gt_weight": (0.02, 0.05, 0.2)}),
}


def tries_of(method, data):
    """The nine settings of a method, each a dictionary."""
    names, values = zip(*METHODS[method][1].items())
    found = [dict(zip(names, both)) for both in itertools.product(*values)]
    return [
        {k: v * LR_SCALE[data] if k.endswith("_lr") else v for k, v in one.items()} for one in found
    ]


def runs(method, data, steps, seed, tries):
    """[metrics of each try] on the backbone of a seed, side by side."""
    settings = {**preset(data), **SIZE[data], **METHODS[method][0], "seed": seed, "steps": steps}
    lanes = [Lane(w2svd.Config(**settings | one)) for one in tries]
    batch = lanes[0].config.batch * len(lanes)
    group = study.Group({}, data=data)
    task = study.task_of(group, w2svd.Config(**settings | {"batch": batch}))
    task.load()
    stack = Stack(task, lanes, lcm if method == "LCM" else w2svd.distil)
    while stack.iteration < stack.config.iterations:
        stack.iterate()
    names = [str(k) for k in range(len(lanes))]
    return [run for (run,) in study.measured(stack, group, names, seed).values()]


def euler(data, steps, seed):
    """Metrics of the backbone by Euler, on its best grid."""
    config = w2svd.Config(**preset(data) | {"seed": seed})
    task = study.task_of(study.Group({}, data=data), config)
    task.load()
    measure = Metrics(task.mixture, study.SAMPLES[data])
    samples = task.euler(steps, task.best_shift(measure, steps), measure.n)
    return study.rounded(measure(samples), study.KEYS)


def main():
    torch.set_num_threads(1)
    results = json.loads(STORED.read_text()) if STORED.exists() else {}
    rows = itertools.product(SEEDS, STEPS, ("Euler", *METHODS))
    for data, steps, method in tqdm(list(rows), unit="row"):
        if steps == 1 and "paired" in method:
            continue  # its input is noise alone, as a rollout's, and has no truth
        key = f"{data}, {steps}, {method}"
        if key in results:
            continue
        row = {"runs": {}}
        if method == "Euler":
            for seed in SEEDS[data]:
                row["runs"][str(seed)] = [euler(data, steps, seed)]
        else:
            tries = tries_of(method, data)
            tuned = [runs(method, data, steps, seed, tries) for seed in TUNING]
            means = [report.log_kl(column) for column in zip(*tuned)]
            row["tries"] = [{**one, "log_kl": round(x, 4)} for one, x in zip(tries, means)]
            row["chosen"] = tries[means.index(min(means))]
            again = [row["chosen"]] * (2 if data == "ring" else 1)  # runs on each backbone
            for seed in SEEDS[data]:
                row["runs"][str(seed)] = runs(method, data, steps, seed, again)
        results[key] = row
        w2svd.write_json(STORED, results)
        print(key, row, flush=True)
    print(report.paper_table(results))


if __name__ == "__main__":
    main()
