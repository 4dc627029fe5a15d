"""A run that is killed, and goes on, against one that is not: are they the same, bit for bit?

    python tests/kill.py [--kills 50] [--files 40] [--models toy hunyuan] [--seed 0]

Each run is `w2svd.main(["train", ...])` in a child forked from a process that has the libraries
loaded, with a checkpoint in every iteration. It is ended in four ways:

    random   kill -9 at random moments, from the start of the child to the last line of result.json
    file     kill -9 just before the n-th time that Python opens, renames, truncates, deletes a file
    half     kill -9 when a safetensors file has been written half
    signal   SIGTERM or SIGINT: the step is finished, a checkpoint written, the status 143 or 130

and resumed until it finishes. Compared with an unbroken run: the last checkpoint, the generator,
metrics.jsonl without its times and memory, result.json likewise, and the names of all files.
About 10 minutes on 2 CPU cores for both models; exit code 1 if anything differs.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from tiny_hunyuan import film, save_tiny

sys.path.append(str(Path(__file__).parent.parent))
for library in ("diffusers.loaders", "peft", "PIL.Image", "matplotlib.figure", "hunyuan"):
    importlib.import_module(library)  # here, not in every child

import w2svd  # noqa: E402
from toy import tasks  # noqa: E402

SMALL = "--lora-rank 4 --fake-updates 2 --save-every 1 --keep 2 --keep-every 3".split()
SIZE = "--height 32 --width 48 --frames 9 --fps 12 --prompt-template {} --prompt-crop-start 0"


def prepare(folder):
    """{model: flags of a small run}: a toy of seconds, and a tiny HunyuanVideo with its clips."""
    torch.set_num_threads(1)
    tasks.RECIPES = {"ring": tasks.Recipe(width=16, batch=32, iterations=10)}
    tasks.SAMPLES = {"ring": 256}
    save_tiny(folder / "tiny")
    (folder / "clips").mkdir()
    film(folder / "clips/one.mp4")
    (folder / "clips/one.txt").write_text("a red square moves to the left")
    status, log = end_of(start(
        ["encode", "--model", "hunyuan", "--checkpoint", folder / "tiny", *SIZE.split(),
         "--videos", folder / "clips", "--out", folder / "data"], folder))  # fmt: skip
    assert status == 0, log.read_text()
    small = ["train", *SMALL, "--iterations", 12]
    return {
        "toy": [*small, "--model", "toy", "--batch", 16, "--log-every", 2, "--cache",
                folder / "cache"],
        "hunyuan": [*small, "--model", "hunyuan", "--log-every", 2, "--data", folder / "data",
                    "--sample-every", 6],
    }  # fmt: skip


def start(argv, folder, before=lambda: None):
    """(process id, its log): a child that runs the command; `before` is called in it."""
    log = folder / "child.log"
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            before()
            status = w2svd.main([str(flag) for flag in argv])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return pid, log


def end_of(child, seconds=600.0):
    """(exit status, or minus the signal; None after so many seconds of life; and its log)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child[0], os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), child[1]
        time.sleep(0.001)
    return None, child[1]


def kill(child):
    os.kill(child[0], signal.SIGKILL)
    os.waitpid(child[0], 0)


def without_costs(value):
    """JSON without what may differ: times and memory."""
    if isinstance(value, dict):
        return {k: without_costs(x) for k, x in value.items()
                if "seconds" not in k and not k.endswith("_mb")}  # fmt: skip
    return [without_costs(x) for x in value] if isinstance(value, list) else value


def outcome(folder):
    """All of a finished run that must not depend on how often it was killed."""
    tensors, infos = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors[path.name], info = w2svd.read_safetensors(path)
        infos[path.name] = {k: x for k, x in info.items() if k != "config" and "metrics" not in k}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    texts = [json.loads(x) for x in lines] + [json.loads((folder / "result.json").read_text())]
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    return tensors, (infos, without_costs(texts), names)


def differences(a, b):
    """What differs between two outcomes, in words; empty if nothing does."""
    (a, a_rest), (b, b_rest) = a, b
    found = [f"{what} differs" for what, x, y in
             zip(("a header", "metrics.jsonl or result.json"), a_rest, b_rest) if x != y]
    found += [f"{name} is in one alone" for name in sorted({*a_rest[2]} ^ {*b_rest[2]})]
    for name in a.keys() & b.keys():
        same = a[name].keys() == b[name].keys()
        if not same or not all(torch.equal(a[name][k], b[name][k]) for k in a[name]):
            found.append(f"the tensors of {name} differ")
    return found


