"""Several processes under torchrun's environment train as one does on all of their clips.

Against: one process, whose updates take every process's clips and noise in turn. On two processes a
sum has one order, so weights are equal to the bit; on four, or with several forwards in an update,
within 1e-4. One launch for each number of processes runs all of its cases, Wan's too. Run: `python
-m pytest tests/test_ranks.py`, 30 seconds; with `-m slow` four processes and the commands, 90.
"""

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from video_runs import tiny_wan_cond
from wan import Wan

import w2svd
from toy import tiny_wan
from toy.tiny_hunyuan import SIZE, clips, save_tiny
from w2svd import Clip, Config, HunyuanVideo, Machine, State

ROOT = Path(__file__).resolve().parent.parent
RATES = {"generator_lr": 1e-2, "fake_lr": 1e-2, "ema": 0.9, "shift": 3.0}
SMALL = Config(model="hunyuan", fake_updates=2, lora_rank=2, iterations=3, **RATES)
FINAL = {"generator_input": "rollout", "fake_samples": "final", "gan_weight": 0.1}
FULL = {"generator": "full", "fake": "full", "alpha_weak": 0.0}
GUIDED = {"guidance": 5.0, "iterations": 2}
# name: settings, image-to-video's form or "wan", is the backbone split
CASES = {
    "ground truth, split": ({"gt_weight": 0.3, "accumulate": 2, "checkpointing": True}, None, True),
    "rollout, discriminator": ({**FINAL, "reuse": 2}, None, False),
    "rollout, split": ({"generator_input": "rollout", "checkpointing": True}, None, True),
    "first image, split": ({"checkpointing": True, "gan_weight": 0.1}, "token_replace", True),
    "bf16, split": ({}, None, True),
    "Wan": (GUIDED, "wan", False),
    "Wan, bf16, split": ({**GUIDED, "checkpointing": True}, "wan", True),
    "full copies": ({**FULL, "generator_lr": 1e-4, "fake_lr": 1e-4}, None, False),
}


def new_roles(folder, name, alone=False):
    """A case's Roles on a tiny model, always the same; adapters with random weights."""
    settings, form, split = CASES[name]
    config = dataclasses.replace(SMALL, **settings)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    model, kind = HunyuanVideo, HunyuanVideoTransformer3DModel
    if form == "wan":
        model, kind = Wan, WanTransformer3DModel
    module = kind.from_pretrained(folder / str(form) / "transformer", dtype=dtype)
    backbone = model(module.requires_grad_(False), config)
    roles = w2svd.build_roles(config, backbone, Machine(shard=split and not alone))
    torch.manual_seed(5)
    with torch.no_grad():
        for role in roles.adapters:
            for parameter in roles.parameters(role):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return config, roles


def endless(form, first=0, step=1):
    """Clips `first`, `first` + step, ... of an endless list, as batches of one."""
    for count in itertools.count(first, step):
        rng = torch.Generator().manual_seed(700 + count)
        if form == "wan":
            cond = tiny_wan_cond(tiny_wan.transformer(image=True).config, (2, 4, 4), rng)
        else:
            cond = {"prompt_embeds": torch.randn(1, 3 + count % 3, 16, generator=rng)}
            cond["pooled"] = torch.randn(1, 8, generator=rng)
            if form:
                cond["image"] = torch.randn(1, 4, 1, 4, 4, generator=rng)
        x0 = torch.randn(1, 16 if form == "wan" else 4, 2, 4, 4, generator=rng)
        yield {"x0": x0, "cond": cond, "name": str(count)}


