"""What goes wrong in a long run: numbers, disks, files, two processes at once, being killed.

Against: an undisturbed run of the same seed, bit for bit. Run with `python -m pytest
tests/test_faults.py`; two minutes. tests/kill.py, tests/soak.py and tests/fuzz.py do more of it.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_hunyuan
from test_refusals import refused
from test_train import lines, run, same_bits, small_toy, train  # noqa: F401  (a fixture)
from tiny_hunyuan import film

import toy.tasks
import w2svd

tiny, encoded = test_hunyuan.tiny, test_hunyuan.encoded  # fixtures
encode, train_hunyuan = test_hunyuan.encode, test_hunyuan.train
CONSTANT = ["--lr-schedule", "constant"]
HERE = Path(__file__).parent


def said(capsys):
    return capsys.readouterr().err.strip().splitlines()


# ---- numbers that go wrong ----------------------------------------------------------------------


def spoil(monkeypatch, owner, name, nth, bad, where=lambda x: x):
    """From its nth call on, owner.name returns `bad` at one place; `where` finds the tensor."""
    original, calls = getattr(owner, name), []

    def spoilt(*args, **how):
        out = original(*args, **how)
        calls.append(1)
        if len(calls) == nth:
            where(out).view(-1)[0] = bad
        return out

    monkeypatch.setattr(owner, name, spoilt)


def spoil_data(monkeypatch, nth, bad):
    original = toy.tasks.Task.batches

    def batches(self, rng):
        for k, batch in enumerate(original(self, rng), start=1):
            if k == nth:
                batch["x0"].view(-1)[0] = bad
            yield batch

    monkeypatch.setattr(toy.tasks.Task, "batches", batches)


def spoil_gradient(monkeypatch, role, nth, bad):
    """The nth backward of the role leaves a gradient with `bad` in it."""
    step, calls = f"{role}_step", []
    original = getattr(w2svd, step)

    def spoilt(roles, *args, **how):
        stats = original(roles, *args, **how)
        calls.append(1)
        if len(calls) == nth:
            roles.parameters(role)[1].grad.view(-1)[0] = bad
        return stats

    monkeypatch.setattr(w2svd, step, spoilt)


# two fake updates in an iteration: what happens once in an update happens 5th and 6th in the third
STAGES = {
    "the data": lambda p, bad: spoil_data(p, 7, bad),
    "the generator's sample in the fake update": lambda p, bad: spoil(
        p, w2svd, "x0_from_velocity", 2 * (2 + 3) + 4 + 1, bad),  # 4: a picture
    "the generator's sample is": lambda p, bad: spoil(
        p, w2svd, "x0_from_velocity", 2 * (2 + 3) + 4 + 3, bad),
    "the fake's velocity": lambda p, bad: spoil(p, w2svd.Roles, "fake", 7, bad),
    "the fake's loss": lambda p, bad: spoil(p, w2svd, "fake_loss", 5, bad),
    "the gradient of the fake": lambda p, bad: spoil_gradient(p, "fake", 5, bad),
    "the real DiT's velocity": lambda p, bad: spoil(p, w2svd.Roles, "real", 3, bad),
    "the generator's gradient": lambda p, bad: spoil(p, w2svd, "dmd_gradient", 3, bad),
    "the gradient of the generator": lambda p, bad: spoil_gradient(p, "generator", 3, bad),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_number_is_named_left_out_and_counted_and_too_many_stop_the_run(
    tmp_path, capsys, monkeypatch, stage
):
    flags = ["--iterations", 4, "--generator-input", "paired"]
    with monkeypatch.context() as patch:
        STAGES[stage](patch, float("nan"))
        train("goes-on", *flags)
    (sentence,) = [x for x in said(capsys) if "left out" in x]
    assert stage in sentence and "iteration 3" in sentence and "a batch at sigma 0." in sentence
    assert json.loads((tmp_path / "goes-on/result.json").read_text())["skipped"] == 1
    assert [row["step"] for row in lines(tmp_path / "goes-on")] == [2, 4]
    tensors, _ = w2svd.read_safetensors(tmp_path / "goes-on/generator.safetensors")
    assert all(x.isfinite().all() for x in tensors.values())
    with monkeypatch.context() as patch:
        STAGES[stage](patch, float("inf"))
        train("stops", *flags, "--max-skipped", 0, code=2)
    error = said(capsys)[-1]
    assert stage in error and "iteration 3" in error and "sigma" in error
    assert (tmp_path / "stops/checkpoint-000002.safetensors").exists()
    assert not (tmp_path / "stops/result.json").exists()


def test_updates_left_out_are_counted_over_a_resume(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, w2svd, "fake_loss", 2, float("nan"))
        train("r", "--iterations", 2, *CONSTANT)
    with monkeypatch.context() as patch:
        spoil(patch, w2svd, "fake_loss", 2, float("nan"))
        train("r", "--iterations", 4, *CONSTANT, "--resume")
    assert json.loads((tmp_path / "r/result.json").read_text())["skipped"] == 2
    with monkeypatch.context() as patch:
        spoil(patch, w2svd, "fake_loss", 2, float("nan"))
        train("s", "--iterations", 2, "--max-skipped", 1, *CONSTANT)
    with monkeypatch.context() as patch:
        spoil(patch, w2svd, "fake_loss", 2, float("nan"))
        train("s", "--iterations", 4, *CONSTANT, "--resume", code=2)


HEALTHY = {"step": 1, "relative_gap": 0.05, "gen_mean": 0.1, "data_mean": 0.1, "gen_std": 1.0,
           "data_std": 1.0, "gen_motion": 0.5, "data_motion": 0.5}  # fmt: skip


@pytest.mark.parametrize("numbers, cure", [
    ({"relative_gap": 0.3}, "--fake-lr"), ({"gen_std": 1.6}, "--generator-lr"),
    ({"gen_mean": 0.7}, "--generator-lr"), ({"gen_motion": 0.1}, "--gt-weight"),
])  # fmt: skip
def test_a_number_that_leaves_its_range_is_said_once_with_what_to_change(
    tmp_path, capsys, numbers, cure
):
    log = w2svd.Log(tmp_path, 0, False, 0)
    log(HEALTHY)
    assert not said(capsys)
    log(HEALTHY | numbers | {"step": 2})
    log(HEALTHY | numbers | {"step": 3})
    (sentence,) = [x for x in said(capsys) if x]
    assert "iteration 2" in sentence and cure in sentence


def test_captions_without_clips_and_points_without_motion_raise_no_warning(tmp_path, capsys):
    log = w2svd.Log(tmp_path, 0, False, 0)
    log(HEALTHY | {"data_mean": 0.0, "data_std": 0.0, "data_motion": 0.0})
    log({"step": 2, "relative_gap": 0.01})
    assert not said(capsys)


# ---- disks --------------------------------------------------------------------------------------


def undisturbed(*flags):
    train("whole", "--iterations", 4, *flags)
    return Path("whole")


def same_run(a, b):
    for name in ("checkpoint-000004.safetensors", "generator.safetensors"):
        assert same_bits(a / name, b / name)
    assert lines(a) == lines(b)
    assert not list(b.rglob(".*.part*"))


@pytest.mark.parametrize("name, nth", [
    ("metrics.jsonl", 0), ("checkpoint-000004.safetensors", 0), ("newest.json", 1),
    ("000004.safetensors", 0), ("generator.safetensors", 0), ("result.json", 0),
])  # fmt: skip
def test_a_disk_that_is_full_costs_nothing_that_was_written(
    tmp_path, capsys, monkeypatch, name, nth
):
    """Writing the file of this name fails, the metrics' in the middle of a line."""
    whole = undisturbed()
    original_whole, original_open, seen = w2svd.whole, open, []

    def full(path):
        seen.append(path)
        if Path(path).name == name and [Path(p).name for p in seen].count(name) > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original_whole(path)

    def full_open(path, *args, **how):
        if Path(path).name == name == "metrics.jsonl":
            original_open(path, "a").write('{"step": 2, "fake_lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original_open(path, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "whole", full)
        patch.setattr(toy.tasks, "write_safetensors", w2svd.write_safetensors)
        patch.setattr("builtins.open", full_open)
        train("r", "--iterations", 4, code=2)
    assert "No space left" in said(capsys)[-1]
    train("r", "--resume")
    same_run(whole, tmp_path / "r")


def test_a_file_system_that_takes_small_files_only_is_survived(tmp_path, capsys, monkeypatch):
    """RLIMIT_FSIZE: the writes themselves fail, in the middle of a file."""
    whole = undisturbed()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    (tmp_path / "r").mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the checkpoint is larger
        train("r", "--iterations", 4, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in said(capsys)[-1]
    assert not list((tmp_path / "r").glob("checkpoint*"))
    train("r", "--iterations", 4, "--resume")
    same_run(whole, tmp_path / "r")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where the machine permits one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_a_run_which_goes_on_once_there_is_room(capsys, small_disk):
    whole = undisturbed()
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 300_000)
    out = small_disk / "r"
    train(out, "--iterations", 4, code=2)
    error = said(capsys)[-1]
    assert "No space left" in error and "--resume" in error
    ballast.unlink()
    train(out, "--iterations", 4, "--resume")
    same_run(whole, out)


def test_encode_stops_on_a_full_disk_and_the_same_command_goes_on(tiny, capsys, small_disk):
    Path("clips").mkdir()
    for name in ("one", "two"):
        film(f"clips/{name}.mp4")
        Path(f"clips/{name}.txt").write_text("a red square moves")
    encode(tiny, "--videos", "clips", "--out", "whole")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 99 * 4096)  # of 100 pages; a clip takes one
    command = "--videos", "clips", "--out", small_disk / "data"
    encode(tiny, *command, code=2)
    assert "No space left" in said(capsys)[-1]
    names = {p.name for p in (small_disk / "data").iterdir()}
    assert names < {p.name for p in Path("whole").iterdir()} and "index.json" not in names
    ballast.unlink()
    encode(tiny, *command)
    for path in Path("whole").iterdir():
        assert (small_disk / "data" / path.name).read_bytes() == path.read_bytes()


