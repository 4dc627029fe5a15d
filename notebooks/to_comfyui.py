"""A LoRA of HunyuanVideo or Wan that `w2svd.py export` wrote, as ComfyUI reads it.

    python w2svd.py export --run runs/mine --out lora/
    python notebooks/to_comfyui.py lora/ comfyui/

It writes w2svd_comfyui.safetensors for models/loras, README.md, which says what goes wrong without
a word, and for HunyuanVideo workflow_api.json, a graph with the run's own numbers. Nothing of w2svd
is needed. Wan's layers are renamed one by one; its file was not tried in ComfyUI itself.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

TEMPLATE = Path(__file__).with_name("comfyui_workflow_api.json")
# HunyuanVideo's own layers, as ComfyUI names them, out of diffusers' parts
DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)}
BLOCKS = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}
WAN = {  # parts of a name
    "transformer.blocks.": "diffusion_model.blocks.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_": ".",
    ".add_k_proj.": ".k_img.",
    ".add_v_proj.": ".v_img.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
}
FORMS = {  # of image-to-video: guidance_type, image_interleave, model
    "latent_concat": ("v1 (concat)", 2, "image_to_video"),
    "token_replace": ("v2 (replace)", 4, "v2_replace_image_to_video"),
}
CARD = """# {checkpoint} in {steps} steps, by w2svd, for ComfyUI

For ComfyUI and kijai's wrapper, and for musubi-tuner after its `convert_lora.py --target default`;
diffusers refuses it. The file goes into models/loras; workflow_api.json is this graph:

LoraLoaderModelOnly at strength 1; ModelSamplingSD3, shift {shift:g}, that feeds BasicScheduler
(simple, {steps} steps), or ManualSigmas {sigmas}; KSamplerSelect {sampler};
FluxGuidance {embedded_guidance:g}; BasicGuider; SamplerCustomAdvanced. {width} x {height},
{frames} frames, {fps:g} a second.

What spoils the video without a word: a BasicScheduler on the loader itself, to which no shift
comes; FluxGuidance's own 3.5; another sampler than {sampler}; KSampler's cfg of 8, not 1.
"""
WAN_CARD = """# {checkpoint} in {steps} steps, by w2svd, for ComfyUI

For ComfyUI and programs that read its names; diffusers takes the folder that this was made from.
The file goes into models/loras: LoraLoaderModelOnly at strength 1; ModelSamplingSD3, shift
{shift:g}, that feeds BasicScheduler (simple, {steps} steps), or ManualSigmas {sigmas};
KSamplerSelect {sampler}; BasicGuider; SamplerCustomAdvanced. {width} x {height}, {frames} frames,
{fps:g} a second. It was not tried in ComfyUI itself.

