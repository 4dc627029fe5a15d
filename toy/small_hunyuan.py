"""A small HunyuanVideo that has learnt: diffusers' own pipeline, trained on clips drawn by formula.

    python -m toy.small_hunyuan small/                      the pipeline, from its stored weights
    python -m toy.small_hunyuan small-i2v/ --first-frame    the same, which continues a first frame
    python -m toy.small_hunyuan --clips clips/              clips (and captions) it has not seen
    python -m toy.small_hunyuan --measure small/ [--run runs/small]     how often films are right
    python -m toy.small_hunyuan --train weights/            how the weights were made

The two text encoders are random: words only have to differ. VAE and transformer have learnt 64
captions such as 'a red disc moves left slowly' (toy/shapes.py), in 9 frames of 48 x 64 pixels.
With --first-frame it is HunyuanVideo-I2V in its later form, token_replace: a LoRA, trained by
flow matching on top of the text-to-video weights, is merged into them.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file
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

import w2svd
from toy import tiny_hunyuan
from toy.shapes import CAPTIONS, FPS, FRAMES, HEIGHT, WIDTH, shares, write_clips

WEIGHTS = Path(__file__).parent / "weights"
TEMPLATE, MARKS = tiny_hunyuan.TEMPLATE, tiny_hunyuan.MARKS
# the end is not number 2, which CLIP takes for the mark of an old checkpoint
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = [*SPECIAL.values(), *sorted({word for caption in CAPTIONS for word in caption.split()})]
I2V_TEMPLATE = {  # the same marks, around words that it knows
    **tiny_hunyuan.I2V_TEMPLATE,
    "template": "<|start_header_id|>a<|end_header_id|><image>a<|eot_id|>"
    "<|start_header_id|>a<|end_header_id|>{}<|eot_id|>"
    "<|start_header_id|>a<|end_header_id|>",
    "crop_start": 10,
}
FORM = "token_replace"
I2V_RANK = 64  # of the LoRA that is merged for it
VAE = {
    "latent_channels": 16,
    "block_out_channels": (16, 24, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,  # see whiten
}
TRANSFORMER = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (8, 12, 12),
    "guidance_embeds": True,
}
SIZE = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "fps": FPS}
# what `w2svd.py train` takes from the folder; the rest is hunyuan's preset
SETTINGS = {
    **SIZE,
    "checkpointing": False,
    "steps": 4,
    "shift": 3.0,
    "generator_input": "rollout",
    "fake_samples": "final",
    "reuse": 5,
    "batch": 16,  # its captions are all of one length
    "sigma_shift": 3.0,
    "lora_rank": 32,
    "generator_lr": 5e-4,
    "fake_lr": 1e-3,
    "lr_schedule": "linear",
    "fake_weight_decay": 0.1,
    "ema": 0.98,
    "iterations": 100,
    "log_every": 10,
    "save_every": 50,
}
EULER = [(28, 3.0), (10, 3.0), (4, 3.0), (4, 5.0), (4, 7.0), (1, 1.0)]  # steps, shift


# ---- The pipeline --------------------------------------------------------------------------------
def tokenizer(marks=()):
    """Words to numbers, with a beginning and an end, padded on the right; `marks` are words too."""
    table = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(mark, WORDS.index(mark)) for mark in ("<s>", "</s>")]
    table.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    how = {"padding_side": "right", "additional_special_tokens": list(marks), **SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=table, **how)


def text_encoders():
    """A Llama and a CLIP of random weights, drawn by name, so that they are always the same."""
    shape = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32}
    shape.update(num_attention_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    # the pipeline reads the state two layers before the end, which is here the words' embeddings
    llama = LlamaModel(LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, **shape))
    clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, max_position_embeddings=77, **shape))
    draw_weights(torch.Generator().manual_seed(0), llama, clip)
    return llama.eval(), clip.eval()


@torch.no_grad()
def draw_weights(rng, *models):
    """Random weights of the usual size; norms keep 1, and their biases 0."""
    for model in models:
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))


def reader(llama):
    """Image-to-video's text encoder: the words of `llama`, and a picture as 16 random tokens."""
    words = tokenizer(MARKS)
    vision = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32}
    vision.update(num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=8)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**{**llama.config.to_dict(), "vocab_size": len(words)}),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    llava = LlavaForConditionalGeneration(config)
    draw_weights(torch.Generator().manual_seed(1), llava)
    with torch.no_grad():
        known = llama.get_input_embeddings().weight
        llava.get_input_embeddings().weight[: len(known)] = known
    return llava.eval()


def save_pipeline(folder, vae, transformer):
    """Write the whole pipeline in diffusers' format, and w2svd's settings for it."""
    first_frame = transformer.config.image_condition_type == FORM
    llama, clip = text_encoders()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = transformer.eval(), vae.eval(), scheduler, clip, tokenizer()
    if first_frame:  # this import complains of no torchvision
        from diffusers import HunyuanVideoImageToVideoPipeline
        from transformers import CLIPImageProcessor

        sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        eyes = CLIPImageProcessor(**sides)
        pipe = HunyuanVideoImageToVideoPipeline(reader(llama), tokenizer(MARKS), *parts, eyes)
    else:
        pipe = HunyuanVideoPipeline(llama, tokenizer(), *parts)
    pipe.save_pretrained(folder)
    template = I2V_TEMPLATE if first_frame else TEMPLATE
    about = {"prompt_template": template, "settings": SETTINGS}
    w2svd.write_json(Path(folder, "w2svd.json"), about)


