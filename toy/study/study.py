"""What does weak-to-strong matching do? Every number of toy/study/README.md, on a CPU.

    python -m toy.study              the core, 2 hours on 2 CPU cores; goes on where it stopped
    python -m toy.study --quick      the ring's at a twelfth of the size, in runs/study; 2 minutes
    python -m toy.study --full       with grid and the other off-data cases; the cost comes first

A JOB trains the lanes of one case, kind and seed side by side (stack.py) and measures each
against the exact mixture. Results go to study.json, one job at a time; report.py makes tables
and figures of it. Learning rates are chosen on a case's `tuning` seeds, which no table shows; the
other seeds train what a table or figure shows.
"""

import argparse
import dataclasses
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import w2svd
from toy import baselines
from toy.metrics import Metrics
from toy.study import report
from toy.study.cases import CASES, DMD, SAMPLES, TWO, W2S, config_of, task_of
from toy.study.stack import Stack
from w2svd import (
    add_noise,
    euler_sample,
    few_step_sigmas,
    generator_step,
    rollout_input,
    sample_sigma,
    x0_from_velocity,
)

QUICK = 12  # how many times smaller

# -------------------------------------------------------------------- kinds of jobs: which lanes

FULL = {"fake": "full", "alpha_weak": 0.0, "fake_weight_decay": 0.0}
PAIRED = {"generator_input": "paired", "fake_samples": "all"}
LCM = {"ema": 0.95}  # of the target too; peer: LCM. At the toy's .98 it learnt half as fast
LONG = 8  # lcm-long: updates for as many evaluations as DMD's, an LCM update costing an eighth
PLAIN = {"fake_weight_decay": 0.0, "lr_schedule": "constant"}  # without the preset's cures


def at_rates(case, *variants, fake_rates=(None,), rates=None):
    """Every variant at every learning rate of the grid, and at every fake_rate."""
    for variant in variants:
        for lr in rates or case.rates:
            for fake_lr in fake_rates:
                yield variant | {"generator_lr": lr} | ({"fake_lr": fake_lr} if fake_lr else {})


def sweep(case):
    """Learning rate x alpha_weak, and the controls: is W2S more than a smaller step?

    `scaled`: DMD whose gradient, or learning rate, is multiplied by 1 - alpha of a W2S lane.
    """
    video = case.data == "videos"
    alphas = [{"alpha_weak": a} for a in ((0.0, 0.25, 0.5) if video else (0.0, 0.25, 0.5, 0.75))]
    yield from at_rates(case, *alphas)
    if case.data == "grid":
        return  # its controls would cost half an hour of a core
    for lr in [case.middle] if video else TWO:
        for weak in alphas[1:]:
            left = 1 - weak["alpha_weak"]
            yield {**DMD, "generator_lr": lr, "scaled": ["gradient", left]}
            yield {**DMD, "generator_lr": lr * left, "scaled": ["rate", left]}
    if not video:
        yield from at_rates(case, *(a | PLAIN for a in alphas), rates=TWO)
    if not video and not case.off:
        yield from at_rates(case, *alphas, rates=[case.middle], fake_rates=(1e-4, 2.5e-3))


def schedules(case):
    """alpha_weak falling to 0 at half of the iterations."""
    every = [{"alpha_weak": a, "alpha_weak_schedule": "cosine"} for a in (0.25, 0.5, 0.75)]
    return at_rates(case, *every, rates=[case.middle])


def lagging(case):
    """All alphas at two rates, for settings in which the fake follows less well."""
    return at_rates(case, *({"alpha_weak": a} for a in (0.0, 0.25, 0.5, 0.75)), rates=TWO)


def both(case):
    return at_rates(case, DMD, W2S)


def dmd2(case):
    return at_rates(case, FULL, fake_rates=(2e-4, 1e-3))


def middle(case):
    return at_rates(case, *((DMD, W2S) if case.moved else (W2S,)), rates=[case.middle])


def gt(weight):
    return {**PAIRED, "gt_weight": weight}


