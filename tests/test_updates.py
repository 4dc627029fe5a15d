"""Section 6: the two updates, their inputs, what they refuse; W2SVD against plain DMD.

References: the generator's update written out again with merged weights W + alpha B A and autograd
(the fake's: see test_distil.py), a separate copy of the backbone without adapters, and a one-layer
network whose arithmetic is exact.
Run: python -m pytest tests/test_updates.py, 5 seconds on one core.
"""

import pytest
import torch
from conftest import SHAPES, STEPS, column, gradients
from torch import nn
from torch.func import functional_call

import w2svd
from w2svd import (
    Config,
    Roles,
    State,
    dmd_gradient,
    few_step_sigmas,
    generator_step,
    paired_input,
    rollout_input,
)

# -------------------------------------------------------------------- the updates


@SHAPES
@pytest.mark.parametrize("gt_weight", [0.0, 0.5, (0.5, 0.0, 2.0, 1.0)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 0.5, 3.0])
def test_the_generators_update_is_autograd_of_its_loss_with_the_gradient_held_fixed(
    new_roles, new_backbone, merged, draw, shape, gt_weight, guidance
):
    """loss = mean(x_gen * stopgrad(g)), g of DMD with guidance, and the ground truth's."""
    roles, plain = new_roles(shape, 0.25, 1.5), new_backbone(shape).module

    def x0_of(adapter, alpha, x_t, sigma, cond):
        weights = merged(plain, roles.state(adapter), alpha)
        return x_t - column(sigma, x_t) * functional_call(plain, weights, (x_t, sigma, cond))

    given, weight = draw(shape)["generator"], torch.tensor(gt_weight)
    stats = generator_step(roles, **given, gt_weight=weight, guidance=guidance)

    level, cond, sigma_in = given["sigma"], given["cond"], given["sigma_in"]
    x_gen = x0_of("generator", 1.0, given["x_in"], sigma_in, cond)
    x = x_gen.detach()
    x_t = (1 - column(level, x)) * x + column(level, x) * given["eps"]
    with torch.no_grad():
        x0_fake = x0_of("fake", 1.5, x_t, level, cond)
        x0_real = x0_of("fake", 0.25, x_t, level, cond)
        blind = x0_of("fake", 0.25, x_t, level, None)
        x0_real = guidance * x0_real + (1 - guidance) * blind  # as velocities are mixed
    g = torch.empty_like(x)
    for i, w in enumerate(weight.expand(len(x))):
        away = x0_fake[i] - given["x0_gt"][i]
        g[i] = (x0_fake[i] - x0_real[i]) / (x[i] - x0_real[i]).abs().mean()
        g[i] += w * away / away.abs().mean()
    expected = torch.autograd.grad((x_gen * g).mean(), roles.parameters("generator"))
    for got, exact in zip(gradients(roles, "generator"), expected):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=2e-5 * exact.abs().max())
    gap = (x0_fake - x0_real).square().mean().sqrt() / x0_real.square().mean().sqrt()
    torch.testing.assert_close(stats["relative_gap"], gap, rtol=1e-4, atol=0)
    torch.testing.assert_close(stats["gen_std"], x.std(), rtol=1e-4, atol=0)


# -------------------------------------------------------------------- W2SVD and DMD


@SHAPES
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_alpha_weak_0_is_dmd_with_a_separate_real_dit_bit_for_bit(
    new_roles, new_backbone, draw, shape, guidance
):
    """The reference's real DiT is another copy of the backbone, in which no adapter ever was."""
    ours, reference, plain = new_roles(shape, 0.0), new_roles(shape, 0.7), new_backbone(shape)
    reference.real = plain.velocity
    stats = [
        generator_step(r, **draw(shape)["generator"], guidance=guidance) for r in (ours, reference)
    ]
    for mine, exact in zip(gradients(ours, "generator"), gradients(reference, "generator")):
        assert exact.abs().sum() > 0
        assert torch.equal(mine, exact)
    assert stats[0].keys() == stats[1].keys()
    assert all(torch.equal(stats[0][name], stats[1][name]) for name in stats[0])


@SHAPES
def test_equal_alphas_give_the_generator_a_gradient_of_exactly_zero(new_roles, draw, shape):
    roles = new_roles(shape, alpha_weak=0.6, alpha_strong=0.6)
    stats = generator_step(roles, **draw(shape)["generator"])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(roles, "generator"))
    assert stats["relative_gap"] == 0


class OneLayer:
    """velocity = W x: linear in its adapter. Whole numbers everywhere, so float32 is exact."""

    lora_targets = "layer"

    def __init__(self):
        self.module = nn.Module()
        self.module.layer = nn.Linear(2, 2, bias=False)
        self.module.layer.weight.data = torch.tensor([[2.0, -1.0], [1.0, 3.0]])

    def velocity(self, x_t, sigma, cond):
        return self.module.layer(x_t)


def difference_of_one_layer(alpha_weak, alpha_strong, monkeypatch):
    """x0_fake - x0_real, as generator_step hands them to dmd_gradient."""
    roles, seen = Roles(OneLayer(), 1, alpha_weak, alpha_strong), []
    for A, B in (roles.parameters("generator"), roles.parameters("fake")):
        A.data, B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0], [4.0]])

    def watched(x_gen, x0_real, x0_fake):
        seen.append(x0_fake - x0_real)
        return dmd_gradient(x_gen, x0_real, x0_fake)

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "dmd_gradient", watched)
        x_in, eps = torch.tensor([[1.0, -2.0], [3.0, 1.0]]), torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
        sigma_in, sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25])
        generator_step(roles, x_in, sigma_in, None, sigma, eps)
    return seen[0]


