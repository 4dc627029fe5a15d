"""What the tests of video models share: small runs, films, a card's code, a plan's references."""

import itertools
import json
import shutil
from pathlib import Path

import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.flop_counter import FlopCounterMode

from w2svd import Discriminator, VideoTask, few_step_sigmas, read_run

# rates at which a few steps show; and no default where a default could hide that it is ignored
SMALL = "--generator-lr .02 --fake-lr .02 --ema .5 --shift 4 --embedded-guidance 3".split()
SMALL += "--lora-rank 2 --fake-updates 2 --log-every 2 --save-every 2".split()


def watch_films(monkeypatch):
    """{name: latents} of the films to come, in order."""
    films, film = {}, VideoTask.film

    def watched(task, latents):
        films.update({path.name: x0 for path, x0 in latents.items()})
        film(task, latents)

    monkeypatch.setattr(VideoTask, "film", watched)
    return films


def sample_and_card(run, folder, monkeypatch, picture=None, **given):
    """Sample dog.mp4 from a run, and run on the CPU the code of the card that it exports.

    Noise and the scheduler's renoising come from one stream of seed 0, as those of `sample` do.
    given: more arguments of the pipeline's call. Returns its latents and frames.
    """
    flags = ["--image", picture] if picture else []
    run("sample", "--run", folder, *flags, "--prompt", "a dog", "--out", "dog.mp4")
    run("export", "--run", folder, "--out", "lora")
    rng, found = torch.Generator(), []

    def draw(shape, **how):
        return randn_tensor(shape, **{**how, "generator": rng})

    monkeypatch.setattr(scheduling, "randn_tensor", draw)
    card = Path("lora/README.md").read_text().splitlines()
    checkpoint = read_run(folder).checkpoint
    code = "\n".join(x[4:] for x in card if x.startswith("    ") and "export_to_video(" not in x)
    for old, new in {
        '"a woman talks"': '"a dog", output_type=output, **given',
        "torch.Generator().manual_seed(0)": "rng.manual_seed(0)",
        "this folder": "lora",
        f'"{Path(checkpoint).name}"': f'"{checkpoint}"',
        '.to("cuda")': "",
        "torch.bfloat16": "torch.float32",
    }.items():
        assert old in code, old
        code = code.replace(old, new)
    for output in ("latent", "np"):
        names = {"rng": rng, "output": output, "given": given}
        exec(code, names)
        found.append(torch.as_tensor(names["video"]))
    assert names["pipe"].scheduler.sigmas.tolist() == few_step_sigmas(4, 4.0).tolist()
    return found


def random_adapters(roles):
    """The roles, with adapters that do something."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in itertools.chain(*map(roles.parameters, ("generator", "fake"))):
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return roles


def tiny_wan_cond(sizes, size, rng):
    """A cond of random numbers for toy/tiny_wan.py's transformer: its config, latent T, H, W."""
    names = ("prompt_embeds", "negative_prompt_embeds")
    cond = {name: torch.randn(1, 512, sizes.text_dim, generator=rng) for name in names}
    if sizes.image_dim:
        cond["picture"] = torch.randn(1, 17, sizes.image_dim, generator=rng)
        cond["image"] = torch.randn(1, 16, *size, generator=rng)
    return cond


def counted_flop(model, cond):
    """FLOP of linear layers and of attention, as torch counts them in a forward without numbers."""
    x, sigma = torch.empty(1, *model.shape, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.velocity(x, sigma, cond)
    counted = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    attention = counted["aten.bmm"]
    return sum(counted.values()) - attention, attention


def at_published_rates(work):
    """Seconds of counted work at the rates that the plan takes: products, attention, memory."""
    linear, attention, moved = work["linear_flop"], work["attention_flop"], work["bytes"]
    return linear / 650e12 + attention / 550e12 + moved / 3e12


def gib_at_work(lines, model, machine):
    """What a plan of memory says that tensors take, to hold against a simulation's peak."""
    found = sum(lines.values()) - lines["CUDA, fragments"] - lines["margin"]
    if machine.offload:  # on a GPU a third block is still there, which just ended
        frozen = (p.numel() for p in model.blocks[0].parameters() if not p.requires_grad)
        found -= 2 * sum(frozen) / 2**30
    return found


def assert_head_reads(roles, x, block, later, first=0):
    """The discriminator's logit is its head on a block's tokens from `first` on, without adapters.

    A later block does not run. Returns the tokens (1, N, D).
    """
    seen = []
    block.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        roles.plain(*x)
    later.register_forward_hook(lambda *_: 1 / 0)
    judge = Discriminator(roles)
    with roles.use("generator"):
        logit = judge.logit(*x)
    tokens = (
        seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    )  # HunyuanVideo's have text beside
    torch.testing.assert_close(logit, judge.head(tokens[:, first:]).mean(dim=(1, 2)))
    return tokens


def changed(folder, file, change):
    """A copy of a pipeline, other/, with these entries in one of its files of JSON."""
    shutil.copytree(folder, "other")
    path = Path("other", file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return "other"
