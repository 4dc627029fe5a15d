"""w2svd.py alone in an empty folder trains HunyuanVideo on raw clips, resumes, samples, exports.

Against: nothing beside it. Each command is a process of its own that sees the copy, the installed
libraries and no network. Run with `python -m pytest tests/test_one_file.py`; 20 seconds.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toy.tiny_hunyuan import SIZE, TEMPLATE, clips, save_tiny

FILE = Path(__file__).resolve().parent.parent / "w2svd.py"
# Whoever asks for an address or a connection fails, and says so on its way out
NO_NETWORK = """
import socket, sys
def refuse(*args, **how):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
AS_SCRIPT = "import runpy; runpy.run_path('w2svd.py', run_name='__main__')"
AS_MODULE = f"""
import w2svd
w2svd.HunyuanVideo.prompt_template = {TEMPLATE}
for command in " ".join(sys.argv[1:]).split(" then "):
    assert w2svd.main(command.split()) == 0, command
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder but for the copy; the checkpoint and the clips lie elsewhere."""
    away = tmp_path_factory.mktemp("away")
    save_tiny(away / "tiny")
    clips(away / "clips", one="a red square moves to the left", two="a dog")
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(FILE, folder)
    return folder, away


def start(folder, code, *flags):
    """Run code in the folder; no GPU, no PYTHONPATH, and the hub not switched off by hand."""
    hidden = ("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: x for name, x in os.environ.items() if name not in hidden}
    env.update(CUDA_VISIBLE_DEVICES="", HF_HOME=str(folder / "no-hub"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", NO_NETWORK + code, *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert "NETWORK" not in done.stderr, done.stderr
    return done


def test_the_copy_goes_from_clips_to_a_lora(folder):
    folder, away = folder
    small = "--lora-rank 2 --fake-updates 2 --save-every 2 --generator-lr .1 --ema .5".split()
    data = ["--data", away / "clips", "--checkpoint", away / "tiny", *SIZE, *small]
    begin = ["train", "--model", "hunyuan", *data, "--iterations", 2, "--out", "r"]
    resume = "then train --resume --out r --iterations 3"
    sample = "then sample --run r --prompt red --at 2 --out red.mp4 then export --run r --out lora"
    done = start(folder, AS_MODULE, *begin, *resume.split(), *sample.split())
    assert done.returncode == 0, done.stderr
    assert "2 clips, 2 encoded now" in done.stdout and "2 clips, 0 encoded now" in done.stdout
    saved = {path.name for path in (folder / "r").iterdir()}
    saves = {f"{kind}-00000{i}.safetensors" for kind in ("generator", "checkpoint") for i in (2, 3)}
    assert saved >= {*saves, "generator.safetensors", "result.json", "config.json"}
    assert len(list((folder / "r/samples").glob("000003-*.mp4"))) == 2
    assert (folder / "red.mp4").stat().st_size > 0
    assert (folder / "lora/pytorch_lora_weights.safetensors").stat().st_size > 0
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"w2svd.py", "r", "red.mp4", "lora"}


MISSING = [("toy", "toy/"), ("hunyuan --data nowhere", "folder"), ("hunyuan --data .", "GPU")]


@pytest.mark.parametrize("flags, word", MISSING)
def test_what_is_missing_is_said_in_one_sentence_before_any_download(folder, flags, word):
    done = start(folder[0], AS_SCRIPT, "train", "--model", *flags.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("w2svd: ") and word in sentence
    assert not (folder[0] / "runs").exists() and not (folder[0] / "no-hub").exists()
