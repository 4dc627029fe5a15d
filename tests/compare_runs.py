"""Do two run folders hold the same bits? For changes that must not change any.

    python tests/compare_runs.py runs/before runs/after

Compares weights (the newest checkpoint and generator.safetensors), metrics.jsonl and result.json
without times and memory. Prints what differs; exit status 1 then.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TIMES = ("seconds", "memory_mb", "peak_rss_mb", "tflops", "share_of_card", "hours_left", "skipped")


def weights(path):
    """{name: tensor}; the optimizers' slots by their order, as older files number them."""
    found = {}
    for name, x in load_file(path).items():
        name = name.replace("ema/", "average/", 1) if name.startswith("ema/") else name
        found[name] = x
    return found


def optimizer_slots(tensors):
    """A sorted list of fingerprints, so that numbered and named slots compare."""
    slots = [x.double() for name, x in tensors.items() if name.startswith("optimizer/")]
    return sorted((tuple(x.shape), x.sum().item(), x.norm().item()) for x in slots)


def without_times(numbers):
    if isinstance(numbers, dict):
        return {k: without_times(v) for k, v in numbers.items() if k not in TIMES}
    return numbers


def lines(folder):
    return [without_times(json.loads(x)) for x in (folder / "metrics.jsonl").open()]


def difference(one, two):
    """The first thing that differs between two numbers, lists or dicts; fields may be new."""
    if isinstance(one, dict):
        for name in one:
            if name not in two:
                return f"{name} is missing"
            inner = difference(one[name], two[name])
            if inner:
                return f"{name}: {inner}"
    elif isinstance(one, list):
        if len(one) != len(two):
            return f"{len(one)} and {len(two)} entries"
        for i, (a, b) in enumerate(zip(one, two)):
            inner = difference(a, b)
            if inner:
                return f"[{i}] {inner}"
    elif one != two:
        return f"{one} and {two}"
    return ""


def compare(one, two):
    """Sentences about what differs; empty where all bits agree."""
    said = []
    names = [sorted(folder.glob("checkpoint-*"))[-1].name for folder in (one, two)]
    if names[0] != names[1]:
        return [f"newest checkpoints {names}"]
    for name in (names[0], "generator.safetensors"):
        a, b = weights(one / name), weights(two / name)
        plain = [{n for n in x if not n.startswith("optimizer/")} for x in (a, b)]
        said += [f"{name}: only one has {n}" for n in sorted(plain[0] ^ plain[1])]
        said += [f"{name}: {n}" for n in plain[0] & plain[1] if not torch.equal(a[n], b[n])]
        if optimizer_slots(a) != optimizer_slots(b):
            said.append(f"{name}: the optimizers")
    logs = difference(lines(one), lines(two))
    said += [f"metrics.jsonl: {logs}"] if logs else []
    results = [without_times(json.loads((f / "result.json").read_text())) for f in (one, two)]
    other = difference(*results)
    return said + ([f"result.json: {other}"] if other else [])


if __name__ == "__main__":
    differences = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(differences) or "all the same bits")
    sys.exit(bool(differences))
