"""Tables and figures of the study.

    python -m toy.study.report       reads study.json; writes tables.md and PNG files beside it

Every number is a mean over seeds with a 95 % interval by Student's t, which knows no bounds: that
of a share may pass 1. Two methods are compared by paired differences over the same seeds, which
share the backbone, the data and the order of exits; p is that of the exact sign-flip test, whose
least value is 2 / 2^seeds (.008 for 8, .125 for 4). No p is corrected for the number of tests.
Shares of runs that collapsed have Clopper-Pearson intervals. Learning rates are the best of the
grid on the tuning seeds.
"""

import argparse
import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, t

from toy import plots
from toy.study.cases import BASE, CASES, DMD, TWO, W2S

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "toy/study/results"
COLLAPSE_TV = 0.1  # weight_tv beyond this, or a mode without samples, is a collapse; 25 modes are
# never that even, so on the grid only a lost mode is
METRIC = {"2d": "sliced_w2", "videos": "clip_frechet"}  # chooses the rates; lower is better
FROZEN = 0.5  # a dynamic_degree below this is a collapse too
NOTE = (
    f"In a cell: runs that collapsed of all runs (a mode lost, or, but for the grid, weight_tv "
    f"above {COLLAPSE_TV:g}; videos: clip_frechet above that of 4 Euler steps,\nor "
    f"dynamic_degree below {FROZEN:g}); below, the mean sliced_w2 or clip_frechet of all runs."
)
COLUMNS = {
    "2d": ("sliced_w2", "precision", "coverage", "weight_tv"),
    "videos": ("clip_frechet", "frame_frechet", "dynamic_degree", "motion_smoothness"),
}
METHODS = [  # name, evaluations, kind of job, what its lanes have
    ("LCM", 1, "lcm", {}),
    ("LCM, 8 times the updates", 1, "lcm-long", {}),
    ("DMD, full fake", 1, "dmd2-1", {}),
    ("DMD, LoRA fake", 1, "dmd-1", DMD),
    ("W2SVD", 1, "dmd-1", W2S),
    ("LCM", 4, "lcm", {}),
    ("LCM, 8 times the updates", 4, "lcm-long", {}),
    ("DMD, full fake", 4, "dmd2-4", {}),
    ("DMD, LoRA fake", 4, "dmd-4", DMD),
    ("W2SVD", 4, "dmd-4", W2S),
    ("W2SVD, GT loss .05", 4, "gt-0.05", W2S),
]
GT_TUNED = "gt-0.05"
PLACES = {"sliced_w2": 3, "clip_frechet": 1, "frame_frechet": 2}


def interval(values):
    """(mean, low, high): 95 % interval of the mean over seeds, by Student's t."""
    values = np.asarray(list(values), float)
    mean, n = values.mean(), len(values)
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5
    return float(mean), float(mean - half), float(mean + half)


def sign_flip(values):
    """Exact two-sided p of paired differences around 0: of all 2^n flips of their signs, the share
    whose sum is at least as far from 0 as theirs."""
    values = np.asarray(list(values), float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))  # none flipped, first
    sums, rounding = np.abs(signs @ values), 1e-9 * np.abs(values).sum()
    return float(np.mean(sums >= sums[0] - rounding))


def share_interval(k, n):
    """(share, low, high): k of n with the 95 % Clopper-Pearson interval.

    It takes the runs as independent. Those of a seed share a backbone, so it may be too narrow:
    two shares are compared by `sign_flip` over seeds.
    """
    found = binomtest(k, n).proportion_ci(0.95, "exact")
    return k / n, float(found.low), float(found.high)


def bracketed(mean, low, high, places, sign=""):
    mean, low, high = (f"{x:{sign}.{places}f}" for x in (mean, low, high))
    return f"{mean} [{low}, {high}]"


def written(values, places=3):
    """'mean [low, high]'."""
    return bracketed(*interval(values), places)


def paired(values, places=3):
    """'mean [low, high], p' of paired differences."""
    values = list(values)
    return f"{bracketed(*interval(values), places, '+')}, p {sign_flip(values):.3f}"


def side(case):
    return "videos" if CASES[case].data == "videos" else "2d"