def stored(weights, name, Model, config):
    """A model with the weights stored in a folder, which may be of 16 bits; as float32."""
    tensors = load_file(Path(weights, f"small_{name}.safetensors"))
    model = Model(**config)
    model.load_state_dict({name: x.float() for name, x in tensors.items()})
    return model


def store(weights, name, tensors):
    """Store {name: tensor} in 16 bits."""
    tensors = {name: x.half() for name, x in tensors.items()}
    w2svd.write_safetensors(Path(weights, f"small_{name}.safetensors"), tensors, {"part": name})


def stored_vae(weights=WEIGHTS):
    return stored(weights, "vae", AutoencoderKLHunyuanVideo, VAE)


def stored_transformer(weights=WEIGHTS, form=None):
    """The text-to-video transformer; of a form it reads a first frame too, yet without use."""
    config = {**TRANSFORMER, "image_condition_type": form}
    return stored(weights, "transformer", HunyuanVideoTransformer3DModel, config)


def merge_lora(transformer, weights=WEIGHTS):
    """Add the stored LoRA, which lets the transformer continue a first frame."""
    layers = load_file(Path(weights, "small_first_frame.safetensors"))
    for name in [name for name in layers if name.endswith("lora_A.weight")]:
        layer = transformer.get_submodule(name.removesuffix(".lora_A.weight"))
        down, up = layers[name].float(), layers[name.replace("lora_A", "lora_B")].float()
        layer.weight.data += up @ down


def build(folder, weights=WEIGHTS, first_frame=False):
    """Write the pipeline of the stored weights; image-to-video's with first_frame."""
    transformer = stored_transformer(weights, FORM if first_frame else None)
    if first_frame:
        merge_lora(transformer, weights)
    save_pipeline(folder, stored_vae(weights), transformer)


def encode_captions(model, pipe, captions, firsts=None):
    """Captions of one length as one batch of conditions; image-to-video's with first frames.

    firsts: (N, 3, 1, H, W) in [-1, 1].
    """
    if model.form:
        pairs = zip(captions, firsts)
        conds = [model.encode_text(pipe, caption, first[None]) for caption, first in pairs]
    else:
        texts = {caption: model.encode_text(pipe, caption) for caption in dict.fromkeys(captions)}
        conds = [texts[caption] for caption in captions]
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


# ---- What films show -----------------------------------------------------------------------------
def draw_films(model, pipe, velocity, sampler, sigmas, captions, seed):
    """Films (N, T, H, W, 3) in [0, 1] of the captions, drawn all at once."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *model.video, generator=rng)
    x0 = sampler(velocity, noise, sigmas, encode_captions(model, pipe, captions), rng)
    return np.stack([model.decode(pipe, one[None]) for one in x0])


def measure(folder, run="", seed=0):
    """Print the shares of the backbone's films by Euler, 28, 10, 4 and 1 steps, and of a run's."""
    config = w2svd.Config(model="hunyuan", checkpoint=str(folder), **SIZE)
    model = w2svd.HunyuanVideo.outline(config).load()
    if model.form:
        raise SystemExit("python -m toy.small_table SMALL/ CLIPS/ measures image-to-video")
    pipe = w2svd.load_pipeline(folder, w2svd.ENCODERS)

    def show(name, velocity, sampler, sigmas):
        films = draw_films(model, pipe, velocity, sampler, sigmas, CAPTIONS, seed)
        table = shares(films, CAPTIONS)
        print(f"{name:24}", *(f"{title} {x:.3f} " for title, x in table.items()), flush=True)

    for steps, shift in EULER:
        sigmas = w2svd.few_step_sigmas(steps, shift)
        show(f"Euler, {steps}, shift {shift:g}", model.velocity, w2svd.euler_sample, sigmas)
    if run:
        tensors, info = w2svd.read_generator(run)
        task = w2svd.VideoTask(config, w2svd.HunyuanVideo)
        task.backbone = task.backbone.load()
        student = task.student(tensors, info)
        sigmas = torch.tensor(info["sigmas"])
        show(f"student, {len(sigmas) - 1}", student, w2svd.few_step_sample, sigmas)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", help="write the pipeline into it")
    parser.add_argument("--first-frame", action="store_true", help="the one that continues one")
    parser.add_argument("--clips", help="write clips into this folder")
    parser.add_argument("--number", type=int, default=256, help="of clips [256]")
    parser.add_argument("--measure", help="a pipeline's folder: how often its films are right")
    parser.add_argument(
        "--run", default="", help="with --measure, a run's folder: the student's too"
    )
    parser.add_argument("--train", help="train again, and store the weights in this folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it was made, and is held, on a CPU
    if given.train:
        from toy.small_training import train

        train(given.train)
    if given.folder:
        build(given.folder, first_frame=given.first_frame)
        print(f"wrote {given.folder}")
    if given.clips:
        write_clips(given.clips, given.number)
        print(f"wrote {given.number} clips into {given.clips}")
    if given.measure:
        measure(given.measure, given.run)


if __name__ == "__main__":
    main()
