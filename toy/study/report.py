"""Tables and figures of the study's stored results, toy/study/results/study.json.

A backbone is the unit: a cell's runs on it become one number, intervals are Student's t over
backbones, and two cells are compared on the same ones. KLs are compared by their logarithms, so a
difference is a ratio of geometric means.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from toy import plots

STORED = Path(__file__).parent / "results"
DRIFT = 0.2  # a run with a larger KL has drifted
TABLES = {  # the groups of each, and what it is about
    "beside": (
        ("gt", "grid", "gan", "videos", "gan clips"),
        "W2SVD beside a second loss of weight w",
    ),
    "stability": (
        ("small", "fast", "lagging", "again", "one", "preset"),
        "no second loss, on the ring",
    ),
    "controls": (("controls", "fake"), "what might do as the shift; settings of `fast`"),
    "off": (
        ("narrow", "narrow again", "weak", "moved", "step", "two steps", "full"),
        "where the real score is wrong; in one step and two; a full generator",
    ),
    "clips": (("clips", "rollout"), "no second loss, on clips, by paired input and by rollout"),
    "ablation": (
        ("ablation", "halves"),
        "the paper's, on clips by paired input; halves of a shift",
    ),
    "ladder": (("ladder",), "from exact scores to learnt ones, each over the rung before"),
}
CLIPS = ("videos", "clips", "rollout", "ablation", "halves", "gan clips")
# where DMD itself is farther than a drift
FAR = (*CLIPS, "gt", "grid", "narrow", "narrow again", "step", "two steps", "weak", "moved")
REGIMES = ("small", "fast", "lagging", "one")


def stored(name="study"):
    return json.loads((STORED / f"{name}.json").read_text())


# ---- statistics ----------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over backbones, half of its 95 % interval, and the p of its being 0."""

    mean: float
    half: float
    p: float

    @property
    def apart(self):
        """Is 0 outside of the interval?"""
        return abs(self.mean) > self.half

    def ratio(self):
        """Of a difference of logarithms: the ratio, and its interval."""
        low, high = (math.exp(self.mean + sign * self.half) for sign in (-1, 1))
        return f"{math.exp(self.mean):.2f} [{low:.2f}, {high:.2f}]"

    def text(self, places):
        return f"{self.mean:z.{places}f} ± {self.half:.{places}f}"


def estimate(values):
    """Of one number for each backbone, at least two, by Student's t."""
    mean, n = statistics.mean(values), len(values)
    error = max(statistics.stdev(values) / n**0.5, 1e-12)
    p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    return Estimate(mean, stats.t.ppf(0.975, n - 1) * error, float(p))


def log_kl(runs):
    """The mean log of a few runs' KLs; each counts as .001 at least, as exact samples' are 0."""
    return statistics.mean(math.log(max(run["kl"], 1e-3)) for run in runs)


def degree(runs):
    """How much clips move, over the data."""
    return statistics.mean(run["dynamic_degree"] for run in runs)


def of_cell(jobs, cell, of):
    """of(a cell's runs on a backbone), a list over backbones."""
    return [of(job["lanes"][cell]) for job in jobs.values()]


def apart(jobs, cell, other, of=log_kl):
    """of() of a cell minus another's, on the same backbones: a list over them."""
    pairs = zip(of_cell(jobs, cell, of), of_cell(jobs, other, of), strict=True)
    return [a - b for a, b in pairs]


def compare(jobs, cell, other, of=log_kl):
    """cell - other, on the same backbones."""
    return estimate(apart(jobs, cell, other, of))


def alphas_of(jobs, start=""):
    """alpha_weak of the cells whose names begin so."""
    cells = [
        cell for cell in next(iter(jobs.values()))["lanes"] if cell.startswith(f"{start}alpha")
    ]
    return [float(cell.split()[-1]) for cell in cells]


