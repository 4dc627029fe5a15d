"""W2SVD, weak-to-strong video distillation (MagicDistillation, arXiv 2503.13319), in one file.

A video diffusion transformer (DiT) needs about 28 evaluations for a video. This file turns it into
a GENERATOR that needs 4, or 1: from noise it predicts a clean video, which is noised again to the
next lower of 4 levels (the grid), and so on. Distribution matching distillation (DMD) moves the
generator's samples along the difference of two scores: that of the data, known by a REAL DiT, and
that of the generator's own samples, learnt on the way by a FAKE DiT. Both scores are read at noised
samples, where the two densities overlap. W2SVD makes the two DiTs out of one frozen backbone that
carries one LoRA (a small trained term: W + alpha B A in place of a linear layer's W), weakly in the
real DiT and strongly in the fake one, so that the real one leans a little towards the samples that
it has to judge; with the generator an adapter too (ours), one backbone serves all three.

    role         backbone    adapter 'generator'    adapter 'fake'
    generator    frozen      1, trained             off
    fake         frozen      off                    alpha_strong, trained
    real         frozen      off                    alpha_weak

Algorithm 1: W2SVD                                                          (`distil`, section 6)

    repeat `iterations` times:                     (each update draws its own x_in, sigma and eps)
        repeat `fake_updates` times:                         the fake learns the generator's samples
            x_gen = x_in - sigma_in v_generator(x_in, sigma_in)                         no gradient
                    (once for `reuse` fake updates in a row, which share x_gen)
            x_t   = (1 - sigma) x_gen + sigma eps
            one optimizer step of the fake on |v_fake(x_t, sigma) - (eps - x_gen)|^2
            (and of the discriminator's head, which tells noised x0 from noised x_gen)
        x_gen   = x_in - sigma_in v_generator(x_in, sigma_in)
        x_t     = (1 - sigma) x_gen + sigma eps                               from here no gradient
        x0_fake = x_t - sigma v_fake(x_t, sigma)
        x0_real = x_t - sigma v_real(x_t, sigma)
        g       = (x0_fake - x0_real) / mean_i |x_gen - x0_real|                                DMD
                + gt_weight (x0_fake - x0_gt) / mean_i |x0_fake - x0_gt|               ground truth
        one optimizer step of the generator along g, the gradient at x_gen
                (and along gan_weight d/dx_gen softplus(-logit(x_t)), the discriminator's term)
        the generator's moving average follows; samples are made with it

Notation and conventions (B batch, C channels, T frames, H, W; any (B, ...) will do)
    sigma       noise level in [0, 1], float32, 1 is pure noise
    x_t         (1 - sigma) x0 + sigma eps, eps standard normal; x_gen gets a fresh eps and sigma
    v           velocity eps - x0, so x0 = x_t - sigma v, score = -(x_t + (1 - sigma) v) / sigma
    x_in        what the generator reads, at a level sigma_in of the grid: a noised real sample
                (paired), or where few-step sampling from noise has come to (rollout)
    x0_gt       the real sample behind x_in, if there is one; mean_i is over a sample's elements
    velocity(x_t, sigma, cond) -> v    the contract of every model; cond, the text, is handed on
    Other code says student (generator, in result.json too), teacher (real) and critic (fake).

Commands
    python w2svd.py train  --model toy                      a tiny DiT, checked by an exact answer
    python w2svd.py train  --model hunyuan --data my_clips/ --out runs/mine     one 80 GB GPU
    python w2svd.py encode --model hunyuan --data my_clips/      its first part alone: the latents
    python w2svd.py sample --run runs/mine --prompt "a woman talks" --out talk.mp4   (--image a.png)
    python w2svd.py export --run runs/mine --format diffusers --out lora/

Where a setting comes from: 'paper' read off the authors' figures; 'author-code' related public
code of the first author, not a release of this paper; 'peer' common in public code of the family;
'ours'. The paper's body, and so its learning rates, rank and batch, were not available to us.

Deviations from the paper, as far as we know it: the generator is an adapter by default; off by
default are the GT loss, which trades motion for picture quality in the paper's table, and the
discriminator, which reads the frozen backbone; a first image is read where the checkpoint is
image-to-video; alpha_strong (not printed there), denominators, average and optimizer are peers',
the author's later code's or ours; on the toy: rollouts, a fake of final samples only, with a decay.
"""

import argparse
import atexit
import copy
import csv
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

# NOTE silent, here and below: without it nothing fails. Here fragments would take 9 GiB at 544p;
# torch reads it when it is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
from torch.utils import checkpoint as checkpointing  # noqa: E402

# ---- 1. Config -----------------------------------------------------------------------------------


class Refused(ValueError):
    """What the user asked for cannot be done: one sentence with the cure, and an exit status."""

    def __init__(self, sentence, status=2):
        super().__init__(sentence)
        self.status = status


HUNYUAN = "hunyuanvideo-community/HunyuanVideo"
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
RANKS = int(os.environ.get("WORLD_SIZE", 1))  # how many they are
Kind = Literal["lora", "full"]
Input = Literal["paired", "rollout"]
Schedule = Literal["constant", "linear", "cosine"]
Samples = Literal["all", "final"]
Objective = Literal["w2svd", "finetune", "lcm", "regress"]
Layers = Literal["all", "single"]
Condition = Literal["none", "first-frame", "first-frame-concat"]

# Named methods, as rows of settings on top of a preset
#   W2SVD (paper)                          --alpha-weak .25, the default
#   W2SVD with reg. loss (paper)           --gt-weight .05 (author-code) --generator-input paired
#   DMD with a LoRA fake (peer)            --alpha-weak 0
#   with a discriminator (paper)           --gan-weight .003 (peer: .003 to .03)
#   DMD2 (peer; its discriminator: ours)   --fake full --generator full --gan-weight .003
#                                          --generator-input rollout
#   DMDR's schedule (peer)                 --alpha-weak .75 --alpha-weak-schedule cosine
#   LCM (peer)                             --objective lcm
#   one step fitted to pairs (ours)        --objective regress --steps 1
#   fine-tuning, as a stage before (ours)  --objective finetune, then export --format merged


def setting(default, text, group=None):
    """A line of Config: its default, its meaning / where it comes from, the heading it opens."""
    return dataclasses.field(default=default, metadata={"text": text, "group": group})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line and its help are made from these lines."""

    model: Literal["toy", "hunyuan"] = setting("toy", "what to distil / ours", "model and data")
    data: str = setting("", "toy: ring, grid, videos; hunyuan: a folder of clips, or a .txt / ours")
    condition: Condition = setting("none", "toy videos: the first frame is given / paper")
    checkpoint: str = setting(HUNYUAN, "hub id, or a folder in diffusers' format / ours")
    height: int = setting(480, "of a clip in pixels, a multiple of 16 / ours")
    width: int = setting(832, "of a clip in pixels, a multiple of 16 / ours")
    frames: int = setting(61, "of a clip, 4k + 1: 61 or 129 / ours")
    fps: float = setting(24.0, "clips are resampled to it / paper")
    cache: str = setting("", "where latents or the toy's backbones are kept; see README / ours")

    steps: int = setting(4, "evaluations of the finished generator / paper: 4, 1", "the generator")
    shift: float = setting(5.0, "of the few-step grid: 1, .9375, .8333, .625 / author-code")
    objective: Objective = setting("w2svd", "finetune: data; lcm, regress: baselines / ours, peer")
    generator: Kind = setting("lora", "an adapter, or a whole copy / ours, author-code")
    generator_input: Input = setting("paired", "noised real sample, or from noise / paper, peer")
    ema: float = setting(0.995, "decay of the generator's average, in the end; 0 is off / ours")

    fake: Kind = setting("lora", "full: a copy, real = backbone / paper, peer", "real and fake")
    alpha_weak: float = setting(0.25, "the fake adapter's weight in the real DiT; 0: DMD / paper")
    alpha_weak_schedule: Schedule = setting("constant", "to 0 at half of the run / peer: DMDR")
    alpha_strong: float = setting(1.0, "the fake adapter's weight in the fake DiT / author-code")
    fake_samples: Samples = setting("all", "of a rollout: of every exit, or the last / ours")
    fake_updates: int = setting(5, "for each update of the generator / author-code, peer")
    reuse: int = setting(1, "fake updates that share the generator's samples / ours")
    fake_warmup: int = setting(0, "fake updates before the generator's first one / ours")
    fake_weight_decay: float = setting(0.0, "pulls its adapter to 0, to the backbone / ours")

    gt_weight: float = setting(0.0, "motion for quality (paper); .05 / author-code", "losses")
    gt_skip_noise: bool = setting(False, "no GT loss where the input is pure noise / ours")
    gan_weight: float = setting(0.0, "of the discriminator's term; .003 to .03 / paper, peer")
    gan_lr: float = setting(1e-4, "of the discriminator's head / ours")
    gan_r1: float = setting(0.0, "weight of the discriminator's gradient penalty / peer")
    guidance: float = setting(1.0, "of the real DiT; 1 is off, which others call 0 / peer")
    embedded_guidance: float = setting(6.0, "read by a guidance-distilled backbone / peer")
    sigma_low: float = setting(0.02, "both losses read x_t at U[low, high], shifted / author-code")
    sigma_high: float = setting(0.98, "see --sigma-low / author-code")
    sigma_shift: float = setting(1.0, "raise for more noise, more global shape / author-code")

    lora_rank: int = setting(64, "of both adapters; their alpha is the rank / ours", "training")
    lora_targets: Layers = setting("all", "of all blocks, or of single-stream ones / author-code")
    generator_lr: float = setting(1e-5, "lower it where samples drift or collapse / ours")
    fake_lr: float = setting(1e-5, "raise it where the relative gap keeps growing / ours")
    lr_schedule: Literal["constant", "linear"] = setting("constant", "linear: to 5 % / ours")
    batch: int = setting(1, "samples in a forward / ours")
    accumulate: int = setting(1, "forwards in an update; one batch in memory at a time / ours")
    iterations: int = setting(1000, "updates of the generator / peer: 600 to 1000")
    seed: int = setting(0, "the same seed, the same bits on the same machine / ours")

    checkpointing: bool = setting(False, "recompute blocks: a third slower / peer", "memory, speed")
    fp8_base: bool = setting(False, "the backbone in 8 bits: 8 GiB less at 13B / ours")
    compile: bool = setting(False, "compile every block / peer")

    out: str = setting("", "run folder; the next free runs/<model>-k if empty / ours", "the run")
    log_every: int = setting(50, "iterations between lines of metrics.jsonl / ours")
    save_every: int = setting(250, "iterations between checkpoints / ours")
    sample_prompts: str = setting("", "a .txt, of which 4 are filmed at each save / ours")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run takes place. It is not stored with the run: with --resume give it again."""

    gpus: int = setting(RANKS, "how many to plan for; torchrun starts them / ours", "the machine")
    gpu_memory: float = setting(0.0, "GiB of each to fill; 0: all of the one here, if any / ours")
    shard: Literal["base", "none"] = setting("base", "none: whole, and faster if it fits / ours")
    context_parallel: int = setting(1, "GPUs that share a video; divides tokens, heads / peer")
    offload: bool = setting(False, "blocks' inputs wait in host memory: 720p on 80 GB / ours")

    def room(self):
        """GiB of a GPU; 0 where none is known."""
        here = torch.cuda.mem_get_info()[1] / 2**30 if DEVICE == "cuda" else 0.0
        return self.gpu_memory or here

    def parts(self, config):
        """Over how many GPUs the backbone is split."""
        # casting to 8 bits replaces weights, which FSDP2 would have to manage
        can = self.shard == "base" and config.model == "hunyuan" and not config.fp8_base
        return self.gpus if can else 1


MACHINE = Machine()
# ring: expect a KL of .10; 50 seconds on 2 CPU cores. Trials, and why shift .5: toy/README.md
TOY = dict(data="ring", generator_input="rollout", fake_samples="final", lora_rank=16, ema=0.98)
TOY |= dict(generator_lr=1e-3, fake_lr=2e-3, lr_schedule="linear", fake_weight_decay=0.1)
TOY |= dict(shift=0.5, reuse=5, batch=1536, iterations=240, log_every=20, save_every=120)
ONE_STEP = dict(steps=1, batch=512, iterations=1440, generator_lr=3e-3, save_every=720)
PRESETS = {
    "toy": TOY,
    # expect a KL of .11 (grid: 1.05), in 1.5 minutes
    "toy ring regress": ONE_STEP,
    "toy grid regress": ONE_STEP,
    # expect 1.0: its modes are closer, so they are lost at less noise
    "toy grid": dict(shift=0.3, reuse=3, batch=1024, iterations=360),
    # expect a KL of .5; a clip's motion is decided at high noise, hence the shifts
    "toy videos": dict(shift=5.0, sigma_shift=5.0, generator_lr=5e-4, fake_lr=1e-3)
    | dict(batch=64, iterations=350, log_every=25, save_every=175),
    # nothing of the full model was tuned or measured: no number to expect
    "hunyuan": dict(generator_lr=2e-5, fake_lr=2e-5, checkpointing=True, log_every=10),
    "hunyuan captions": dict(generator_input="rollout", fake_samples="final"),
}
MAY_BE_0 = "alpha_weak ema gt_weight guidance embedded_guidance sigma_low fake_warmup seed"
MAY_BE_0 += " fake_weight_decay gan_weight gan_r1 gpu_memory"
# what --resume may change: no number depends on it (compile: hardly), or a message says so
RESUMABLE = "out data checkpoint cache iterations log_every save_every checkpointing compile"
RESUMABLE += " generator_lr fake_lr sample_prompts"
SIZES = ("height", "width", "frames", "checkpoint")  # what `sample` may change of a run's config


