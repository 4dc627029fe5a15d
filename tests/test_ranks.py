"""Several processes under torchrun's environment train as one does on all of their data.

Against: the same updates written again for one process, which takes every rank's batches and noise
in turn and averages the gradients. On two ranks a sum has one order, so adapters are equal to the
bit; four ranks, and split copies, add up in another order. One launch for each number of
processes runs all of its cases. Run: python -m pytest tests/test_ranks.py, 20 seconds; with
-m slow also four processes and the commands under torchrun, a minute.
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

import pytest
import torch

import w2svd
from w2svd import Config, Discriminator, HunyuanVideo, Roles, State, StateOfRanks

ROOT = Path(__file__).resolve().parent.parent
SMALL = Config(
    model="hunyuan",
    fake_updates=2,
    lora_rank=2,
    generator_lr=1e-2,
    fake_lr=1e-2,
    iterations=3,
    shift=3.0,
    ema=0.9,
)
CASES = {  # name: settings, image-to-video's form, whether the backbone is split
    "paired, ground truth, accumulated": (
        {"gt_weight": 0.3, "accumulate": 2, "checkpointing": True},
        None,
        True,
    ),
    "rollout, discriminator": (
        {"generator_input": "rollout", "fake_samples": "final", "gan_weight": 0.1},
        None,
        True,
    ),
    "rollout, not split": ({"generator_input": "rollout", "checkpointing": True}, None, False),
    "full copies, split": (
        {"generator": "full", "fake": "full", "alpha_weak": 0.0, "checkpointing": True}
        | {"generator_lr": 1e-4, "fake_lr": 1e-4},
        None,
        True,
    ),
    "from a first image": ({"checkpointing": True}, "token_replace", True),
}


# ---- what a process does -------------------------------------------------------------------------


def new_roles(folder, config, form, split=False):
    """Roles on a tiny HunyuanVideo, always the same; adapters with random weights."""
    from diffusers import HunyuanVideoTransformer3DModel

    module = HunyuanVideoTransformer3DModel.from_pretrained(folder / str(form) / "transformer")
    backbone = HunyuanVideo(module.requires_grad_(False), torch.float32)
    torch.manual_seed(5)
    alphas = config.alpha_weak, config.alpha_strong
    roles = Roles(backbone, config.lora_rank, *alphas, config.generator, config.fake)
    if config.gan_weight:
        Discriminator(roles)
    if config.checkpointing:
        roles.use_checkpointing()
    with torch.no_grad():
        for role in roles.adapters:
            for parameter in roles.parameters(role):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    if split:
        w2svd.split_over_ranks(roles)
    return roles


def clips(form, first=0, step=1):
    """Clips `first`, `first` + step, ... of an endless list, as batches of one."""
    for count in itertools.count(first, step):
        rng = torch.Generator().manual_seed(700 + count)
        cond = {"prompt_embeds": torch.randn(1, 3 + count % 3, 16, generator=rng)}
        cond["pooled"] = torch.randn(1, 8, generator=rng)
        if form:
            cond["image"] = torch.randn(1, 4, 1, 4, 4, generator=rng)
        yield {"x0": torch.randn(1, 4, 2, 4, 4, generator=rng), "cond": cond, "name": str(count)}


def work(folder, names):
    """These cases, in one of the processes; what is trained lies in `folder` at the end."""
    torch.set_num_threads(1)
    w2svd.join_ranks()
    for name in names:
        settings, form, split = CASES[name]
        config = dataclasses.replace(SMALL, **settings)
        roles = new_roles(folder, config, form, split)
        before = w2svd.base_sum(roles)
        state = StateOfRanks(config, roles, "cpu")
        for _ in w2svd.distil(config, roles, state, clips(form, w2svd.RANK, w2svd.RANKS)):
            w2svd.check_ranks(config, state)
            info = {"taken": state.taken, "iteration": state.iteration, "base": before}
            path = folder / f"{name} {w2svd.RANKS} {state.iteration}.safetensors"
            w2svd.write_by_first(path, w2svd.pack(state), info)
            with state.averaged() as generator, torch.no_grad():  # as for a picture
                batch = next(clips(form))
                generator(batch["x0"], torch.ones(1), batch["cond"])
        assert w2svd.base_sum(roles) == before
        resumed(folder, name, config, form, split, state)
    no_two_are_alike_unnoticed(config, state)
    torch.distributed.barrier()


def resumed(folder, name, config, form, split, state):
    """The third iteration again, from what was written after the second: the same bits."""
    roles = new_roles(folder, config, form, split)
    again = StateOfRanks(config, roles, "cpu")
    torch.distributed.barrier()
    tensors, info = w2svd.read_safetensors(folder / f"{name} {w2svd.RANKS} 2.safetensors")
    w2svd.unpack(again, tensors, info["iteration"], info["taken"])
    first = again.taken + w2svd.RANK
    for _ in w2svd.distil(config, roles, again, clips(form, first, w2svd.RANKS)):
        pass
    one, two = w2svd.pack(state), w2svd.pack(again)
    assert all(torch.equal(w2svd.whole(one[n]), w2svd.whole(two[n])) for n in one | two)


def no_two_are_alike_unnoticed(config, state):
    """A weight, or the stream of exits, that differs in one process is an error in all of them."""
    config = dataclasses.replace(config, generator_input="rollout")
    state.rngs["exit"].manual_seed(w2svd.RANK)
    with pytest.raises(RuntimeError, match="drifted apart"):
        w2svd.check_ranks(config, state)
    state.rngs["exit"].manual_seed(0)
    w2svd.check_ranks(config, state)
    with torch.no_grad():
        state.roles.parameters("generator")[0].add_(w2svd.RANK)
    with pytest.raises(RuntimeError, match="drifted apart"):
        w2svd.check_ranks(config, state)


# ---- the same in one process ---------------------------------------------------------------------


class Reference:
    """Algorithm 1 for several ranks, one after the other, on one copy of everything."""

    def __init__(self, folder, config, form, ranks):
        self.config, self.roles = config, new_roles(folder, config, form)
        self.data = [clips(form, rank, ranks) for rank in range(ranks)]
        self.streams = [State(config, self.roles, "cpu") for _ in range(ranks)]
        for rank, state in enumerate(self.streams):
            for i, name in enumerate(["data", "input", "exit", "level", "noise"]):
                own = 0 if name == "exit" and config.generator_input == "rollout" else rank
                state.rngs[name].manual_seed(2**32 + 2**20 * own + i)
        self.state = self.streams[0]  # whose optimizers and average are used

    def batches(self):
        """(stream, batch): a rank's micro-batches together, then the next rank's."""
        for state, data in zip(self.streams, self.data):
            for _ in range(self.config.accumulate):
                yield state, next(data)

    def step(self, role, lr):
        parameters = self.roles.parameters(role)
        for parameter in parameters:
            parameter.grad /= self.config.accumulate * len(self.streams)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer = self.state.optimizers[role]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    def iterate(self):
        c, roles = self.config, self.roles
        for _ in range(c.fake_updates):
            drawn = [
                (s, w2svd.generated(c, roles, s, "", b["x0"], b["cond"])) for s, b in self.batches()
            ]
            for state, (_, x_gen, x0, cond) in drawn:
                sigma, eps = w2svd.losses_noise(c, state, x_gen, "")
                w2svd.fake_step(roles, x_gen, cond, sigma, eps)
                if c.gan_weight:
                    w2svd.discriminator_step(roles, x_gen, x0, cond, sigma, eps)
            self.step("fake", c.fake_lr)
            if c.gan_weight:
                self.step("discriminator", c.gan_lr)
        for state, batch in self.batches():
            x0, cond = batch["x0"], batch["cond"]
            x_in, sigma_in = w2svd.generator_input(c, roles, state, x0, cond)
            sigma, eps = w2svd.losses_noise(c, state, x0, "")
            how = {"gan_weight": c.gan_weight}
            if c.gt_weight:
                how |= {"x0_gt": x0, "gt_weight": c.gt_weight}
            w2svd.generator_step(roles, x_in, sigma_in, cond, sigma, eps, **how)
        self.step("generator", c.generator_lr)
        self.state.update_average()
        self.state.iteration += 1


# ---- tests ---------------------------------------------------------------------------------------


def processes(ranks, *command, **more):
    """Start a command in so many processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
        started.append(subprocess.Popen([sys.executable, *map(str, command)], env=env, **more))
    return started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from toy.tiny_hunyuan import save_tiny

    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(folder / "None")
    save_tiny(folder / "token_replace", form="token_replace")
    return folder


