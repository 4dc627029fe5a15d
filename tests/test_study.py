"""The study's machinery and its stored results.

Against: invented results, where every answer is known, and what its READMEs say. Run with
`python -m pytest tests/test_study.py`; half a minute.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import w2svd
from toy import mixtures
from toy.metrics import Metrics, annulus
from toy.study import cases, moved, report, study
from toy.study.cases import CASES, DMD, W2S
from toy.tasks import Recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "toy/study/README.md").read_text(encoding="utf-8")
METRICS = {*report.COLUMNS["2d"], *report.COLUMNS["videos"]}


def invented(case, kind, seed, rng):
    """A job's result whose metrics say which lane they are of."""
    result = {"lanes": [], "core_seconds": 60.0}
    if kind == "backbone":
        names = ("1", "4", "28", "renoised", "floor")
        result["methods"] = {row: {m: rng.random() for m in METRICS} for row in names}
    for lane in study.KINDS[kind][1](CASES[case]):
        if seed in CASES[case].tuning and ("scaled" in lane or "lr_schedule" in lane):
            continue
        steps = ("1", "4") if "lcm" in kind else (kind[-1] if kind.startswith("dmd") else "4",)
        alpha = lane.get("alpha_weak", 0)
        values = {m: alpha + 0.01 * rng.random() for m in METRICS}
        values.update(coverage=1.0, weight_tv=0.2 if alpha == 0.75 else 0.0)
        done = {**lane, "metrics": {s: dict(values) for s in steps}}
        if kind == "dmd-4" and study.is_probed(lane, CASES[case]):
            numbers = {"error": 1.0, "length": 1.0, "cos_dmd": 1.0, "cos_exact": 1.0}
            alphas = [{"alpha": a, **numbers} for a in (0.0, 0.25, 0.5, 0.75)]
            probes = [{"sigma": s, "error_at_data": 0.5, "alphas": alphas} for s in (0.1, 0.9)]
            done.update(early=probes, late=probes)
        if kind == "turn":
            alphas = [{"alpha": a, "length": 1 - a, "cosine": 1.0} for a in (0.25, 0.5, 0.75)]
            done.update({when: {"alphas": alphas, "again": 0.9} for when in ("early", "late")})
        result["lanes"].append(done)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a study.json of invented results, for all jobs."""
    path, rng, results = tmp_path_factory.mktemp("study"), np.random.default_rng(0), {}
    for case, kind, seed in study.jobs(full=True):
        job = invented(case, kind, seed, rng)
        results.setdefault(case, {}).setdefault(kind, {})[str(seed)] = job
    (path / "study.json").write_text(json.dumps(results))
    return path


# ---- jobs ----------------------------------------------------------------------------------------


def test_tuning_seeds_are_shown_nowhere_and_what_is_done_is_not_done_again():
    for name, case in CASES.items():
        assert not set(case.tuning) & set(case.seeds)
        assert len(case.seeds) >= (4 if name == "videos" else 8)
    every = study.jobs(full=True)
    case, kind, seed = every[3]
    left, minutes = study.todo({case: {kind: {str(seed): {}}}}, every)
    assert set(every) - set(left) == {every[3]} and len(left) == len(every) - 1 and minutes > 0


@pytest.mark.parametrize("name", CASES)
def test_the_controls_scale_what_they_say(name):
    for lane in study.sweep(CASES[name]):
        if "scaled" in lane:
            what, left = lane["scaled"]
            assert lane["alpha_weak"] == 0
            assert study.gradient_scale(lane) == (left if what == "gradient" else 1)
            full = lane["generator_lr"] / (1 if what == "gradient" else left)
            twin = {"alpha_weak": 1 - left, "generator_lr": pytest.approx(full)}
            assert any(x == twin for x in study.sweep(CASES[name]))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A backbone of seconds, few samples, and a cache of its own."""
    monkeypatch.setattr(cases, "RECIPES", {"ring": Recipe(width=8, batch=64, iterations=20)})
    monkeypatch.setattr(study, "SAMPLES", {"ring": 3000})
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("kind", ["dmd-4", "lcm", "dmd2-1", "gt-0.05"])
def test_a_job_trains_and_measures_all_of_its_lanes(tiny, kind):
    done = study.run("ring", kind, 0, small=90)
    lanes = [report.settings_of(lane) for lane in done["lanes"]]
    assert lanes == list(study.KINDS[kind][1](CASES["ring"])) and json.dumps(done)
    for lane in done["lanes"]:
        assert set(lane["metrics"]) == {"lcm": {"1", "4"}, "dmd2-1": {"1"}}.get(kind, {"4"})
        assert all(np.isfinite(list(m.values())).all() for m in lane["metrics"].values())
    probes = [lane["late"] for lane in done["lanes"] if "late" in lane]
    assert len(probes) == (2 if kind == "dmd-4" else 0)
    for row in (row for probe in probes for row in probe):
        plain = row["alphas"][0]
        assert plain["length"] == pytest.approx(1) and all(a["error"] > 0 for a in row["alphas"])
        assert plain["cos_dmd"] == pytest.approx(1, abs=0.05)  # 0 where the fake has not moved