def holm(ps):
    """Holm's corrected p of each of several tests."""
    order, corrected, worst = sorted(range(len(ps)), key=lambda i: ps[i]), [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = worst
    return corrected


def logistic(results):
    """How the log odds of a drift change for each unit of alpha_weak, in all regimes together.

    An intercept for each regime, one slope; errors by the sandwich over backbones, which the
    regimes share, so that runs on one backbone may resemble each other.
    """
    groups, rows = [group for group in REGIMES if group in results], []
    for group in groups:
        for seed, job in results[group].items():
            for cell in (c for c in job["lanes"] if c.startswith("alpha")):
                x = [*(float(group == other) for other in groups), float(cell.split()[1])]
                rows += [(x, run["kl"] > DRIFT, seed) for run in job["lanes"][cell]]
    x, y = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])

    def loss(beta):  # a weak pull to 0: without one drift in a regime there is no maximum
        return np.logaddexp(0, x @ beta).sum() - y @ x @ beta + 0.005 * beta @ beta

    beta = optimize.minimize(loss, np.zeros(x.shape[1])).x
    p = 1 / (1 + np.exp(-x @ beta))
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(x.shape[1]))
    scores = {}
    for row, score in zip(rows, x * (y - p)[:, None]):
        scores[row[2]] = scores.get(row[2], 0) + score
    meat, n = sum(np.outer(score, score) for score in scores.values()), len(scores)
    error = math.sqrt((bread @ meat @ bread)[-1, -1] * n / (n - 1))
    p_value = 2 * stats.t.sf(abs(beta[-1]) / error, n - 1)
    return Estimate(float(beta[-1]), float(stats.t.ppf(0.975, n - 1) * error), float(p_value))


# ---- comparisons and tables ----------------------------------------------------------------------


def pairs(results):
    """(group, cell, other) of every comparison: what a cell's KL is divided by."""
    for group, jobs in results.items():
        cells = list(next(iter(jobs.values()))["lanes"])
        for before, cell in zip([None, *cells], cells):
            start, shifted, alpha = cell.rpartition("alpha ")
            if group == "ladder":
                yield from [(group, cell, before)] if before not in (None, "particles") else ()
                continue
            if cell == f"{start}alpha 0" or "DMD times" in cell:
                continue  # DMD itself
            if shifted and (scaled := f"{start}DMD times {1 - float(alpha):g}") in cells:
                yield group, cell, scaled
            yield group, cell, f"{start}alpha 0"


def pooled(results, against):
    """W2SVD beside the GT loss over DMD, in log KL, all weights and alphas of a backbone as one.

    against: 'DMD', of weight w / (1 - alpha_weak), or 'alpha 0', of weight w.
    """
    jobs = results["gt"]
    keys = [key for key in pairs({"gt": jobs}) if against in key[2] and " 0 " not in key[1]]
    values = [
        [a - b for a, b in zip(of_cell(jobs, cell, log_kl), of_cell(jobs, other, log_kl))]
        for _, cell, other in keys
    ]
    return estimate([statistics.mean(column) for column in zip(*values)])


def over_all_dmd(results, cell):
    """A control's log KL - the mean of the three cells that are DMD to Adam, over backbones."""
    jobs = results["controls"]
    dmd = [of_cell(jobs, name, log_kl) for name in ("alpha 0", "gradient scaled")]
    dmd.append(of_cell(results["fake"], "alpha 0", log_kl))
    return [a - statistics.mean(rest) for a, *rest in zip(of_cell(jobs, cell, log_kl), *dmd)]


def comparisons(results):
    """{(group, cell, other): (the estimate in log KL, p by Holm over W2SVD against DMD)}."""
    found = {key: compare(results[key[0]], *key[1:]) for key in pairs(results)}
    ours = [key for key in found if "alpha" in key[1]]
    corrected = dict(zip(ours, holm([found[key].p for key in ours])))
    return {key: (estimate, corrected.get(key)) for key, estimate in found.items()}


def table(results, groups):
    """Every cell of the groups: drifts, KL, and the KL over what it is compared with.

    Of clips the motion too; and what the shift makes of DMD's difference, where it was measured.
    """
    found, groups = comparisons(results), [group for group in groups if group in results]
    head = ["runs", "cell", "drifts", "KL", "compared with", "KL / its KL", "p by Holm"]
    lines = [[*head, "motion - its motion", "length, cosine of the difference"]]
    for group in groups:
        jobs = results[group]
        for cell in next(iter(jobs.values()))["lanes"]:
            runs = [run for job in jobs.values() for run in job["lanes"][cell]]
            drifts = f"{sum(run['kl'] > DRIFT for run in runs)} of {len(runs)}"
            drifts = "" if group in FAR else drifts
            start = [group, cell, drifts, estimate(of_cell(jobs, cell, log_kl)).ratio()]
            for other in [key[2] for key in found if key[:2] == (group, cell)] or [None]:
                row = [*start, *[""] * 5]
                if other:
                    ratio, p = found[group, cell, other]
                    row[4:7] = other, ratio.ratio(), "" if p is None else f"{p:.3f}"
                if other and group in CLIPS:
                    row[7] = compare(jobs, cell, other, degree).text(3)
                row[8] = linear(jobs, cell)
                lines.append(row)
    used = [k for k in range(len(lines[0])) if any(line[k] for line in lines[1:])]
    return markdown([[line[k] for k in used] for line in lines])


