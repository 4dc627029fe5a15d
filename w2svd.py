"""W2SVD, weak-to-strong video distillation (MagicDistillation, arXiv 2503.13319), in one file.

A video diffusion transformer (DiT) needs about 28 evaluations for a video. This file turns it into
a GENERATOR that needs 4, or 1: from noise it predicts a clean video, which is noised again to the
next lower of 4 levels (the grid), and so on. Distribution matching distillation (DMD) moves the
generator's samples along the difference of two scores: that of the data, known by a REAL DiT, and
that of the generator's own samples, learnt on the way by a FAKE DiT. Both scores are read at noised
samples, where the two densities overlap. W2SVD makes the two DiTs out of one frozen backbone that
carries one LoRA (a small trained term: W + alpha B A in place of a linear layer's W), weakly in the
real DiT and strongly in the fake one, so that the real one leans a little towards the samples that
it has to judge; the generator is a second LoRA (ours), so one backbone serves all three.

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
    python w2svd.py export --run runs/mine --out lora/

Where a setting comes from: 'paper' read off the authors' figures; 'author-code' related public
code of the first author, not a release of this paper; 'peer' common in public code of the family;
'ours'. The paper's body, and so its learning rates, rank and batch, were not available to us.

Deviations from the paper, as far as we know it: the generator is an adapter by default; off by
default are the GT loss, which trades motion for picture quality in the paper's table, and the
discriminator, which reads the frozen backbone; a first image is read where the checkpoint is
image-to-video; alpha_strong (not printed there), denominators, average and optimizer are peers',
the author's later code's or ours; the toy's preset trains from rollouts, its fake on final samples
alone and with a decay. On our ring the weak shift was a re-weighting: beside a GT loss nearly its
weight over 1 - alpha_weak, alone nothing resolved; on paired clips it was farther (toy/study).
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal, get_args

# "NOTE silent" marks lines whose loss no error would reveal. Without this one, which torch reads
# when it is imported, a run at 544p loses 9 GiB to fragments
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch.utils import checkpoint as checkpointing

# ---- 1. Config -----------------------------------------------------------------------------------


class Refused(Exception):
    """What the user asked for cannot be done: one sentence with the cure, and an exit status."""

    def __init__(self, sentence, status=2):
        super().__init__(sentence)
        self.status = status


# Named methods, as rows of settings on top of a preset; others: python -m toy.baselines --help
#   W2SVD (paper)                          --alpha-weak .25, the default
#   W2SVD with reg. loss (paper)           --gt-weight .05 (author-code) --generator-input paired
#   DMD with a LoRA fake (peer)            --alpha-weak 0
#   with a discriminator (paper)           --gan-weight .003 (peer: .003 to .03)
#   DMD2 (peer; its discriminator: ours)   --fake full --generator full --gan-weight .003
#                                          --generator-input rollout
#   DMDR's schedule (peer)                 --alpha-weak .75 --alpha-weak-schedule cosine
Input = Literal["paired", "rollout"]
Schedule = Literal["constant", "cosine"]


def setting(default, text):
    """A line of Config: its default, and its meaning / where it comes from."""
    return dataclasses.field(default=default, metadata={"text": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line and its help are made from these lines."""

    # model and data
    model: str = setting("toy", "what to distil / ours")
    data: str = setting("", "a mixture; or a folder of clips, or a .txt / ours")
    checkpoint: str = setting("", "hub id, or a folder in diffusers' format / ours")
    height: int = setting(480, "of a clip in pixels, a multiple of 16 / ours")
    width: int = setting(832, "of a clip in pixels, a multiple of 16 / ours")
    frames: int = setting(61, "of a clip, 4k + 1: 61 or 129 / ours")
    fps: float = setting(24.0, "clips are resampled to it / paper")
    cache: str = setting("", "where latents or the toy's backbones are kept / ours")

    # the generator
    steps: int = setting(4, "evaluations of the finished generator / paper: 4, 1")
    shift: float = setting(5.0, "of the grid: 1, .9375, .8333, .625 / author-code")
    generator: Literal["lora", "full"] = setting("lora", "full: a copy / ours, author-code")
    generator_input: Input = setting("paired", "noised real sample, or from noise / paper, peer")
    ema: float = setting(0.995, "decay of the generator's average; 0 is off / ours")

    # real and fake
    fake: Literal["lora", "full"] = setting("lora", "full: a copy, real = backbone / paper, peer")
    alpha_weak: float = setting(0.25, "fake adapter's weight in the real DiT; 0: DMD / paper")
    alpha_weak_schedule: Schedule = setting("constant", "to 0 at half of the run / peer: DMDR")
    alpha_strong: float = setting(1.0, "its weight in the fake DiT / author-code")
    fake_samples: Literal["all", "final"] = setting(
        "all", "the fake learns any exit, or the last / ours"
    )
    fake_updates: int = setting(5, "for each update of the generator / author-code")
    reuse: int = setting(1, "fake updates that share the generator's samples / ours")
    fake_warmup: int = setting(0, "fake updates before the generator's first one / ours")
    fake_weight_decay: float = setting(0.0, "pulls its adapter to 0 / ours")

    # losses
    gt_weight: float = setting(0.0, "sharper, but less motion; .05 / paper, author-code")
    gan_weight: float = setting(0.0, "of the discriminator; .003 to .03 / paper, peer")
    guidance: float = setting(1.0, "of the real DiT; 1 is off, elsewhere 0 / peer")
    embedded_guidance: float = setting(6.0, "a guidance-distilled model's / peer")
    sigma_low: float = setting(0.02, "losses read U[low, high], shifted / author-code")
    sigma_high: float = setting(0.98, "see --sigma-low / author-code")
    sigma_shift: float = setting(1.0, "raise for more noise, global shape / author-code")

    # training
    lora_rank: int = setting(64, "of both adapters; their alpha is the rank / ours")
    lora_targets: Literal["all", "single"] = setting("all", "single: late ones / author-code")
    generator_lr: float = setting(2e-5, "lower it if samples drift or collapse / ours")
    fake_lr: float = setting(2e-5, "raise it if the relative gap grows / ours")
    lr_schedule: Literal["constant", "linear"] = setting("constant", "linear: to 5 % / ours")
    batch: int = setting(1, "samples in a forward; captions of one length / ours")
    accumulate: int = setting(1, "forwards in an update, one at a time / ours")
    iterations: int = setting(1000, "updates of the generator / peer: 600 to 1000")
    seed: int = setting(0, "the same seed, the same bits on the same machine / ours")

    # memory and speed
    checkpointing: bool = setting(False, "recompute blocks: a third slower / peer")
    fp8_base: bool = setting(False, "the backbone in 8 bits: 8 GiB less at 13B / ours")
    compile: bool = setting(False, "compile every block / peer")

    # the run
    out: str = setting("", "run folder; the next free runs/<model>-k if empty / ours")
    log_every: int = setting(50, "iterations between lines of metrics.jsonl / ours")
    save_every: int = setting(250, "iterations between checkpoints / ours")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run takes place. It is not stored with the run: with --resume give it again."""

    gpu_memory: float = setting(0.0, "GiB to plan for; 0: of the one here / ours")
    shard: bool = setting(False, "split the backbone over a node's GPUs / ours")
    offload: bool = setting(False, "blocks and their inputs wait in host memory / ours")
    cudnn: bool = setting(True, "its attention first, on Hopper GPUs / ours")


MAY_BE_0 = {"alpha_weak", "ema", "gt_weight", "gan_weight", "guidance", "embedded_guidance", "seed"}
MAY_BE_0 |= {"sigma_low", "fake_warmup", "fake_weight_decay", "gpu_memory"}
# what --resume may change
RESUMABLE = {"out", "data", "checkpoint", "cache", "iterations", "log_every", "save_every"}
RESUMABLE |= {"checkpointing", "compile", "generator_lr", "fake_lr"}


def flag(name):
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def check(c: Config, machine=Machine()):
    """Refuse settings that contradict each other, with the reason."""

    def refuse_if(holds, sentence):
        if holds:
            raise Refused(sentence)

    for name, value in {**vars(c), **vars(machine)}.items():
        if type(value) in (int, float):
            fits = 0 < value < 2**53 or (value == 0 and name in MAY_BE_0)  # False for nan
            bound = "at least" if name in MAY_BE_0 else "above"
            refuse_if(not fits, f"{flag(name)} must be {bound} 0, below 2**53.")
    paired, captions = c.generator_input == "paired", c.data.endswith(".txt")
    no_adapter = c.fake == "full" and (c.alpha_weak > 0 or c.fake_weight_decay > 0)
    refuse_if(no_adapter, "--fake full has no adapter: --alpha-weak 0 --fake-weight-decay 0.")
    refuse_if(c.alpha_weak > c.alpha_strong, "--alpha-weak must be at most --alpha-strong.")
    no_rollout = paired and c.fake_samples == "final"
    refuse_if(no_rollout, "--fake-samples final needs --generator-input rollout.")
    no_clips = captions and (paired or c.gan_weight)
    refuse_if(no_clips, "A .txt has no clips: --generator-input rollout, --gan-weight 0.")
    blind = c.gt_weight and (not paired or c.steps == 1)  # one step sees pure noise
    refuse_if(blind, "--gt-weight needs --generator-input paired and --steps above 1.")
    refuse_if(not c.sigma_low < c.sigma_high <= 1, "--sigma-low < --sigma-high <= 1 must hold.")
    refuse_if(c.ema >= 1, "--ema must be below 1; 0 is off.")
    if c.model != "toy":
        odd = c.height % 16 or c.width % 16 or c.frames % 4 != 1 or c.frames < 5
        refuse_if(odd, "--height, --width must be multiples of 16, --frames 4 k + 1, as 61 or 129.")
    clash = c.fp8_base and (c.compile or machine.shard)
    refuse_if(clash, "--fp8-base works without --compile and --shard.")
    twice = machine.offload and machine.shard
    refuse_if(twice, "--offload keeps the backbone in host memory, --shard on GPUs: give one.")


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
    # not clamped (shift 5 gives .093 to .996); peers draw U[0, 1], shift, then clamp
    u = torch.rand(n, generator=rng, device=rng.device)
    return shift_sigma(low + (high - low) * u, shift)


# ---- 3. One backbone, three roles ----------------------------------------------------------------
class Roles:
    """Generator, real and fake DiT out of one frozen backbone; each a velocity(x_t, sigma, cond).

    W_generator = W + B_g A_g,  W_fake = W + alpha_strong B A,  W_real = W + alpha_weak B A.
    `backbone` has .module, .velocity(x_t, sigma, cond), .lora_targets (a regular expression),
    .checkpoint_with(function) and, for a discriminator, .features(x_t, sigma, cond) of .width;
    cond None is unconditional. A role trained in 'full' owns a copy of the backbone, whose velocity
    must run its .module; with a full fake the real DiT is the plain one. `alpha_weak` may change.
    """

    def __init__(self, backbone, rank, alpha_weak, alpha_strong, generator="lora", fake="lora"):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.backbone = backbone
        self.alpha_weak = alpha_weak
        self.alpha_strong = alpha_strong
        self.offload = False  # see use_checkpointing
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
        self.trained = {role: self._parameters_of(role) for role in kinds}
        for role in self.adapters:
            for parameter in self.trained[role].values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._switch(None, 0.0)

    def _parameters_of(self, role):
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

    def checkpoint(self, block, *args):
        """block(*args), recomputed in backward; what is kept for it may wait in host memory."""
        role, alpha = self.role, self.alpha

        def as_now(*args):
            # NOTE silent: without it recomputation sees the role of the backward: wrong gradients
            with self.use(role, alpha):
                return block(*args)

        kept = torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()
        with kept:  # blocks draw no random numbers: no state of theirs to keep
            return checkpointing.checkpoint(
                as_now, *args, use_reentrant=False, preserve_rng_state=False
            )

    def use_checkpointing(self, offload=False):
        """Keep only the blocks' inputs for the backward, in every role; in host memory if asked."""
        self.offload = offload
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
        for name in [*ours, *theirs]:
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                raise Refused(f"These are no weights of this {role}: {name!r} does not fit.")
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


# ---- 4. Losses -----------------------------------------------------------------------------------
def at_least_float32(x):
    """x in float32, or better: bf16 loses the small difference of two similar predictions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_abs(x):
    """mean_i |x_i| of each sample, (B, 1, ...); the floor prevents 0 / 0, it bounds no gradient."""
    return x.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True).clamp_min(1e-6)


def dmd_gradient(x_gen, x0_real, x0_fake):
    """g = (x0_fake - x0_real) / mean_i |x_gen - x0_real|: along KL(fake || real)'s gradient.

    All (B, ...), of one noised x_gen. As x0 = (x_t + sigma^2 score) / (1 - sigma), the numerator is
    sigma^2 / (1 - sigma) times a difference of scores; the denominator makes noise levels alike.
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
    # paper: the fake denoises x_gen (figure). peer: the velocity's mean square
    # author-code: by default the loss of x0, which is this one times sigma^2 for each sample
    return torch.nn.functional.mse_loss(at_least_float32(v_fake), at_least_float32(eps - x_gen))


