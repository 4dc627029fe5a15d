"""The study's machinery and its stored results.

Against: invented results, where every answer is known, and what its READMEs say. Run with
`python -m pytest tests/test_study.py`; half a minute.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import w2svd
from toy.metrics import Metrics
from toy.study import moved, report, study
from toy.tasks import Recipe
from w2svd import consistency_step, few_step_sigmas

ROOT = Path(__file__).resolve().parent.parent
METRICS = {*report.COLUMNS["2d"], *report.COLUMNS["videos"]}


def invented(case, kind, seed, rng):
    """A job's result whose metrics say which lane they are of."""
    if kind == "backbone":
        names = ("1", "4", "28", "renoised", "floor")
        rows = {row: {m: rng.random() for m in METRICS} for row in names}
        return {"methods": rows, "lanes": [], "core_seconds": 60.0}
    lanes = []
    for lane in study.KINDS[kind][1](study.CASES[case]):
        if seed in study.CASES[case].tuning and ("scaled" in lane or "lr_schedule" in lane):
            continue
        steps = ("1", "4") if "lcm" in kind else (kind[-1] if kind.startswith("dmd") else "4",)
        values = {m: lane.get("alpha_weak", 0) + 0.01 * rng.random() for m in METRICS}
        values |= {"coverage": 1.0, "weight_tv": 0.2 if lane.get("alpha_weak") == 0.75 else 0.0}
        lane = {**lane, "metrics": {s: dict(values) for s in steps}}
        if kind == "dmd-4" and study.is_probed(settings(lane), study.CASES[case]):
            numbers = {"error": 1.0, "length": 1.0, "cos_dmd": 1.0, "cos_exact": 1.0}
            alphas = [{"alpha": a, **numbers} for a in (0.0, 0.25, 0.5, 0.75)]
            probes = [{"sigma": s, "error_at_data": 0.5, "alphas": alphas} for s in (0.1, 0.9)]
            lane |= {"early": probes, "late": probes}
        if kind == "turn":
            alphas = [{"alpha": a, "length": 1 - a, "cosine": 1.0} for a in (0.25, 0.5, 0.75)]
            lane |= {when: {"alphas": alphas, "again": 0.9} for when in ("early", "late")}
        lanes.append(lane)
    return {"lanes": lanes, "core_seconds": 60.0}