@pytest.mark.parametrize("alpha_weak, alpha_strong", [(0.25, 1.0), (0.5, 1.0), (0.5, 2.0)])
def test_in_a_linear_network_w2svd_scales_dmds_difference_exactly(
    alpha_weak, alpha_strong, monkeypatch
):
    dmd = difference_of_one_layer(0.0, alpha_strong, monkeypatch)
    ours = difference_of_one_layer(alpha_weak, alpha_strong, monkeypatch)
    assert dmd.abs().min() > 0
    assert torch.equal(ours, (alpha_strong - alpha_weak) / alpha_strong * dmd)


# -------------------------------------------------------------------- the generator's inputs


def streams(seed=0):
    return {
        name: torch.Generator().manual_seed(seed + i) for i, name in enumerate(("input", "exit"))
    }


@SHAPES
def test_paired_inputs_are_the_real_samples_noised_to_levels_of_the_grid(shape):
    sigmas, n = few_step_sigmas(4, 5.0), 64
    x0 = torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))
    x_in, sigma = paired_input(x0, sigmas, streams())
    noise = torch.randn(x0.shape, generator=streams()["input"])
    expected = (1 - column(sigma, x0)) * x0 + column(sigma, x0) * noise
    torch.testing.assert_close(x_in, expected, rtol=1e-6, atol=1e-6)
    assert sigma.shape == (n,)
    counts = [int((sigma == level).sum()) for level in sigmas[:-1]]
    assert sum(counts) == n and min(counts) > 4  # each sample has its own level, all are visited


@SHAPES
@pytest.mark.parametrize("final", [False, True], ids=["all", "final"])
def test_rollout_inputs_are_the_generators_own_states_at_one_exit(new_roles, draw, shape, final):
    """Written out: x0 = x - sigma v, then new noise; the input at exit k had k evaluations."""
    roles, given, sigmas = new_roles(shape), draw(shape)["generator"], few_step_sigmas(4, 5.0)
    x0, cond, visited = given["x0_gt"], given["cond"], set()
    for seed in range(0, 40, 2):
        rngs = streams(seed)
        x_in, sigma = rollout_input(roles.generator, x0, cond, sigmas, rngs, final)
        assert (sigma == sigma[0]).all() and sigma.shape == (len(x0),)
        exit_at = sigmas.tolist().index(sigma[0].item())
        visited.add(exit_at)
        rng = streams(seed)["input"]
        x = torch.randn(x0.shape, generator=rng)
        for k in range(exit_at):
            with torch.no_grad():
                x = x - sigmas[k] * roles.generator(x, sigmas[k].expand(len(x)), cond)
            x = (1 - sigmas[k + 1]) * x + sigmas[k + 1] * torch.randn(x0.shape, generator=rng)
        torch.testing.assert_close(x_in, x, rtol=1e-5, atol=1e-5)
        assert not x_in.requires_grad
        assert torch.equal(rngs["input"].get_state(), rng.get_state())
    assert visited == ({3} if final else {0, 1, 2, 3})


# -------------------------------------------------------------------- what stops a run


@pytest.mark.parametrize(
    "step, poisoned, message",
    [
        ("fake", "the samples", r"sample in the fake's update.*sigma 0\.6250"),
        ("fake", "fake", r"the fake's velocity.*sigma 0\.6250"),
        ("generator", "generator", r"the generator's sample.*sigma 0\.8333"),
        ("generator", "fake", r"the fake's velocity.*sigma 0\.6250"),
        ("generator", "real", r"the real DiT's velocity.*sigma 0\.6250"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_stops_the_step_with_stage_and_noise_level_and_no_gradient(
    new_roles, draw, step, poisoned, message, value
):
    roles, given = new_roles(), draw()[step]
    given["sigma"][2], velocity = 0.625, roles.backbone.velocity  # sigma_in[2] is 5/6
    if poisoned == "the samples":
        given["x_gen"][2, 0] = value

    def third_sample_fails(x_t, sigma, cond):
        v = velocity(x_t, sigma, cond)
        bad = torch.zeros_like(v)
        bad[2, 0] = value
        return v + bad if roles.role == poisoned else v

    roles.backbone.velocity = third_sample_fails
    with pytest.raises(FloatingPointError, match=message):
        STEPS[step](roles, **given)
    assert roles.role is None
    assert all(g is None for r in STEPS for g in gradients(roles, r))


# -------------------------------------------------------------------- numbers for the log


def test_under_the_average_the_generator_has_its_weights_and_after_an_exception_its_own(
    new_roles, draw
):
    roles, given = new_roles(), draw()["generator"]
    at = given["x_in"], given["sigma_in"], given["cond"]
    state = State(Config(), roles, "cpu")
    own = {name: p.detach().clone() for name, p in roles.state("generator").items()}
    for average in state.average.values():
        average.mul_(0.5)
    with pytest.raises(ZeroDivisionError), state.averaged() as velocity:
        assert torch.equal(velocity(*at), roles.generator(*at))
        for name, parameter in roles.state("generator").items():
            assert torch.equal(parameter, 0.5 * own[name])
        raise ZeroDivisionError
    for name, parameter in roles.state("generator").items():
        assert torch.equal(parameter, own[name])
        assert torch.equal(state.average[name], 0.5 * own[name])