What spoils the video without a word: a BasicScheduler on the loader itself, to which no shift
comes; another sampler than {sampler}; a cfg other than 1, for which the LoRA was not trained.
"""
IMAGE = """
Image-to-video: TextEncodeHunyuanVideo_ImageToVideo with image_interleave {interleave}, and
HunyuanImageToVideo with guidance_type '{guidance}', both from one picture, cropped to the video's
shape. Another guidance_type or image_interleave than these spoils the video, without a word too.
Of a latent_concat model's video the first 4 frames only repeat the picture.
"""


def renamed(tensors):
    """Wan's adapter under the original names, which have a layer for each of diffusers'."""
    converted = {}
    for name, x in tensors.items():
        for ours, theirs in WAN.items():
            name = name.replace(ours, theirs)
        converted[name] = x
        if "lora_A" in name:  # alpha is the rank: strength 1
            converted[name.replace("lora_A.weight", "alpha")] = torch.tensor(float(len(x)))
    return converted


def convert(tensors):
    """The adapter under the original names. Fused layers: A stacked, B block-diagonal, exact."""
    converted = {}
    for kind, i in sorted({tuple(name.split(".")[1:3]) for name in tensors}):
        block, layers = BLOCKS[kind]
        for layer, parts in layers.items():
            names = [f"transformer.{kind}.{i}.{part}" for part in parts]
            A, B = ([tensors[f"{name}.lora_{x}.weight"] for name in names] for x in "AB")
            theirs, stacked = f"diffusion_model.{block}.{i}.{layer}", torch.cat(A)
            converted[f"{theirs}.lora_A.weight"] = stacked
            converted[f"{theirs}.lora_B.weight"] = torch.block_diag(*B)
            # alpha is the stacked rank: strength 1; without it some readers apply a third
            converted[f"{theirs}.alpha"] = torch.tensor(float(len(stacked)))
    return converted


def workflow(about):
    """The graph of TEMPLATE with the run's numbers; for image-to-video with a picture's nodes."""
    graph = json.loads(TEMPLATE.read_text())
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    size = {"width": about["width"], "height": about["height"]}
    inputs["ModelSamplingSD3"]["shift"] = float(about["shift"])
    inputs["BasicScheduler"]["steps"] = about["steps"]
    inputs["KSamplerSelect"]["sampler_name"] = about["sampler"]
    inputs["FluxGuidance"]["guidance"] = float(about["embedded_guidance"])
    inputs["EmptyHunyuanLatentVideo"].update(size, length=about["frames"])
    inputs["CreateVideo"]["fps"] = float(about["fps"])
    if about["image_form"]:
        guidance, interleave, model = FORMS[about["image_form"]]
        inputs["UNETLoader"]["unet_name"] = f"hunyuan_video_{model}_720p_bf16.safetensors"
        crop = {"image": ["18", 0], "upscale_method": "lanczos", **size, "crop": "center"}
        encode = {"clip_vision": ["20", 0], "image": ["19", 0], "crop": "center"}
        text = {"clip": ["5", 0], "clip_vision_output": ["21", 0]}
        text.update(prompt=inputs["CLIPTextEncode"]["text"], image_interleave=interleave)
        video = {"positive": ["6", 0], "vae": ["14", 0], "start_image": ["19", 0]}
        video.update(inputs["EmptyHunyuanLatentVideo"], guidance_type=guidance)
        for number, kind, values in (
            ("6", "TextEncodeHunyuanVideo_ImageToVideo", text),
            ("12", "HunyuanImageToVideo", video),
            ("18", "LoadImage", {"image": "first.png"}),
            ("19", "ImageScale", crop),
            ("20", "CLIPVisionLoader", {"clip_name": "llava_llama3_vision.safetensors"}),
            ("21", "CLIPVisionEncode", encode),
        ):
            graph[number] = {"class_type": kind, "inputs": values}
        inputs["FluxGuidance"]["conditioning"] = ["12", 0]
        inputs["SamplerCustomAdvanced"]["latent_image"] = ["12", 1]
    return graph


def card(about):
    """How to use it, and what goes wrong silently."""
    text = WAN_CARD if about["model"] == "wan" else CARD
    if about["image_form"] in FORMS:
        guidance, interleave, _ = FORMS[about["image_form"]]
        text, about = text + IMAGE, {**about, "guidance": guidance, "interleave": interleave}
    return text.format(**{**about, "sigmas": ", ".join(f"{x:.6g}" for x in about["sigmas"])})


def main(argv=None):
    """Convert a folder; 0, or 2 after a sentence about what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lora", type=Path, help="the folder that `w2svd.py export` wrote")
    parser.add_argument("out", type=Path, help="a new folder")
    options = parser.parse_args(argv)
    reason = f"{options.lora} is no LoRA of a known model that w2svd.py export wrote"
    try:
        about = json.loads((options.lora / "w2svd.json").read_text())
        about["sampler"] = "lcm" if about["renoise"] else "euler"
        tensors, graph = load_file(options.lora / "pytorch_lora_weights.safetensors"), None
        if about["model"] == "wan":
            tensors = renamed(tensors)
        else:
            tensors, graph = convert(tensors), workflow(about)
        text = card(about)
        reason = f"{options.out} is in use, or cannot be written: name a new folder"
        options.out.mkdir(parents=True, exist_ok=True)
        if any(options.out.iterdir()):
            raise FileExistsError(options.out)
        (options.out / "README.md").write_text(text, encoding="utf-8")
        if graph:
            (options.out / "workflow_api.json").write_text(json.dumps(graph, indent=1))
        (options.out / "w2svd_comfyui.safetensors").write_bytes(save(tensors))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        print(f"to_comfyui: {reason} ({type(error).__name__}: {error}).", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
