"""Bad input: one sentence, exit status 2, nothing overwritten. About 10 seconds.

Each case runs the real main() and compares every file before and after.
"""

import json

import pytest
import torch
from test_train import SMALL, small_toy, train  # noqa: F401  (small_toy is a fixture)

import w2svd


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys, folder, *flags):
    """The one sentence; every file is as before."""
    before = files(folder)
    capsys.readouterr()
    assert w2svd.main([str(f) for f in flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("w2svd: ") and error.endswith(".") and "Traceback" not in error
    assert files(folder) == before
    return error


@pytest.mark.parametrize("flags, says", [
    ("--stepz 4", "--stepz"),
    ("--steps four", "int"),
    ("--steps 4.5", "int"),
    ("--steps 0", "--steps must be above 0"),
    ("--alpha-weak 1.5", "alpha_strong = 1.0"),
    ("--alpha-weak -0.1", "alpha_strong = 1.0"),
    ("--alpha-weak nan", "alpha_strong"),
    ("--alpha-weak .5 --alpha-strong .4", "alpha_strong = 0.4"),
    ("--fake full --alpha-weak .25", "plain backbone"),
    ("--gt-weight .1 --generator-input rollout", "paired"),
    ("--gt-weight .1 --generator-input paired --steps 1", "pure noise"),
    ("--gt-weight -1 --generator-input paired", "--gt-weight"),
    ("--data moons", "ring, grid, videos"),
    ("--guidance 3", "captions"),
    ("--ema 1", "--ema"),
    ("--iterations 0", "--iterations"),
    ("--sigma-low .9 --sigma-high .1", "--sigma-low"),
    ("--generator-lr inf", "--generator-lr"),
    ("--generator half", "lora"),
    ("--resume", "--out"),
    ("--resume --out typo", "found no folder"),
    ("--alpha-strong 0 --alpha-weak 0", "--alpha-strong"),
    ("--sigma-shift 0", "--sigma-shift"),
    ("--seed 99999999999999999999", "--seed"),
    ("--fake full --fake-weight-decay 2", "plain backbone"),
    ("--model wan", "toy"),
])  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(capsys, tmp_path, flags, says):
    assert says in refused(capsys, tmp_path, "train", *flags.split())
    assert not list(tmp_path.iterdir())


def test_no_command_and_an_unknown_one_are_refused(capsys, tmp_path):
    refused(capsys, tmp_path)
    assert "distill" in refused(capsys, tmp_path, "distill")


def test_a_folder_in_use_is_refused(capsys, tmp_path):
    train("r", "--iterations", 1)
    assert "--resume" in refused(capsys, tmp_path, "train", "--out", "r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "in use" in refused(capsys, tmp_path, "train", "--out", "mine")
    assert "not a run" in refused(capsys, tmp_path, "train", "--out", "mine", "--resume")


def test_an_out_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capsys, tmp_path, "train", "--out", "file/run")
    assert "cannot be written" in refused(capsys, tmp_path, "train", "--out", "file")


def test_a_resume_names_the_fields_that_disagree(capsys, tmp_path):
    train("r", "--iterations", 2)
    error = refused(capsys, tmp_path, "train", "--out", "r", "--resume", "--data", "grid",
                    "--alpha-weak", ".5")  # fmt: skip
    assert "--data is ring there, not grid" in error and "--alpha-weak is 0.25 there" in error
    error = refused(capsys, tmp_path, "train", "--out", "r", "--resume", "--iterations", 1)
    assert "only raise" in error
    error = refused(capsys, tmp_path, "train", "--out", "r", "--resume", "--iterations", 9)
    assert "schedule" in error


def test_a_missing_or_foreign_run_folder_is_refused(capsys, tmp_path):
    assert "not a run" in refused(capsys, tmp_path, "sample", "--run", "no", "--out", "a.png")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"learning_rate": 1}')
    error = refused(capsys, tmp_path, "sample", "--run", "foreign", "--out", "a.png")
    assert "not the config of a run" in error


def test_truncated_and_foreign_safetensors_are_refused(capsys, tmp_path):
    from safetensors.torch import save_file

    train("r", "--iterations", 2)
    sample = ("sample", "--run", "r", "--out", tmp_path / "a.png")
    path = tmp_path / "r/generator.safetensors"
    newest = tmp_path / "r/checkpoint-000002.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "is damaged" in refused(capsys, tmp_path, *sample)
    save_file({"x": torch.zeros(2)}, path)
    assert "was not written by w2svd" in refused(capsys, tmp_path, *sample)
    w2svd.write_safetensors(path, {"x": torch.zeros(2)}, {})
    assert "not a generator of this run" in refused(capsys, tmp_path, *sample)
    path.unlink()
    assert "does not exist" in refused(capsys, tmp_path, *sample)
    newest.write_bytes(newest.read_bytes()[:1000])
    train("r", "--resume")
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("flags, says", [
    ("--n 0", "--n"), ("--seed -1", "--seed"), ("--out a.mp4", ".safetensors file"),
    ("--out no/a.png", "no"), ("--prompt dog", "--prompt does not fit"),
])  # fmt: skip
def test_sample_refuses_what_it_cannot_write(capsys, tmp_path, flags, says):
    train("r", "--iterations", 1)
    sample = ("sample", "--run", "r", "--out", "a.png")
    assert says in refused(capsys, tmp_path, *sample, *flags.split())


def test_a_backbone_other_than_the_run_s_is_refused(capsys, tmp_path):
    train("r", "--iterations", 1)
    (backbone,) = (tmp_path / "cache").glob("*.safetensors")
    tensors, info = w2svd.read_safetensors(backbone)
    w2svd.write_safetensors(backbone, {k: x + 0.1 for k, x in tensors.items()}, info)
    error = refused(capsys, tmp_path, "sample", "--run", "r", "--out", "a.png")
    assert "not the one" in error


def test_a_non_finite_loss_stops_with_stage_step_and_sigma_and_keeps_what_was_saved(
    capsys, tmp_path, monkeypatch
):
    real_loss, calls = w2svd.fake_loss, []

    def loss_that_breaks(v_fake, x_gen, eps):
        calls.append(1)
        return real_loss(v_fake, x_gen, eps) * (float("nan") if len(calls) > 5 else 1)

    monkeypatch.setattr(w2svd, "fake_loss", loss_that_breaks)
    train("r", "--iterations", 8, "--max-skipped", 0, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "iteration 3" in error and "fake" in error and "sigma" in error
    assert (tmp_path / "r" / "checkpoint-000002.safetensors").exists()
    assert not (tmp_path / "r" / "result.json").exists()
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "r" / "metrics.jsonl").read_text())["step"] == 2


def test_an_interrupt_ends_in_one_sentence_and_the_run_can_go_on(capsys, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "generator_step", interrupt)
        train("r", "--iterations", 2, code=130)
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    train("r", "--resume")
    assert (tmp_path / "r" / "result.json").exists()


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    train("r", "--iterations", 1)
    other = tmp_path / "plain.txt"
    other.write_text("x")
    for name in ("generator.safetensors", "result.json"):
        assert (tmp_path / "r" / name).stat().st_mode == other.stat().st_mode
