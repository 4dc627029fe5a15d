"""How the weights of toy/small_hunyuan.py were made: VAE, transformer, the LoRA for first frames.

    python -m toy.small_hunyuan --train weights/

Clips are drawn as they are needed, from seeds that `--clips` does not use.
"""

import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

import w2svd
from toy.baselines import finetune
from toy.shapes import draw_clips, draw_crowds
from toy.small_hunyuan import (
    FORM,
    I2V_RANK,
    SIZE,
    TRANSFORMER,
    VAE,
    encode_captions,
    save_pipeline,
    store,
    stored_transformer,
    stored_vae,
)

VAE_SEED, DATA_SEED = 1, 2
# of the transformer, beside SIZE
TRAINING = {"generator": "full", "lora_rank": 1, "checkpointing": False, "batch": 32}
TRAINING.update(generator_lr=1.5e-3, lr_schedule="linear", ema=0.995, iterations=3000)
TRAINING.update(sigma_low=0.0, sigma_high=1.0, sigma_shift=3.0)
FIRST_FRAME = {"generator": "lora", "lora_rank": I2V_RANK, "generator_lr": 1e-3}  # beside these
FIRST_FRAME.update(iterations=1500)


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
    """Scaled latents (N, C, T', H', W') of `number` clips, in memory, and their conditions."""
    rng, latents, conds = torch.Generator().manual_seed(DATA_SEED), [], []
    for _ in range(number // 16):
        videos, captions = draw_clips(16, rng)
        latents.append(model.encode_video(pipe, videos)[:, :, -model.shape[1] :])
        conds.append(encode_captions(model, pipe, captions, videos[:, :, :1]))
    cond = {name: torch.cat([one[name] for one in conds]) for name in conds[0]}
    return torch.cat(latents), cond


def batches(latents, cond, size):
    """Endless random batches, as the loops of w2svd read them."""
    rng = torch.Generator().manual_seed(DATA_SEED)
    while True:
        chosen = torch.randint(len(latents), (size,), generator=rng)
        yield {"x0": latents[chosen], "cond": {name: x[chosen] for name, x in cond.items()}}


def train_transformer(vae, transformer, clips=2048, **settings):
    """Train a transformer by `finetune`, from the beginning or on; the generator's average.

    The embedded guidance is the same number, w2svd's default, here and wherever it is sampled.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(folder, vae, transformer)
        how = {"model": "hunyuan", "checkpoint": folder, **SIZE, **TRAINING, **settings}
        config = w2svd.Config(**how)
        model = w2svd.HunyuanVideo.outline(config).load()
        pipe = w2svd.load_pipeline(folder, w2svd.ENCODERS)
    began, log, losses = time.process_time(), [], []
    latents, cond = encode_all(model, pipe, clips)
    data = batches(latents, cond, config.batch)
    state = w2svd.State(config, w2svd.build_roles(config, model, w2svd.Machine()), "cpu")
    state.optimizers["generator"].param_groups[0]["betas"] = (0.9, 0.99)  # no moving target here
    for stats in finetune(config, state.roles, state, data):
        losses.append(float(stats["generator_loss"]))
        if state.iteration % 100 == 0:
            loss, seconds = sum(losses[-100:]) / 100, time.process_time() - began
            log.append({"step": state.iteration, "loss": loss, "seconds": seconds})
            print("transformer", log[-1], flush=True)
    return state.average, log


def train_first_frame(weights):
    """Train the LoRA with which the stored transformer continues a first frame; store it."""
    transformer = stored_transformer(weights, FORM)
    lora, log = train_transformer(stored_vae(weights), transformer, **FIRST_FRAME)
    store(weights, "first_frame", lora)
    return log


def train(weights):
    """Train all three, one after the other, and store their weights, losses and times."""
    Path(weights).mkdir(parents=True, exist_ok=True)
    vae, vae_log = train_vae()
    store(weights, "vae", vae.state_dict())
    torch.manual_seed(0)
    transformer, log = train_transformer(vae, HunyuanVideoTransformer3DModel(**TRANSFORMER))
    store(weights, "transformer", transformer)
    about = {"torch": torch.__version__, "vae": vae_log, "transformer": log}
    about["first_frame"] = train_first_frame(weights)
    w2svd.write_json(Path(weights, "small.json"), about)
