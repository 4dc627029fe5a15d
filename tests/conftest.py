"""Shared by the tests: one thread, and tiny backbones in which every weight has an effect."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks a hub

import helpers
import pytest
import torch

from toy.dit import DiT
from toy.mixtures import GaussianMixture
from toy.tasks import Backbone
from w2svd import Roles, fake_step, few_step_sigmas, generator_step

torch.set_num_threads(1)

POINT, VIDEO = (2,), (2, 4, 4, 4)
SHAPES = pytest.mark.parametrize("shape", [POINT, VIDEO], ids=["points", "videos"])
TWO_CAPTIONS = 2
STEPS = {"fake": fake_step, "generator": generator_step}
MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """./ is a test's own empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_toy(monkeypatch):
    helpers.make_small(monkeypatch.setattr)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=seeded(seed), dtype=dtype)


def relative(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def gaussian(mean, covariance):
    """One Gaussian as a mixture; a variance will do as covariance."""
    return GaussianMixture(torch.ones(1), mean[None], torch.as_tensor(covariance)[None])


def column(sigma, x):
    """sigma (B,), shaped to multiply x (B, ...)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def generator_loss(x0_of, x_in, sigma_in, cond, sigma, eps, x0_gt, gt_weight, guidance):
    """mean(x_gen * stopgrad(g)), g of DMD with guidance and of the ground truth, written again.

    x0_of(role, x_t, sigma, cond) predicts. Returns the loss, x_gen, and numbers of the log.
    """
    x_gen, s = x0_of("generator", x_in, sigma_in, cond), column(sigma, eps)
    x = x_gen.detach()
    x_t = (1 - s) * x + s * eps
    with torch.no_grad():
        x0_fake, x0_real = (x0_of(role, x_t, sigma, cond) for role in ("fake", "real"))
        blind = x0_of("real", x_t, sigma, None)
    x0_real = guidance * x0_real + (1 - guidance) * blind  # as velocities are mixed
    g = torch.empty_like(x)
    for i, weight in enumerate(torch.as_tensor(gt_weight).expand(len(x))):
        g[i] = (x0_fake[i] - x0_real[i]) / (x[i] - x0_real[i]).abs().mean()
        away = x0_fake[i] - x0_gt[i]
        g[i] += weight * away / away.abs().mean()
    gap = (x0_fake - x0_real).norm() / x0_real.norm()
    v = [((x_t - x0) / s).flatten(1) for x0 in (x0_fake, x0_real)]
    numbers = {"relative_gap": gap, "cos_fake_real": torch.cosine_similarity(*v).mean()}
    return (x_gen * g).mean(), x, numbers


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


def merged(module, trained, alpha):
    """Weights W + alpha B A of a plain module, {name: tensor}.

    With a whole copy's weights in place of an adapter's these are it, whatever alpha is.
    """
    weights = dict(module.named_parameters())
    for name, x in trained.items():
        layer = name.replace("lora_A.", "")
        if layer != name:
            B = trained[name.replace("lora_A", "lora_B")]
            weights[layer] = weights[layer] + alpha * B @ x
        elif name in weights:
            weights[name] = x
    return weights