def flag(name):
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def check(c: Config, machine=MACHINE):
    """Refuse settings that contradict each other, with the reason."""
    for name, value in {**vars(c), **vars(machine)}.items():
        fits = type(value) not in (int, float) or 0 < value < 2**53  # False for nan
        zero = name in MAY_BE_0.split()
        if not fits and not (value == 0 and zero):
            raise Refused(f"{flag(name)} must be {'at least' if zero else 'above'} 0, below 2**53.")
    paired, final = c.generator_input == "paired", c.fake_samples == "final"
    full, captions, hunyuan = c.fake == "full", c.data.endswith(".txt"), c.model == "hunyuan"
    toy_videos = not hunyuan and c.data == "videos"
    other, needs_x0 = c.objective != "w2svd", c.objective in ("finetune", "lcm")
    terms = c.gt_weight or c.gan_weight or c.guidance != 1
    wrong = [
        (c.alpha_weak > c.alpha_strong, "--alpha-weak must be at most --alpha-strong."),
        (full and c.alpha_weak, "--fake full has no adapter for an --alpha-weak."),
        (full and c.fake_weight_decay, "--fake full has no adapter for a --fake-weight-decay."),
        (full and other, "--fake full needs --objective w2svd."),
        (not c.sigma_low < c.sigma_high <= 1, "--sigma-low < --sigma-high <= 1 must hold."),
        (c.condition != "none" and not toy_videos, "--condition needs --model toy --data videos."),
        (c.ema >= 1, "--ema must be below 1; 0 is off."),
        (paired and final, "--fake-samples final needs --generator-input rollout."),
        (c.gt_weight and not paired, "--gt-weight needs --generator-input paired."),
        (c.gt_weight and c.steps == 1, "--gt-weight needs --steps > 1: one sees pure noise."),
        (other and terms, "--gt-weight, --gan-weight, --guidance need --objective w2svd."),
        (c.gan_r1 and not c.gan_weight, "--gan-r1 needs a discriminator, a --gan-weight."),
        (captions and paired, "A .txt has captions alone: --generator-input rollout."),
        (captions and (c.gan_weight or needs_x0), "--gan-weight, finetune and lcm need clips."),
        (c.objective == "regress" and c.steps > 1, "--objective regress is for --steps 1."),
        (c.height % 16 or c.width % 16, "--height and --width must be multiples of 16."),
        (c.frames % 4 != 1 or c.frames < 5, "--frames must be 4 k + 1, as 61 or 129."),
        (hunyuan and c.batch > 1, "--model hunyuan needs --batch 1; see --accumulate."),
        (hunyuan and c.guidance != 1, "--guidance must be 1: --model hunyuan has it embedded."),
        (machine.offload and not c.checkpointing, "--offload needs --checkpointing."),
        (machine.context_parallel > 1 and not hunyuan, "The toy has no --context-parallel."),
        (c.compile and c.fp8_base, "--compile does not work on --fp8-base: it breaks every graph."),
    ]
    for holds, sentence in wrong:
        if holds:
            raise Refused(sentence)


