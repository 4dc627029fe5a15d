"""A long run: does anything grow? Memory, tensors, open files, the time of a step.

    python tests/soak.py [--steps 5000]

Trains the toy's ring in this process and reads, at each of ten points, the resident memory, the
live tensors and their bytes, the open files, and the mean time of a step since the last point. The
first two points warm up. Prints the ten lines; exit code 1 if memory has grown by more than 2 % or
2 MiB, or tensors or open files at all. The time is printed, not checked: other processes bend it.
"""

import argparse
import contextlib
import gc
import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from toy import tasks  # noqa: E402
from w2svd import main as command  # noqa: E402


def reading():
    """(resident MiB, live tensors, their MiB, open files)."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    size = sum(x.untyped_storage().nbytes() for x in tensors)
    return resident / 2**20, len(tensors), size / 2**20, len(os.listdir("/proc/self/fd"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    tasks.RECIPES = {"ring": tasks.Recipe(iterations=20)}
    tasks.SAMPLES = {"ring": 1024}
    rows, began, on_log = [], [time.perf_counter()], tasks.Task.on_log

    def watch(self, step, generator):
        on_log(self, step, generator)
        if step % (steps // 10) == 0:
            passed = (time.perf_counter() - began[0]) / (steps // 10)
            rows.append((step, *reading(), 1e3 * passed))
            began[0] = time.perf_counter()

    tasks.Task.on_log = watch
    every = str(steps // 100)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--iterations", str(steps), "--batch", "32", "--log-every", every, "--save-every",
                 every, "--cache", f"{folder}/cache", "--out", f"{folder}/run"]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = command(["train", "--model", "toy", *flags])
        log = (Path(folder) / "run/metrics.jsonl").stat().st_size
        kept = len(list(Path(folder, "run").glob("checkpoint-*")))
    print("  step  resident MiB  tensors   their MiB  open files  ms a step")
    for step, resident, tensors, size, files, passed in rows:
        print(f"{step:6} {resident:13.1f} {tensors:8} {size:11.2f} {files:11} {passed:10.1f}")
    print(f"metrics.jsonl: {log} bytes for 100 lines; checkpoints kept: {kept}")
    (_, memory, *first), (_, memory_last, *last) = rows[2][:5], rows[-1][:5]
    flat = memory_last - memory < max(2, 0.02 * memory) and first == last
    return 0 if flat and status == 0 and len(rows) == 10 else 1


if __name__ == "__main__":
    sys.exit(main())