KINDS = {  # what all lanes share, and the lanes
    "backbone": ({}, lambda case: ()),
    "dmd-4": ({}, sweep),
    "dmd-1": ({"steps": 1}, both),
    "dmd2-4": (FULL, dmd2),
    "dmd2-1": (FULL | {"steps": 1}, dmd2),
    "lcm": (LCM, lambda case: at_rates(case, {})),
    "lcm-long": (LCM, lambda case: at_rates(case, {})),
    "gt-0.05": (gt(0.05), lambda case: at_rates(case, W2S)),
    "gt-0": (PAIRED, middle),
    "gt-0.2": (gt(0.2), middle),
    "gt-1": (gt(1.0), middle),
    "gt-5": (gt(5.0), middle),
    "gt-20": (gt(20.0), middle),
    "exact": ({}, lambda case: at_rates(case, DMD)),  # its real DiT is the mixture itself
    "turn": ({}, middle),  # how alpha_weak turns the generator's gradient
    "ratio-1": ({"fake_updates": 1}, lagging),
    "rank-4": ({"lora_rank": 4}, lagging),
    "schedule": ({}, schedules),
    "all-exits": ({"fake_samples": "all"}, both),
    "paired": (PAIRED, both),
}
TABLE = ("backbone", "dmd-4", "dmd-1", "dmd2-4", "dmd2-1", "lcm", "gt-0.05")
OFF = ("backbone", "dmd-4", "exact", "turn")
MOVED = ("backbone", "paired", "gt-0.2", "gt-1", "gt-5", "gt-20")
TUNED = TABLE[1:] + ("lcm-long",)
SWEEP = tuple(kind for kind in KINDS if kind.startswith("gt-") and kind != "gt-0.05")


def jobs(full=False, quick=False):
    """(case, kind, seed), the tuning seeds first, then seed by seed."""
    core = {
        "ring": TABLE + ("lcm-long", "ratio-1", "exact", "turn"),
        "videos": TABLE + SWEEP + ("turn",),
        "weak": OFF,
    }
    if full:
        core["ring"] += ("rank-4", "schedule", "all-exits", "paired")
        core["videos"] += ("lcm-long",)
        core |= {"grid": TABLE, "narrow": OFF, "moved": MOVED}
    if quick:
        core = {"ring": TABLE}
    tuned = [
        (case, kind, seed)
        for case, kinds in core.items()
        if not CASES[case].off
        for kind in TUNED
        if kind in kinds
        for seed in CASES[case].tuning
    ]
    shown = [
        (case, kind, seed)
        for case, kinds in core.items()
        for seed in CASES[case].seeds
        for kind in kinds
    ]
    every = tuned + sorted(shown, key=lambda job: job[2])
    return [job for job in every if job[2] in (0, 1, 100)] if quick else every


# -------------------------------------------------------------------- one job


def measure_backbone(task, measure):
    """Metrics of Euler sampling on the student's grid, of the student's own sampling with the
    backbone in its place ('renoised': what a generator of posterior means gives), and of exact
    samples."""
    cond, noise = task.start(measure.n, seed=2)
    rows = {"floor": task.mixture.sample(measure.n, torch.Generator().manual_seed(3), cond)}
    for k in (1, 4, 28):
        grid = few_step_sigmas(k, task.config.shift)
        rows[str(k)] = euler_sample(task.backbone.velocity, noise, grid, cond)
    rows["renoised"] = task.few_step(task.backbone.velocity, task.sigmas, measure.n, seed=2)
    return {name: measure(x) for name, x in rows.items()}