class Study:
    """The content of study.json, read by case, kind of job, seed and lane."""

    def __init__(self, results):
        self.results = results

    def seeds(self, case, kind):
        done = self.results.get(case, {}).get(kind, {})
        return [seed for seed in CASES[case].seeds if str(seed) in done]

    def settings(self, case, kind="dmd-4"):
        """What the lanes of a job are, each as its settings."""
        seed = self.seeds(case, kind)[0]
        return [settings_of(lane) for lane in self.results[case][kind][str(seed)]["lanes"]]

    def lane(self, case, kind, seed, settings):
        """The lane with exactly these settings."""
        for lane in self.results[case][kind][str(seed)]["lanes"]:
            if settings_of(lane) == settings:
                return lane
        raise KeyError(f"{case} {kind} {seed}: no lane {settings}")

    def values(self, case, kind, settings, metric, steps=4):
        """{seed: metric} of a lane."""
        return {
            seed: self.lane(case, kind, seed, settings)["metrics"][str(steps)][metric]
            for seed in self.seeds(case, kind)
        }

    def chosen(self, case, kind, having, steps):
        """The settings that are best on the tuning seeds, among lanes with `having`."""
        found, metric = {}, METRIC[side(case)]
        for seed in CASES[case].tuning:
            for lane in self.results[case][kind].get(str(seed), {"lanes": ()})["lanes"]:
                if having.items() <= lane.items():
                    key = json.dumps(settings_of(lane))
                    found.setdefault(key, []).append(lane["metrics"][str(steps)][metric])
        return json.loads(min(found, key=lambda key: np.mean(found[key])))

    def method(self, case, name, nfe, metric):
        """{seed: metric} of a row of the table, at its best rate."""
        _, steps, kind, having = next(m for m in METHODS if m[:2] == (name, nfe))
        return self.values(case, kind, self.chosen(case, kind, having, steps), metric, steps)

    def backbone(self, case, row, metric):
        done = self.results[case]["backbone"]
        return {s: done[str(s)]["methods"][row][metric] for s in self.seeds(case, "backbone")}


def stored():
    """The study of toy/study/results."""
    return Study(json.loads((STORED / "study.json").read_text()))


def needed(results, case, kind, seed):
    """The lanes of a job that a table shows, which are those at the chosen rates; None: all."""
    methods = [m for m in METHODS if m[2] == kind and kind != "dmd-4"]
    if seed in CASES[case].tuning or CASES[case].off or not methods:
        return None
    lanes = [Study(results).chosen(case, kind, having, nfe) for _, nfe, _, having in methods]
    if kind == GT_TUNED:  # the sweep of its weight is at one rate
        lanes.append({**W2S, "generator_lr": CASES[case].middle})
    return lanes


def settings_of(lane):
    return {k: v for k, v in lane.items() if k not in ("metrics", "early", "late")}


def differences(a, b):
    """a - b over the seeds that both have."""
    return [a[seed] - b[seed] for seed in a if seed in b]


def markdown(head, rows):
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


# -------------------------------------------------------------------- the tables


def table(study, case):
    """The paper's table."""
    columns, rows = COLUMNS[side(case)], []

    def row(name, nfe, values, rate=""):
        cells = [written(values(c).values(), PLACES.get(c, 3)) for c in columns]
        rows.append([name, nfe, rate, *cells])

    for nfe in (1, 4, 28):
        row("Euler", nfe, lambda c, k=nfe: study.backbone(case, str(k), c))
        if nfe == 4:
            row("backbone, predict and renoise", 4, lambda c: study.backbone(case, "renoised", c))
        for name, steps, kind, having in METHODS:
            if steps != nfe or not study.seeds(case, kind):
                continue
            best = study.chosen(case, kind, having, steps)
            rates = [f"{best[key]:g}" for key in ("generator_lr", "fake_lr") if key in best]
            values = functools.partial(study.method, case, name, nfe)
            row(name, nfe, values, ", ".join(rates))
    row("exact samples", "", lambda c: study.backbone(case, "floor", c))
    return markdown(["method", "NFE", "rate (fake's)", *columns], rows)