def linear(jobs, cell):
    """By how much the shift shortens DMD's difference, and their cosine; as text."""
    rows = [row for job in jobs.values() for row in job.get("linear", {}).get(cell, ())]
    return ", ".join(
        f"{statistics.mean(row[k] for row in rows):.2f}" for k in (rows[0] if rows else ())
    )


def paper_comparisons(results, against="W2SVD"):
    """{row: its log KL - another method's of as many steps on the same data and backbones}."""
    found = {}
    for key, row in results.items():
        data, steps, method = key.split(", ", 2)
        other = results.get(f"{data}, {steps}, {against}")
        if other and method not in ("Euler", against):
            pairs = [(runs, other["runs"][seed]) for seed, runs in row["runs"].items()]
            found[key] = estimate([log_kl(runs) - log_kl(theirs) for runs, theirs in pairs])
    return found


def paper_table(results):
    """The paper's table: KL, also over W2SVD's, motion, what was chosen.

    Holm's correction is over all of its comparisons.
    """
    found = paper_comparisons(results)
    corrected = dict(zip(found, holm([one.p for one in found.values()])))
    lines = [["data", "steps", "method", "KL", "KL / W2SVD's", "p by Holm", "motion", "chosen"]]
    for key, row in results.items():
        runs, chosen = list(row["runs"].values()), row.get("chosen", {})
        cells = [*key.split(", ", 2), estimate([log_kl(one) for one in runs]).ratio()]
        cells += [found[key].ratio(), f"{corrected[key]:.3f}"] if key in found else ["", ""]
        cells.append(estimate([degree(one) for one in runs]).text(2) if "videos" in key else "")
        lines.append([*cells, ", ".join(f"{name} {value:g}" for name, value in chosen.items())])
    return markdown(lines)


SHOWN = {"all": "films right", "frechet": "Frechet", "motion": "pixels a frame"}


def small_comparisons(results):
    """{(row, number): that of the small HunyuanVideo - DMD's}; the seed is the unit."""
    found = {}
    for row in (row for row in results if "alpha" in row and not row.endswith("alpha 0")):
        dmd = results[row.rpartition("alpha")[0] + "alpha 0"]
        for name in SHOWN:
            less = [run[name] - dmd[seed][name] for seed, run in results[row].items()]
            found[row, name] = estimate(less)
    return found


def small_table(results):
    """What the films of the small HunyuanVideo show, and that minus DMD's.

    Holm's correction is over all of its comparisons.
    """
    found = small_comparisons(results)
    corrected = dict(zip(found, holm([one.p for one in found.values()])))
    lines = [["runs", *SHOWN.values(), *(f"{name} - DMD's, p by Holm" for name in SHOWN.values())]]
    for row in (row for row in results if "alpha" in row):
        cells = [estimate([run[name] for run in results[row].values()]).text(2) for name in SHOWN]
        for key in ((row, name) for name in SHOWN):
            cells.append(f"{found[key].text(2)}, {corrected[key]:.2f}" if key in found else "")
        lines.append([row, *cells])
    return markdown(lines)


def markdown(lines):
    """A table of its first row of cells, the head, and the others."""
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(lines[0]) + "|", *texts[1:]])


ERRORS = ("real_unshifted", "real", "fake", "difference", "exact_difference", "cosine")


def errors(results, key, chosen):
    """An error in `fast`'s runs: {iteration: {backbone: number}}.

    chosen(alpha_weak, whether the run will have drifted at its end): which runs count.
    """
    found = {}
    for seed, job in results["fast"].items():
        ends = [run["kl"] > DRIFT for runs in job["lanes"].values() for run in runs]
        for iteration in sorted({row["iteration"] for row in job["along"]}):
            rows = [row for row in job["along"] if row["iteration"] == iteration]
            values = [
                row[key]
                for row, drifted in zip(rows, ends, strict=True)
                if chosen(float(row["cell"].split()[1]), drifted)
            ]
            if values:
                found.setdefault(iteration, {})[seed] = statistics.mean(values)
    return found


