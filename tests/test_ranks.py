"""Several processes under torchrun's environment train as one does on all of their data.

Against: the same updates written again for one process, which takes every rank's batches and noise
in turn and averages the gradients. On two ranks a sum has one order, so adapters are equal to the
bit; four ranks, split copies, and processes that share the tokens of a video add up in another
order. One launch for each number of processes runs all of its cases. Run: python -m pytest
tests/test_ranks.py, 45 seconds; with -m slow also four processes and the commands under torchrun,
three minutes.
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
from diffusers.models.transformers import transformer_hunyuan_video

import w2svd
from w2svd import Config, HunyuanVideo, Machine, Roles, State, StateOfRanks

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
FULL = {"generator": "full", "fake": "full", "alpha_weak": 0.0, "checkpointing": True}
FULL |= {"generator_lr": 1e-4, "fake_lr": 1e-4}
# name: settings, image-to-video's form, is the backbone split, how many compute a video together
CASES = {
    "paired, ground truth, accumulated": (
        {"gt_weight": 0.3, "accumulate": 2, "checkpointing": True},
        None,
        True,
        1,
    ),
    "rollout, discriminator": (
        {"generator_input": "rollout", "fake_samples": "final", "gan_weight": 0.1},
        None,
        True,
        1,
    ),
    "rollout, not split": ({"generator_input": "rollout", "checkpointing": True}, None, False, 1),
    "full copies, split": (FULL, None, True, 1),
    "from a first image": ({"checkpointing": True}, "token_replace", True, 1),
    "together, accumulated": ({"accumulate": 2, "checkpointing": True}, None, True, 2),
    "together, discriminator": (
        {"generator_input": "rollout", "fake_samples": "final", "gan_weight": 0.1},
        None,
        False,
        2,
    ),
    "together, full copies": (FULL, None, True, 2),
    "together, from a first image": ({"checkpointing": True}, "token_replace", True, 2),
}


FORMS = (None, "token_replace", "latent_concat")
ATTENTION = transformer_hunyuan_video.dispatch_attention_fn


# ---- what a process does -------------------------------------------------------------------------


def new_roles(folder, name, alone=False):
    """A case's Roles on a tiny HunyuanVideo, always the same; adapters with random weights."""
    from diffusers import HunyuanVideoTransformer3DModel

    settings, form, split, context = CASES[name]
    config = dataclasses.replace(SMALL, **settings)
    module = HunyuanVideoTransformer3DModel.from_pretrained(folder / str(form) / "transformer")
    backbone = HunyuanVideo(module.requires_grad_(False), SMALL)
    backbone.keep, backbone.offload = 0 if alone else 1, not alone  # where there is checkpointing
    task = SimpleNamespace(backbone=backbone, prepare=lambda: None)
    transformer_hunyuan_video.dispatch_attention_fn = (
        ATTENTION  # as it was before a case of processes together
    )
    ranks = {} if alone else {"split": split, "context": context}
    roles = w2svd.trained_roles(config, task, **{"split": False} | ranks)
    torch.manual_seed(5)
    with torch.no_grad():
        for role in roles.adapters:
            for parameter in roles.parameters(role):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return config, form, roles


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
        config, form, roles = new_roles(folder, name)
        before = w2svd.base_sum(roles)
        base = [p for p in roles.backbone.module.parameters() if not p.requires_grad]
        held = sum(p.to_local().numel() if w2svd.is_split(p) else p.numel() for p in base)
        share = 1 / w2svd.RANKS if CASES[name][2] else 1  # or more, where rows do not divide
        assert held <= 1.05 * share * sum(p.numel() for p in base)
        state = StateOfRanks(config, roles, "cpu", CASES[name][3])
        training = w2svd.distil(config, roles, state, clips(form, state.rank, state.ranks))
        for stats in w2svd.measured(training, state):
            w2svd.check_ranks(config, state)
            info = {"taken": state.taken, "iteration": state.iteration, "losses": stats}
            path = folder / f"{name} {w2svd.RANKS} {state.iteration}.safetensors"
            with state.averaged() as generator:  # as for a picture
                drawn = sample(generator, form)
            w2svd.write_by_first(path, w2svd.pack(state) | {"sample/x": drawn}, info)
        assert w2svd.base_sum(roles) == before
        resumed(folder, name, state)
    if roles.adapters:  # of the last case; copies are split
        no_two_are_alike_unnoticed(config, state)
    for form in FORMS:
        all_see_the_whole(form)
    torch.distributed.barrier()