def settings(lane):
    return report.settings_of(lane)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a study.json of invented results, for all jobs."""
    path, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    results = {}
    for case, kind, seed in study.jobs(full=True):
        job = invented(case, kind, seed, rng)
        results.setdefault(case, {}).setdefault(kind, {})[str(seed)] = job
    (path / "study.json").write_text(json.dumps(results))
    return path


def test_tuning_seeds_are_shown_nowhere_and_shown_seeds_are_enough():
    for name, case in study.CASES.items():
        assert not set(case.tuning) & set(case.seeds)
        assert len(case.seeds) >= (4 if name == "videos" else 8)
    assert len(set(study.jobs(full=True))) == len(study.jobs(full=True))


def test_what_is_done_is_not_done_again():
    every = study.jobs(quick=True)
    case, kind, seed = every[3]
    left, minutes = study.todo({case: {kind: {str(seed): {}}}}, every)
    assert set(every) - set(left) == {every[3]} and minutes > 0


@pytest.mark.parametrize("name", study.CASES)
def test_the_controls_scale_what_they_say(name):
    for lane in study.sweep(study.CASES[name]):
        if "scaled" not in lane:
            continue
        what, left = lane["scaled"]
        assert lane["alpha_weak"] == 0
        assert study.gradient_scale(lane) == (left if what == "gradient" else 1)
        full = lane["generator_lr"] / (1 if what == "gradient" else left)
        twin = {"alpha_weak": 1 - left, "generator_lr": pytest.approx(full)}
        assert any(x == twin for x in study.sweep(study.CASES[name]))


@pytest.mark.parametrize("n", [4, 8])
def test_an_interval_holds_the_mean_in_95_of_100_cases(n):
    """Reference: Gaussian draws around a mean that is known."""
    draws = np.random.default_rng(n).normal(3.0, 2.0, (3000, n))
    held = [low <= 3.0 <= high for _, low, high in map(report.interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    mean, low, high = report.interval(draws[0])
    assert mean == draws[0].mean() == pytest.approx((low + high) / 2)
    assert report.interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "values, p",
    [
        ([1.0, 2.0, 0.5, 3.0], 2 / 2**4),
        ([-1.0] * 8, 2 / 2**8),
        ([0.1, 0.1, -0.1], 1.0),  # |+.1| is the least sum that there is
        ([1.0, 2.0, 3.0, -0.5], 4 / 2**4),
        ([0.0, 0.0], 1.0),
        ([1.0, 1.0, 0.0], 4 / 2**3),  # a flip of 0 changes nothing
    ],
)
def test_a_sign_flip_s_p_is_the_share_of_flips_as_far_from_0(values, p):
    assert report.sign_flip(values) == p


def test_a_sign_flip_s_p_is_below_a_bound_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(3000, 6))
    found = np.array([report.sign_flip(x) for x in draws])
    for bound in (2 / 64, 6 / 64, 0.5):
        assert np.mean(found <= bound) == pytest.approx(bound, abs=0.025)


def test_a_share_s_interval_is_clopper_and_pearson_s():
    assert report.share_interval(0, 12) == (0, 0, pytest.approx(1 - 0.025 ** (1 / 12)))
    assert report.share_interval(8, 8) == (1, pytest.approx(0.025 ** (1 / 8)), 1)
    share, low, high = report.share_interval(4, 10)
    assert (share, low, high) == (
        0.4,
        pytest.approx(0.1216, abs=1e-4),
        pytest.approx(0.7376, abs=1e-4),
    )


def test_rates_are_chosen_on_the_tuning_seeds_alone(folder):
    results = json.loads((folder / "study.json").read_text())
    for seed, jobs in results["ring"]["dmd-4"].items():
        for lane in jobs["lanes"]:
            good = 1e-3 if int(seed) >= 100 else 3e-3
            lane["metrics"]["4"]["sliced_w2"] = abs(np.log(lane["generator_lr"] / good))
    chosen = report.Study(results).chosen("ring", "dmd-4", study.W2S, 4)
    assert chosen["generator_lr"] == 1e-3 and chosen["alpha_weak"] == 0.25


def test_tables_and_figures_are_made_of_the_results(folder):
    report.write(folder)
    for name in ("phase", "controls", "scores", "gt"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    text = (folder / "tables.md").read_text()
    row = next(x for x in text.splitlines() if x.startswith("| W2SVD - DMD, LoRA fake | 4 |"))
    assert float(row.split("|")[3].split()[0]) == pytest.approx(0.25, abs=0.01)
    assert row.split("|")[3].endswith(", p 0.008 ")
    row = next(x for x in text.splitlines() if x.startswith("| grid | sliced_w2 | 0.003 | 0.25 |"))
    assert float(row.split("|")[7].split()[0]) == pytest.approx(0.25, abs=0.01)
    stored = report.Study(json.loads((folder / "study.json").read_text()))
    _, _, rates, alphas, shares, _ = report.phase(
        stored, "ring", *next(report.maps(stored, "ring"))
    )
    assert rates == ["0.0003", "0.001", "0.003", "0.01"]
    assert [set(row) for row in shares] == [{0.0}, {0.0}, {0.0}, {1.0}] and alphas[3] == "0.75"
    assert "| ring, base settings | 0.75 | 32 of 32 | 1.00 [0.89, 1.00] | +1.00, p 0.008 |" in text
    gradient = "0.250 [0.250, 0.250] | 1.000 [1.000, 1.000] | 0.900 [0.900, 0.900]"
    assert f"| late | 0.75 | {gradient} |" in text
    row = next(x for x in text.splitlines() if x.startswith("| GT weight 20 | 0.25 |"))
    assert float(row.split("|")[-2].split()[0]) == pytest.approx(0.25, abs=0.01)
    row = next(x for x in text.splitlines() if x.startswith("| alpha_weak falls to 0, cosine |"))
    assert float(row.split("|")[5].split()[0]) == pytest.approx(0, abs=0.01)


def test_a_difference_is_paired():
    a, b = {0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.5, 1: 4.5, 3: 0.0}
    assert report.differences(a, b) == [0.5, 0.5]


def test_the_exact_consistency_function_has_no_consistency_loss():
    """Data N(0, s^2): the flow takes x_t to x_t s / sqrt((1 - sigma)^2 s^2 + sigma^2)."""
    s = 0.5

    def variance(sigma):
        return ((1 - sigma) ** 2 * s**2 + sigma**2)[:, None]

    zero = torch.zeros((), requires_grad=True)  # a step ends in a backward

    def flow(x, sigma, cond):
        return (sigma[:, None] - (1 - sigma)[:, None] * s**2) / variance(sigma) * x + zero

    def consistent(x, sigma, cond):
        x0 = x * s / variance(sigma).sqrt()
        return (x - x0) / sigma[:, None].clamp(min=1e-6) + zero

    def loss(generator, average):
        roles = SimpleNamespace(plain=flow, generator=generator, use=lambda role: nullcontext())
        return consistency_step(roles, average, *args)["generator_loss"]

    rng = torch.Generator().manual_seed(0)
    x0, eps = s * torch.randn(4096, 2, generator=rng), torch.randn(4096, 2, generator=rng)
    grid = few_step_sigmas(400, 5.0)
    k = torch.randint(400, (4096,), generator=rng)
    args = (x0, None, grid[k], grid[k + 1], eps)
    exact = loss(consistent, consistent)
    assert exact < loss(flow, flow) / 100
    assert exact < loss(consistent, lambda x, *_: 0 * x) / 100


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A backbone of seconds, few samples, and a cache of its own."""
    monkeypatch.setattr(study, "RECIPES", {"ring": Recipe(width=8, batch=64, iterations=20)})
    monkeypatch.setattr(study, "SAMPLES", {"ring": 3000})
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("kind", ["dmd-4", "lcm", "dmd2-1", "gt-0.05"])
def test_a_job_trains_and_measures_all_of_its_lanes(tiny, kind):
    done = study.run("ring", kind, 0, small=90)
    case = study.CASES["ring"]
    assert [settings(lane) for lane in done["lanes"]] == list(study.KINDS[kind][1](case))
    steps = {"lcm": {"1", "4"}, "dmd2-1": {"1"}}.get(kind, {"4"})
    for lane in done["lanes"]:
        assert set(lane["metrics"]) == steps
        assert all(np.isfinite(list(m.values())).all() for m in lane["metrics"].values())
    probes = [lane["late"] for lane in done["lanes"] if "late" in lane]
    assert len(probes) == (2 if kind == "dmd-4" else 0)
    for row in (row for probe in probes for row in probe):
        plain = row["alphas"][0]
        assert plain["length"] == pytest.approx(1)
        assert plain["cos_dmd"] == pytest.approx(1, abs=0.05)  # 0 where the fake has not moved
        assert all(a["error"] > 0 for a in row["alphas"])
    json.dumps(done)