@torch.no_grad()
def probe(task, stack, k, n):
    """Where the generator of lane k is now: is the real score wrong there, and does W2S mend it?

    At its samples, noised to each sigma: the rms error of x0_real at four alphas and of the plain
    backbone at real data; how W2S's difference x0_fake - x0_real compares with DMD's, in
    length and angle, and both with the difference from the exact x0.
    """
    one = stack.roles.one
    for role in ("generator", "fake"):
        one.load(role, stack.roles.lane(k, role))
    cond, _ = task.start(n, seed=4)
    x_gen = task.few_step(one.generator, task.sigmas, n, seed=4)
    rng = torch.Generator().manual_seed(6)
    x0 = task.mixture.sample(n, rng, cond)
    eps = torch.randn(x0.shape, generator=rng)

    def x0_of(velocity, x_t, sigma):
        return x0_from_velocity(x_t, velocity(x_t, torch.full((n,), sigma), cond), sigma)

    def rms(x):
        return x.square().mean().sqrt().item()

    def cosine(a, b):
        return torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()

    rows = []
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.9):
        x_t, x_data = add_noise(x_gen, eps, sigma), add_noise(x0, eps, sigma)
        exact, fake = x0_of(task.mixture.velocity, x_t, sigma), x0_of(one.fake, x_t, sigma)
        at_data = x0_of(one.real, x_data, sigma) - x0_of(task.mixture.velocity, x_data, sigma)
        row = {"sigma": sigma, "error_at_data": rms(at_data), "alphas": []}
        dmd = fake - x0_of(one.real, x_t, sigma)
        for alpha in (0.0, 0.25, 0.5, 0.75):
            one.alpha_weak = alpha
            real = x0_of(one.real, x_t, sigma)
            d = fake - real
            found = {"alpha": alpha, "error": rms(real - exact), "length": rms(d) / rms(dmd)}
            found |= {"cos_dmd": cosine(d, dmd), "cos_exact": cosine(d, fake - exact)}
            row["alphas"].append(found)
        one.alpha_weak = 0.0
        rows.append(row)
    return rows


def turn(task, stack, k, n):
    """How the gradient of lane k's generator turns and shrinks as alpha_weak grows.

    The gradient is that of `generator_step`, over all parameters and 8 n samples. `again` is the
    cosine of two at alpha 0 over different samples: 1 but for the finite number of them.
    """
    one, c = stack.roles.one, stack.configs[k]
    for role in ("generator", "fake"):
        one.load(role, stack.roles.lane(k, role))

    def gradient(alpha, first):
        one.alpha_weak = alpha
        for seed in range(first, first + 8):
            rngs = {name: torch.Generator().manual_seed(seed) for name in ("input", "exit", "loss")}
            cond, x0 = task.start(n, seed)  # a rollout reads x0's shape only
            x_in, sigma_in = rollout_input(one.generator, x0, cond, task.sigmas, rngs)
            sigma = sample_sigma(n, c.sigma_low, c.sigma_high, c.sigma_shift, rngs["loss"])
            eps = torch.randn(x0.shape, generator=rngs["loss"])
            generator_step(one, x_in, sigma_in, cond, sigma, eps)
        parameters = one.parameters("generator")
        g = torch.cat([p.grad.flatten() for p in parameters])
        for p in parameters:
            p.grad = None
        return g

    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=0).item()

    dmd, rows = gradient(0.0, 0), []
    for alpha in (0.25, 0.5, 0.75):
        g = gradient(alpha, 0)
        length = (g.norm() / dmd.norm()).item()
        rows.append({"alpha": alpha, "length": length, "cosine": cosine(g, dmd)})
    one.alpha_weak = 0.0
    return {"alphas": rows, "again": cosine(gradient(0.0, 8), dmd)}


def is_probed(lane, case):
    """DMD and W2S at a middle rate, all else as in the preset."""
    return lane in ({**DMD, "generator_lr": case.middle}, {**W2S, "generator_lr": case.middle})