# ---- 5. Discriminator ----------------------------------------------------------------------------
class Discriminator:
    """Real or generated? A logit for noised samples: a trained head on the frozen backbone.

    paper: features after the last double-stream block (figure; no author's code exists). peer:
    softplus; DMD2 reads its fake. ours: no adapter is on when features are read.
    """

    def __init__(self, roles):
        width, nn = roles.backbone.width, torch.nn
        layers = nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        place = next(roles.backbone.module.parameters()).device
        self.roles = roles
        self.head = nn.Sequential(*layers).to(place)
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
def euler_sample(velocity, noise, sigmas, cond=None, rng=None):
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
    if final:
        level = len(sigmas) - 2
    x_in = few_step_sample(generator, noise, sigmas[: level + 1], cond, rngs["input"])
    return x_in, sigmas[level].expand(len(x0))


def fake_step(roles, x_gen, cond, sigma, eps):
    """One backward of the fake's loss: it learns to denoise the generator's samples x_gen.

    x_gen, eps (B, ...), without gradient, are mixed at sigma (B,). The gradients add up; the caller
    owns the optimizer. Returns {'fake_loss'}; FloatingPointError where something is not finite.
    """
    require_finite("the sample in the fake's update", x_gen, sigma)
    x_t = add_noise(x_gen, eps, sigma)
    with roles.use("fake"):  # in backward, too, for a backbone that recomputes on its own
        v = roles.fake(x_t, sigma, cond)
        require_finite("the fake's velocity", v, sigma)
        loss = fake_loss(v, x_gen, eps)
        loss.backward()
    return {"fake_loss": loss.detach()}


def discriminator_step(roles, x_gen, x0, cond, sigma, eps):
    """One backward of the discriminator's loss into its head: real x0 against generated x_gen.

    Both (B, ...), noised alike: to sigma (B,) with eps. Returns its loss and mean logits.
    """
    real = roles.discriminator.logit(add_noise(x0, eps, sigma), sigma, cond)
    generated = roles.discriminator.logit(add_noise(x_gen, eps, sigma), sigma, cond)
    require_finite("the discriminator's logit", torch.stack([real, generated], 1), sigma)
    softplus = torch.nn.functional.softplus
    loss = softplus(-real).mean() + softplus(generated).mean()
    loss.backward()
    stats = {"discriminator_loss": loss, "logit_real": real.mean(), "logit_gen": generated.mean()}
    return {name: x.detach() for name, x in stats.items()}


def unconditional(cond):
    """What guidance holds against cond: all of it but its prompt; None where it has no negative."""
    if isinstance(cond, dict) and "negative_prompt_embeds" in cond:
        return {**cond, "prompt_embeds": cond["negative_prompt_embeds"]}
    return None


def generator_step(
    roles, x_in, sigma_in, cond, sigma, eps, x0_gt=None, gt_weight=0, gan_weight=0, guidance=1
):
    """One backward of DMD's, the GT's and the discriminator's term, through one evaluation.

    x_in (B, ...) at sigma_in (B,) from paired_input or rollout_input; its sample is noised to sigma
    (B,) with eps (B, ...). x0_gt is the real sample behind x_in (paired only), weighed by
    gt_weight, a float or (B,). Gradients, numbers and errors are as in fake_step.
    """
    stats = {}
    with roles.use("generator"):
        x_gen = x0_from_velocity(x_in, roles.generator(x_in, sigma_in, cond), sigma_in)
        require_finite("the generator's sample", x_gen, sigma_in)
        with torch.no_grad():
            x_t = add_noise(x_gen, eps, sigma)
            v_fake = roles.fake(x_t, sigma, cond)
            v_real = roles.real(x_t, sigma, cond)
            if guidance != 1:
                v_real = guided(v_real, roles.real(x_t, sigma, unconditional(cond)), guidance)
            require_finite("the fake's velocity", v_fake, sigma)
            require_finite("the real DiT's velocity", v_real, sigma)
            x0_fake = x0_from_velocity(x_t, v_fake, sigma)
            x0_real = x0_from_velocity(x_t, v_real, sigma)
            g = dmd_gradient(x_gen, x0_real, x0_fake)
            if x0_gt is not None:
                g = g + expand_as(gt_weight, g) * gt_gradient(x0_fake, x0_gt)
        # peers' loss is mean(x_gen * stopgrad(g)), whose gradient at x_gen is this
        g = g / g.numel()
        if gan_weight:  # gan_loss is a mean already; so gan_weight means what it means to peers
            g_gan, stats["gan_loss"] = roles.discriminator.gradient(x_gen, cond, sigma, eps)
            g = g + gan_weight * g_gan
        require_finite("the generator's gradient", g, sigma)
        x_gen.backward(g.to(x_gen.dtype))
    gap = at_least_float32(x0_fake - x0_real).norm() / at_least_float32(x0_real).norm()
    v_fake, v_real = (at_least_float32(v).flatten(1) for v in (v_fake, v_real))
    stats["relative_gap"] = gap
    stats["cos_fake_real"] = torch.cosine_similarity(v_fake, v_real).mean()
    stats.update(moments("gen", x_gen.detach()))
    return stats


def moments(name, x):
    """Mean, std and, of videos (B, C, T, H, W), motion: to compare with the data's."""
    stats = {f"{name}_mean": x.mean(), f"{name}_std": x.std()}
    if x.ndim == 5 and x.shape[2] > 1:
        stats[f"{name}_motion"] = x.diff(dim=2).abs().mean()  # between neighbouring frames
    return stats


def mean_of(stats):
    """The mean of a list of dictionaries of numbers, over the forwards of an update."""
    return {name: sum(one[name] for one in stats) / len(stats) for name in stats[0]}


def lr_scale(config, iteration):
    """The factor of both learning rates: 1, or falling linearly to .05 at the end."""
    if config.lr_schedule == "linear":
        return 1 - 0.95 * iteration / config.iterations
    return 1.0


def ema_at(config, iteration):
    """The average's decay: it starts low, or after 100 iterations the start would weigh .61."""
    return min(config.ema, (1 + iteration) / (10 + iteration))


def alpha_weak_at(config, iteration):
    """alpha_weak of an iteration: constant, or down to 0 at half of the iterations."""
    progress = min(1.0, 2 * iteration / config.iterations)
    if config.alpha_weak_schedule == "cosine":
        return config.alpha_weak * (1 + math.cos(math.pi * progress)) / 2
    return config.alpha_weak


def rank():
    """This process's number among those that train together."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks():
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def stream_seed(*parts):
    """A seed of 63 bits, a hash of what it is for, as (seed, iteration, rank, purpose)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def average_gradients(parameters, forwards):
    """Divide the summed gradients by the forwards, and average them over the processes."""
    if ranks() == 1:
        for parameter in parameters:
            parameter.grad /= forwards
        return
    flat = torch.cat([p.grad.flatten() for p in parameters]) / (forwards * ranks())
    torch.distributed.all_reduce(flat)  # one buffer: many small ones would take most of a second
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad.copy_(part.view_as(parameter))


SPIKE = 3.0  # ours. A gradient above SPIKE times its usual norm is scaled down to that bound


def usual_norm(optimizer):
    """The root mean square of the gradient's norms so far, which Adam's second moments add up to.

    A constant bound would never act, or always: norms are 1e-6 for a large video, 1 for a toy. It
    is infinite before the first update, and stays on the device.
    """
    group = optimizer.param_groups[0]
    known = [optimizer.state[p] for p in group["params"] if optimizer.state[p]]
    if not known:
        return torch.tensor(math.inf)
    square = sum(adam["exp_avg_sq"].sum() for adam in known)
    usual = (square / (1 - group["betas"][1] ** known[0]["step"])).sqrt()
    return torch.where(usual > 0, usual, math.inf)


class State:
    """All that changes in training: optimizers, average, counts. Random streams follow from them.

    Between two iterations it is all that a checkpoint holds. Several processes hold the same one.
    """

    def __init__(self, config, roles, device):
        self.config, self.roles, self.device = config, roles, device
        self.iteration = 0  # updates of the generator
        self.taken = 0  # clips read so far, by all processes
        self.reads = []  # (clip, sigma) of the current update, for error messages
        purposes = ("input", "exit", "level", "noise")
        self.rngs = {purpose: torch.Generator(device) for purpose in purposes}
        # author-code: betas. No momentum, as the gradients' target moves. NOTE silent: Adam's usual
        # eps is as large as the gradients of a video, which shrink with its size: 1e-10 at 480p
        how = {"betas": (0.0, 0.999), "eps": 1e-15, "fused": True, "weight_decay": 0.0}
        self.optimizers = {r: torch.optim.AdamW(roles.parameters(r), **how) for r in roles.trained}
        self.optimizers["fake"].param_groups[0]["weight_decay"] = config.fake_weight_decay
        self.average = {n: p.detach().clone() for n, p in roles.state("generator").items()}

    def seed_streams(self):
        """Begin an iteration: each process has its own noise, so a resume needs none stored."""
        for purpose, rng in self.rngs.items():
            # all processes leave a rollout at one exit: it decides how often the backbone runs
            shared = purpose == "exit" and self.config.generator_input == "rollout"
            own = 0 if shared else rank()
            rng.manual_seed(stream_seed(self.config.seed, self.iteration, own, purpose))

    def read(self, data):
        """What one update reads, `accumulate` batches: a list of (name, x0 (B, ...), cond)."""
        batches = []
        for _ in range(self.config.accumulate):
            batch = next(data)
            name, x0 = batch.get("name", "a batch"), batch["x0"]
            require_finite(f"the data ({name})", x0, 0.0)
            self.taken += ranks() * len(x0)
            batches.append((name, x0, batch["cond"]))
        return batches

    def update(self, role, lr):
        """Average the role's gradients, clip them, take one optimizer step; returns the norm."""
        optimizer, parameters = self.optimizers[role], self.roles.parameters(role)
        average_gradients(parameters, self.config.accumulate)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of the {role} is not finite")
        scale = (SPIKE * usual_norm(optimizer).to(norm) / norm).clamp(max=1.0)
        for parameter in parameters:
            parameter.grad *= scale
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        self.reads = []
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

        def exchange():
            for name, parameter in self.roles.state("generator").items():
                parameter.data, self.average[name] = self.average[name], parameter.data

        exchange()
        try:
            yield self.roles.generator
        finally:
            exchange()


def draw_input(config, roles, state, x0, cond, final=False):
    """x_in (B, ...) and its level sigma_in (B,), of the kind that the config names."""
    sigmas = few_step_sigmas(config.steps, config.shift).to(state.device)
    if config.generator_input == "paired":
        return paired_input(x0, sigmas, state.rngs)
    return rollout_input(roles.generator, x0, cond, sigmas, state.rngs, final)


def draw_noise(config, state, name, x):
    """The level sigma (B,) to which x (B, ...) is noised for a loss, and the noise eps (B, ...)."""
    low, high, shift = config.sigma_low, config.sigma_high, config.sigma_shift
    sigma = sample_sigma(len(x), low, high, shift, state.rngs["level"])
    state.reads.append((name, sigma))
    eps = torch.randn(x.shape, generator=state.rngs["noise"], device=x.device, dtype=x.dtype)
    return sigma, eps


def distil(config, roles, state, data):
    """Algorithm 1: every next() is one iteration, and yields its numbers, detached.

    data: an iterator of batches {'x0': (B, ...), 'cond': ..., 'name': ...}. All that has to be kept
    between two iterations is in `state`; logging, files and signals are the caller's.
    """
    while state.iteration < config.iterations:
        state.seed_streams()
        roles.alpha_weak = alpha_weak_at(config, state.iteration)
        lr = lr_scale(config, state.iteration)

        warmup = config.fake_warmup if state.iteration == 0 else 0
        for k in range(warmup + config.fake_updates):  # the fake learns the generator's samples
            if k % config.reuse == 0:
                samples = []
                for name, x0, cond in state.read(data):
                    final = config.fake_samples == "final"
                    x_in, sigma_in = draw_input(config, roles, state, x0, cond, final)
                    with torch.no_grad():
                        v = roles.generator(x_in, sigma_in, cond)
                    samples.append((name, x0_from_velocity(x_in, v, sigma_in), x0, cond))
            fake_stats = []  # the last update's are yielded
            for name, x_gen, x0, cond in samples:
                sigma, eps = draw_noise(config, state, name, x_gen)
                stats = fake_step(roles, x_gen, cond, sigma, eps)
                if config.gan_weight:  # the discriminator learns to tell them from real ones
                    stats.update(discriminator_step(roles, x_gen, x0, cond, sigma, eps))
                fake_stats.append(stats)
            fake_norm = state.update("fake", lr * config.fake_lr)
            if config.gan_weight:  # peer: at the fake's rate
                state.update("discriminator", lr * config.fake_lr)

        generator_stats = []
        for name, x0, cond in state.read(data):  # the generator moves along g
            x_in, sigma_in = draw_input(config, roles, state, x0, cond)
            sigma, eps = draw_noise(config, state, name, x0)
            stats = generator_step(
                roles,
                x_in,
                sigma_in,
                cond,
                sigma,
                eps,
                x0_gt=x0 if config.gt_weight else None,
                gt_weight=config.gt_weight,
                gan_weight=config.gan_weight,
                guidance=config.guidance,
            )
            stats.update(moments("data", x0))
            generator_stats.append(stats)
        norm = state.update("generator", lr * config.generator_lr)
        state.update_average()
        state.iteration += 1
        stats = {**mean_of(fake_stats), **mean_of(generator_stats)}
        stats.update(fake_grad_norm=fake_norm, grad_norm=norm, alpha_weak=roles.alpha_weak)
        yield stats


