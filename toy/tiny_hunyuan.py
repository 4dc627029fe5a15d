"""HunyuanVideo pipelines small enough for a test, saved as diffusers does, and films for them."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SPECIAL = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
WORDS = [*SPECIAL.values(), *"a the red blue square woman dog talks moves to camera left".split()]
SIZE = "--height 32 --width 48 --frames 9 --fps 12".split()  # of clips that it takes quickly

# The text encoders follow no instructions: for HunyuanVideo.prompt_template
TEMPLATE = {"template": "{}", "crop_start": 0}
# Image-to-video's: the encoder finds the picture's 16 tokens, and the roles, by these marks
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
I2V_TEMPLATE = {
    "template": "<|start_header_id|>system<|end_header_id|><image>the dog<|eot_id|>"
    "<|start_header_id|>woman<|end_header_id|>{}<|eot_id|>"
    "<|start_header_id|>camera<|end_header_id|>",
    "crop_start": 11,
    "image_emb_start": 4,
    "image_emb_end": 20,
    "image_emb_len": 16,
}


def tokenizer(marks=()):
    table = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    how = {"padding_side": "right", **SPECIAL}
    if marks:
        begin = ("<s>", WORDS.index("<s>"))
        table.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
        how["additional_special_tokens"] = list(marks)
    return PreTrainedTokenizerFast(tokenizer_object=table, **how)


def save_tiny(folder, form=None, scaling=0.476986, blocks=1):
    """A whole pipeline of random weights; always the same ones. form: of image-to-video."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=9 if form == "latent_concat" else 4,
        out_channels=4,
        image_condition_type=form,
        guidance_embeds=form != "latent_concat",  # as the released checkpoints
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=blocks,
        num_single_layers=blocks,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scaling,
    )
    shared = {"vocab_size": len(WORDS), "num_attention_heads": 2}
    shared.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    llama = LlamaConfig(max_position_embeddings=512, **shape, **shared)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    clip = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **shape, **shared))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    rest = transformer.eval(), vae.eval(), scheduler, clip.eval(), tokenizer()
    if form is None:
        HunyuanVideoPipeline(LlamaModel(llama).eval(), tokenizer(), *rest).save_pretrained(folder)
        return
    from diffusers import HunyuanVideoImageToVideoPipeline  # its import complains of no torchvision

    words = tokenizer(MARKS)
    llava, eyes = reader(llama, words)
    HunyuanVideoImageToVideoPipeline(llava, words, *rest, eyes).save_pretrained(folder)


def reader(llama, words):
    """Image-to-video's text encoder, which sees a picture as 16 tokens, and what cuts pictures."""
    from transformers import CLIPImageProcessor

    llama.vocab_size = len(words)
    vision = {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8}
    vision.update(num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=8)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=llama,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LlavaForConditionalGeneration(config).eval(), CLIPImageProcessor(**sides)


def film(path, frames=40, size=(48, 80), fps=30):
    """A square that moves to the right, as an .mp4."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for t, frame in enumerate(video):
        frame[10:30, t % 60 : t % 60 + 20] = 255, 80, 0
    iio.imwrite(path, video, plugin="FFMPEG", fps=fps)


def clips(folder, **captions):
    """A folder of films, every second one twice as fast, with these captions beside them."""
    Path(folder).mkdir(exist_ok=True)
    for i, (name, caption) in enumerate(captions.items()):
        film(Path(folder, f"{name}.mp4"), fps=60 if i % 2 else 30, frames=60)
        Path(folder, f"{name}.txt").write_text(caption + "\n")
    return Path(folder)