def sample(generator, form):
    """The few-step sample of always the same noise."""
    batch, rng = next(clips(form)), torch.Generator().manual_seed(3)
    grid = w2svd.few_step_sigmas(2, SMALL.shift)
    return w2svd.few_step_sample(generator, batch["x0"], grid, batch["cond"], rng)


def resumed(folder, name, state):
    """The third iteration again, from what was written after the second: the same bits."""
    config, form, roles = new_roles(folder, name)
    again = StateOfRanks(config, roles, "cpu", CASES[name][3])
    torch.distributed.barrier()
    tensors, info = w2svd.read_safetensors(folder / f"{name} {w2svd.RANKS} 2.safetensors")
    streams = {key.split("/")[1] for key in tensors if key.startswith("rng/")}
    assert streams == set(map(str, range(state.ranks)))
    w2svd.unpack(again, tensors, info["iteration"], info["taken"])
    for _ in w2svd.distil(config, roles, again, clips(form, again.taken + state.rank, state.ranks)):
        pass
    one, two = w2svd.pack(state), w2svd.pack(again)
    assert all(
        torch.equal(w2svd.in_one_piece(one[n]), w2svd.in_one_piece(two[n])) for n in one | two
    )


def all_see_the_whole(form):
    """All processes together against one alone: the same but for the order of float32's sums.

    Errors are up to 2e-7 of the whole, and held to 1e-6. With texts that no number of processes
    divides, a given frame that is more than one's share, blocks recomputed in backward, and the
    discriminator's gradient at the sample.
    """
    found = [one_backward(form, together) for together in (False, True)]
    for alone, together in zip(*found):
        assert (alone - together).norm() <= 1e-6 * alone.norm(), form


def one_backward(form, together):
    """Velocities, features, the gradient at their sample, and of the adapters, of three clips."""
    transformer_hunyuan_video.dispatch_attention_fn = ATTENTION
    roles, found, level = four_heads(form), [], torch.tensor([0.4])
    if together:
        roles.backbone.share_tokens(torch.distributed.group.WORLD)
    rng = torch.Generator().manual_seed(7)
    for batch in itertools.islice(clips(form), 3):  # with 3, 4 and 5 tokens of text
        x0, cond = batch["x0"], batch["cond"]
        with roles.use("fake"):
            v = roles.fake(x0, level, cond)
            v.backward(torch.randn(v.shape, generator=rng))
        x_t = x0.clone().requires_grad_()
        with roles.use(None):
            tokens = roles.backbone.features(x_t, level, cond)
            tokens.backward(torch.randn(tokens.shape, generator=rng))
        found += [v.detach(), tokens.detach(), x_t.grad]
    gradients = [parameter.grad for parameter in roles.parameters("fake")]
    gradients = [w2svd.mean_over_ranks(g) if together else g for g in gradients]
    return [*found, torch.cat([g.flatten() for g in gradients])]


