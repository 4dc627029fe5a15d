"""Time, memory and TFLOP/s of HunyuanVideo's updates at full scale, with random weights.

    python tests/benchmark_hunyuan.py [--sizes 480x832x61] [--options default cudnn] [--cap 79]

Needs a GPU, torch, diffusers and peft, and no download. Every case is a process of its own. The
first option of a size is what the others are held against, in the same call. On a small
--checkpoint it also runs on a CPU, to show that it works:

    python tests/benchmark_hunyuan.py --checkpoint tiny/ --sizes tiny

Measured are the two updates of an iteration, from noise to the optimizer's step: 'fake' (a forward
of the generator, forward and backward of the fake) and 'generator' (its forward and backward, a
forward of fake and real); captions of two lengths take turns. An iteration is `fake_updates` and 1.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import w2svd
from w2svd import HUNYUAN, Config, HunyuanTask, Machine, Roles, State, fake_step, generator_step

SIZES = {
    "480x832x61": (480, 832, 61),
    "544x960x129": (544, 960, 129),
    "720x1280x129": (720, 1280, 129),
    "tiny": (32, 32, 5),
}
OPTIONS = {  # settings that differ from the default, and diffusers' name of an attention backend
    "default": ({}, None),  # w2svd's choice: cuDNN's on Hopper; attention kept as --cap allows
    "attention not kept": ({}, None),
    "offload": ({}, None),
    "single": ({"lora_targets": "single"}, None),
    "cudnn": ({}, "_native_cudnn"),
    "flash": ({}, "_native_flash"),
    "efficient": ({}, "_native_efficient"),
    "mask kept": ({}, None),
    "fp8 base": ({"fp8_base": True}, None),
    "compile": ({"compile": True}, None),
    "no checkpointing": ({"checkpointing": False}, None),
    "rank 16": ({"lora_rank": 16}, None),
}
TOKENS = 256, 131  # of the captions that take turns


def random_weights(task):
    """The task's model, which is on the meta device, with normal weights instead of a download."""
    module = task.backbone.module.to_empty(device=w2svd.DEVICE)
    dtype = torch.bfloat16 if w2svd.DEVICE == "cuda" else torch.float32
    with torch.no_grad():
        for parameter in module.to(dtype).requires_grad_(False).parameters():
            parameter.normal_(std=0.02)
    task.backbone.dtype = dtype


def captions(task):
    """Text of the lengths that take turns, endless."""
    sizes = task.backbone.module.config
    for length in itertools.cycle(TOKENS):
        text = torch.randn(1, length, sizes.text_embed_dim, device=task.device)
        pooled = torch.randn(1, sizes.pooled_projection_dim, device=task.device)
        yield {"prompt_embeds": text, "pooled": pooled}


def seconds(step, repeats):
    """Of one call, after a first one for each length of captions."""
    for i in range(len(TOKENS) + repeats):
        if i == len(TOKENS):
            started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def gpu_memory():
    """Peaks in GiB, and how often the allocator had to free its cache and try again."""
    if not torch.cuda.is_available():
        return {}
    peaks = {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    return {name: round(x, 2) for name, x in peaks.items()} | {"allocator_retries": retries}


def planned(config, machine, trained):
    """The plan of each update and of its memory, with so many trained parameters."""
    updates = {"fake": 1, "generator": 2}  # forwards without gradient, beside one with
    # costs() of fp8 casts its model, so that each gets one of its own
    return {n: HunyuanTask(config).costs(k, 1, *trained, machine) for n, k in updates.items()}


def measure(size, option, checkpoint, cap, repeats):
    """The numbers of one case, as a dictionary."""
    (height, width, frames), (settings, backend) = SIZES[size], OPTIONS[option]
    shape = {"height": height, "width": width, "frames": frames, "checkpoint": checkpoint}
    config = Config(**{"model": "hunyuan", "checkpointing": True} | shape | settings)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
    machine = Machine(
        gpu_memory=cap * (option != "attention not kept"), offload=option == "offload"
    )
    task = HunyuanTask(config)
    random_weights(task)
    roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, config.alpha_strong)
    trained = [sum(p.numel() for p in roles.parameters(role)) for role in ("generator", "fake")]
    plans = planned(config, machine, trained)
    kept = plans["fake"]["blocks that keep attention's results"]
    task.backbone.keep, task.backbone.offload = kept, machine.offload
    if config.checkpointing:
        roles.use_checkpointing()
    task.prepare()
    for block in task.backbone.blocks if option == "mask kept" else ():
        block._forward_pre_hooks.clear()
    if backend:
        task.backbone.module.set_attention_backend(backend)
    state, texts = State(config, roles, task.device), captions(task)
    x, eps = torch.randn(2, 1, *task.shape, device=task.device)
    sigma = torch.full((1,), 0.9375, device=task.device)

    def fake():
        cond = next(texts)
        with torch.no_grad():
            x_gen = w2svd.x0_from_velocity(x, roles.generator(x, sigma, cond), sigma)
        fake_step(roles, x_gen, cond, sigma / 2, eps)
        state.update("fake", 1e-5)

    def generator():
        generator_step(roles, x, sigma, next(texts), sigma / 2, eps)
        state.update("generator", 1e-5)

    with w2svd.prefer_cudnn() if not backend else nullcontext():
        times = {"fake": seconds(fake, repeats), "generator": seconds(generator, repeats)}
    result = {"size": size, "option": option, "blocks_that_keep_attention": kept}
    result |= {f"{name}_s": round(t, 4) for name, t in times.items()}
    iteration = config.fake_updates * times["fake"] + times["generator"]
    result |= {"iteration_s": round(iteration, 3), **gpu_memory()}
    result |= {"planned_gib": round(plans["fake"]["in all, GiB"], 2)}
    for name, numbers in plans.items():
        tflops = numbers["PFLOP an iteration"] * 1e3 / times[name]
        result |= {f"{name}_tflops": float(f"{tflops:.4g}")}
    return result | {"card_tflops": float(f"{w2svd.card_tflops():.4g}")}


def run_case(size, option, flags):
    """measure() in a process of its own; what it ended with, if it failed."""
    command = [sys.executable, __file__, "--one", "--sizes", size, "--options", option]
    done = subprocess.run(command + flags, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"size": size, "option": option, "failed": last[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Run the cases, print each one as it comes, and write them all to --out after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=HUNYUAN, help="only its transformer's config")
    parser.add_argument("--cap", type=float, default=79.0, help="GiB that torch may take [79]")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of each update [2]")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[:2])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        case = given.sizes[0], given.options[0], given.checkpoint, given.cap, given.repeats
        print(json.dumps(measure(*case)))
        return
    gpu = torch.cuda.is_available()
    head = {
        "hardware": torch.cuda.get_device_name() if gpu else "CPU",
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cap_gib": given.cap,
    }
    flags = ["--checkpoint", given.checkpoint, "--cap", str(given.cap)]
    flags += ["--repeats", str(given.repeats)]
    rows, baseline = [], {}
    for size, option in itertools.product(given.sizes, given.options):
        row = run_case(size, option, flags)
        if "iteration_s" in row:
            first = baseline.setdefault(size, row)
            row["against"] = first["option"]
            row["time_ratio"] = round(row["iteration_s"] / first["iteration_s"], 3)
            if gpu:
                ratio = row["reserved_gib"] / first["reserved_gib"]
                row["memory_ratio"] = round(ratio, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
        given.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
