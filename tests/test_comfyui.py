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


def test_the_workflow_is_a_whole_graph_with_the_run_s_numbers(made):
    """Every link leads to a node; the sampler is ours, its levels come from the shifted model."""
    graph = json.loads((made[1] / "comfyui/workflow_api.json").read_text())
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    links = [x for given in inputs.values() for x in given.values() if isinstance(x, list)]
    assert len(inputs) == len(graph) and all(node in graph for node, _ in links)
    assert set(graph) - {node for node, _ in links} == {"17"}  # what is saved

    def feeds(kind, name):
        return graph[inputs[kind][name][0]]["class_type"]

    assert feeds("ModelSamplingSD3", "model") == "LoraLoaderModelOnly"
    assert feeds("BasicScheduler", "model") == feeds("BasicGuider", "model") == "ModelSamplingSD3"
    assert feeds("BasicGuider", "conditioning") == "FluxGuidance"
    assert inputs["LoraLoaderModelOnly"]["lora_name"] == "w2svd_comfyui.safetensors"
    assert inputs["LoraLoaderModelOnly"]["strength_model"] == 1
    assert inputs["ModelSamplingSD3"]["shift"] == 4 and inputs["BasicScheduler"]["steps"] == 3
    assert inputs["BasicScheduler"]["scheduler"] == "simple"
    assert inputs["KSamplerSelect"]["sampler_name"] == "lcm"
    assert inputs["FluxGuidance"]["guidance"] == 4.5 and inputs["CreateVideo"]["fps"] == 12
    video = "HunyuanImageToVideo" if made[0] else "EmptyHunyuanLatentVideo"
    size = {"height": 32, "width": 48, "length": 9, "batch_size": 1}
    assert inputs[video].items() >= size.items()
    assert feeds("SamplerCustomAdvanced", "latent_image") == video
    if made[0]:
        assert feeds("FluxGuidance", "conditioning") == video
        interleave = inputs["TextEncodeHunyuanVideo_ImageToVideo"]["image_interleave"]
        assert (inputs[video]["guidance_type"], interleave) == FORMS[made[0]]


def test_the_card_has_the_run_s_numbers_to_the_last_0(made):
    card = (made[1] / "comfyui/README.md").read_text()
    assert all(part in card for part in ("shift 4,", "1, 0.888889, 0.666667, 0;", "Guidance 4.5;"))
    for kind, form in FORMS.items():
        assert form is None or (form[0] in card) == (kind == made[0])


def test_the_shipped_workflow_is_that_of_the_defaults(made, tmp_path):
    shutil.copytree(made[1] / "lora", tmp_path / "lora")
    about = json.loads((made[1] / "lora/w2svd.json").read_text())
    about.update(vars(w2svd.Config()), image_form=None)
    (tmp_path / "lora/w2svd.json").write_text(json.dumps(about))
    convert(tmp_path / "lora", tmp_path / "out")
    made, shipped = tmp_path / "out/workflow_api.json", NOTEBOOKS / "comfyui_workflow_api.json"
    assert json.loads(made.read_text()) == json.loads(shipped.read_text())


def test_what_is_no_export_and_a_folder_in_use_are_refused_in_a_sentence(made, tmp_path):
    (tmp_path / "mine.txt").write_text("years of work")
    for lora, out in ((tmp_path / "no", "new"), (tmp_path, "new"), (made[1] / "lora", ".")):
        (sentence,) = convert(lora, tmp_path / out, code=2).splitlines()
        assert sentence.startswith("to_comfyui: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