def claims(study, case):
    """W2SVD, and DMD with the same LoRA fake, minus each other method, paired, at best rates."""
    columns, rows = COLUMNS[side(case)], []
    for nfe in (1, 4):
        names = [m[0] for m in METHODS if m[1] == nfe and study.seeds(case, m[2])]
        pairs = [("W2SVD", name) for name in names if name != "W2SVD"]
        others = [name for name in names if name.startswith(("LCM", "DMD, full"))]
        for one, other in pairs + [("DMD, LoRA fake", name) for name in others]:
            cells = []
            for column in columns:
                values = [study.method(case, name, nfe, column) for name in (one, other)]
                cells.append(paired(differences(*values), PLACES.get(column, 3)))
            rows.append([f"{one} - {other}", nfe, *cells])
    return markdown(["paired difference", "NFE", *columns], rows)


def collapsed(study, case, seed, metrics):
    if side(case) == "2d":
        uneven = metrics["weight_tv"] > COLLAPSE_TV and CASES[case].data != "grid"
        return metrics["coverage"] < 1 or uneven
    euler = study.backbone(case, "4", "clip_frechet")[seed]
    return metrics["clip_frechet"] > euler or metrics["dynamic_degree"] < FROZEN


def exact_table(study, case):
    """How much of a miss is the real score's: DMD with the mixture's own score in its place."""
    metric, rows = METRIC[side(case)], []
    for exact in study.settings(case, "exact"):
        ideal = study.values(case, "exact", exact, metric)
        dmd = study.values(case, "dmd-4", exact, metric)
        w2s = study.values(case, "dmd-4", {**exact, **W2S}, metric)
        cells = [written(x.values()) for x in (ideal, dmd, w2s)]
        cells += [paired(differences(x, ideal)) for x in (dmd, w2s)]
        rows.append([f"{exact['generator_lr']:g}", *cells])
    head = ["rate", f"{metric}: exact real score", "DMD", "W2S .25"]
    return markdown([*head, "DMD - exact", "W2S .25 - exact"], rows)


def maps(study, case):
    """(title, lanes, axis, kind) of each map of alpha_weak against a learning rate."""
    lanes = study.settings(case)
    base = [x for x in lanes if set(x) == {"alpha_weak", "generator_lr"}]
    plain = [x for x in lanes if "lr_schedule" in x]
    fakes = [x for x in lanes if "fake_lr" in x]
    fakes += [x for x in base if fakes and x["generator_lr"] == TWO[0]]
    yield f"{case}, base settings", base, "generator_lr", "dmd-4"
    if plain:
        yield f"{case}, constant rates, no decay", plain, "generator_lr", "dmd-4"
    if fakes:
        yield f"{case}, generator_lr {TWO[0]:g}", fakes, "fake_lr", "dmd-4"
    for kind, title in (("ratio-1", "one fake update, not five"), ("rank-4", "rank 4, not 16")):
        if study.seeds(case, kind):
            yield f"{case}, {title}", study.settings(case, kind), "generator_lr", kind


def bad_runs(study, case, kind, lanes):
    """{seed: how many of the lanes' runs collapsed}."""
    bad = {}
    for seed in study.seeds(case, kind):
        runs = [study.lane(case, kind, seed, x)["metrics"]["4"] for x in lanes]
        bad[seed] = sum(collapsed(study, case, seed, run) for run in runs)
    return bad


def collapse_cells(bad, base, lanes):
    """'k of n', the share, and how many more than `base`, paired by seed; `lanes` runs a seed."""
    k, n = sum(bad.values()), lanes * len(bad)
    shift = np.array(differences(bad, base)) / lanes
    against = "" if bad is base else f"{shift.mean():+.2f}, p {sign_flip(shift):.3f}"
    return [f"{k} of {n}", bracketed(*share_interval(k, n), 2), against]


def collapse_table(study, case):
    """How many runs collapsed, over all rates of a map; against alpha_weak 0."""
    rows = []
    for title, lanes, _, kind in maps(study, case):
        base = None
        for alpha in sorted({lane["alpha_weak"] for lane in lanes}):
            own = [lane for lane in lanes if lane["alpha_weak"] == alpha]
            bad = bad_runs(study, case, kind, own)
            base = bad if base is None else base
            rows.append([title, f"{alpha:g}", *collapse_cells(bad, base, len(own))])
    return markdown(["setting", "alpha_weak", "collapsed", "share", "against 0"], rows)


