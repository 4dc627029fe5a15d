"""notebooks/to_comfyui.py: an exported LoRA under ComfyUI's names, its card and its workflow.

Against: the released checkpoint's layout, applied to random inputs layer by layer; the numbers of
the run that was exported. Run with `python -m pytest tests/test_comfyui.py`; 15 seconds.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run
from safetensors.torch import load_file

import w2svd
from toy.tiny_hunyuan import save_tiny

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FORMS = {None: None, "latent_concat": ("v1 (concat)", 2), "token_replace": ("v2 (replace)", 4)}
QKV, ADDED = ["attn.to_q", "attn.to_k", "attn.to_v"], [f"attn.add_{x}_proj" for x in "qkv"]
LAYOUT = {  # by which programs split the rows: q, k, v and a single block's MLP, in this order
    "double_blocks.{}.img_attn_qkv": QKV,
    "double_blocks.{}.txt_attn_qkv": ADDED,
    "double_blocks.{}.img_attn_proj": ["attn.to_out.0"],
    "double_blocks.{}.txt_attn_proj": ["attn.to_add_out"],
    "single_blocks.{}.linear1": [*QKV, "proj_mlp"],
    "single_blocks.{}.linear2": ["proj_out"],
}
for stream, part in (("img", "ff"), ("txt", "ff_context")):
    LAYOUT[f"double_blocks.{{}}.{stream}_mlp.fc1"] = [f"{part}.net.0.proj"]
    LAYOUT[f"double_blocks.{{}}.{stream}_mlp.fc2"] = [f"{part}.net.2"]


def convert(*paths, code=0):
    """The script in a process of its own, which knows no w2svd; what it says on stderr."""
    command = [sys.executable, NOTEBOOKS / "to_comfyui.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NOTEBOOKS)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture(scope="module", params=FORMS)
def made(request, tmp_path_factory):
    """A form, and the folder of a run's export, lora/, and its conversion, comfyui/."""
    folder = tmp_path_factory.mktemp("comfyui")
    save_tiny(folder / "tiny", request.param, blocks=2)
    sizes = {"height": 32, "width": 48, "frames": 9, "fps": 12.0}
    how = {"steps": 3, "shift": 4.0, "embedded_guidance": 4.5, "lora_rank": 3, **sizes}
    config = w2svd.Config("hunyuan", checkpoint=str(folder / "tiny"), out=str(folder), **how)
    task = w2svd.load_task(config)
    task.clips, task.backbone = [], task.backbone.load()
    trained = w2svd.Run(config, w2svd.Machine(), task)
    for x in trained.state.average.values():
        x.normal_()
    trained.save_generator(folder / "generator.safetensors")
    w2svd.write_json(folder / "config.json", {"config": vars(config)})
    run("export", "--run", folder, "--out", folder / "lora")
    convert(folder / "lora", folder / "comfyui")
    return request.param, folder


def test_every_layer_of_every_block_does_what_its_parts_do(made):
    """At strength alpha / rank, the rows in the released order."""
    found = load_file(made[1] / "comfyui/w2svd_comfyui.safetensors")
    ours = load_file(made[1] / "lora/pytorch_lora_weights.safetensors")
    for block in (0, 1):
        for theirs, parts in LAYOUT.items():
            theirs = f"diffusion_model.{theirs.format(block)}"
            A, B = (found.pop(f"{theirs}.lora_{x}.weight") for x in "AB")
            x, alpha = torch.randn(5, A.shape[1]), found.pop(f"{theirs}.alpha")
            kind = "transformer_blocks" if "double" in theirs else "single_transformer_blocks"
            names = [f"transformer.{kind}.{block}.{part}.lora_" for part in parts]
            parts = [(ours.pop(f"{n}A.weight"), ours.pop(f"{n}B.weight")) for n in names]
            expected = torch.cat([x @ a.T @ b.T for a, b in parts], dim=1)
            torch.testing.assert_close(x @ A.T @ B.T * alpha / len(A), expected)
    assert not found and not ours


def test_the_workflow_has_the_run_s_numbers(made):
    """The sampler is ours, its levels come from the shifted model."""
    form, folder = made
    graph = json.loads((folder / "comfyui/workflow_api.json").read_text())
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    video = "HunyuanImageToVideo" if form else "EmptyHunyuanLatentVideo"
    for kind in ("BasicScheduler", "BasicGuider"):
        assert graph[inputs[kind]["model"][0]]["class_type"] == "ModelSamplingSD3"
    for kind, numbers in {
        "LoraLoaderModelOnly": {"lora_name": "w2svd_comfyui.safetensors", "strength_model": 1},
        "ModelSamplingSD3": {"shift": 4},
        "BasicScheduler": {"steps": 3, "scheduler": "simple"},
        "KSamplerSelect": {"sampler_name": "lcm"},
        "FluxGuidance": {"guidance": 4.5},
        "CreateVideo": {"fps": 12},
        video: {"height": 32, "width": 48, "length": 9, "batch_size": 1},
    }.items():
        assert inputs[kind].items() >= numbers.items()
    if form:
        interleave = inputs["TextEncodeHunyuanVideo_ImageToVideo"]["image_interleave"]
        assert (inputs[video]["guidance_type"], interleave) == FORMS[form]
        assert FORMS[form][0] in (folder / "comfyui/README.md").read_text()


@pytest.mark.parametrize("made", [None], indirect=True)
def test_the_shipped_workflow_is_that_of_the_defaults_and_mistakes_are_refused(made, tmp_path):
    shutil.copytree(made[1] / "lora", tmp_path / "lora")
    about = json.loads((made[1] / "lora/w2svd.json").read_text())
    about.update(vars(w2svd.Config()), image_form=None)
    (tmp_path / "lora/w2svd.json").write_text(json.dumps(about))
    convert(tmp_path / "lora", tmp_path / "out")
    made, shipped = tmp_path / "out/workflow_api.json", NOTEBOOKS / "comfyui_workflow_api.json"
    assert json.loads(made.read_text()) == json.loads(shipped.read_text())
    assert convert(tmp_path, tmp_path / "new", code=2).startswith("to_comfyui: ")  # no export
    assert convert(tmp_path / "lora", tmp_path, code=2).startswith("to_comfyui: ")  # in use
