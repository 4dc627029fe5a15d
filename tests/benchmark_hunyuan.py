"""Memory, time and TFLOP/s of one W2SVD iteration at full scale, with random weights.

    python tests/benchmark_hunyuan.py [--cap 79] [--out benchmark.json]

One process for each case; needs a GPU with 80 GB, torch, diffusers and peft, and no download. On
--checkpoint (a small one) it also runs on a CPU, to show that it works. Ratios to the first case of
each size say what an option buys. Three full copies, which do not fit, are added up, not run.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hunyuan
from w2svd import HUNYUAN, Config, Roles, State, fake_step, few_step_sigmas, generator_step

SIZES = {"480x832x61": (480, 832, 61), "544x960x129": (544, 960, 129), "tiny": (32, 32, 5)}
OPTIONS = {  # settings, keep the text's mask, diffusers' attention backend
    "default": ({}, False, None), "mask kept": ({}, True, None),
    "fp8 base": ({"fp8_base": True}, False, None), "compile": ({"compile": True}, False, None),
    "flash": ({}, False, "_native_flash"), "cudnn": ({}, False, "_native_cudnn"),
    "efficient": ({}, False, "_native_efficient"),
}  # fmt: skip
REACHABLE = 790  # TFLOP/s in bf16 on an H100 or H200


def seconds(step, repeats=2):
    """Of one call after a first one that warms up."""
    for i in range(repeats + 1):
        if i == 1:
            start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(size, option, checkpoint, cap):
    """The numbers of one case, as a dictionary."""
    settings, mask, backend = OPTIONS[option]
    height, width, frames = SIZES[size]
    config = Config(model="hunyuan", weights="random", checkpoint=checkpoint, height=height,
                    width=width, frames=frames, checkpointing=True, **settings)  # fmt: skip
    gpu = torch.cuda.is_available()
    if gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
    task = hunyuan.task(config)
    costs = task.costs(1, 1)
    task.load()
    roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, config.alpha_strong)
    roles.use_checkpointing()
    task.prepare()
    for block in task.backbone.blocks if mask else ():
        block._forward_pre_hooks.clear()
    if backend:
        task.backbone.module.set_attention_backend(backend)
    state, batch = State(config, roles, task.device), task.read(0)
    sigma = few_step_sigmas(4, 5.0)[1:2].to(task.device)
    draw = batch, torch.randn_like(batch["x0"]), sigma, sigma / 2, torch.randn_like(batch["x0"])

    def fake():
        fake_step(roles, *draw)
        state.update("fake", 1e-5, 1.0)

    def generator():
        generator_step(roles, *draw)
        state.update("generator", 1e-5, 1.0)

    times = {"fake": seconds(fake), "generator": seconds(generator)}
    forward, trained = costs["pflop_per_forward"], costs["pflop_per_forward_with_gradient"]
    pflop = {"fake": forward + trained, "generator": 2 * forward + trained}
    result = {"size": size, "option": option, "planned_gib": round(costs["gib_in_all"], 1)}
    result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1) if gpu else None
    for name, t in times.items():
        result |= {f"{name}_s": round(t, 3), f"{name}_tflops": round(pflop[name] * 1e3 / t, 1)}
    result["iteration_s"] = round(5 * times["fake"] + times["generator"], 2)
    share = [round(result[f"{name}_tflops"] / REACHABLE, 3) for name in times]
    # generator and fake trained in full: weights, gradients, Adam in float32, and a bf16 backbone
    n = task.backbone.module.num_parameters()
    adapters = sum(p.numel() for role in ("generator", "fake") for p in roles.parameters(role))
    copies = round((n - adapters) * (2 * 16 + 2) / 2**30, 1)
    return result | {"share_of_reachable": share, "three_full_copies_gib": copies}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=HUNYUAN)
    parser.add_argument("--cap", type=float, default=79, help="GiB for torch [79, an 80 GB card]")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES)[:2])
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = options.sizes[0], options.options[0]
        print(json.dumps(measure(*case, options.checkpoint, options.cap)))
        return
    rows = []
    for size in options.sizes:
        for option in options.options:
            same = ["--checkpoint", options.checkpoint, "--cap", str(options.cap)]
            done = subprocess.run(
                [sys.executable, __file__, "--one", "--sizes", size, "--options", option, *same],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            row = {"size": size, "option": option, "failed": done.stderr.strip()[-200:]}
            if not done.returncode:
                row = json.loads(done.stdout.splitlines()[-1])
                first = next((r for r in rows if r["size"] == size and "iteration_s" in r), row)
                row["ratio"] = round(row["iteration_s"] / first["iteration_s"], 3)
            rows.append(row)
            print(row, flush=True)
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            result = {"hardware": name, "date": str(date.today()), "torch": torch.__version__,
                      "command": sys.argv, "cap_gib": options.cap, "rows": rows}  # fmt: skip
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