def collapse_in_the_plane(study):
    """The same over all maps but that of videos, every run counted once."""
    cases = [c for c in study.results if side(c) == "2d" and study.seeds(c, "dmd-4")]
    every = {}
    for case in cases:
        for _, lanes, _, kind in maps(study, case):
            every |= {(case, kind, json.dumps(lane, sort_keys=True)): lane for lane in lanes}
    rows, base = [], None
    for alpha in sorted({lane["alpha_weak"] for lane in every.values()}):
        own = [(key, lane) for key, lane in every.items() if lane["alpha_weak"] == alpha]
        parts = [bad_runs(study, case, kind, [lane]) for (case, kind, _), lane in own]
        bad = {seed: sum(part[seed] for part in parts) for seed in parts[0]}
        base = bad if base is None else base
        rows.append([f"{alpha:g}", *collapse_cells(bad, base, len(own))])
    return markdown(["alpha_weak", "collapsed", "share", "against 0"], rows)


def equal_rates(study):
    """W2SVD against DMD with the same LoRA fake, in 4 steps, at every rate that both had."""
    rows = []
    for case in [case for case in study.results if study.seeds(case, "dmd-4")]:
        metric = METRIC[side(case)]
        places = PLACES[metric]
        base = [x for x in study.settings(case) if set(x) == {"alpha_weak", "generator_lr"}]
        for lane in sorted(base, key=lambda x: (x["alpha_weak"], x["generator_lr"])):
            if not lane["alpha_weak"]:
                continue
            w2s = study.values(case, "dmd-4", lane, metric)
            dmd = study.values(case, "dmd-4", {**lane, **DMD}, metric)
            change = differences(w2s, dmd)
            percent = 100 * np.mean(change) / np.mean(list(dmd.values()))
            cells = [written(dmd.values(), places), written(w2s.values(), places)]
            cells += [paired(change, places), f"{percent:+.0f} %"]
            settings = [f"{lane['generator_lr']:g}", f"{lane['alpha_weak']:g}"]
            rows.append([case, metric, *settings, *cells])
    head = ["data", "distance", "rate", "alpha_weak", "DMD, LoRA fake", "W2SVD"]
    return markdown([*head, "W2SVD - DMD", "of DMD's"], rows)


def phase(study, case, title, lanes, axis, kind):
    """A heat map of the collapse rate, for plots.heatmaps."""
    default = {"generator_lr": None, "fake_lr": BASE["ring"]["fake_lr"]}[axis]

    def place(x):
        return x["alpha_weak"], x.get(axis, default)

    alphas, rates = (sorted({place(x)[k] for x in lanes}) for k in (0, 1))
    shares, texts = ([[None] * len(rates) for _ in alphas] for _ in range(2))
    for x in lanes:
        i, j = alphas.index(place(x)[0]), rates.index(place(x)[1])
        bad = bad_runs(study, case, kind, [x]).values()
        shares[i][j] = sum(bad) / len(bad)
        mean = np.mean(list(study.values(case, kind, x, METRIC[side(case)]).values()))
        texts[i][j] = f"{sum(bad)}/{len(bad)}\n{mean:.{PLACES[METRIC[side(case)]]}f}"
    return title, axis, [f"{r:g}" for r in rates], [f"{a:g}" for a in alphas], shares, texts


def control_rows(study, case, metric):
    """(name, W2S - control, paired, by seed), for each alpha and rate."""
    for scaled in (x for x in study.settings(case) if "scaled" in x):
        what, left = scaled["scaled"]
        lr = scaled["generator_lr"] / (left if what == "rate" else 1)
        lr = min(CASES[case].rates, key=lambda rate: abs(rate - lr))
        ours = study.values(case, "dmd-4", {"alpha_weak": 1 - left, "generator_lr": lr}, metric)
        plain = study.values(case, "dmd-4", {**DMD, "generator_lr": lr}, metric)
        theirs = study.values(case, "dmd-4", scaled, metric)
        yield 1 - left, lr, what, differences(ours, theirs), differences(ours, plain)


