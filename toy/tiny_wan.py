"""Wan pipelines small enough for a test, saved as diffusers does; films are tiny_hunyuan's."""

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from toy.tiny_hunyuan import WORDS, tokenizer

PICTURE = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}


def transformer(image=False, blocks=3):
    """A WanTransformer3DModel of random weights that bf16 can hold, always the same ones."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    found = WanTransformer3DModel(num_layers=blocks, **sizes, **(PICTURE if image else {}))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.ndim > 1:  # at its own start the text hardly matters
                parameter.normal_(std=0.5 if "attn2" in name else 0.15)
            parameter.copy_(parameter.bfloat16())
    return found.eval().requires_grad_(False)


def save_tiny(folder, image=False, blocks=3):
    """A whole pipeline; image: one that goes on from a first frame."""
    sizes = {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 1, 1, 1]}
    model = transformer(image, blocks)
    text = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    parts = {
        "transformer": model,
        "vae": AutoencoderKLWan(**sizes).eval(),
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), **text)).eval(),
        "tokenizer": tokenizer(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    if not image:
        WanPipeline(**parts).save_pretrained(folder)
        return
    from diffusers import WanImageToVideoPipeline  # its import complains of no torchvision
    from transformers import CLIPImageProcessor

    vision = {"hidden_size": 8, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    vision = CLIPVisionConfig(num_attention_heads=2, num_hidden_layers=2, **vision)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    parts["image_encoder"] = CLIPVisionModel(vision).eval()
    parts["image_processor"] = CLIPImageProcessor(**sides)
    WanImageToVideoPipeline(**parts).save_pretrained(folder)
