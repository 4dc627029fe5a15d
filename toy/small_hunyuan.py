"""A small HunyuanVideo that has learnt: diffusers' own pipeline, trained on clips drawn by formula.

    python -m toy.small_hunyuan small/                      the pipeline, from its stored weights
    python -m toy.small_hunyuan --clips clips/              clips (and captions) it has not seen
    python -m toy.small_hunyuan --measure small/ [--run runs/small]     how often films are right
    python -m toy.small_hunyuan --train weights/            how the weights were made

The two text encoders are random: words only have to differ. VAE and transformer have learnt 64
captions such as 'a red disc moves left slowly' (toy/shapes.py), in 9 frames of 48 x 64 pixels.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file, save_file
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
from toy.baselines import finetune
from toy.shapes import CAPTIONS, FPS, FRAMES, HEIGHT, WIDTH, draw_clips, draw_crowds, judge, right

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
    "patch_size": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (8, 12, 12),
    "guidance_embeds": True,
}
CLIP_SEED, VAE_SEED, DATA_SEED, TEST_SEED = 1000, 1, 2, 3  # of clips: four sets that differ
# What `w2svd.py train` takes from the folder; the rest is hunyuan's preset
SETTINGS = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "fps": FPS}


# Of the backbone
TRAINING = {"generator": "full", "lora_rank": 1, "checkpointing": False, "batch": 32}
TRAINING.update(generator_lr=1e-3, lr_schedule="linear", ema=0.995, iterations=5000)
TRAINING.update(sigma_low=0.0, sigma_high=1.0, sigma_shift=2.0)


EULER = [(28, 3.0), (10, 3.0), (4, 1.0), (4, 3.0), (4, 5.0), (4, 7.0), (1, 1.0)]


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
    llama = LlamaModel(LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, **shape))
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
    tensors = {name: x.detach().half().contiguous() for name, x in tensors.items()}
    save_file(tensors, Path(weights, f"small_{name}.safetensors"))


def build(folder, weights=WEIGHTS):
    """Write the pipeline of the stored weights."""
    vae = stored(weights, "vae", AutoencoderKLHunyuanVideo, VAE)
    transformer = stored(weights, "transformer", HunyuanVideoTransformer3DModel, TRANSFORMER)
    save_pipeline(folder, vae, transformer)


def write_clips(folder, number, seed=CLIP_SEED):
    """Write random clips as .mp4 with their captions as .txt."""
    import imageio.v3 as iio

    videos, captions = draw_clips(number, torch.Generator().manual_seed(seed))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (video, caption) in enumerate(zip(videos, captions)):
        frames = (127.5 * (video.permute(1, 2, 3, 0) + 1)).round().byte().numpy()
        # at this size half as many pixels for colour would show
        how = {"quality": 10, "pixelformat": "yuv444p", "output_params": w2svd.BT709}
        iio.imwrite(folder / f"{i:04}.mp4", frames, plugin="FFMPEG", fps=FPS, **how)
        (folder / f"{i:04}.txt").write_text(caption + "\n")


# ---- How the weights were made -------------------------------------------------------------------
def train_vae(stills=400, crowds=480, clips=320, lr=1e-3):
    """Train the VAE: on stills, then on clips of many shapes, then of one as they are wanted.

    Few shapes on an empty ground, or motion at once, would take it many times as long to grasp.
    Pixels are in [-1, 1]; latents get a little noise, and are kept from growing.
    """
    torch.manual_seed(VAE_SEED)
    vae, rng = AutoencoderKLHunyuanVideo(**VAE), torch.Generator().manual_seed(VAE_SEED)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    began, log, steps = time.process_time(), [], stills + crowds + clips
    for step in range(steps):
        if step < stills:
            x = draw_crowds(8, 4, rng, motion=0.0)[:, :, :1]
        elif step < stills + crowds:
            x = draw_crowds(2, 4, rng)
        else:
            x = draw_clips(3, rng)[0]
        if step == stills:
            see_the_last(vae)
        since = step if step < stills else step - stills
        scale = min(1, (since + 1) / 30, 1.9 * (1 - step / steps) + 0.05)
        optimizer.param_groups[0]["lr"] = scale * lr
        with torch.autocast("cpu", torch.bfloat16):  # a third faster
            z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z + 0.1 * torch.randn(z.shape)).sample
        mse = (y.float() - x).square().mean()
        loss = mse + 0.2 * (y.float() - x).abs().mean() + 3e-4 * z.float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds, share = time.process_time() - began, float(mse.detach() / x.var())
            log.append({"step": step + 1, "share_of_variance": share, "seconds": seconds})
            print("vae", log[-1], flush=True)
    whiten(vae, draw_clips(64, rng)[0])
    return vae.eval(), log


@torch.no_grad()
def see_the_last(vae):
    """Let every convolution read a frame's last neighbour in time alone, with the summed weights.

    Stills look the same to it. Trained on them, a convolution weighs its three frames alike, and
    thirty of them would blur a clip beyond use.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            total = module.weight.sum(dim=2)
            module.weight.zero_()
            module.weight[:, :, -1] = total