def work(folder, names):
    """These cases, in one of the processes; what is trained lies in `folder` after each update."""
    torch.set_num_threads(1)
    w2svd.join_processes()
    for name in names:
        config, roles = new_roles(folder, name)
        before, base = w2svd.base_sum(roles), roles.backbone.module.parameters()
        base = [p for p in base if not p.requires_grad]
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in base)
        share = 1 / w2svd.ranks() if CASES[name][2] else 1  # or more, where rows do not divide
        assert held <= 1.05 * share * sum(p.numel() for p in base)
        state = State(config, roles, "cpu")
        run = SimpleNamespace(state=state)
        data = endless(CASES[name][1], w2svd.rank(), w2svd.ranks())
        for stats in w2svd.distil(config, roles, state, data):
            w2svd.Run.check_processes(run)
            line = w2svd.log_line(stats, state, 1.0, None)
            path = folder / f"{name} {w2svd.ranks()} {state.iteration}.safetensors"
            if w2svd.rank() == 0:
                held = w2svd.held_tensors(state)
                w2svd.write_safetensors(path, held, {"taken": state.taken, "line": line})
        assert w2svd.base_sum(roles) == before
    with torch.no_grad():
        roles.parameters("generator")[0].add_(w2svd.rank())
    with pytest.raises(RuntimeError, match="drifted apart"):  # in all of them
        w2svd.Run.check_processes(run)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # or its threads may outlive what they read


def reference(folder, name, ranks, monkeypatch):
    """`distil` in one process: each update takes every process's forwards, with its noise, in turn.

    Yields after each iteration the tensors, the numbers, and how many clips were taken.
    """
    c, roles = new_roles(folder, name, alone=True)
    state = State(dataclasses.replace(c, accumulate=ranks * c.accumulate), roles, "cpu")
    streams = [State(c, roles, "cpu").rngs for _ in range(ranks)]

    def seed():
        for rank, state.rngs in enumerate(streams):
            with monkeypatch.context() as patch:
                patch.setattr(w2svd, "rank", lambda rank=rank: rank)
                State.seed_streams(state)

    def of_each(draw):
        """A process's forwards come together, then the next one's."""
        turns = itertools.cycle(rngs for rngs in streams for _ in range(c.accumulate))

        def drawn(*args):
            state.rngs = next(turns)
            return draw(*args)

        return drawn

    def batches():
        data = [endless(CASES[name][1], rank, ranks) for rank in range(ranks)]
        while True:
            for own in data:
                yield from itertools.islice(own, c.accumulate)

    state.seed_streams = seed
    for draw in ("draw_input", "draw_noise"):
        monkeypatch.setattr(w2svd, draw, of_each(getattr(w2svd, draw)))
    for stats in w2svd.distil(state.config, roles, state, batches()):
        held = {key: x.detach().clone() for key, x in w2svd.held_tensors(state).items()}
        yield held, stats, state.taken


