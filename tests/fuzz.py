"""Hostile files against encode, train, sample and export: damaged, wrong, absurd and mean ones.

Run by hand as `python tests/fuzz.py [--files N] [--seed S] [--only WORD]`; a second a file. The
good files are a tiny pipeline, its clips, their encoded folder, and a finished run of it and of a
tiny toy. Each case copies them into a folder of its own, spoils one file, and gives it to a command
that reads it, in a forked process: so time, memory, hangs and crashes are the case's own. What must
hold is in judge(). 'forged' are files whose checksum was made to fit: a checksum finds damage, it
keeps nobody from writing another one. Flipped bits of a film or a picture often do no harm.
"""

import argparse
import collections
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing asks a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads, which a fork would lose
sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers.guiders  # noqa: F401  (read before the fork, and not in every case)
import imageio.plugins.ffmpeg  # noqa: F401
import imageio_ffmpeg
import peft  # noqa: F401
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_hunyuan import film, save_tiny

import hunyuan  # noqa: F401
import toy.tasks
import w2svd

SECONDS, MB = 40, 700  # the bounds of a case: of its clock, and of the memory that it adds
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
PLAIN = "--model hunyuan --checkpoint tiny --prompt-template {} --prompt-crop-start 0 --height 32 "
PLAIN += "--width 48 --frames 9 --fps 12"
SMALL = "--lora-rank 2 --fake-updates 1 --log-every 2 --save-every 2 --lr-schedule constant"

# what is run, and the folder that it may write into
COMMANDS = {
    "encode": (f"encode {PLAIN} --videos clips --out out/data", "out"),
    "encode again": (f"encode {PLAIN} --videos clips --out data", "data"),
    "encode prompts": (f"encode {PLAIN} --prompts prompts.txt --out out/data", "out"),
    "train": (f"train --model hunyuan --data data --out out/run {SMALL} --iterations 1", "out"),
    "resume": ("train --model hunyuan --out run --resume --iterations 5", "run"),
    "sample": ("sample --run run --prompt dog --out out/film.mp4", "out"),
    "sample prompts": ("sample --run run --prompts prompts.txt --out out/films", "out"),
    "export diffusers": ("export --run run --format diffusers --out out/lora", "out"),
    "export comfyui": ("export --run run --format comfyui --out out/lora", "out"),
    "export merged": ("export --run run --format merged --out out/whole", "out"),
    "sample toy": ("sample --run toy --n 8 --out out/some.safetensors", "out"),
    "resume toy": ("train --cache cache --out toy --resume --iterations 5", "toy"),
}
EXPORTS = ("export diffusers", "export comfyui", "export merged")
# the file that is spoilt, its kind, the commands that read it
TARGETS = [
    ("clips/one.mp4", "film", ("encode",)),
    ("clips/one.txt", "text", ("encode",)),
    ("clips/metadata.jsonl", "rows", ("encode",)),
    ("clips/metadata.csv", "text", ("encode",)),
    ("clips/videos.txt", "text", ("encode",)),
    ("clips/prompt.txt", "text", ("encode",)),
    ("prompts.txt", "text", ("encode prompts", "sample prompts")),
    ("data/one*.safetensors", "tensors", ("train", "encode again")),
    ("data/index.json", "json", ("train", "encode again", "export diffusers")),
    ("run/config.json", "json", ("sample", "resume", *EXPORTS)),
    ("run/result.json", "json", ("export diffusers",)),
    ("run/generator.safetensors", "tensors", ("sample", *EXPORTS)),
    ("run/checkpoint-000004.safetensors", "tensors", ("resume",)),
    ("run/metrics.jsonl", "rows", ("resume",)),
    ("toy/config.json", "json", ("sample toy", "resume toy")),
    ("toy/generator.safetensors", "tensors", ("sample toy",)),
    ("toy/checkpoint-000004.safetensors", "tensors", ("resume toy",)),
    ("toy/metrics.jsonl", "rows", ("resume toy",)),
    ("toy/frames/000002.safetensors", "tensors", ("resume toy",)),
    ("cache/*.safetensors", "tensors", ("sample toy",)),
    ("tiny/model_index.json", "trusted", ("encode", "sample")),
    ("tiny/transformer/config.json", "trusted", ("train", "sample", "export comfyui")),
    ("tiny/vae/config.json", "trusted", ("encode", "train", "sample")),
]


# ---- how a file is spoilt: functions of its path and a generator of random choices ---------------


def rewrite(change):
    """A mutator out of a function of the bytes."""
    def mutate(path, rng):
        path.write_bytes(change(path.read_bytes(), rng))

    return mutate


