"""toy/baselines.py: LCM, fine-tuning and the fit to the backbone's pairs, in distil's place.

Against: each loss written again with plain weights and autograd, forwards counted, an uninterrupted
run. Run with `python -m pytest tests/test_baselines.py`; 20 seconds.
"""

import pytest
import torch
from conftest import SHAPES, column, merged
from helpers import CONSTANT, flags_of, names, said, same_run

import w2svd
from toy import baselines
from toy.tiny_hunyuan import SIZE, TEMPLATE, clips, save_tiny
from w2svd import Config, State, few_step_sigmas, stream_seed

METHODS = pytest.mark.parametrize("method", baselines.LOOPS)


@pytest.fixture
def again(new_backbone):
    """again(shape, cond): velocity(trained, x, sigma) of a plain module with merged weights."""

    def make(shape, cond):
        module = new_backbone(shape).module
        return lambda trained, x, sigma: torch.func.functional_call(
            module, merged(module, trained, 1.0), (x, sigma, cond)
        )

    return make


def leaves(roles):
    return {n: p.detach().clone().requires_grad_() for n, p in roles.state("generator").items()}


def assert_learns(roles, weights, loss, stats):
    """The loss written again, a function of `weights`, has the step's value and gradients."""
    torch.testing.assert_close(stats["generator_loss"], loss.detach(), rtol=1e-4, atol=1e-6)
    for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
        found = roles.state("generator")[name].grad
        torch.testing.assert_close(found, g, rtol=1e-3, atol=1e-5, msg=name)
    assert all(p.grad is None for p in roles.parameters("fake"))


@SHAPES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lcm_s_step_is_autograd_of_its_loss_written_again(
    new_roles, again, draw, shape, checkpointing
):
    """Two evaluations that nothing flows through: the plain backbone's, then the average's."""
    roles, given = new_roles(shape), draw(shape)["fake"]
    if checkpointing:
        roles.use_checkpointing()
    x0, cond, eps = given["x_gen"], given["cond"], given["eps"]
    sigma, lower = torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([0.85, 0.5, 0.35, 0.0])
    weights, velocity = leaves(roles), again(shape, cond)
    average = {name: (0.7 * p).detach().requires_grad_() for name, p in weights.items()}
    stats = baselines.consistency_step(
        roles, lambda x, s, _: velocity(average, x, s), x0, cond, sigma, lower, eps
    )
    x_t = (1 - column(sigma, x0)) * x0 + column(sigma, x0) * eps
    with torch.no_grad():
        x_s = x_t + column(lower - sigma, x0) * velocity({}, x_t, sigma)
        goal = x_s - column(lower, x0) * velocity(average, x_s, lower)
    loss = (x_t - column(sigma, x0) * velocity(weights, x_t, sigma) - goal).square().mean()
    assert_learns(roles, weights, loss, stats)
    assert all(p.grad is None for p in average.values())


def test_lcm_steps_between_neighbours_of_a_fine_grid_to_the_average(new_roles, monkeypatch):
    seen, config, roles = [], Config(iterations=1, lora_rank=3, steps=4), new_roles()
    monkeypatch.setattr(baselines, "consistency_step", lambda *args: seen.append(args) or {})
    state, x = State(config, roles, "cpu"), torch.randn(64, 2)
    state.update = lambda role, lr: 1.0
    list(baselines.lcm(config, roles, state, iter([{"x0": x, "cond": None}])))
    ((_, average, _, _, sigma, lower, _),) = seen
    grid = few_step_sigmas(52, config.shift)  # the student's four levels are among them
    assert set(few_step_sigmas(4, config.shift).tolist()) <= set(grid.tolist())
    places = torch.tensor([grid.tolist().index(level) for level in sigma.tolist()])
    assert torch.equal(lower, grid[places + 1]) and len(places.unique()) > 20
    state.average = {name: torch.zeros_like(p) for name, p in state.average.items()}
    with torch.no_grad():
        torch.testing.assert_close(average(x, sigma, None), roles.plain(x, sigma, None))


