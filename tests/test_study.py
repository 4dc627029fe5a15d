"""The study's machinery and its stored results.

Against: closed forms, and what its READMEs say. Run with `python -m pytest tests/test_study.py`;
half a minute.
"""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from toy.study import cases, moved, report, study
from toy.study.cases import CASES
from toy.tasks import Recipe


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
    for row in itertools.chain(*probes):
        assert row["alphas"][0]["length"] == pytest.approx(1)


def test_a_sign_flip_s_p_is_the_share_of_flips_as_far_from_0():
    assert report.sign_flip([1.0, 2.0, 0.5, 3.0]) == 2 / 2**4
    assert report.sign_flip([1.0, 2.0, 3.0, -0.5]) == 4 / 2**4
    assert report.sign_flip([0.1, 0.1, -0.1]) == 1  # |+.1| is the least sum that there is


def test_a_share_s_interval_is_clopper_and_pearson_s():
    assert report.share_interval(4, 10) == pytest.approx((0.4, 0.1216, 0.7376), abs=1e-4)


def test_the_stored_tables_and_figures_are_those_of_the_stored_results(tmp_path):
    shutil.copy(report.STORED / "study.json", tmp_path)
    report.write(tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert tables == (report.STORED / "tables.md").read_text()
    readme = (report.STORED.parent / "README.md").read_text(encoding="utf-8")
    assert report.filled(readme, report.sections(report.stored())) == readme
    for name in ("phase", "controls", "scores", "gt"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_merged_backbone_is_the_generator_without_an_adapter(new_backbone, new_roles, draw):
    roles, merged, arguments = new_roles(), new_backbone(), draw()["generator"]
    x, sigma, cond = (arguments[name] for name in ("x_in", "sigma_in", "cond"))
    before, wanted = merged.velocity(x, sigma, cond), roles.generator(x, sigma, cond)
    moved.merge(roles, merged.module)
    torch.testing.assert_close(merged.velocity(x, sigma, cond), wanted, atol=1e-5, rtol=1e-4)
    assert (before - wanted).abs().max() > 0.1


def test_the_stored_results_on_moved_data_meet_what_the_readme_claims():
    stored = Path(moved.__file__).parents[1] / "results/moved.json"
    results = json.loads(stored.read_text())
    assert list(results) == [str(seed) for seed in moved.SEEDS]
    for result in results.values():
        kl = {name: result[name]["kl"] for name in moved.METHODS}
        assert kl["finetuned, distilled"] < 0.2 and kl["finetuned"] < 0.1
        assert min(kl["backbone"], kl["distilled"]) > 3
