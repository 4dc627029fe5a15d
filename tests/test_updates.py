"""Section 6: the generator's update, what both refuse, the average; W2SVD against plain DMD.

References: the update's loss written again with merged weights W + alpha B A and autograd (the
fake's and the inputs: test_distil.py), a separate copy of the backbone without adapters, and a
one-layer network whose arithmetic is exact. Run: python -m pytest tests/test_updates.py, 5 seconds.
"""

import pytest
import torch
from conftest import SHAPES, STEPS, column, generator_loss, gradients, merged
from helpers import watch
from torch import nn
from torch.func import functional_call

import w2svd
from w2svd import Config, Roles, State, generator_step


@SHAPES
@pytest.mark.parametrize(
    "gt_weight, guidance", [(0.0, 1.0), (0.5, 3.0), ((0.5, 0.0, 2.0, 1.0), 0.5)], ids=str
)
def test_the_generators_update_is_autograd_of_its_loss_with_the_gradient_held_fixed(
    new_roles, new_backbone, draw, shape, gt_weight, guidance
):
    roles, plain = new_roles(shape, 0.25, 1.5), new_backbone(shape).module

    def x0_of(role, x_t, sigma, cond):
        adapter = "generator" if role == "generator" else "fake"
        alpha = {"generator": 1.0, "fake": 1.5, "real": 0.25}[role]
        weights = merged(plain, roles.state(adapter), alpha)
        return x_t - column(sigma, x_t) * functional_call(plain, weights, (x_t, sigma, cond))

    given = {**draw(shape)["generator"], "gt_weight": torch.tensor(gt_weight), "guidance": guidance}
    stats = generator_step(roles, **given)
    loss, x_gen, numbers = generator_loss(x0_of, **given)
    expected = torch.autograd.grad(loss, roles.parameters("generator"))
    for got, exact in zip(gradients(roles, "generator"), expected):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=2e-5 * exact.abs().max())
    for name, exact in {**numbers, "gen_std": x_gen.std()}.items():
        torch.testing.assert_close(stats[name], exact, rtol=1e-4, atol=0)


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
    assert stats[0] == stats[1]


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


@pytest.mark.parametrize("alpha_weak, alpha_strong", [(0.25, 1.0), (0.5, 1.0), (0.5, 2.0)])
def test_in_a_linear_network_w2svd_scales_dmds_difference_exactly(
    alpha_weak, alpha_strong, monkeypatch
):
    calls = watch(monkeypatch, w2svd, "dmd_gradient")
    x_in, eps = torch.tensor([[1.0, -2.0], [3.0, 1.0]]), torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
    sigma_in, sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25])
    for alpha in (0.0, alpha_weak):
        roles = Roles(OneLayer(), 1, alpha, alpha_strong)
        for A, B in (roles.parameters("generator"), roles.parameters("fake")):
            A.data, B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0], [4.0]])
        generator_step(roles, x_in, sigma_in, None, sigma, eps)
    dmd, ours = (x0_fake - x0_real for _, x0_real, x0_fake in (call.args for call in calls))
    assert dmd.abs().min() > 0
    assert torch.equal(ours, (alpha_strong - alpha_weak) / alpha_strong * dmd)


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
def test_a_non_finite_value_stops_the_step_with_stage_and_noise_level_and_no_gradient(
    new_roles, draw, step, poisoned, message
):
    roles, given = new_roles(), draw()[step]
    given["sigma"][2], velocity = 0.625, roles.backbone.velocity  # sigma_in[2] is 5/6
    if poisoned == "the samples":
        given["x_gen"][2, 0] = torch.inf

    def third_sample_fails(x_t, sigma, cond):
        v = velocity(x_t, sigma, cond)
        bad = torch.zeros_like(v)
        bad[2, 0] = torch.nan
        return v + bad if roles.role == poisoned else v

    roles.backbone.velocity = third_sample_fails
    with pytest.raises(FloatingPointError, match=message):
        STEPS[step](roles, **given)
    assert roles.role is None
    assert all(g is None for r in STEPS for g in gradients(roles, r))


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