def compare(folder, ranks, names):
    """Run these cases in so many processes, and hold every tensor against the reference's."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = processes(ranks, __file__, folder, *names, **pipe)
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    for name in names:
        settings, form, _ = CASES[name]
        config = dataclasses.replace(SMALL, **settings)
        reference = Reference(folder, config, form, ranks)
        for i in range(1, config.iterations + 1):
            reference.iterate()
            path = folder / f"{name} {ranks} {i}.safetensors"
            tensors, info = w2svd.read_safetensors(path)
            assert info["iteration"] == i
            draws = -(-config.fake_updates // config.reuse) + 1
            assert info["taken"] == i * ranks * config.accumulate * draws
            exact = ranks == 2 and config.generator == "lora" and config.accumulate == 1
            same(tensors, w2svd.pack(reference.state), exact, (name, i))


def same(one, two, exact, where):
    """The tensors of two checkpoints: all bits, or what a kind of them differs by as a whole.

    With beta 0 'exp_avg' is the last gradient. One that is 0 but for rounding, as that of a bias of
    keys is, Adam makes as large as the others; so copies get a low rate, and are held as a whole.
    """
    kinds = {}
    for name in one.keys() | two.keys():
        if not name.startswith("rng/"):
            x, y = one[name], two[name].detach()
            assert not exact or torch.equal(x, y), (*where, name)
            kind = name.split("/")[0] + name.split("/")[-1] * name.startswith("optimizer/")
            kinds.setdefault(kind, []).append(((x - y).flatten(), y.flatten()))
    for kind, pairs in kinds.items():
        error, size = (torch.cat(xs).double().norm() for xs in zip(*pairs))
        assert error <= 1e-4 * size, (*where, kind, float(error / size))


def test_two_processes_train_as_one_does_on_the_batches_of_both(folder):
    compare(folder, 2, CASES)


@pytest.mark.slow
def test_four_processes_train_as_one_does_on_the_batches_of_all(folder):
    compare(folder, 4, ["full copies, split", "paired, ground truth, accumulated"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_clip_is_read_once_an_epoch_by_one_of_the_processes(monkeypatch, ranks):
    task = object.__new__(w2svd.HunyuanTask)
    task.config, task.clips = SMALL, list(range(6))
    monkeypatch.setattr(task, "read", lambda clip: clip, raising=False)
    monkeypatch.setattr(w2svd, "RANKS", ranks)
    read = []
    for rank in range(ranks):
        monkeypatch.setattr(w2svd, "RANK", rank)
        read.append(list(itertools.islice(task.batches(None), 12 // ranks)))
    together = [clip for at_once in zip(*read) for clip in at_once]
    assert sorted(together[:6]) == sorted(together[6:]) == task.clips
    monkeypatch.setattr(w2svd, "RANK", 0)
    assert next(task.batches(None, taken=ranks)) == together[ranks]  # a run that goes on


@pytest.fixture(scope="module")
def clips_folder(folder):
    from toy.tiny_hunyuan import film

    (folder / "clips").mkdir()
    for name in "abcde":
        film(folder / "clips" / f"{name}.mp4")
        (folder / "clips" / f"{name}.txt").write_text(f"the red square {name}")
    (folder / "clips" / "f.mp4").write_bytes(b"no film")
    return folder / "clips"


MAIN = """
import sys, w2svd
w2svd.HunyuanVideo.prompt_template = {"template": "{}", "crop_start": 0}
sys.exit(w2svd.main(sys.argv[1:]))
"""


def train(ranks, out, *flags, code=0):
    """`train` in so many processes, which must all end with this status; what they said."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = processes(ranks, "-c", MAIN, "train", "--out", out, *flags, **pipe)
    said = [process.communicate(timeout=200)[0] for process in started]
    assert {process.returncode for process in started} == {code}, "\n".join(said)
    return said