# ---- 2. Flow matching ----------------------------------------------------------------------------
def expand_as(sigma, x):
    """sigma, a float or (B,), shaped to multiply x (B, ...)."""
    return torch.as_tensor(sigma, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0, eps, sigma):
    """x_t = (1 - sigma) x0 + sigma eps. x0, eps (B, ...); sigma in [0, 1], a float or (B,)."""
    sigma = expand_as(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def x0_from_velocity(x_t, v, sigma):
    """x0 = x_t - sigma v: the clean sample that the velocity at x_t points to, (B, ...)."""
    return x_t - expand_as(sigma, x_t) * v


def score_from_velocity(x_t, v, sigma):
    """grad log p(x_t) = -(x_t + (1 - sigma) v) / sigma, for sigma in (0, 1]; (B, ...)."""
    sigma = expand_as(sigma, x_t)
    return -(x_t + (1 - sigma) * v) / sigma


def guided(v_cond, v_uncond, w):
    """v_uncond + w (v_cond - v_uncond). w = 1 is off; other code calls w - 1 the scale."""
    return v_uncond + w * (v_cond - v_uncond)


def shift_sigma(sigma, shift):
    """shift sigma / (1 + (shift - 1) sigma): moves [0, 1] towards noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def few_step_sigmas(steps, shift):
    """The grid 1 = sigma_0 > ... > sigma_steps = 0, (steps + 1,), evenly spaced, then shifted."""
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def sample_sigma(n, low, high, shift, rng):
    """n noise levels, uniform in [low, high] and then shifted, (n,), on the device of rng."""
    # not clamped: [.02, .98] is [.093, .996] at shift 5. peer: U[0, 1], shifted, then clamped
    u = torch.rand(n, generator=rng, device=rng.device)
    return shift_sigma(low + (high - low) * u, shift)


# ---- 3. One backbone, three roles ----------------------------------------------------------------
class Roles:
    """Generator, real and fake DiT out of one frozen backbone; each a velocity(x_t, sigma, cond).

    W_generator = W + B_g A_g,  W_fake = W + alpha_strong B A,  W_real = W + alpha_weak B A.
    `backbone` has .module, .velocity(x_t, sigma, cond), .lora_targets (a regular expression),
    .checkpoint_with(function) and, to be judged, .features(x_t, sigma, cond) of .width numbers;
    cond None is unconditional. A role trained in 'full' owns a copy of the backbone, whose velocity
    must run its .module; with a full fake the real DiT is the plain one. `alpha_weak` may change.
    """

    def __init__(self, backbone, rank, alpha_weak, alpha_strong, generator="lora", fake="lora"):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.backbone = backbone
        self.alpha_weak, self.alpha_strong = alpha_weak, alpha_strong
        kinds = {"generator": generator, "fake": fake}
        self.copies = {role: copy.copy(backbone) for role in kinds if kinds[role] == "full"}
        for owner in self.copies.values():
            owner.module = copy.deepcopy(backbone.module).float().requires_grad_(True)
        self.adapters = [role for role in kinds if kinds[role] == "lora"]
        for role in self.adapters:  # alpha = rank, so that files need no metadata
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=backbone.lora_targets)
            with warnings.catch_warnings(action="ignore"):  # peft's, of a second adapter: meant
                inject_adapter_in_model(lora, backbone.module, adapter_name=role)
        self.layers = [m for m in backbone.module.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:  # peft would cast inputs to float32, autocast back
            layer.cast_input_dtype_enabled = False
        # NOTE silent: adding the second adapter froze the first, so gradients are set after both
        backbone.module.requires_grad_(False)
        self.trained = {role: self._find(role) for role in kinds}
        for role in self.adapters:
            for parameter in self.trained[role].values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._switch(None, 0.0)

    def _find(self, role):
        """{name: parameter} that the role trains, without the adapter's name in it."""
        if role in self.copies:
            return dict(self.copies[role].module.named_parameters())
        mark = f".{role}."  # '....lora_A.generator.weight' is stored as '....lora_A.weight'
        found = self.backbone.module.named_parameters()
        return {n.replace(mark, "."): p for n, p in found if mark in n and "lora_" in n}

    def _switch(self, role, alpha):
        # NOTE silent: peft's set_adapter would also flip requires_grad, which loses the gradients
        # of a forward whose backward is still to come; so only the active name and scale change
        self.role, self.alpha = role, alpha
        adapter = "fake" if role == "real" else role
        active = [adapter] if adapter in self.adapters and alpha else []
        scale = torch.tensor(float(alpha))  # a number would be compiled anew for every value
        for layer in self.layers:
            layer._active_adapter = active
            for name in active:
                layer.scaling[name] = scale

    @contextmanager
    def use(self, role, alpha=None):
        """The backbone plays `role` inside; the role before comes back, also after an exception."""
        # the table of the file's docstring: at which weight a role carries its adapter
        table = {None: 0, "generator": 1, "fake": self.alpha_strong, "real": self.alpha_weak}
        before = self.role, self.alpha
        self._switch(role, table[role] if alpha is None else alpha)
        try:
            yield
        finally:
            self._switch(*before)

    def _velocity(self, role, x_t, sigma, cond=None):
        with self.use(role):
            return self.copies.get(role, self.backbone).velocity(x_t, sigma, cond)

    generator = functools.partialmethod(_velocity, "generator")  # (x_t, sigma, cond=None) -> v
    real = functools.partialmethod(_velocity, "real")
    fake = functools.partialmethod(_velocity, "fake")
    plain = functools.partialmethod(_velocity, None)  # the backbone as it came

    def checkpoint(self, block, *args, keep=()):
        """block(*args), recomputed in backward; what the aten operators in `keep` gave is kept."""
        role, alpha = self.role, self.alpha

        def as_now(*args):
            # NOTE silent: without it recomputation sees the role of the backward: wrong gradients
            with self.use(role, alpha):
                return block(*args)

        select = checkpointing.create_selective_checkpoint_contexts
        how = {"context_fn": lambda: select(list(keep))} if keep else {}
        return checkpointing.checkpoint(as_now, *args, use_reentrant=False, **how)

    def use_checkpointing(self):
        """Keep only the blocks' inputs for the backward, in every role."""
        for backbone in (self.backbone, *self.copies.values()):
            backbone.checkpoint_with(self.checkpoint)

    def state(self, role):
        """What 'generator', 'fake' or 'discriminator' trains: {name: parameter}, not cloned."""
        return self.trained[role]

    def parameters(self, role):
        """The trained parameters of a role, a list."""
        return list(self.state(role).values())

    @torch.no_grad()
    def load(self, role, tensors):
        """Copy {name: tensor}, as in state() or in generator.safetensors, into the parameters."""
        ours = {name.removeprefix("transformer."): x for name, x in self.state(role).items()}
        theirs = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        shapes = [{(name, x.shape) for name, x in named.items()} for named in (ours, theirs)]
        if wrong := {name for name, _ in shapes[0] ^ shapes[1]}:
            raise Refused(f"{len(wrong)} weights do not fit the {role}, as {min(wrong)!r}.")
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


# ---- 4. Losses -----------------------------------------------------------------------------------
def at_least_float32(x):
    """bf16 loses the small difference of two similar predictions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_abs(x):
    """mean_i |x_i| of each sample, (B, 1, ...), floored so that a perfect match is no 0 / 0."""
    return x.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True).clamp_min(1e-6)


def dmd_gradient(x_gen, x0_real, x0_fake):
    """g = (x0_fake - x0_real) / mean_i |x_gen - x0_real|: along KL(fake || real)'s gradient.

    All (B, ...), of one noised x_gen. With x0 = (x_t + sigma^2 score) / (1 - sigma) the numerator
    is a difference of scores; the denominator, per sample, makes noise levels alike.
    """
    # paper: the difference (figure). peer: the denominator, as in DMD2. ours: float32, its floor
    x_gen, x0_real, x0_fake = map(at_least_float32, (x_gen, x0_real, x0_fake))
    return (x0_fake - x0_real) / mean_abs(x_gen - x0_real)


def gt_gradient(x0_fake, x0_gt):
    """g = (x0_fake - x0_gt) / mean_i |x0_fake - x0_gt|, (B, ...): towards the input's sample."""
    # paper: ground truth against fake video (figure). author-code: the denominator, which makes
    # the gradient's size 1 at any distance, so that the weight alone decides
    difference = at_least_float32(x0_fake) - at_least_float32(x0_gt)
    return difference / mean_abs(difference)


def fake_loss(v_fake, x_gen, eps):
    """mean |v_fake - (eps - x_gen)|^2: flow matching on the generator's samples, a scalar."""
    # author-code: by default the loss of x0, which is this one times sigma^2 for each sample
    return torch.nn.functional.mse_loss(at_least_float32(v_fake), at_least_float32(eps - x_gen))


# ---- 5. Discriminator ----------------------------------------------------------------------------
class Discriminator:
    """Real or generated? A logit for noised samples: a trained head on the frozen backbone.

    paper: features after the last double-stream block (figure; no author's code exists). peer:
    softplus; DMD2 reads its fake. ours: no adapter (the figure's arrow starts at the generator).
    """

    def __init__(self, roles, r1=0.0):
        width, nn = roles.backbone.width, torch.nn
        layers = nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        device = next(roles.backbone.module.parameters()).device
        self.roles, self.r1, self.head = roles, r1, nn.Sequential(*layers).to(device)
        roles.discriminator = self
        roles.trained["discriminator"] = dict(self.head.named_parameters())

    def logit(self, x_t, sigma, cond):
        """High for real: (B,), of samples x_t (B, ...) noised to sigma (B,)."""
        with self.roles.use(None):
            features = self.roles.backbone.features(x_t, sigma, cond)  # (B, tokens, width)
        return self.head(at_least_float32(features)).mean(dim=(1, 2))

    def gradient(self, x_gen, cond, sigma, eps):
        """dL/dx_gen (B, ...) of the generator's L = mean softplus(-logit), and L."""
        x = x_gen.detach().requires_grad_()
        logit = self.logit(add_noise(x, eps, sigma), sigma, cond)
        loss = torch.nn.functional.softplus(-logit).mean()
        return torch.autograd.grad(loss, x)[0], loss.detach()


# ---- 6. The updates, the samplers, the loop ------------------------------------------------------
def require_finite(what, x, sigma):
    """Stop at the first non-finite value in x (B, ...), with its stage and noise level named."""
    bad = ~torch.isfinite(x.detach()).flatten(1).all(dim=1)
    if bad.any():  # NOTE: a host-device sync, small beside a forward of a large DiT
        level = float(torch.as_tensor(sigma).expand(len(x))[bad][0])
        raise FloatingPointError(f"{what} is not finite at sigma {level:.4f}")


@torch.no_grad()
def few_step_sample(velocity, noise, sigmas, cond=None, rng=None):
    """Predict x0, add fresh noise down to the next sigma, and so on: noise (B, ...) -> x0 (B, ...).

    sigmas from few_step_sigmas. A grid cut off before its 0 gives the state at its last sigma.
    Equals diffusers' FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).
    """
    x = noise
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        v = velocity(x, torch.full((len(x),), sigma, device=x.device), cond)
        x0 = x0_from_velocity(x, v, sigma)
        fresh = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        x = add_noise(x0, fresh, sigma_next)
    return x


@torch.no_grad()
def euler_sample(velocity, noise, sigmas, cond=None):
    """Follow dx = v dsigma from noise (B, ...) down the grid: how the backbone itself samples."""
    x = noise
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        v = velocity(x, torch.full((len(x),), sigma, device=x.device), cond)
        x = x + (sigma_next - sigma) * v
    return x


def paired_input(x0, sigmas, rngs):
    """x_in (B, ...): real samples x0 (paper), noised to random levels (B,) of the grid (peer).

    rngs: torch.Generators 'input', of the noise, and 'exit', of the levels, on x0's device.
    """
    noise = torch.randn(x0.shape, generator=rngs["input"], device=x0.device, dtype=x0.dtype)
    exits = torch.randint(len(sigmas) - 1, (len(x0),), generator=rngs["exit"], device=x0.device)
    return add_noise(x0, noise, sigmas[exits]), sigmas[exits]


def rollout_input(generator, x0, cond, sigmas, rngs, final=False):
    """x_in (B, ...): where few-step sampling from noise is at a random exit, or the last. peer."""
    # one exit for the batch, as in Self-Forcing; x0 gives the shape only
    noise = torch.randn(x0.shape, generator=rngs["input"], device=x0.device, dtype=x0.dtype)
    level = int(torch.randint(len(sigmas) - 1, (1,), generator=rngs["exit"], device=x0.device))
    level = len(sigmas) - 2 if final else level  # drawn in both cases, so that later draws agree
    x_in = few_step_sample(generator, noise, sigmas[: level + 1], cond, rngs["input"])
    return x_in, sigmas[level].expand(len(x0))


def fake_step(roles, x_gen, cond, sigma, eps, role="fake"):
    """One backward of the fake's loss: it learns to denoise the generator's samples x_gen.

    x_gen, eps (B, ...), without gradient, are mixed at sigma (B,). The gradients add up; the caller
    owns the optimizer. Returns {'fake_loss'}; FloatingPointError where something is not finite.
    With role 'generator' and real samples it is fine-tuning.
    """
    require_finite(f"the sample in the {role}'s update", x_gen, sigma)
    x_t = add_noise(x_gen, eps, sigma)
    with roles.use(role):
        v = getattr(roles, role)(x_t, sigma, cond)
        require_finite(f"the {role}'s velocity", v, sigma)
        loss = fake_loss(v, x_gen, eps)
        loss.backward()
    return {f"{role}_loss": loss.detach()}


def discriminator_step(roles, x_gen, x0, cond, sigma, eps, rng=None):
    """One backward of the discriminator's loss into its head: real x0 against generated x_gen.

    Both (B, ...), noised alike: to sigma (B,) with eps. Its r1 weighs an approximation of R1, the
    penalty on the logit's gradient: by its change under a little noise from rng, at x_t (peer).
    """
    judge, x_t = roles.discriminator, add_noise(x0, eps, sigma)
    real = judge.logit(x_t, sigma, cond)
    generated = judge.logit(add_noise(x_gen, eps, sigma), sigma, cond)
    loss = torch.nn.functional.softplus(torch.cat([-real, generated])).mean() * 2  # two means
    if judge.r1:
        near = x_t + 0.01 * torch.randn(x_t.shape, generator=rng, device=x_t.device)
        loss = loss + judge.r1 * ((judge.logit(near, sigma, cond) - real) / 0.01).square().mean()
    loss.backward()
    stats = {"discriminator_loss": loss, "logit_real": real.mean(), "logit_gen": generated.mean()}
    return {name: x.detach() for name, x in stats.items()}


def generator_step(
    roles, x_in, sigma_in, cond, sigma, eps, x0_gt=None, gt_weight=0, gan_weight=0, guidance=1
):
    """One backward of DMD's, the GT's and the discriminator's term, through one evaluation.

    x_in (B, ...) at sigma_in (B,) from paired_input or rollout_input; its sample is noised to sigma
    (B,) with eps (B, ...). x0_gt is the real sample behind x_in (paired only), weighed by
    gt_weight, a float or (B,). Gradients, numbers and errors are as in fake_step.
    """
    gan, stats = 0, {}
    with roles.use("generator"):
        x_gen = x0_from_velocity(x_in, roles.generator(x_in, sigma_in, cond), sigma_in)
        require_finite("the generator's sample", x_gen, sigma_in)
        with torch.no_grad():
            x_t = add_noise(x_gen, eps, sigma)
            v_fake, v_real = roles.fake(x_t, sigma, cond), roles.real(x_t, sigma, cond)
            if guidance != 1:
                v_real = guided(v_real, roles.real(x_t, sigma, None), guidance)
            require_finite("the fake's velocity", v_fake, sigma)
            require_finite("the real DiT's velocity", v_real, sigma)
            x0_fake = x0_from_velocity(x_t, v_fake, sigma)
            x0_real = x0_from_velocity(x_t, v_real, sigma)
            g = dmd_gradient(x_gen, x0_real, x0_fake)
            if x0_gt is not None:
                g = g + expand_as(gt_weight, g) * gt_gradient(x0_fake, x0_gt)
        if gan_weight:  # of a mean over samples, so that peers' weights mean the same here
            gan, stats["gan_loss"] = roles.discriminator.gradient(x_gen, cond, sigma, eps)
        # NOTE silent: / numel, as in peers' mean(x_gen * stopgrad(g)): clipping, Adam's eps see it
        g = g / g.numel() + gan_weight * gan
        require_finite("the generator's gradient", g, sigma)
        x_gen.backward(g.to(x_gen.dtype))
    v = [at_least_float32(v).flatten(1) for v in (v_fake, v_real)]
    gap = at_least_float32(x0_fake - x0_real).norm() / at_least_float32(x0_real).norm()
    stats |= {"relative_gap": gap, "cos_fake_real": torch.cosine_similarity(*v).mean()}
    return stats | moments("gen", x_gen.detach())


def moments(name, x):
    """Mean, std and, of videos (B, C, T, H, W), motion: to hold against the data's."""
    stats = {f"{name}_mean": x.mean(), f"{name}_std": x.std()}
    if x.ndim == 5 and x.shape[2] > 1:
        stats[f"{name}_motion"] = x.diff(dim=2).abs().mean()  # between neighbouring frames
    return stats


def lr_scale(config, iteration):
    """Of both learning rates: 1, or falling linearly to .05 at the end."""
    return 1 - 0.95 * iteration / config.iterations if config.lr_schedule == "linear" else 1.0


def ema_at(config, iteration):
    """The average's decay: it starts low, or after 100 iterations the start would weigh .61."""
    return min(config.ema, (1 + iteration) / (10 + iteration))


def alpha_weak_at(config, iteration):
    """alpha_weak of an iteration: constant, or down to 0 at half of the iterations."""
    progress = min(1.0, 2 * iteration / config.iterations)
    falling = {"constant": 1.0, "linear": 1 - progress}
    falling["cosine"] = (1 + math.cos(math.pi * progress)) / 2
    return config.alpha_weak * falling[config.alpha_weak_schedule]


MAX_GRAD_NORM = 1.0  # peer. Gradients are clipped to it, which alone bounds them
FIRST_SEED = 2**32  # of training's streams: apart from samples' on a GPU; a CPU reads 32 bits, 0


class State:
    """All that changes in training: optimizers, average, random streams, counts."""

    def __init__(self, config, roles, device):
        self.config, self.roles, self.device = config, roles, device
        self.iteration, self.taken = 0, 0  # updates of the generator; clips read so far
        self.rank, self.ranks = 0, 1  # of those that read clips of their own; section 9 has more
        self.reads = []  # (clip, sigma) of the update at work, for an error to name
        # author-code: betas. No momentum, as the gradients' target moves
        adam = functools.partial(torch.optim.AdamW, betas=(0.0, 0.999), fused=True)
        streams = enumerate("data input exit level noise".split(), FIRST_SEED + 1000 * config.seed)
        self.rngs = {name: torch.Generator(device).manual_seed(i) for i, name in streams}
        decay = dict.fromkeys(roles.trained, 0.0) | {"fake": config.fake_weight_decay}
        self.optimizers = {r: adam(roles.parameters(r), weight_decay=decay[r]) for r in decay}
        self.average = {n: p.detach().clone() for n, p in roles.state("generator").items()}

    def update(self, role, lr):
        """One optimizer step of the role on the mean of the gradients added up; their norm."""
        optimizer, parameters = self.optimizers[role], self.roles.parameters(role)
        for parameter in parameters:
            parameter.grad /= self.config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of the {role} is not finite")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def update_average(self):
        """average = ema average + (1 - ema) weights, of the generator."""
        ema = ema_at(self.config, self.iteration)
        for name, parameter in self.roles.state("generator").items():
            self.average[name].lerp_(parameter, 1 - ema)

    @contextmanager
    def averaged(self):
        """The generator's velocity with its averaged weights; inside, the two are exchanged."""

        @torch.no_grad()
        def exchange():
            for name, parameter in self.roles.state("generator").items():
                kept = parameter.clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(kept)

        exchange()
        try:
            yield self.roles.generator
        finally:
            exchange()


def micro_batches(config, state, data):
    """What one update reads, `accumulate` times: a name, x0 (B, ...), cond."""
    state.reads = []
    for _ in range(config.accumulate):
        batch = next(data)
        name, x0 = batch.get("name", "a batch"), batch["x0"]
        state.taken += state.ranks * len(x0)
        require_finite(f"the data ({name})", x0, 0.0)
        yield name, x0, batch["cond"]


def generator_input(config, roles, state, x0, cond, final=False):
    """x_in (B, ...) and its level sigma_in (B,), of the kind that the config names."""
    sigmas = few_step_sigmas(config.steps, config.shift).to(state.device)
    if config.generator_input == "paired":
        return paired_input(x0, sigmas, state.rngs)
    return rollout_input(roles.generator, x0, cond, sigmas, state.rngs, final)


@torch.no_grad()
def generated(config, roles, state, name, x0, cond):
    """A batch of the generator's samples for the fake: its name, x_gen (B, ...), x0, cond."""
    final = config.fake_samples == "final"
    x_in, sigma_in = generator_input(config, roles, state, x0, cond, final)
    return name, x0_from_velocity(x_in, roles.generator(x_in, sigma_in, cond), sigma_in), x0, cond


def losses_noise(config, state, x, name):
    """The level sigma (B,) to which x (B, ...) is noised for a loss, and the noise eps (B, ...)."""
    c, rngs = config, state.rngs
    sigma = sample_sigma(len(x), c.sigma_low, c.sigma_high, c.sigma_shift, rngs["level"])
    state.reads.append((name, sigma))
    return sigma, torch.randn(x.shape, generator=rngs["noise"], device=x.device, dtype=x.dtype)


def mean_of(stats):
    """The mean of dictionaries of numbers, over the forwards of an update."""
    return {name: sum(one[name] for one in stats) / len(stats) for name in stats[0]}


def distil(config, roles, state, data):
    """Algorithm 1: every next() is one iteration, and yields its numbers, detached.

    data: an iterator of batches {'x0': (B, ...), 'cond': ..., 'name': ...}. All that has to be kept
    between two iterations is in `state`; logging, files and signals are the caller's.
    """
    run = config, roles, state
    terms = {"guidance": config.guidance, "gan_weight": config.gan_weight}
    while state.iteration < config.iterations:
        roles.alpha_weak = alpha_weak_at(config, state.iteration)
        lr = lr_scale(config, state.iteration)
        warmup = config.fake_warmup if state.iteration == 0 else 0
        for k in range(warmup + config.fake_updates):  # the fake learns the generator's samples
            if k % config.reuse == 0:
                samples = [generated(*run, *batch) for batch in micro_batches(config, state, data)]
            state.reads, fake_stats = [], []  # the last update's are yielded
            for name, x_gen, x0, cond in samples:
                noise = losses_noise(config, state, x_gen, name)
                fake_stats.append(fake_step(roles, x_gen, cond, *noise))
                if config.gan_weight:  # the discriminator learns to tell them from real ones
                    judged = roles, x_gen, x0, cond, *noise, state.rngs["noise"]
                    fake_stats[-1] |= discriminator_step(*judged)
            fake_norm = state.update("fake", lr * config.fake_lr)
            if config.gan_weight:
                state.update("discriminator", lr * config.gan_lr)

        stats = []
        for name, x0, cond in micro_batches(config, state, data):  # the generator's update
            x_in, sigma_in = generator_input(*run, x0, cond)
            noise = losses_noise(config, state, x0, name)
            weight = config.gt_weight * ((sigma_in < 1) | (not config.gt_skip_noise))
            gt = {"x0_gt": x0 if config.gt_weight else None, "gt_weight": weight}
            step = generator_step(roles, x_in, sigma_in, cond, *noise, **gt, **terms)
            stats.append(step | moments("data", x0))
        norm = state.update("generator", lr * config.generator_lr)
        state.update_average()
        state.iteration += 1
        norms = {"fake_grad_norm": fake_norm, "grad_norm": norm}
        yield mean_of(fake_stats) | mean_of(stats) | norms | {"alpha_weak": roles.alpha_weak}


# ---- 7. HunyuanVideo (13B) by diffusers ----------------------------------------------------------
class HunyuanVideo:
    """diffusers' HunyuanVideoTransformer3DModel behind the contract of Roles."""

    gathered = staticmethod(lambda x: x)  # this process's share of a video's tokens -> all
    prompt_template = None  # the pipeline's own; or {"template": "...{}...", "crop_start": tokens}
    # every linear layer of the blocks but adaLN's: 4.30 M parameters for each unit of rank at 13B
    LAYERS = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    LAYERS += r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"
    keep, offload = 0, False  # see checkpoint_with

    def __init__(self, module, config):
        self.module, self.dtype, self.guidance = module, module.dtype, config.embedded_guidance
        blocks = "single_" if config.lora_targets == "single" else "(single_)?"
        self.lora_targets = rf"{blocks}transformer_blocks\.\d+\.({self.LAYERS})"
        self.width = module.config.num_attention_heads * module.config.attention_head_dim
        self.form = module.config.image_condition_type  # None, token_replace or latent_concat
        for block in self.blocks:
            block.register_forward_pre_hook(self.without_mask)

    @property
    def blocks(self):
        return [*self.module.transformer_blocks, *self.module.single_transformer_blocks]

    @staticmethod
    def without_mask(_, args):
        """Text comes trimmed, so nothing is masked; a mask would rule out flash attention."""
        assert args[3] is None or args[3].dtype == torch.bool, "diffusers' blocks have changed"
        return (*args[:3], None, *args[4:])

    def checkpoint_with(self, function):
        """Recompute blocks by function(block, *args, keep=operators).

        The last `keep` blocks keep the results of attention, the dearest to recompute; with
        `offload` the blocks' inputs wait in the host's memory. HunyuanTask.load sets both.
        """
        names = "flash_attention flash_attention_for_cpu efficient_attention cudnn_attention"
        kept = [getattr(torch.ops.aten, f"_scaled_dot_product_{n}").default for n in names.split()]
        late = set(self.blocks[len(self.blocks) - self.keep :])

        def run(block, *args):
            with torch.autograd.graph.save_on_cpu(True) if self.offload else nullcontext():
                return function(block, *args, keep=kept if block in late else ())

        self.module.enable_gradient_checkpointing(run)

    def share_tokens(self, group):
        """Ulysses: each of n processes has a share of the tokens, in attention one of the heads."""
        from diffusers.models.attention_dispatch import SeqAllToAllDim
        from diffusers.models.transformers import transformer_hunyuan_video as theirs

        n, rank, module = group.size(), group.rank(), self.module
        exchange = functools.partial(SeqAllToAllDim.apply, group)  # (x, 2, 1): tokens for heads

        def attention(query, key, value, parallel_config, **_):
            x = torch.cat([query.to(value.dtype), key.to(value.dtype), value])  # (3 B, t, heads, D)
            # parallel_config: from before_block, [where text begins]; the text is whole here
            video, text = x.tensor_split(parallel_config, dim=1)
            x = torch.cat([exchange(video, 2, 1), text.chunk(n, dim=2)[rank]], dim=1)
            x = torch.nn.functional.scaled_dot_product_attention(*x.transpose(1, 2).chunk(3))
            video, text = x.transpose(1, 2).tensor_split(parallel_config, dim=1)  # heads / n
            return torch.cat([exchange(video, 1, 2), exchange(text.repeat(1, n, 1, 1), 1, 2)], 1)

        def before_block(block, args):  # tokens, text, temb, mask, rope, and of a given frame
            block.attn.processor._parallel_config = [-args[1].shape[1]]  # where its text begins
            # NOTE silent: a given frame's tokens, modulated in another way, are the first of all
            return *args[:6], min(max(0, args[6] - rank * args[0].shape[1]), args[0].shape[1])

        theirs.dispatch_attention_fn = attention  # of every model of this class here
        for block in self.blocks:
            block.register_forward_pre_hook(before_block)
        # NOTE silent: every process has the whole loss, and an exchange's backward adds up the
        # gradients of all n. So a process gets n times its own tokens' part, and the mean over
        # processes is right. A slice would leave 1 / n of it, hence the mean of n equal copies
        self.gathered = lambda x: exchange(x[:, :, None].expand(-1, -1, n, -1), 2, 1)[:, :, 0]
        module.rope.register_forward_hook(lambda m, args, out: [x.chunk(n)[rank] for x in out])
        module.x_embedder.register_forward_hook(
            lambda m, args, out: exchange(out[:, :, None], 1, 2).mean(2)
        )
        module.proj_out.register_forward_hook(lambda m, args, out: self.gathered(out))

    def features(self, x_t, sigma, cond):
        """The sample's tokens after the last double-stream block, (B, tokens, width)."""
        seen, later = [], self.module.single_transformer_blocks
        watch = self.module.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.module.single_transformer_blocks = torch.nn.ModuleList()  # the late blocks do not run
        try:
            self.velocity(x_t, sigma, cond)
        finally:
            self.module.single_transformer_blocks = later
            watch.remove()
        frames = x_t.shape[2] + (self.form == "token_replace")  # the first, which was given
        return self.gathered(seen[0]).unflatten(1, (frames, -1))[:, -x_t.shape[2] :].flatten(1, 2)

    def with_image(self, x_t, cond):
        """What the transformer reads: x_t with the first frame's latents, cond['image'], beside it.

        token_replace: in front, x_t being the frames behind it; latent_concat: in more channels.
        """
        if self.form == "token_replace":
            return torch.cat([cond["image"].to(x_t), x_t], dim=2)
        if self.form == "latent_concat":
            beside = x_t.new_zeros(len(x_t), x_t.shape[1] + 1, *x_t.shape[2:])  # the last: a mask
            beside[:, :-1, :1], beside[:, -1:, :1] = cond["image"], 1
            return torch.cat([x_t, beside], dim=1)
        return x_t

    def velocity(self, x_t, sigma, cond):
        """x_t: latents (B, C, T, H, W); cond: prompt_embeds (B, L, D), trimmed; pooled (B, P)."""
        text = cond["prompt_embeds"].to(self.dtype)
        device = x_t.device.type.replace("meta", "cpu")  # the meta device knows no autocast
        # NOTE silent: without autocast the float32 adapters would compute in float32; with its
        # cache every float32 weight would stay in bf16 too until the end of the forward
        with torch.autocast(device, self.dtype, self.dtype != torch.float32, cache_enabled=False):
            v = self.module(
                hidden_states=self.with_image(x_t, cond).to(self.dtype),
                timestep=1000 * sigma.float(),  # NOTE silent: bf16 would round 954.5 to 956
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x_t.device),
                pooled_projections=cond["pooled"].to(self.dtype),
                guidance=text.new_full((len(x_t),), self.guidance) * 1000,  # 6016, as in diffusers
                return_dict=False,
            )[0]
        return v[:, :, -x_t.shape[2] :].to(x_t.dtype)