# ---- 7. HunyuanVideo (13B) by diffusers ----------------------------------------------------------
def device():
    """Where models run: 'cuda', this process's GPU, or 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def reading(sentence, *errors):
    """Refuse what cannot be read inside, with the reason; `errors`: further kinds to expect."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError, *errors) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise Refused(f"{sentence} ({reason}).") from error


def load_pipeline(checkpoint, parts, place=None):
    """diffusers' pipeline of the checkpoint, of which only `parts` are read, by how names begin."""
    from diffusers import DiffusionPipeline, logging

    logging.disable_progress_bar()  # its bars would cut through ours
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    with reading(f"--checkpoint {checkpoint} is no pipeline in diffusers' format"):
        names = DiffusionPipeline.load_config(checkpoint)
        read = ("_", "scheduler", *parts)
        absent = {name: None for name in names if not name.startswith(read)}  # None: not loaded
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint, dtype=dtype, use_safetensors=True, **absent
        )
    if pipe.vae:
        pipe.vae.enable_tiling()
    return pipe.to(place or device())


def about_checkpoint(checkpoint):
    """What a checkpoint's folder says of itself in a w2svd.json: settings, prompt_template."""
    path = Path(checkpoint, "w2svd.json")
    with reading(f"{path} cannot be read"):
        return json.loads(path.read_text()) if path.is_file() else {}