def settings(folder, data):
    from toy.tiny_hunyuan import SIZE

    flags = ["--model", "hunyuan", "--data", data, "--checkpoint", folder / "None", *SIZE]
    return flags + "--lora-rank 2 --fake-updates 2 --log-every 1 --save-every 2".split()


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(folder, clips_folder, tmp_path):
    """1 -> 2 -> 4 -> 2: the clips are shared out, encoded once, and each run writes one folder."""
    run, flags = tmp_path / "run", settings(folder, clips_folder)
    train(1, run, *flags, "--iterations", 1)
    read = [3]
    for ranks, iterations in ((2, 2), (4, 3), (2, 4)):
        said = train(ranks, run, "--resume", "--iterations", iterations)
        assert "it goes on from iteration" in said[0] and not any(said[1:])
        assert "left out, f.mp4" in said[0] and "0 encoded now" in said[0]
        _, info = w2svd.read_safetensors(run / f"checkpoint-{iterations:06}.safetensors")
        read.append(info["taken"])
    assert [b - a for a, b in zip(read, read[1:])] == [6, 12, 6]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not list(tmp_path.rglob(".part-*"))


@pytest.mark.slow
def test_a_signal_to_one_process_saves_once_and_stops_all(folder, clips_folder, tmp_path):
    flags = settings(folder, clips_folder)
    run = tmp_path / "run"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    long = [*flags, "--iterations", 10000, "--save-every", 10000]
    started = processes(2, "-c", MAIN, "train", "--out", run, *long, **quiet)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in started] == [128 + signal.SIGTERM] * 2
    saved = sorted(path.name for path in run.glob("checkpoint-*"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert saved == [f"checkpoint-{steps[-1]:06}.safetensors"]


@pytest.mark.slow
def test_torchrun_ends_all_when_one_dies(folder, clips_folder, tmp_path):
    """A process that is killed, as for memory: within seconds torchrun ends the other one."""
    (tmp_path / "main.py").write_text(MAIN)
    run = tmp_path / "run"
    long = [*settings(folder, clips_folder), "--iterations", 10000, "--out", run]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    command += ["--shutdown-timeout", 5, tmp_path / "main.py", "train", *long]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(
            [sys.executable, *map(str, command)], env=env, stdout=log, stderr=log
        )
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert torchrun.wait(60) == 1
    assert not any(Path(f"/proc/{child}").exists() for child in children)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
