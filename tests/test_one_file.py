"""w2svd.py alone in an empty folder trains HunyuanVideo on raw clips, resumes, samples, exports.

Against: nothing beside it. Each command is a process of its own that sees the copy, the installed
libraries and no network. Run with `python -m pytest tests/test_one_file.py`; about 40 seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny

FILE = Path(__file__).resolve().parent.parent / "w2svd.py"
SMALL = ["--lora-rank", 2, "--fake-updates", 2, "--log-every", 1, "--save-every", 2]
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
    (away / "clips").mkdir()
    for name in ("one", "two"):
        film(away / "clips" / f"{name}.mp4")
        (away / "clips" / f"{name}.txt").write_text("a red square moves to the left\n")
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(FILE, folder)
    return folder, away


def start(folder, code, *flags):
    """Run code in the folder; no GPU, no PYTHONPATH, and the hub not switched off by hand."""
    hidden = ("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: x for name, x in os.environ.items() if name not in hidden}
    env |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "no-hub"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-c", NO_NETWORK + code, *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert "NETWORK" not in done.stderr, done.stderr
    return done


def sentence(done, status=2):
    """The one sentence on the last line of a command that stopped."""
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("w2svd: ")
    return last


def test_the_copy_trains_resumes_samples_and_exports_without_anything_beside_it(folder):
    folder, away = folder

    def w2svd(*flags):  # commands, with the word 'then' between two
        done = start(folder, AS_MODULE, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = ["--data", away / "clips", "--checkpoint", away / "tiny", *SIZE]
    said = w2svd("train", "--model", "hunyuan", *data, *SMALL, "--iterations", 2, "--out", "r")
    assert "2 clips, 2 encoded now" in said
    assert len(list((away / "clips/.w2svd").glob("*.safetensors"))) == 2
    train = "train --resume --out r --iterations 3"
    sample = "sample --run r --prompt red --at 2 --out red.mp4"
    export = "export --run r --format diffusers --out lora"
    said = w2svd(train, "then", sample, "then", export)
    assert "2 clips, 0 encoded now" in said
    rows = [json.loads(line) for line in (folder / "r/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    saved = {path.name for path in (folder / "r").iterdir()}
    saves = {f"{kind}-00000{i}.safetensors" for kind in ("generator", "checkpoint") for i in (2, 3)}
    assert saved >= saves | {"generator.safetensors", "result.json", "config.json", "samples"}
    assert len(list((folder / "r/samples").glob("000003-*.mp4"))) == 2

    assert (folder / "red.mp4").stat().st_size > 0
    assert (folder / "lora/pytorch_lora_weights.safetensors").stat().st_size > 0
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"w2svd.py", "r", "red.mp4", "lora"}


@pytest.mark.parametrize("command", ["", "train", "encode", "sample", "export"])
def test_help_needs_no_other_file_and_fits_80_columns(folder, command):
    done = start(folder[0], AS_SCRIPT, *command.split(), "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_plan_of_the_13b_model_needs_no_other_file_no_gpu_and_no_download(folder):
    flags = ["train", "--model", "hunyuan", "--data", "my_clips/", "--dry-run"]
    done = start(folder[0], AS_SCRIPT, *flags)
    assert done.returncode == 0 and "12821012544" in done.stdout, done.stderr
    assert not (folder[0] / "runs").exists()


def test_the_toy_names_the_folder_that_it_lacks(folder):
    said = sentence(start(folder[0], AS_SCRIPT, "train", "--model", "toy"))
    assert "toy/" in said and not (folder[0] / "runs").exists()


@pytest.mark.parametrize("data", [[], ["--data", "clips"]])
def test_without_a_gpu_the_13b_model_ends_in_the_next_command_before_any_download(folder, data):
    folder, away = folder
    data = [away / flag if flag == "clips" else flag for flag in data]
    said = sentence(start(folder, AS_SCRIPT, "train", "--model", "hunyuan", *data))
    assert "GPU" in said and "python w2svd.py train --model hunyuan --data" in said
    assert not (folder / "runs").exists() and not (folder / "no-hub").exists()


def test_without_data_a_gpu_is_told_the_next_command_before_any_download(folder):
    gpu = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.mem_get_info = lambda *args: (80 * 2**30, 80 * 2**30)
"""
    folder, _ = folder
    said = sentence(start(folder, gpu + AS_SCRIPT, "train", "--model", "hunyuan"))
    assert "python w2svd.py train --model hunyuan --data" in said
    assert not (folder / "runs").exists() and not (folder / "no-hub").exists()
