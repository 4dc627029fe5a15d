"""Section 5 and what uses it: the head, its losses, its gradient at the generator's samples.

Against: finite differences, losses written again, the exact log density ratio of two mixtures. Run
with `python -m pytest tests/test_discriminator.py`; ten seconds.
"""

import dataclasses

import pytest
import torch
from conftest import POINT, SHAPES, VIDEO, seeded
from helpers import watch
from torch.nn.functional import softplus

import w2svd
from toy.mixtures import GaussianMixture, ring
from toy.tasks import POINTS, Backbone, train_backbone
from w2svd import Config, Discriminator, Roles, State, add_noise, discriminator_step, distil


@pytest.fixture
def judge(new_roles):
    """judge(shape): a discriminator of random weights on random roles."""

    def make(shape=POINT):
        torch.manual_seed(5)
        return Discriminator(new_roles(shape))

    return make


@SHAPES
def test_the_logit_reads_the_plain_backbone_after_its_double_stream_blocks(
    judge, new_backbone, draw, shape
):
    d, given = judge(shape), draw(shape)["fake"]
    x_t, sigma, cond = given["x_gen"], given["sigma"], given["cond"]
    plain, seen = new_backbone(shape).module, []  # without any adapter
    plain.double_blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out[0]))
    plain(x_t, sigma, cond)
    expected = torch.stack([d.head(tokens).mean() for tokens in seen[0]])
    d.roles.backbone.module.single_blocks[0].register_forward_hook(lambda *_: 1 / 0)  # not run
    for role in (None, "generator", "fake", "real"):
        with d.roles.use(role):
            torch.testing.assert_close(d.logit(x_t, sigma, cond), expected)


@SHAPES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_at_the_samples_is_that_of_finite_differences(
    judge, draw, shape, checkpointing
):
    d, given = judge(shape), draw(shape)["fake"]
    d.roles.backbone.module.double()
    d.head.double()
    x, sigma, cond, eps = (given[n] for n in ("x_gen", "sigma", "cond", "eps"))
    x, eps, sigma = x.double(), eps.double(), sigma.double()
    if checkpointing:
        d.roles.use_checkpointing()
    with d.roles.use("generator"):
        gradient, loss = d.gradient(x, cond, sigma, eps)
    assert d.head[1].weight.grad is None and d.roles.role is None

    def loss_at(x):
        with torch.no_grad():
            return softplus(-d.logit(add_noise(x, eps, sigma), sigma, cond)).mean()

    torch.testing.assert_close(loss, loss_at(x))
    for i in torch.randperm(x.numel(), generator=seeded())[:8]:
        nudge = torch.zeros_like(x)
        nudge.view(-1)[i] = 1e-4
        slope = (loss_at(x + nudge) - loss_at(x - nudge)) / 2e-4
        assert float(gradient.flatten()[i]) == pytest.approx(float(slope), rel=1e-3, abs=1e-7)


@SHAPES
def test_the_head_alone_learns_from_its_loss(judge, draw, shape):
    d, given = judge(shape), draw(shape)["fake"]
    x_gen, sigma, cond, eps = (given[n] for n in ("x_gen", "sigma", "cond", "eps"))
    x0 = draw(shape)["generator"]["x_in"]
    stats = discriminator_step(d.roles, x_gen, x0, cond, sigma, eps)
    real, generated = (d.logit(add_noise(x, eps, sigma), sigma, cond) for x in (x0, x_gen))
    loss = (torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(generated))).mean()
    torch.testing.assert_close(stats["discriminator_loss"], loss.detach(), rtol=1e-3, atol=1e-5)
    expected = torch.autograd.grad(loss, list(d.head.parameters()))
    for parameter, gradient in zip(d.head.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-5)
    means = {"logit_real": real.mean().detach(), "logit_gen": generated.mean().detach()}
    torch.testing.assert_close({name: stats[name] for name in means}, means)
    for role in ("generator", "fake"):
        assert all(p.grad is None for p in d.roles.parameters(role))