def flip(content, rng):
    spoilt = bytearray(content)
    for _ in range(rng.choice([1, 8, 64])):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def instead(make):
    """A mutator that puts something else where the file was."""
    def mutate(path, rng):
        path.unlink()
        make(path)

    return mutate


BYTES = {
    "empty": rewrite(lambda x, rng: b""),
    "truncated": rewrite(lambda x, rng: x[: rng.randrange(len(x))]),
    "bits flipped": rewrite(flip),
    "head's bits flipped": rewrite(lambda x, rng: flip(x[:400], rng) + x[400:]),
    "zeros": rewrite(lambda x, rng: x[: len(x) // 2] + bytes(len(x) - len(x) // 2)),
    "noise": rewrite(lambda x, rng: rng.randbytes(5000)),
    "longer": rewrite(lambda x, rng: x + rng.randbytes(100)),
    "folder": instead(Path.mkdir),
    "fifo": instead(os.mkfifo),
    "link to zeros": instead(lambda path: path.symlink_to("/dev/zero")),
    "link outside": instead(lambda path: path.symlink_to(outside(path) / "secret.txt")),
    "link to itself": instead(lambda path: path.symlink_to(path.name)),
    "sparse": instead(lambda path: (path.touch(), os.truncate(path, 2**31))),
}


def outside(path):
    """The folder that no command may read from or write to."""
    return next(p for p in path.absolute().parents if (p / "victim").exists()) / "victim"


VALUES = [None, True, -1, 0, 1.5, 10**9, 10**30, 1e300, float("nan"), float("inf"), "", "x", "4",
          "../victim/secret.txt", "/dev/zero", "a\0b", "\ud800", "\x1b[2J", "x" * 100_000, [], {},
          [1], ["x"], {"x": 1}]  # fmt: skip
DEEP = "[" * 100_000


def spoil(content, rng):
    """One node of a JSON value, anywhere, is left out or becomes what nobody expects."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if rng.random() < 0.15:
            del content[key]
        else:
            content[key] = spoil(content[key], rng)
        return content
    return rng.choice(VALUES)


JSON = {
    "a value": rewrite(lambda x, rng: json.dumps(spoil(json.loads(x), rng)).encode()),
    "nested": rewrite(lambda x, rng: DEEP.encode()),
    "nested inside": rewrite(lambda x, rng: x.replace(b"{", b'{"x":' + DEEP.encode() + b",", 1)),
    "number of 5000 digits": rewrite(lambda x, rng: x.replace(b": ", b": " + b"9" * 5000, 1)),
}
NAMES = ["../victim/film.mp4", "/etc/passwd", "/dev/zero", "a\0b.mp4", "x" * 5000, ".", "two.mp4",
         "\ud800.mp4", "https://localhost/a.mp4", "concat:one.mp4|two.mp4", "\x1b[2J\n.mp4"]
ROWS = {
    "a row": rewrite(lambda x, rng: b"\n".join(
        json.dumps(spoil(json.loads(row), rng)).encode() for row in x.splitlines())),
    "nested": JSON["nested"],
    "many": rewrite(lambda x, rng: x * 20),
    "names": rewrite(lambda x, rng: x + b"\n".join(
        json.dumps({"file_name": name, "text": "a dog"}).encode() for name in NAMES)),
}  # fmt: skip
TEXTS = {
    "control characters": bytes(range(1, 32)) + b"a dog", "100 kB": b"a dog " * 17_000,
    "100 kB in a word": b"x" * 100_000, "NUL": b"a\0dog", "latin-1": b"a d\xf6g",
    "spaces": b" \n", "utf-16": "a dog".encode("utf-16"), "dots": b"../../x", "quotes": b'"a',
    "escapes": b"\x1b[2Ja \x1b]0;dog\x07", "surrogates": b"a \xed\xa0\x80",
    "template": b"{} {0.__class__} %s $(reboot)", "many lines": b"a dog\n" * 40,
    "500 kB": b"the dog, " * 60_000, "marks": b"a" + b"\xcc\x81" * 9000,
}  # fmt: skip
TEXT = {name: rewrite(lambda x, rng, text=text: text) for name, text in TEXTS.items()}


def forged(change):
    """A mutator out of a function of {tensor}, our JSON and rng; the checksum then fits again."""
    def mutate(path, rng):
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["w2svd"])
        info.pop("content_sha256")
        tensors, text = change(load_file(path), json.dumps(info), rng)
        try:
            info = json.loads(text)
            text = json.dumps(info | {"content_sha256": w2svd.checksum(tensors, info)})
        except (RecursionError, TypeError):
            pass  # what is no JSON object has no place for a checksum
        save_file(tensors, path, {"w2svd": text})

    return mutate


def retensor(change):
    """A mutator out of a function of one tensor; None leaves it out."""
    def one(tensors, text, rng):
        name = rng.choice(sorted(n for n in tensors if tensors[n].ndim))
        x = change(tensors.pop(name))
        return tensors | ({} if x is None else {name: x.contiguous()}), text

    return forged(one)


def reheader(change):
    """A mutator out of a function of a safetensors header, which is put before the same data."""
    def mutate(path, rng):
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        head = change(json.loads(content[8 : 8 + size]), rng)
        path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])

    return mutate


def absurd(head, rng):
    name = rng.choice([n for n in head if n != "__metadata__"])
    head[name]["shape"] = rng.choice([[2**62, 2**62], [2**40], [-1], [0], [1.5], ["x"], None])
    return json.dumps(head).encode()


def crowded(head, rng):
    none = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    more = ",".join(f'"x{i}":{{{none}}}' for i in range(10**6))
    return f"{json.dumps(head)[:-1]},{more}}}".encode()


TENSORS = {
    "header of 2^60": rewrite(lambda x, rng: struct.pack("<Q", 2**60) + x[8:]),
    "header of 100 MB": rewrite(lambda x, rng: struct.pack("<Q", 10**8) + b" " * 10**8),
    "crowded header": reheader(crowded),
    "nested header": rewrite(lambda x, rng: struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "absurd shape": reheader(absurd),
    "other dtype": reheader(lambda head, rng: json.dumps(head).replace(
        "F32", rng.choice(["I32", "BF16", "F8_E4M3", "U8", "X"])).encode()),
    "info": forged(lambda x, text, rng: (x, json.dumps(spoil(json.loads(text), rng)))),
    "info nested": forged(lambda x, text, rng: (x, DEEP)),
    "no info": reheader(lambda head, rng: json.dumps(head | {"__metadata__": {}}).encode()),
    "int64": retensor(torch.Tensor.long), "float64": retensor(torch.Tensor.double),
    "bool": retensor(torch.Tensor.bool), "bfloat16": retensor(torch.Tensor.bfloat16),
    "complex": retensor(lambda x: x.to(torch.complex64)),
    "nan": retensor(lambda x: x * float("nan")), "huge": retensor(lambda x: x * 1e30),
    "no numbers": retensor(lambda x: x[:0]), "a scalar": retensor(lambda x: x.flatten()[0]),
    "turned": retensor(lambda x: x.transpose(0, -1)), "one more": retensor(lambda x: x[None]),
    "twice": retensor(lambda x: torch.cat([x, x])), "missing": retensor(lambda x: None),
}  # fmt: skip


def ffmpeg(*arguments):
    """A mutator that lets ffmpeg write the film."""
    def mutate(path, rng):
        subprocess.run([FFMPEG, "-v", "error", "-y", *arguments, str(path)], check=True)

    return mutate


def drawn(size, *more):
    return ffmpeg("-f", "lavfi", "-i", f"testsrc=s={size}:d=2:r=30", *more)


def written(text):
    return lambda path, rng: path.write_text(text.replace("VICTIM", str(outside(path))))


FILM = {
    "no frames": drawn("80x48", "-frames:v", "0", "-movflags", "+empty_moov"),
    "one frame": drawn("80x48", "-frames:v", "1"),
    "variable frame rate": drawn("80x48", "-vf", "select='not(mod(n\\,7))+lt(n\\,9)'",
                                 "-fps_mode", "vfr"),
    "an hour between frames": drawn("80x48", "-vf", "setpts=N*3600/TB", "-fps_mode", "vfr"),
    "odd size": drawn("81x47", "-pix_fmt", "yuv444p"),
    **{size: drawn(size, "-c:v", "ffv1", "-f", "matroska") for size in ("1x1", "9000x2", "2x9000")},
    "large": drawn("7680x4320", "-t", "1", "-preset", "ultrafast"),
    "size not true": rewrite(lambda x, rng: x.replace(struct.pack(">HH", 80, 48), b"\xea\x60" * 2)),
    "sound alone": ffmpeg("-f", "lavfi", "-i", "sine=d=2", "-f", "mp4"),
    "matroska": drawn("80x48", "-f", "matroska"), "gif": drawn("80x48", "-f", "gif"),
    "picture": drawn("80x48", "-frames:v", "1", "-c:v", "png", "-f", "image2pipe"),
    "text": written("a dog\n" * 1000),
    "playlist": written("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://VICTIM/film.mp4\n"
                        "#EXTINF:9,\nhttp://localhost:1/a.mp4\n#EXT-X-ENDLIST\n"),
    "concat": written("ffconcat version 1.0\nfile two.mp4\nfile VICTIM/film.mp4\n"),
    "sdp": written("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                   "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    "dash": written('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>'
                    "<AdaptationSet><Representation><BaseURL>file://VICTIM/film.mp4</BaseURL>"
                    "</Representation></AdaptationSet></Period></MPD>"),
    "subtitles": written("1\n00:00:00,000 --> 00:00:09,000\na dog\n"),
}  # fmt: skip
MUTATORS = {"film": BYTES | FILM, "text": BYTES | TEXT, "rows": BYTES | ROWS, "json": BYTES | JSON,
            "tensors": BYTES | TENSORS,
            # the model is trusted: what damages it by chance, not what is made to do harm
            "trusted": {how: f for how, f in (BYTES | JSON).items()
                        if how not in ("fifo", "sparse", "link to zeros")}}  # fmt: skip


# ---- the good files, and a case ------------------------------------------------------------------


def small_toy():
    recipe = toy.tasks.Recipe(width=16, batch=32, iterations=10)
    toy.tasks.RECIPES, toy.tasks.SAMPLES = {"ring": recipe}, {"ring": 256}
    torch.set_num_threads(1)


def make_good(folder):
    """Everything that a case starts from; run it in a process of its own, as its threads stay."""
    os.chdir(folder)
    save_tiny("tiny")
    Path("clips").mkdir()
    for name in ("one", "two"):
        film(f"clips/{name}.mp4")
        Path(f"clips/{name}.txt").write_text("a red square moves to the left\n")
    Path("prompts.txt").write_text("a dog\na woman talks\n")
    Path("victim").mkdir()
    film("victim/film.mp4", frames=50)
    Path("victim/secret.txt").write_text("the red dog of a secret\n")
    Path("out").mkdir()
    toys = f"train --cache cache --out toy --batch 16 {SMALL} --iterations 4".split()
    for command in (COMMANDS["encode"][0].replace("out/", "").split(), toys,
                    f"train --model hunyuan --data data --out run {SMALL} --iterations 4".split()):
        if w2svd.main(command):
            raise RuntimeError(f"the good files are refused: {command}")


def prepare(folder, target):
    """The tables of clips/ hide each other: only the one that is spoilt is there."""
    rows = [("one.mp4", "a dog"), ("two.mp4", "a woman")]
    tables = {
        "metadata.jsonl": "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows),
        "metadata.csv": "file_name,text\n" + "".join(f"{n},{t}\n" for n, t in rows),
        "videos.txt": "one.mp4\ntwo.mp4\n", "prompt.txt": "a dog\na woman\n",
    }  # fmt: skip
    names = {"videos.txt", "prompt.txt"} if Path(target).stem in ("videos", "prompt") else {
        Path(target).name} & set(tables)  # fmt: skip
    for name in names:
        (folder / "clips" / name).write_text(tables[name])


Case = collections.namedtuple("Case", "target how command seed", defaults=(0,))
Result = collections.namedtuple("Result", "status seconds mb said changed parts")


def alone(function, *arguments, seconds=SECONDS):
    """function(*arguments) in a forked process: its exit status, seconds and added megabytes."""
    (end, begin), start, child = os.pipe(), time.perf_counter(), os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            statm = Path("/proc/self/statm").read_text()  # a fork starts with less than its parent
            os.write(begin, statm.encode())
            size = int(statm.split()[0]) * 4096
            # a case out of its bounds must not take the machine along
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))
            status = function(*arguments) or 0
        except BaseException:  # noqa: B036  (whatever it was, the parent shall hear of it)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.perf_counter() - start > seconds:
            os.killpg(child, signal.SIGKILL)  # with its ffmpeg
        time.sleep(0.005)
    resident = int(os.read(end, 100).split()[1]) / 256
    os.close(begin)
    os.close(end)
    # of the process or of its largest child, whichever had more
    mb = max(0, ended[2].ru_maxrss / 2**10 - resident)
    return os.waitstatus_to_exitcode(ended[1]), time.perf_counter() - start, mb


def snapshot(folder, own):
    """What lies in a folder, but where a command may write: names, kinds, sizes and times."""
    free = {folder / own, folder / "cache"}
    stats = {p: p.lstat() for p in folder.rglob("*") if not free & {p, *p.parents}}
    return {p: (s.st_mode, s.st_size, not stat.S_ISDIR(s.st_mode) and s.st_mtime_ns)
            for p, s in stats.items()}  # fmt: skip


def obey(words, folder):
    """A command in its folder, with its output in two files beside it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", closefd=False)  # pytest has others
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
    os.chdir(folder)
    return w2svd.main(words)


def play(case, good, folder):
    """Spoil a copy of the good files as the case says, and give it to the case's command."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    prepare(folder, case.target)
    (path,) = folder.glob(case.target)
    kind = next(kind for target, kind, _ in TARGETS if target == case.target)
    MUTATORS[kind][case.how](path, random.Random(case.seed))
    words, own = COMMANDS[case.command]
    before = snapshot(folder, own)
    status, seconds, mb = alone(obey, words.split(), folder)
    after = snapshot(folder, own)
    changed = [str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    said = [Path(f"{folder}.{name}").read_text(errors="replace") for name in ("stdout", "stderr")]
    parts = [str(p) for p in folder.rglob("*.part*")]
    return Result(status, seconds, mb, said, changed, parts)


def judge(case, result):
    """What is wrong with how a command took a hostile file: sentences."""
    out, err = result.said
    if result.status < 0:
        yield f"it was ended by signal {-result.status} after {result.seconds:.0f} s"
    elif result.status not in (0, 1, 2):
        yield f"its exit status is {result.status}"
    if "Traceback" in err:
        yield "a traceback: " + err.strip().splitlines()[-1]
    last = err[err.rfind("w2svd: ") :] if "w2svd: " in err else ""
    if result.status == 2 and not last.strip().endswith("."):
        yield f"no sentence says why: {err[-200:]!r}"
    if result.status == 1 and not re.search(r"[1-9]\d* skipped", out):
        yield "no skipped clip is counted"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b[^\[]|\x1b\[\d*J", out + err):
        yield "control characters reach the terminal"
    if len(out + err) > 300_000:
        yield f"{len(out + err)} characters are printed"
    if result.mb > MB:
        yield f"it takes {result.mb:.0f} MB more"
    if result.changed:
        yield f"outside of the output, {result.changed} changed"
    if result.parts:
        yield f"half-written files stay: {result.parts}"
    damaged = "checkpoint-" in case.target and case.how in BYTES and result.status == 0
    if damaged and not re.search("is damaged|does not exist", err):
        yield "a damaged checkpoint is not named"


def cases(n, rng, only=""):
    """n cases: each target, mutator and command in turn, in a random order, then over again."""
    every = [(target, how, command) for target, kind, commands in TARGETS
             for command in commands for how in MUTATORS[kind]]  # fmt: skip
    every = [case for case in every if only in " / ".join(case)]
    while n > 0:
        for case in rng.sample(every, min(n, len(every))):
            yield Case(*case, rng.randrange(2**32))
        n -= len(every)


def table(results):
    """Lines: how many files of each kind each command took, and with which status."""
    counts = collections.Counter()
    for case, result in results:
        counts[case.target, case.command, result.status] += 1
    for target, _, commands in TARGETS:
        for command in commands:
            row = {s: counts[target, command, s] for s in (0, 1, 2)}
            if sum(row.values()):
                yield f"{target:36} {command:18}" + "".join(f"{n:6}" for n in row.values())


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--files", type=int, default=500, help="how many hostile files [500]")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="a word of 'target / how / command'")
    given = options.parse_args()
    small_toy()
    results, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good"
        good.mkdir()
        if alone(make_good, good, seconds=600)[0]:
            sys.exit("the good files cannot be made")
        try:
            for case in cases(given.files, random.Random(given.seed), given.only):
                results.append((case, play(case, good, Path(folder) / "case")))
                print(f"\r{len(results)} of {given.files}", end="", file=sys.stderr)
                for sentence in judge(*results[-1]):
                    wrong += 1
                    print(f"WRONG {' / '.join(map(str, case))}: {sentence}", flush=True)
        except KeyboardInterrupt:
            pass  # what was tried until then is told
    print(f"{'target':36} {'command':18}" + "".join(f"{f'exit {n}':>6}" for n in (0, 1, 2)))
    print("\n".join(table(results)))
    for name in ("seconds", "mb"):
        case, most = max(results, key=lambda pair: getattr(pair[1], name))
        print(f"most {name}: {getattr(most, name):.1f}, {' / '.join(case[:3])}")
    print(f"{len(results)} files, {wrong} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
