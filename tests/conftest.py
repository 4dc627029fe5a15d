"""Shared by the tests: one thread, and tiny backbones in which every weight has an effect."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks a hub

import pytest
import torch

from toy.dit import DiT
from toy.tasks import Backbone
from w2svd import Roles, fake_step, few_step_sigmas, generator_step

torch.set_num_threads(1)

POINT, VIDEO = (2,), (2, 4, 4, 4)
SHAPES = pytest.mark.parametrize("shape", [POINT, VIDEO], ids=["points", "videos"])
TWO_CAPTIONS = 2
STEPS = {"fake": fake_step, "generator": generator_step}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """./ is a test's own empty folder."""
    monkeypatch.chdir(tmp_path)


def column(sigma, x):
    """sigma (B,), shaped to multiply x (B, ...)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def gradients(roles, role):
    return [p.grad for p in roles.parameters(role)]


@torch.no_grad()
def randomise(parameters, seed, scale):
    """Zero-initialised weights (adaLN-Zero, LoRA's B) would hide every error behind them."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(scale * torch.randn(parameter.shape, generator=rng))


@pytest.fixture
def new_backbone():
    """new_backbone(shape): always the same frozen, random DiT of this shape, in a new copy."""

    def make(shape=POINT):
        patch = (1, 1, 1) if len(shape) == 1 else (2, 2, 2)
        module = DiT(shape, 8, 2, double=1, single=1, patch=patch, labels=TWO_CAPTIONS)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        randomise(module.parameters(), seed=1, scale=0.3)
        return Backbone(module.requires_grad_(False))

    return make


@pytest.fixture
def new_roles(new_backbone):
    """new_roles(shape, ...): Roles on that DiT; what they train is random, always the same."""

    def make(shape=POINT, alpha_weak=0.25, alpha_strong=1.0, rank=3, backbone=None, **kinds):
        roles = Roles(backbone or new_backbone(shape), rank, alpha_weak, alpha_strong, **kinds)
        for seed, role in enumerate(("generator", "fake"), start=2):
            lora = role in roles.adapters
            with torch.no_grad():
                for parameter in roles.parameters(role) if lora else ():
                    parameter.zero_()
            randomise(roles.parameters(role), seed, scale=0.3 if lora else 0.05)
        return roles

    return make


@pytest.fixture
def draw():
    """draw(shape): the arguments of the two steps, by name and role, always the same numbers."""

    def make(shape=POINT, n=4):
        rng = torch.Generator().manual_seed(9)
        x0, x_in, eps = torch.randn(3, n, *shape, generator=rng)
        cond = torch.randint(TWO_CAPTIONS, (n,), generator=rng)
        sigma_in = few_step_sigmas(4, 5.0)[torch.arange(n) % 4]  # the first is pure noise
        both = {"cond": cond, "sigma": 0.1 + 0.8 * torch.rand(n, generator=rng), "eps": eps}
        generator = {"x_in": x_in, "sigma_in": sigma_in, "x0_gt": x0}
        return {"fake": {"x_gen": x0} | both, "generator": generator | both}

    return make


@pytest.fixture
def entered(monkeypatch):
    """[(x, gradient)] of every backward that starts at a tensor."""
    seen, backward = [], torch.Tensor.backward

    def watched(x, gradient=None, *args, **how):
        seen.append((x.detach(), gradient))
        return backward(x, gradient, *args, **how)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    return seen


@pytest.fixture
def merged():
    """merged(module, adapter, alpha): weights W + alpha B A of a plain module, {name: tensor}.

    With a whole copy's weights in place of an adapter's these are it, whatever alpha is.
    """

    def make(module, trained, alpha):
        weights = dict(module.named_parameters())
        for name, x in trained.items():
            layer = name.replace("lora_A.", "")
            if layer != name:
                weights[layer] = (
                    weights[layer] + alpha * trained[name.replace("lora_A", "lora_B")] @ x
                )
            elif name in weights:
                weights[name] = x
        return weights

    return make
