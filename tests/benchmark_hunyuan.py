"""Time, memory and TFLOP/s of an iteration of the 13B HunyuanVideo, with random weights, on a GPU.

    python tests/benchmark_hunyuan.py [--size 544x960x129] [--option compile] [--out FILE]

No download. Each case adds a line of JSON to --out. On a small checkpoint it also runs on a CPU:

    python tests/benchmark_hunyuan.py --checkpoint tiny/ --size 32x32x5

Measured is an iteration of `distil` on clips of random numbers, with captions of two lengths in
turns; and what only a GPU can tell of bf16: the gap of real and fake beside that of rounding alone,
the norms, and the share of gradients below 1e-8.
"""

import argparse
import itertools
import json
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import w2svd
from w2svd import Config, HunyuanVideo, Machine, torch  # its allocator is set before

OPTIONS = {  # settings that differ from the default
    "default": {},  # w2svd's choice: cuDNN's attention on Hopper
    "compile": {"compile": True},
    "torch's attention": {"cudnn": False},
    "offload": {"offload": True},
    "offload, compile": {"offload": True, "compile": True},
    "fp8 base": {"fp8_base": True},
    "no checkpointing": {"checkpointing": False},
    "single": {"lora_targets": "single"},
    "reuse 5": {"reuse": 5},
}
TOKENS = 256, 131  # of the captions that take turns


def random_weights(model, place):
    """The model on the meta device, with normal weights instead of a download."""
    module = model.module.to_empty(device=place)
    module.to(torch.bfloat16 if place == "cuda" else torch.float32).requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return HunyuanVideo(module, model.config)


def batches(model, place):
    """Clips of random numbers, with text of the lengths that take turns, endless."""
    sizes = model.module.config
    for length in itertools.cycle(TOKENS):
        text = torch.randn(1, length, sizes.text_embed_dim, device=place)
        pooled = torch.randn(1, sizes.pooled_projection_dim, device=place)
        x0 = torch.randn(1, *model.shape, device=place)
        yield {"x0": x0, "cond": {"prompt_embeds": text, "pooled": pooled}}


class Watched(w2svd.State):
    """A State that keeps, for each role, the share of its last gradients below 1e-8."""

    small = {}

    def update(self, role, lr):
        gradients = [p.grad for p in self.roles.parameters(role)]
        below = sum(int((g.abs() < 1e-8).sum()) for g in gradients)
        self.small[f"below_1e-8_{role}"] = below / sum(g.numel() for g in gradients)
        return super().update(role, lr)


def measure(size, option, checkpoint):
    """The numbers of one case, a dictionary."""
    settings, place = {"checkpointing": True, **OPTIONS[option]}, w2svd.device()
    fields = {name: settings.pop(name) for name in ("offload", "cudnn") if name in settings}
    sizes = dict(zip(("height", "width", "frames"), map(int, size.split("x"))))
    machine, config = Machine(**fields), Config("hunyuan", "", checkpoint, **sizes, **settings)
    planned = w2svd.plan(config, HunyuanVideo.outline(config), machine)
    model = random_weights(HunyuanVideo.outline(config), place)
    roles = w2svd.build_roles(config, model, machine)
    state, ticks = Watched(config, roles, place), []
    with w2svd.prefer_cudnn(machine):
        floor = w2svd.gap_floor(roles, next(batches(model, place)), config.fake_lr)
        iterations = w2svd.distil(config, roles, state, batches(model, place))
        for _ in range(2):  # the first one meets every length
            stats = next(iterations)
            if place == "cuda":
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())
    seconds = ticks[1] - ticks[0]
    numbers = {"iteration_s": seconds, "gap_floor": floor}
    numbers.update({n: stats[n] for n in ("relative_gap", "grad_norm", "fake_grad_norm")})
    numbers.update(state.small)
    numbers["planned_s"] = planned["seconds an iteration on an H100"]
    numbers["planned_gib"] = planned["GiB in all"]
    numbers["tflops"] = 1e3 * planned["PFLOP an iteration"] / seconds
    about = {"date": str(date.today()), "torch": torch.__version__}
    if place == "cuda":
        about["hardware"] = torch.cuda.get_device_name()
        numbers["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        numbers["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    numbers = {name: float(f"{float(x):.4g}") for name, x in numbers.items()}
    return {"size": size, "option": option, **numbers, **about}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="", help="only its transformer's config [13B]")
    parser.add_argument("--size", default="480x832x61", help="height x width x frames")
    parser.add_argument("--option", choices=OPTIONS, default="default")
    parser.add_argument("--out", type=Path, default=Path("benchmark.jsonl"))
    given = parser.parse_args()
    line = json.dumps(measure(given.size, given.option, given.checkpoint))
    print(line)
    with given.out.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