class VideoModel:
    """What training, sampling and the plan need to know of a model, as far as models share it.

    Sections 3 to 6 need .module, .velocity, .lora_targets, .checkpoint_with, and .features and
    .width for a discriminator; the rest is for the commands. Another one is in notebooks/wan.py.
    """

    script = "w2svd.py"  # what the commands are called with
    prompt_template = None  # the pipeline's own; or {"template": "...{}...", "crop_start": tokens}
    renoise = True  # how the generator is sampled: by few_step_sample, not as a backbone by Euler
    start = repeated = 0  # the picture's share in the first noise; frames to drop after decoding

    def __init__(self, module, config):
        m = module.config
        self.module, self.config, self.dtype = module, config, module.dtype
        self.width = m.num_attention_heads * m.attention_head_dim
        # (C, T, H, W) of the latents of a whole video, one for each 4 frames and 8 x 8 pixels
        self.video = (m.out_channels, config.frames // 4 + 1, config.height // 8, config.width // 8)
        self.shape = self.video  # of what is sampled: with token_replace a frame less
        own = about_checkpoint(config.checkpoint)
        self.prompt_template = own.get("prompt_template", self.prompt_template)
        if self.dtype != torch.float32:
            for embedder in self.embedders:
                embedder.register_forward_hook(self.stream_in_float32)
            module.proj_out.register_forward_hook(self.head_in_float32)

    @classmethod
    def outline(cls, config):
        """The model of the checkpoint without its weights, on the meta device: for the plan."""
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        Module, found = getattr(diffusers, cls.transformer), cls.released.get(config.checkpoint)
        other = f"--checkpoint {config.checkpoint} is no {cls.__name__} in diffusers' format"
        with reading(other, TypeError), torch.device("meta"):
            if found is None:
                found = Module.load_config(config.checkpoint, subfolder="transformer")
            module = Module.from_config(found).bfloat16()
            model = cls(module, config)
        if found.get("_class_name", cls.transformer) != cls.transformer or not model.known:
            raise Refused(f"{other}.")
        return model

    def load(self, place=None):
        """The same model with its weights, frozen; adapters are put into it later."""
        pipe = load_pipeline(self.config.checkpoint, ("transformer",), place)
        return type(self)(pipe.transformer.requires_grad_(False), self.config)

    @staticmethod
    def stream_in_float32(_, args, out):
        """Without gradient, hand float32 to the blocks, whose residual stream then stays in it.

        NOTE silent: in bf16 most of x0_fake - x0_real, a hundredth of either, is rounded away.
        """
        return out if torch.is_grad_enabled() or out.is_meta else out.float()

    @staticmethod
    def head_in_float32(head, args, out):
        """Without gradient, compute the last layer in float32, too."""
        if torch.is_grad_enabled() or out.is_meta:  # the meta device knows no autocast
            return out
        with torch.autocast(out.device.type, enabled=False):
            x, weight, bias = (tensor.float() for tensor in (*args, head.weight, head.bias))
            return torch.nn.functional.linear(x, weight, bias)

    def autocast(self, x):
        """Autocast on x's device: products, also the float32 adapters', in the model's dtype."""
        kind = x.device.type.replace("meta", "cpu")  # the meta device knows no autocast
        # NOTE silent: without autocast the float32 adapters would compute in float32; with its
        # cache every float32 weight would stay in bf16 too until the end of the forward
        return torch.autocast(kind, self.dtype, self.dtype != torch.float32, cache_enabled=False)

    def checkpoint_with(self, function):
        """Run every block as function(block, *args), which recomputes it in backward."""
        self.module.enable_gradient_checkpointing(function)

    def features(self, x_t, sigma, cond):
        """The sample's tokens after the first third of the blocks, (B, tokens, width)."""
        seen, (name, count) = [], self.early
        blocks = getattr(self.module, name)
        watch = self.module.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        setattr(self.module, name, blocks[:count])  # the late blocks do not run
        try:
            self.velocity(x_t, sigma, cond)
        finally:
            setattr(self.module, name, blocks)
            watch.remove()
        tokens = math.prod(x_t.shape[2:]) // self.patch
        return seen[0][:, -tokens:]  # without those of a first frame that was given

    @torch.no_grad()
    def encode_video(self, pipe, video):
        """A video (1, 3, T, H, W) in [-1, 1] as scaled latents (1, C, T, H, W)."""
        vae = pipe.vae.float()  # bf16 would round the latents
        mean, scale = self.scaling(vae)
        return (vae.encode(video.to(pipe.device)).latent_dist.mode() - mean) * scale

    def draw(self, sampler, velocity, sigmas, cond, seed):
        """Sample the latents of a whole video, (1, C, T, H, W); the seed decides it."""
        rng = torch.Generator(device()).manual_seed(seed)
        noise = torch.randn(1, *self.video, generator=rng, device=device())
        noise = noise[:, :, -self.shape[1] :]
        if self.start:
            noise = (1 - self.start) * noise + self.start * cond["image"]
        x0 = sampler(velocity, noise, sigmas, cond, rng)
        return x0 if self.shape == self.video else torch.cat([cond["image"], x0], dim=2)

    @torch.no_grad()
    def decode(self, pipe, x0):
        """Frames (T', H', W', 3) in [0, 1] of latents (1, C, T, H, W)."""
        mean, scale = self.scaling(pipe.vae)
        x0 = x0.to(pipe.device, pipe.vae.dtype) / scale + mean
        frames = pipe.vae.decode(x0, return_dict=False)[0]
        if not frames.isfinite().all():
            raise Refused("The sampled video is not finite; take an earlier generator by --at.")
        frames = frames[:, :, self.repeated :]
        return pipe.video_processor.postprocess_video(frames, output_type="np")[0]


class HunyuanVideo(VideoModel):
    """diffusers' HunyuanVideo, text-to-video and both forms of image-to-video."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo"
    transformer = "HunyuanVideoTransformer3DModel"
    released = {"": {}, checkpoint: {}}  # diffusers' defaults
    preset = {"checkpointing": True, "log_every": 10}  # not tuned, as nothing was measured
    text_limit, text_mb = 256, 2  # tokens that the text encoder reads; a text's in the cache
    vae_flop = 21e6, 40e6  # of encoding and decoding, for each pixel of each frame, counted
    early = "single_transformer_blocks", 0  # the double-stream blocks are a third of all
    # a block's memory, in tokens x width x 2 bytes, simulated: what its backward needs where it is
    # recomputed; what it keeps where not, and needs then
    block_memory = 37.2, 25.6, 11.6
    moved = 407  # bytes of a block's element-wise work, for each token and channel, counted
    # every linear layer of the blocks but adaLN's: 4.30 M parameters for each unit of rank at 13B
    LAYERS = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    LAYERS += r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"

    def __init__(self, module, config):
        if config.guidance != 1:
            raise Refused("--guidance must be 1: HunyuanVideo has it embedded.")
        m = module.config
        self.embedders = module.x_embedder, module.context_embedder
        super().__init__(module, config)
        self.guidance = config.embedded_guidance
        blocks = "single_" if config.lora_targets == "single" else "(single_)?"
        self.lora_targets = rf"{blocks}transformer_blocks\.\d+\.({self.LAYERS})"
        self.form = m.image_condition_type  # None, token_replace or latent_concat
        concat = self.form == "latent_concat"
        reads = 2 * m.out_channels + 1 if concat else m.out_channels
        self.known = (m.in_channels, m.patch_size_t) == (reads, 1)
        self.repeated = 4 if concat else 0  # they repeat the picture; diffusers drops them too
        self.start = 0.001 if self.form else 0.0  # as diffusers' image-to-video pipeline begins
        if self.form == "token_replace":  # samples all but the first frame
            self.shape = (m.out_channels, config.frames // 4, *self.video[2:])
        # image-to-video's encoder reads the picture too, as 576 tokens, thinned out
        picture = {None: 0, "token_replace": 144, "latent_concat": 288}[self.form]
        self.adapters = 1.444 / self.width  # of the linear FLOP, for each unit of rank, counted
        self.patch = m.patch_size**2
        self.tokens = math.prod(self.video[1:]) // self.patch + self.text_limit + picture
        for block in self.blocks:
            block.register_forward_pre_hook(self.without_mask)

    @property
    def blocks(self):
        return [*self.module.transformer_blocks, *self.module.single_transformer_blocks]

    @staticmethod
    def scaling(vae):
        """Mean and factor of the latents."""
        return 0.0, vae.config.scaling_factor

    @staticmethod
    def without_mask(_, args):
        """Text comes trimmed, so nothing is masked; a mask would rule out flash attention."""
        assert args[3] is None or args[3].dtype == torch.bool, "diffusers' blocks have changed"
        return (*args[:3], None, *args[4:])

    def with_image(self, x_t, cond):
        """What the transformer reads: x_t with the first frame's latents, cond['image'], beside it.

        token_replace: in front, x_t being the frames behind it; latent_concat: in more channels.
        """
        if self.form == "token_replace":
            return torch.cat([cond["image"].to(x_t), x_t], dim=2)
        if self.form == "latent_concat":
            image, mask = torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])
            image[:, :, :1], mask[:, :, :1] = cond["image"], 1
            return torch.cat([x_t, image, mask], dim=1)  # (B, 2 C + 1, T, H, W)
        return x_t

    def velocity(self, x_t, sigma, cond):
        """x_t: latents (B, C, T, H, W); cond: prompt_embeds (B, L, D), trimmed; pooled (B, P)."""
        text = cond["prompt_embeds"].to(self.dtype)
        with self.autocast(x_t):
            v = self.module(
                hidden_states=self.with_image(x_t, cond).to(self.dtype),
                timestep=1000 * sigma.float(),  # NOTE silent: bf16 would round 954.5 to 956
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x_t.device),
                pooled_projections=cond["pooled"].to(self.dtype),
                # as diffusers does it: 6016 in bf16
                guidance=text.new_full((len(x_t),), self.guidance) * 1000,
                return_dict=False,
            )[0]
        return v[:, :, -x_t.shape[2] :].to(x_t.dtype)

    @torch.no_grad()
    def encode_text(self, pipe, caption, first=None):
        """prompt_embeds (1, L, D), trimmed to the L tokens that count, and pooled (1, P).

        Image-to-video's encoder reads the first frame too, (1, 3, 1, H, W) in [-1, 1], thinned out
        by the number that goes with the form; its latents are 'image', (1, C, 1, H, W).
        """
        how = {"prompt": caption}
        if self.prompt_template:
            how["prompt_template"] = self.prompt_template
        if self.form:
            how["image"] = pipe.video_processor.postprocess(first[:, :, 0], output_type="pil")[0]
            how["image_embed_interleave"] = 4 if self.form == "token_replace" else 2
        embeds, pooled, mask = pipe.encode_prompt(**how)
        cond = {"prompt_embeds": embeds[:, mask[0].bool()], "pooled": pooled}
        if self.form:
            cond["image"] = self.encode_video(pipe, first)
        return cond

    def flop(self):
        """Of a forward: FLOP in linear layers, and in attention."""
        layers = len(self.blocks) * (4 + 2 * self.module.config.mlp_ratio) * self.width**2
        return 2 * self.tokens * layers, 4 * self.tokens**2 * self.width * len(self.blocks)


MODELS = {"hunyuan": HunyuanVideo}  # beside the toy; `main` takes others


# ---- 8. Clips ------------------------------------------------------------------------------------
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def atomic_write(path):
    """A temporary name to write to, renamed to `path` at the end; a failure leaves `path` alone."""
    part = path.with_name(f".part-{os.getpid()}-{HOST}-{path.name}")  # others may write it too
    part.touch()
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # safetensors would keep it from everybody else
        with open(part, "rb+") as file:  # or the name might reach the disk without the content
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def delete_leftovers(folder):
    """Delete what killed writers left: of this machine if the process is gone, or after a day."""
    for part in folder.rglob(".part-[0-9]*"):
        pid, host = re.match(r".part-(\d+)-(?:([0-9a-f]{8})-)?", part.name).groups()
        here = host in (None, HOST) and Path("/proc/self").exists()
        ended = here and not Path("/proc", pid).exists()
        if ended or time.time() - part.stat().st_mtime > 86400:
            part.unlink(missing_ok=True)


def write_json(path, content):
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def write_safetensors(path, tensors, info, **metadata):
    """Write {name: tensor}, with `info` as one JSON string in the header, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_write(path) as part:
        save_file(tensors, part, {**metadata, "w2svd": json.dumps(info, sort_keys=True)})


def read_safetensors(path):
    """Read (tensors, info) back. A file that is missing, damaged or not ours is refused."""
    from safetensors import safe_open

    if not Path(path).exists():
        raise Refused(f"There is no {path}.")
    with reading(f"Delete {path}, not whole or not ours", KeyError), safe_open(path, "pt") as file:
        info = json.loads((file.metadata() or {})["w2svd"])
        return {name: file.get_tensor(name) for name in file.keys()}, info


READING = 4  # the cache's version: raise it when reading or encoding changes
EXAMPLE = "python w2svd.py train --model hunyuan --data my_clips/"
NAMES, TEXTS = ("file_name", "file", "video", "path"), ("text", "caption", "prompt")  # of rows
LAYOUTS = "a.mp4 with a.txt, or metadata.jsonl or .csv with file_name and text"
ENCODERS = ("text", "tokenizer", "image", "vae")  # of a pipeline
FILMS = ".mp4 .m4v .mov .mkv .webm .avi .gif .wmv .flv .ts .mts .m2ts .mpg .mpeg .3gp .ogv".split()
# No playlist, which would read other files or a network: ffmpeg guesses the format from the content
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif,ogg"
FFMPEG = f"-hide_banner -protocol_whitelist file -format_whitelist {FORMATS} -timelimit 600".split()
BT709 = "-vf scale=out_color_matrix=bt709 -colorspace bt709".split()  # of films that are written
BT709 += "-color_primaries bt709 -color_trc bt709".split()
# HDR to SDR: 203 nits are white, as ITU-R BT.2408 has it; what is above .6 is compressed
TONE_MAP = ",zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709"
TONE_MAP += ",tonemap=mobius:param=.6:desat=0,zscale=t=bt709:m=bt709"


@dataclasses.dataclass
class Clip:
    """A film with its caption, or a caption alone; or a file of the folder that is no clip."""

    name: str  # within the folder
    film: Path | None = None
    caption: str | Path = ""  # or the file that it stands in
    left_out: str = ""  # why it cannot be used
    file: Path | None = None  # of its latents and text
    notes: list = dataclasses.field(default_factory=list)  # what happened to it now


def read_text(path):
    """A text in UTF-8, or in the UTF-16 of Excel; bytes that are neither are found later."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def files_below(folder):
    """All files below a folder, through links, and hidden folders; no folder is read twice."""
    files, entered = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in entered:
            inner.clear()
            continue
        entered.add(os.path.realpath(place))
        # listed like files, so that they are reported as left out
        hidden = [name for name in inner if name.startswith(".") and name != ".w2svd"]
        files += [Path(place, name) for name in sorted(names + hidden)]
        inner[:] = sorted(name for name in inner if not name.startswith("."))
    return files


def listed_clips(file, folder, find):
    """The clips that a metadata.jsonl or .csv names; rows that name none are left out, counted."""
    clips, text, bad = [], read_text(file), {}
    rows = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix == ".csv":
        separator = max(",;\t", key=text.split("\n")[0].count)
        # an unquoted comma in a caption makes further cells: then "text" is a list, refused below
        how = {"delimiter": separator, "restkey": "text", "skipinitialspace": True}
        table = csv.DictReader(io.StringIO(text, newline=""), **how)
        with reading(f"{file} cannot be read", csv.Error):
            rows = [(table.line_num, row) for row in table]
    for line, row in rows:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            name, caption = (next(row[k] for k in keys if k in row) for keys in (NAMES, TEXTS))
            if not name.strip():
                raise ValueError("a row without a name")
            film = find(Path(os.path.abspath(file.parent / name.strip())))
            clips.append(Clip(os.path.relpath(film, folder), film, caption.strip()))
        except (ValueError, TypeError, AttributeError, StopIteration, RuntimeError):
            has = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            bad.setdefault(f"no file_name with one text (in quotes){has}", []).append(line)
    for reason, lines in bad.items():
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        name = f"{os.path.relpath(file, folder)}, line {lines[0]}{more}"
        clips.append(Clip(name, left_out=reason))
    return clips


def find_clips(data):
    """The clips of a folder, with all that is left out, or the captions of a .txt: [Clip]."""
    folder, clips = Path(os.path.abspath(data)), []
    if folder.suffix == ".txt" and folder.is_file():
        lines = read_text(folder).split("\n")
        return [Clip(repr(line), caption=line) for line in lines if line.strip()]
    if not data or not folder.is_dir():
        raise Refused(f"{data!r} is no folder of clips ({LAYOUTS}), nor a .txt: {EXAMPLE}")
    files = files_below(folder)
    composed = {unicodedata.normalize("NFC", str(file)): file for file in files}

    def find(path):  # a letter with an accent may be one sign in a list and two in a file's name
        return composed.get(unicodedata.normalize("NFC", str(path)), path)

    lists = [file for file in files if file.name in ("metadata.jsonl", "metadata.csv")]
    for file in lists:
        clips += listed_clips(file, folder, find)
    named = {clip.film for clip in clips}
    loose = [f for f in files if f.suffix.lower() in FILMS and f.name[0] != "." and f not in named]
    clips += [Clip(os.path.relpath(f, folder), f, find(f.with_suffix(".txt"))) for f in loose]
    films = [clip.film for clip in clips if clip.film]
    used = {*lists, *films, *(find(film.with_suffix(".txt")) for film in films)}
    rest = [os.path.relpath(file, folder) for file in files if file not in used]
    return clips + [Clip(name, left_out="no clip, nor a caption of one") for name in rest]


def ffmpeg(path, *flags):
    """Run ffmpeg on a film: its output, and what it said; ValueError where it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    # the whole path, or a name like 'concat:a' would be read as a protocol
    command = [get_ffmpeg_exe(), *FFMPEG, "-i", path.resolve(), *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        raise ValueError(f"damaged, or no film: {(said.strip() or 'stopped').splitlines()[-1]}")
    return done.stdout, said


def look(path):
    """What ffmpeg says of a film's first frame, upright: {'s': '64x48', 'sar': '1/1', ...}."""
    _, said = ffmpeg(path, *"-map 0:V:0 -frames:v 1 -vf showinfo -f null -".split())
    facts = {"fps": math.inf}
    for name, value in re.findall(r"(\w+): *([^\s,]+)", said.partition("config in ")[2]):
        facts.setdefault(name, value)  # of each name the first
    rate = re.search(r", ([\d.]+) fps", said.partition("\n  Duration: ")[2])  # behind its name
    if rate:
        facts["fps"] = float(rate[1])
    width, height = facts["size"] = tuple(map(int, facts["s"].split("x")))
    wide, high = map(int, facts["sar"].split("/"))  # of a pixel; 0 is unknown
    facts["aspect"] = width / height * (wide / high if wide else 1)
    return facts


def read_clip(path, config):
    """The first frames of a film as a player shows them: (1, 3, T, H, W) in [-1, 1].

    Upright, in square pixels, whole frames instead of fields, colours of SDR, black where it is
    transparent; resampled, cropped at the centre, resized. ValueError: short, damaged, a still.
    """
    film, w, h, n = look(path), config.width, config.height, config.frames
    if film["fps"] < config.fps / 4:
        raise ValueError(f"{film['fps']:g} fps are stills; --fps {config.fps:g} would repeat them")
    # cropped before it is scaled: a picture of 8000 x 2 would be scaled to 192,000 x 48
    crop = f"crop=max(1\\,min(iw\\,ih*{w}/{h}/sar)):max(1\\,min(ih\\,iw*sar*{h}/{w}))"
    chain = f"bwdif=send_frame:deint=interlaced,fps={config.fps},{crop},scale={w}:{h},setsar=1"
    if film["color_trc"] in ("smpte2084", "arib-std-b67"):  # PQ, HLG
        chain += TONE_MAP
    elif film["color_space"] == "unknown" and max(film["size"]) >= 1280:
        chain = "setparams=colorspace=bt709," + chain  # untagged and large, as players take it
    # NOTE silent: into rgb24 at once, ffmpeg would not interpolate colours
    chain += ",format=gbrap,premultiply=inplace=1"
    flags = f"-v error -xerror -map 0:V:0 -frames:v {n} -f rawvideo -pix_fmt rgb24".split()
    raw, _ = ffmpeg(path, *flags, "-vf", chain, "-")
    if len(raw) < 3 * h * w * n:
        raise ValueError(f"too short: {len(raw) // (3 * h * w)} of {n} frames, {config.fps:g} fps")
    frames = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(n, h, w, 3)
    return frames.permute(3, 0, 1, 2)[None] / 127.5 - 1


def write_film(path, frames, fps):
    """Write frames (T, H, W, 3) in [0, 1] as an .mp4 of bt709; returns them as bytes."""
    import imageio.v3 as iio

    frames = (frames * 255).round().astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        iio.imwrite(part, frames, plugin="FFMPEG", fps=fps, output_params=BT709)
    return frames


def read_caption(caption):
    """A caption, or the file that it stands in, as one line; ValueError where there is none."""
    if isinstance(caption, Path):
        if not caption.exists():
            raise ValueError(f"it has no caption, {caption.name}")
        caption = read_text(caption)
    if caption != caption.encode(errors="replace").decode():
        raise ValueError("its caption is not UTF-8")
    return " ".join(line.strip() for line in caption.strip().split("\n"))


def latents_folder(config):
    """Where latents and text are kept: under --cache, or beside the clips or the .txt."""
    data = Path(config.data)
    beside = data.parent if data.is_file() else data
    return Path(config.cache or beside / ".w2svd").expanduser()


def latents_file(config, model, clip, caption):
    """The file of a clip's latents and text: its name hashes all that they depend on."""
    c, film = config, clip.film
    checkpoint = {k: x for k, x in model.module.config.items() if k[0] != "_"}  # and not its path
    parts = [READING, caption, checkpoint, model.prompt_template]
    if film:  # what it holds, not its times: a copy is the same film
        size, MB = film.stat().st_size, 2**20
        with open(film, "rb") as file:
            content = hashlib.sha256(file.read(MB))
            file.seek(max(0, size - MB))
            content.update(file.read(MB))
        parts += [clip.name, size, content.hexdigest(), c.height, c.width, c.frames, c.fps]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    name = f"{film.stem[:40] if film else 'caption'}-{digest}.safetensors"
    return latents_folder(c) / name


def encode_clip(model, pipe, video, caption):
    """Text and, of a video (1, 3, T, H, W), scaled latents (C, T, H, W), without a batch."""
    tensors = model.encode_text(pipe, caption, None if video is None else video[:, :, :1])
    if video is not None:
        tensors["latents"] = model.encode_video(pipe, video)
    for name, x in tensors.items():
        if not x.isfinite().all() or not x.numel():
            raise ValueError(f"its {name} are empty or not finite")
    return {name: x[0] for name, x in tensors.items()}


def crop_note(film, config):
    """What the crop leaves of a film that look() has seen, where that is little: [sentence]."""
    ratio = film["aspect"] * config.height / config.width
    if 0.8 < ratio < 1.25:
        return []
    height, width = config.height / math.sqrt(ratio), config.width * math.sqrt(ratio)
    size = f"--height {16 * round(height / 16)} --width {16 * round(width / 16)}"  # the same area
    return [f"{min(ratio, 1 / ratio):.0%} of the picture is used; more of it with {size}"]


def text_note(model, embeds):
    """Whether the text encoder read all of a text, of which embeds (..., L, D): [sentence]."""
    read = embeds.any(dim=-1).sum()  # others are padding
    if model.form or read < model.text_limit:  # image-to-video's have the picture too
        return []
    return [f"the text encoder reads {model.text_limit} tokens, and not its end"]


def encode_missing(config, model, clips, only_look=False):
    """Find or make each clip's file; where one cannot be used, its left_out says why."""
    from diffusers.training_utils import free_memory
    from tqdm import tqdm

    pipe = None
    for clip in tqdm([clip for clip in clips if not clip.left_out], desc="encode", unit="clip"):
        try:
            caption, video = read_caption(clip.caption), None
            if not caption:
                clip.notes.append("the caption is empty")
            clip.file = latents_file(config, model, clip, caption)
            if clip.file.exists():
                continue
            if clip.film:
                clip.notes += crop_note(look(clip.film), config)
                video = read_clip(clip.film, config)
            if only_look:
                continue
            clip.notes.append("encoded now")
            pipe = pipe or load_pipeline(config.checkpoint, ENCODERS)
            tensors = encode_clip(model, pipe, video, caption)
        except (Refused, ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each clip is an island: the others go on
            clip.left_out = (str(error).strip().splitlines() or [repr(error)])[-1]
            continue
        clip.notes += text_note(model, tensors["prompt_embeds"])
        try:
            clip.file.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(clip.file, tensors, {"source": clip.name, "caption": caption})
        except OSError as error:
            raise Refused(
                f"{error}: name a folder that can be written, with room, as --cache."
            ) from error
    del pipe
    free_memory()


def encoded_clips(config, model, only_look=False):
    """The files of all usable clips, made where they are missing; prints what is left out, and why.

    With only_look, nothing is encoded or written: for a plan.
    """
    if rank() == 0 and not only_look:
        delete_leftovers(latents_folder(config))
    clips = gather(find_clips(config.data) if rank() == 0 else None)[0]
    mine = clips[rank() :: ranks()]  # several processes share the work
    encode_missing(config, model, mine, only_look)
    for first, share in enumerate(gather(mine)):
        clips[first :: ranks()] = share
    for clip in clips:
        if clip.file and ranks() == 1 and not (only_look or clip.file.exists()):
            clip.left_out = clip.left_out or "its latents are gone"
    used = [clip for clip in clips if not clip.left_out]
    files = list(dict.fromkeys(clip.file for clip in used))
    notes = Counter(note for clip in used for note in clip.notes)
    print(f"{config.data}: {len(files)} clips, {notes.pop('encoded now', 0)} encoded now")
    if len(files) < len(used):
        notes["listed twice"] = len(used) - len(files)
    for note, count in notes.items():
        print(f"  {count} clips: {note}")
    for clip in clips:
        if clip.left_out:
            print(f"  left out, {clip.name}: {clip.left_out}")
    if not files:
        needs = f"see what is left out; a folder needs {LAYOUTS}; a .txt a caption in each line"
        raise Refused(f"Nothing in {config.data} can be used; {needs}.", status=1)
    for file in files:
        if not (only_look or file.exists()):
            raise Refused(f"Process {rank()} does not see {file}: name a shared disk as --cache.")
    return files


# ---- 9. Training ---------------------------------------------------------------------------------
class VideoTask:
    """A video model and a folder of clips. A task, as `train` needs it, has:

    .backbone (see Roles), whose weights come with .load(machine); .device; .clips, files or
    nothing; .batches(taken, rank, ranks), endless {'x0': (B, ...), 'cond', 'name'}, every ranks-th
    one from number taken + rank on; .on_log(step, generator) for pictures on the way; and
    .finish(folder, generator) -> (result, table) at the end.
    """

    def __init__(self, config, Model):
        self.config, self.device, self.backbone = config, device(), Model.outline(config)
        self.machine = Machine()
        if self.backbone.form and config.data.endswith(".txt"):
            raise Refused("--data: a .txt has no first frames; name a folder of clips.")

    def load(self, machine=Machine()):
        """Encode what is missing, then read the weights."""
        model = self.backbone
        find_clips(self.config.data)  # so that a wrong --data is refused before a missing GPU
        if machine.shard and ranks() == 1:
            raise Refused("--shard splits the backbone over processes: start them by torchrun.")
        if self.device == "cpu" and model.module.num_parameters() > 1e9:
            raise Refused("A model of this size needs a GPU, and torch finds none here.")
        self.clips = encoded_clips(self.config, model)
        some = torch.randperm(len(self.clips), generator=torch.Generator().manual_seed(0))
        self.filmed = [self.clips[i] for i in some[: films_at_once(model)]]
        # a backbone that will be split, or waits outside, may be too large for one GPU
        self.backbone = model.load("cpu" if machine.shard or machine.offload else self.device)

    def read(self, file):
        """A clip's file as a batch of one; x0 is 0 where there is a caption alone."""
        tensors, info = read_safetensors(file)
        cond = {name: x[None].to(self.device) for name, x in tensors.items()}
        shape = self.backbone.shape
        x0 = cond.pop("latents", torch.zeros(1, *shape, device=self.device))
        x0 = x0[:, :, -shape[1] :]  # without a frame that is given
        return {"x0": x0, "cond": cond, "name": file.name, "caption": info["caption"]}

    def in_order(self, first, step):
        """The clips' files, every step-th one from number first on: each once an epoch, endless."""
        n, epoch = len(self.clips), -1
        for count in itertools.count(first, step):
            if count // n != epoch:
                epoch = count // n
                seed = stream_seed(self.config.seed, epoch, 0, "order")
                order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            yield self.clips[order[count % n]]

    def batches(self, taken=0, rank=0, ranks=1):
        """`batch` clips at a time, in an order made of seed and epoch."""
        files = self.in_order(taken + rank, ranks)
        while True:
            clips = [self.read(file) for file in itertools.islice(files, self.config.batch)]
            if len({tuple(x.shape for x in clip["cond"].values()) for clip in clips}) > 1:
                raise Refused("Captions differ in length: use --batch 1, and --accumulate.")
            x0 = torch.cat([clip["x0"] for clip in clips])
            cond = {n: torch.cat([clip["cond"][n] for clip in clips]) for n in clips[0]["cond"]}
            yield {"x0": x0, "cond": cond, "name": ", ".join(clip["name"] for clip in clips)}

    def film(self, latents):
        """Decode {path: latents} and write them as .mp4."""
        decoder = load_pipeline(self.config.checkpoint, ("vae",))
        for path, x0 in latents.items():
            write_film(path, self.backbone.decode(decoder, x0), self.config.fps)

    def on_log(self, step, generator):
        """Film some prompts at the start and at every save, always from the same noise."""
        c, model, drawn = self.config, self.backbone, {}
        if step % c.save_every and step != c.iterations:
            return
        sigmas = few_step_sigmas(c.steps, c.shift)
        sampler = few_step_sample if model.renoise else euler_sample
        for i, file in enumerate(self.filmed):
            clip = self.read(file)
            name = f"samples/{step:06}-{i}-{words_of(clip['caption'])}.mp4"
            path, cond = Path(c.out) / name, clip["cond"]
            drawn[path] = model.draw(sampler, generator, sigmas, cond, c.seed)
            if step == 0:
                path = path.with_stem(f"{path.stem}-backbone")
                drawn[path] = model.draw(euler_sample, model.velocity, sigmas, cond, c.seed)
        if rank() == 0:
            self.film(drawn)

    def finish(self, folder, generator):
        """No exact answer here: the last logged numbers, and what to do next."""
        last = ["{}", *(folder / "metrics.jsonl").read_text().splitlines()][-1]
        image = "--image face.png " if self.backbone.form else ""
        how = f"{self.backbone.script} sample --run {folder} {image}"
        now = f'now: python {how}--prompt "..." --out video.mp4'
        return {"student": {**json.loads(last), "steps": self.config.steps}}, now

    def student(self, tensors, info):
        """The velocity of a stored generator, in place of the backbone's."""
        if info["kind"] == "full":
            self.backbone.module.load_state_dict(tensors)
            return functools.partial(self.backbone.velocity)  # not the backbone's own, to draw()
        roles = Roles(self.backbone, info["rank"], 0.0, 1.0)
        roles.load("generator", tensors)
        if self.machine.offload:
            HostedBackbone(roles)
        return roles.generator

    def first_frame(self, path):
        """A picture, cropped and resized to the video's size: (1, 3, 1, H, W) in [-1, 1]."""
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.utils import load_image

        with reading(f"--image {path} is no picture"):
            picture = load_image(path, convert_method=shown_picture)
        for note in crop_note({"aspect": picture.width / picture.height}, self.config):
            print(f"{path}: {note}")
        size = self.config.height, self.config.width
        return VaeImageProcessor().preprocess(picture, *size, resize_mode="crop")[:, :, None]

    def sample(self, tensors, info, out, seed, prompt=None, image=None, steps=0):
        """A video of the prompt, or of each line of a .txt; image-to-video: from the image on."""
        from diffusers.training_utils import free_memory

        model, needs = self.backbone, "an --image" if self.backbone.form else "no --image"
        many = bool(prompt) and prompt.endswith(".txt")
        if not prompt or (image is None) != (model.form is None):
            raise Refused(f"This checkpoint needs a --prompt, words or a .txt, and {needs}.")
        if out.suffix != ("" if many else ".mp4"):
            raise Refused("--out must be an .mp4; of a .txt of prompts, a folder.")
        prompts = [clip.caption for clip in find_clips(prompt)] if many else [prompt]
        first = self.first_frame(image) if image else None
        pipe, conds = load_pipeline(self.config.checkpoint, ENCODERS), {}
        for i, text in enumerate(prompts):
            path = out / f"{i:03}-{words_of(text)}.mp4" if many else out
            conds[path] = model.encode_text(pipe, text, first)
            for note in text_note(model, conds[path]["prompt_embeds"]):
                print(f"{text[:40]}...: {note}")
        del pipe
        free_memory()  # before the transformer comes
        hosted = self.machine.offload and info["kind"] == "lora"
        self.backbone = model.load("cpu" if hosted else None)
        sigmas = few_step_sigmas(steps, info["shift"]) if steps else torch.tensor(info["sigmas"])
        sampler = few_step_sample if info["renoise"] else euler_sample
        student, draw = self.student(tensors, info), self.backbone.draw
        self.film({p: draw(sampler, student, sigmas, cond, seed) for p, cond in conds.items()})
        return f"wrote {out}"


def shown_picture(picture):
    """A PIL picture in RGB as a viewer shows it: black where it is transparent, 16 bits as 8."""
    from PIL import Image

    if picture.mode.startswith("I"):  # PIL would cut off what is above 255
        picture = picture.point(lambda x: x * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture.convert("RGB")


def words_of(text):
    """A text as a part of a file's name."""
    return re.sub(r"\W+", "-", text)[:60].strip("-")


def load_task(config, models=MODELS):
    """The model and data that `config` names, as a task."""
    if config.model == "toy":
        import toy

        return toy.task(config)
    if config.model not in models:
        raise Refused(
            f"--model {config.model} is not known here, but {', '.join(models)}: see its script."
        )
    return VideoTask(config, models[config.model])


PATIENT = None  # the processes as a group that waits for clips to be encoded


def join_processes():
    """Under torchrun: take this process's GPU and meet the others; the first alone speaks."""
    global PATIENT
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        return
    if device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device() == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    PATIENT = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    if rank():
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"


def gather(x):
    """Every process's x, a list; small things only."""
    every = [x] * ranks()
    if ranks() > 1:
        torch.distributed.all_gather_object(every, x, group=PATIENT)
    return every


def gpus_of_a_node():
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks()))


def shard_backbone(roles):
    """Split the frozen backbone over the GPUs of each node (FSDP2); what is trained stays whole.

    A block's weights are gathered when it runs and dropped after it. Optimizers come after this.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped .* returned a view")  # none is written to
    shape = ranks() // gpus_of_a_node(), gpus_of_a_node()
    mesh = init_device_mesh(device(), shape, mesh_dim_names=("node", "gpu"))
    trained = {p for role in roles.trained for p in roles.parameters(role)}
    for module in (*roles.backbone.blocks, roles.backbone.module):  # the last: all in no block
        fully_shard(module, mesh=mesh, ignored_params=trained)
    for one in roles.copies.values():
        one.module.to(device())
    for parameter in trained:
        parameter.data = parameter.data.to(device())


class HostedBackbone:
    """The blocks' frozen weights wait in host memory; each block's come one ahead of its turn.

    Nothing trains them: they are copied one way and dropped; autograd keeps what it still needs.
    """

    def __init__(self, roles):
        blocks, on_gpu = roles.backbone.blocks, device() == "cuda"
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.frozen = [[p for p in b.parameters() if not p.requires_grad] for b in blocks]
        rest = [p for role in roles.trained for p in roles.parameters(role)]
        for one in (roles.backbone, *roles.copies.values()):
            rest += [*one.module.parameters(), *one.module.buffers()]
        for x in set(rest).difference(*self.frozen):
            x.data = x.data.to(device())
        self.here, self.ends, self.before = {}, [], 0  # weights by block; marks between blocks
        begin, self.homes = torch.compiler.disable(self.begin), []
        for i, block in enumerate(blocks):
            home = [p.data.cpu() for p in self.frozen[i]]
            self.homes.append([x.pin_memory() for x in home] if on_gpu else home)
            self.put(i, self.homes[i])  # at once, or the backbone would be there twice
            block.register_forward_pre_hook(lambda *_, i=i: begin(i))

    def put(self, i, weights):
        for p, x in zip(self.frozen[i], weights):
            p.data = x

    def fetch(self, i):
        if i in self.here:
            return
        with torch.cuda.stream(self.stream):
            how = {"non_blocking": True, "copy": True}
            self.here[i] = [x.to(device(), **how) for x in self.homes[i]]

    def begin(self, i):
        """Put block i's weights in place, drop those of earlier ones, begin to fetch the next."""
        down = i and self.before in (i, i + 1)  # in a backward: i again, then down
        ahead = i - 1 if down else i + 1
        ahead, self.before = ahead % len(self.homes), i
        for j in self.here.keys() - {i, ahead}:
            self.put(j, self.homes[j])
            del self.here[j]
        self.fetch(i)
        if self.stream:
            now = torch.cuda.current_stream()
            now.wait_stream(self.stream)
            for x in self.here[i]:  # NOTE silent: or its memory would be used again too early
                x.record_stream(now)
            self.ends.append(now.record_event())
            if len(self.ends) > 1:  # the host runs ahead, and would fetch all blocks at once
                self.ends.pop(0).synchronize()
        self.put(i, self.here[i])
        self.fetch(ahead)


def build_roles(config, backbone, machine):
    """The roles of a run, ready for optimizers. The order matters."""
    torch.manual_seed(config.seed)
    alphas = config.alpha_weak, config.alpha_strong
    roles = Roles(backbone, config.lora_rank, *alphas, config.generator, config.fake)
    if config.gan_weight:
        Discriminator(roles)
    if config.checkpointing or machine.offload:
        roles.use_checkpointing(machine.offload)
    if config.fp8_base:  # NOTE silent: before the adapters, these would be 8 bits too
        backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, backbone.dtype)
    if config.compile:  # a graph for each kind of block, role, gradient or none, length of text
        torch._dynamo.config.recompile_limit = 64
        for block in backbone.blocks:
            block.compile()
    if machine.shard:
        shard_backbone(roles)
    if machine.offload:
        HostedBackbone(roles)  # its hooks keep it
    return roles


@torch.no_grad()
def gap_floor(roles, batch, lr):
    """The relative gap that rounding alone makes between real and fake, before any training.

    The fake's B, still 0, becomes +-lr as one update would make it: what that does to a sample is
    far below the steps of bf16, which show all the same. A logged gap of this size is noise.
    """
    x0, cond = batch["x0"], batch["cond"]
    rng = torch.Generator(x0.device).manual_seed(0)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device, dtype=x0.dtype)
    x_t, sigma = add_noise(x0, eps, 0.5), torch.full((len(x0),), 0.5, device=x0.device)
    adapter = [p for name, p in roles.state("fake").items() if "lora_B" in name]
    for parameter in adapter:
        parameter.copy_(torch.randn(parameter.shape, generator=rng, device=x0.device).sign() * lr)
    both = roles.fake, roles.real
    x0_fake, x0_real = (x0_from_velocity(x_t, f(x_t, sigma, cond), sigma) for f in both)
    for parameter in adapter:
        parameter.zero_()
    return float((x0_fake - x0_real).norm() / x0_real.norm())


