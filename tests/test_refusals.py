"""People's mistakes: one sentence with the cure, an exit status, nothing written. And `--help`.

Each case runs the real main() and compares every file before and after. Run with
`python -m pytest tests/test_refusals.py`; 10 seconds.
"""

from pathlib import Path

import pytest
import torch
from helpers import CONSTANT, refused, resume, run, said, small_toy, tensors, train  # noqa: F401
from safetensors.torch import save_file

import w2svd

pytestmark = pytest.mark.usefixtures("small_toy")

# flags of train, and what the sentence must name
SETTINGS = {
    "--steps four": "int",
    "--steps 4.5": "int",
    "--steps 0": "--steps",
    "--steps -1": "--steps",
    "--alpha-weak 1.5": "--alpha-strong",
    "--alpha-weak -0.1": "--alpha-weak",
    "--alpha-weak nan": "--alpha-weak",
    "--alpha-weak .5 --alpha-strong .4": "--alpha-strong",
    "--alpha-strong 0 --alpha-weak 0": "--alpha-strong",
    "--fake full --alpha-weak .25": "--alpha-weak",
    "--fake full --fake-weight-decay 2": "--fake-weight-decay",
    "--gt-weight .1 --generator-input rollout": "paired",
    "--gt-weight .1 --generator-input paired --steps 1": "--steps",
    "--gt-weight -1 --generator-input paired": "--gt-weight",
    "--generator-input paired --fake-samples final": "rollout",
    "--data moons": "ring",
    "--condition first-frame": "--data videos",
    "--condition first-frame-concat --data grid": "--data videos",
    "--data videos --condition first-frame --guidance 2": "captions",
    "--guidance 3": "captions",
    "--ema 1": "--ema",
    "--iterations 0": "--iterations",
    "--batch 0": "--batch",
    "--save-every 0": "--save-every",
    "--sigma-low .9 --sigma-high .1": "--sigma-low",
    "--sigma-high 1.5": "--sigma-high",
    "--sigma-shift 0": "--sigma-shift",
    "--generator-lr inf": "--generator-lr",
    "--generator half": "lora",
    "--seed 99999999999999999999": "--seed",
    "--model wan": "toy",
    "--fp8-base": "--fp8-base",
    "--compile": "--compile",
    "--resume": "--out",
    "--resume --out typo": "typo",
    "--model hunyuan --data x --height 481": "--height",
    "--model hunyuan --data x --frames 60": "--frames",
    "--model hunyuan --data x --batch 2": "--accumulate",
    "--model hunyuan --data x --guidance 2": "--guidance",
    "--model hunyuan --data x --condition first-frame": "--model toy",
    "--model hunyuan --data x --compile --fp8-base": "--fp8-base",
    "--model hunyuan --data captions.txt --generator-input paired": "rollout",
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(capsys, tmp_path, flags):
    assert SETTINGS[flags] in refused(capsys, tmp_path, "train", "--cache", "c", *flags.split())
    assert not list(tmp_path.iterdir())


# ---- the command line ----------------------------------------------------------------------------


def test_no_command_and_an_unknown_one_are_refused(capsys, tmp_path):
    assert "--help" in refused(capsys, tmp_path)
    assert "distill" in refused(capsys, tmp_path, "distill")


COMMANDS = {
    "train": "",
    "encode": "",
    "sample": "--run r --out a.png",
    "export": "--run r --out lora --format diffusers",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_points_to_the_help_of_its_command(capsys, tmp_path, command):
    error = refused(capsys, tmp_path, command, *COMMANDS[command].split(), "--sed", "3")
    assert "--sed" in error and f"w2svd.py {command} --help" in error


@pytest.mark.parametrize("wrong", ["--generator half", "--batch x", "--seed"])
def test_a_value_that_does_not_fit_points_to_the_help_of_its_command(capsys, tmp_path, wrong):
    assert "w2svd.py train --help" in refused(capsys, tmp_path, "train", *wrong.split())


def test_a_flag_is_not_taken_for_another_that_begins_like_it(capsys, tmp_path):
    assert "--iter" in refused(capsys, tmp_path, "train", "--iter", "3")


def help_of(command, capsys):
    with pytest.raises(SystemExit) as end:
        w2svd.main([*command.split(), "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_fits_into_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in ([command] if command else COMMANDS))


def test_the_help_of_train_has_every_setting_under_the_headings_of_config(capsys):
    text, place = help_of("train", capsys), 0
    for field in w2svd.dataclasses.fields(w2svd.Config):
        if field.metadata["group"]:
            place = text.index(f"\n{field.metadata['group']}:\n")
        flag = "--" + field.name.replace("_", "-")
        place = text.index(f"\n  {flag}", place)  # in the order of Config, each below its heading


# ---- run folders ---------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(capsys, tmp_path):
    train("r", "--iterations", 1)
    assert "--resume" in refused(capsys, tmp_path, "train", "--out", "r")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "in use" in refused(capsys, tmp_path, "train", "--out", "mine")
    assert "not a run" in refused(capsys, tmp_path, "train", "--out", "mine", "--resume")
    assert "in use" in refused(capsys, tmp_path, "train", "--out", "mine/thesis.txt")


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_an_out_that_cannot_be_made_ends_in_a_sentence(capsys, out):
    Path("file").write_text("x")
    train(out, "--iterations", 1, code=2)
    assert "file" in said(capsys) and Path("file").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_refused_before_the_backbone_is_trained(capsys, tmp_path):
    Path("file").write_text("x")
    assert "--cache" in refused(capsys, tmp_path, "train", "--cache", "file/cache")


def test_a_resume_names_the_settings_that_disagree(capsys, tmp_path):
    train("r", "--iterations", 2)
    flags = ("train", "--out", "r", "--resume")
    error = refused(capsys, tmp_path, *flags, "--data", "grid", "--alpha-weak", ".5")
    assert "--data ring" in error and "--alpha-weak 0.25" in error
    fixed = "seed batch lora_rank steps shift fake_updates accumulate sigma_shift fake_warmup"
    for flag in [f"--{name.replace('_', '-')}" for name in fixed.split()]:
        assert flag in refused(capsys, tmp_path, *flags, flag, 7)
    resume("r", "--seed", 0)  # what does not disagree may be said


def test_fewer_iterations_than_a_run_has_are_refused(capsys, tmp_path):
    train("r", "--iterations", 4, *CONSTANT)
    flags = ("train", "--out", "r", "--resume", "--iterations", 2)
    assert "--iterations" in refused(capsys, tmp_path, *flags)


@pytest.mark.parametrize("schedule", ["--lr-schedule linear", "--alpha-weak-schedule cosine"])
def test_the_iterations_may_not_change_where_a_schedule_depends_on_them(capsys, tmp_path, schedule):
    train("r", "--iterations", 2, *CONSTANT, *schedule.split())
    error = refused(capsys, tmp_path, "train", "--out", "r", "--resume", "--iterations", 9)
    assert "--iterations" in error


FOREIGN = {
    "missing": None,
    "of another program": '{"learning_rate": 1}',
    "of other settings": '{"config": {"learning_rate": 1}}',
    "cut off": '{"config": {"model"',
    "a list": "[]",
    "empty": "",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path, case):
    Path("r").mkdir()
    if FOREIGN[case] is not None:
        Path("r/config.json").write_text(FOREIGN[case])
    sample = ("sample", "--run", "r", "--out", "a.png")
    assert "not a run" in refused(capsys, tmp_path, *sample)
    assert "not a run" in refused(capsys, tmp_path, "train", "--resume", "--out", "r")


# ---- generators ----------------------------------------------------------------------------------


def test_truncated_and_foreign_generators_are_refused(capsys, tmp_path):
    train("r", "--iterations", 2)
    sample = ("sample", "--run", "r", "--out", "a.png")
    path = Path("r/generator-000002.safetensors")
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert path.name in refused(capsys, tmp_path, *sample)
    save_file({"x": torch.zeros(2)}, path)
    assert path.name in refused(capsys, tmp_path, *sample)
    path.unlink()
    run(*sample)  # generator.safetensors is still there


def test_weights_of_another_shape_are_refused(capsys, tmp_path):
    train("r", "--iterations", 2)
    train("other", "--iterations", 2, "--generator", "full")
    path = Path("r/generator-000002.safetensors")
    _, info = w2svd.read_safetensors(path)
    w2svd.write_safetensors(path, tensors("other/generator.safetensors"), info)
    assert "fit" in refused(capsys, tmp_path, "sample", "--run", "r", "--out", "a.png")


def test_an_iteration_that_was_not_saved_is_refused_with_those_that_were(capsys, tmp_path):
    train("r", "--iterations", 4)
    error = refused(capsys, tmp_path, "sample", "--run", "r", "--out", "a.png", "--at", 7)
    assert "7" in error and "2, 4" in error


SAMPLE = {
    "--n 0": "--n",
    "--out a.mp4": ".safetensors",
    "--prompt dog": "--prompt",
    "--seed -1": "--seed",
    "--negative-prompt cat": "--negative-prompt",
    "--image a.png": "--image",
    "--height 32": "--height",
}


@pytest.mark.parametrize("flags", SAMPLE)
def test_sample_refuses_what_it_cannot_do(capsys, tmp_path, flags):
    train("r", "--iterations", 1)
    sample = ("sample", "--run", "r", "--out", "a.png")
    assert SAMPLE[flags] in refused(capsys, tmp_path, *sample, *flags.split())


def test_a_backbone_other_than_the_run_s_is_refused(capsys, tmp_path):
    train("r", "--iterations", 1)
    (backbone,) = Path("cache").iterdir()
    weights, info = w2svd.read_safetensors(backbone)
    w2svd.write_safetensors(backbone, {k: x + 0.1 for k, x in weights.items()}, info)
    error = refused(capsys, tmp_path, "sample", "--run", "r", "--out", "a.png")
    assert "backbone" in error
    error = refused(capsys, tmp_path, "train", "--resume", "--out", "r")
    assert "backbone" in error


def test_the_toy_encodes_and_exports_nothing(capsys, tmp_path):
    assert "hunyuan" in refused(capsys, tmp_path, "encode", "--model", "toy", "--data", "ring")
    train("r", "--iterations", 1)
    export = ("export", "--run", "r", "--format", "diffusers", "--out", "lora")
    assert "hunyuan" in refused(capsys, tmp_path, *export)


# ---- what is nobody's mistake --------------------------------------------------------------------


def planted(monkeypatch, error):
    def fails(*args, **how):
        raise error

    monkeypatch.setattr(w2svd, "generator_step", fails)


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError, AssertionError, RuntimeError])
def test_a_bug_shows_its_traceback(monkeypatch, bug):
    planted(monkeypatch, bug("a bug"))
    with pytest.raises(bug, match="a bug"):
        train("r", "--iterations", 1)


ENDS = [
    (w2svd.Refused("no", status=1), 1, "no"),
    (w2svd.Refused("no"), 2, "no"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--dry-run"),
    (ModuleNotFoundError("No module named 'peft'"), 2, "pip install"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "--resume"),
    (KeyboardInterrupt(15), 143, "--resume"),
]


@pytest.mark.parametrize("error, status, word", ENDS, ids=lambda x: str(x))
def test_what_ends_a_run_has_its_exit_status_and_its_sentence(
    monkeypatch, capsys, error, status, word
):
    planted(monkeypatch, error)
    train("r", "--iterations", 1, code=status)
    assert word in said(capsys)


def test_the_toy_without_its_folder_names_what_it_lacks(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(w2svd.sys.modules, "toy", None)
    assert "toy" in refused(capsys, tmp_path, "train")