def controls(study, case):
    """W2S against DMD, and against DMD with a smaller gradient or a smaller rate."""
    metrics = {"2d": ("sliced_w2", "weight_tv"), "videos": ("clip_frechet", "dynamic_degree")}
    metrics, cells = metrics[side(case)], {}
    for metric in metrics:
        for alpha, lr, what, scaled, plain in control_rows(study, case, metric):
            places = PLACES.get(metric, 3)
            cells.setdefault((lr, alpha), {})[metric, what] = paired(scaled, places)
            cells[lr, alpha][metric, "plain"] = paired(plain, places)
    order = [(m, w) for m in metrics for w in ("plain", "gradient", "rate")]
    names = {"plain": "DMD", "gradient": "gradient scaled", "rate": "rate scaled"}
    rows = [
        [f"{lr:g}", f"{alpha:g}", *(cell[key] for key in order)]
        for (lr, alpha), cell in sorted(cells.items())
    ]
    return markdown(["rate", "alpha_weak", *(f"{m}: against {names[w]}" for m, w in order)], rows)


def probed(study, case, when, key, alpha, lane_alpha=0.25):
    """(sigmas, [one list over seeds for each sigma]) of a number of the probes."""
    settings = {"alpha_weak": lane_alpha, "generator_lr": CASES[case].middle}
    runs = [study.lane(case, "dmd-4", seed, settings)[when] for seed in study.seeds(case, "dmd-4")]
    sigmas = [row["sigma"] for row in runs[0]]
    if key == "error_at_data":
        return sigmas, [[run[i][key] for run in runs] for i in range(len(sigmas))]
    return sigmas, [
        [next(a for a in run[i]["alphas"] if a["alpha"] == alpha)[key] for run in runs]
        for i in range(len(sigmas))
    ]


def scores(study, case):
    """Is the real score wrong where the generator is, and does the weak shift mend it?"""
    rows = []
    for when in ("early", "late"):
        for alpha in (0.0, 0.25, 0.5, 0.75):
            keys = ("error", "length", "cos_dmd", "cos_exact")
            error, *others = (np.mean(probed(study, case, when, k, alpha)[1], axis=0) for k in keys)
            away = error - probed_backbone(study, case, when)
            cells = [written(error), paired(away) if alpha else "", *map(written, others)]
            rows.append([when, f"{alpha:g}", *cells])
        data = np.mean(probed(study, case, when, "error_at_data", 0)[1], axis=0)
        rows.append([when, "backbone at real data", written(data), "", "", "", ""])
    head = ["when", "alpha_weak", "error of x0_real", "minus the backbone's"]
    return markdown([*head, "length / DMD's", "cos with DMD's", "cos with the exact"], rows)


def probed_backbone(study, case, when):
    return np.mean(probed(study, case, when, "error", 0.0)[1], axis=0)


GT = [  # 'not at sigma 1' is of stored results alone
    ("0", "gt-0"),
    (".05", "gt-0.05"),
    (".2", "gt-0.2"),
    ("1", "gt-1"),
    ("5", "gt-5"),
    ("20", "gt-20"),
    (".05, not at sigma 1", "gt-0.05-skip"),
    (".2, not at sigma 1", "gt-0.2-skip"),
    ("1, not at sigma 1", "gt-1-skip"),
    ("20, not at sigma 1", "gt-20-skip"),
]


def gt_values(study, case, kind, metric, alpha=W2S):
    return study.values(case, kind, {**alpha, "generator_lr": CASES[case].middle}, metric)


def gt_table(study, case="videos"):
    """The GT loss: picture quality against motion."""
    rows, against = [], ("frame_frechet", "dynamic_degree")
    base = {c: gt_values(study, case, "gt-0", c) for c in against}
    for name, kind in [(name, kind) for name, kind in GT if study.seeds(case, kind)]:
        values = {c: gt_values(study, case, kind, c) for c in COLUMNS["videos"]}
        cells = [written(v.values(), PLACES.get(c, 3)) for c, v in values.items()]
        shifts = [
            paired(differences(values[c], base[c]), PLACES.get(c, 3)) if kind != "gt-0" else ""
            for c in against
        ]
        rows.append([name, *cells, *shifts])
    return markdown(["GT weight", *COLUMNS["videos"], *(f"{c} against 0" for c in against)], rows)


