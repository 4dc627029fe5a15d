"""W2SVD, weak-to-strong video distillation (MagicDistillation, arXiv 2503.13319), in one file.

A video diffusion transformer (DiT) needs about 28 evaluations for a video. This file turns it into
a GENERATOR that needs 4, or 1: from noise it predicts a clean video, which is noised again to the
next of 4 levels, the grid, and so on. Distribution matching distillation (DMD) moves the
generator's samples along the difference of two scores: that of the data, known by a REAL DiT, and
that of the generator's own samples, learnt on the way by a FAKE DiT. Both scores are read at noised
samples, where the two densities overlap. W2SVD makes the two DiTs out of one frozen backbone that
carries one LoRA (a small trained term: W + alpha B A in place of a linear layer's W), weakly in the
real DiT and strongly in the fake one, so that the real one leans a little towards the samples that
it has to judge; with the generator an adapter too (ours), one backbone serves all three.

                                            backbone   adapter 'generator'   adapter 'fake'
    x_in -> generator -> x_gen               frozen     1, trained            off
            x_gen + noise -> x_t
    x_t  -> fake -> v_fake -> x0_fake        frozen     off                   alpha_strong, trained
    x_t  -> real -> v_real -> x0_real        frozen     off                   alpha_weak

    fake's loss         |v_fake - (eps - x_gen)|^2           it learns the generator's samples
    generator's         (x0_fake - x0_real) / mean_i |x_gen - x0_real|                  (DMD)
    gradient at x_gen   + gt_weight * (x0_fake - x0_gt) / mean_i |x0_fake - x0_gt|    (ground truth)
    an iteration        5 updates of the fake, then one of the generator

Notation and conventions (B batch, C channels, T frames, H, W; any (B, ...) will do)
    sigma       noise level in [0, 1], float32, 1 is pure noise
    x_t         (1 - sigma) x0 + sigma eps, eps standard normal; x_gen gets a fresh eps and sigma
    v           velocity eps - x0, so x0 = x_t - sigma v, score = -(x_t + (1 - sigma) v) / sigma
    x_in        what the generator reads, at a level of the grid: a noised real sample (paired), or
                where few-step sampling from noise has come to (rollout); x0_gt: the sample behind
    x_gen       what it makes of it in one evaluation; mean_i: over the elements of a sample
    x0_real, x0_fake    what the two DiTs make of the noised x_gen; they differ as the scores do
    velocity(x_t, sigma, cond) -> v    the contract of every model; cond, the text, is handed on
    Elsewhere the roles are called student (generator), teacher (real) and critic (fake).

Commands
    python w2svd.py train --model toy                       a tiny DiT, checked by an exact answer
    python w2svd.py encode --model hunyuan --videos my_clips/ --out data/    once: latents and text
    python w2svd.py train  --model hunyuan --data data/ --out runs/portrait  one GPU
    python w2svd.py sample --run runs/portrait --prompt "a woman talks" --out talk.mp4
    python w2svd.py export --run runs/portrait --format diffusers --out lora/

Where a setting comes from: 'paper' read off the authors' figures; 'author-code' related public
code of the first author, not a release of this paper; 'peer' common in public code of the family;
'ours'. The paper's body, and so its learning rates, rank and batch, were not available to us.

Deviations from the paper, as far as we know it: no discriminator (its figure has one); text is the
only condition (its model also reads a first image); alpha_strong = 1 is ours (it is not printed);
the generator is an adapter by default; denominators, EMA and optimizer are peers', the author's
later code's or ours; the GT loss is off by default, since it trades motion for picture quality in
the paper's table; on the toy: rollouts, a fake that learns final samples, with a weight decay.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint as recompute_in_backward

# ---- 1. Config -----------------------------------------------------------------------------------


class Refused(ValueError):
    """What the user asked for cannot be done; the message is one sentence and says the cure."""


HUNYUAN = "hunyuanvideo-community/HunyuanVideo"
CHECKPOINTS = f"checkpoint-{'[0-9]' * 6}.safetensors"  # in a run folder; sorted, the newest is last
# what an encoded clip depends on: train takes these settings from --data
ENCODED = ("checkpoint", "height", "width", "frames", "fps", "prompt_template", "prompt_crop_start")


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line and its help are made from these lines."""

    model: Literal["toy", "hunyuan"] = "toy"  # what to distil / ours
    data: str = "ring"  # toy: ring, grid or videos; hunyuan: the folder that encode wrote / ours
    checkpoint: str = HUNYUAN  # hub id, or a folder in diffusers' format / ours
    weights: Literal["pretrained", "random"] = "pretrained"  # random: to measure speed / ours
    height: int = 480  # pixels, a multiple of 16; from --data if that is there / ours
    width: int = 832  # see height / ours
    frames: int = 61  # 4k + 1; 61 or 129 / ours
    fps: float = 24.0  # clips are resampled to it / paper
    prompt_template: str = ""  # HunyuanVideo's own if empty; '{}' for a plain text encoder / ours
    prompt_crop_start: int = 95  # tokens of that template to cut off before the prompt / ours
    steps: int = 4  # evaluations of the finished generator / paper: 4 and 1
    shift: float = 5.0  # of the few-step grid: 1, .9375, .8333, .625 / author-code
    generator: Literal["lora", "full"] = "lora"  # an adapter, or a whole copy / ours, author-code
    fake: Literal["lora", "full"] = "lora"  # full: separate, real = backbone / paper, peer
    generator_input: Literal["paired", "rollout"] = "paired"  # noised real, or not / paper, peer
    fake_samples: Literal["all", "final"] = "all"  # levels whose samples the fake learns / ours
    alpha_weak: float = 0.25  # the fake adapter's weight in the real DiT; 0 is DMD / paper
    alpha_weak_schedule: Literal["constant", "linear", "cosine"] = "constant"  # to 0 / peer: DMDR
    alpha_strong: float = 1.0  # the fake adapter's weight in the fake DiT / ours
    gt_weight: float = 0.0  # for picture quality; costs motion in the paper's table / author-code
    gt_skip_noise: bool = False  # no GT loss where the input is pure noise / ours
    guidance: float = 1.0  # classifier-free guidance of the real DiT; 1 is off / peer
    embedded_guidance: float = 6.0  # read by a guidance-distilled backbone, at no cost / peer
    lora_rank: int = 64  # of both adapters; alpha = rank / ours
    lora_targets: Literal["all", "attention"] = "all"  # which linear layers of the blocks / ours
    generator_lr: float = 1e-5  # lower it where samples drift or collapse / ours
    fake_lr: float = 1e-5  # raise it where the relative gap keeps growing / ours
    lr_schedule: Literal["constant", "linear"] = "constant"  # of both, down to 5 % / ours
    fake_weight_decay: float = 0.0  # pulls the adapter to 0, that is to the backbone / ours
    sigma_low: float = 0.02  # both losses read x_t at sigma ~ U[low, high] / author-code
    sigma_high: float = 0.98  # see sigma_low / author-code
    sigma_shift: float = 1.0  # raise for more noise and more of the global shape / author-code
    fake_updates: int = 5  # fake updates for each generator update / author-code, peer
    fake_warmup: int = 0  # fake updates before the first generator update / ours
    ema: float = 0.995  # decay of the generator's moving average; 0 is off / ours
    max_grad_norm: float = 1.0  # gradients are clipped to this norm / peer
    batch: int = 1  # samples in a forward / ours
    accumulate: int = 1  # forwards in an update; the GPU holds one --batch at a time / ours
    iterations: int = 1000  # generator updates / peer: 600 to 1000
    checkpointing: bool = False  # recompute blocks in backward: less memory, a third slower / peer
    fp8_base: bool = False  # keep the backbone's weights in 8 bits: 8 GiB less at 13B / ours
    compile: bool = False  # compile every block / peer
    seed: int = 0  # the same seed gives the same bits on the same machine / ours
    log_every: int = 50  # iterations between lines of metrics.jsonl / ours
    save_every: int = 250  # iterations between checkpoints / peer
    keep: int = 3  # the newest checkpoints stay, 2 at least / ours
    keep_every: int = 250  # and those at its multiples, as later is not always better / peer
    max_skipped: int = 10  # updates left out for a value that is not finite; then it stops / ours
    sample_every: int = 250  # hunyuan: iterations between sampled videos / ours
    compare: bool = False  # hunyuan: show the backbone's 28 steps beside the student's / ours
    tensorboard: bool = False  # log there too / ours
    gpu_memory: float = 0.0  # GiB to plan for; those of the GPU at hand if 0 / ours
    tflops: float = 790.0  # to plan with: what an H100 or H200 reaches in bf16 / ours
    out: str = ""  # run folder; the next free runs/<model>[-k] if empty / ours
    cache: str = "~/.cache/w2svd"  # where the toy keeps its trained backbones / ours
    resume: bool = False  # go on from the last checkpoint in --out / ours
    dry_run: bool = False  # print the plan and stop / ours


