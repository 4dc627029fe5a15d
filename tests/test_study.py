"""The study's machinery, its stored results, and what its README says of them.

Against: closed forms, scipy, stored results. Run with `python -m pytest tests/test_study.py`.
"""

import json
import math

import pytest
import torch
from scipy import stats

import w2svd
from toy import mixtures, moved
from toy.study import probes, report, study
from toy.study.stack import Lane
from toy.study.study import Group

# where 1 is outside of an interval one by one, not after Holm's correction, as the README says
APART = {("lagging", "alpha 0.25"), ("weak", "alpha 0.75"), ("controls", "rate scaled")}
APART |= {("halves", "alpha 0.75"), ("halves", "numerator alone"), ("ladder", "exact real")}
RESOLVED = ("videos", "gt_weight 0.05 alpha 0.5", "gt_weight 0.05 alpha 0")  # after it


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_job_trains_and_measures_every_lane(quick):
    group = Group(study.controls(0.5, 1e-3), {"fake_updates": 2}, probed=True)
    done = study.run(group, 0, quick=True)
    assert list(done["lanes"]) == list(group.cells) and json.dumps(done)
    assert all(math.isfinite(run["kl"]) for runs in done["lanes"].values() for run in runs)
    assert set(done["along"][-1]) == {"cell", "iteration", *report.ERRORS}


def test_dmd_scaled_beside_a_loss_is_dmd_beside_more_of_it(quick):
    shared = {**study.preset("ring"), **study.PAIRED, "batch": 8}
    lanes = [
        Lane(w2svd.Config(**shared, gt_weight=0.1, alpha_weak=0.0), dmd_scale=0.5),
        Lane(w2svd.Config(**shared, gt_weight=0.2, alpha_weak=0.0)),
    ]
    stack = study.stacked(Group({}), lanes, quick=True)
    same = [torch.randn(8, 2).repeat(2, 1) for _ in range(4)]  # of both lanes
    both = stack.dmd_gradient(*same[:3]) + stack.gt_gradient(same[2], same[3])
    torch.testing.assert_close(2 * both[:8], both[8:])
    stack.roles.x0_below = same[3]  # another x0_real in the denominator
    wanted = (same[2] - same[1]) / w2svd.mean_abs(same[0] - same[3])
    torch.testing.assert_close(stack.dmd_gradient(*same[:3])[8:], wanted[8:])


def test_an_interval_is_student_s_and_a_corrected_p_holm_s():
    values = [0.1, 0.4, -0.2, 0.5]
    found, wanted = report.estimate(values), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.mean + found.half == pytest.approx(wanted.confidence_interval().high)
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_logistic_fit_s_slope_is_a_log_odds_ratio():
    def runs(drifts):
        return [{"kl": 1.0 if k < drifts else 0.1} for k in range(16)]

    jobs = {
        s: {"lanes": {"alpha 0": runs(k), "alpha 1": runs(2 * k)}} for s, k in enumerate([3, 5])
    }
    assert report.logistic({"fast": jobs}).mean == pytest.approx(math.log(3), rel=0.02)


def test_stored_tables_and_figures_are_those_of_the_stored_results(tmp_path):
    for path in report.STORED.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    report.write(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (report.STORED / "tables.md").read_text()
    for name in ("reweighting.png", "why.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert sum(path.stat().st_size for path in report.STORED.iterdir()) < 2e6


def test_the_readme_s_words_follow_from_the_stored_results():
    results = report.stored()
    same, scaled = (report.pooled(results, against) for against in ("alpha 0", "DMD"))
    assert scaled.apart and 0 < scaled.mean < 0.2 * same.mean  # 'most of what the shift does'
    for (group, cell, other), (ratio, p) in report.comparisons(results).items():
        second = group in ("gt", "grid") and "weight 0 " not in cell
        resolved = (second and "DMD" not in other) or (group, cell, other) == RESOLVED
        assert p is None or (p < 0.05) == resolved, (group, cell)
        if group in ("videos", "clips", "ablation", "narrow", "narrow again"):
            assert (ratio.mean < 0) == group.startswith("narrow")
        elif not second:
            assert ratio.apart == ((group, cell) in APART), (group, cell)
    assert not report.logistic(results).apart
    films = report.small_comparisons(report.stored("small"))
    paper = report.paper_comparisons(report.stored("paper"))
    for found, resolved in (
        (films, [("paired alpha 0.5", "all"), ("paired alpha 0.5", "motion")]),
        (paper, [key for key in paper if "paired" in key]),
    ):
        corrected = report.holm([one.p for one in found.values()])
        assert [key for key, p in zip(found, corrected) if p < 0.05] == resolved
    gaps = {key: report.before_a_drift(results, key) for key in ("exact_difference", "fake")}
    assert [gaps["fake"][i].apart for i in (60, 120)] == [False, True]
    assert all(gaps["exact_difference"][i].apart for i in (60, 120))
    tables = (report.STORED / "tables.md").read_text()
    for cell, n in {"alpha 0": 14, "rate scaled": 0, "gradient scaled": 7, "fake first": 9}.items():
        assert f" | {cell} | {n} of 24 |" in tables


def test_a_cloud_s_own_error_is_what_the_readme_says():
    rng, mixture = torch.Generator().manual_seed(0), mixtures.ring()
    density, x = probes.cloud(mixture.sample(probes.CLOUD, rng)), mixture.sample(512, rng)
    off = []
    for level in probes.LEVELS:
        x_t = w2svd.add_noise(x, torch.randn(x.shape, generator=rng), level)
        exact = mixture.posterior_mean(x_t, level)
        off.append(probes.rms(density.posterior_mean(x_t, level) - exact))
    assert sum(off) / 2 == pytest.approx(0.024, abs=0.004)


def test_a_merged_backbone_is_the_generator_without_an_adapter(new_backbone, new_roles, draw):
    roles, merged, arguments = new_roles(), new_backbone(), draw()["generator"]
    x, sigma, cond = (arguments[name] for name in ("x_in", "sigma_in", "cond"))
    before, wanted = merged.velocity(x, sigma, cond), roles.generator(x, sigma, cond)
    moved.merge(roles, merged.module)
    torch.testing.assert_close(merged.velocity(x, sigma, cond), wanted, atol=1e-5, rtol=1e-4)
    assert (before - wanted).abs().max() > 0.1


def test_the_stored_results_on_moved_data_meet_what_the_readme_claims():
    results = json.loads(moved.STORED.read_text())
    assert list(results) == [str(seed) for seed in moved.SEEDS]
    for result in results.values():
        kl = {name: result[name]["kl"] for name in moved.METHODS}
        assert kl["finetuned, distilled"] < 0.2 and kl["finetuned"] < 0.1
        assert min(kl["backbone"], kl["distilled"]) > 3
