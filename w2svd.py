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
                    (or the update's before: `reuse` of them share one x_gen)
            x_t   = (1 - sigma) x_gen + sigma eps
            one optimizer step of the fake on |v_fake(x_t, sigma) - (eps - x_gen)|^2
        x_gen   = x_in - sigma_in v_generator(x_in, sigma_in)
        x_t     = (1 - sigma) x_gen + sigma eps                               from here no gradient
        x0_fake = x_t - sigma v_fake(x_t, sigma)
        x0_real = x_t - sigma v_real(x_t, sigma)
        g       = (x0_fake - x0_real) / mean_i |x_gen - x0_real|                                DMD
                + gt_weight (x0_fake - x0_gt) / mean_i |x0_fake - x0_gt|               ground truth
        one optimizer step of the generator along g, the gradient at x_gen
        the generator's moving average follows; samples are made with it

Notation and conventions (B batch, C channels, T frames, H, W; any (B, ...) will do)
    sigma       noise level in [0, 1], float32, 1 is pure noise
    x_t         (1 - sigma) x0 + sigma eps, eps standard normal; x_gen gets a fresh eps and sigma
    v           velocity eps - x0, so x0 = x_t - sigma v, score = -(x_t + (1 - sigma) v) / sigma
    x_in        what the generator reads, at a level sigma_in of the grid: a noised real sample
                (paired), or where few-step sampling from noise has come to (rollout)
    x0_gt       the real sample behind x_in, if there is one; mean_i is over a sample's elements
    velocity(x_t, sigma, cond) -> v    the contract of every model; cond, the text, is handed on
    Elsewhere the roles are called student (generator), teacher (real) and critic (fake).

Commands
    python w2svd.py train  --model toy                      a tiny DiT, checked by an exact answer
    python w2svd.py train  --model hunyuan --data my_clips/ --out runs/mine     one 80 GB GPU
    python w2svd.py encode --model hunyuan --data my_clips/      its first part alone: the latents
    python w2svd.py sample --run runs/mine --prompt "a woman talks" --out talk.mp4
    python w2svd.py export --run runs/mine --format diffusers --out lora/

Where a setting comes from: 'paper' read off the authors' figures; 'author-code' related public
code of the first author, not a release of this paper; 'peer' common in public code of the family;
'ours'. The paper's body, and so its learning rates, rank and batch, were not available to us.

Deviations from the paper, as far as we know it: no discriminator (its figure has one); text is the
only condition (its model also reads a first image); alpha_strong is not printed there, 1 is the
author's later code's; the generator is an adapter by default; denominators, average and optimizer
are peers', the author's later code's or ours; the GT loss is off by default, since it trades motion
for picture quality in the paper's table; on the toy: rollouts, a fake that learns final samples
only, with a weight decay.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import typing
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# NOTE silent: torch reads it when it is imported; without it fragments take 9 GiB at 544x960x129
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint as recompute_in_backward  # noqa: E402

# ---- 1. Config -----------------------------------------------------------------------------------


class Refused(ValueError):
    """What the user asked for cannot be done: one sentence with the cure, and an exit status."""

    def __init__(self, sentence, status=2):
        super().__init__(sentence)
        self.status = status


HUNYUAN = "hunyuanvideo-community/HunyuanVideo"
Kind = Literal["lora", "full"]
Input = Literal["paired", "rollout"]
Schedule = Literal["constant", "linear", "cosine"]
Samples = Literal["all", "final"]
Layers = Literal["all", "attention"]

# Named methods, as rows of settings on top of a preset
#   W2SVD (paper)                          --alpha-weak .25, the default
#   W2SVD with reg. loss (paper)           --gt-weight .05 (author-code) --generator-input paired
#   DMD with a LoRA fake (peer)            --alpha-weak 0
#   DMD2 without its discriminator (peer)  --fake full --generator full
#   DMDR's schedule (peer)                 --alpha-weak .75 --alpha-weak-schedule cosine
#   LCM                                    toy/study/baselines.py, on the toy only


def setting(default, text, group=None):
    """A line of Config: its default, its meaning / where it comes from, the heading it opens."""
    return dataclasses.field(default=default, metadata={"text": text, "group": group})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line and its help are made from these lines."""

    model: Literal["toy", "hunyuan"] = setting("toy", "what to distil / ours", "model and data")
    data: str = setting("", "toy: ring, grid, videos; hunyuan: a folder of clips, or a .txt / ours")
    checkpoint: str = setting(HUNYUAN, "hub id, or a folder in diffusers' format / ours")
    height: int = setting(480, "of a clip in pixels, a multiple of 16 / ours")
    width: int = setting(832, "of a clip in pixels, a multiple of 16 / ours")
    frames: int = setting(61, "of a clip, 4k + 1: 61 or 129 / ours")
    fps: float = setting(24.0, "clips are resampled to it / paper")
    cache: str = setting("", "where latents or the toy's backbones are kept; see README / ours")

    steps: int = setting(4, "evaluations of the finished generator / paper: 4, 1", "the generator")
    shift: float = setting(5.0, "of the few-step grid: 1, .9375, .8333, .625 / author-code")
    generator: Kind = setting("lora", "an adapter, or a whole copy / ours, author-code")
    generator_input: Input = setting("paired", "noised real sample, or from noise / paper, peer")
    ema: float = setting(0.995, "decay of the generator's average, in the end; 0 is off / ours")

    fake: Kind = setting("lora", "full: a copy, real = backbone / paper, peer", "real and fake")
    alpha_weak: float = setting(0.25, "the fake adapter's weight in the real DiT; 0: DMD / paper")
    alpha_weak_schedule: Schedule = setting("constant", "to 0 at half of the run / peer: DMDR")
    alpha_strong: float = setting(1.0, "the fake adapter's weight in the fake DiT / author-code")
    fake_samples: Samples = setting("all", "of a rollout: all levels' or final ones / ours")
    fake_updates: int = setting(5, "for each update of the generator / author-code, peer")
    reuse: int = setting(1, "fake updates that share the generator's samples / ours")
    fake_warmup: int = setting(0, "fake updates before the generator's first one / ours")
    fake_weight_decay: float = setting(0.0, "pulls its adapter to 0, to the backbone / ours")

    gt_weight: float = setting(
        0.0, "ground truth (paper): quality for motion; .05 / author-code", "losses"
    )
    gt_skip_noise: bool = setting(False, "none of it where the input is pure noise / ours")
    guidance: float = setting(1.0, "of the real DiT; 1 is off, which others call 0 / peer")
    embedded_guidance: float = setting(6.0, "read by a guidance-distilled backbone / peer")
    sigma_low: float = setting(0.02, "both losses read x_t at U[low, high], shifted / author-code")
    sigma_high: float = setting(0.98, "see --sigma-low / author-code")
    sigma_shift: float = setting(1.0, "raise for more noise, more global shape / author-code")

    lora_rank: int = setting(64, "of both adapters; their alpha is the rank / ours", "training")
    lora_targets: Layers = setting("all", "linear layers of the blocks that get one / ours")
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


# ring: expect a KL of .09; a minute on 2 CPU cores. Trials, and why shift .5: toy/README.md
TOY = dict(data="ring", generator_input="rollout", fake_samples="final", lora_rank=16, ema=0.98)
TOY |= dict(generator_lr=1e-3, fake_lr=2e-3, lr_schedule="linear", fake_weight_decay=0.1)
TOY |= dict(shift=0.5, reuse=3, batch=1536, iterations=240, log_every=20, save_every=120)
PRESETS = {
    "toy": TOY,
    "toy grid": dict(shift=0.3, batch=1024, iterations=360),  # closer modes, lost at less noise
    # expect a KL of .9; a clip's motion is decided at high noise, hence the shifts
    "toy videos": dict(shift=5.0, sigma_shift=5.0, generator_lr=5e-4, fake_lr=1e-3)
    | dict(batch=64, iterations=350, log_every=25, save_every=175, reuse=5),
    # nothing of the full model was tuned or measured: no number to expect
    "hunyuan": dict(generator_lr=2e-5, fake_lr=2e-5, checkpointing=True, log_every=10),
    "hunyuan captions": dict(generator_input="rollout", fake_samples="final"),
}
MAY_BE_0 = "alpha_weak ema gt_weight guidance embedded_guidance sigma_low fake_warmup seed"
MAY_BE_0 += " fake_weight_decay"
# what --resume may change: it touches no bits, or is said in metrics.jsonl
RESUMABLE = "out data checkpoint cache iterations log_every save_every checkpointing compile"
RESUMABLE += " generator_lr fake_lr"


def check(c: Config):
    """Refuse settings that contradict each other, with the reason."""
    for name, value in dataclasses.asdict(c).items():
        fits = type(value) not in (int, float) or 0 < value < 2**53  # not so: nan
        if not fits and not (value == 0 and name in MAY_BE_0.split()):
            raise Refused(f"--{name.replace('_', '-')} cannot be {value}.")
    if c.alpha_weak > c.alpha_strong:
        raise Refused(f"--alpha-weak must be at most --alpha-strong = {c.alpha_strong}.")
    if c.fake == "full" and (c.alpha_weak or c.fake_weight_decay):
        raise Refused("--fake full has no adapter: no --alpha-weak, no --fake-weight-decay.")
    if not c.sigma_low < c.sigma_high <= 1:
        raise Refused("--sigma-low must be below --sigma-high, and that at most 1.")
    if c.ema >= 1:
        raise Refused(f"--ema must lie in [0, 1), not {c.ema}; 0 is off.")
    if c.gt_weight and (c.generator_input == "rollout" or c.steps == 1):
        raise Refused("--gt-weight needs --generator-input paired and --steps > 1, not pure noise.")
    if c.generator_input == "paired" and c.fake_samples == "final":
        raise Refused("--fake-samples final needs --generator-input rollout: paired learns all.")
    if c.model == "hunyuan":
        check_hunyuan(c)


def check_hunyuan(c: Config):
    if c.data.endswith(".txt") and c.generator_input == "paired":
        raise Refused(f"{c.data} has captions alone, without clips: --generator-input rollout.")
    if c.height % 16 or c.width % 16 or c.frames % 4 != 1 or c.frames < 5:
        raise Refused("--height and --width must be multiples of 16, --frames 4 k + 1: 61, 129.")
    if c.batch != 1 or c.guidance != 1:
        raise Refused("--model hunyuan needs --batch 1 (see --accumulate) and --guidance 1.")
    if c.compile and c.fp8_base:
        raise Refused("--compile does not work on --fp8-base: casting breaks every graph.")


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
    `backbone` has .module, .velocity(x_t, sigma, cond), .lora_targets (a regular expression) and
    .checkpoint_with(function); cond None is unconditional, read only with guidance. A role trained
    in 'full' owns a copy of the backbone whose velocity must run its own .module; with a full fake
    the real DiT is the plain backbone. `alpha_weak` may be changed at any time.
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
            with warnings.catch_warnings(action="ignore"):  # of a second adapter, the method itself
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

    def checkpoint(self, block, *args):
        """block(*args), recomputed in backward under the role of its forward."""
        if not torch.is_grad_enabled():
            return block(*args)
        # NOTE silent: without its context a block is recomputed under whatever role and alpha are
        # active at the time of the backward, and the gradient is wrong by tens of percent
        as_now = functools.partial(self.use, self.role, self.alpha)
        how = {"context_fn": lambda: (nullcontext(), as_now())}  # of the forward, of recomputation
        return recompute_in_backward(block, *args, use_reentrant=False, **how)

    def use_checkpointing(self):
        """Keep only the blocks' inputs for the backward, in every role."""
        for backbone in (self.backbone, *self.copies.values()):
            backbone.checkpoint_with(self.checkpoint)

    def state(self, role):
        """What is trained of 'generator' or 'fake': {name: parameter}, not copies."""
        return self.trained[role]

    def parameters(self, role):
        """The trained parameters of 'generator' or 'fake', a list."""
        return list(self.state(role).values())

    @torch.no_grad()
    def load(self, role, tensors):
        """Copy {name: tensor}, as in state() or in generator.safetensors, into the parameters."""
        ours, theirs = (
            {name.removeprefix("transformer."): x for name, x in named.items()}
            for named in (self.state(role), tensors)
        )
        shapes = [{(name, x.shape) for name, x in named.items()} for named in (ours, theirs)]
        wrong = {name for name, _ in shapes[0] ^ shapes[1]}
        if wrong:
            raise Refused(f"{len(wrong)} weights do not fit the {role}, as {min(wrong)!r}.")
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])

    def base_sum(self):
        """The sum over about eight frozen tensors, to show that they did not move."""
        frozen = [p for p in self.backbone.module.parameters() if not p.requires_grad]
        return sum(float(p.double().sum()) for p in frozen[:: max(1, len(frozen) // 8)])


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


# ---- 5. The discriminator of the paper's figure is not built -------------------------------------


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
    """x_in (B, ...): the real samples x0 noised, each to a random level (B,) of the grid.

    paper: noised real samples (figure). peer: the levels, as in CausVid.
    rngs: torch.Generators 'input', of the noise, and 'exit', of the levels, on x0's device.
    """
    noise = torch.randn(x0.shape, generator=rngs["input"], device=x0.device, dtype=x0.dtype)
    exits = torch.randint(len(sigmas) - 1, (len(x0),), generator=rngs["exit"], device=x0.device)
    sigma_in = sigmas[exits]  # (B,)
    return add_noise(x0, noise, sigma_in), sigma_in


def rollout_input(generator, x0, cond, sigmas, rngs, final=False):
    """x_in (B, ...): where few-step sampling from noise is at a random exit, or the last. peer."""
    # one exit for the batch, as in Self-Forcing; x0 gives the shape only
    noise = torch.randn(x0.shape, generator=rngs["input"], device=x0.device, dtype=x0.dtype)
    level = int(torch.randint(len(sigmas) - 1, (1,), generator=rngs["exit"], device=x0.device))
    if final:  # drawn all the same, so that the stream is the same
        level = len(sigmas) - 2
    x_in = few_step_sample(generator, noise, sigmas[: level + 1], cond, rngs["input"])
    return x_in, sigmas[level].expand(len(x0))


def fake_step(roles, x_gen, cond, sigma, eps):
    """One backward of the fake's loss: it learns to denoise the generator's samples x_gen.

    x_gen, eps (B, ...), without gradient; sigma (B,) the level to which x_gen is noised. The
    gradients add up; the caller owns the optimizer. Returns {'fake_loss'}; FloatingPointError where
    something is not finite.
    """
    require_finite("the generator's sample in the fake update", x_gen, sigma)
    x_t = add_noise(x_gen, eps, sigma)
    with roles.use("fake"):
        v_fake = roles.fake(x_t, sigma, cond)
        require_finite("the fake's velocity", v_fake, sigma)
        loss = fake_loss(v_fake, x_gen, eps)
        loss.backward()
    return {"fake_loss": loss.detach()}


def generator_step(
    roles, x_in, sigma_in, cond, sigma, eps, x0_gt=None, gt_weight=0, gt_skip_noise=0, guidance=1
):
    """One backward of the DMD loss, and the GT loss, through the generator's one evaluation.

    x_in (B, ...) at sigma_in (B,) from paired_input or rollout_input; its sample is noised to sigma
    (B,) with eps (B, ...). With gt_weight, x0_gt is the real sample behind x_in (paired only).
    g is computed without gradient and enters the backward at x_gen. The gradients add up; the
    caller owns the optimizer. Returns detached numbers; FloatingPointError as fake_step.
    """
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
            if gt_weight:
                keep = sigma_in < 1 if gt_skip_noise else torch.ones_like(sigma_in)
                g = g + gt_weight * expand_as(keep, g) * gt_gradient(x0_fake, x0_gt)
            require_finite("the generator's gradient", g, sigma)
        # the gradient of mean(x_gen * stopgrad(g)): DMD2's scale. peer
        # NOTE silent: the learning rate depends on this 1 / numel (in Adam by clipping, epsilon)
        x_gen.backward(g.to(x_gen.dtype) / g.numel())
    v = [at_least_float32(v).flatten(1) for v in (v_fake, v_real)]
    gap = at_least_float32(x0_fake - x0_real).norm() / at_least_float32(x0_real).norm()
    stats = {"relative_gap": gap, "cos_fake_real": torch.cosine_similarity(*v).mean()}
    return stats | moments("gen", x_gen.detach())


def moments(name, x):
    """Mean, std and, of videos (B, C, T, H, W), motion: to hold against the data's."""
    stats = {f"{name}_mean": x.mean(), f"{name}_std": x.std()}
    if x.ndim == 5:
        stats[f"{name}_motion"] = x.diff(dim=2).abs().mean()  # between neighbouring frames
    return stats


def lr_scale(config, iteration):
    """Of both learning rates: 1, or falling linearly to .05 at the end."""
    return 1 - 0.95 * iteration / config.iterations if config.lr_schedule == "linear" else 1.0


def ema_at(config, iteration):
    """The average's decay: it starts low, so that a short run keeps little of its start."""
    # common in EMA code. At a constant .995 the start would weigh .61 after 100 iterations
    return min(config.ema, (1 + iteration) / (10 + iteration))


def alpha_weak_at(config, iteration):
    """alpha_weak of an iteration: constant, or down to 0 at half of the iterations."""
    progress = min(1.0, 2 * iteration / config.iterations)
    falling = {"constant": 1.0, "linear": 1 - progress}
    falling["cosine"] = (1 + math.cos(math.pi * progress)) / 2
    return config.alpha_weak * falling[config.alpha_weak_schedule]


MAX_GRAD_NORM = 1.0  # peer. Gradients are clipped to it, which alone bounds them
FIRST_SEED = 2**32  # of the random streams of training


class State:
    """All that changes in training: optimizers, average, random streams, counts."""

    def __init__(self, config, roles, device):
        self.config, self.roles, self.device = config, roles, device
        self.iteration, self.taken = 0, 0  # updates of the generator; clips read so far
        self.reads = []  # (clip, sigma) of the update at work, for an error to name
        # author-code: betas. No momentum, as the gradients' target moves
        adam = functools.partial(torch.optim.AdamW, betas=(0.0, 0.999), fused=True)
        decay = {"generator": 0.0, "fake": config.fake_weight_decay}
        self.optimizers = {r: adam(roles.parameters(r), weight_decay=decay[r]) for r in decay}
        self.average = {n: p.detach().clone() for n, p in roles.state("generator").items()}
        # far from the small seeds that evaluation and `sample` use
        streams = enumerate("data input exit level noise".split(), FIRST_SEED + 1000 * config.seed)
        self.rngs = {name: torch.Generator(device).manual_seed(i) for i, name in streams}

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

        def exchange():
            for name, parameter in self.roles.state("generator").items():
                parameter.data, self.average[name] = self.average[name], parameter.data

        exchange()
        try:
            yield self.roles.generator
        finally:
            exchange()

    def tensors(self):
        """Everything as one flat {name: tensor}, for a checkpoint."""
        flat = {f"average/{name}": x for name, x in self.average.items()}
        flat |= {f"rng/{name}": rng.get_state() for name, rng in self.rngs.items()}
        for role, optimizer in self.optimizers.items():
            for name, parameter in self.roles.state(role).items():
                flat[f"{role}/{name}"] = parameter
                for slot, x in optimizer.state[parameter].items():
                    flat[f"optimizer/{role}/{name}/{slot}"] = x
        return flat

    @torch.no_grad()
    def restore(self, flat, iteration, taken):
        """The inverse of tensors(), and the counts."""
        self.iteration, self.taken = iteration, taken
        for name, x in self.average.items():
            x.copy_(flat[f"average/{name}"])
        for name, rng in self.rngs.items():
            rng.set_state(flat[f"rng/{name}"])
        for role, optimizer in self.optimizers.items():
            for name, parameter in self.roles.state(role).items():
                parameter.copy_(flat[f"{role}/{name}"])
                for slot in ("step", "exp_avg", "exp_avg_sq"):
                    x = flat[f"optimizer/{role}/{name}/{slot}"]
                    optimizer.state[parameter][slot] = x.to(parameter.device, copy=True)


def micro_batches(config, state, data):
    """What one update reads, `accumulate` times: a name, x0 (B, ...), cond."""
    state.reads = []
    for _ in range(config.accumulate):
        batch = next(data)
        name, x0 = batch.get("name", "a batch"), batch["x0"]
        state.taken += len(x0)
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
    """A batch of the generator's samples for the fake: its name, x_gen (B, ...), cond."""
    final = config.fake_samples == "final"
    x_in, sigma_in = generator_input(config, roles, state, x0, cond, final)
    return name, x0_from_velocity(x_in, roles.generator(x_in, sigma_in, cond), sigma_in), cond


def losses_noise(config, state, x, name):
    """The level sigma (B,) to which x (B, ...) is noised for a loss, and the noise eps (B, ...)."""
    low, high, shift = config.sigma_low, config.sigma_high, config.sigma_shift
    sigma = sample_sigma(len(x), low, high, shift, state.rngs["level"])
    state.reads.append((name, sigma))
    rng = state.rngs["noise"]
    return sigma, torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


def mean_of(stats):
    """The mean of dictionaries of numbers, over the forwards of an update."""
    return {name: sum(one[name] for one in stats) / len(stats) for name in stats[0]}


def distil(config, roles, state, data):
    """Algorithm 1: every next() is one iteration, and yields its numbers, detached.

    data: an iterator of batches {'x0': (B, ...), 'cond': ..., 'name': ...}. All that has to be kept
    between two iterations is in `state`; logging, files and signals are the caller's.
    """
    terms = {n: getattr(config, n) for n in ("gt_weight", "gt_skip_noise", "guidance")}
    run = config, roles, state
    while state.iteration < config.iterations:
        roles.alpha_weak = alpha_weak_at(config, state.iteration)
        lr = lr_scale(config, state.iteration)
        warmup = config.fake_warmup if state.iteration == 0 else 0

        for k in range(warmup + config.fake_updates):  # the fake learns the generator's samples
            if k % config.reuse == 0:
                samples = [generated(*run, *batch) for batch in micro_batches(config, state, data)]
            state.reads, fake_stats = [], []  # of the last update they are yielded
            for name, x_gen, cond in samples:
                sigma, eps = losses_noise(config, state, x_gen, name)
                fake_stats.append(fake_step(roles, x_gen, cond, sigma, eps))
            fake_norm = state.update("fake", lr * config.fake_lr)

        stats = []
        for name, x0, cond in micro_batches(config, state, data):  # one of the generator
            x_in, sigma_in = generator_input(*run, x0, cond)
            noise = losses_noise(config, state, x0, name)
            step = generator_step(roles, x_in, sigma_in, cond, *noise, x0_gt=x0, **terms)
            stats.append(step | moments("data", x0))
        norm = state.update("generator", lr * config.generator_lr)
        state.update_average()

        state.iteration += 1
        norms = {"fake_grad_norm": fake_norm, "grad_norm": norm}
        yield mean_of(fake_stats) | mean_of(stats) | norms | {"alpha_weak": roles.alpha_weak}


# ---- 7. HunyuanVideo (13B) by diffusers ----------------------------------------------------------
class HunyuanVideo:
    """diffusers' HunyuanVideoTransformer3DModel behind the contract of Roles."""

    prompt_template = None  # the pipeline's own; or {"template": "...{}...", "crop_start": tokens}
    # every linear layer of the blocks but adaLN's: 4.30 M parameters for each unit of rank at 13B
    ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    MLP = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"

    def __init__(self, module, dtype, embedded_guidance=6.0, lora_targets="all"):
        self.module, self.dtype, self.guidance = module, dtype, embedded_guidance
        layers = f"{self.ATTENTION}|{self.MLP}" if lora_targets == "all" else self.ATTENTION
        self.lora_targets = rf"(single_)?transformer_blocks\.\d+\.({layers})"
        self.blocks = [*module.transformer_blocks, *module.single_transformer_blocks]
        for block in self.blocks:
            block.register_forward_pre_hook(self.without_mask)

    @staticmethod
    def without_mask(_, args):
        """Text comes trimmed, so nothing is masked; a mask would rule out flash attention."""
        assert args[3] is None or args[3].dtype == torch.bool, "diffusers' blocks have changed"
        return (*args[:3], None, *args[4:])

    def checkpoint_with(self, function):
        self.module.enable_gradient_checkpointing(function)

    def velocity(self, x_t, sigma, cond):
        """x_t: latents (B, C, T, H, W); cond: prompt_embeds (B, L, D), trimmed; pooled (B, P)."""
        text = cond["prompt_embeds"].to(self.dtype)
        guidance = torch.full((len(x_t),), self.guidance, dtype=self.dtype, device=x_t.device)
        device = x_t.device.type.replace("meta", "cpu")  # the meta device knows no autocast
        # NOTE silent: without autocast the float32 adapters would compute in float32
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            v = self.module(
                hidden_states=x_t.to(self.dtype),
                timestep=1000 * sigma.float(),  # NOTE silent: bf16 would round 954.5 to 956
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x_t.device),
                pooled_projections=cond["pooled"].to(self.dtype),
                guidance=guidance * 1000,  # 6000 becomes 6016 in bf16, as in diffusers
                return_dict=False,
            )[0]
        return v.to(x_t.dtype)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@contextmanager
def reading(checkpoint):
    """What diffusers cannot read inside is refused in one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise Refused(f"--checkpoint {checkpoint} is no HunyuanVideo: {reason}") from error


def load_pipeline(checkpoint, without):
    """diffusers' pipeline of the checkpoint; the parts named in `without` stay unread."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # its bars would cut through ours
    how = {"dtype": torch.bfloat16 if DEVICE == "cuda" else torch.float32, "use_safetensors": True}
    load = diffusers.HunyuanVideoPipeline.from_pretrained
    with reading(checkpoint):
        pipe = load(checkpoint, **how, **dict.fromkeys(without)).to(DEVICE)
    if pipe.vae:
        pipe.vae.enable_tiling()
    return pipe


@torch.no_grad()
def encode_text(pipe, caption):
    """prompt_embeds (1, L, D), trimmed to the L tokens that count, and pooled (1, P)."""
    own = HunyuanVideo.prompt_template
    embeds, pooled, mask = pipe.encode_prompt(caption, **({"prompt_template": own} if own else {}))
    return {"prompt_embeds": embeds[:, mask[0].bool()], "pooled": pooled}


# ---- 8. Files and data ---------------------------------------------------------------------------
@contextmanager
def atomic_write(path):
    """A name to write to, which becomes `path` at the end; a failure leaves `path` as it was."""
    part = path.with_name(f".part-{path.name}")
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata | {"w2svd": json.dumps(info, sort_keys=True)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} cannot be written: {error}") from error


def read_safetensors(path):
    """Back: (tensors, info). A file that is missing, damaged or not ours is refused."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {})["w2svd"])
            return {name: file.get_tensor(name) for name in file.keys()}, info
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise Refused(f"{path} is missing, damaged or not of w2svd ({error}).") from error


READING = 1  # raised whenever reading or encoding changes: latents made before are made again
FILMS = (".mp4", ".mov", ".webm", ".mkv", ".avi")
EXAMPLE = "python w2svd.py train --model hunyuan --data my_clips/"
LAYOUTS = "a.mp4 with a.txt, metadata.jsonl or .csv (file_name, text), videos.txt with prompt.txt"
# No playlist, which would read other files or a network: ffmpeg guesses the format from the content
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif"
FFMPEG_FLAGS = ["-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-timelimit", "600"]


def read_lines(path):
    """The lines of a text that are not empty; Excel begins a file with a mark."""
    return [x.strip() for x in path.read_text(encoding="utf-8-sig").split("\n") if x.strip()]


def find_clips(data):
    """[(path, caption)] of a folder, [(None, caption)] of a .txt; {name: reason} of other files."""
    jsonl, table = data / "metadata.jsonl", data / "metadata.csv"
    videos, prompts, known = data / "videos.txt", data / "prompt.txt", set()
    try:
        if data.is_file() and data.suffix == ".txt":
            return [(None, caption) for caption in read_lines(data)], {}
        found = sorted(path for path in data.iterdir() if not path.name.startswith("."))
        if jsonl.exists():
            known = {jsonl}
            rows = [json.loads(line) for line in read_lines(jsonl)]
        elif table.exists():
            known = {table}
            text = io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")
            rows = list(csv.DictReader(text))
        elif videos.exists():
            known = {videos, prompts}
            both = zip(read_lines(videos), read_lines(prompts), strict=True)
            rows = [{"file_name": name, "text": text} for name, text in both]
        else:
            films = [path for path in found if path.suffix.lower() in FILMS]
            rows = [{"file_name": path.name, "text": path.with_suffix(".txt")} for path in films]
        clips = [(data / row["file_name"].strip(), row["text"] or "") for row in rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise Refused(f"--data {data} cannot be read ({error}); it needs {LAYOUTS}.") from error
    known |= {p for path, _ in clips for p in (path, path.with_suffix(".txt"))}
    return clips, {p.name: "no clip, nor a caption of one" for p in found if p not in known}


def read_clip(path, config):
    """The first frames of a film, resampled, cropped, resized: (1, 3, T, H, W) in [-1, 1]."""
    import imageio.v3 as iio

    w, h = config.width, config.height
    # cropped before it is scaled: a picture of 8000 x 2 would be scaled to 192,000 x 48
    crop = f"crop=max(1\\,min(iw\\,ih*{w}/{h})):max(1\\,min(ih\\,iw*{h}/{w}))"
    fit = ["-vf", f"fps={config.fps},{crop},scale={w}:{h}"]
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it tells every change of size
    # the whole path, or a name like 'concat:a' would be read as a protocol
    film = iio.imiter(path.resolve(), plugin="FFMPEG", input_params=FFMPEG_FLAGS, output_params=fit)
    frames = [torch.from_numpy(frame) for frame in itertools.islice(film, config.frames)]
    if len(frames) < config.frames:
        raise ValueError(f"too short: {len(frames)} of {config.frames} frames, {config.fps:g} fps")
    return torch.stack(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


@torch.no_grad()
def encode_clip(pipe, video, caption):
    """Text and, of a video (1, 3, T, H, W), scaled latents (C, T, H, W), without a batch."""
    tensors = encode_text(pipe, caption)
    if video is not None:
        vae = pipe.vae.float()  # bf16 would round the latents
        latents = vae.encode(video.to(pipe.device)).latent_dist.mode()
        tensors["latents"] = latents.float() * pipe.vae.config.scaling_factor
    for name, x in tensors.items():
        if not x.isfinite().all() or not x.numel():
            raise ValueError(f"its {name} are empty or not finite")
    return {name: x[0] for name, x in tensors.items()}


def latents_file(config, path, caption):
    """Where a clip's latents and text are kept: a name that hashes all that they depend on."""
    data, checkpoint = Path(config.data), Path(config.checkpoint)
    parts = [READING, caption, config.checkpoint, HunyuanVideo.prompt_template]
    encoders = sorted(checkpoint.glob("vae/*")) + sorted(checkpoint.glob("text_encoder*/*"))
    for file in [*encoders, *([path] if path else [])]:
        stat = file.stat()
        parts += [file.name, stat.st_size, stat.st_mtime_ns]
    if path:
        parts += [os.path.relpath(path, data)]
        parts += [config.height, config.width, config.frames, config.fps]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = Path(config.cache or (data if path else data.parent) / ".w2svd").expanduser()
    return folder / f"{path.stem[:40] if path else 'caption'}-{digest}.safetensors"


def usable_clips(config):
    """{file of latents: (name, path, caption)} of the clips, and {name: reason} of the others."""
    clips, left_out = find_clips(Path(config.data))
    files = {}
    for path, caption in clips:
        name = os.path.relpath(path, config.data) if path else caption
        try:
            if isinstance(caption, Path):  # read here: a bad one leaves out its clip alone
                caption = " ".join(read_lines(caption))
            caption = caption.strip()
            file = latents_file(config, path, caption)
            if not caption or file in files:
                raise ValueError("it is listed twice" if caption else "it has no caption")
            files[file] = name, path, caption
        except FileNotFoundError as error:
            left_out[name] = f"there is no {Path(error.filename).name}"
        except (OSError, ValueError, AttributeError) as error:
            left_out[name] = str(error)
    return files, left_out


def encoded_clips(config):
    """The files of all clips that can be used, encoded where they are missing; says what is not."""
    if not config.data:
        raise Refused(f"Name a folder of your clips, {LAYOUTS}: {EXAMPLE}")
    from diffusers.training_utils import free_memory
    from tqdm import tqdm

    files, left_out = usable_clips(config)
    missing = [file for file in files if not file.exists()]
    pipe = None  # read once there is something to encode
    for file in tqdm(missing, desc="encode", unit="clip") if missing else ():
        name, path, caption = files[file]
        try:
            video = read_clip(path, config) if path else None
            pipe = pipe or load_pipeline(config.checkpoint, ("transformer",))
            tensors = encode_clip(pipe, video, caption)
        except (Refused, ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each clip is an island: the others go on
            left_out[name] = (str(error).strip().splitlines() or [repr(error)])[-1]
            del files[file]
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(file, tensors, {"source": name, "caption": caption})
    del pipe
    free_memory()
    made = sum(file in files for file in missing)
    print(f"{config.data}: {len(files)} clips, {made} encoded now")
    for name, reason in left_out.items():
        print(f"  left out, {name}: {reason}")
    if not files:
        raise Refused(f"No clip of {config.data} can be used; it needs {LAYOUTS}.", status=1)
    return list(files)


# A task is a model and its data. It has .backbone (see Roles), whose weights come with .load();
# .device; .shape of a sample; .clips, their files; .batches(rng, taken), endless {'x0': (B, ...),
# 'cond', 'name'} from the clip of that number on; .prepare() for what must follow the adapters;
# .costs(...) for the plan; .on_log(step, generator) for pictures on the way; .finish(run) ->
# (result, table); .sample(...), behind the command of that name.


class HunyuanTask:
    """HunyuanVideo and a folder of clips, as a task."""

    device = DEVICE

    def __init__(self, config):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        Model = diffusers.HunyuanVideoTransformer3DModel
        self.config, self.Model, found = config, Model, {}  # the released model: all defaults
        if config.checkpoint != HUNYUAN:
            with reading(config.checkpoint):
                found = Model.load_config(config.checkpoint, subfolder="transformer")
        name = found.get("_class_name", Model.__name__)
        if name != Model.__name__ or found.get("image_condition_type"):
            raise Refused(f"--checkpoint {config.checkpoint} is no text-to-video HunyuanVideo.")
        with torch.device("meta"):  # shapes and no numbers, for the plan
            self.wrap(Model.from_config(found).bfloat16(), torch.bfloat16)
        channels = self.backbone.module.config.in_channels
        # the VAE takes 4 frames and 8 x 8 pixels into one
        self.shape = (channels, config.frames // 4 + 1, config.height // 8, config.width // 8)

    def wrap(self, module, dtype):
        c = self.config
        self.backbone = HunyuanVideo(module, dtype, c.embedded_guidance, c.lora_targets)

    def load(self):
        """Encode what is missing, then read the weights."""
        if DEVICE == "cpu" and self.backbone.module.num_parameters() > 1e9:
            raise Refused(f"HunyuanVideo needs a GPU and torch finds none; on a GPU: {EXAMPLE}")
        self.clips = encoded_clips(self.config)
        self.load_weights()

    def load_weights(self):
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        how = {"subfolder": "transformer", "dtype": dtype, "use_safetensors": True}
        with reading(self.config.checkpoint):
            module = self.Model.from_pretrained(self.config.checkpoint, **how)
        self.wrap(module.to(DEVICE, dtype).requires_grad_(False), dtype)

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
        try:
            tensors, _ = read_safetensors(clip)
        except Refused as error:
            raise Refused(f"{error} Delete it: --resume makes it again.") from error
        cond = {name: x[None].to(DEVICE) for name, x in tensors.items()}
        x0 = cond.pop("latents", torch.zeros(1, *self.shape, device=DEVICE))
        return {"x0": x0, "cond": cond, "name": clip.name}

    def batches(self, rng, taken=0):
        """Each clip once an epoch, in an order of its own, from seed and epoch; endless."""
        for count in itertools.count(taken):
            epoch, place = divmod(count, len(self.clips))
            order = torch.Generator().manual_seed((1_000_003 * self.config.seed + epoch) % 2**63)
            permutation = torch.randperm(len(self.clips), generator=order)
            yield self.read(self.clips[permutation[place]])

    def costs(self, forwards, backwards, generator, fake):
        """Memory, time and disk by formulas: simulated or published figures, nothing measured."""
        c, m, GiB = self.config, self.backbone.module.config, 2**30
        n, width = len(self.backbone.blocks), m.num_attention_heads * m.attention_head_dim
        tokens = math.prod(self.shape[1:]) // m.patch_size**2 // m.patch_size_t + 256
        base = [p for p in self.backbone.module.parameters() if not p.requires_grad]
        host = sum(p.nbytes for p in base) / GiB
        if c.fp8_base:
            self.backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        one = 2 * tokens * width / GiB  # a block's bf16 tensor; its backward keeps 37.2
        memory = {
            "backbone, frozen": sum(p.nbytes for p in base) / GiB,
            "generator and fake, float32": 4 * (generator + fake) / GiB,
            "Adam, average": (8 * (generator + fake) + 4 * generator) / GiB,
            "gradients": 4 * max(generator, fake) / GiB,
            "inputs of the blocks": n * one if c.checkpointing else 0.0,
            "a block, recomputed": 37.2 * one if c.checkpointing else n * 37.2 * one,
            "CUDA, fragments": 1.6,  # with expandable segments
        }
        # PFLOP of a forward. A backward takes as much in frozen linear layers, and 2.5 times as
        # much in attention, whose kernel recomputes a product; checkpointing one more forward
        linear = 2 * tokens * n * (4 + 2 * m.mlp_ratio) * width**2 / 1e15
        attention = 4 * tokens**2 * width * n / 1e15
        forwards += backwards * (1 + c.checkpointing)
        linear *= c.accumulate * (forwards + backwards)
        attention *= c.accumulate * (forwards + 2.5 * backwards)
        # on an H100 in TFLOP/s, published: 650 in large products, 350 in FlashAttention-2
        seconds = linear * 1e3 / 650 + attention * 1e3 / 350
        saves = 2 if c.generator == "full" else c.iterations // c.save_every
        # two checkpoints and the one being written; the generators
        saved = 3 * (4 * generator + 3 * fake) + (saves + 1) * generator
        return {
            "GPU memory, GiB": memory,
            "in all, GiB": sum(memory.values()),
            "hours on one H100": seconds * c.iterations / 3600,
            "seconds an iteration": seconds,
            "PFLOP an iteration": linear + attention,
            "disk for the run, GiB": 4 * saved / GiB,
            "download, once, GB": 42 if c.checkpoint == HUNYUAN else 0,
            "host memory while loading, GiB": host,
            "tokens": tokens,
        }

    def film(self, path, velocity, sigmas, cond, seed, euler=False):
        """Sample a video and write it as .mp4; the seed decides it. The VAE comes and goes."""
        import imageio.v3 as iio

        rng = torch.Generator(DEVICE).manual_seed(seed)
        noise = torch.randn(1, *self.shape, generator=rng, device=DEVICE)
        given = velocity, noise, sigmas, cond
        x0 = euler_sample(*given) if euler else few_step_sample(*given, rng)
        pipe = load_pipeline(self.config.checkpoint, (*TEXT, "transformer"))
        with torch.no_grad():
            x0 = x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
            frames = pipe.vae.decode(x0, return_dict=False)[0]
        if not frames.isfinite().all():
            raise Refused("The sampled video is not finite; nothing is written.")
        frames = pipe.video_processor.postprocess_video(frames, output_type="np")[0]
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:  # frames (T', H', W', 3) in [0, 1]
            video = (frames * 255).round().astype("uint8")
            iio.imwrite(part, video, plugin="FFMPEG", fps=self.config.fps)

    def on_log(self, step, generator):
        """At every save: the first clip's caption, always from the same noise."""
        c = self.config
        if step % c.save_every == 0 or step == c.iterations:
            cond, sigmas = self.read(self.clips[0])["cond"], few_step_sigmas(c.steps, c.shift)
            self.film(Path(c.out) / f"samples/{step:06}.mp4", generator, sigmas, cond, c.seed)

    def finish(self, run):
        """No exact answer here: the last logged numbers."""
        last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        table = f'now: python w2svd.py sample --run {run.folder} --prompt "..." --out video.mp4'
        return {"student": last | {"steps": run.config.steps}}, table

    def sample(self, tensors, info, out, seed, prompt="", lora_scale=1.0, compare=False):
        """A video of the prompt; with `compare` one of the backbone's 28 steps beside it."""
        from diffusers.training_utils import free_memory

        if not prompt.strip() or out.suffix != ".mp4":
            raise Refused("Name a --prompt, and an .mp4 as --out.")
        if info["kind"] == "full" and lora_scale != 1:
            raise Refused("--lora-scale is an adapter's; this generator was trained in full.")
        pipe = load_pipeline(self.config.checkpoint, ("transformer", "vae"))
        cond = encode_text(pipe, prompt)
        del pipe
        free_memory()  # before the transformer comes
        self.load_weights()
        velocity = self.backbone.velocity
        if compare:  # before the generator is in; 7 is the released shift
            beside, sigmas = out.with_stem(f"{out.stem}-28-steps"), few_step_sigmas(28, 7.0)
            self.film(beside, velocity, sigmas, cond, seed, euler=True)
        if info["kind"] == "full":
            self.backbone.module.load_state_dict(tensors)
        else:
            roles = Roles(self.backbone, info["rank"], 0.0, 1.0)
            scaled = {n: lora_scale * x if "lora_B" in n else x for n, x in tensors.items()}
            roles.load("generator", scaled)
            velocity = roles.generator
        self.film(out, velocity, torch.tensor(info["sigmas"]), cond, seed)
        return f"wrote {out}" + f" and {out.stem}-28-steps.mp4" * compare


# ---- 9. Training ---------------------------------------------------------------------------------
def load_task(config):
    """The model and data that `config` names, as a task."""
    if config.model == "toy":
        import toy

        return toy.task(config)
    return HunyuanTask(config)


def memory_mb(device):
    """Peak memory in MB so far: of the process on a CPU, of torch's allocations on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def commit():
    """The git commit of this file, for config.json; or git's word on why there is none."""
    return subprocess.getoutput(f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD")


def plan(config, task):
    """What a run takes: its costs first, then the numbers that follow from the config."""
    backbone = sum(p.numel() for p in task.backbone.module.parameters())
    with torch.device("meta"):  # nothing is loaded yet; load() brings one without these adapters
        roles = Roles(task.backbone, config.lora_rank, 0.0, 1.0, config.generator, config.fake)
    once = (config.steps - 1) / 2 if config.generator_input == "rollout" else 0  # the mean exit
    fake_once = 2 * once if config.fake_samples == "final" else once
    draws = math.ceil(config.fake_updates / config.reuse)  # of the fake's samples
    forwards = draws * (1 + fake_once) + once + 2 + (config.guidance != 1)
    backwards = config.fake_updates + 1
    trained = [sum(p.numel() for p in roles.parameters(r)) for r in ("generator", "fake")]
    names = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return task.costs(forwards, backwards, *trained) | {
        "backbone_parameters": backbone,
        "generator_parameters": trained[0],
        "fake_parameters": trained[1],
        "forwards an iteration": {"without gradient": forwards, "with gradient": backwards},
        "sample_shape": list(task.shape),
        "sigmas": few_step_sigmas(config.steps, config.shift).tolist(),
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
    try:
        return Config(**json.loads((Path(folder) / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{folder} is not a run folder of this version ({error}).") from error


def save_generator(path, config, state, base_sum):
    """The average in float32 under diffusers' names; the header has all that sampling needs."""
    names = "model data checkpoint steps shift alpha_weak alpha_strong guidance".split()
    info = {name: getattr(config, name) for name in (*names, "embedded_guidance", "seed")}
    info |= {"kind": config.generator, "rank": config.lora_rank, "lora_alpha": config.lora_rank}
    info |= {"sigmas": few_step_sigmas(config.steps, config.shift).tolist()}
    info |= {"step": state.iteration, "base_sum": base_sum}
    prefix = "transformer." if config.generator == "lora" else ""
    write_safetensors(path, {prefix + name: x for name, x in state.average.items()}, info)


def save(folder, config, state, base_sum, clips):
    """Write the generator, and a checkpoint to resume from, of which the newest two stay."""
    step = f"{state.iteration:06}.safetensors"
    save_generator(folder / f"generator-{step}", config, state, base_sum)
    info = {"iteration": state.iteration, "taken": state.taken, "base_sum": base_sum}
    info |= {"rates": {n: getattr(config, n) for n in ("generator_lr", "fake_lr")}, "clips": clips}
    info |= {"metrics_bytes": (folder / "metrics.jsonl").stat().st_size}
    write_safetensors(folder / f"checkpoint-{step}", state.tensors(), info)
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
        state.restore(tensors, info["iteration"], info["taken"])
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
        if stop:
            os._exit(128 + number)
        stop.append(number)

    with ExitStack() as at_the_end:  # the handlers before come back
        for number in (signal.SIGTERM, signal.SIGINT):
            at_the_end.callback(signal.signal, number, signal.signal(number, note))
        yield stop


def as_floats(iterations, state):
    """The numbers of each iteration as floats, with the samples' std and motion by the data's."""
    try:
        for stats in iterations:
            line = {name: float(x) for name, x in stats.items()}
            known = [n for n in ("std", "motion") if line.get(f"data_{n}")]  # 0: captions alone
            line |= {f"{n}_ratio": line[f"gen_{n}"] / line[f"data_{n}"] for n in known}
            yield line
    except FloatingPointError as error:
        clips = [f"{clip} at {s.min():.4f} to {s.max():.4f}" for clip, s in state.reads]
        where = f"in iteration {state.iteration + 1}: {error}"
        where += f"; it read {', '.join(clips)}" if clips else ""
        cure = "go on from the last checkpoint with --resume and lower rates"
        raise Refused(f"Stopped {where}; {cure}, or without that clip.") from error


def check_memory(config, numbers, gpu_memory):
    """Refuse a run that does not fit into the GPU here, or into as many GiB as were named."""
    room = gpu_memory or (torch.cuda.mem_get_info()[1] / 2**30 if DEVICE == "cuda" else 0.0)
    need = numbers.get("in all, GiB", 0.0)
    if need > room > 0:
        cure = "fewer --frames, a smaller --height and --width"
        cure += "" if config.fp8_base else ", --fp8-base"
        cure += "" if config.checkpointing else ", --checkpointing"
        raise Refused(f"{need:.1f} GiB do not fit into {room:.1f}; less need {cure}.", status=1)


def train(config, resume=False, dry_run=False, gpu_memory=0.0):  # noqa: C901
    """Distil: the whole run, from the backbone to result.json. Returns the run's folder."""
    from tqdm import tqdm

    started, folder = time.perf_counter(), Path(config.out)
    task = load_task(config)
    numbers = plan(config, task)
    show({"plan": numbers, "config": dataclasses.asdict(config)})
    check_memory(config, numbers, gpu_memory)
    if dry_run:
        return None
    task.load()
    folder.mkdir(parents=True, exist_ok=True)
    for half in [*folder.rglob(".tmp*"), *folder.rglob(".part-*")]:  # of a save that was killed
        half.unlink()
    torch.manual_seed(config.seed)
    alphas = config.alpha_weak, config.alpha_strong
    roles = Roles(task.backbone, config.lora_rank, *alphas, config.generator, config.fake)
    if config.checkpointing:
        roles.use_checkpointing()
    task.prepare()
    state, base_sum = State(config, roles, task.device), roles.base_sum()
    clips = [clip.name for clip in task.clips]
    before = restore(folder, state, base_sum, clips) if resume else {}
    if state.iteration > config.iterations:
        raise Refused(f"{folder} has {state.iteration} iterations; --iterations cannot be less.")
    write_json(folder / "config.json", {"config": dataclasses.asdict(config), "plan": numbers})
    log = open(folder / "metrics.jsonl", "a")
    log.truncate(min(before.get("metrics_bytes", 0), os.path.getsize(log.name)))
    rates = {n: [then, getattr(config, n)] for n, then in before.get("rates", {}).items()}
    changed = {name: pair for name, pair in rates.items() if pair[0] != pair[1]}
    if changed and state.iteration < config.iterations:
        print(json.dumps({"step": state.iteration, "changed": changed}), file=log, flush=True)

    def picture():
        with state.averaged() as generator:
            task.on_log(state.iteration, generator)

    def due(every):
        return state.iteration == config.iterations or state.iteration % every == 0

    if before:  # it comes after that checkpoint, and may be missing
        picture()
    data, tick = task.batches(state.rngs["data"], state.taken), time.perf_counter()
    bar = tqdm(total=config.iterations, initial=state.iteration, desc="distil", unit="it")
    with log, bar, signals() as stop:
        for line in as_floats(distil(config, roles, state, data), state):
            line["seconds"] = time.perf_counter() - tick
            line["memory_mb"] = memory_mb(task.device)
            bar.set_postfix(None, False, loss=line["fake_loss"], gap=line["relative_gap"])
            bar.update()
            if due(config.log_every):
                print(json.dumps({"step": state.iteration, **line}), file=log, flush=True)
            if due(config.save_every) or stop:
                save(folder, config, state, base_sum, clips)
            if due(config.log_every) or due(config.save_every):
                picture()  # last, as it may fail
            if stop:
                raise KeyboardInterrupt(stop[0])
            tick = time.perf_counter()
    if roles.base_sum() != base_sum:
        raise RuntimeError("the frozen backbone moved; a bug, since nothing may train it")
    save_generator(folder / "generator.safetensors", config, state, base_sum)
    with state.averaged() as generator:
        run = SimpleNamespace(folder=folder, config=config, generator=generator)
        result, table = task.finish(run)
    result |= {"seconds": time.perf_counter() - started, "peak_rss_mb": memory_mb("cpu")}
    write_json(folder / "result.json", result | {"seed": config.seed})
    print(table)
    return folder


# ---- 10. Sample, export, command line ------------------------------------------------------------
def read_generator(run, at=None):
    """The tensors and the header of a run's generator: the newest, or that of iteration `at`."""
    saved = sorted(Path(run).glob("generator-*.safetensors"))
    path = saved[-1] if saved else Path(run) / "generator.safetensors"
    if at is not None:
        path = Path(run) / f"generator-{at:06}.safetensors"
    if not path.exists():
        steps = ", ".join(str(int(p.stem[-6:])) for p in saved) or "none"
        raise Refused(f"There is no {path}; saved iterations, for --at: {steps}.")
    return read_safetensors(path)


def sample(run, out, seed, at=None, **given):
    """Draw samples of a run's generator, with the grid of its header, into `out`."""
    config, out = read_run(run), Path(out)
    if not 0 <= seed < 2**53:
        raise Refused(f"--seed cannot be {seed}.")
    if not out.parent.is_dir():
        raise Refused(f"{out.parent} is not a folder; make it, or name another --out.")
    task, generator = load_task(config), read_generator(run, at)
    wrong = set(given) - ({"n"} if config.model == "toy" else {"prompt", "lora_scale", "compare"})
    if wrong:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
        raise Refused(f"{flags} does not fit {run}, a run of --model {config.model}.")
    print(task.sample(*generator, out, seed, **given))


CARD = """---
base_model: {checkpoint}
library_name: diffusers
license: other
tags: [text-to-video, step-distillation, w2svd]
---
# A {steps}-step HunyuanVideo, distilled by W2SVD (arXiv 2503.13319)

For {format}. Generator: {kind}, rank {rank}; {step} updates, seed {seed}, alpha_weak {alpha_weak}.
The base model's licence goes for these weights. {use}
"""
DIFFUSERS = """With diffusers, on a GPU:

    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
    from diffusers.utils import export_to_video
    pipe = HunyuanVideoPipeline.from_pretrained("{checkpoint}", dtype=torch.bfloat16).to("cuda")
    {load}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    pipe.vae.enable_tiling()
    torch.manual_seed(0)  # the renoising draws from torch's global generator
    video = pipe("a woman talks", sigmas={path}, guidance_scale={embedded_guidance},
                 height={height}, width={width}, num_frames={frames},
                 generator=torch.Generator().manual_seed(0)).frames[0]
    export_to_video(video, "talk.mp4", fps={fps:g})"""
MERGED = """from diffusers import HunyuanVideoTransformer3DModel as Model
    pipe.transformer = Model.from_pretrained("this folder", dtype=torch.bfloat16).to("cuda")"""
USE = {
    "diffusers": DIFFUSERS.replace("{load}", 'pipe.load_lora_weights("this folder")'),
    "comfyui": "In ComfyUI: LoraLoaderModelOnly at strength 1, ManualSigmas {sigmas}, sampler lcm, "
    "BasicGuider with FluxGuidance {embedded_guidance}, SamplerCustomAdvanced. Not for diffusers.",
    "merged": DIFFUSERS.replace("{load}", MERGED),
}
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


def to_comfyui(tensors, mlp):
    """The adapter under the original names. Fused layers: A stacked, B block-diagonal, exact.

    mlp: rows of proj_mlp, which stay 0 in linear1 where the adapter leaves that part alone.
    """
    converted = {}
    for kind, i in sorted({tuple(name.split(".")[1:3]) for name in tensors}):
        theirs = "single_blocks" if kind.startswith("single") else "double_blocks"
        for layer, parts in (SINGLE if kind.startswith("single") else DOUBLE).items():
            names = [f"transformer.{kind}.{i}.{part}" for part in parts]
            names = [name for name in names if f"{name}.lora_A.weight" in tensors]
            if not names:
                continue
            A, B = ([tensors[f"{name}.lora_{x}.weight"] for name in names] for x in "AB")
            if len(names) < len(parts):
                B.append(torch.zeros(mlp, 0))
            converted[f"diffusion_model.{theirs}.{i}.{layer}.lora_A.weight"] = torch.cat(A)
            converted[f"diffusion_model.{theirs}.{i}.{layer}.lora_B.weight"] = torch.block_diag(*B)
    return converted


def export(run, format, out, at=None):
    """Write a run's generator for diffusers, ComfyUI or as a whole transformer, with a card."""
    config, (tensors, info), out = read_run(run), read_generator(run, at), Path(out)
    if config.model != "hunyuan":
        raise Refused(f"Only runs of --model hunyuan are exported, not of {config.model}.")
    if info["kind"] == "full" and format != "merged":
        raise Refused("A generator trained in full is no LoRA: use --format merged.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is in use: name a new folder as --out.")
    task = load_task(config)
    out.mkdir(parents=True, exist_ok=True)
    if format == "merged":
        pipe = load_pipeline(config.checkpoint, (*TEXT, "vae"))
        if info["kind"] == "full":
            pipe.transformer.load_state_dict(tensors)
        else:
            pipe.load_lora_weights(dict(tensors))
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        pipe.transformer.save_pretrained(out)
        for file in out.glob("*.safetensors"):  # which diffusers keeps from everybody else
            file.chmod((out / "config.json").stat().st_mode)
    elif format == "comfyui":
        mlp = task.backbone.module.single_transformer_blocks[0].proj_mlp.out_features
        write_safetensors(out / "w2svd_comfyui.safetensors", to_comfyui(tensors, mlp), info)
    else:
        lora = {"r": info["rank"], "lora_alpha": info["lora_alpha"]}
        lora |= {"target_modules": task.backbone.lora_targets}
        adapter = json.dumps({f"transformer.{name}": value for name, value in lora.items()})
        path = out / "pytorch_lora_weights.safetensors"
        write_safetensors(path, tensors, info, lora_adapter_metadata=adapter)
    words = dataclasses.asdict(config) | info | {"format": format, "path": info["sigmas"][:-1]}
    card = CARD.format(**words, use=USE[format].format(**words))
    (out / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {out}, for {format}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help.")


def add_settings(command, names):
    """A flag for each line of Config that is named, under its heading."""
    types, group = typing.get_type_hints(Config), None
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = command.add_argument_group(field.metadata["group"])
        kind, how = types[field.name], {"choices": typing.get_args(types[field.name])}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind in (int, float, str):
            how = {"type": kind, "metavar": kind.__name__[0].upper()}
        values = [f"{name}: {p[field.name]}" for name, p in PRESETS.items() if field.name in p]
        values = [str(field.default)] * (field.default != "") + values
        text = f"{field.metadata['text']} [{'; '.join(values)}]".replace("%", "%%").replace(
            " []", ""
        )
        if field.name in names:
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def parser():
    """The four commands and their flags; what is not given is absent."""
    top = Parser(prog="w2svd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, text):
        how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
        how["usage"] = f"w2svd.py {name} [--flag VALUE ...]"
        how["formatter_class"] = functools.partial(argparse.HelpFormatter, width=80)
        return commands.add_parser(name, help=text, description=text, **how)

    trains = command("train", "distil a backbone")
    trains.add_argument("--resume", action="store_true", help="go on in --out, with its settings")
    trains.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    trains.add_argument("--gpu-memory", type=float, metavar="F", help="GiB to plan for [the GPU's]")
    add_settings(trains, [field.name for field in dataclasses.fields(Config)])
    encodes = command("encode", "clips into latents and text, once; train does it by itself")
    add_settings(encodes, "model data checkpoint height width frames fps cache".split())
    samples = command("sample", "sample a run")
    exports = command("export", "a HunyuanVideo run for other programs")
    for one in (samples, exports):
        one.add_argument("--run", required=True, help="a run folder, as runs/mine")
        one.add_argument("--at", type=int, help="the generator of that iteration [the newest]")
    samples.add_argument("--out", required=True, help="toy: .png, .gif, .safetensors; else .mp4")
    samples.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    samples.add_argument("--n", type=int, help="toy: number of samples [1000]")
    samples.add_argument("--prompt", help="hunyuan: what to show")
    samples.add_argument("--lora-scale", type=float, help="hunyuan: of the generator's adapter [1]")
    samples.add_argument("--compare", action="store_true", help="hunyuan: the backbone's 28 steps")
    exports.add_argument("--out", required=True, help="a new folder")
    exports.add_argument("--format", required=True, choices=tuple(USE), help="merged: all weights")
    return top, commands.choices


def parse(argv):
    """What was given, a dictionary; a flag that does not exist is refused with the nearest one."""
    top, commands = parser()
    given, unknown = top.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], commands[given.command]._option_string_actions)
        hint = f"; did you mean {near[0]}" if near else ""
        raise Refused(f"There is no {unknown[0]}{hint}; see w2svd.py {given.command} --help.")
    return vars(given)


def absolute(model, given):
    """What was given with whole paths, so that a run can be resumed from elsewhere."""
    names = [n for n in ("data", "checkpoint", "cache") if given.get(n) and Path(given[n]).exists()]
    found = {n: str(Path(given[n]).resolve()) for n in names if (model, n) != ("toy", "data")}
    return given | found


def resumed(given):
    """The run's own Config with the given changes."""
    if not given.get("out"):
        raise Refused("--resume needs the run's folder as --out.")
    base = read_run(given["out"])
    given = absolute(base.model, given)
    differ = {name: x for name, x in given.items() if x != getattr(base, name)}
    fixed = set(differ) - set(RESUMABLE.split())
    if base.model == "toy":
        fixed |= differ.keys() & {"data"}  # another mixture, not a moved folder
    if "iterations" in differ and {base.alpha_weak_schedule, base.lr_schedule} != {"constant"}:
        fixed.add("iterations")  # a schedule depends on them
    if fixed:
        was = ", ".join(f"--{n.replace('_', '-')} {getattr(base, n)}" for n in sorted(fixed))
        raise Refused(f"{given['out']} was made with {was}, which --resume cannot change.")
    return dataclasses.replace(base, **given)


def resolve(given):
    """A whole Config: defaults, the model's preset, the given settings, a free run folder."""
    model = given.get("model", Config.model)
    given = absolute(model, given)
    data = given.get("data", "")
    kind = "captions" if data.endswith(".txt") else data
    config = Config(**PRESETS[model] | PRESETS.get(f"{model} {kind}", {}) | given)
    fits = {}
    if config.fake == "full":  # its real DiT is the plain backbone; a decay would pull weights to 0
        fits |= {"alpha_weak": 0.0, "fake_weight_decay": 0.0}
    if config.generator_input == "paired":  # its last exit knows its ground truth: learn from all
        fits |= {"fake_samples": "all"}
    fits = {name: value for name, value in fits.items() if name not in given}
    out, k = config.out or f"runs/{model}", 2
    while not config.out and any(Path(out).glob("[!.]*")):
        out, k = f"runs/{model}-{k}", k + 1
    if Path(out).is_file() or any(Path(out).glob("[!.]*")):
        raise Refused(f"{out} is in use: name another --out, or go on in it with --resume.")
    return dataclasses.replace(config, out=out, **fits)


def main(argv=None):
    """Run a command; 0, or another status after a sentence about what failed."""
    status, again = 2, "train goes on with --resume --out, encode with the same command."
    try:
        given = parse(argv)
        command = given.pop("command")
        how = {n: given.pop(n) for n in ("resume", "dry_run", "gpu_memory") if n in given}
        if command in ("sample", "export"):
            (sample if command == "sample" else export)(**given)
            return 0
        if command == "encode":
            given = {"model": "hunyuan"} | given
        config = resumed(given) if how.get("resume") else resolve(given)
        check(config)
        if command == "train":
            train(config, **how)
        elif config.model == "hunyuan":
            encoded_clips(config)
        else:
            raise Refused("encode is for --model hunyuan: the toy draws its samples.")
        return 0
    except Refused as error:
        reason, status = error, error.status
    except torch.OutOfMemoryError:
        reason = "out of GPU memory; the plan (train --dry-run) says what needs less."
    except ImportError as error:
        reason = f"{error}: pip install -r requirements.txt; the toy needs toy/ beside this file."
    except OSError as error:  # no space left, a folder that went away, no such checkpoint
        reason = f"{str(error).splitlines()[0]}; what was written before is whole: {again}"
    except KeyboardInterrupt as stop:
        reason = f"stopped; {again}"
        status = 128 + (stop.args or [signal.SIGINT])[0]
    print(f"w2svd: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.modules["w2svd"] = sys.modules["__main__"]  # for toy/ to import, also from a renamed copy
    sys.exit(main())