def die_before_file(n, folder, count=None):
    """An audit hook: kill this process before its n-th operation on files of the folder."""
    done = [0]

    def hook(event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.mkdir"):
            return
        if not arguments or not str(arguments[0]).startswith(str(folder)):
            return
        done[0] += 1
        if count:
            os.write(count, b".")
        if done[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def die_half_way(n):
    """Kill this process when the n-th safetensors file of the run has been written half."""
    whole, done = safetensors.torch.save_file, [0]

    def half(tensors, path, metadata):
        whole(tensors, path, metadata=metadata)
        done[0] += 1
        if done[0] == n:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: setattr(safetensors.torch, "save_file", half)


class Trial:
    """One run folder: ended in some way, resumed until it finishes, compared with `expected`."""

    number = 0

    def __init__(self, argv, folder, expected):
        Trial.number += 1
        self.argv, self.parent, self.expected = argv, folder, expected
        self.folder = folder / f"run-{Trial.number}"
        self.halves = 0  # half-written files that a kill left behind

    def start(self, before=lambda: None):
        resume = ["--resume"] if self.folder.exists() else []
        return start([*self.argv, "--out", self.folder, *resume], self.parent, before)

    def killed(self):
        self.halves += any(self.folder.glob(".*.part*"))

    def finish(self):
        """Resume to the end; what differs from the unbroken run, in words."""
        status, log = end_of(self.start())
        if status != 0:
            return [f"exit status {status}: {log.read_text()[-500:]}"]
        return differences(outcome(self.folder), self.expected)


def unbroken(argv, folder):
    """The outcome of a run that nobody disturbs, its seconds, and its operations on files."""
    run, began = Trial(argv, folder, None), time.monotonic()
    read, write = os.pipe()
    status, log = end_of(run.start(die_before_file(0, run.folder, write)))
    assert status == 0, log.read_text()
    return outcome(run.folder), time.monotonic() - began, len(os.read(read, 65536))


def by_chance(argv, folder, expected, seconds, kills, rng):
    """Kill at random moments, run after run: (kills, half-written files, what differs)."""
    done, halves, wrong = 0, 0, []
    while done < kills:
        trial = Trial(argv, folder, expected)
        for _ in range(min(4, kills - done)):
            child = trial.start()
            if end_of(child, rng.uniform(0, 0.6 * seconds))[0] is not None:
                break
            kill(child)
            trial.killed()
            done += 1
        wrong += trial.finish()
        halves += trial.halves
    return done, halves, wrong


def on_purpose(argv, folder, expected, before):
    """Kill where `before` says: (kills, half-written files, what differs)."""
    trial = Trial(argv, folder, expected)
    status, log = end_of(trial.start(before(trial.folder)))
    if status != -signal.SIGKILL:
        return 0, 0, [f"it was to be killed and ended with {status}: {log.read_text()[-500:]}"]
    trial.killed()
    return 1, trial.halves, trial.finish()


def signalled(argv, folder, expected, number, twice=False):
    """A signal in training, or two: (1, 0, what differs)."""
    trial = Trial(argv, folder, expected)
    child, log = trial.start(), trial.folder / "metrics.jsonl"
    while not log.exists() or not log.read_text():
        time.sleep(0.001)
    for _ in range(1 + twice):
        os.kill(child[0], number)
    status, text = end_of(child, 60)
    if status != 128 + number:
        return 1, 0, [f"exit status {status} after signal {number}: {text.read_text()[-500:]}"]
    newest = json.loads((trial.folder / "newest.json").read_text())["checkpoint"]
    steps = len(log.read_text().splitlines()) * 2
    late = [] if twice or int(newest[11:17]) >= steps else [f"{newest} is older than line {steps}"]
    return 1, 0, late + trial.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="at random moments, of each model")
    parser.add_argument("--files", type=int, default=40, help="operations on files, of each model")
    parser.add_argument("--models", nargs="*", default=["toy", "hunyuan"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, good = random.Random(options.seed), True
    with tempfile.TemporaryDirectory() as folder:
        every = prepare(Path(folder))
        for model in options.models:
            argv = every[model]
            expected, seconds, operations = unbroken(argv, Path(folder))
            args = argv, Path(folder), expected
            again = unbroken(argv, Path(folder))[0]
            wrong = differences(again, expected)
            chosen = rng.sample(range(1, operations + 1), min(options.files, operations))
            ways = {
                "unbroken, once more": [(0, 0, wrong)],
                "at random moments": [by_chance(*args, seconds, options.kills, rng)],
                "before an operation on a file": [
                    on_purpose(*args, lambda run, n=n: die_before_file(n, run)) for n in chosen],
                "with a half-written file": [
                    on_purpose(*args, lambda run, n=n: die_half_way(n)) for n in (1, 4, 13)],
                "by SIGTERM": [signalled(*args, signal.SIGTERM)],
                "by SIGINT": [signalled(*args, signal.SIGINT)],
                "by two SIGTERMs": [signalled(*args, signal.SIGTERM, twice=True)],
            }  # fmt: skip
            for way, outcomes in ways.items():
                kills, halves, wrong = (sum(x, []) if isinstance(x[0], list) else sum(x)
                                        for x in zip(*outcomes))  # fmt: skip
                print(f"{model}, {way}: {kills} ended, {halves} half-written files left behind, "
                      f"{wrong or 'all the same bits'}", flush=True)  # fmt: skip
                good &= not wrong
            print(f"{model}: a run takes {seconds:.1f} s and {operations} operations on files")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