@contextmanager
def reading(sentence, *more):
    """Refuse what cannot be read inside, with the reason; `more`: errors that here are no bugs."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError, *more) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise Refused(f"{sentence} ({reason}).") from error


def load_pipeline(checkpoint, without, dtype=None, device=DEVICE):
    """diffusers' pipeline of the checkpoint; the parts named in `without` stay unread."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # its bars would cut through ours
    dtype = dtype or (torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    how = {"dtype": dtype, "use_safetensors": True} | dict.fromkeys(without)
    with reading(f"--checkpoint {checkpoint} is no HunyuanVideo"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint, **how).to(device)
    if pipe.vae:
        pipe.vae.enable_tiling()
    return pipe


@torch.no_grad()
def encode_text(pipe, caption, first=None, form=None):
    """prompt_embeds (1, L, D), trimmed to the L tokens that count, and pooled (1, P).

    Image-to-video's encoder reads the first frame too, (1, 3, 1, H, W) in [-1, 1], thinned out by
    the number that goes with the form; its latents are 'image', (1, C, 1, H, W).
    """
    own = HunyuanVideo.prompt_template
    how = {"prompt": caption} | ({"prompt_template": own} if own else {})
    if form:
        picture = pipe.video_processor.postprocess(first[:, :, 0], output_type="pil")[0]
        how |= {"image": picture, "image_embed_interleave": 4 if form == "token_replace" else 2}
    embeds, pooled, mask = pipe.encode_prompt(**how)
    text = {"prompt_embeds": embeds[:, mask[0].bool()], "pooled": pooled}
    return text | {"image": encode_video(pipe, first)} if form else text


@torch.no_grad()
def encode_video(pipe, video):
    """A video (1, 3, T, H, W) in [-1, 1] as scaled latents (1, C, T, H, W)."""
    vae = pipe.vae.float()  # bf16 would round the latents
    return vae.encode(video.to(pipe.device)).latent_dist.mode() * pipe.vae.config.scaling_factor


# ---- 8. Files and data ---------------------------------------------------------------------------
def of_all_ranks(x):
    """Every process's x, a list; small things only."""
    every = [x] * RANKS
    if RANKS > 1:
        torch.distributed.all_gather_object(every, x)
    return every


@contextmanager
def atomic_write(path):
    """A name to write to, which becomes `path` at the end; a failure leaves `path` as it was."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # others may write it too
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield part
        part.chmod(0o666 & ~umask)  # safetensors would keep it from everybody else
        with open(part, "rb+") as file:  # or the name might reach the disk without the content
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def write_safetensors(path, tensors, info, **metadata):
    """{name: tensor}, and `info` as one JSON string in the header; whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_write(path) as part:
        save_file(tensors, part, metadata | {"w2svd": json.dumps(info, sort_keys=True)})


def read_safetensors(path):
    """Back: (tensors, info). A file that is missing, damaged or not ours is refused."""
    from safetensors import safe_open

    with reading(f"Delete {path}, not whole or not ours", KeyError), safe_open(path, "pt") as file:
        info = json.loads((file.metadata() or {})["w2svd"])
        return {name: file.get_tensor(name) for name in file.keys()}, info


READING = 3  # raised whenever reading or encoding changes: latents made before are made again
EXAMPLE = "python w2svd.py train --model hunyuan --data my_clips/"
LAYOUTS = "a.mp4 with a.txt, metadata.jsonl or .csv (file_name, text), videos.txt with prompt.txt"
LISTS = ("metadata.jsonl", "metadata.csv", "videos.txt")
FILMS = ".mp4 .m4v .mov .mkv .webm .avi .gif .wmv .flv .ts .mts .m2ts .mpg .mpeg .3gp .ogv".split()
# No playlist, which would read other files or a network: ffmpeg guesses the format from the content
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif,ogg"
FFMPEG = f"-hide_banner -protocol_whitelist file -format_whitelist {FORMATS} -timelimit 600".split()
# HDR to SDR: 203 nits are white, as ITU-R BT.2408 has it; what is above .6 is compressed
TONE_MAP = ",zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709"
TONE_MAP += ",tonemap=mobius:param=.6:desat=0,zscale=t=bt709:m=bt709"


def read_text(path):
    """A text, without the mark that Excel begins with; bytes that are no UTF-8 are found later."""
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def read_list(path):
    """[(line, row)] of one of LISTS: as dictionaries, but metadata.jsonl's as JSON."""
    text = read_text(path)
    if path.suffix == ".csv":
        separator = max(",;\t", key=text.split("\n")[0].count)
        # an unquoted comma in a caption makes extra cells: "text" is a list, refused by the caller
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey="text")
        return [(table.line_num, row) for row in table]
    if path.name == "videos.txt":
        both = [x.rstrip().split("\n") for x in (text, read_text(path.with_name("prompt.txt")))]
        pairs = enumerate(itertools.zip_longest(*both), 1)
        return [(i, {"file_name": a, "text": b}) for i, (a, b) in pairs if a or b]
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def find_clips(data):
    """[(path, caption)] of a folder, [(None, caption)] of a .txt; {name: reason} of all else.

    A film is named by a list, or has its caption in a .txt beside it, which is returned as a Path.
    """
    if Path(data).suffix == ".txt" and Path(data).is_file():
        return [(None, line) for line in read_text(Path(data)).split("\n") if line.strip()], {}
    if not data or not Path(data).is_dir():
        raise Refused(f"{data!r} is no folder of clips ({LAYOUTS}), nor a .txt: {EXAMPLE}")
    data, files, seen, clips, left_out = Path(os.path.abspath(data)), [], set(), [], {}
    for folder, inner, names in os.walk(data, followlinks=True):
        seen.add(os.path.realpath(folder))
        shut = {n for n in inner if n[0] == "." or os.path.realpath(Path(folder, n)) in seen}
        inner[:] = sorted(set(inner) - shut)
        files += [Path(folder, name) for name in sorted({*names, *shut} - {".w2svd"})]  # to list
    lists = [file for file in files if file.name in LISTS]
    for file in lists:
        with reading(f"{file} cannot be read", csv.Error):
            rows = read_list(file)
        for line, row in rows:
            try:
                row = row if isinstance(row, dict) else json.loads(row)
                film, caption = row["file_name"].strip(), row["text"].strip()
                clips.append((Path(os.path.abspath(file.parent / film)), caption))
            except (ValueError, KeyError, TypeError, AttributeError):
                name = f"{file.relative_to(data)}, line {line}"
                left_out[name] = "no file_name with one text (in quotes)"
    named = {film for film, _ in clips}
    films = [f for f in files if f.suffix.lower() in FILMS and f.name[0] != "."]
    clips += [(film, film.with_suffix(".txt")) for film in films if film not in named]
    used = {path for film, _ in clips for path in (film, film.with_suffix(".txt"))}
    used |= {*lists, *(f.with_name("prompt.txt") for f in lists if f.name == "videos.txt")}
    for file in files:
        if file not in used:
            why = "a folder read before" if file.is_dir() else "no clip, nor a caption of one"
            left_out[os.path.relpath(file, data)] = "hidden" if file.name[0] == "." else why
    return clips, left_out