def before_a_drift(results, key):
    """{iteration: an error of the runs that will have drifted - of the others}."""
    drifts = errors(results, key, lambda _, drifted: drifted)
    others = errors(results, key, lambda _, drifted: not drifted)
    gaps = {i: [drifts[i][s] - others[i][s] for s in drifts[i] if s in others[i]] for i in drifts}
    return {i: estimate(values) for i, values in gaps.items()}


def errors_table(results):
    """The errors early and at the end of a run, by alpha_weak, and by whether it will drift."""
    rows = {f"alpha_weak {a:g}": lambda alpha, _, a=a: alpha == a for a in (0, 0.25, 0.5, 0.75)}
    rows |= {"will drift": lambda _, drifted: drifted, "will not": lambda _, drifted: not drifted}
    lines = [["runs", "iteration", *(name.replace("_", " ") for name in ERRORS)]]
    for name, chosen in rows.items():
        found = {key: errors(results, key, chosen) for key in ERRORS}
        iterations = [i for i, values in found["real"].items() if len(values) > 1]
        for iteration in iterations[:1] + iterations[-1:]:
            cells = [estimate(list(found[key][iteration].values())) for key in ERRORS]
            lines.append([name, str(iteration), *(e.text(3) for e in cells)])
    return markdown(lines)


def numbers(results):
    """{name: a number of the README's sentences}, with its interval."""
    slope, paper, small = logistic(results), stored("paper"), stored("small")
    made = {
        "scaled": pooled(results, "DMD").ratio(),
        "same": pooled(results, "alpha 0").ratio(),
        "slope": f"{slope.text(1)}, p {slope.p:.2f}",
        "halves": compare(results["halves"], "numerator alone", "denominator alone").ratio(),
        "rate": estimate(over_all_dmd(results, "rate scaled")).ratio(),
    }
    for alpha in alphas_of(results["small"]):
        cells = [job["lanes"][f"alpha {alpha:g}"] for g in REGIMES for job in results[g].values()]
        made[f"drifts {alpha:g}"] = str(sum(run["kl"] > DRIFT for runs in cells for run in runs))
    paired = {alpha: f"gt_weight 0 alpha {alpha:g}" for alpha in alphas_of(results["small"])}
    both = apart(results["clips"], "alpha 0.5", "alpha 0")  # two sets of backbones
    both += apart(results["ablation"], paired[0.5], paired[0.0])
    made["clips both"] = estimate(both).ratio()
    made["motion"] = compare(results["ablation"], paired[0.75], paired[0.0], degree).text(2)
    for alpha, cell in paired.items():
        made[f"linear {alpha:g}"] = linear(results["ablation"], cell)
    for row in (row for row in paper if "videos" in row):
        runs = paper[row]["runs"].values()
        made[f"moves {row}"] = estimate([degree(one) for one in runs]).text(2)
    for name in SHOWN:
        runs = small["paired alpha 0"].values()
        made[f"paired {name}"] = estimate([run[name] for run in runs]).text(2)
    for cell in next(iter(results["ladder"].values()))["lanes"]:
        made[f"rung {cell}"] = estimate(of_cell(results["ladder"], cell, log_kl)).ratio()
    for against in ("W2SVD", "W2SVD, paired"):
        for row, ratio in paper_comparisons(paper, against).items():
            made[f"paper {row} over {against}"] = ratio.ratio()
    for key, difference in small_comparisons(small).items():
        made[f"small {' '.join(key)}"] = difference.text(3 if "frechet" in key else 2)
    for (group, cell, other), (ratio, _) in comparisons(results).items():
        over = f" over {other}" if "weight" in other else ""
        made[f"{group} {cell}{over}"] = ratio.ratio()
    return {re.sub(r"[^\w ]", "", f"n_{name}").replace(" ", "_"): x for name, x in made.items()}