def test_a_weak_shift_turns_nothing_where_the_velocity_is_linear_in_the_adapter(tiny, monkeypatch):
    """A normaliser of 1, and predictions that lie on a line: the gradient is (1 - alpha) DMD's."""

    def shifted(weight):
        def velocity(roles, x_t, sigma, cond=None):
            return roles.backbone.velocity(x_t, sigma, cond) + weight(roles) * (x_t + 1)

        return velocity

    monkeypatch.setattr(w2svd, "dmd_gradient", lambda x_gen, x0_real, x0_fake: x0_fake - x0_real)
    monkeypatch.setattr(w2svd.Roles, "real", shifted(lambda roles: roles.alpha_weak))
    monkeypatch.setattr(w2svd.Roles, "fake", shifted(lambda roles: 1))
    found = study.run("ring", "turn", 0, small=90)["lanes"][0]["late"]
    for row in found["alphas"]:
        assert row["length"] == pytest.approx(1 - row["alpha"], rel=1e-3)
        assert row["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["again"] < 1


def test_off_data_cases_are_off(tiny):
    config = study.config_of(CASES["moved"], 0, {}, {})
    task = study.task_of(CASES["moved"], config)
    shift = task.mixture.mean() - task.learnt.mean()
    torch.testing.assert_close(shift.float(), torch.tensor([0.5**0.5, 0.0]))
    narrow = study.task_of(CASES["narrow"], config)
    assert narrow.mixture.rest.sqrt().unique().item() == pytest.approx(0.05)
    assert study.task_of(CASES["weak"], config).recipe.iterations == 150


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 8])
def test_an_interval_holds_the_mean_in_95_of_100_cases(n):
    """Reference: Gaussian draws around a mean that is known."""
    draws = np.random.default_rng(n).normal(3.0, 2.0, (3000, n))
    held = [low <= 3.0 <= high for _, low, high in map(report.interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    mean, low, high = report.interval(draws[0])
    assert mean == draws[0].mean() == pytest.approx((low + high) / 2)


def test_a_sign_flip_s_p_is_the_share_of_flips_as_far_from_0():
    assert report.sign_flip([1.0, 2.0, 0.5, 3.0]) == 2 / 2**4
    assert report.sign_flip([1.0, 2.0, 3.0, -0.5]) == 4 / 2**4
    assert report.sign_flip([0.1, 0.1, -0.1]) == 1  # |+.1| is the least sum that there is
    assert report.sign_flip([1.0, 1.0, 0.0]) == 4 / 2**3  # a flip of 0 changes nothing
    draws = np.random.default_rng(0).normal(size=(3000, 6))
    found = np.array([report.sign_flip(x) for x in draws])
    for bound in (2 / 64, 6 / 64, 0.5):  # below it as often as it says
        assert np.mean(found <= bound) == pytest.approx(bound, abs=0.025)


def test_a_share_s_interval_is_clopper_and_pearson_s():
    assert report.share_interval(0, 12) == (0, 0, pytest.approx(1 - 0.025 ** (1 / 12)))
    assert report.share_interval(8, 8) == (1, pytest.approx(0.025 ** (1 / 8)), 1)
    assert report.share_interval(4, 10) == pytest.approx((0.4, 0.1216, 0.7376), abs=1e-4)


# ---- tables --------------------------------------------------------------------------------------


def test_rates_are_chosen_on_the_tuning_seeds_and_the_shown_ones_train_at_these(folder):
    results = json.loads((folder / "study.json").read_text())
    for seed, jobs in results["ring"]["dmd-1"].items():
        for lane in jobs["lanes"]:
            good = 1e-3 if int(seed) >= 100 else 3e-3
            lane["metrics"]["1"]["sliced_w2"] = abs(np.log(lane["generator_lr"] / good))
    dmd, w2s = report.needed(results, "ring", "dmd-1", 0)
    assert dmd == {**DMD, "generator_lr": 1e-3} and w2s == {**W2S, "generator_lr": 1e-3}
    assert report.needed(results, "ring", "dmd-1", 100) is None
    for kind in ("dmd-4", "ratio-1", "exact"):  # maps and controls show all rates
        assert report.needed(results, "ring", kind, 0) is None
    _, middle = report.needed(results, "videos", "gt-0.05", 0)
    assert middle == {**W2S, "generator_lr": 5e-4}


def test_tables_and_figures_are_made_of_the_results(folder):
    report.write(folder)
    for name in ("phase", "controls", "scores", "gt"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    text = (folder / "tables.md").read_text()

    def number(start, cell):
        return float(next(x for x in text.splitlines() if x.startswith(start)).split("|")[cell][:7])

    assert number("| W2SVD - DMD, LoRA fake | 4 |", 3) == pytest.approx(0.25, abs=0.01)
    assert number("| grid | sliced_w2 | 0.003 | 0.25 |", 7) == pytest.approx(0.25, abs=0.01)
    assert number("| GT weight 20 | 0.25 |", -2) == pytest.approx(0.25, abs=0.01)
    assert number("| alpha_weak falls to 0, cosine |", 5) == pytest.approx(0, abs=0.01)
    assert "| ring, base settings | 0.75 | 32 of 32 | 1.00 [0.89, 1.00] | +1.00, p 0.008 |" in text
    gradient = "0.250 [0.250, 0.250] | 1.000 [1.000, 1.000] | 0.900 [0.900, 0.900]"
    assert f"| late | 0.75 | {gradient} |" in text
    made = report.Study(json.loads((folder / "study.json").read_text()))
    _, _, rates, alphas, shares, _ = report.phase(made, "ring", *next(report.maps(made, "ring")))
    assert rates == ["0.0003", "0.001", "0.003", "0.01"] and alphas[3] == "0.75"
    assert [set(row) for row in shares] == [{0.0}, {0.0}, {0.0}, {1.0}]
    assert report.differences({0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.5, 1: 4.5, 3: 0.0}) == [0.5, 0.5]


# ---- the stored results --------------------------------------------------------------------------


def test_the_stored_tables_are_those_of_the_stored_results():
    made, stored = report.sections(report.stored()), (report.STORED / "tables.md").read_text()
    assert report.filled(README, made) == README and README.count("<!-- end -->") > 0
    assert all(text in stored for text in made.values())


def test_the_prose_says_what_the_results_say():
    """The numbers that carry the answer, typed by hand."""
    stored = report.stored()

    def typed(x, places):
        return f"{x:.{places}f}".replace("0.", ".", 1)

    for case, says in (("ring", "On the ring {} and {}"), ("narrow", "is {} [-.25, .51] at .25")):
        lane = {**W2S, "generator_lr": CASES[case].middle}
        runs = [stored.lane(case, "turn", seed, lane)["late"] for seed in CASES[case].seeds]
        cosines = [[row["cosine"] for row in run["alphas"]] for run in runs]
        assert says.format(*(typed(x, 2) for x in np.mean(cosines, axis=0))) in README
    names = ("DMD, LoRA fake", "W2SVD")
    closer = report.differences(*(stored.method("ring", name, 4, "sliced_w2") for name in names))
    numbers = [typed(x, 3) for x in (*report.interval(closer), report.sign_flip(closer))]
    assert "ring {} [{}, {}] closer, p {}".format(*numbers) in README


def test_a_ring_without_modes_looks_better_than_the_student():
    """The README's warning: what the distances in the plane cannot see."""
    ring = mixtures.ring()
    found = Metrics(ring)(annulus(ring, 16384, torch.Generator().manual_seed(0)))
    columns = ("sliced_w2", "precision", "weight_tv")
    numbers = [f"{found[m]:.3f}".lstrip("0") for m in columns]
    assert "sliced_w2 {}, precision {}, coverage 1 and weight_tv {}".format(*numbers) in README
    ours = [report.stored().method("ring", "W2SVD", 4, m).values() for m in columns]
    w2, precision, tv = (np.mean(list(values)) for values in ours)
    assert found["sliced_w2"] < w2 and found["weight_tv"] < tv
    assert found["precision"] > precision and found["coverage"] == 1


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