def ffmpeg(path, *flags, first=()):
    """Run ffmpeg on a film: its output, and what it said; ValueError where it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    # the whole path, or a name like 'concat:a' would be read as a protocol
    command = [get_ffmpeg_exe(), *FFMPEG, *first, "-i", path.resolve(), *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        raise ValueError(f"damaged, or no film: {(said.strip() or 'stopped').splitlines()[-1]}")
    return done.stdout, said


def look(path):
    """What ffmpeg says of a film's first frame, upright: sides, width / height, fps, colours."""
    _, said = ffmpeg(path, *"-map 0:V:0 -frames:v 1 -vf showinfo -f null -".split())
    found = re.findall(r"(\w+): *([^\s,]+)", said.partition("config in ")[2])
    facts = dict(reversed(found))  # of each name the first
    (w, h), (wide, high) = map(int, facts["s"].split("x")), map(int, facts["sar"].split("/"))
    aspect = w / h * (wide / high if wide else 1)  # 0 is unknown
    header = said.partition("\n  Duration: ")[2]  # behind the film's name
    clock = re.match(r"(\d+):(\d+):([\d.]+)", header) or (0, 0, 0, 0)
    seconds = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
    fps = float((re.search(r", ([\d.]+) fps", header) or (0, "inf"))[1])
    colours = {"matrix": facts["color_space"], "curve": facts["color_trc"]}
    # WebM's alpha, which only libvpx reads
    codec = re.search(r"Video: (vp[89])", header) if "alpha_mode" in header else None
    vpx = ["-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec[1]]] if codec else []
    return SimpleNamespace(size=(w, h), aspect=aspect, seconds=seconds, fps=fps, vpx=vpx, **colours)


def read_clip(path, config):
    """The first frames of a film as a player shows them: (1, 3, T, H, W) in [-1, 1].

    Upright, in square pixels, whole frames instead of fields, colours of SDR, black where it is
    transparent; resampled, cropped at the centre, resized. ValueError: short, damaged, a still.
    """
    film, w, h, n = look(path), config.width, config.height, config.frames
    if film.fps < config.fps / 4:
        raise ValueError(f"{film.fps:g} fps are stills; --fps {config.fps:g} would repeat them")
    # cropped before it is scaled: a picture of 8000 x 2 would be scaled to 192,000 x 48
    crop = f"crop=max(1\\,min(iw\\,ih*{w}/{h}/sar)):max(1\\,min(ih\\,iw*sar*{h}/{w}))"
    chain = f"bwdif=send_frame:deint=interlaced,fps={config.fps},{crop},scale={w}:{h},setsar=1"
    if film.curve in ("smpte2084", "arib-std-b67"):  # PQ, HLG
        chain += TONE_MAP
    elif film.matrix == "unknown" and max(film.size) >= 1280:
        chain = "setparams=colorspace=bt709," + chain  # untagged and large, as players take it
    # NOTE silent: into rgb24 at once, ffmpeg would not interpolate colours
    chain += ",format=gbrap,premultiply=inplace=1"
    flags = f"-v error -xerror -map 0:V:0 -frames:v {n} -f rawvideo -pix_fmt rgb24".split()
    raw, _ = ffmpeg(path, *flags, "-vf", chain, "-", first=film.vpx)
    if len(raw) < 3 * h * w * n:
        raise ValueError(f"too short: {len(raw) // (3 * h * w)} of {n} frames, {config.fps:g} fps")
    frames = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(n, h, w, 3)
    return frames.permute(3, 0, 1, 2)[None] / 127.5 - 1


def encode_clip(pipe, video, caption, form=None):
    """Text and, of a video (1, 3, T, H, W), scaled latents (C, T, H, W), without a batch."""
    tensors = encode_text(pipe, caption, None if video is None else video[:, :, :1], form)
    if video is not None:
        tensors["latents"] = encode_video(pipe, video)
    for name, x in tensors.items():
        if not x.isfinite().all() or not x.numel():
            raise ValueError(f"its {name} are empty or not finite")
    return {name: x[0] for name, x in tensors.items()}


def latents_file(config, path, caption):
    """Where a clip's latents and text are kept: a name that hashes all that they depend on."""
    data = Path(config.data)
    parts = [READING, caption, config.checkpoint, HunyuanVideo.prompt_template]
    if path:
        parts += [os.path.relpath(path, data), path.stat().st_size, path.stat().st_mtime_ns]
        parts += [config.height, config.width, config.frames, config.fps]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    beside = data if path else data.parent  # a folder of clips, or a .txt
    folder = Path(config.cache or beside / ".w2svd").expanduser()
    return folder / f"{path.stem[:40] if path else 'caption'}-{digest}.safetensors"


def encode_missing(config, clips, form):
    """{clip: its file}; [(name, look() at it, tokens)] of those made now; {name: why not}."""
    from diffusers.training_utils import free_memory
    from tqdm import tqdm

    files, made, left_out, pipe = {}, [], {}, None
    for path, caption in tqdm(clips, desc="encode", unit="clip"):
        name, tensors = os.path.relpath(path, config.data) if path else repr(caption), None
        try:
            if isinstance(caption, Path) and not caption.exists():
                raise ValueError(f"it has no caption, {caption.name}")
            text = read_text(caption) if isinstance(caption, Path) else caption
            if text != text.encode(errors="replace").decode():
                raise ValueError("its caption is not UTF-8")
            text = " ".join(line.strip() for line in text.strip().split("\n"))
            file = latents_file(config, path, text)
            if not file.exists():
                video = read_clip(path, config) if path else None
                pipe = pipe or load_pipeline(config.checkpoint, ("transformer",))
                tensors = encode_clip(pipe, video, text, form)
        except (Refused, ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each clip is an island: the others go on
            left_out[name] = (str(error).strip().splitlines() or [repr(error)])[-1]
            continue
        files[path, caption] = file
        if tensors:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(file, tensors, {"source": name, "caption": text})
            tokens = 0 if form else len(tensors["prompt_embeds"])  # with form the picture's too
            made.append((name, path and look(path), tokens))
    del pipe
    free_memory()
    return files, made, left_out


def encoded_clips(config, form=None):
    """The files of all clips that can be used, encoded where they are missing; says what is not."""
    clips, left_out = find_clips(config.data)
    c, found, made = config, {}, []
    for files, new, unusable in of_all_ranks(encode_missing(c, clips[RANK::RANKS], form)):
        found, made, left_out = found | files, made + new, left_out | unusable
    # in the folder's order; one that is listed twice is one clip
    files = list(dict.fromkeys(found[clip] for clip in clips if clip in found))
    print(f"{c.data}: {len(files)} clips, {len(made)} encoded now")
    films = {name: film for name, film, _ in made if film}
    if films:
        seconds, used = sum(film.seconds for film in films.values()), len(films) * c.frames / c.fps
        ratios = sorted(film.aspect * c.height / c.width for film in films.values())
        kept = sum(min(x, 1 / x) for x in ratios) / len(films)
        print(f"  used: {used:.1f} of {seconds:.1f} s, {kept:.0%} of the picture")
        scale = math.sqrt(ratios[len(films) // 2])  # the same area in the films' own shape
        height, width = 16 * round(c.height / scale / 16), 16 * round(c.width * scale / 16)
        if kept < 0.8 and (height, width) != (c.height, c.width):
            print(f"  more of it with --height {height} --width {width}")
    for name, film in films.items():
        if film.fps < 0.9 * c.fps:
            print(f"  {name}: frames are repeated, {film.fps:g} fps become {c.fps:g}")
    if cut := sum(tokens >= 256 for *_, tokens in made):
        print(f"  the text encoder reads 256 tokens: {cut} captions are longer, their ends unread")
    for name, reason in left_out.items():
        print(f"  left out, {name}: {reason}")
    if not files:
        needs = f"a folder needs {LAYOUTS}; a .txt a caption in each line"
        raise Refused(f"Nothing in {c.data} can be used: {needs}.", status=1)
    return files


def sampling(config):
    """A generator's steps, its shift, and whether it is sampled by Euler, as a backbone is."""
    flow = config.objective == "finetune" and config.model == "hunyuan"
    return (28, 7.0, True) if flow else (config.steps, config.shift, False)


class HunyuanTask:
    """HunyuanVideo and a folder of clips: a task, which is a model and its data. A task has

    .backbone (see Roles), whose weights come with .load(...); .device; .shape of a sample; .clips,
    the files; .batches(rng, taken, rank, ranks), endless {'x0': (B, ...), 'cond', 'name'}, every
    ranks-th one from number taken + rank on; .prepare() for what must follow the adapters;
    .costs(...) for the plan; .on_log(step, generator) for pictures on the way, .finish(run) ->
    (result, table) at the end; .sample(...), a command.
    """

    device = DEVICE

    def __init__(self, config):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        Model, self.config, found = diffusers.HunyuanVideoTransformer3DModel, config, {}
        other = f"--checkpoint {config.checkpoint} is no HunyuanVideo known here"
        with reading(other, TypeError), torch.device("meta"):  # shapes and no numbers, for the plan
            if config.checkpoint != HUNYUAN:  # whose config is the class's defaults
                found = Model.load_config(config.checkpoint, subfolder="transformer")
            self.backbone = HunyuanVideo(Model.from_config(found).bfloat16(), config)
        m, self.form = self.backbone.module.config, self.backbone.form
        channels, kind = m.out_channels, found.get("_class_name", Model.__name__)
        reads = 2 * channels + 1 if self.form == "latent_concat" else channels
        if (kind, m.in_channels, m.patch_size_t) != (Model.__name__, reads, 1):
            raise Refused(f"{other}.")
        if self.form and ".txt" in (config.data[-4:], config.sample_prompts[-4:]):
            raise Refused("--data, --sample-prompts: a .txt has no first frames; name a folder.")
        # the VAE makes one of 4 frames, of 8 x 8 pixels; token_replace samples all but the first
        self.video = (channels, config.frames // 4 + 1, config.height // 8, config.width // 8)
        self.shape = (channels, self.video[1] - (self.form == "token_replace"), *self.video[2:])
        self.tokens = math.prod(self.video[1:]) // m.patch_size**2

    def load(self, split=False, keep=0, offload=False):
        """Encode what is missing, then read the weights; keep, offload: see checkpoint_with."""
        if DEVICE == "cpu" and self.backbone.module.num_parameters() > 1e9:
            raise Refused(f"HunyuanVideo needs a GPU and torch finds none; on a GPU: {EXAMPLE}")
        c = self.config
        shown = dataclasses.replace(c, data=c.sample_prompts)
        prompts = encoded_clips(shown, self.form) if c.sample_prompts else []
        self.clips = encoded_clips(c, self.form)
        draw = torch.randperm(len(self.clips), generator=torch.Generator().manual_seed(0))
        self.filmed = (prompts or [self.clips[i] for i in draw])[:4]
        self.load_weights(split)
        self.backbone.keep, self.backbone.offload = keep, offload

    def load_weights(self, split=False):
        # a full copy beside it would not fit: split_over_ranks moves the parts there
        full = "full" in (self.config.generator, self.config.fake)
        device = "cpu" if full and split else DEVICE
        pipe = load_pipeline(self.config.checkpoint, (*TEXT, "vae"), device=device)
        self.backbone = HunyuanVideo(pipe.transformer.requires_grad_(False), self.config)

    def prepare(self):
        """What must follow the adapters: the base's weights in 8 bits, compilation."""
        if self.config.fp8_base:  # NOTE silent: before them, the adapters would be 8 bits too
            self.backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, self.backbone.dtype)
        if self.config.compile:  # 2 kinds of block, 3 roles and none, gradient, lengths of text
            torch._dynamo.config.recompile_limit = 64
            for block in self.backbone.blocks:
                block.compile()

    def read(self, clip):
        """A clip as a batch of one; x0 is 0 where there is a caption alone."""
        tensors, info = read_safetensors(clip)
        cond = {name: x[None].to(DEVICE) for name, x in tensors.items()}
        x0 = cond.pop("latents", torch.zeros(1, *self.shape, device=DEVICE))
        x0 = x0[:, :, -self.shape[1] :]
        return {"x0": x0, "cond": cond, "name": clip.name, "caption": info["caption"]}

    def batches(self, rng, taken=0, rank=0, ranks=1):
        """Each clip once an epoch, in an order made of seed and epoch, not of rng; endless."""
        for count in itertools.count(taken + rank, ranks):
            epoch, place = divmod(count, len(self.clips))
            order = torch.Generator().manual_seed((1_000_003 * self.config.seed + epoch) % 2**63)
            permutation = torch.randperm(len(self.clips), generator=order)
            yield self.read(self.clips[permutation[place]])

    def learning(self):
        """How many blocks a backward goes through: it ends at the first one with an adapter."""
        c, module = self.config, self.backbone.module
        single = c.lora_targets == "single" and "full" not in (c.generator, c.fake)
        return len(module.single_transformer_blocks if single else self.backbone.blocks)

    def memory(self, generator, fake, tokens, machine):
        """GiB on a GPU of so many tokens, by line; blocks that keep attention; GiB in the host."""
        c, module, GiB = self.config, self.backbone.module, 2**30
        n, width, gpus = len(self.backbone.blocks), self.backbone.width, machine.parts(c)
        full = generator * (c.generator == "full") + fake * (c.fake == "full")
        share = full / gpus + generator + fake - full  # adapters stay whole on each GPU
        student = generator / (gpus if c.generator == "full" else 1)
        if c.fp8_base:  # the plan's model has no other use
            module.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        frozen = [p for p in module.parameters() if not p.requires_grad]
        base, one = sum(p.nbytes for p in frozen) / GiB, 2 * tokens * width / GiB
        # it is read as bf16; copies are made there before the split
        host = (2 * sum(p.numel() for p in frozen) + 4 * full * (gpus > 1)) / GiB
        # one: a bf16 tensor of all tokens. A block's backward keeps 37.2 (simulated), exchanges 4
        kept = (37.2 + 4 * (machine.context_parallel > 1)) * one
        inputs = self.learning() + n * (c.gan_weight > 0) / 3
        lines = {
            "backbone, frozen": base / gpus + 3 * base / n * (gpus > 1),  # blocks being gathered
            "generator and fake, float32": 4 * share / GiB,
            "Adam, average": (8 * share + 4 * student) / GiB,
            "gradients": 4 * max(student, share - student) / GiB,  # of one update at a time
            "inputs of the blocks": (2 if machine.offload else inputs) * one * c.checkpointing,
            "a block at work": kept * (1 if c.checkpointing else self.learning()),
            "CUDA, fragments": 1.6,  # with expandable segments
        }
        result = one + 4 * tokens * module.config.num_attention_heads / GiB  # and float32 sums
        # a twentieth stays free, as no GPU has checked this; copies, which gather more, keep none
        # a discriminator runs the double-stream blocks once more: then only the others keep
        most = len(module.single_transformer_blocks) if c.gan_weight else self.learning()
        if full or c.compile or not c.checkpointing:
            most = 0
        keep = max(0, min(most, int((0.95 * machine.room() - sum(lines.values())) / result)))
        lines["attention's results"] = keep * result
        pinned = inputs * 2 ** math.ceil(math.log2(one))  # torch rounds up to powers of two
        return lines, keep, max(host, machine.offload * pinned)

    def costs(self, forwards, backwards, generator, fake, machine=MACHINE):
        """Memory, time and disk by formulas: simulated or published figures, nothing measured."""
        c, m = self.config, self.backbone.module.config
        n, width = len(self.backbone.blocks), self.backbone.width
        text = 256 + {None: 0, "token_replace": 144, "latent_concat": 288}[self.form]
        tokens, context = self.tokens + text, machine.context_parallel
        counts = {"GPUs": machine.gpus, "tokens": self.tokens, "heads": m.num_attention_heads}
        for name, count in counts.items():
            if count % context:
                raise Refused(f"--context-parallel {context} must divide the {count} {name}.")
        memory, keep, host = self.memory(generator, fake, self.tokens / context + text, machine)
        # PFLOP of a forward. A backward takes as much in frozen linear layers, and 2.5 times as
        # much in attention, whose kernel recomputes a product; checkpointing one more forward
        linear = 2 * tokens * n * (4 + 2 * m.mlp_ratio) * width**2 / 1e15
        attention = 4 * tokens**2 * width * n / 1e15
        forward, share = linear + attention, self.learning() / n
        linear *= c.accumulate * (forwards + backwards * (1 + share * (1 + c.checkpointing)))
        again = c.checkpointing * (share - keep / n)  # what is kept is not computed again
        attention *= c.accumulate * (forwards + backwards * (1 + 2.5 * share + again))
        # on an H100 in TFLOP/s, published: 650 in large products, 550 in cuDNN's attention
        seconds = (linear / 650 + attention / 550) * 1e3 / context
        saves = 2 if c.generator == "full" else c.iterations // c.save_every
        # two checkpoints and the one being written; the generators
        saved = 3 * (4 * generator + 3 * fake) + (saves + 1) * generator
        return {
            "GPU memory, GiB": memory,
            "in all, GiB": sum(memory.values()),
            "at the least, GiB": sum(memory.values()) - memory["attention's results"],
            "blocks that keep attention's results": keep,
            "hours on H100": seconds * c.iterations / 3600,
            "seconds an iteration": seconds,
            "clips an update": c.accumulate * machine.gpus // context,
            "PFLOP an iteration": (linear + attention) / context,
            "forwards' worth of an iteration": (linear + attention) / forward,
            "disk for the run, GiB": 4 * saved / 2**30,
            "download, once, GB": 42 if c.checkpoint == HUNYUAN else 0,
            "host memory of each process, GiB": host,
            "attention": "cuDNN's on Hopper, which the hours assume; else torch's choice",
            "tokens": tokens,
        }

    def complete(self, x0, cond):
        """A sample (B, C, T, H, W) with the given first frame in front, where that is not in it."""
        return torch.cat([cond["image"], x0], dim=2) if self.form == "token_replace" else x0

    def draw(self, velocity, sigmas, cond, seed, euler=False):
        """Latents of a whole video, (1, C, T, H, W); the seed decides it."""
        rng = torch.Generator(DEVICE).manual_seed(seed)
        noise = torch.randn(1, *self.video, generator=rng, device=DEVICE)[:, :, -self.shape[1] :]
        if self.form:  # as diffusers' image-to-video pipeline begins
            noise = 0.999 * noise + 0.001 * cond["image"]
        given = velocity, noise, sigmas, cond
        return self.complete(euler_sample(*given) if euler else few_step_sample(*given, rng), cond)

    @torch.no_grad()
    def decode(self, pipe, x0):
        """Frames (T', H', W', 3) in [0, 1] of latents (1, C, T, H, W)."""
        x0 = x0.to(pipe.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
        frames = pipe.vae.decode(x0, return_dict=False)[0]
        if not frames.isfinite().all():
            raise Refused("The sampled video is not finite; nothing is written.")
        # the first 4 repeat the picture; diffusers drops them too
        frames = frames[:, :, 4:] if self.form == "latent_concat" else frames
        return pipe.video_processor.postprocess_video(frames, output_type="np")[0]

    def film(self, path, *how, **more):
        """Draw a video and write it as .mp4. The VAE comes and goes."""
        import imageio.v3 as iio

        x0 = self.draw(*how, **more)
        if RANK:
            return
        frames = self.decode(load_pipeline(self.config.checkpoint, (*TEXT, "transformer")), x0)
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:
            video = (frames * 255).round().astype("uint8")
            iio.imwrite(part, video, plugin="FFMPEG", fps=self.config.fps)

    def on_log(self, step, generator):
        """Film up to four prompts at the start and at every save, always from the same noise."""
        c, (steps, shift, flow) = self.config, sampling(self.config)
        sigmas = few_step_sigmas(steps, shift)
        if step % c.save_every and step != c.iterations:
            return
        for i, clip in enumerate(self.filmed):
            one = self.read(clip)
            words = re.sub(r"\W+", "-", one["caption"])[:60].strip("-")
            path = Path(c.out) / f"samples/{step:06}-{i}-{words}.mp4"
            self.film(path, generator, sigmas, one["cond"], c.seed, euler=flow)
            if step == 0:
                beside = path.with_stem(f"{path.stem}-backbone")
                self.film(beside, self.backbone.velocity, sigmas, one["cond"], c.seed, euler=True)

    def finish(self, run):
        """No exact answer here: the last logged numbers."""
        last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        flags = '--prompt "..."' + " --image face.png" * bool(self.form)
        table = f"now: python w2svd.py sample --run {run.folder} {flags} --out video.mp4"
        return {"student": last | {"steps": run.config.steps}}, table

    def first_frame(self, path):
        """A picture, cropped and resized to the video's size: (1, 3, 1, H, W) in [-1, 1]."""
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.utils import load_image

        with reading(f"--image {path} is no picture"):
            picture = load_image(str(path))
        size = self.config.height, self.config.width
        return VaeImageProcessor().preprocess(picture, *size, resize_mode="crop")[:, :, None]

    def student(self, tensors, info):
        """The velocity of a stored generator, in place of the backbone's."""
        if info["kind"] == "full":
            self.backbone.module.load_state_dict(tensors)
            return self.backbone.velocity
        roles = Roles(self.backbone, info["rank"], 0.0, 1.0)
        roles.load("generator", tensors)
        return roles.generator

    def sample(self, tensors, info, out, seed, prompt=None, image=None, steps=0, **avoid):
        """A video of the prompt, of the image on; `avoid`: negative_prompt, and cfg, its weight."""
        from diffusers.training_utils import free_memory

        if prompt is None or (image is None) != (self.form is None) or out.suffix != ".mp4":
            image = "an --image" if self.form else "no --image"
            raise Refused(f"This checkpoint needs a --prompt, {image}, and an .mp4 as --out.")
        first = self.first_frame(image) if image else None
        pipe = load_pipeline(self.config.checkpoint, ("transformer", *["vae"] * (image is None)))
        cond = encode_text(pipe, prompt, first, self.form)
        if avoid:
            black = None if first is None else 0 * first - 1
            avoided = encode_text(pipe, avoid.get("negative_prompt", ""), black, self.form)
            avoided["image"] = cond.get("image")  # shown all the same
        del pipe
        free_memory()  # before the transformer comes
        self.load_weights()
        sigmas = few_step_sigmas(steps, info["shift"]) if steps else torch.tensor(info["sigmas"])
        student = self.student(tensors, info)

        def away(x_t, sigma, cond):  # at twice the evaluations
            v, v_avoided = student(x_t, sigma, cond), student(x_t, sigma, avoided)
            return guided(v, v_avoided, avoid.get("cfg", 2.0))

        self.film(out, away if avoid else student, sigmas, cond, seed, euler=info["euler"])
        return f"wrote {out}"


# ---- 9. Training ---------------------------------------------------------------------------------
def join_ranks():
    """Under torchrun: take this process's GPU and meet the others; the first alone speaks."""
    if RANKS > 1 and not torch.distributed.is_initialized():
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a long wait is one for clips to be encoded; torchrun ends all processes when one dies
        backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
        # at the end, what still refers to the group would end the process by an error
        atexit.register(lambda: (gc.collect(), torch.distributed.destroy_process_group()))
        # after an error it would wait for others, which wait for this process
        sys.excepthook = lambda *error: (sys.__excepthook__(*error), os._exit(1))
        if RANK:
            sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"


def is_split(x):
    """Whether each process holds only a part of x: a DTensor, whose import takes a second."""
    return hasattr(x, "full_tensor")


def mean_over_ranks(x):
    """x becomes its mean over the processes; FSDP2 has averaged a split weight's gradient."""
    if RANKS > 1 and not is_split(x):
        torch.distributed.all_reduce(x)
        x /= RANKS
    return x


def in_one_piece(x):
    """A tensor, of which each process may hold a part, in one piece."""
    return x.detach().full_tensor() if is_split(x) else x.detach()


class StateOfRanks(State):
    """A State whose clips and noise `context` processes in a row share, and all its gradients."""

    def __init__(self, config, roles, device, context=1):
        super().__init__(config, roles, device)
        self.rank, self.ranks = RANK // context, RANKS // context
        for name, rng in self.rngs.items():
            # one exit for all, as it decides how often the split backbone is gathered
            if name != "exit" or config.generator_input == "paired":
                rng.manual_seed(rng.initial_seed() + 2**20 * self.rank)

    def update(self, role, lr):
        for parameter in self.roles.parameters(role):
            mean_over_ranks(parameter.grad)
        return in_one_piece(super().update(role, lr))


def split_over_ranks(roles):
    """Of frozen weights and of whole copies each process keeps a part (FSDP2).

    A block's weights are gathered when it runs and dropped after it. Adapters stay whole in every
    process, where `mean_over_ranks` keeps them equal. Optimizers come after this.
    """
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped .* returned a view")  # none is written to
    adapters = {p for role in roles.trained.keys() - roles.copies for p in roles.parameters(role)}
    for backbone in (roles.backbone, *roles.copies.values()):
        for module in (*backbone.blocks, backbone.module):  # the last: all that is in no block
            # NOTE silent: by default a root keeps what it gathered until a backward; a copy's would
            # be stale after `averaged` exchanged it. The base's stays, for `features`' backward
            drop = module is not roles.backbone.module
            fully_shard(module, ignored_params=adapters, reshard_after_forward=drop)
    for role in roles.copies:
        roles.trained[role] = roles._find(role)
    for parameter in adapters:
        parameter.data = parameter.data.to(DEVICE)


def split_as(x, like):
    """A copy of the whole tensor x, where and as `like` is."""
    if is_split(like) and x.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x.to(like.device, copy=True)


def write_by_first(path, tensors, info):
    """write_safetensors of tensors that may be split: all processes gather, the first writes."""
    gathered = ((name, in_one_piece(x)) for name, x in tensors.items())  # lazy: one at a time
    kept = {name: x.cpu() for name, x in gathered if RANK == 0}  # gathered by every process
    if RANK == 0:
        write_safetensors(path, kept, info)


def check_ranks(config, state):
    """Stop where processes differ in what they share: trained weights, exits, a group's noise."""
    marks = [state.iteration, state.taken]
    marks += [state.rngs["exit"].get_state().sum()] if config.generator_input == "rollout" else []
    for role in state.optimizers:
        marks += [p.detach().sum() for p in state.roles.parameters(role) if not is_split(p)]
    noise = [rng.get_state().sum() for rng in state.rngs.values()]
    every = of_all_ranks((tuple(map(float, marks)), (state.rank, *map(float, noise))))
    of_all, of_a_group = map(set, zip(*every))
    if len(of_all) > 1 or len(of_a_group) > state.ranks:  # as many noises as groups
        raise RuntimeError("the processes have drifted apart; a bug, since all must do the same")


def load_task(config):
    """The model and data that `config` names, as a task."""
    if config.model == "toy":
        import toy

        return toy.task(config)
    return HunyuanTask(config)


def consistency_step(roles, average, x0, cond, sigma, sigma_next, eps):
    """One backward of LCM's loss: mean |x0_generator(x_t, sigma) - x0_average(x_s, sigma_next)|^2.

    One Euler step of the backbone leads from x_t, x0 (B, ...) noised to sigma (B,), to x_s at
    sigma_next just below it; both shall show the same sample. At 0 it is x_s itself.
    paper: the baseline. peer: its loss, here a plain mean square of x0.
    """
    x_t = add_noise(x0, eps, sigma)
    with roles.use("generator"):
        with torch.no_grad():
            x_s = x0_from_velocity(x_t, roles.plain(x_t, sigma, cond), sigma - sigma_next)
            goal = x0_from_velocity(x_s, average(x_s, sigma_next, cond), sigma_next)
        x0_now = x0_from_velocity(x_t, roles.generator(x_t, sigma, cond), sigma)
        require_finite("the generator's sample", x0_now, sigma)
        loss = torch.nn.functional.mse_loss(at_least_float32(x0_now), at_least_float32(goal))
        loss.backward()
    return {"generator_loss": loss.detach()}


def without_fake(config, roles, state, data):
    """The same loop for the other objectives, of the data or the backbone alone.

    finetune: flow matching of the data. lcm: see above. regress: at pure noise, flow matching of
    where the backbone's 28 Euler steps lead from it (peer: DMD2 warms one step up so).
    """
    n = config.steps * math.ceil(50 / config.steps)  # LCM's levels, the generator's among them
    grid = few_step_sigmas(n, config.shift).to(state.device)  # peer: 50 levels of 1000

    def average(*args):
        with state.averaged() as generator:
            return generator(*args)

    while state.iteration < config.iterations:
        stats = []
        for name, x0, cond in micro_batches(config, state, data):
            sigma, eps = losses_noise(config, state, x0, name)
            if config.objective == "regress":
                sigma.fill_(1)  # pure noise; state.reads holds the same tensor
                x0 = euler_sample(roles.plain, eps, few_step_sigmas(28, config.shift), cond)
            if config.objective == "lcm":
                k = torch.randint(n, sigma.shape, generator=state.rngs["level"], device=x0.device)
                state.reads[-1] = name, grid[k]
                step = consistency_step(roles, average, x0, cond, grid[k], grid[k + 1], eps)
            else:
                step = fake_step(roles, x0, cond, sigma, eps, role="generator")
            stats.append(step | moments("data", x0))
        norm = state.update("generator", lr_scale(config, state.iteration) * config.generator_lr)
        state.update_average()
        state.iteration += 1
        yield mean_of(stats) | {"grad_norm": norm}


def memory_mb(device):
    """Peak memory in MB so far: of the process on a CPU, what torch has reserved on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def commit():
    """The git commit of this file, for config.json; or git's word on why there is none."""
    return subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')


def plan(config, task, machine=MACHINE):
    """What a run takes: its costs first, then the numbers that follow from the config."""
    backbone = sum(p.numel() for p in task.backbone.module.parameters())
    with torch.device("meta"):  # nothing is loaded yet; load() brings one without these adapters
        roles = Roles(task.backbone, config.lora_rank, 0.0, 1.0, config.generator, config.fake)
    rollout = (config.steps - 1) / 2 if config.generator_input == "rollout" else 0  # the mean exit
    fake_rollout = 2 * rollout if config.fake_samples == "final" else rollout
    draws = math.ceil(config.fake_updates / config.reuse)  # of the fake's samples
    forwards = draws * (1 + fake_rollout) + rollout + 2 + (config.guidance != 1)
    backwards = config.fake_updates + 1
    trained = [sum(p.numel() for p in roles.parameters(r)) for r in ("generator", "fake")]
    if config.gan_weight:  # its features are a third of a forward
        looks = config.fake_updates * (2 + (config.gan_r1 > 0))
        forwards, backwards = forwards + looks / 3, backwards + 1 / 3
    if config.objective != "w2svd":
        forwards, backwards = {"finetune": 0, "lcm": 2, "regress": 28}[config.objective], 1
    names = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return task.costs(forwards, backwards, *trained, machine) | {
        "backbone_parameters": backbone,
        "generator_parameters": trained[0],
        "fake_parameters": trained[1],
        "forwards an iteration": {"without gradient": forwards, "with gradient": backwards},
        "sample_shape": list(task.shape),
        "sigmas": [round(x, 6) for x in few_step_sigmas(config.steps, config.shift).tolist()],
        "versions": {"python": sys.version.split()[0], **versions},
        "commit": commit(),
    }


def show(items, indent=""):
    """Print a dictionary, a line an item; dictionaries in it are indented."""
    for name, value in items.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
        else:
            number = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent + name:50} {number}")


def read_run(folder):
    """The Config that a run folder was made with; a folder that is not one is refused."""
    with reading(f"{folder} is not a run folder of this version", KeyError, TypeError):
        return Config(**json.loads((Path(folder) / "config.json").read_text())["config"])


def save_generator(path, config, state, base_sum):
    """The average in float32 under diffusers' names; the header has all that sampling needs."""
    names = "model data checkpoint objective alpha_weak alpha_strong guidance".split()
    info = {name: getattr(config, name) for name in (*names, "embedded_guidance", "seed")}
    steps, shift, flow = sampling(config)
    info |= {"kind": config.generator, "rank": config.lora_rank, "lora_alpha": config.lora_rank}
    info |= {"sigmas": few_step_sigmas(steps, shift).tolist(), "steps": steps, "shift": shift}
    info |= {"euler": flow, "step": state.iteration, "base_sum": base_sum}
    prefix = "transformer." if config.generator == "lora" else ""
    write_by_first(path, {prefix + name: x for name, x in state.average.items()}, info)


def base_sum(roles):
    """The sum over about eight frozen tensors, to show that they did not move."""
    frozen = [p for p in roles.backbone.module.parameters() if not p.requires_grad]
    return sum(float(in_one_piece(p).double().sum()) for p in frozen[:: max(1, len(frozen) // 8)])


def pack(state):
    """All of a State as one flat {name: tensor}, for a checkpoint."""
    flat = {f"average/{name}": x for name, x in state.average.items()}
    streams = {f"rng/{state.rank}/{name}": rng.get_state() for name, rng in state.rngs.items()}
    flat |= {name: x for one in of_all_ranks(streams) for name, x in one.items()}
    for role, optimizer in state.optimizers.items():
        for name, parameter in state.roles.state(role).items():
            flat[f"{role}/{name}"] = parameter
            for slot, x in optimizer.state[parameter].items():
                flat[f"optimizer/{role}/{name}/{slot}"] = x
    return flat


@torch.no_grad()
def unpack(state, flat, iteration, taken):
    """Put the tensors of pack(), and the counts, into a State."""
    state.iteration, state.taken = iteration, taken
    for name, x in state.average.items():
        x.copy_(split_as(flat[f"average/{name}"], x))
    for name, rng in state.rngs.items():
        shared = name == "exit" and state.config.generator_input == "rollout"
        seen = flat.get(f"rng/{0 if shared else state.rank}/{name}")
        if seen is None:  # there were fewer processes
            seen = rng.manual_seed(rng.initial_seed() + 1009 * iteration).get_state()
        rng.set_state(seen)
    for role, optimizer in state.optimizers.items():
        for name, parameter in state.roles.state(role).items():
            parameter.copy_(split_as(flat[f"{role}/{name}"], parameter))
            slots = {n: f"optimizer/{role}/{name}/{n}" for n in ("step", "exp_avg", "exp_avg_sq")}
            slots = {n: flat[key] for n, key in slots.items() if key in flat}  # none before its use
            optimizer.state[parameter] = {n: split_as(x, parameter) for n, x in slots.items()}


def save(folder, config, state, base_sum, clips):
    """Write the generator, and a checkpoint to resume from, of which the newest two stay."""
    step = f"{state.iteration:06}.safetensors"
    save_generator(folder / f"generator-{step}", config, state, base_sum)
    info = {"iteration": state.iteration, "taken": state.taken, "base_sum": base_sum}
    info |= {"clips_an_update": config.accumulate * state.ranks}
    info |= {"rates": {n: getattr(config, n) for n in ("generator_lr", "fake_lr")}, "clips": clips}
    info |= {"metrics_bytes": (folder / "metrics.jsonl").stat().st_size}
    write_by_first(folder / f"checkpoint-{step}", pack(state), info)
    if RANK:
        return
    for kind in ("checkpoint", "generator") if config.generator == "full" else ("checkpoint",):
        for path in sorted(folder.glob(f"{kind}-*"))[:-2]:
            path.unlink()


def restore(folder, state, base_sum, clips):
    """Put the newest checkpoint that can be read into `state`; its header, or {} without any."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            tensors, info = read_safetensors(path)
        except Refused as damage:
            print(f"w2svd: {damage} The one before it, or the beginning, is used.", file=sys.stderr)
            continue
        # close, not equal: another kind of GPU adds up in another order
        if not math.isclose(info["base_sum"], base_sum, rel_tol=1e-9):
            raise Refused(f"{path} was made from another backbone; see --checkpoint or --cache.")
        if info["iteration"] > state.config.iterations:
            raise Refused(f"{path} was saved later: --iterations cannot be less.")
        unpack(state, tensors, info["iteration"], info["taken"])
        print(f"{path.name}: it goes on from iteration {state.iteration}")
        then, now = info.get("clips_an_update"), state.config.accumulate * state.ranks
        if then not in (None, now):
            print(f"w2svd: an update read {then} clips, now {now}; see --help, the machine.")
        gone, new = set(info["clips"]) - set(clips), set(clips) - set(info["clips"])
        if info["clips"] != clips:
            print(f"w2svd: the data have changed: {len(gone)} clips gone, {len(new)} new.")
        return info
    print(f"w2svd: there is no checkpoint in {folder}: from the beginning.", file=sys.stderr)
    return {}


@contextmanager
def signals():
    """A list that holds SIGTERM or SIGINT once it came; the second one ends the process at once."""
    stop = []

    def note(number, _):
        if stop and RANKS == 1:  # torchrun may send a second one
            os._exit(128 + number)
        stop.append(number)

    with ExitStack() as at_the_end:  # the handlers before come back
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, note)
            at_the_end.callback(signal.signal, number, before)
        yield stop


def card_tflops():
    """What a large product of bf16 matrices reaches here, in TFLOP/s: the most to hope for."""
    from torch.utils.benchmark import Timer

    n = 8192 if DEVICE == "cuda" else 512
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.timeit(500 if DEVICE == "cuda" else 20).mean / 1e12


def measured(iterations, state, pflop=None):
    """Each iteration's numbers as floats, the ranks' means, with ratios, its time and its speed.

    Refused, with what was read, if one is not finite.
    """
    card, tick = card_tflops() if pflop else None, time.perf_counter()
    try:
        for stats in iterations:
            numbers = torch.tensor([float(x) for x in stats.values()], dtype=torch.float64)
            line = dict(zip(stats, mean_over_ranks(numbers).tolist()))
            # the data of captions alone are 0
            known = [n for n in ("std", "motion") if f"gen_{n}" in line and line[f"data_{n}"]]
            line |= {f"{n}_ratio": line[f"gen_{n}"] / line[f"data_{n}"] for n in known}
            seconds, left = time.perf_counter() - tick, state.config.iterations - state.iteration
            line |= {"seconds": seconds, "hours_left": seconds * left / 3600}
            line["memory_mb"] = memory_mb(state.device)
            if pflop:
                tflops = 1e3 * pflop / seconds
                line |= {"tflops": tflops, "share_of_card": tflops / card}
            yield line
            tick = time.perf_counter()
    except FloatingPointError as error:
        clips = [f"{clip} at {s.min():.4f} to {s.max():.4f}" for clip, s in state.reads]
        where = f"in iteration {state.iteration + 1}: {error}"
        where += f"; it read {', '.join(clips)}" if clips else ""
        cure = "take lower rates, or leave out that clip, and go on with --resume, or anew"
        raise Refused(f"Stopped {where}; {cure}.") from error


def check_machine(machine, numbers, dry_run):
    """Refuse a run that does not fit into the GPU here, or into as many GiB as were named."""
    if machine.gpus != RANKS and not dry_run:
        raise Refused(f"--gpus {machine.gpus} needs --dry-run, or torchrun to start so many.")
    need, room = numbers.get("in all, GiB", 0.0), machine.room()
    if need > room > 0:
        cure = "fewer --frames, a smaller --height, --width, --lora-rank; --checkpointing"
        cure += " and --offload; on one GPU --fp8-base; or more --gpus, --context-parallel"
        raise Refused(f"{need:.1f} GiB do not fit into {room:.1f}; less need {cure}.", status=1)


def prefer_cudnn():
    """Inside, also in backward, cuDNN's attention is first on Hopper: the fastest (published)."""
    if DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def trained_roles(config, task, split, context=1):
    """The roles of a run, ready for optimizers."""
    torch.manual_seed(config.seed)
    alphas = config.alpha_weak, config.alpha_strong
    roles = Roles(task.backbone, config.lora_rank, *alphas, config.generator, config.fake)
    if config.gan_weight:
        Discriminator(roles, config.gan_r1)
    if config.checkpointing:
        roles.use_checkpointing()
    task.prepare()
    if context > 1:
        group, _ = torch.distributed.new_subgroups(context)
        for backbone in (roles.backbone, *roles.copies.values()):
            backbone.share_tokens(group)
    if split:
        split_over_ranks(roles)
    return roles


def open_log(folder, config, before):
    """metrics.jsonl, cut back to where the checkpoint was made; other rates are a line in it."""
    if RANK:
        return open(os.devnull, "a")
    log = open(folder / "metrics.jsonl", "a")
    log.truncate(min(before.get("metrics_bytes", 0), os.path.getsize(log.name)))
    rates = {n: [then, getattr(config, n)] for n, then in before.get("rates", {}).items()}
    changed = {name: pair for name, pair in rates.items() if pair[0] != pair[1]}
    if changed and before["iteration"] < config.iterations:
        print(json.dumps({"step": before["iteration"], "changed": changed}), file=log, flush=True)
    return log


def train(config, machine=MACHINE, resume=False, dry_run=False):  # noqa: C901
    """Distil: the whole run, from the backbone to result.json."""
    from tqdm import tqdm

    started, folder = time.perf_counter(), Path(config.out)
    context, split = machine.context_parallel, machine.parts(config) > 1
    task = load_task(config)
    numbers = plan(config, task, machine)
    show({"plan": numbers, "config": vars(config), "machine": vars(machine)})
    check_machine(machine, numbers, dry_run)
    if dry_run:
        return
    task.load(split, numbers.get("blocks that keep attention's results"), machine.offload)
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        for half in (*folder.rglob(".tmp*"), *folder.rglob(".part-*")):
            half.unlink()  # of a save that was killed
    roles = trained_roles(config, task, split, context)
    state, base = StateOfRanks(config, roles, task.device, context), base_sum(roles)
    clips = [clip.name for clip in task.clips]
    before = restore(folder, state, base, clips) if resume else {}
    check_ranks(config, state)
    if RANK == 0:
        write_json(folder / "config.json", {"config": dataclasses.asdict(config), "plan": numbers})
    log = open_log(folder, config, before)

    def picture():
        if RANK == 0 or split or context > 1:  # all take part in a forward that is split
            with state.averaged() as generator:
                task.on_log(state.iteration, generator)

    def due(every):
        return state.iteration == config.iterations or state.iteration % every == 0

    picture()  # of the beginning; after a resume the checkpoint's, which may be missing
    data = task.batches(state.rngs["data"], state.taken, state.rank, state.ranks)
    bar = tqdm(total=config.iterations, initial=state.iteration, desc="distil", unit="it")
    with log, bar, prefer_cudnn(), signals() as stop:
        loop = distil if config.objective == "w2svd" else without_fake
        iterations = loop(config, roles, state, data)
        for line in measured(iterations, state, numbers.get("PFLOP an iteration")):
            bar.set_postfix(dict(itertools.islice(line.items(), 2)), refresh=False)
            bar.update()
            stopped = max(of_all_ranks(stop[0] if stop else 0))
            if due(config.log_every):
                print(json.dumps({"step": state.iteration, **line}), file=log, flush=True)
            if due(config.save_every) or stopped or state.iteration < 3:
                check_ranks(config, state)
            if due(config.save_every) or stopped:
                save(folder, config, state, base, clips)
            if due(config.log_every) or due(config.save_every):
                picture()  # last, as it may fail
            if stopped:
                of_all_ranks(None)  # torchrun would end a process that still writes
                raise KeyboardInterrupt(stopped)
    if base_sum(roles) != base:
        raise RuntimeError("the frozen backbone moved; a bug, since nothing may train it")
    save_generator(folder / "generator.safetensors", config, state, base)
    if RANK:
        return
    with state.averaged() as generator:
        run = SimpleNamespace(folder=folder, config=config, generator=generator)
        result, table = task.finish(run)
    result |= {"seconds": time.perf_counter() - started, "peak_rss_mb": memory_mb("cpu")}
    write_json(folder / "result.json", result | {"seed": config.seed})
    print(table)


# ---- 10. Sample, export, command line ------------------------------------------------------------
def read_generator(run, at=None):
    """The tensors and the header of a run's generator: the newest, or that of iteration `at`."""
    saved = sorted(Path(run).glob(f"generator-{6 * '[0-9]'}.safetensors"))
    newest = [Path(run) / "generator.safetensors", *saved][-1]
    path = newest if at is None else newest.with_name(f"generator-{at:06}.safetensors")
    if not path.exists():
        steps = ", ".join(str(int(one.stem[-6:])) for one in saved) or "none"
        raise Refused(f"There is no {path}; saved iterations, for --at: {steps}.")
    return read_safetensors(path)


def sample(run, out, seed, at=None, **given):
    """Draw samples of a run's generator, with the grid of its header, into `out`."""
    config, out = read_run(run), Path(out)
    for name, x in given.items():
        if (name == "n") != (config.model == "toy"):  # all others are hunyuan's
            raise Refused(f"{flag(name)} does not fit {run}, a run of --model {config.model}.")
        if x != getattr(config, name, x):
            print(f"{flag(name)} {x}: {run} was trained with {getattr(config, name)}")
    config = dataclasses.replace(config, **{n: given.pop(n) for n in SIZES if n in given})
    asked = {"seed": seed, "steps": given.get("steps", config.steps), "gt_weight": 0.0}
    check(dataclasses.replace(config, **asked))  # a --gt-weight would refuse --steps 1
    out.parent.mkdir(parents=True, exist_ok=True)
    print(load_task(config).sample(*read_generator(run, at), out, seed, **given))


CARD = """---
base_model: {checkpoint}
license: other
tags: [step-distillation, w2svd]
---
# HunyuanVideo in {steps} steps, by w2svd (W2SVD, arXiv 2503.13319)

Objective: {objective}; generator: {kind}, fake: {fake}, adapters of rank {rank}, alpha_weak
{alpha_weak}; {step} updates, seed {seed}. The base model's licence goes for these weights.

"""
DIFFUSERS = """For diffusers alone: other programs apply none of it, silently.
{warning}

    import torch
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from diffusers.utils import export_to_video, load_image
    pipe = DiffusionPipeline.from_pretrained("{checkpoint}", dtype=torch.bfloat16)
    {load}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("this folder/scheduler")
    pipe.to("cuda").vae.enable_tiling()
    torch.manual_seed(0)  # the renoising draws from torch's global generator
    size = dict(height={height}, width={width})
    video = pipe(prompt="a woman talks", num_inference_steps={steps}, num_frames={frames}, **size,
                 {image}guidance_scale={embedded_guidance},
                 generator=torch.Generator().manual_seed(0)).frames[0]
    export_to_video(video, "talk.mp4", fps={fps:g})
"""
SECOND = 'A second LoRA switches this one off, until `pipe.set_adapters(["w2svd", "other"])`.'
ROUNDED = "In bfloat16 it is off by {:.1%} of what was learnt; exported and read as float32 by 0."
LORA = 'pipe.load_lora_weights("this folder", "w2svd")'
MERGED = 'pipe.transformer = pipe.transformer.from_pretrained("this folder", dtype=torch.bfloat16)'
IMAGE = 'image=pipe.video_processor.resize(load_image("a.png"), **size, resize_mode="crop"), '
COMFYUI = """For ComfyUI, kijai's wrapper, and musubi-tuner after its `convert_lora.py --target
default`; not for diffusers, which refuses it. Image-to-video was not tried there.

In ComfyUI: LoraLoaderModelOnly at strength 1; ModelSamplingSD3, shift {shift:g}, that feeds
BasicScheduler (simple, {steps} steps), or ManualSigmas {sigmas}; KSamplerSelect lcm; FluxGuidance
{embedded_guidance:g}; BasicGuider; SamplerCustomAdvanced. What spoils the video without a word: a
BasicScheduler on the loader itself, FluxGuidance's 3.5, the sampler euler, KSampler's cfg of 8.
"""
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


def to_comfyui(tensors):
    """The adapter under the original names. Fused layers: A stacked, B block-diagonal, exact."""
    converted = {}
    for kind, i in sorted({tuple(name.split(".")[1:3]) for name in tensors}):
        theirs = "single_blocks" if kind.startswith("single") else "double_blocks"
        for layer, parts in (SINGLE if kind.startswith("single") else DOUBLE).items():
            names = [f"transformer.{kind}.{i}.{part}" for part in parts]
            A, B = ([tensors[f"{name}.lora_{x}.weight"] for name in names] for x in "AB")
            layer, A = f"diffusion_model.{theirs}.{i}.{layer}", torch.cat(A)
            converted[f"{layer}.lora_A.weight"] = A
            converted[f"{layer}.lora_B.weight"] = torch.block_diag(*B)
            # alpha is the stacked rank: strength 1; without it some readers apply a third
            converted[f"{layer}.alpha"] = torch.tensor(float(len(A)))
    return converted


@torch.no_grad()
def merge(module, tensors):
    """Put the generator into the module, W + B A in float32; the share that bf16 would lose."""
    weights, lost, learnt = dict(module.named_parameters()), 0.0, 0.0
    for name, x in tensors.items():
        if "lora_A" in name:
            x = tensors[name.replace("lora_A", "lora_B")] @ x  # alpha equals the rank
            name = name.removeprefix("transformer.").replace("lora_A.", "")
            x += weights[name]
        if "lora_B" not in name:  # B went in with its A
            lost += float((x.bfloat16() - x).square().sum())
            learnt += float((x - weights[name]).square().sum())
            weights[name].copy_(x)
    return math.sqrt(lost / learnt) if learnt else 0.0


def export(run, format, out, at=None, checkpoint="", dtype="float32"):
    """Write a run's generator for diffusers, ComfyUI or as a whole transformer, with a card."""
    config, (tensors, info), out = read_run(run), read_generator(run, at), Path(out)
    config = dataclasses.replace(config, checkpoint=checkpoint or config.checkpoint)
    if config.model != "hunyuan":
        raise Refused(f"Only runs of --model hunyuan are exported, not of {config.model}.")
    if (info["kind"] == "full" and format != "merged") or (info["euler"] and format == "comfyui"):
        raise Refused("Trained in full, or as a stage before: --format merged, for diffusers.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is in use: name a new folder as --out.")
    task, dtype = load_task(config), getattr(torch, dtype)
    said = {"load": LORA, "warning": SECOND, "image": IMAGE if task.form else ""}
    out.mkdir(parents=True, exist_ok=True)
    if format == "merged":
        pipe = load_pipeline(config.checkpoint, (*TEXT, "vae"), torch.float32, "cpu")
        said |= {"load": MERGED, "warning": ROUNDED.format(merge(pipe.transformer, tensors))}
        print(said["warning"])
        pipe.transformer.to(dtype).save_pretrained(out)
    else:
        tensors = {n: x.to(dtype) for n, x in tensors.items()}
    if format == "comfyui":
        write_safetensors(out / "w2svd_comfyui.safetensors", to_comfyui(tensors), info)
    elif format == "diffusers":
        lora = {"transformer.r": info["rank"], "transformer.lora_alpha": info["lora_alpha"]}
        lora = json.dumps(lora | {"transformer.target_modules": task.backbone.lora_targets})
        path = out / "pytorch_lora_weights.safetensors"
        write_safetensors(path, tensors, info, lora_adapter_metadata=lora)
    if format != "comfyui":
        from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

        scheduler = Scheduler(shift=info["shift"], stochastic_sampling=not info["euler"])
        scheduler.save_pretrained(out / "scheduler")
    said |= dataclasses.asdict(config) | info | {"checkpoint": config.checkpoint}
    said |= {"sigmas": ", ".join(f"{x:.6g}" for x in info["sigmas"])}
    card = CARD + (COMFYUI if format == "comfyui" else DIFFUSERS)
    (out / "README.md").write_text(card.format(**said), encoding="utf-8")
    print(f"wrote {out} ({format})")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help.")


def add_settings(command, settings, names=()):
    """A flag for each line of Config or Machine, or for those named, under its heading."""
    forms = {t: {"type": t, "metavar": t.__name__[0].upper()} for t in (int, float, str)}
    forms[bool] = {"action": argparse.BooleanOptionalAction}
    for field in dataclasses.fields(settings):
        name, default = field.name, field.default
        if field.metadata["group"]:
            group = command.add_argument_group(field.metadata["group"])
        values = [f"{preset}: {p[name]}" for preset, p in PRESETS.items() if name in p]
        values = [str(default)] * (default != "") + values
        text = field.metadata["text"] + (f" [{'; '.join(values)}]" if values else "")
        if not names or name in names:
            how = forms.get(field.type) or {"choices": get_args(field.type)}
            group.add_argument(flag(name), help=text.replace("%", "%%"), **how)


def parse(argv):
    """What was given, a dictionary, by the flags of the four commands; the rest is absent."""
    top = Parser(prog="w2svd.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    how |= {"usage": "%(prog)s [--flag VALUE ...]"}
    trains = commands.add_parser("train", help="distil a backbone", **how)
    trains.add_argument("--resume", action="store_true", help="go on in --out, with its settings")
    trains.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    add_settings(trains, Config)
    add_settings(trains, Machine)
    encodes = commands.add_parser("encode", help="clips into latents and text, once", **how)
    encodes.add_argument("--model", choices=("hunyuan",), default="hunyuan", help="its clips")
    add_settings(encodes, Config, "data checkpoint height width frames fps cache".split())
    samples = commands.add_parser("sample", help="sample a run", **how)
    exports = commands.add_parser("export", help="a HunyuanVideo run for other programs", **how)
    for one in (samples, exports):
        one.add_argument("--run", required=True, help="a run folder, as runs/mine")
        one.add_argument("--out", required=True, help="sample: a file; export: a new folder")
        one.add_argument("--at", type=int, help="the generator of that iteration [the newest]")
        one.add_argument("--checkpoint", help="hunyuan: where the backbone lies now [as trained]")
    samples.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    samples.add_argument("--n", type=int, help="toy: number of samples [1000]")
    samples.add_argument("--prompt", help="hunyuan: what to show")
    samples.add_argument("--image", help="hunyuan, image-to-video: the first frame")
    samples.add_argument("--negative-prompt", help="hunyuan: what to avoid, at twice the time")
    samples.add_argument("--cfg", type=float, help="hunyuan: weight of the negative prompt [2]")
    for name in ("height", "width", "frames", "steps"):
        samples.add_argument(f"--{name}", type=int, help="hunyuan: [as trained]")
    exports.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="[float32]")
    formats = ("diffusers", "comfyui", "merged")
    exports.add_argument("--format", required=True, choices=formats, help="merged: all weights")
    given, unknown = top.parse_known_args(argv)
    if unknown:
        raise Refused(f"There is no {unknown[0]}; see w2svd.py {given.command} --help.")
    return vars(given)


def absolute(model, given):
    """What was given with whole paths, so that a run can be resumed from elsewhere."""
    names = ("checkpoint", "cache", "sample_prompts", *["data"] * (model != "toy"))
    paths = {name: Path(given[name]) for name in names if given.get(name)}
    return given | {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


def resumed(given):
    """The run's own Config with the given changes."""
    if not given.get("out"):
        raise Refused("--resume needs the run's folder as --out.")
    base = read_run(given["out"])
    given = absolute(base.model, given)
    may = set(RESUMABLE.split())
    if base.model == "toy":
        may -= {"data"}  # another mixture, not a moved folder
    if {base.alpha_weak_schedule, base.lr_schedule} != {"constant"}:
        may -= {"iterations"}  # a schedule depends on them
    fixed = [n for n in sorted(given.keys() - may) if given[n] != getattr(base, n)]
    if fixed:
        was = ", ".join(f"{flag(n)} {getattr(base, n)}" for n in fixed)
        raise Refused(f"{given['out']} was made with {was}, which --resume cannot change.")
    return dataclasses.replace(base, **given)


def resolve(given):
    """A whole Config: defaults, the model's preset, the given settings, a free run folder."""
    model = given.get("model", Config.model)
    given = absolute(model, given)
    data = given.get("data", PRESETS[model].get("data", ""))
    kind = f"{model} captions" if data.endswith(".txt") else f"{model} {data}"
    preset = PRESETS[model] | PRESETS.get(kind, {})
    preset |= PRESETS.get(f"{kind} {given.get('objective')}", {})
    if given.get("fake") == "full":  # real is the plain backbone; a decay would pull weights to 0
        preset |= {"alpha_weak": 0.0, "fake_weight_decay": 0.0}
    if given.get("generator_input") == "paired":  # its last exit nearly shows x0: learn from all
        preset |= {"fake_samples": "all"}
    config = Config(**preset | given)
    out, k = config.out or f"runs/{model}", 2
    while Path(out).is_file() or any(Path(out).glob("[!.]*")):
        if config.out:
            raise Refused(f"{out} is in use: name another --out, or, if it is a run, --resume.")
        out, k = f"runs/{model}-{k}", k + 1
    return dataclasses.replace(config, out=out)


def main(argv=None):
    """Run a command; 0, or another status after a sentence about what failed."""
    from safetensors import SafetensorError

    status, again = 2, "--resume --out goes on with a run; where none is yet, repeat the command."
    try:
        given = parse(argv)
        command = given.pop("command")
        how = {name: given.pop(name) for name in ("resume", "dry_run") if name in given}
        machine = Machine(**{name: given.pop(name) for name in vars(MACHINE) if name in given})
        if command in ("sample", "export"):
            (sample if command == "sample" else export)(**given)
            return 0
        join_ranks()
        config = (resumed if how.get("resume") else resolve)(given) if RANK == 0 else None
        config = of_all_ranks(config)[0]  # the first, for which alone a new folder is free
        check(config, machine)
        if command == "train":
            train(config, machine, **how)
        else:
            encoded_clips(config, load_task(config).form)
        return 0
    except Refused as error:
        reason, status = error, error.status
    except torch.OutOfMemoryError:
        reason = "out of GPU memory; give a smaller --gpu-memory, or see the plan of --dry-run."
    except ImportError as error:
        reason = f"{error}: pip install -r requirements.txt; the toy needs toy/ beside this file."
    except (OSError, SafetensorError) as error:  # no space left, a folder that went away
        reason = (str(error) or repr(error)).splitlines()[0]
        reason += f"; what was written before is whole: {again}"
    except KeyboardInterrupt as stop:
        reason = f"stopped; {again}"
        status = 128 + (stop.args or [signal.SIGINT])[0]
    print(f"w2svd: {reason}", file=sys.stderr, flush=True)
    if RANKS > 1:  # torchrun ends the others, for whom a clean end would wait
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.modules["w2svd"] = sys.modules["__main__"]  # for toy/ to import, also from a renamed copy
    sys.exit(main())