def test_the_generator_s_backward_starts_from_the_sum_of_both_gradients(judge, draw, monkeypatch):
    given, entered = draw(VIDEO)["generator"], watch(monkeypatch, torch.Tensor, "backward")
    for weight in (0.0, 0.7):
        d = judge(VIDEO)
        stats = w2svd.generator_step(d.roles, **given, gan_weight=weight)
    (x_gen, dmd), (_, both) = (call.args for call in entered)
    gradient, loss = d.gradient(x_gen, given["cond"], given["sigma"], given["eps"])
    torch.testing.assert_close(both, dmd + 0.7 * gradient)
    assert not dmd.requires_grad and not both.requires_grad  # fake and real are not differentiated
    assert torch.equal(stats["gan_loss"], loss)
    assert all(p.grad is None for p in d.head.parameters())


def test_in_the_loop_both_read_the_fake_update_s_samples_and_noise(new_roles, monkeypatch):
    steps = [watch(monkeypatch, w2svd, f"{name}_step") for name in ("fake", "discriminator")]
    updates, roles = watch(monkeypatch, State, "update"), new_roles()
    config = Config(gan_weight=0.1, fake_updates=3, accumulate=2, iterations=2, lora_rank=3)
    Discriminator(roles)
    data = ({"x0": torch.full((4, 2), float(i)), "cond": None} for i in range(99))
    rows = list(distil(config, roles, State(config, roles, "cpu"), data))
    fakes, judged = ([call.args[1:] for call in calls] for calls in steps)
    assert len(judged) == len(fakes) == 2 * 3 * 2
    for (x_gen, _, sigma, eps), given in zip(fakes, judged):
        assert given[0] is x_gen and given[3] is sigma and given[4] is eps
    reals = [float(x0[0, 0]) for _, x0, *_ in judged]
    assert reals == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]  # the batches behind the samples
    pair = [("fake", config.fake_lr), ("discriminator", config.fake_lr)]
    rates = [call.args[1:] for call in updates]
    assert rates == 2 * [*3 * pair, ("generator", config.generator_lr)]
    assert {"discriminator_loss", "logit_real", "logit_gen", "gan_loss"} <= rows[0].keys()


def test_the_trained_logit_is_the_log_density_ratio_of_two_mixtures():
    """Real: the ring. Generated: the ring with its eight weights changed, 15 times in all.

    The optimum of softplus losses is log p(x_t) - log q(x_t), which both mixtures know. The head
    sits on the toy's backbone as it is distilled, at one noise level.
    """
    exact, rng, level = ring(), seeded(1), 0.3
    other = GaussianMixture(torch.linspace(0.2, 3.0, 8), exact.means, torch.full((8,), 0.2**2))
    recipe = dataclasses.replace(POINTS, iterations=300, batch=256)
    backbone = Backbone(train_backbone(exact, recipe, seed=3).requires_grad_(False))
    torch.manual_seed(0)
    d = Discriminator(Roles(backbone, 4, 0.25, 1.0))
    optimizer = torch.optim.Adam(d.head.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        x0, x_gen = exact.sample(768, rng), other.sample(768, rng)
        sigma, eps = torch.full((768,), level), torch.randn(768, 2, generator=rng)
        discriminator_step(d.roles, x_gen, x0, None, sigma, eps)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    x0, eps = exact.sample(2048, rng), torch.randn(2048, 2, generator=rng)
    sigma = torch.full((2048,), level)
    x_t = add_noise(x0, eps, sigma).requires_grad_()
    ratio = exact.log_prob(x_t, level) - other.log_prob(x_t, level)
    assert (d.logit(x_t, sigma, None) - ratio).abs().mean() < 0.06 < 0.5 < ratio.abs().mean()
    gradient, _ = d.gradient(x0, None, sigma, eps)
    (steepest,) = torch.autograd.grad(ratio.sum(), x_t)
    steep = steepest.norm(dim=1) > steepest.norm(dim=1).median()
    assert torch.cosine_similarity(-gradient, steepest)[steep].mean() > 0.8