def four_heads(form):
    """Roles on a HunyuanVideo whose heads four processes can share; adapters random."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    channels = 9 if form == "latent_concat" else 4
    sizes = {"num_attention_heads": 4, "attention_head_dim": 10, "rope_axes_dim": (2, 4, 4)}
    sizes |= {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1}
    sizes |= {"in_channels": channels, "out_channels": 4, "image_condition_type": form}
    sizes |= {"text_embed_dim": 16, "pooled_projection_dim": 8}
    module = HunyuanVideoTransformer3DModel(guidance_embeds=channels == 4, **sizes)
    roles = Roles(HunyuanVideo(module.requires_grad_(False), SMALL), 2, 0.25, 1.0)
    roles.use_checkpointing()
    with torch.no_grad():
        for parameter in roles.parameters("fake"):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return roles


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

    def __init__(self, folder, name, ranks):
        config, form, self.roles = new_roles(folder, name, alone=True)
        self.config = config
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

    def step(self, role, lr, losses=()):
        if losses:
            self.losses |= w2svd.mean_of(losses)
        parameters = self.roles.parameters(role)
        for parameter in parameters:
            parameter.grad /= self.config.accumulate * len(self.streams)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer = self.state.optimizers[role]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    def iterate(self):
        c, roles, self.losses = self.config, self.roles, {}
        for _ in range(c.fake_updates):
            losses = []
            drawn = [
                (s, w2svd.generated(c, roles, s, "", b["x0"], b["cond"])) for s, b in self.batches()
            ]
            for state, (_, x_gen, x0, cond) in drawn:
                sigma, eps = w2svd.losses_noise(c, state, x_gen, "")
                losses.append(w2svd.fake_step(roles, x_gen, cond, sigma, eps))
                if c.gan_weight:
                    losses[-1] |= w2svd.discriminator_step(roles, x_gen, x0, cond, sigma, eps)
            self.step("fake", c.fake_lr, losses)
            if c.gan_weight:
                self.step("discriminator", c.gan_lr)
        losses = []
        for state, batch in self.batches():
            x0, cond = batch["x0"], batch["cond"]
            x_in, sigma_in = w2svd.generator_input(c, roles, state, x0, cond)
            sigma, eps = w2svd.losses_noise(c, state, x0, "")
            how = {"gan_weight": c.gan_weight}
            if c.gt_weight:
                how |= {"x0_gt": x0, "gt_weight": c.gt_weight}
            step = w2svd.generator_step(roles, x_in, sigma_in, cond, sigma, eps, **how)
            losses.append(step | w2svd.moments("data", x0))
        self.step("generator", c.generator_lr, losses)
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
        videos = ranks // CASES[name][3]
        reference = Reference(folder, name, videos)
        config = reference.config
        for i in range(1, config.iterations + 1):
            reference.iterate()
            path = folder / f"{name} {ranks} {i}.safetensors"
            tensors, info = w2svd.read_safetensors(path)
            assert info["iteration"] == i
            draws = -(-config.fake_updates // config.reuse) + 1
            assert info["taken"] == i * videos * config.accumulate * draws
            exact = videos == 2 == ranks and config.generator == "lora" and config.accumulate == 1
            with reference.state.averaged() as generator:
                drawn = {"sample/x": sample(generator, CASES[name][1])}
            same(tensors, w2svd.pack(reference.state) | drawn, exact, (name, i))
            assert reference.losses.keys() <= info["losses"].keys()
            for loss, x in reference.losses.items():
                assert info["losses"][loss] == pytest.approx(float(x), rel=1e-4, abs=1e-6), loss


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
    compare(folder, 2, [name for name in CASES if os.environ.get("CASE", "") in name])


@pytest.mark.slow
def test_four_processes_train_as_one_does_on_the_batches_of_all(folder):
    names = ["full copies, split", "paired, ground truth, accumulated"]
    compare(folder, 4, names + ["together, accumulated", "together, from a first image"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_clip_is_read_once_an_epoch_by_one_of_the_processes(monkeypatch, ranks):
    task = object.__new__(w2svd.HunyuanTask)
    task.config, task.clips = SMALL, list(range(6))
    monkeypatch.setattr(task, "read", lambda clip: clip, raising=False)
    read = []
    for rank in range(ranks):
        read.append(list(itertools.islice(task.batches(None, 0, rank, ranks), 12 // ranks)))
    together = [clip for at_once in zip(*read) for clip in at_once]
    assert sorted(together[:6]) == sorted(together[6:]) == task.clips
    assert next(task.batches(None, ranks, 0, ranks)) == together[ranks]  # a run that goes on


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
def test_the_toy_trains_in_two_processes_on_batches_of_both(tmp_path):
    small = "import sys, w2svd; sys.path.insert(0, 'tests'); import helpers\n"
    small += "helpers.make_small(setattr); sys.exit(w2svd.main(sys.argv[1:]))"
    flags = ["train", "--model", "toy", "--cache", tmp_path / "cache", *helpers.SMALL]
    flags += ["--iterations", 6]
    for ranks in (1, 2):
        command = ("-c", small, *flags, "--out", tmp_path / str(ranks))
        started = processes(ranks, *command, cwd=ROOT, stdout=subprocess.DEVNULL)
        assert {process.wait(timeout=200) for process in started} == {0}
    alone, both = (sorted((tmp_path / n).glob("checkpoint-*"))[-1] for n in "12")
    (one, info), (two, more) = map(w2svd.read_safetensors, (alone, both))
    assert more["taken"] == 2 * info["taken"] > 0
    assert sum(name.startswith("rng/1/") for name in two) == 5  # the second one's streams
    moved = [name for name in one if name.startswith("generator/")]
    assert moved and any(not torch.equal(one[name], two[name]) for name in moved)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in "12"]
    assert results[0]["student"].keys() == results[1]["student"].keys()
    assert results[0]["euler"] == results[1]["euler"]  # the backbone is the same


@pytest.mark.slow
def test_processes_that_share_each_video_train_as_one_process_does(folder, clips_folder, tmp_path):
    """By the command: full copies, their optimizers, films; then four processes go on, of 2 x 2."""
    flags = [*settings(folder, clips_folder), "--checkpointing", "--iterations", 2]
    flags += ["--generator", "full", "--fake", "full", "--generator-lr", 1e-4, "--fake-lr", 1e-4]
    one, two, together = tmp_path / "one", tmp_path / "two", ("--context-parallel", 2)
    train(1, one, *flags)
    train(2, two, *flags, *together)
    tensors = [
        w2svd.read_safetensors(run / "checkpoint-000002.safetensors")[0] for run in (one, two)
    ]
    same(*tensors, False, "two processes, one video")
    assert len({tuple(sorted(p.name for p in run.glob("samples/*"))) for run in (one, two)}) == 1
    train(4, two, "--resume", "--iterations", 3, *together)
    _, info = w2svd.read_safetensors(two / "checkpoint-000003.safetensors")
    assert info["taken"] == 2 * 3 + 2 * 3  # in an iteration each pair of processes takes 3 clips


def test_what_cannot_be_shared_is_refused(folder, capsys):
    flags = ["train", "--model", "hunyuan", "--data", "x", "--dry-run", "--gpus", "8"]
    tiny = [*flags, "--checkpoint", str(folder / "None"), "--height", "32", "--width", "48"]
    for more, reason in (
        ([*flags, "--context-parallel", "3"], "3 must divide the 8 GPUs."),
        ([*tiny, "--context-parallel", "4"], "4 must divide the 2 heads."),
        ([*tiny, "--context-parallel", "2", "--width", "80"], ""),
        (
            [
                *flags,
                "--height",
                "720",
                "--width",
                "720",
                "--frames",
                "33",
                "--context-parallel",
                "8",
            ],
            "8 must divide the 18225 tokens.",
        ),
        (
            ["train", "--model", "toy", "--gpus", "2", "--context-parallel", "2"],
            "The toy has no --context-parallel.",
        ),
    ):
        assert w2svd.main(more) == (2 if reason else 0)
        assert capsys.readouterr().err.strip().endswith(reason)


def test_the_plan_shares_what_grows_with_tokens():
    """720 x 1280 x 129 fits into 80 GB from two GPUs on, each of which does half of the work."""
    size = {"model": "hunyuan", "height": 720, "width": 1280, "frames": 129, "checkpointing": True}
    config = Config(**size)
    task = w2svd.HunyuanTask(config)
    task.backbone.module.requires_grad_(False)
    machines = [Machine(gpus=n, context_parallel=n) for n in (1, 2, 4, 8)]
    plans = [task.costs(7, 6, 275e6, 275e6, machine) for machine in machines]
    memory = [plan["in all, GiB"] for plan in plans]
    assert memory[0] > 80 > 75 > memory[1] > memory[2] > memory[3]
    inputs = [plan["GPU memory, GiB"]["inputs of the blocks"] for plan in plans]
    text = 256 / plans[0]["tokens"]  # whole on each
    for n, seen, plan in zip((1, 2, 4, 8), inputs, plans):
        assert seen / inputs[0] == pytest.approx((1 - text) / n + text)
        assert plan["PFLOP an iteration"] == pytest.approx(plans[0]["PFLOP an iteration"] / n)


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