def moved_table(study, case="moved"):
    """Data that the backbone never saw: what pulls the student to them?"""
    rows = []
    for steps in ("4", "28"):
        cells = [written(study.backbone(case, steps, c).values()) for c in COLUMNS["2d"]]
        rows.append([f"backbone, Euler {steps}", "", *cells, ""])
    for name, kind in [("0", "paired"), *GT]:
        if not study.seeds(case, kind):
            continue
        for alpha in (DMD, W2S):
            values = {c: gt_values(study, case, kind, c, alpha) for c in COLUMNS["2d"]}
            base = gt_values(study, case, kind, "sliced_w2", DMD)
            shift = paired(differences(values["sliced_w2"], base)) if alpha != DMD else ""
            cells = [written(v.values()) for v in values.values()]
            rows.append([f"GT weight {name}", f"{alpha['alpha_weak']:g}", *cells, shift])
    return markdown(["student", "alpha_weak", *COLUMNS["2d"], "sliced_w2 against 0"], rows)


def variants(study, case="ring"):
    """Our defaults against what else they could be, paired, all else equal."""
    rows = []
    names = {"schedule": "", "all-exits": "the fake learns all exits"}
    for kind, name in {**names, "paired": "paired input, all exits"}.items():
        for lane in study.settings(case, kind) if study.seeds(case, kind) else ():
            default = {k: lane[k] for k in ("alpha_weak", "generator_lr")}
            cells = []
            for metric in ("sliced_w2", "weight_tv"):
                values = study.values(case, kind, lane, metric)
                base = study.values(case, "dmd-4", default, metric)
                cells += [written(values.values()), paired(differences(values, base))]
            title = name or f"alpha_weak falls to 0, {lane['alpha_weak_schedule']}"
            rows.append([title, f"{lane['generator_lr']:g}", f"{lane['alpha_weak']:g}", *cells])
    head = ["instead of the default", "rate", "alpha_weak"]
    head += ["sliced_w2", "against the default", "weight_tv", "against the default"]
    return markdown(head, rows)


def turns(study, case):
    """How alpha_weak turns and shrinks the gradient of the generator's parameters."""
    rows, lane = [], {**W2S, "generator_lr": CASES[case].middle}
    for when in ("early", "late"):
        runs = [study.lane(case, "turn", seed, lane)[when] for seed in study.seeds(case, "turn")]
        again = written([run["again"] for run in runs])
        for k, row in enumerate(runs[0]["alphas"]):
            every = [run["alphas"][k] for run in runs]
            cells = [written([x[key] for x in every]) for key in ("length", "cosine")]
            rows.append([when, f"{row['alpha']:g}", *cells, again])
    head = ["when", "alpha_weak", "length / DMD's", "cos with DMD's"]
    return markdown([*head, "DMD's with itself, other samples"], rows)


def costs(study):
    """Core-minutes of each case and kind, all seeds."""
    rows = []
    for case, kinds in study.results.items():
        for kind, seeds in kinds.items():
            minutes = sum(run["core_seconds"] for run in seeds.values()) / 60
            lanes = sum(len(run["lanes"]) for run in seeds.values())
            rows.append([case, kind, len(seeds), lanes, f"{minutes:.1f}"])
    lanes, minutes = sum(row[3] for row in rows), sum(float(row[4]) for row in rows)
    rows.append(["all", "", "", lanes, f"{minutes:.0f}"])
    return markdown(["case", "kind", "seeds", "runs", "core-minutes"], rows)


# -------------------------------------------------------------------- files


def figures(study, out):
    """phase.png, controls.png, scores.png, gt.png: what study.json has data for."""
    cases = [case for case in study.results if study.seeds(case, "dmd-4")]
    panels = [phase(study, case, *group) for case in cases for group in maps(study, case)]
    plots.heatmaps(out / "phase.png", panels, "alpha_weak", NOTE)
    groups = []
    for case in cases:
        metric = METRIC[side(case)]
        rows = [
            (f"W2S {alpha:g} at {lr:g}, {what}", *interval(scaled))
            for alpha, lr, what, scaled, _ in control_rows(study, case, metric)
        ]
        groups += [(f"{case}: {metric}", rows)] if rows else []
    plots.forest(out / "controls.png", groups, "W2S - scaled DMD\nbelow 0: W2S is better")
    plots.curves(out / "scores.png", *score_panels(study, cases))
    if study.seeds("videos", "gt-20"):
        panels = [("videos, paired input", gt_series(study))]
        labels = "dynamic degree (the data's is 1)", "frame Fréchet (lower is better)"
        plots.trade(out / "gt.png", panels, *labels)