def processes(ranks, *command, **how):
    """Start a command in so many processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(ranks):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1", TQDM_DISABLE="1")
        env = {**os.environ, **env, "PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks'}"}
        yield subprocess.Popen([sys.executable, *map(str, command)], env=env, **how)


def finish(ranks, *command, **how):
    """The same, which must all end well; what they said."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = list(processes(ranks, *command, **piped, **how))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny checkpoints, and clips of which one is no film."""
    folder = tmp_path_factory.mktemp("ranks")
    for form in (None, "token_replace"):
        save_tiny(folder / str(form), form)
    tiny_wan.transformer(image=True).save_pretrained(folder / "wan/transformer")
    clips(folder / "clips", **{name: f"the red square {name}" for name in "abcde"})
    (folder / "clips/f.mp4").write_bytes(b"no film")
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_does_on_all_of_their_clips(folder, ranks, monkeypatch):
    cases = list(CASES) if ranks == 2 else list(CASES)[:4]
    finish(ranks, __file__, folder, *cases)
    for name in cases:
        exact = ranks == 2 and "accumulate" not in CASES[name][0] and name != "full copies"
        with monkeypatch.context() as patch:
            iterations = list(reference(folder, name, ranks, patch))
        for i, (expected, line, taken) in enumerate(iterations, 1):
            found, info = w2svd.read_safetensors(folder / f"{name} {ranks} {i}.safetensors")
            assert info["taken"] == taken and found.keys() == expected.keys()
            for key, x in line.items():
                assert info["line"][key] == pytest.approx(float(x), rel=1e-4, abs=1e-6), (name, key)
            kinds = {}
            for key, x in found.items():
                y = expected[key]
                assert not exact or torch.equal(x, y), (name, i, key)
                kind = key.split("/")[0] + key.split("/")[-1] * key.startswith("optimizer/")
                kinds.setdefault(kind, []).append(((x - y).flatten(), y.flatten()))
            for kind, pairs in kinds.items():  # held as a whole: Adam makes noise large
                error, size = (torch.cat(xs).double().norm() for xs in zip(*pairs))
                assert error <= 1e-4 * size, (name, i, kind, float(error / size))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_clip_is_read_once_an_epoch_by_one_of_the_processes(monkeypatch, ranks):
    def batch(clip):
        cond = {"prompt_embeds": torch.zeros(1, 1, 1)}
        return {"x0": torch.tensor([[clip]]), "cond": cond, "name": str(clip)}

    def read(taken=0, seed=0, n=12):
        task = object.__new__(w2svd.VideoTask)
        task.config, task.clips, task.read = Config(seed=seed), list(range(6)), batch
        processes = [task.batches(taken, rank, ranks) for rank in range(ranks)]
        return [int(next(one)["x0"]) for one in processes * (n // ranks)]

    order = read()
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:] and order != read(seed=1)  # by seed and epoch
    assert read(taken=6, n=6) == order[6:] and read(taken=ranks)[: 12 - ranks] == order[ranks:]


def test_a_process_that_does_not_see_the_latents_is_told(monkeypatch, capsys):
    def elsewhere(config, model, clips, *_):
        clips[0].file = Path("elsewhere/a.safetensors")  # encoded by another process

    monkeypatch.setattr(w2svd, "find_clips", lambda data: [Clip("a.mp4", Path("a.mp4"))])
    monkeypatch.setattr(w2svd, "encode_missing", elsewhere)
    monkeypatch.setattr(w2svd, "ranks", lambda: 2)
    monkeypatch.setattr(w2svd, "gather", lambda x: [x])
    with pytest.raises(w2svd.Refused, match="--cache"):
        w2svd.encoded_clips(Config(data="clips"), None)


MAIN = """
import sys, w2svd
w2svd.HunyuanVideo.prompt_template = {"template": "{}", "crop_start": 0}
encode_clip = w2svd.encode_clip
def said(*args):
    print("ENCODED", file=sys.stderr)
    return encode_clip(*args)
w2svd.encode_clip = said
sys.exit(w2svd.main(sys.argv[1:]))
"""


def flags_of(folder):
    flags = ["--model", "hunyuan", "--data", folder / "clips", "--checkpoint", folder / "None"]
    return [*flags, *SIZE, *"--lora-rank 2 --fake-updates 2 --log-every 1 --save-every 2".split()]


@pytest.mark.slow
def test_clips_are_encoded_in_shares_and_a_run_goes_on_with_other_numbers(folder, tmp_path):
    """1 -> 2 -> 4 -> 1: whole or split, all into one folder; two of them fill another cache."""
    run, cache, read = tmp_path / "run", tmp_path / "cache", []
    for ranks, more, encoded in (
        (1, flags_of(folder), [5]),
        (2, ["--resume", "--shard", "--cache", cache], [3, 2]),
        (4, ["--resume"], [0] * 4),
        (1, ["--resume"], [0]),
    ):
        flags = ["train", "--out", run, "--iterations", len(read) + 1, *more]
        said = finish(ranks, "-c", MAIN, *flags)
        assert [text.count("ENCODED") for text in said] == encoded
        assert f"5 clips, {sum(encoded)} encoded now" in said[0] and "left out, f.mp4" in said[0]
        assert not any("clip" in text for text in said[1:]) and "have changed" not in said[0]
        read.append(w2svd.read_safetensors(sorted(run.glob("checkpoint-*"))[-1])[1]["taken"])
    assert read == [3, 3 + 6, 3 + 6 + 12, 3 + 6 + 12 + 3]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len(list(cache.iterdir())) == 5 and not list(tmp_path.rglob(".part-*"))


@pytest.mark.slow
def test_a_signal_to_one_process_saves_once_and_stops_all(folder, tmp_path):
    run, quiet = tmp_path / "run", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    long = [*flags_of(folder), "--out", run, "--iterations", 10000, "--save-every", 10000]
    started = list(processes(2, "-c", MAIN, "train", *long, **quiet))
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert started[0].poll() is None
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in started] == [128 + signal.SIGTERM] * 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert helpers.names(run, "checkpoint-*") == [f"checkpoint-{steps[-1]:06}.safetensors"]


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
