"""Section 2 and the samplers: noise, velocity, score, grids, few-step and Euler sampling.

References: numbers worked out by hand, torch.distributions' normals with autograd, and diffusers'
FlowMatchEulerDiscreteScheduler step for step. Run: python -m pytest tests/test_flow_matching.py, 8
seconds on one core, most of it the import of diffusers.
"""

import pytest
import torch
from conftest import COVARIANCE, MEAN, SHAPES, column, gaussian, randn, seeded
from torch.distributions import MultivariateNormal

from w2svd import (
    add_noise,
    euler_sample,
    few_step_sample,
    few_step_sigmas,
    guided,
    sample_sigma,
    score_from_velocity,
    shift_sigma,
    x0_from_velocity,
)


def test_noise_level_0_is_the_sample_1_is_the_noise_and_between_is_the_straight_line():
    x0, eps = randn(3, 2), randn(3, 2, seed=1)
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, 1.0), eps)
    torch.testing.assert_close(add_noise(x0, eps, 0.25), 0.75 * x0 + 0.25 * eps, rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95, 1.0])
def test_score_and_clean_sample_of_a_gaussian_are_autograds_and_tweedies(sigma):
    """score = grad log p(x_t), and (1 - sigma) E[x0 | x_t] = x_t + sigma^2 score."""
    level = torch.full((6,), sigma, dtype=torch.float64)
    x_t = (2 * randn(6, 2)).requires_grad_()
    S = (1 - sigma) ** 2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    log_prob = MultivariateNormal((1 - sigma) * MEAN, S).log_prob(x_t).sum()
    (exact,) = torch.autograd.grad(log_prob, x_t)
    x_t = x_t.detach()
    v = gaussian(MEAN, COVARIANCE).velocity(x_t, level)
    torch.testing.assert_close(score_from_velocity(x_t, v, level), exact, rtol=1e-10, atol=1e-12)
    x0 = x0_from_velocity(x_t, v, level)
    tweedie = x_t + sigma**2 * exact
    torch.testing.assert_close((1 - sigma) * x0, tweedie, rtol=1e-10, atol=1e-12)


def test_guidance_is_off_at_1_ignores_the_condition_at_0_and_extrapolates_beyond():
    v_cond, v_uncond = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]])
    assert torch.equal(guided(v_cond, v_uncond, 1.0), v_cond)
    assert torch.equal(guided(v_cond, v_uncond, 0.0), v_uncond)
    assert torch.equal(guided(v_cond, v_uncond, 3.0), torch.tensor([[7.0, -7.0]]))


def test_the_shift_multiplies_the_odds_of_the_noise_level():
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    shifted = shift_sigma(sigma, 5.0)
    torch.testing.assert_close(shifted / (1 - shifted), 5 * sigma / (1 - sigma), rtol=1e-12, atol=0)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_sigma(ends, 5.0), ends)


def test_every_grid_falls_from_exactly_1_to_exactly_0():
    """Evenly spaced and shifted once: with shift 5, the author's code's, 1, 15/16, 5/6, 5/8, 0."""
    assert torch.equal(few_step_sigmas(4, 5.0), torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0]))
    assert few_step_sigmas(1, 7.0).tolist() == [1.0, 0.0]
    for steps in (2, 3, 28, 50):
        grid = few_step_sigmas(steps, 5.0)
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
        assert (grid.diff() < 0).all()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_are_uniform_between_low_and_high_and_then_shifted_once(shift):
    """Kolmogorov-Smirnov against the exact distribution; the bound is passed 999 times in 1000."""
    n, low, high = 20_000, 0.1, 0.7
    sigma = sample_sigma(n, low, high, shift, seeded())
    assert sigma.shape == (n,) and sigma.dtype == torch.float32
    u = sigma.double() / (shift - (shift - 1) * sigma.double())  # the inverse of the shift
    assert u.min() >= low - 1e-6 and u.max() <= high + 1e-6
    uniform = ((u - low) / (high - low)).sort().values
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (uniform - steps).abs().max() < 1.95 / n**0.5


def network(x, sigma, cond):
    """Any nonlinear velocity that depends on all it is given."""
    return torch.sin(2 * x + 3 * column(sigma, x)) + column(cond, x) * x


def scheduler_states(sigmas, noise, cond, rng, stochastic):
    """The states of diffusers' scheduler, on our grid and without a shift of its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    assert torch.equal(scheduler.sigmas, sigmas)
    states = [noise]
    for t, sigma in zip(scheduler.timesteps, sigmas):
        v = network(states[-1], sigma.expand(len(noise)), cond)
        states.append(scheduler.step(v, t, states[-1], generator=rng).prev_sample)
    return states


@SHAPES
def test_few_step_sampling_is_diffusers_stochastic_scheduler_at_every_step(shape):
    """Also where both draw from torch's global generator."""
    sigmas, noise = few_step_sigmas(4, 5.0), randn(3, *shape, dtype=torch.float32)
    cond = torch.tensor([0.0, 0.5, 1.0])
    states = scheduler_states(sigmas, noise, cond, seeded(7), stochastic=True)
    for k, state in enumerate(states):
        torch.manual_seed(7)
        for rng in (seeded(7), None):
            ours = few_step_sample(network, noise, sigmas[: k + 1], cond, rng)
            torch.testing.assert_close(ours, state, rtol=1e-6, atol=1e-6)


def test_euler_sampling_is_diffusers_deterministic_scheduler_and_draws_nothing():
    sigmas, noise = few_step_sigmas(10, 5.0), randn(3, 2, dtype=torch.float32)
    cond, rng = torch.tensor([0.0, 0.5, 1.0]), torch.Generator()
    states, before = scheduler_states(sigmas, noise, cond, None, stochastic=False), rng.get_state()
    ours = euler_sample(network, noise, sigmas, cond, rng)
    assert torch.equal(rng.get_state(), before)
    torch.testing.assert_close(ours, states[-1], rtol=1e-6, atol=1e-6)


def test_samplers_build_no_graph():
    scale = torch.ones((), requires_grad=True)
    for sampler in (few_step_sample, euler_sample):
        x = sampler(lambda x, sigma, cond: scale * x, randn(3, 2), few_step_sigmas(2, 1.0))
        assert not x.requires_grad