def write_tables(out):
    results, made = json.loads((out / "study.json").read_text()), []
    for name, (groups, about) in TABLES.items():
        if set(groups) & set(results):
            made.append(f"## {name.capitalize()}: {about}\n\n{table(results, groups)}\n")
    if "fast" in results:
        made.append(f"## Errors of both scores in `fast`\n\n{errors_table(results)}\n")
    for name, about, table_of in (
        ("paper", "The paper's table: nine tries for each method", paper_table),
        ("small", "A small HunyuanVideo in 4 steps, bf16", small_table),
    ):
        if (out / f"{name}.json").exists():
            made.append(
                f"## {about}\n\n{table_of(json.loads((out / f'{name}.json').read_text()))}\n"
            )
    head = "# The study's tables\n\nA drift: a KL above .2. See [README](../README.md)."
    (out / "tables.md").write_text("\n\n".join([head, *made]), encoding="utf-8")


# ---- figures -------------------------------------------------------------------------------------


def line(name, points):
    """A line of plots.curves through {x: an estimate in log KL}."""
    x = sorted(points)
    low, mean, high = (
        [math.exp(points[k].mean + s * points[k].half) for k in x] for s in (-1, 0, 1)
    )
    return name, x, mean, low, high


def reweighting(results, path):
    """KL beside the GT loss by its weight w, by w / (1 - alpha_weak); of clips by alpha_weak."""
    jobs, panels = results["gt"], []
    same, scaled = (math.exp(pooled(results, other).mean) for other in ("alpha 0", "DMD"))
    for title, along in (
        (f"Ring, by w: {same:.1f} times DMD's", False),
        (f"By w / (1 - alpha_weak): {scaled:.1f} times", True),
    ):
        lines = []
        for alpha in (0, 0.5, 0.75):
            points = {}
            for w in (0.05, 0.2):
                found = estimate(of_cell(jobs, f"gt_weight {w:g} alpha {alpha:g}", log_kl))
                points[w / (1 - alpha) if along else w] = found
            if along and not alpha:  # at .2 the point is DMD's own, not that of .05 and .25
                for w, left in ((0.05, 0.5), (0.2, 0.5), (0.2, 0.25)):
                    cell = f"gt_weight {w:g} DMD times {left:g}"
                    points[w / left] = estimate(of_cell(jobs, cell, log_kl))
            lines.append(line(f"W2SVD, alpha_weak {alpha}" if alpha else "DMD", points))
        panels.append((title, lines))
    lines = []
    for name, group, start in (
        ("paired", "ablation", "gt_weight 0 "),
        ("paired, GT loss of .05", "ablation", "gt_weight 0.05 "),
        ("by rollouts", "rollout", ""),
    ):
        cells = {a: f"{start}alpha {a:g}" for a in alphas_of(results[group], start)}
        found = {a: estimate(of_cell(results[group], cells[a], log_kl)) for a in cells}
        lines.append(line(name, found))
    cells = "gt_weight 0 alpha 0.75", "gt_weight 0 alpha 0"
    times = math.exp(compare(results["ablation"], *cells).mean)
    panels.append((f"Clips, paired at .75: {times:.1f} times", lines))
    xlabels = ["weight w of the GT loss", "w / (1 - alpha_weak)", "alpha_weak"]
    labels, ticks = ["KL to the data, nats", "", ""], [0.4, 0.6, 1, 2, 3]
    return plots.curves(path, panels, xlabels, labels, log=True, yticks=ticks, sharey=True)


def why(results, path):
    """The errors of both scores and of their difference along the runs, by alpha_weak."""
    panels = []
    names = {"real": "of x0_real", "fake": "of x0_fake", "difference": "of their difference"}
    for alpha in (0, 0.25, 0.5, 0.75):
        lines = []
        for key, name in names.items():
            found = errors(results, key, lambda a, _, alpha=alpha: a == alpha)
            points = {i: estimate(list(values.values())) for i, values in found.items()}
            low, mean, high = ([e.mean + s * e.half for e in points.values()] for s in (-1, 0, 1))
            lines.append((name, list(points), mean, low, high))
        panels.append((f"alpha_weak {alpha}", lines))
    labels = ["error against exact scores, rms", "", "", ""]
    return plots.curves(path, panels, "iteration", labels, sharey=True)


def write(out):
    """tables.md and the figures, beside study.json."""
    results = json.loads((out / "study.json").read_text())
    write_tables(out)
    if {"gt", "ablation", "rollout"} <= set(results):
        reweighting(results, out / "reweighting.png")
    if "fast" in results:
        why(results, out / "why.png")