def evaluations(config):
    """Forwards of an iteration of `distil` without and with gradient, in the mean."""
    c = config
    rollout = (c.steps - 1) / 2 if c.generator_input == "rollout" else 0  # the mean exit
    draw = c.steps if c.fake_samples == "final" else 1 + rollout  # of the fake's samples
    forwards = math.ceil(c.fake_updates / c.reuse) * draw + rollout + 2
    if c.guidance != 1:
        forwards += 1
    if c.gan_weight:  # its features are a third of a forward
        return forwards + 2 / 3 * c.fake_updates, c.fake_updates + 4 / 3
    return forwards, c.fake_updates + 1


def films_at_once(model):
    """How many prompts are filmed at a time: four at 480p, one where a film takes minutes."""
    return max(1, min(4, 120_000 // model.tokens))


def memory_plan(config, model, machine, generator, fake):
    """GiB on each GPU by line, simulated, for so many parameters of generator and fake."""
    c, n, tensor = config, len(model.blocks), 2 * config.batch * model.tokens * model.width / 2**30
    at_work, kept, beside = model.block_memory
    frozen = sum(p.numel() for p in model.module.parameters() if not p.requires_grad)
    base = (1.29 if c.fp8_base else 2) * frozen / 2**30  # some stay in bf16: 15.4 GiB at 13B
    reached = n * share_reached(c, model)
    lines = {
        "backbone, frozen": base,
        "generator and fake, float32": 4 * (generator + fake) / 2**30,
        "Adam, average": (12 * generator + 8 * fake) / 2**30,
        "gradients": 4 * max(generator, fake) / 2**30,  # of one update at a time
        "inputs of the blocks": (reached + n / 3 if c.gan_weight else reached) * tensor,
        "a block at work": at_work * tensor,
        "CUDA, fragments": 1.6,  # with expandable segments
    }
    if machine.shard:  # three blocks are gathered at a time
        lines["backbone, frozen"] = base / gpus_of_a_node() + 3 * base / n
    if machine.offload:  # one at work, one that comes, one that just ended
        lines["backbone, frozen"] = base * (1 - sum(frozen_in_blocks(model)[:-3]) / frozen)
        lines["inputs of the blocks"] = 2 * tensor
    elif not c.checkpointing:
        lines["inputs of the blocks"] = kept * reached * tensor
        lines["a block at work"] = beside * tensor
    # simulations were up to 4 % off; NCCL has buffers
    lines["margin"] = 0.03 * sum(lines.values()) + (1.5 if ranks() > 1 else 0)
    return lines


def frozen_in_blocks(model):
    """How many frozen parameters each block has, the fewest first."""
    frozen = ([p for p in b.parameters() if not p.requires_grad] for b in model.blocks)
    return sorted(sum(p.numel() for p in own) for own in frozen)


def share_reached(config, model):
    """The share of the blocks that a backward goes through: it ends at the first adapter."""
    if "full" in (config.generator, config.fake):
        return 1.0
    learning = [any(p.requires_grad for p in block.parameters()) for block in model.blocks]
    return 1 - learning.index(True) / len(learning)


def time_plan(config, model, machine, forwards, backwards):
    """PFLOP and time, on an H100 and an RTX 4090 at published rates; nothing was measured."""
    c = config
    back = backwards * share_reached(c, model)
    again = forwards + backwards
    if c.checkpointing or machine.offload:  # one more forward, of the blocks that are reached
        again += back
    linear, attention = model.flop()
    moved = model.moved * model.tokens * model.width * len(model.blocks)
    adapters = model.adapters * c.lora_rank  # of the linear FLOP
    # FLOP/s in large products and in cuDNN's attention, bytes/s
    one = (1 + adapters) * linear / 650e12 + attention / 550e12 + moved / 3e12
    # a backward is as much as a forward in frozen linear layers, twice in adapters, 2.5 times in
    # attention, whose kernel recomputes a product, 1.4 times in element-wise work
    clips = c.batch * c.accumulate
    linear *= (again + back + adapters * (again + 2 * back)) * clips
    attention *= (again + 2.5 * back) * clips
    moved *= (again + 1.4 * back) * clips
    seconds = linear / 650e12 + attention / 550e12 + moved / 3e12
    copied = 0.0
    if machine.offload:  # beside it, at 25 GB/s of PCIe 4.0
        copied = (2 - c.fp8_base) * sum(frozen_in_blocks(model)) * again * clips / 25e9
    # in the same shares of what is published of an RTX 4090, 165 TFLOP/s and 1 TB/s
    small = linear / 108e12 + attention / 92e12 + moved / 0.9e12
    seconds = max(seconds, copied)
    # convolutions of the VAE at 150 TFLOP/s, an assumption
    encode, decode = (x * c.frames * c.height * c.width / 150e12 for x in model.vae_flop)
    films, saves = films_at_once(model), math.ceil(c.iterations / c.save_every)
    film = films * (c.steps * one + decode)
    hours = (seconds * c.iterations + film * (2 + saves)) / 3600
    return {
        "seconds an iteration on an H100": seconds,
        "seconds an iteration on an RTX 4090": max(small, copied),
        "seconds of copying the backbone": copied,
        "PFLOP an iteration": (linear + attention) / 1e15,
        "seconds to encode a clip": encode,
        "minutes of films, at the start": 2 * film / 60,  # the backbone's beside the student's
        "minutes of films, at each save": film / 60,
        "hours on an H100": hours,
        "hours on an RTX 4090": max(small, copied) * c.iterations / 3600,
        "GPU-hours, H100": hours * ranks(),
    }


def plan(config, model, machine=Machine(), loop=distil):
    """What a run takes, by formulas: simulated or published figures, nothing measured."""
    c, GiB = config, 2**30
    # a loop with forwards of its own also refuses here what means nothing to it
    work = loop.evaluations(c) if hasattr(loop, "evaluations") else evaluations(c)
    with torch.device("meta"):  # nothing is loaded yet; load() brings one without these adapters
        roles = Roles(model, c.lora_rank, 0.0, 1.0, c.generator, c.fake)
    generator, fake = (sum(p.numel() for p in roles.parameters(r)) for r in ("generator", "fake"))
    frozen = sum(p.numel() for p in model.module.parameters() if not p.requires_grad)
    about = {"parameters: backbone, generator, fake": [frozen, generator, fake]}
    if c.model == "toy":  # too small to plan for
        return about
    memory, saves = memory_plan(c, model, machine, generator, fake), c.iterations / c.save_every
    waiting = share_reached(c, model) * len(model.blocks) * 2 * model.tokens * model.width * c.batch
    host = 2 * frozen
    if machine.offload:  # torch rounds what it pins up to a power of two
        frozen_ones = (p for p in model.module.parameters() if not p.requires_grad)
        sizes = ((2 - c.fp8_base) * p.numel() for p in frozen_ones)
        host = waiting + sum(2 ** (size - 1).bit_length() for size in sizes)
    return {
        **{f"GiB, {name}": x for name, x in memory.items()},
        "GiB in all": sum(memory.values()),
        "GiB of host memory": host * gpus_of_a_node() / GiB,
        # three checkpoints, of float32 weights, averages and Adam's, and all generators
        "GiB of disk": 4 * (13 * generator + 9 * fake + math.ceil(saves) * generator) / GiB,
        "MB of cache a clip": 4 * math.prod(model.video) / 1e6 + model.text_mb,
        **time_plan(c, model, machine, *work),
        "clips an update": c.batch * c.accumulate * ranks(),
        **about,
    }


def check_fit(config, model, machine, numbers):
    """Refuse a run that does not fit into the GPU here or that is planned for; names what would."""
    room, (_, *trained) = machine.gpu_memory, numbers["parameters: backbone, generator, fake"]
    if not room and device() == "cuda":
        room = torch.cuda.mem_get_info()[1] / 2**30
    need = numbers.get("GiB in all", 0)
    if not 0 < room < need:
        return
    ways = {
        "--checkpointing": (dataclasses.replace(config, checkpointing=True), machine),
        "--offload": (config, dataclasses.replace(machine, offload=True)),
        "--fp8-base": (dataclasses.replace(config, fp8_base=True), machine),
    }
    less = {name: sum(memory_plan(c, model, m, *trained).values()) for name, (c, m) in ways.items()}
    cures = [f"{name} {GiB:.2f}" for name, GiB in less.items() if GiB < need]
    cures = ", ".join([*cures, "a smaller --frames, --height, --width or --lora-rank"])
    raise Refused(f"{need:.2f} GiB do not fit into {room:.2f}. Less need: {cures}.", status=1)


def memory_mb(place):
    """Peak memory in MB so far: of the process on a CPU, what torch has reserved on a GPU."""
    if torch.device(place).type == "cuda":
        return torch.cuda.max_memory_reserved(place) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def made_by():
    """The versions of what computes, and the commit of this file, if it lies in a repository."""
    names = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")
    git = f'git -C "{Path(__file__).parent}" rev-parse HEAD'
    failed, commit = subprocess.getstatusoutput(git)
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"versions": versions, "commit": "" if failed else commit}


def read_run(folder):
    """The Config that a run folder was made with; a folder that is not one is refused."""
    if not Path(folder).exists():
        raise Refused(f"There is no run folder {folder}; runs lie in runs/, or where --out said.")
    with reading(f"{folder} is not a run folder of this version", KeyError, TypeError):
        return Config(**json.loads((Path(folder) / "config.json").read_text())["config"])


def base_sum(roles):
    """The sum over about eight frozen tensors, to show that they did not move."""
    frozen = [p.detach() for p in roles.backbone.module.parameters() if not p.requires_grad]
    some = frozen[:: max(1, len(frozen) // 8)]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in some]  # if it is split
    return sum(float(p.cpu().double().sum()) for p in whole)  # wherever it lies now


def held_tensors(state):
    """All tensors that a State holds, {name: tensor}, Adam's also before its first step."""
    held = {f"average/{name}": x for name, x in state.average.items()}
    for role, optimizer in state.optimizers.items():
        for name, parameter in state.roles.state(role).items():
            held[f"{role}/{name}"] = parameter
            adam = optimizer.state[parameter]
            if not adam:
                adam["step"] = torch.zeros((), device=parameter.device)
                adam["exp_avg"] = torch.zeros_like(parameter)
                adam["exp_avg_sq"] = torch.zeros_like(parameter)
            held.update({f"optimizer/{role}/{name}/{slot}": x for slot, x in adam.items()})
    return held


class Run:
    """A run's folder and state: what is saved, read back, compared between processes, drawn."""

    def __init__(self, config, machine, task, loop=distil):
        self.config, self.machine, self.task = config, machine, task
        self.folder, self.loop = Path(config.out), loop.__name__
        self.state = State(config, build_roles(config, task.backbone, machine), task.device)
        self.base = base_sum(self.state.roles)
        self.floor = {}
        dtype = getattr(task.backbone, "dtype", torch.float32)
        if dtype != torch.float32 and loop is distil and config.fake == "lora":
            batch = next(task.batches())
            self.floor["gap_floor"] = gap_floor(self.state.roles, batch, config.fake_lr)
        # the clips' names themselves may be too many for a file's header
        names = "\n".join(file.name for file in task.clips)
        self.data = [len(task.clips), hashlib.sha256(names.encode()).hexdigest()]

    def picture(self):
        """Let the task draw: in the first process, or in all if the backbone is split."""
        if rank() == 0 or self.machine.shard:
            with self.state.averaged() as generator:
                try:
                    self.task.on_log(self.state.iteration, generator)
                except OSError as error:
                    print(f"w2svd: {error}: a picture is missing; training goes on.")

    def check_processes(self):
        """Stop where processes differ in what they share: counts and trained weights."""
        marks = [self.state.iteration, self.state.taken]
        for role in self.state.optimizers:
            marks += [float(p.detach().sum()) for p in self.state.roles.parameters(role)]
        if len(set(map(tuple, gather(marks)))) > 1:
            raise RuntimeError("the processes have drifted apart; a bug: all must do the same")

    def after_iteration(self, line, log, stopped):
        """Log, compare, save and draw where it is due; end the run after a signal."""
        c, step = self.config, self.state.iteration
        logs = step == c.iterations or step % c.log_every == 0
        saves = step == c.iterations or step % c.save_every == 0
        if logs:
            print(json.dumps(line), file=log, flush=True)
        if saves or stopped or step < 3:
            self.check_processes()
        if saves or stopped:
            self.save()
        if logs or saves:
            self.picture()  # last, as it may fail
        if stopped:
            gather(None)  # torchrun would end a process that still writes
            raise KeyboardInterrupt(stopped, self.saved())

    def saved(self):
        """Where the run was saved, and the command that goes on from there."""
        how = f"{self.task.backbone.script} train"
        how = how if self.loop == "distil" else f"-m toy.baselines {self.loop}"
        command = f"python {how} --resume --out {self.folder}"
        command += "".join(f" {flag(n)}" for n in ("offload", "shard") if getattr(self.machine, n))
        return f"it was saved at iteration {self.state.iteration}; to go on: {command}"

    def save_generator(self, path):
        """Save the average under diffusers' names; the header has all that sampling needs."""
        c = self.config
        names = ("model", "data", "checkpoint", "alpha_weak", "alpha_strong", "guidance", "seed")
        info = {name: getattr(c, name) for name in (*names, "embedded_guidance", "steps", "shift")}
        info.update(kind=c.generator, rank=c.lora_rank, lora_alpha=c.lora_rank, loop=self.loop)
        info.update(sigmas=few_step_sigmas(c.steps, c.shift).tolist(), step=self.state.iteration)
        info.update(base_sum=self.base, renoise=self.task.backbone.renoise)
        prefix = "transformer." if c.generator == "lora" else ""
        average = {prefix + name: x for name, x in self.state.average.items()}
        write_safetensors(path, average, info)

    def save(self):
        """Save the generator, and a checkpoint to resume from, of which the newest two stay."""
        if rank():
            return
        state, name = self.state, f"{self.state.iteration:06}.safetensors"
        self.save_generator(self.folder / f"generator-{name}")
        info = {"iteration": state.iteration, "taken": state.taken, "base_sum": self.base}
        info.update(loop=self.loop, data=self.data)
        info.update(metrics_bytes=(self.folder / "metrics.jsonl").stat().st_size)
        write_safetensors(self.folder / f"checkpoint-{name}", held_tensors(state), info)
        # a later one was damaged, or the run would have gone on from it
        saved = [p for p in sorted(self.folder.glob("checkpoint-*")) if p.name[11:] <= name]
        for path in saved[:-2]:
            path.unlink()

    @torch.no_grad()
    def restore(self):
        """Go on from the newest checkpoint that can be read; returns how long the log was then."""
        for path in sorted(self.folder.glob("checkpoint-*"), reverse=True):
            try:
                tensors, info = read_safetensors(path)
            except Refused as damage:
                print(f"w2svd: {damage} The one before it, or the beginning, is used.")
                continue
            # close, not equal: another kind of GPU adds up in another order
            if not math.isclose(info["base_sum"], self.base, rel_tol=1e-9):
                raise Refused(f"{path} was made from another backbone; see --checkpoint, --cache.")
            if info["loop"] != self.loop:
                raise Refused(
                    f"{path} was trained by {info['loop']}: go on with that, not {self.loop}."
                )
            if info["iteration"] > self.config.iterations:
                raise Refused(f"{path} was saved later: --iterations cannot be less.")
            for name, x in held_tensors(self.state).items():
                x.copy_(tensors[name])
            self.state.iteration, self.state.taken = info["iteration"], info["taken"]
            print(f"{path.name}: it goes on from iteration {self.state.iteration}")
            if info["data"] != self.data:
                clips = f"{info['data'][0]} clips then, {self.data[0]} now"
                print(f"w2svd: the data have changed: {clips}.")
            return info["metrics_bytes"]
        print(f"w2svd: there is no checkpoint in {self.folder}: from the beginning.")
        return 0


def log_line(stats, state, seconds, pflop):
    """An iteration's numbers as floats, the processes' means, with ratios, time and speed."""
    numbers = torch.tensor([float(x) for x in stats.values()], dtype=torch.float64)
    if ranks() > 1:
        torch.distributed.all_reduce(numbers)
    line = {"step": state.iteration, **dict(zip(stats, (numbers / ranks()).tolist()))}
    for name in ("std", "motion"):
        if line.get(f"data_{name}") and f"gen_{name}" in line:  # 0 of captions alone
            line[f"{name}_ratio"] = line[f"gen_{name}"] / line[f"data_{name}"]
    left = seconds * (state.config.iterations - state.iteration)
    line.update(seconds=seconds, hours_left=left / 3600, memory_mb=memory_mb(state.device))
    if pflop:
        line["tflops"] = 1e3 * pflop / seconds
    return line


@contextmanager
def stopping():
    """A list that holds SIGTERM or SIGINT once it came; a second one ends the process at once."""
    stop = []

    def on_signal(number, _):
        if stop and ranks() == 1:  # torchrun may send a second one
            os._exit(128 + number)
        stop.append(number)

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prefer_cudnn(machine=Machine()):
    """A context, for backward too: cuDNN's attention first on Hopper, the fastest (published).

    Its backward with a mask was reported to give NaN at some lengths; nothing here has a mask.
    """
    if not machine.cudnn or device() == "cpu" or torch.cuda.get_device_capability()[0] != 9:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def read_ahead(config, data, iteration, loop):
    """The batches of data; all of an iteration are read before it begins, so that it is whole."""
    while True:
        updates = config.fake_updates + (config.fake_warmup if iteration == 0 else 0)
        reads = math.ceil(updates / config.reuse) + 1 if loop is distil else 1
        batches = itertools.islice(data, reads * config.accumulate)
        yield from batches if iteration == 0 else list(batches)  # in the first nothing can be lost
        iteration += 1


def iterate(run, loop, pflop):
    """Run the loop: yields each iteration's numbers, and the signal that came to a process or 0."""
    from tqdm import tqdm

    config, state, tick = run.config, run.state, time.perf_counter()
    data = run.task.batches(state.taken, rank(), ranks())
    data = read_ahead(config, data, state.iteration, loop)
    bar = tqdm(total=config.iterations, initial=state.iteration, desc="distil", unit="it")
    with bar, stopping() as stop:
        try:
            for stats in loop(config, state.roles, state, data):
                line = log_line(stats, state, time.perf_counter() - tick, pflop)
                bar.set_postfix({name: line[name] for name in list(stats)[:2]}, refresh=False)
                bar.update()
                yield {**line, **run.floor}, max(gather(stop[0] if stop else 0))
                tick = time.perf_counter()
        except Refused as error:  # a clip's file is gone
            if state.iteration == 0:  # there is nothing to save
                raise
            run.save()
            raise Refused(f"{error} But {run.saved()}", error.status) from error
        except FloatingPointError as error:
            clips = [f"{clip} at {s.min():.4f} to {s.max():.4f}" for clip, s in state.reads]
            where = f"in iteration {state.iteration + 1}: {error}"
            where += f"; it read {', '.join(clips)}" if clips else ""
            cure = "take lower rates, or leave out that clip, and go on with --resume, or anew"
            raise Refused(f"Stopped {where}; {cure}.") from error


@contextmanager
def claimed(config, resume):
    """The config with a run folder that is this process's alone; one not named gets a number."""
    from filelock import FileLock, Timeout

    named = config.model
    if named == "toy" and config.data not in ("", "ring"):
        named = f"toy-{config.data}"
    for k in itertools.count(1):
        folder = Path(config.out or f"runs/{named}" + (f"-{k}" if k > 1 else ""))
        lock, used = FileLock(folder / ".lock", timeout=0), "wait for the process that has it"
        if not resume and (folder.is_file() or any(folder.glob("[!.]*"))):
            used = "name another, or, if it is a run, --resume"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                lock.acquire()
                break
        if config.out:
            raise Refused(f"--out {folder} is in use: {used}.")
    try:
        yield dataclasses.replace(config, out=str(folder))
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        ours = [folder] if config.out else [folder, folder.parent]
        for place in ours:
            with suppress(OSError):  # it goes only if it is empty: nothing came of the run
                place.rmdir()


def train(config, machine=Machine(), resume=False, dry_run=False, loop=distil, models=MODELS):
    """The whole run, from the plan to result.json. The loop has distil's signature."""
    task = load_task(config, models)
    numbers = plan(config, task.backbone, machine, loop)
    for name, value in numbers.items():
        print(f"{name:38} {f'{value:.4g}' if isinstance(value, float) else value}")
    given = {name: getattr(config, name) for name in ("model", "data", "checkpoint")}
    usual = {**preset_of(given, models), "model": config.model}
    for name, value in vars(config).items():
        if value != usual.get(name, getattr(Config, name)) and value != "":
            print(f"{flag(name):38} {value}")
    if dry_run and config.model != "toy" and config.data:
        encoded_clips(config, task.backbone, only_look=True)
    check_fit(config, task.backbone, machine, numbers)
    if dry_run:
        return
    place = Path(config.out or ".").absolute()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free / 2**30
    if not resume and free < numbers.get("GiB of disk", 0):  # a run has some of it already
        needs = f"The run needs {numbers['GiB of disk']:.2f} GiB of disk"
        raise Refused(f"{needs}, and {place} has {free:.2f} left: name another --out.")
    if machine.offload and device() == "cuda" and hasattr(os, "sysconf"):  # not on Windows
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if have < numbers["GiB of host memory"]:
            needs = f"--offload needs {numbers['GiB of host memory']:.2f} GiB of host memory"
            raise Refused(f"{needs}, of {have:.2f}: --fp8-base halves that.", status=1)
    with claimed(config, resume) if rank() == 0 else nullcontext() as own:
        task.config = gather(own)[0]
        run_training(task, machine, numbers, resume, loop)


def run_training(task, machine, numbers, resume, loop):
    """Load, train, save and measure, in the task's own run folder."""
    started, config, folder = time.perf_counter(), task.config, Path(task.config.out)
    task.load(machine)
    delete_leftovers(folder)
    run = Run(config, machine, task, loop)
    log_bytes = run.restore() if resume else 0
    run.check_processes()
    if rank() == 0:
        about = {"config": vars(config), "plan": numbers, **made_by()}
        write_json(folder / "config.json", about)
    with open(os.devnull if rank() else folder / "metrics.jsonl", "a") as log:
        if rank() == 0:
            log.truncate(min(log_bytes, log.tell()))  # to where the checkpoint was made
        run.picture()  # of the beginning; after a resume the checkpoint's, if missing
        for line, stopped in iterate(run, loop, numbers.get("PFLOP an iteration")):
            run.after_iteration(line, log, stopped)
    if base_sum(run.state.roles) != run.base:
        raise RuntimeError("the frozen backbone moved; a bug, since nothing may train it")
    if rank() == 0:
        run.save_generator(folder / "generator.safetensors")
        with run.state.averaged() as generator:
            result, table = task.finish(folder, generator)
        result.update(seconds=time.perf_counter() - started, peak_rss_mb=memory_mb("cpu"))
        write_json(folder / "result.json", {**result, "seed": config.seed})
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


def sample(run, out, seed=0, at=None, machine=Machine(), models=MODELS, **given):
    """Draw samples of a run's generator, with the grid of its header, into `out`."""
    config, out = read_run(run), Path(out)
    sizes = {"height", "width", "frames", "checkpoint"}
    allowed = {"n"} if config.model == "toy" else {"prompt", "image", "steps", *sizes}
    for name in given.keys() - allowed:
        raise Refused(f"{flag(name)} does not fit {run}, a run of --model {config.model}.")
    config = dataclasses.replace(config, **{n: given.pop(n) for n in sizes & given.keys()})
    steps = given.get("steps", config.steps)
    check(dataclasses.replace(config, seed=seed, steps=steps, gt_weight=0.0))
    out.parent.mkdir(parents=True, exist_ok=True)
    task = load_task(config, models)
    task.machine = machine
    print(task.sample(*read_generator(run, at), out, seed, **given))


CARD = """---
{base_model}license: other
tags: [step-distillation, w2svd]
---
# {checkpoint} in {steps} steps, by w2svd's {loop} (distil: W2SVD, arXiv 2503.13319)

Generator {generator}, fake {fake}, rank {rank}, alpha_weak {alpha_weak}; {step} updates, seed
{seed}. The base model's licence covers these weights. For diffusers from 0.35 on: other programs
apply none of it, silently (notebooks/to_comfyui.py converts it; FastVideo, sglang and xDiT read a
merged transformer). A second LoRA switches it off, until `pipe.set_adapters(["w2svd", "other"])`.

    from functools import partial
    import torch
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from diffusers.utils import export_to_video{load_image}
    pipe = DiffusionPipeline.from_pretrained("{checkpoint}", torch_dtype=torch.bfloat16)
    pipe.load_lora_weights("this folder", "w2svd", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("this folder/scheduler")
    grid = [1 - i / {steps} for i in range({steps})]  # a pipeline that asks for none gets another
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=grid)
    pipe.to("cuda").vae.enable_tiling()
    torch.manual_seed(1)  # the renoising draws from torch's global generator
    size = dict(height={height}, width={width})
    video = pipe(prompt="a woman talks", num_inference_steps={steps}, num_frames={frames}, **size,
                 {image}guidance_scale={guidance_scale},
                 generator=torch.Generator().manual_seed(0)).frames[0]
    export_to_video(video, "talk.mp4", fps={fps:g})
"""
IMAGE = 'image=pipe.video_processor.resize(load_image("a.png"), **size, resize_mode="crop"), '


def export(run, out, at=None, checkpoint="", format="diffusers", models=MODELS):
    """Write a run's LoRA for diffusers: the weights, the scheduler with its grid, a card."""
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    config, (tensors, info), out = read_run(run), read_generator(run, at), Path(out)
    config = dataclasses.replace(config, checkpoint=checkpoint or config.checkpoint)
    if config.model == "toy" or info["kind"] == "full":
        merge = "nothing reads the toy's, and notebooks/05_at_scale.ipynb merges a full generator"
        raise Refused(f"Only a video model's LoRA is exported: {merge}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is in use: name a new folder as --out.")
    model = load_task(config, models).backbone
    out.mkdir(parents=True, exist_ok=True)
    lora = {"r": info["rank"], "lora_alpha": info["lora_alpha"]}
    lora.update(target_modules=model.lora_targets, rank_pattern={}, alpha_pattern={})
    lora = json.dumps({f"transformer.{name}": x for name, x in lora.items()})
    path = out / "pytorch_lora_weights.safetensors"
    write_safetensors(path, tensors, info, lora_adapter_metadata=lora)
    scheduler = Scheduler(shift=info["shift"], stochastic_sampling=info["renoise"])
    scheduler.save_pretrained(out / "scheduler")
    about, local = {**vars(config), **info}, Path(config.checkpoint).exists()
    about["image_form"] = model.form
    about["checkpoint"] = Path(config.checkpoint).name if local else config.checkpoint
    for path in ("data", "cache", "out"):  # nobody else's business
        del about[path]
    write_json(out / "w2svd.json", about)  # for notebooks/to_comfyui.py
    about.update(image=IMAGE if model.form else "", guidance_scale=model.guidance)
    about["base_model"] = "" if local else f"base_model: {config.checkpoint}\n"
    about["load_image"] = ", load_image" if model.form else ""
    (out / "README.md").write_text(CARD.format(**about), encoding="utf-8")
    print(f"wrote {out} ({format})")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help.")


def add_settings(command, settings, models, names=()):
    """A flag for each line of Config or Machine, or for those named."""
    for field in dataclasses.fields(settings):
        name, kind, how = field.name, field.type, {"choices": get_args(field.type)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif name == "model":
            how = {"choices": ("toy", *models)}
        elif kind in (int, float, str):
            how = {"type": kind, "metavar": kind.__name__[0].upper()}
        text = f"{field.metadata['text']} [{field.default}]"
        for model, Model in models.items():
            if name in Model.preset:
                text += f" [{model}: {Model.preset[name]}]"
        if not names or name in names:
            command.add_argument(flag(name), help=text.replace("%", "%%"), **how)


def parse(argv, models=MODELS):
    """What was given, a dictionary, by the flags of the four commands; the rest is absent."""
    top = Parser(prog="w2svd.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    how["usage"] = "%(prog)s [--flag VALUE ...]"
    notation = "A line of help has a flag, its meaning / where that comes from [default]. Example: "
    trains = commands.add_parser(
        "train", help="distil a backbone", description=notation + EXAMPLE, **how
    )
    trains.add_argument("--resume", action="store_true", help="go on in --out, with its settings")
    trains.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    add_settings(trains, Config, models)
    add_settings(trains, Machine, models)
    encodes = commands.add_parser("encode", help="clips into latents and text, once", **how)
    names = ("model", "data", "checkpoint", "height", "width", "frames", "fps", "cache")
    add_settings(encodes, Config, models, names)
    samples = commands.add_parser("sample", help="sample a run", **how)
    exports = commands.add_parser("export", help="a LoRA for diffusers", **how)
    for one in (samples, exports):
        one.add_argument("--run", required=True, help="a run folder, as runs/mine")
        one.add_argument("--out", required=True, help="sample: a file; export: a new folder")
        one.add_argument("--at", type=int, help="the generator of that iteration [the newest]")
        one.add_argument("--checkpoint", help="where the backbone lies now [as trained]")
    exports.add_argument("--format", choices=("diffusers",), help="others: see notebooks/")
    samples.add_argument("--seed", type=int, help="of the noise [0]")
    samples.add_argument("--n", type=int, help="toy: number of samples [1000]")
    samples.add_argument("--prompt", help="what to show")
    samples.add_argument("--image", help="image-to-video: the first frame")
    add_settings(samples, Machine, models, ("cudnn", "offload"))
    for name in ("height", "width", "frames", "steps"):
        samples.add_argument(f"--{name}", type=int, help="not the toy's [as trained]")
    given, unknown = top.parse_known_args(argv)
    if unknown:
        known = [name for one in commands.choices.values() for name in one._option_string_actions]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        meant = f"; is {near[0]} meant?" if near else ""
        raise Refused(f"{unknown[0]} is no flag of {given.command}{meant} See --help.")
    return vars(given)


def resumed(given):
    """A run's own Config with what was given, if that may change."""
    config, fixed = read_run(given["out"]), set()
    if config.alpha_weak_schedule != "constant" or config.lr_schedule != "constant":
        fixed.add("iterations")  # a schedule depends on them
    if config.model == "toy":
        fixed.add("data")  # another mixture, not a folder that has moved
    for name, value in given.items():
        was = getattr(config, name)
        if value != was and (name in fixed or name not in RESUMABLE):
            raise Refused(f"--resume cannot change {flag(name)}, which was {was}.")
    return dataclasses.replace(config, **given)


def resolve(given, resume=False, models=MODELS):
    """A whole Config: the model's preset and what was given; or a run's own."""
    model = given.get("model", Config.model)
    if resume:
        if "out" not in given:
            raise Refused("--resume needs the run's folder as --out.")
        model = read_run(given["out"]).model
    for name in ("checkpoint", "cache", "data"):  # it may resume from elsewhere
        value, a_name = given.get(name), (name, model) == ("data", "toy")
        if value and not a_name and (name == "cache" or Path(value).exists()):
            given[name] = str(Path(value).resolve())
    return resumed(given) if resume else Config(**{**preset_of(given, models), **given})


def preset_of(given, models=MODELS):
    """The settings that follow from what was given: the model's, the checkpoint's own, and more."""
    model = given.get("model", Config.model)
    if model == "toy":
        import toy

        preset = toy.preset(given.get("data", "ring"))
    else:
        checkpoint = given.get("checkpoint", models[model].checkpoint)
        own = about_checkpoint(checkpoint).get("settings", {})
        preset = {"checkpoint": checkpoint, **models[model].preset, **own}
    if given.get("data", "").endswith(".txt"):  # there is nothing to pair
        preset.update(generator_input="rollout", fake_samples="final")
    if given.get("fake") == "full":  # real is the plain backbone; a decay would pull weights to 0
        preset.update(alpha_weak=0.0, fake_weight_decay=0.0)
    if given.get("generator_input") == "paired":  # 'final' means something for rollouts only
        preset.update(fake_samples="all")
    return preset


def run_command(argv, models, loop):
    """Parse and run one of the four commands."""
    given = parse(argv, models)
    command = given.pop("command")
    resume, dry_run = given.pop("resume", False), given.pop("dry_run", False)
    machine = Machine(**{name: given.pop(name) for name in vars(Machine()) if name in given})
    if command in ("train", "encode"):
        join_processes()  # before anything touches a GPU, which may be another process's
    with prefer_cudnn(machine):
        if command == "sample":
            return sample(**given, machine=machine, models=models)
        if command == "export":
            return export(**given, models=models)
        config = gather(resolve(given, resume, models) if rank() == 0 else None)[0]
        check(config, machine)
        if command == "train":
            train(config, machine, resume, dry_run, loop, models)
        else:
            encoded_clips(config, load_task(config, models).backbone)


def main(argv=None, models=MODELS, loop=distil):
    """Run a command; 0, or another status after a sentence about what failed."""
    from safetensors import SafetensorError

    status, again = 2, "train --resume --out RUN goes on; where no run is yet, repeat the command."
    try:
        run_command(argv, models, loop)
        return 0
    except Refused as error:
        reason, status = error, error.status
    except torch.OutOfMemoryError:
        reason = "out of GPU memory: see the plan of --dry-run, and what needs less."
    except ImportError as error:
        reason = f"{error}: pip install -r requirements.txt; the toy needs toy/ beside this file."
    except (OSError, SafetensorError) as error:  # no space left, a folder that went away
        reason = f"{error}; what was written before is whole: {again}"
    except KeyboardInterrupt as stop:
        number, *saved = stop.args or [signal.SIGINT]
        reason, status = f"stopped; {saved[0] if saved else again}", 128 + number
    except Exception:  # a bug
        if ranks() == 1:
            raise
        reason, status = traceback.format_exc(), 1
    print(f"w2svd: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if ranks() > 1:  # torchrun ends the others, for whom a clean end would wait
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.modules["w2svd"] = sys.modules["__main__"]  # for toy/ to import, also from a renamed copy
    sys.exit(main())