def test_a_clip_with_a_number_that_is_not_finite_is_named_in_training(encoded, capsys):
    shutil.copytree(encoded, "data")
    path = next(Path("data").glob("one*.safetensors"))
    tensors, info = w2svd.read_safetensors(path)
    tensors["latents"][0, 0, 0, 0] = float("nan")
    w2svd.write_safetensors(path, tensors, info)
    train_hunyuan("data", "r", "--iterations", 4, "--max-skipped", 0, code=2)
    error = said(capsys)[-1]
    assert "the data is not finite" in error and path.name in error and "sigma" in error


def test_a_clip_that_is_damaged_in_training_is_named_and_encode_mends_it(tiny, encoded, capsys):
    shutil.copytree(encoded.parent, "clips")
    path = next(Path("clips/data").glob("one*.safetensors"))
    good = path.read_bytes()
    flip(path, 0.9)
    train_hunyuan("clips/data", "r", "--iterations", 8, code=2)
    error = said(capsys)[-1]
    assert path.name in error and "encode again" in error
    encode(tiny, "--videos", "clips", "--out", "clips/data")
    assert path.read_bytes() == good


# ---- damaged files ------------------------------------------------------------------------------


def flip(path, place):
    """Flip one bit of a file, at a share `place` of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.7, 1.0])
def test_one_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_is_used(
    tmp_path, capsys, place
):
    train("r", "--iterations", 6)
    before = (tmp_path / "r/metrics.jsonl").read_bytes(), lines(tmp_path / "r")
    shutil.copytree("r", "undisturbed")
    flip(tmp_path / "r/checkpoint-000006.safetensors", place)
    train("r", "--resume")
    (sentence,) = [x for x in said(capsys) if "the beginning" in x]
    assert "checkpoint-000006.safetensors" in sentence
    for name in ("checkpoint-000006.safetensors", "generator.safetensors"):
        assert same_bits(tmp_path / "undisturbed" / name, tmp_path / "r" / name)
    assert lines(tmp_path / "r") == before[1]


def test_a_damaged_log_is_written_again_from_the_checkpoint_before(tmp_path, capsys):
    train("r", "--iterations", 6)
    expected = lines(tmp_path / "r")
    log = tmp_path / "r/metrics.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text(rows[0] + rows[1][:40] + "\n" + rows[2])
    train("r", "--resume")
    sentences = [x for x in said(capsys) if "metrics.jsonl is damaged" in x]
    assert len(sentences) == 2 and "checkpoint-000006" in sentences[0]
    assert lines(tmp_path / "r") == expected


def test_with_every_checkpoint_damaged_a_run_starts_at_the_beginning(tmp_path, capsys):
    train("r", "--iterations", 4)
    expected = lines(tmp_path / "r")
    for path in (tmp_path / "r").glob("checkpoint*"):
        path.write_bytes(b"")
    train("r", "--resume")
    assert len([x for x in said(capsys) if "the beginning" in x]) == 2
    assert lines(tmp_path / "r") == expected


def test_the_newest_and_every_nth_checkpoint_stay_and_a_pointer_names_the_newest(tmp_path):
    train("r", "--iterations", 10, "--save-every", 1, "--keep", 2, "--keep-every", 4)
    names = {p.name for p in (tmp_path / "r").glob("checkpoint*")}
    assert names == {f"checkpoint-{i:06}.safetensors" for i in (4, 8, 9, 10)}
    newest = json.loads((tmp_path / "r/newest.json").read_text())
    assert newest == {"checkpoint": "checkpoint-000010.safetensors"}
    _, info = w2svd.read_safetensors(tmp_path / "r" / newest["checkpoint"])
    assert w2svd.Config(**info["config"]).iterations == 10 and info["metrics_bytes"] > 0


def test_a_run_folder_of_nonsense_is_refused(tmp_path, capsys):
    train("r", "--iterations", 2)
    path = tmp_path / "r/config.json"
    good = json.loads(path.read_text())
    for name, value in (("steps", "4"), ("alpha_weak", None), ("model", "wan"), ("seed", 0.5),
                        ("lora_rank", 10**9), ("fps", float("nan")), ("resume", 1)):  # fmt: skip
        path.write_text(json.dumps(good | {"config": good["config"] | {name: value}}))
        assert "not the config" in refused(
            capsys, tmp_path, "sample", "--run", "r", "--out", tmp_path / "a.png")
    path.write_text("[" * 200_000)
    assert "not the config" in refused(
        capsys, tmp_path, "train", "--out", "r", "--resume", "--model", "toy")


# ---- two processes, being killed ----------------------------------------------------------------


def test_two_processes_in_one_folder_are_refused_and_a_dead_one_s_lock_is_gone(capsys, tmp_path):
    train("r", "--iterations", 2, *CONSTANT)
    code = ("import sys, time, pathlib, w2svd\n"
            "with w2svd.hold(pathlib.Path('r')):\n"
            "    print('held', flush=True)\n"
            "    time.sleep(60)\n")  # fmt: skip
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(HERE.parent)})  # fmt: skip
    assert owner.stdout.readline() == b"held\n"
    resume = ("train", "--out", "r", "--resume", "--iterations", 4, "--cache", "cache")
    assert "Another process" in refused(capsys, tmp_path, *resume)
    owner.kill()
    owner.wait()
    run(*resume)


@pytest.mark.parametrize("flags", ["--models toy --kills 4 --files 5",
                                   "--models hunyuan --kills 2 --files 2"])  # fmt: skip
def test_a_run_that_is_killed_and_resumed_has_the_bits_of_one_that_is_not(flags):
    done = subprocess.run([sys.executable, HERE / "kill.py", *flags.split()], capture_output=True,
                          text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all the same bits") == 7


def test_memory_files_and_time_stay_flat():
    done = subprocess.run([sys.executable, HERE / "soak.py", "--steps", "100"],
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