@SHAPES
@pytest.mark.parametrize("method", ["finetune", "regress"])
def test_flow_matching_of_the_data_or_at_noise_of_the_backbone_s_28_steps(
    new_roles, again, shape, method
):
    config, cond = Config(iterations=1, steps=1, shift=2.0), torch.tensor([0, 1, 1])
    roles, velocity, x0 = new_roles(shape), again(shape, cond), torch.randn(3, *shape)
    state, weights = State(config, roles, "cpu"), leaves(roles)
    state.update = lambda role, lr: 1.0  # the gradients stay
    (stats,) = baselines.LOOPS[method](config, roles, state, iter([{"x0": x0, "cond": cond}]))
    seeds = (stream_seed(0, 0, 0, purpose) for purpose in ("noise", "level"))
    noise, level = (torch.Generator().manual_seed(seed) for seed in seeds)
    eps = torch.randn(3, *shape, generator=noise)
    sigma = 0.02 + 0.96 * torch.rand(3, generator=level)
    if method == "regress":
        sigma, x0 = torch.ones(3), eps
        for i in range(28):
            here, after = (2 * u / (1 + u) for u in (1 - i / 28, 1 - (i + 1) / 28))
            x0 = x0 + (after - here) * velocity({}, x0, torch.full((3,), here)).detach()
    x_t = (1 - column(sigma, x0)) * x0 + column(sigma, x0) * eps
    loss = (velocity(weights, x_t, sigma) - (eps - x0)).square().mean()
    assert_learns(roles, weights, loss, stats)


@METHODS
def test_the_plan_counts_the_forwards_of_an_iteration(new_roles, method):
    config, roles, grad = Config(iterations=1, steps=1), new_roles(), []
    forward = roles.backbone.module.register_forward_pre_hook
    forward(lambda *_: grad.append(torch.is_grad_enabled()))
    loop, data = baselines.LOOPS[method], iter([{"x0": torch.randn(4, 2), "cond": None}])
    list(loop(config, roles, State(config, roles, "cpu"), data))
    assert (grad.count(False), grad.count(True)) == loop.evaluations(config)


def command(*flags, code=0):
    assert baselines.main([str(flag) for flag in flags]) == code


@METHODS
def test_a_run_goes_on_to_the_same_bits_with_the_method_s_settings(small_toy, method):
    command(method, *flags_of("whole", *CONSTANT, "--iterations", 4))
    command(method, *flags_of("cut", *CONSTANT, "--iterations", 2))
    command(method, "--resume", "--out", "cut", "--iterations", 4)
    same_run("whole", "cut")
    assert w2svd.read_run("whole").steps == (1 if method == "regress" else 4)


@pytest.mark.parametrize(
    "flags", ["lcm --guidance 2 --data videos", "regress --steps 2", "finetune --fake full"]
)
def test_what_means_nothing_without_a_fake_is_refused(small_toy, capsys, flags):
    command(*flags.split(), "--out", "r", code=2)
    sentence = said(capsys)
    assert sentence.startswith("w2svd: ") and flags.split()[1] in sentence and not names(".")


def test_fine_tuning_learns_at_guidance_1_and_samples_at_6_by_euler(monkeypatch):
    monkeypatch.setattr(w2svd.HunyuanVideo, "prompt_template", TEMPLATE)
    save_tiny("tiny")
    clips("clips", a="a dog")
    read, velocity = set(), w2svd.HunyuanVideo.velocity

    def seen(self, *args):
        read.add((torch.is_grad_enabled(), self.guidance))
        return velocity(self, *args)

    monkeypatch.setattr(w2svd.HunyuanVideo, "velocity", seen)
    fixed = ["--model", "hunyuan", "--data", "clips", "--checkpoint", "tiny", *SIZE]
    command("finetune", *fixed, "--lora-rank", 2, "--iterations", 1, "--out", "r")
    assert read == {(True, 1.0), (False, 6.0)}  # learning; films
    info = w2svd.read_generator("r")[1]
    assert info["embedded_guidance"] == 6 and not info["renoise"]
    assert info["sigmas"] == few_step_sigmas(28, 7.0).tolist()