@torch.no_grad()
def whiten(vae, x):
    """Give each channel of the latents of clips x (N, 3, T, H, W) mean 0 and deviation 1.

    The two 1 x 1 x 1 convolutions beside the latents take the change, so that films stay the same.
    """
    z = vae.encode(x).latent_dist.mode()
    mean, deviation = z.mean(dim=(0, 2, 3, 4)), z.std(dim=(0, 2, 3, 4))
    into, back, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.weight[:channels] /= deviation[:, None, None, None, None]
    back.bias += back.weight[:, :, 0, 0, 0] @ mean
    back.weight *= deviation[:, None, None, None]


def encode_all(model, pipe, number):
    """Scaled latents (N, C, T', H', W') of `number` clips, in memory, and their captions."""
    rng, latents, captions = torch.Generator().manual_seed(DATA_SEED), [], []
    for _ in range(number // 16):
        videos, words = draw_clips(16, rng)
        latents.append(model.encode_video(pipe, videos))
        captions += words
    return torch.cat(latents), captions


def encode_captions(model, pipe, captions):
    """The text of captions of one length, as one batch of conditions."""
    texts = {caption: model.encode_text(pipe, caption) for caption in dict.fromkeys(captions)}
    names = ("prompt_embeds", "pooled")
    return {name: torch.cat([texts[caption][name] for caption in captions]) for name in names}


def batches(latents, cond, size):
    """Endless random batches, as the loops of w2svd read them."""
    rng = torch.Generator().manual_seed(DATA_SEED)
    while True:
        chosen = torch.randint(len(latents), (size,), generator=rng)
        yield {"x0": latents[chosen], "cond": {name: x[chosen] for name, x in cond.items()}}


def train_transformer(vae, clips=6144, **settings):
    """Train the transformer from the beginning by `finetune`, as a full generator; its average.

    The embedded guidance is the same number, w2svd's default, here and wherever it is sampled.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(folder, vae, HunyuanVideoTransformer3DModel(**TRANSFORMER))
        how = {"model": "hunyuan", "checkpoint": folder, **SETTINGS, **TRAINING, **settings}
        config = w2svd.Config(**how)
        model = w2svd.HunyuanVideo.outline(config).load()
        model.prompt_template = TEMPLATE
        pipe = w2svd.load_pipeline(folder, w2svd.ENCODERS)
    began, log = time.process_time(), []
    latents, captions = encode_all(model, pipe, clips)
    data = batches(latents, encode_captions(model, pipe, captions), config.batch)
    state = w2svd.State(config, w2svd.build_roles(config, model, w2svd.Machine()), "cpu")
    state.optimizers["generator"].param_groups[0]["betas"] = (0.9, 0.99)  # no moving target here
    for stats in finetune(config, state.roles, state, data):
        if state.iteration % 100 == 0:
            loss, seconds = float(stats["generator_loss"]), time.process_time() - began
            log.append({"step": state.iteration, "loss": loss, "seconds": seconds})
            print("transformer", log[-1], flush=True)
    return state.average, log


# ---- What films show -----------------------------------------------------------------------------
def draw_films(model, pipe, velocity, sampler, sigmas, captions, seed):
    """Films (N, T, H, W, 3) in [0, 1] of the captions, drawn all at once."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *model.video, generator=rng)
    x0 = sampler(velocity, noise, sigmas, encode_captions(model, pipe, captions), rng)
    return np.stack([model.decode(pipe, one[None]) for one in x0])


def shares(films, captions):
    """How many of the films show each word of their captions, and the mean of what was measured."""
    words = [right(film, caption) for film, caption in zip(films, captions)]
    seen = [judge(film) for film in films]
    numbers = ("fit", "sharpness", "distance", "motion")
    table = {name: float(np.mean([one[name] for one in words])) for name in words[0]}
    return {**table, **{name: float(np.mean([one[name] for one in seen])) for name in numbers}}


def measure(folder, run="", seed=TEST_SEED):
    """Print the shares of the backbone's films by Euler, 28, 10, 4 and 1 steps, and of a run's."""
    config = w2svd.Config(model="hunyuan", checkpoint=str(folder), **SETTINGS)
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


def train(weights):
    """Train both models, one after the other, and store their weights, losses and times."""
    Path(weights).mkdir(parents=True, exist_ok=True)
    vae, vae_log = train_vae()
    store(weights, "vae", vae.state_dict())
    transformer, log = train_transformer(vae)
    store(weights, "transformer", transformer)
    about = {"vae": vae_log, "transformer": log, "torch": torch.__version__}
    w2svd.write_json(Path(weights, "small.json"), about)


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
        train(given.train)
    if given.folder:
        build(given.folder)
    if given.clips:
        write_clips(given.clips, given.number)
    if given.measure:
        measure(given.measure, given.run)


if __name__ == "__main__":
    main()