# ours: by trials on the toy (toy/README.md), and by the study (toy/results/README.md)
PRESETS = {
    # not tuned: no run of the full model was measured by us
    "hunyuan": dict(data="data", generator_lr=2e-5, fake_lr=2e-5, checkpointing=True, log_every=10),
    "toy": dict(
        generator_input="rollout", fake_samples="final", lora_rank=16, generator_lr=1e-3,
        fake_lr=5e-4, lr_schedule="linear", fake_weight_decay=2.0, ema=0.98, batch=256,
        iterations=360, log_every=20, save_every=180,
    ),
    # on top of the toy's; a clip's motion is decided at high noise, hence the shift
    "toy videos": dict(batch=64, iterations=250, log_every=25, sigma_shift=5.0, generator_lr=5e-4),
}  # fmt: skip


def check(c: Config, given=()) -> None:
    """Refuse settings that contradict each other, with the reason; `given` flags came by name."""
    of_adapters = {"alpha_weak", "alpha_weak_schedule", "alpha_strong", "fake_weight_decay"}
    rules = [
        (0 <= c.alpha_weak <= c.alpha_strong,
         f"--alpha-weak must lie in [0, alpha_strong = {c.alpha_strong}], not {c.alpha_weak}"),
        (c.fake == "lora" or not of_adapters & set(given),
         "--fake full has no adapter to weigh or to decay: its real DiT is the plain backbone; "
         "leave alphas and --fake-weight-decay out, or use --fake lora"),
        (0 <= c.sigma_low < c.sigma_high <= 1,
         "--sigma-low and --sigma-high must satisfy 0 <= low < high <= 1"),
        (c.keep > 1, "--keep must be at least 2: one stays whole while another is written"),
        (c.ema < 1, f"--ema must lie in [0, 1), not {c.ema}; 0 is off"),
        (not c.gt_weight or c.generator_input == "paired",
         "--gt-weight needs --generator-input paired: a rollout starts from noise, so no ground "
         "truth belongs to its sample"),
        (not c.gt_weight or c.steps > 1,
         "--gt-weight needs more than one step: a one-step generator reads pure noise, which "
         "pairs with no ground truth"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise Refused(f"{sentence}.")
    may_be_0 = ("sigma_low", "ema", "guidance", "prompt_crop_start", "alpha_weak", "max_skipped")
    for name, value in dataclasses.asdict(c).items():
        most = {"steps": 1000, "batch": 2**16, "lora_rank": 4096, "iterations": 999_999}
        most, zero = most.get(name, 2**53), name in may_be_0 or not getattr(Config, name)
        if type(value) in (int, float) and not (0 <= value <= most and (value or zero)):
            raise Refused(f"--{name.replace('_', '-')} must be {'at least' if zero else 'above'} 0 "
                          f"and at most {most}, not {value}.")  # fmt: skip


# ---- 2. Flow matching ----------------------------------------------------------------------------


def _like(sigma, x):
    """sigma, a float or (B,), shaped to multiply x (B, ...)."""
    return torch.as_tensor(sigma, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0, eps, sigma):
    """x_t = (1 - sigma) x0 + sigma eps. x0, eps (B, ...); sigma in [0, 1], a float or (B,)."""
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def x0_from_velocity(x_t, v, sigma):
    """x0 = x_t - sigma v: the clean sample that the velocity at x_t points to, (B, ...)."""
    return x_t - _like(sigma, x_t) * v


def score_from_velocity(x_t, v, sigma):
    """grad log p(x_t) = -(x_t + (1 - sigma) v) / sigma, for sigma in (0, 1]; (B, ...)."""
    sigma = _like(sigma, x_t)
    return -(x_t + (1 - sigma) * v) / sigma


def guided(v_cond, v_uncond, w):
    """v_uncond + w (v_cond - v_uncond). w = 1 is off; other code calls this w - 1."""
    return v_uncond + w * (v_cond - v_uncond)


def shift_sigma(sigma, shift):
    """shift sigma / (1 + (shift - 1) sigma): moves [0, 1] towards noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def few_step_sigmas(steps, shift):
    """The grid 1 = sigma_0 > ... > sigma_steps = 0, (steps + 1,), evenly spaced, then shifted."""
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def sample_sigma(n, low, high, shift, rng):
    """n noise levels, uniform in [low, high] and then shifted, on the device of rng."""
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

        self.backbone, self.role = backbone, None
        self.alpha_weak, self.alpha_strong = alpha_weak, alpha_strong
        kinds = {"generator": generator, "fake": fake}
        self.copies = {role: copy.copy(backbone) for role in kinds if kinds[role] == "full"}
        for twin in self.copies.values():
            twin.module = copy.deepcopy(backbone.module).float().requires_grad_(True)
        self.adapters = [role for role in kinds if kinds[role] == "lora"]
        for role in self.adapters:  # alpha = rank: loads at the right strength without metadata
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=backbone.lora_targets)
            with warnings.catch_warnings():  # peft warns of a second adapter, which is the method
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(lora, backbone.module, adapter_name=role)
        self.layers = [m for m in backbone.module.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:  # or inputs would be made float32, for autocast to undo it
            layer.cast_input_dtype_enabled = False
        # NOTE silent: adding the second adapter froze the first, so gradients are set after both
        backbone.module.requires_grad_(False)
        self.trained = {role: self._find(role) for role in kinds}
        for role in self.adapters:
            for parameter in self.trained[role].values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._switch(None)

    def _find(self, role):
        if role in self.copies:
            return dict(self.copies[role].module.named_parameters())
        mark = f".{role}."  # '....lora_A.generator.weight' is stored as '....lora_A.weight'
        found = self.backbone.module.named_parameters()
        return {n.replace(mark, "."): p for n, p in found if mark in n and "lora_" in n}

    def _switch(self, role, alpha=None):
        # NOTE silent: peft's set_adapter would also flip requires_grad, which loses the gradients
        # of a forward whose backward is still to come; so only the active name and scale change
        adapter = "fake" if role == "real" else role
        if alpha is None:
            alpha = {"fake": self.alpha_strong, "real": self.alpha_weak}.get(role, 1.0)
        self.role, self.alpha = role, alpha
        active = [adapter] if adapter in self.adapters and alpha else []
        scale = torch.tensor(float(alpha))  # a number would be compiled anew for every value
        for layer in self.layers:
            layer._active_adapter = active
            for name in active:
                layer.scaling[name] = scale

    @contextmanager
    def use(self, role, alpha=None):
        """The backbone plays `role` inside; the role before comes back, also after an exception."""
        before = self.role, self.alpha
        self._switch(role, alpha)
        try:
            yield
        finally:
            self._switch(*before)

    def _velocity(self, role, x_t, sigma, cond):
        with self.use(role):
            return self.copies.get(role, self.backbone).velocity(x_t, sigma, cond)

    def generator(self, x_t, sigma, cond=None):
        return self._velocity("generator", x_t, sigma, cond)

    def real(self, x_t, sigma, cond=None):
        return self._velocity("real", x_t, sigma, cond)

    def fake(self, x_t, sigma, cond=None):
        return self._velocity("fake", x_t, sigma, cond)

    def checkpoint(self, block, *args):
        """block(*args), recomputed in backward under the role of its forward."""
        if not torch.is_grad_enabled():
            return block(*args)
        role, alpha = self.role, self.alpha
        # NOTE silent: without context_fn a block is recomputed under whatever role and alpha are
        # active at the time of the backward, and the gradient is wrong by tens of percent
        return recompute_in_backward(block, *args, use_reentrant=False, context_fn=lambda: (
            nullcontext(), self.use(role, alpha)))  # fmt: skip

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
        tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
        state = self.state(role)
        shapes = [{(n, x.shape) for n, x in named.items()} for named in (state, tensors)]
        wrong = {n for n, _ in shapes[0] ^ shapes[1]}
        if wrong:
            raise Refused(f"These weights do not fit the {role} ({len(wrong)} names or shapes "
                          f"differ, for example {min(wrong)!r}).")  # fmt: skip
        for name, parameter in state.items():
            parameter.copy_(tensors[name])

    def base_sum(self):
        """A cheap fingerprint of the frozen weights, to show that they did not move."""
        frozen = [p for p in self.backbone.module.parameters() if not p.requires_grad]
        return sum(float(p.double().sum()) for p in frozen[:: max(1, len(frozen) // 8)])


# ---- 4. Losses (5, the discriminator of the paper, is not built) ---------------------------------


def _accurate(x):
    """bf16 loses the small difference of two similar predictions: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_abs(x):
    """mean_i |x_i| of each sample, (B, 1, ...), floored so that a perfect match is no 0 / 0."""
    return x.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True).clamp_min(1e-6)


def dmd_gradient(x_gen, x0_real, x0_fake):
    """g = (x0_fake - x0_real) / mean_i |x_gen - x0_real|: along KL(fake || real)'s gradient.

    All (B, ...), of one noised x_gen. With x0 = (x_t + sigma^2 score) / (1 - sigma) the numerator
    is a difference of scores; the denominator, per sample, makes noise levels alike.
    """
    # paper: the difference (figure). peer: the denominator, as in DMD2. ours: float32, its floor
    x_gen, x0_real, x0_fake = map(_accurate, (x_gen, x0_real, x0_fake))
    return (x0_fake - x0_real) / _mean_abs(x_gen - x0_real)


def gt_gradient(x0_fake, x0_gt):
    """g = (x0_fake - x0_gt) / mean_i |x0_fake - x0_gt|: towards the sample behind the input.

    (B, ...). Its mean absolute value is 1 whatever the distance: the weight alone decides.
    """
    # paper: ground truth against fake video (figure). author-code: the denominator
    difference = _accurate(x0_fake) - _accurate(x0_gt)
    return difference / _mean_abs(difference)


def fake_loss(v_fake, x_gen, eps):
    """mean |v_fake - (eps - x_gen)|^2: flow matching on the generator's samples, a scalar."""
    return torch.nn.functional.mse_loss(_accurate(v_fake), _accurate(eps - x_gen))


# ---- 6. The two updates, and the samplers --------------------------------------------------------


def require_finite(what, x, sigma):
    """Stop at the first non-finite value, with the stage and the noise level named."""
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


def generator_input(roles, x0, cond, sigmas, kind, rngs, final=False):
    """x_in (B, ...) and its sigma (B,), at random levels of the grid, or all at the last one.

    'paired': x0 itself, noised (paper). 'rollout': the state of few-step sampling from noise at an
    exit drawn once for the batch (peer: Self-Forcing). x0 gives only the shape of the latter.
    rngs: generators 'input', of the noise, and 'exit', of the levels, on the device of x0.
    """
    last = len(sigmas) - 2
    noise = torch.randn(x0.shape, generator=rngs["input"], device=x0.device, dtype=x0.dtype)
    n = {"paired": len(x0), "rollout": 1}[kind]
    exits = torch.randint(last + 1, (n,), generator=rngs["exit"], device=x0.device)
    if final:
        exits = torch.full_like(exits, last)
    sigma = sigmas[exits].expand(len(x0))
    if kind == "paired":
        return add_noise(x0, noise, sigma), sigma
    path = sigmas[: int(exits) + 1]
    return few_step_sample(roles.generator, noise, path, cond, rngs["input"]), sigma


def fake_step(roles, batch, x_in, sigma_in, sigma, eps):
    """One backward of the fake's loss: it learns to denoise what the generator makes of x_in.

    batch: 'x0' and 'cond'. x_in, sigma_in from generator_input; x_gen is noised to sigma (B,) with
    eps (B, ...). Returns detached numbers; the caller owns the optimizer.
    """
    with torch.no_grad():
        v = roles.generator(x_in, sigma_in, batch["cond"])
        x_gen = x0_from_velocity(x_in, v, sigma_in)
        require_finite("the generator's sample in the fake update", x_gen, sigma_in)
        x_t = add_noise(x_gen, eps, sigma)
    with roles.use("fake"):
        v_fake = roles.fake(x_t, sigma, batch["cond"])
        require_finite("the fake's velocity", v_fake, sigma)
        loss = fake_loss(v_fake, x_gen, eps)
        require_finite("the fake's loss", loss.expand(len(x_gen), 1), sigma)
        loss.backward()
    return {"fake_loss": loss.detach()}


def generator_step(roles, batch, x_in, sigma_in, sigma, eps, gt_weight=0.0, gt_skip_noise=False,
                   guidance=1.0):  # fmt: skip
    """One backward of the DMD loss, and the GT loss, through the generator's one evaluation.

    Arguments as for fake_step; with gt_weight, x_in must be batch['x0'] noised (paired). Every
    gradient is taken at the detached sample and pushed through it at once. Detached numbers return.
    """
    x0, cond = batch["x0"], batch["cond"]
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
                counts = sigma_in < 1 if gt_skip_noise else torch.ones_like(sigma_in)
                g = g + gt_weight * _like(counts, g) * gt_gradient(x0_fake, x0)
            require_finite("the generator's gradient", g, sigma)
        # the gradient of mean(x_gen * stopgrad(g)): DMD2's scale. peer
        # NOTE silent: the learning rate depends on this 1 / numel (in Adam: clipping, epsilon)
        x_gen.backward(g.to(x_gen.dtype) / g.numel())
    return health(x_gen.detach(), x0, x0_fake, x0_real, v_fake, v_real)


def health(x_gen, x0, x0_fake, x0_real, v_fake, v_real):
    """What losses do not tell, as detached numbers; the README has the healthy ranges."""
    stats = {
        "relative_gap": _accurate(x0_fake - x0_real).norm() / _accurate(x0_real).norm(),
        "cos_fake_real": torch.cosine_similarity(
            _accurate(v_fake).flatten(1), _accurate(v_real).flatten(1)
        ).mean(),
        "gen_mean": x_gen.mean(), "gen_std": x_gen.std(),
        "data_mean": x0.mean(), "data_std": x0.std(),
    }  # fmt: skip
    if x0.ndim == 5:  # frames are dim 2 of (B, C, T, H, W)
        stats["gen_motion"] = x_gen.diff(dim=2).abs().mean()
        stats["data_motion"] = x0.diff(dim=2).abs().mean()
    return stats


# ---- 7. Backbones --------------------------------------------------------------------------------
# A task has .backbone (see Roles), whose weights come with .load(), .device, .shape of a sample,
# .batches(rng) -> endless {'x0': (B, ...), 'cond': ...}, .costs(forwards, with_gradient) -> lines
# of the plan, .prepare() for what must follow the adapters, .on_log(step, generator) for pictures
# on the way, .finish(run) -> (result, table) and .sample(...), behind the command of that name.


def load_task(config):
    """The model and data that `config` names, as a task: of toy/ or of hunyuan.py."""
    return importlib.import_module(config.model).task(config)


# ---- 8. Files: safetensors and JSON --------------------------------------------------------------


def flush(path):
    """See that a file or a folder is on the disk, also if the power fails."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def whole(path):
    """A name to write to, which becomes `path` at the end; a failure leaves neither."""
    half = path.with_name(f".{os.getpid()}.part{path.suffix}")
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield half
        half.chmod(0o666 & ~umask)  # safetensors would keep it from everybody else
        flush(half)  # before the new name, or the name might reach the disk without the content
        os.replace(half, path)
        flush(path.parent)
    finally:
        half.unlink(missing_ok=True)


def checksum(tensors, info):
    """SHA-256 of the info and of the tensors' names, types, shapes and bits, in hexadecimal."""
    sha256 = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        sha256.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha256.update(x.reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def write_safetensors(path, tensors, info, **metadata):
    """Tensors, and info with a checksum as one JSON string in the header; whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    info = info | {"content_sha256": checksum(tensors, info)}
    metadata |= {"w2svd": json.dumps(info, sort_keys=True)}
    with whole(path) as half:
        try:
            save_file(tensors, half, metadata=metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} cannot be written: {error}") from error


def read_safetensors(path):
    """Back: (tensors, info). A file that is missing, damaged or not ours is refused."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > 2**24:  # reading it would take gigabytes
                raise ValueError("its header is too long")
        with safe_open(path, "pt") as file:
            info = dict(json.loads((file.metadata() or {})["w2svd"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if info.pop("content_sha256") != checksum(tensors, info):
            raise ValueError("its checksum differs")
        return tensors, info
    except KeyError as error:
        raise Refused(f"{path} was not written by w2svd: its header has no {error}.") from error
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        what = "is damaged" if path.exists() else "does not exist"
        raise Refused(f"{path} {what} ({error}).") from error


def write_json(path, content):
    with whole(path) as half:
        half.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def hold(folder):
    """Make the folder and keep other processes out; the lock dies with its owner."""
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for half in (folder / ".0.part", *folder.glob("**/.[0-9]*.part*")):  # the first: a try
            half.touch()
            half.unlink()  # the others: of processes that were killed
    except BlockingIOError as error:
        raise Refused(f"Another process is at work in {folder}; wait for it, or name another "
                      "--out.") from error  # fmt: skip
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error}); name another --out.") from error
    try:
        yield
    finally:
        os.close(lock)


# ---- 9. train() ----------------------------------------------------------------------------------


def lr_factor(config, iteration):
    """Of both learning rates: 1, or falling linearly to .05 at the end."""
    return 1 - 0.95 * iteration / config.iterations if config.lr_schedule == "linear" else 1.0


def alpha_weak_at(config, iteration):
    """alpha_weak of an iteration: constant, or down to 0 at half of the iterations."""
    progress = min(1.0, 2 * iteration / config.iterations)
    falling = {"constant": 1.0, "linear": 1 - progress,
               "cosine": (1 + math.cos(math.pi * progress)) / 2}  # fmt: skip
    return config.alpha_weak * falling[config.alpha_weak_schedule]


class State:
    """All that changes in training: the roles, their optimizers, the EMA, the random streams."""

    def __init__(self, config, roles, device):
        self.roles, self.iteration, self.skipped = roles, 0, 0
        self.optimizers = {  # author-code: betas. No momentum, as the gradients' target moves
            role: torch.optim.AdamW(roles.parameters(role), betas=(0.0, 0.999),
                                    weight_decay=decay, fused=True)
            for role, decay in (("generator", 0.0), ("fake", config.fake_weight_decay))
        }  # fmt: skip
        self.ema = {n: p.detach().clone() for n, p in roles.state("generator").items()}
        self.rngs = {name: torch.Generator(device).manual_seed(config.seed * 1000 + stream) for
                     stream, name in enumerate(("data", "input", "exit", "level", "noise"))}

    def update(self, role, lr, max_grad_norm, accumulated=1):
        """One optimizer step of the role on the mean of the gradients added up; their norm."""
        self.optimizers[role].param_groups[0]["lr"] = lr
        for parameter in self.roles.parameters(role) if accumulated > 1 else ():
            parameter.grad /= accumulated
        norm = torch.nn.utils.clip_grad_norm_(self.roles.parameters(role), max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of the {role} is not finite")
        self.optimizers[role].step()
        self.optimizers[role].zero_grad()
        return norm

    def skip(self, error, drawn, most):
        """Leave an update out, up to so many times, for a value that is not finite."""
        self.skipped += 1
        read = [f"{batch.get('name', 'a batch')} at sigma {sigma.min():.4f} to {sigma.max():.4f}"
                for batch, sigma in drawn]  # fmt: skip
        sentence = f"iteration {self.iteration + 1}: {error}; it read {', '.join(read)}"
        if self.skipped > most:
            raise Refused(f"Stopped in {sentence}, after {most} updates left out for the like; the "
                          "last checkpoint is kept; start again in another --out with lower rates, "
                          "or without that clip.") from error  # fmt: skip
        print(f"\nw2svd: {sentence}; this update is left out.", file=sys.stderr)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    @torch.no_grad()
    def update_ema(self, decay):
        for name, parameter in self.roles.state("generator").items():
            self.ema[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self):
        """The generator with its averaged weights, for sampling."""
        current = {n: p.detach().clone() for n, p in self.roles.state("generator").items()}
        self.roles.load("generator", self.ema)
        try:
            yield self.roles.generator
        finally:
            self.roles.load("generator", current)

    def tensors(self):
        """Everything as one flat {name: tensor}, for a checkpoint."""
        flat = {f"ema/{name}": x for name, x in self.ema.items()}
        flat |= {f"rng/{name}": rng.get_state() for name, rng in self.rngs.items()}
        for role, optimizer in self.optimizers.items():
            flat |= {f"{role}/{name}": x for name, x in self.roles.state(role).items()}
            for i, slots in optimizer.state_dict()["state"].items():
                flat |= {f"optimizer/{role}/{i}/{slot}": x for slot, x in slots.items()}
        return flat

    def restore(self, flat, info):
        """The inverse of tensors(), and the counts."""
        def under(prefix):
            return {n[len(prefix):]: x for n, x in flat.items() if n.startswith(prefix)}

        self.iteration, self.skipped = int(info["iteration"]), int(info["skipped"])
        self.ema = {name: flat[f"ema/{name}"].to(x).view_as(x) for name, x in self.ema.items()}
        for name, rng in self.rngs.items():
            rng.set_state(flat[f"rng/{name}"])
        for role, optimizer in self.optimizers.items():
            self.roles.load(role, under(f"{role}/"))
            slots, found = {}, under(f"optimizer/{role}/")
            for i, x in enumerate(self.roles.parameters(role) if found else ()):
                slots[i] = {k: found[f"{i}/{k}"].view_as(x) for k in ("exp_avg", "exp_avg_sq")}
                slots[i]["step"] = found[f"{i}/step"].float().view(())
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def draw(config, state, data, final):
    """batch, x_in, sigma_in, sigma, eps: what fake_step and generator_step read."""
    batch, rngs = next(data), state.rngs
    x0, device = batch["x0"], rngs["noise"].device
    sigmas = few_step_sigmas(config.steps, config.shift).to(device)
    x_in, sigma_in = generator_input(state.roles, x0, batch["cond"], sigmas,
                                     config.generator_input, rngs, final)  # fmt: skip
    low, high, shift = config.sigma_low, config.sigma_high, config.sigma_shift
    sigma = sample_sigma(len(x0), low, high, shift, rngs["level"])
    eps = torch.randn(x0.shape, generator=rngs["noise"], device=device, dtype=x0.dtype)
    return batch, x_in, sigma_in, sigma, eps


def iterate(config, state, data):
    """One iteration: the fake's updates, then one of the generator. Returns detached numbers."""
    roles = state.roles

    def update(role, step, lr, final, *weights):
        drawn, every = [], []  # drawn: for an error to name
        try:
            for _ in range(config.accumulate):
                batch, x_in, sigma_in, sigma, eps = draw(config, state, data, final)
                drawn.append((batch, sigma))
                require_finite("the data", batch["x0"], sigma_in)
                every.append(step(roles, batch, x_in, sigma_in, sigma, eps, *weights))
            norm = state.update(role, lr, config.max_grad_norm, config.accumulate)
        except FloatingPointError as error:
            state.skip(error, drawn, config.max_skipped)
            return {}
        stats = {name: sum(s[name] for s in every) / len(every) for name in every[0]}
        return {**stats, "grad_norm" if role == "generator" else "fake_grad_norm": norm}

    roles.alpha_weak = alpha_weak_at(config, state.iteration)
    slower = lr_factor(config, state.iteration)
    warmup = config.fake_warmup if state.iteration == 0 else 0
    for _ in range(warmup + config.fake_updates):
        fake = update("fake", fake_step, config.fake_lr * slower, config.fake_samples == "final")
    weights = config.gt_weight, config.gt_skip_noise, config.guidance
    stats = update("generator", generator_step, config.generator_lr * slower, False, *weights)
    state.update_ema(config.ema)
    state.iteration += 1
    return {**fake, **stats, "alpha_weak": roles.alpha_weak}


def memory_mb(device):
    """Peak memory in MB so far: of the process on a CPU, of torch's allocations on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_run(folder):
    """The Config that a run folder was made with; a folder that is not one is refused."""
    path = Path(folder) / "config.json"
    for file in Path(folder).glob("*"):  # a link leads out, a pipe never ends
        plain = not file.is_symlink() and (file.is_file() or file.is_dir())
        if not plain or file.suffix in (".json", ".jsonl") and file.stat().st_size > 2**28:
            raise Refused(f"{file} is a link, no regular file, or over 256 MiB; remove it.")
    try:
        config = Config(**json.loads(path.read_text())["config"])
        for name, kind in typing.get_type_hints(Config).items():
            value = getattr(config, name)
            choices = typing.get_args(kind) or ((float, int) if kind is float else (kind,))
            if value not in choices and type(value) not in choices:
                raise ValueError(f"{name} is {value!r}")
        check(config)
        return config
    except OSError as error:
        raise Refused(f"{folder} is not a run folder: {path.name} cannot be read in it.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{path} is not the config of a run of this version ({error}).") from error


def choose_folder(config):
    """The config with its run folder named; a folder in use is refused, and nothing is written."""
    folder, k = Path(config.out or f"runs/{config.model}"), 2
    while not config.out and folder.exists():
        folder, k = Path(f"runs/{config.model}-{k}"), k + 1
    if any(folder.glob("[!.]*")):
        if not config.resume:
            raise Refused(f"{folder} is in use: name another --out, or go on in it with --resume.")
        read_run(folder)
    return dataclasses.replace(config, out=str(folder))


def commit():
    """The git commit of this file, for config.json; or git's word on why there is none."""
    return subprocess.getoutput(f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD")


def plan(config, task):
    """Numbers that follow from the config: parameters, shape, passes of each kind, their costs."""
    backbone_parameters = sum(p.numel() for p in task.backbone.module.parameters())
    with torch.device("meta"):  # nothing is loaded yet; load() brings one without these adapters
        roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, config.alpha_strong,
                      config.generator, config.fake)  # fmt: skip
    once = (config.steps - 1) / 2 if config.generator_input == "rollout" else 0  # the mean exit
    fake_once = 2 * once if config.fake_samples == "final" else once
    fakes = config.fake_updates
    forwards = fakes * (1 + fake_once) + once + 2 + (config.guidance != 1)
    return {
        "backbone_parameters": backbone_parameters,
        "generator_parameters": sum(p.numel() for p in roles.parameters("generator")),
        "fake_parameters": sum(p.numel() for p in roles.parameters("fake")),
        "sample_shape": list(task.shape),
        "sigmas": few_step_sigmas(config.steps, config.shift).tolist(),
        "forwards_without_gradient_per_iteration": forwards,
        "forwards_with_gradient_per_iteration": fakes + 1,
        "fake_updates_in_all": config.fake_warmup + fakes * config.iterations,
        **task.costs(forwards, fakes + 1),
        "versions": {"python": sys.version.split()[0]} | {
            name: importlib.metadata.version(name) for name in
            ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy")},
        "commit": commit(),
    }  # fmt: skip


def show(title, items):
    for name, value in {title: "", **items}.items():
        value = f"{value:.4g}" if isinstance(value, float) else value
        print(f"  {name:40} {value}" if name != title else title)


def save_checkpoint(folder, state, base_sum, config):
    """Delete what need not stay beside the new one, write it, point to it."""
    flush(folder / "metrics.jsonl")
    lines = (folder / "metrics.jsonl").read_bytes()
    info = {"iteration": state.iteration, "base_sum": base_sum, "skipped": state.skipped,
            "metrics_bytes": len(lines), "metrics_sha256": hashlib.sha256(lines).hexdigest(),
            "config": dataclasses.asdict(config)}  # fmt: skip
    path = folder / f"checkpoint-{state.iteration:06}.safetensors"
    older = sorted(other for other in folder.glob(CHECKPOINTS) if other < path)
    for other in older[: 1 - config.keep]:
        if int(other.stem[-6:]) % config.keep_every:
            other.unlink()
    write_safetensors(path, state.tensors(), info)
    write_json(folder / "newest.json", {"checkpoint": path.name})


def restore_checkpoint(folder, state):
    """Put the newest whole one into `state`; the length of metrics.jsonl then, in bytes."""
    log = folder / "metrics.jsonl"
    lines = log.read_bytes() if log.exists() else b""
    for path in sorted(folder.glob(CHECKPOINTS), reverse=True):
        try:
            tensors, info = read_safetensors(path)
            lines = lines[: info["metrics_bytes"]]
            if hashlib.sha256(lines).hexdigest() != info["metrics_sha256"]:
                raise Refused(f"{log} is damaged in the part that {path.name} goes on from.")
        except Refused as damage:
            print(f"w2svd: {damage} The one before it, or else the beginning, is used.",
                  file=sys.stderr)  # fmt: skip
            continue
        try:  # close, not equal: another kind of GPU adds up in another order
            if not math.isclose(info["base_sum"], state.roles.base_sum(), rel_tol=1e-9):
                raise ValueError("its backbone is another: see --cache or --checkpoint")
            state.restore(tensors, info)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{path} is not a checkpoint of this run ({error}).") from error
        return len(lines)
    return 0


@contextmanager
def signals():
    """A list that holds SIGTERM or SIGINT once it came; the second one ends the process at once."""
    came = []

    def note(number, _):
        os._exit(128 + number) if came else came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def generator_info(config, base_sum, iteration):
    """The header of generator.safetensors: all that sampling needs besides the backbone."""
    names = ("model", "data", "checkpoint", "steps", "shift", "alpha_weak", "alpha_strong",
             "guidance", "embedded_guidance", "seed")  # fmt: skip
    return {name: getattr(config, name) for name in names} | {
        "kind": config.generator, "rank": config.lora_rank, "lora_alpha": config.lora_rank,
        "sigmas": few_step_sigmas(config.steps, config.shift).tolist(),
        "step": iteration, "base_sum": base_sum,
    }  # fmt: skip


def warnings_of(line, least_gap):
    """Which health numbers left their range, and what to change: sentences."""
    inf, get = math.inf, line.get  # a number that was not logged is in its range
    return [sentence for bad, sentence in [
        (get("relative_gap", 0) > max(4 * least_gap, 0.2), "the relative gap is four times "
         "its least: the fake lags; raise --fake-lr or --fake-updates, or lower --generator-lr"),
        (get("gen_std", 0) > 1.5 * get("data_std", inf) > 0, "the samples' std is over 1.5 times "
         "the data's, as of burnt colours; lower --generator-lr, or use an earlier checkpoint"),
        (abs(get("gen_mean", 0) - get("data_mean", 0)) > get("data_std", inf) / 2 > 0, "the "
         "samples' mean is half a std off the data's; lower --generator-lr"),
        (get("gen_motion", 0) < get("data_motion", 0) / 3, "the samples move less than a third of "
         "the data; lower --gt-weight, or raise --sigma-shift"),
    ] if bad]  # fmt: skip


class Log:
    """metrics.jsonl, `size` bytes of which stay, and what is said about its numbers on the way."""

    def __init__(self, folder, size, tensorboard, iteration):
        self.path, self.board, self.said, self.gap = folder / "metrics.jsonl", None, set(), math.inf
        self.path.touch()
        os.truncate(self.path, size)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder, purge_step=iteration + 1)

    def __call__(self, line):
        self.gap = min(self.gap, line.get("relative_gap", math.inf))  # the least so far
        for warning in set(warnings_of(line, self.gap)) - self.said:
            print(f"\nw2svd: iteration {line['step']}: {warning}.", file=sys.stderr)
            self.said.add(warning)
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, line["step"])
        with open(self.path, "a") as file:
            file.write(f"{json.dumps(line)}\n")


def train(config):
    """Distil: the whole run, from the backbone to result.json. Returns the run's folder."""
    started = time.perf_counter()
    config = choose_folder(config)
    task, folder = load_task(config), Path(config.out)
    numbers = plan(config, task)
    show("config", dataclasses.asdict(config))
    show("plan", numbers)
    if config.dry_run:
        return None
    with hold(folder):
        task.load()
        torch.manual_seed(config.seed)
        roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, config.alpha_strong,
                      config.generator, config.fake)  # fmt: skip
        if config.checkpointing:
            roles.use_checkpointing()
        task.prepare()
        state = State(config, roles, task.device)
        write_json(folder / "config.json", {"config": dataclasses.asdict(config), "plan": numbers})
        with signals() as came:
            distil(config, task, state, folder, came)
        with state.averaged() as generator:
            info = generator_info(config, roles.base_sum(), state.iteration)
            prefix = "transformer." if config.generator == "lora" else ""  # diffusers' names
            tensors = {prefix + name: x for name, x in roles.state("generator").items()}
            write_safetensors(folder / "generator.safetensors", tensors, info)
            run = SimpleNamespace(folder=folder, config=config, generator=generator)
            result, table = task.finish(run)
        result |= {"seconds": time.perf_counter() - started, "peak_rss_mb": memory_mb("cpu"),
                   "skipped": state.skipped, "seed": config.seed}  # fmt: skip
        write_json(folder / "result.json", result)
    print(table)
    return folder


def distil(config, task, state, folder, came):
    """All iterations that are left, with their bar, log lines, checkpoints and pictures."""
    from tqdm import tqdm

    size = restore_checkpoint(folder, state) if config.resume else 0  # later lines come again
    log = Log(folder, size, config.tensorboard, state.iteration)
    data, base = task.batches(state.rngs["data"]), state.roles.base_sum()
    start, end = state.iteration, config.iterations

    def picture():
        with state.averaged() as generator:
            task.on_log(state.iteration, generator)

    def due(every):
        return state.iteration == end or state.iteration % every == 0

    if size and due(config.log_every):  # it comes after that checkpoint, and may be missing
        picture()
    bar = tqdm(range(start, end), initial=start, total=end, desc="distil", unit="it")
    for _ in bar:
        tick = time.perf_counter()
        stats = {name: float(x) for name, x in iterate(config, state, data).items()}
        cost = {"seconds": time.perf_counter() - tick, "memory_mb": memory_mb(task.device)}
        shown = {name: stats.get(name, math.nan) for name in ("fake_loss", "relative_gap")}
        bar.set_postfix(shown, False, ms=round(cost["seconds"] * 1e3), MB=round(cost["memory_mb"]))
        if due(config.log_every):
            log({"step": state.iteration, **stats, **cost})
        if due(config.save_every) or came:
            save_checkpoint(folder, state, base, config)
        if due(config.log_every):  # last, as it may fail
            picture()
        if came:
            raise KeyboardInterrupt(came[0])
    if state.roles.base_sum() != base:
        raise RuntimeError("the frozen backbone moved; a bug, since nothing may train it")


# ---- 10. Command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help.")


def add_settings(command, names):
    """A flag for each line of Config that is named, its comment the help."""
    meaning = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, flag = types[field.name], "--" + field.name.replace("_", "-")
        how = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            how = {"choices": typing.get_args(kind)}
        presets = [f"; {name}: {p[field.name]}" for name, p in PRESETS.items() if field.name in p]
        text = f"{meaning[field.name]} [{field.default}{''.join(presets)}]".replace("%", "%%")
        if field.name in names:
            command.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def parser():
    """The four commands and their flags; what is not given is absent."""
    top = Parser(prog="w2svd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                   argument_default=argparse.SUPPRESS)  # fmt: skip

    distil = command("train", "distil a backbone")
    add_settings(distil, [field.name for field in dataclasses.fields(Config)])
    read = command("encode", "videos and captions into latents and embeddings, once")
    add_settings(read, ["model", *ENCODED])
    read.add_argument("--out", required=True, help="folder of the encoded clips, train's --data")
    read.add_argument("--videos", help="folder: a.mp4 + a.txt, metadata.jsonl or .csv, or lists")
    read.add_argument("--prompts", help="or a file of captions, a line each: data-free training")
    draw = command("sample", "sample a finished run")
    draw.add_argument("--run", required=True, help="a run folder, as runs/toy")
    draw.add_argument("--out", required=True, help=".png, .gif, .safetensors; or .mp4, a folder")
    draw.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    draw.add_argument("--n", type=int, help="toy: number of samples [1000]")
    draw.add_argument("--prompt", help="hunyuan: what to show, in one .mp4")
    draw.add_argument("--prompts", help="hunyuan: a file, a prompt a line; --out is a folder")
    draw.add_argument("--videos-per-prompt", type=int, help="hunyuan: 5 for VBench [1]")
    draw.add_argument("--lora-scale", type=float, help="hunyuan: of the generator's adapter [1]")
    draw.add_argument("--compare", action="store_true", help="hunyuan: the backbone's 28 steps too")
    give = command("export", "a finished HunyuanVideo run for other programs")
    give.add_argument("--run", required=True, help="a run folder, as runs/portrait")
    give.add_argument("--out", required=True, help="a new folder")
    give.add_argument("--format", required=True, choices=("diffusers", "comfyui", "merged"),
                      help="a LoRA for diffusers or ComfyUI, a whole transformer")  # fmt: skip
    return top


def resolve(given):
    """A whole Config: defaults, the model's preset, the given flags; or the resumed run's."""
    if given.get("resume") and not (given.get("out") and Path(given["out"]).is_dir()):
        raise Refused(f"--resume found no folder {given.get('out')}; name the run's --out.")
    model, data = given.get("model", Config.model), given.get("data", Config.data)
    base = Config(**PRESETS[model] | PRESETS.get(f"{model} {data}", {}))
    if model == "hunyuan":
        import hunyuan

        base = dataclasses.replace(base, **hunyuan.encoded_with(given.get("data", base.data)))
    if given.get("resume") and (Path(given["out"]) / "config.json").exists():
        base = read_run(given["out"])
        free = ("iterations", "resume", "out", "cache", "dry_run", "gpu_memory", "tflops",
                "sample_every", "compare", "tensorboard", "checkpointing")  # fmt: skip
        differ = [f"--{k.replace('_', '-')} is {getattr(base, k)} there, not {v}"
                  for k, v in given.items() if k not in free and v != getattr(base, k)]  # fmt: skip
        if differ:
            raise Refused(f"{given['out']} was made with other settings: {'; '.join(differ)}.")
        goal = given.get("iterations", base.iterations)
        if goal < base.iterations:
            raise Refused(f"--resume can only raise --iterations; they are {base.iterations}.")
        if goal > base.iterations and {base.alpha_weak_schedule, base.lr_schedule} != {"constant"}:
            raise Refused("--iterations cannot be raised here: the run has a schedule over them.")
    config = dataclasses.replace(base, **given)
    # a full fake's real DiT is the plain backbone, and a decay would pull all weights to 0
    fits = {"alpha_weak": 0.0, "fake_weight_decay": 0.0} if config.fake == "full" else {}
    if config.generator_input == "paired":  # its last exit knows its ground truth: learn from all
        fits["fake_samples"] = "all"
    if not given.get("resume"):
        fits = {name: value for name, value in fits.items() if name not in given}
        config = dataclasses.replace(config, **fits)
    check(config, given)
    return config


def read_generator(run):
    """The tensors and the header of a finished run's generator."""
    config, (tensors, info) = read_run(run), read_safetensors(Path(run) / "generator.safetensors")
    wanted = generator_info(config, info.get("base_sum"), info.get("step"))
    if any(info.get(name) != wanted[name] for name in ("model", "kind", "rank", "sigmas")):
        raise Refused(f"{run}/generator.safetensors is not a generator of this run: its header "
                      f"says {info}.")  # fmt: skip
    return tensors, info


def sample(run, out, seed, **given):
    """Draw samples of a finished run's generator, with the grid of its header, into `out`."""
    config, out = read_run(run), Path(out)
    if not 0 <= seed < 2**53:
        raise Refused("--seed must lie in [0, 2**53).")
    if not out.parent.is_dir():
        raise Refused(f"{out.parent} is not a folder; make it, or name another --out.")
    tensors, info = read_generator(run)
    task = load_task(config)
    foreign = set(given) - set(inspect.signature(task.sample).parameters)
    if foreign:
        flag = min(foreign).replace("_", "-")
        raise Refused(f"--{flag} does not fit {run}, a run of --model {config.model}.")
    print(task.sample(tensors, info, out, seed, **given))


def main(argv=None):
    """Run a command; 0, 1 where encode skipped clips, or 2 after a sentence about what failed."""
    status, again = 2, "train goes on with --resume --out, encode with the same command."
    try:
        given = vars(parser().parse_args(argv))
        command = given.pop("command")
        if command in ("encode", "export"):
            return getattr(importlib.import_module("hunyuan"), command)(**given)
        train(resolve(given)) if command == "train" else sample(**given)
        return 0
    except Refused as error:
        reason = error
    except torch.OutOfMemoryError:
        reason = ("out of GPU memory: see train's plan (--dry-run); less need --fp8-base, "
                  "--checkpointing, a lower --lora-rank, smaller clips at encode.")  # fmt: skip
    except ImportError as error:
        reason = f"{error}: pip install -r requirements.txt, and tensorboard for --tensorboard."
    except OSError as error:  # no space left, a folder that went away
        reason = f"{error}; what was written before is whole: once that is mended, {again}"
    except KeyboardInterrupt as stop:
        reason = f"stopped; {again}"
        status = 128 + (stop.args or [signal.SIGINT])[0]
    print(f"w2svd: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    from w2svd import main

    sys.exit(main())
