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

TIMES = ("seconds", "memory_mb", "peak_rss_mb", "tflops", "hours_left")


def flat(place, x):
    """{where: number} of what JSON holds, without times and memory."""
    if not isinstance(x, dict | list):
        return {place: x}
    inner, found = x.items() if isinstance(x, dict) else enumerate(x), {}
    for name, part in inner:
        if name not in TIMES:
            found.update(flat(f"{place}: {name}", part))
    return found


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {**flat("metrics.jsonl", rows), **flat("result.json", result)}


def weights(folder):
    """{where: tensor} of the newest checkpoint and of the generator."""
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    files = newest, folder / "generator.safetensors"
    return {f"{file.name}: {name}": x for file in files for name, x in load_file(file).items()}


def compare(one, two):
    """Where two folders differ; empty where all bits agree."""
    ours, theirs = numbers(one), numbers(two)
    differ = [where for where in ours if where in theirs and ours[where] != theirs[where]]
    differ += sorted(ours.keys() ^ theirs.keys())
    ours, theirs = weights(one), weights(two)
    differ += [w for w in ours if w in theirs and not torch.equal(ours[w], theirs[w])]
    return differ + sorted(ours.keys() ^ theirs.keys())


if __name__ == "__main__":
    differences = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(differences) or "all the same bits")
    sys.exit(bool(differences))