def score_panels(study, cases):
    panels, labels = [], []
    for case in cases:
        lines = [("backbone at real data", "error_at_data", 0.0)]
        lines += [(f"alpha_weak {a:g}", "error", a) for a in (0.0, 0.25, 0.75)]
        drawn = []
        for name, key, alpha in lines:
            sigmas, values = probed(study, case, "late", key, alpha)
            drawn.append((name, sigmas, *np.transpose([interval(v) for v in values])))
        panels.append((f"{case}, end of training", drawn))
        labels.append("" if labels else "rms error of x0_real at generator's samples")
    return panels, "sigma", labels


def gt_series(study, case="videos"):
    def point(name, kind):
        x, y = (gt_values(study, case, kind, m) for m in ("dynamic_degree", "frame_frechet"))
        return name, interval(list(x.values())), interval(list(y.values()))

    stored = [(name, kind) for name, kind in GT if study.seeds(case, kind)]
    all_levels = [point(name, kind) for name, kind in stored if "skip" not in kind]
    skipped = [point(name.split(",")[0], kind) for name, kind in stored if "skip" in kind]
    series = [("at all levels", all_levels)]
    if skipped:
        series.append(("not at sigma 1", [all_levels[0], *skipped]))
    return series


def sections(study):
    """{title: table} of everything that study.json has."""
    parts = {}
    for case in study.results:
        if study.seeds(case, "lcm"):
            parts[f"{case}: methods"] = table(study, case)
            parts[f"{case}: paired differences"] = claims(study, case)
        if study.seeds(case, "dmd-4"):
            parts[f"{case}: collapse"] = collapse_table(study, case)
            if list(control_rows(study, case, METRIC[side(case)])):
                parts[f"{case}: W2S minus DMD and its controls"] = controls(study, case)
            parts[f"{case}: the real score at the generator's samples"] = scores(study, case)
        if study.seeds(case, "turn"):
            parts[f"{case}: the generator's gradient"] = turns(study, case)
        if study.seeds(case, "exact"):
            parts[f"{case}: with the exact real score"] = exact_table(study, case)
    if study.seeds("ring", "dmd-4"):
        parts["all in the plane: collapse"] = collapse_in_the_plane(study)
    parts["all: W2SVD minus DMD at equal rates"] = equal_rates(study)
    if study.seeds("videos", "gt-20"):
        parts["videos: the GT loss"] = gt_table(study)
    if study.seeds("ring", "schedule"):
        parts["ring: the defaults"] = variants(study)
    if study.seeds("moved", "gt-20"):
        parts["moved: the GT loss"] = moved_table(study)
    return parts | {"cost": costs(study)}


PLACE = r"(?<=<!-- )(?!end -->)([^/\n]+?)(?: / ([^\n]+?))?( -->\n).*?(?=<!-- end -->)"


def filled(text, parts):
    """Text whose '<!-- title / rows -->' ... '<!-- end -->' hold that table, or the rows of it in
    which the regular expression `rows` is found."""

    def table_of(place):
        title, rows, _ = place.groups()
        head, rule, *lines = parts[title].splitlines()
        lines = [line for line in lines if re.search(rows or "", line)]
        mark = f"{title} / {rows}" if rows else title
        return "\n".join([f"{mark} -->", "", head, rule, *lines, "", ""])

    return re.sub(PLACE, table_of, text, flags=re.S)


def write_tables(folder):
    """tables.md beside a study.json; for the stored one also the tables of its README."""
    study = Study(json.loads((folder / "study.json").read_text()))
    parts = sections(study)
    text = "\n".join(f"## {title}\n\n{part}\n" for title, part in parts.items())
    (folder / "tables.md").write_text(text, encoding="utf-8")
    if folder.resolve() == STORED:
        readme = STORED.parent / "README.md"
        before = readme.read_text(encoding="utf-8")
        readme.write_text(filled(before, parts), encoding="utf-8")
    return study


def write(folder):
    """The tables, and the figures beside them."""
    figures(write_tables(folder), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("toy/study/results"))
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
