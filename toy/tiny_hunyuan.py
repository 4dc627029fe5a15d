"""A HunyuanVideoPipeline small enough for a test, saved in diffusers' format, and films for it."""

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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

SPECIAL = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
WORDS = [*SPECIAL.values(), *"a the red blue square woman dog talks moves to camera left".split()]

# Its text encoder follows no instructions: for HunyuanVideo.prompt_template
TEMPLATE = {"template": "{}", "crop_start": 0}
SIZE = "--height 32 --width 48 --frames 9 --fps 12".split()  # of clips that it takes quickly


def tokenizer():
    table = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, padding_side="right", **SPECIAL)


def save_tiny(folder, channels=4, text=16, scaling=0.476986):
    """A whole pipeline of random weights; always the same ones."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=text,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scaling,
    )
    shared = {"vocab_size": len(WORDS), "num_attention_heads": 2}
    shared |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"hidden_size": text, "intermediate_size": 16, "num_hidden_layers": 3}
    llama = LlamaModel(LlamaConfig(max_position_embeddings=512, **shape, **shared))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    clip = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **shape, **shared))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    models = llama.eval(), tokenizer(), transformer.eval(), vae.eval(), scheduler, clip.eval()
    HunyuanVideoPipeline(*models, tokenizer()).save_pretrained(folder)


def film(path, frames=40, size=(48, 80), fps=30):
    """A square that moves to the right, as an .mp4."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for t, frame in enumerate(video):
        frame[10:30, t % 60 : t % 60 + 20] = 255, 80, 0
    iio.imwrite(path, video, plugin="FFMPEG", fps=fps)
