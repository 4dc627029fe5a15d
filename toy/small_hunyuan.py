"""A small HunyuanVideo that has learnt: diffusers' own pipeline, trained on clips drawn by formula.

    python -m toy.small_hunyuan small/                      the pipeline, from its stored weights
    python -m toy.small_hunyuan --clips clips/              clips (and captions) it has not seen
    python -m toy.small_hunyuan --measure small/ [--run runs/small]     how often films are right
    python -m toy.small_hunyuan --train weights/            how the weights were made

The two text encoders are random: words only have to differ. VAE and transformer have learnt 64
captions such as 'a red disc moves left slowly' (toy/shapes.py), in 9 frames of 48 x 64 pixels.
"""

import argparse
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
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

import w2svd
from toy.shapes import CAPTIONS, FPS, FRAMES, HEIGHT, WIDTH, shares, write_clips

WEIGHTS = Path(__file__).parent / "weights"
TEMPLATE = {"template": "{}", "crop_start": 0}  # the text encoders follow no instructions
# the end is not number 2, which CLIP takes for the mark of an old checkpoint
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = [*SPECIAL.values(), *sorted({word for caption in CAPTIONS for word in caption.split()})]
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
def tokenizer():
    """Words to numbers, with a beginning and an end, padded on the right."""
    table = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, WORDS.index(mark)) for mark in ("<s>", "</s>")]
    table.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=table, padding_side="right", **SPECIAL)


def text_encoders():
    """A Llama and a CLIP of random weights, drawn by name, so that they are always the same."""
    shape = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32}
    shape.update(num_attention_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    # the pipeline reads the state two layers before the end, which is here the words' embeddings
    llama = LlamaModel(LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, **shape))
    clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, max_position_embeddings=77, **shape))
    rng = torch.Generator().manual_seed(0)
    for encoder in (llama, clip):
        for name, parameter in sorted(encoder.named_parameters()):
            if "norm" in name:
                continue  # 1, and its bias 0
            scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            with torch.no_grad():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return llama.eval(), clip.eval()


def save_pipeline(folder, vae, transformer):
    """Write the whole pipeline in diffusers' format, and w2svd's settings for it."""
    llama, clip = text_encoders()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = transformer.eval(), vae.eval(), scheduler, clip, tokenizer()
    HunyuanVideoPipeline(llama, tokenizer(), *parts).save_pretrained(folder)
    about = {"prompt_template": TEMPLATE, "settings": SETTINGS}
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


def build(folder, weights=WEIGHTS):
    """Write the pipeline of the stored weights."""
    vae = stored(weights, "vae", AutoencoderKLHunyuanVideo, VAE)
    transformer = stored(weights, "transformer", HunyuanVideoTransformer3DModel, TRANSFORMER)
    save_pipeline(folder, vae, transformer)


def encode_captions(model, pipe, captions):
    """The text of captions of one length, as one batch of conditions."""
    texts = {caption: model.encode_text(pipe, caption) for caption in dict.fromkeys(captions)}
    names = ("prompt_embeds", "pooled")
    return {name: torch.cat([texts[caption][name] for caption in captions]) for name in names}


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
    model.prompt_template = TEMPLATE
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
    parser.add_argument("--clips", help="write clips into this folder")
    parser.add_argument("--number", type=int, default=256, help="of clips [256]")
    parser.add_argument("--measure", help="a pipeline's folder: how often its films are right")
    parser.add_argument(
        "--run", default="", help="with --measure, a run's folder: the student's too"
    )
    parser.add_argument("--train", help="train again, and store the weights in this folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.train:
        from toy.small_training import train

        train(given.train)
    if given.folder:
        build(given.folder)
    if given.clips:
        write_clips(given.clips, given.number)
    if given.measure:
        measure(given.measure, given.run)


if __name__ == "__main__":
    main()
