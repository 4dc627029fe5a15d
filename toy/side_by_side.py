"""One frozen backbone with two LoRAs beside three models, DMD2's recipe: memory, time and KL.

    python -m toy.side_by_side        4 minutes on one CPU core

Both are the loop of `w2svd.distil`, in turns, each time in a process of its own: adapters in both
roles, or whole copies for the generator and the fake beside the frozen backbone. The model is
HunyuanVideo's architecture at an eighth of its width and a fifth of its depth, with random weights,
checkpointing as at 13B, and adapters as narrow in proportion. Beside it stand the plan's memory at
13B, by formulas and not measured, and the KL on the ring from toy/results/methods.json.
"""

import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

import w2svd
from toy.table import spread

RESULTS = Path(__file__).parent / "results"
STORED = RESULTS / "side_by_side.json"
ROUNDS = 3  # of an iteration timed after a first one, in turns
KINDS = {  # the columns: settings of the real code, and the row of methods.json
    "one backbone, two LoRAs": ("lora", "W2SVD"),
    "three models (DMD2's recipe)": ("full", "DMD2"),
}
SHAPE = 16, 5, 16, 16  # of the latents, C, T, H, W: 320 tokens, and 32 of text


def middle():
    """HunyuanVideo at width 384 with 4 + 8 blocks, of random weights: 45 M parameters."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    module = HunyuanVideoTransformer3DModel(
        num_attention_heads=3,
        num_layers=4,
        num_single_layers=8,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=32,
    )
    return w2svd.HunyuanVideo(module.requires_grad_(False), w2svd.Config())


def settings_of(kind):
    """Those in which the two columns differ; a full fake has no adapter to weaken."""
    alpha = 0.0 if kind == "full" else 0.25
    return {"generator": kind, "fake": kind, "alpha_weak": alpha}


def measure(kind):
    """{seconds of an iteration, MB at most beyond torch itself, parameters} of one process."""
    backbone = middle()
    without = w2svd.memory_mb("cpu") - sum(p.nbytes for p in backbone.module.parameters()) / 2**20
    config = w2svd.Config(lora_rank=8, iterations=1 + ROUNDS, **settings_of(kind))
    roles = w2svd.Roles(backbone, 8, config.alpha_weak, 1.0, kind, kind)
    roles.use_checkpointing()
    state = w2svd.State(config, roles, "cpu")
    cond = {"prompt_embeds": torch.randn(1, 32, 64), "pooled": torch.randn(1, 32)}
    batch = {"x0": torch.randn(1, *SHAPE), "cond": cond}
    loop, seconds = w2svd.distil(config, roles, state, iter(lambda: batch, None)), []
    for _ in range(1 + ROUNDS):
        started = time.process_time()
        next(loop)
        seconds.append(time.process_time() - started)
    trained = sum(p.numel() for role in ("generator", "fake") for p in roles.parameters(role))
    held = sum(p.numel() for p in backbone.module.parameters())
    held += sum(p.numel() for copy in roles.copies.values() for p in copy.module.parameters())
    mb = w2svd.memory_mb("cpu") - without
    return {"seconds": seconds[1:], "mb": mb, "trained": trained, "held": held}


def planned(kind):
    """The plan of the 13B model at 480 x 832 with 61 frames, GiB."""
    config = w2svd.Config(model="hunyuan", checkpointing=True, **settings_of(kind))
    return w2svd.plan(config, w2svd.HunyuanVideo.outline(config))["GiB in all"]


def markdown(stored):
    """The table of the README."""
    methods = json.loads((RESULTS / "methods.json").read_text())
    columns = []
    for name, (kind, row) in KINDS.items():
        x, kl = stored[name], spread([run["student"]["kl"] for run in methods[row].values()], 2)
        cells = {"": name, "---": "---"}
        cells["weights, of which trained, M"] = f"{x['held'] / 1e6:.0f}, {x['trained'] / 1e6:.1f}"
        cells["peak memory, MB"] = f"{x['mb']:.0f}"
        cells["CPU seconds an iteration"] = f"{statistics.median(x['seconds']):.1f}"
        cells["GiB at 13B, 480x832x61, by the plan"] = f"{planned(kind):.0f}"
        seconds = methods["seconds"][row]
        cells["KL on the ring, nats, in CPU seconds"] = f"{kl} in {seconds:.0f}"
        columns.append(cells)
    lines = [f"| {name} | {' | '.join(cells[name] for cells in columns)} |" for name in columns[0]]
    return "\n".join(lines).replace("| --- | --- | --- |", "|---|---|---|")


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    runs = {name: [] for name in KINDS}
    for _ in range(2):
        for name, (kind, _) in KINDS.items():
            command = [sys.executable, "-m", "toy.side_by_side", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
            print(name, done.stdout, flush=True)
    stored = {}
    for name, both in runs.items():
        seconds = [s for run in both for s in run["seconds"]]
        stored[name] = both[0] | {"seconds": seconds, "mb": max(run["mb"] for run in both)}
    stored["made"] = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "hardware": "one CPU core",
        "command": "python -m toy.side_by_side",
    }
    w2svd.write_json(STORED, stored)
    print(markdown(stored))


if __name__ == "__main__":
    main()