def run(name, kind, seed, small=1, only=None):
    """Train and measure the lanes of a job, or of them `only` some; a dict for study.json.

    small: divides all sizes.
    """
    torch.set_num_threads(1)
    started, case = time.process_time(), CASES[name]
    iterations = case.iterations * (LONG if kind == "lcm-long" else 1) // small
    case = dataclasses.replace(case, iterations=iterations)
    shared, lanes = KINDS[kind][0], list(KINDS[kind][1](case))
    if only:
        lanes = [lane for lane in lanes if lane in only]
    if seed in case.tuning:  # rates are chosen among the methods, not among their controls
        lanes = [lane for lane in lanes if "scaled" not in lane and "lr_schedule" not in lane]
    configs = [config_of(case, seed, shared, lane) for lane in lanes or [{}]]
    batch = case.batch * max(1, len(lanes))
    task = task_of(case, dataclasses.replace(configs[0], batch=batch))
    made_by = w2svd.made_by()
    task.load()
    measure = Metrics(task.mixture, SAMPLES[case.data] // small)
    result = {"commit": made_by["commit"], "lanes": []}
    if kind == "backbone":
        result["methods"] = measure_backbone(task, measure)
    else:
        loop = baselines.lcm if "lcm" in kind else w2svd.distil
        stack = Stack(task, configs, [gradient_scale(lane) for lane in lanes], loop)
        if kind == "exact":
            stack.roles.real = task.mixture.velocity
        probes = train(task, stack, case, kind, lanes)
        for k, lane in enumerate(lanes):
            stack.roles.one.load("generator", {name: x[k] for name, x in stack.average.items()})
            metrics = {}
            for steps in (1, 4) if "lcm" in kind else (configs[0].steps,):
                grid = few_step_sigmas(steps, configs[0].shift)
                samples = task.few_step(stack.roles.one.generator, grid, measure.n, seed=2)
                metrics[str(steps)] = measure(samples)
            result["lanes"].append({**lane, "metrics": metrics} | probes.get(k, {}))
    return result | {"core_seconds": time.process_time() - started}


def gradient_scale(lane):
    what, factor = lane.get("scaled", ("", 1.0))
    return factor if what == "gradient" else 1.0


def train(task, stack, case, kind, lanes):
    """All iterations; the probes {lane number: {"early": ..., "late": ...}} of a sweep."""
    measured, n = {"dmd-4": (probe, 4096), "turn": (turn, 2048)}.get(kind, (None, 0))
    probed = [k for k, lane in enumerate(lanes) if measured and is_probed(lane, case)]
    probes = {k: {} for k in probed}
    n //= 8 if case.data == "videos" else 1
    at = {case.iterations // 12: "early", case.iterations: "late"}
    for i in range(1, case.iterations + 1):
        stack.iterate()
        for k in probed if i in at else ():
            probes[k][at[i]] = measured(task, stack, k, n)
    return probes


# -------------------------------------------------------------------- all jobs


SECONDS = {"ring": 8, "grid": 8, "videos": 32}  # of one core, for a lane; measured


def todo(results, wanted):
    """The jobs without a result, and about how many core-minutes they take."""
    left = [(c, k, s) for c, k, s in wanted if str(s) not in results.get(c, {}).get(k, {})]
    seconds = sum(SECONDS[CASES[c].data] * len(list(KINDS[k][1](CASES[c]))) for c, k, _ in left)
    return left, seconds / 60


def main():
    parser = argparse.ArgumentParser("python -m toy.study", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a twelfth of the size, two seeds")
    parser.add_argument("--full", action="store_true", help="grid and all off-data cases too")
    parser.add_argument("--out", type=Path, help="[toy/study/results; runs/study if --quick]")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="cases")
    options = parser.parse_args()
    out = options.out or Path("runs/study" if options.quick else "toy/study/results")
    out.mkdir(parents=True, exist_ok=True)
    path, small = out / "study.json", QUICK if options.quick else 1
    results = json.loads(path.read_text()) if path.exists() else {}
    wanted = [job for job in jobs(options.full, options.quick) if job[0] in options.only]
    left, minutes = todo(results, wanted)
    print(
        f"{len(left)} of {len(wanted)} jobs to do: about {minutes / small:.0f} core-minutes, "
        f"{minutes / small / 2:.0f} minutes on 2 cores"
    )
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # the workers', not this process's

    tuned = [job for job in left if job[2] in CASES[job[0]].tuning]
    bar = tqdm(total=len(left), unit="job")
    with bar, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for part in (tuned, [job for job in left if job not in tuned]):
            only = [report.needed(results, *job) for job in part]  # known once all are tuned
            futures = {pool.submit(run, *job, small, some): job for job, some in zip(part, only)}
            for done in as_completed(futures):
                case, kind, seed = futures[done]
                results.setdefault(case, {}).setdefault(kind, {})[str(seed)] = done.result()
                w2svd.write_json(path, results)
                bar.set_postfix_str(f"{case} {kind} seed {seed}")
                bar.update()
    report.write(out)
    print(f"{out}: study.json, tables.md, phase.png, controls.png, scores.png, gt.png")
