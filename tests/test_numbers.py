"""Numbers as they are at 13B: bf16, gradients of 1e-10, a spike, videos of several sizes.

Against: the same step in float32, Adam's rule by hand, the same motion at a quarter of the size.
Run: `python -m pytest tests/test_numbers.py`, 20 seconds.
"""

import copy
import itertools

import pytest
import torch
from conftest import POINT

from toy.precision import clip, difference_and_gradient, hunyuan, roles_of
from w2svd import Config, HunyuanVideo, Roles, State, distil, gap_floor

FORMS = (None, "token_replace", "latent_concat")
UPDATED = 2e-3  # the adapters' B after a hundred updates of 2e-5
PLAIN, OURS = "bf16, as it comes", "bf16, stream in float32"


@pytest.mark.parametrize("form", FORMS)
def test_bf16_keeps_the_difference_of_fake_and_real_and_the_gradient_along_it(form):
    module = hunyuan(form)
    exact, gradient = difference_and_gradient(roles_of(module, "float32", UPDATED), form)

    def errors(way, **how):
        found, g = difference_and_gradient(roles_of(module, way, UPDATED, **how), form)
        relative = float((found - exact).norm() / exact.norm())
        return relative, float(torch.cosine_similarity(g, gradient, 0))

    error, cosine = errors(OURS)
    assert error < 1 and cosine > 0.95
    assert errors(OURS, checkpointing=True) == (error, cosine)
    error, cosine = errors(PLAIN)  # the test would notice
    assert error > 4 and cosine < 0.7


def test_the_logged_floor_is_the_gap_of_rounding():
    """In bf16 as large as the gap of barely trained adapters; in float32 far less."""
    x0, cond = clip()
    module, floors = hunyuan(), {}
    for way in ("float32", OURS):
        roles = roles_of(module, way, std=0.0)
        floors[way] = gap_floor(roles, {"x0": x0, "cond": cond}, 2e-5)
        assert not any(p.any() for n, p in roles.state("fake").items() if "lora_B" in n)
    assert 5 * floors["float32"] < floors[OURS] < 1e-3


def weights(roles, role="generator"):
    return torch.cat([p.detach().flatten() for p in roles.parameters(role)])


@pytest.fixture
def state(new_roles):
    roles = new_roles(POINT)
    return State(Config(lora_rank=4), roles, "cpu")


def updated(state, size, seed):
    """Where one update along normal gradients of that size moves the generator, and their norm."""
    rng, before = torch.Generator().manual_seed(seed), weights(state.roles)
    for p in state.roles.parameters("generator"):
        p.grad = size * torch.randn(p.shape, generator=rng)
    norm = state.update("generator", 1e-3)
    return weights(state.roles) - before, float(norm)


def test_gradients_of_1e_10_move_the_weights_at_the_full_rate(state):
    moved, norm = updated(state, 1e-10, seed=0)
    assert norm == pytest.approx(1e-10 * len(moved) ** 0.5, rel=0.1)
    assert moved.abs().median() == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_a_hundred_times_the_usual_is_no_more_than_a_few_steps(state):
    """And the next ones are ordinary again; a usual one is left as it is."""
    usual = [float(updated(state, 1e-6, seed)[0].norm()) for seed in range(20)]
    spike, norm = updated(state, 1e-4, seed=20)
    assert norm == pytest.approx(1e-4 * len(spike) ** 0.5, rel=0.1)  # logged as it was
    assert spike.norm() < 3.1 * max(usual)
    assert 0.6 * usual[-1] < updated(state, 1e-6, seed=21)[0].norm() < usual[-1]


def test_the_same_rate_moves_the_weights_of_small_and_large_videos_alike():
    module, distances = hunyuan(heads=1), []
    config = Config(generator_lr=1e-3, fake_lr=1e-3, fake_updates=2, iterations=3)
    for side in (8, 16):
        torch.manual_seed(0)
        roles = Roles(HunyuanVideo(copy.deepcopy(module), Config()), 4, 0.25, 1.0)
        before, state = weights(roles), State(config, roles, "cpu")
        x0, cond = clip(side=side)
        data = itertools.repeat({"x0": x0, "cond": cond})
        list(distil(config, roles, state, data))
        moved = (weights(roles) - before).square().mean().sqrt()  # of a weight
        distances.append(float(moved) / config.generator_lr)
    assert 1.0 < min(distances) and max(distances) < 1.2 * min(distances)  # in steps, of three