def test_a_weak_shift_turns_nothing_where_the_velocity_is_linear_in_the_adapter(tiny, monkeypatch):
    """A normaliser of 1, and predictions that lie on a line: the gradient is (1 - alpha) DMD's."""
    monkeypatch.setattr(w2svd, "dmd_gradient", lambda x_gen, x0_real, x0_fake: x0_fake - x0_real)
    monkeypatch.setattr(
        w2svd.Roles,
        "real",
        lambda self, x_t, sigma, cond=None: (
            self.backbone.velocity(x_t, sigma, cond) + self.alpha_weak * (x_t + 1)
        ),
    )
    monkeypatch.setattr(
        w2svd.Roles,
        "fake",
        lambda self, x_t, sigma, cond=None: self.backbone.velocity(x_t, sigma, cond) + (x_t + 1),
    )
    found = study.run("ring", "turn", 0, small=90)["lanes"][0]["late"]
    for row in found["alphas"]:
        assert row["length"] == pytest.approx(1 - row["alpha"], rel=1e-3)
        assert row["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["again"] < 1


def test_off_data_cases_are_off(tiny):
    config = study.config_of(study.CASES["moved"], 0, {}, {})
    moved = study.task_of(study.CASES["moved"], config)
    shift = moved.mixture.mean() - moved.learnt.mean()
    torch.testing.assert_close(shift.float(), torch.tensor([0.5**0.5, 0.0]))
    narrow = study.task_of(study.CASES["narrow"], config)
    assert narrow.mixture.rest.sqrt().unique().item() == pytest.approx(0.05)
    assert study.task_of(study.CASES["weak"], config).recipe.iterations == 150


def test_the_shown_seeds_train_what_is_shown_at_the_chosen_rates(folder):
    results = json.loads((folder / "study.json").read_text())
    stored = report.Study(results)
    for kind in ("dmd-4", "ratio-1", "exact"):  # maps and controls show all rates
        assert report.needed(results, "ring", kind, 0) is None
    assert report.needed(results, "ring", "dmd-1", 100) is None
    dmd, w2s = report.needed(results, "ring", "dmd-1", 0)
    assert dmd == stored.chosen("ring", "dmd-1", study.DMD, 1) and w2s["alpha_weak"] == 0.25
    chosen, middle = report.needed(results, "videos", "gt-0.05", 0)
    assert middle == {**study.W2S, "generator_lr": 5e-4}
    every = list(study.KINDS["dmd-1"][1](study.CASES["ring"]))
    assert dmd in every and w2s in every


def test_tables_are_put_where_a_text_names_them_whole_or_in_part():
    parts = {"ring: methods": "| a | b |\n|---|---|\n| W2SVD | 1 |\n| DMD | 2 |"}
    text = "before\n<!-- ring: methods / W2S -->\nold\n<!-- end -->\nafter"
    made = report.filled(text, parts)
    assert "| W2SVD | 1 |" in made and "| DMD | 2 |" not in made and "old" not in made
    assert made.startswith("before\n") and made.endswith("\nafter")
    assert report.filled(made, parts) == made
    assert "| DMD | 2 |" in report.filled(text.replace(" / W2S", ""), parts)


STORED = ROOT / "toy/study/results/study.json"


def stored_tables():
    return report.sections(report.stored())


def test_the_prose_says_what_the_results_say():
    """The numbers that carry the answer, typed by hand in the README and in tutorial 03."""
    stored, text = report.stored(), (ROOT / "toy/study/README.md").read_text()
    tutorial = (ROOT / "notebooks/03_weak_to_strong.ipynb").read_text()

    def short(x):
        return f"{x:.2f}".replace("0.", ".", 1)

    turned = {}
    for case in ("ring", "narrow"):
        lane = {**study.W2S, "generator_lr": study.CASES[case].middle}
        runs = [stored.lane(case, "turn", seed, lane)["late"] for seed in study.CASES[case].seeds]
        cosines = [[row["cosine"] for row in run["alphas"]] for run in runs]
        turned[case] = [short(x) for x in np.mean(cosines, axis=0)]
    assert f"On the ring {turned['ring'][0]} and {turned['ring'][1]}" in text
    assert f"is {turned['narrow'][0]} [" in text and f"and {turned['narrow'][1]} [" in text
    assert f"it is {turned['narrow'][0]} at the end, and {turned['narrow'][1]}" in tutorial
    counts = dict.fromkeys((0.0, 0.25, 0.5, 0.75), 0)
    for _, lanes, _, kind in report.maps(stored, "narrow"):
        for lane in lanes:
            for seed in stored.seeds("narrow", kind):
                metrics = stored.lane("narrow", kind, seed, lane)["metrics"]["4"]
                counts[lane["alpha_weak"]] += report.collapsed(stored, "narrow", seed, metrics)
    assert "of 32 runs there, {}, {}, {} and {} collapse".format(*counts.values()) in tutorial
    rows = stored_tables()["all in the plane: collapse"].splitlines()[2:]
    plane = [row.split("|")[2].split()[0] for row in rows]
    assert "{}, {}, {} and {} of 192 do".format(*plane) in tutorial
    gained = stored.method("ring", "W2SVD", 4, "sliced_w2")
    base = stored.method("ring", "DMD, LoRA fake", 4, "sliced_w2")
    closer = report.differences(base, gained)
    numbers = [f"{x:.3f}".replace("0.", ".") for x in report.interval(closer)]
    p = f"{report.sign_flip(closer):.3f}".lstrip("0")
    assert "ring {} [{}, {}] closer, p {}".format(*numbers, p) in text


def test_the_prose_counts_the_controls_as_they_are():
    """W2S against DMD whose gradient is scaled, all data and both metrics."""
    stored, text = report.stored(), (ROOT / "toy/study/README.md").read_text()
    found = {True: [], False: []}  # at alpha_weak .75; below
    for case in ("ring", "weak", "narrow", "videos"):
        videos = report.side(case) == "videos"
        for metric in ("clip_frechet", "dynamic_degree") if videos else ("sliced_w2", "weight_tv"):
            for alpha, _, what, scaled, _ in report.control_rows(stored, case, metric):
                if what == "gradient":
                    found[alpha == 0.75].append(scaled)

    def counts(every):
        intervals = [report.interval(x) for x in every]
        sure = sum(low > 0 or high < 0 for _, low, high in intervals)
        return len(every), sure, sum(report.sign_flip(x) < 0.05 for x in every)

    assert counts(found[False]) == (28, 1, 2) and counts(found[True]) == (12, 2, 5)
    assert "Of the 28 differences at .25 and .5" in text and "27 intervals contain 0" in text
    assert "At .75 two of 12 intervals exclude 0 and five have p below .05" in text


def test_a_ring_without_modes_looks_better_than_the_student():
    """The README's warning: what the distances in the plane cannot see."""
    case, rng = study.CASES["ring"], torch.Generator().manual_seed(0)
    task = study.task_of(case, study.config_of(case, 0, {}, {}))
    n = study.SAMPLES["ring"]
    angle = 2 * torch.pi * torch.rand(n, generator=rng)
    radius = 2**0.5 + 0.2 * torch.randn(n, generator=rng)
    around = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    found, stored = Metrics(task.mixture, n)(around), report.stored()
    columns = ("sliced_w2", "precision", "weight_tv")
    ours = {m: stored.method("ring", "W2SVD", 4, m).values() for m in columns}
    ours = {m: np.mean(list(values)) for m, values in ours.items()}
    assert found["sliced_w2"] < ours["sliced_w2"] and found["weight_tv"] < ours["weight_tv"]
    assert found["precision"] > ours["precision"] and found["coverage"] == 1
    text = (ROOT / "toy/study/README.md").read_text()
    numbers = [f"{found[m]:.3f}".lstrip("0") for m in ("sliced_w2", "precision", "weight_tv")]
    assert "sliced_w2 {}, precision {}, coverage 1 and weight_tv {}".format(*numbers) in text


def test_every_row_of_the_readme_s_tables_is_made_from_the_stored_results():
    text = (ROOT / "toy/study/README.md").read_text()
    assert report.filled(text, stored_tables()) == text
    assert text.count("<!-- end -->") > 0


def test_the_stored_tables_are_those_of_the_stored_results():
    made = stored_tables()
    stored = (STORED.parent / "tables.md").read_text()
    assert all(text in stored for text in made.values())


# ---- fine-tuning before distillation -------------------------------------------------------------


def test_a_merged_backbone_is_the_generator_without_an_adapter(new_backbone, new_roles, draw):
    roles, merged, arguments = new_roles(), new_backbone(), draw()["generator"]
    x, sigma, cond = (arguments[name] for name in ("x_in", "sigma_in", "cond"))
    before, wanted = merged.velocity(x, sigma, cond), roles.generator(x, sigma, cond)
    moved.merge(roles, merged.module)
    torch.testing.assert_close(merged.velocity(x, sigma, cond), wanted, atol=1e-5, rtol=1e-4)
    assert (before - wanted).abs().max() > 0.1


def test_the_stored_results_on_moved_data_meet_what_the_readme_claims():
    results = json.loads((ROOT / "toy/results/moved.json").read_text())
    assert list(results) == [str(seed) for seed in moved.SEEDS]
    for result in results.values():
        kl = {name: result[name]["kl"] for name in moved.METHODS}
        assert kl["finetuned, distilled"] < 0.2 and kl["finetuned"] < 0.1
        assert min(kl["backbone"], kl["distilled"]) > 3
