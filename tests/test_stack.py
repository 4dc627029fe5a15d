"""toy/study/stack.py, many runs at once: a lane of a stack is a run of `w2svd.distil`.

Against: w2svd itself, with the lane's own settings. Run with
`python -m pytest tests/test_stack.py`; 10 seconds.
"""

import dataclasses

import pytest
import torch

import w2svd
from toy import baselines, mixtures
from toy.study.stack import Lane, Stack
from toy.tasks import Recipe, Task, preset
from w2svd import Config, Roles, State, distil

RUNS = [("lora", distil), ("full", distil), ("lora", baselines.lcm)]
DATA = pytest.mark.parametrize("data", ["ring", "videos"])


def task_and(data, *lanes, **shared):
    """A task with an untrained backbone, and the lanes' configs."""
    configs = [Config(**{**preset(data), "batch": 8, **shared, **lane}) for lane in lanes]
    video = {"patch": (4, 8, 8), "labels": 2, "precondition": True} if data == "videos" else {}
    torch.manual_seed(1)
    whole = dataclasses.replace(configs[0], batch=8 * len(lanes))
    task = Task(whole, Recipe(width=16, **video), getattr(mixtures, data)())
    for parameter in task.backbone.module.requires_grad_(False).parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return task, configs


def backward(roles, x_in, sigma_in, cond, sigma, eps):
    """The backwards of both updates; to the fake x_in are the samples."""
    w2svd.fake_step(roles, x_in, cond, sigma, eps)
    w2svd.generator_step(roles, x_in, sigma_in, cond, sigma, eps)


def flat(named):
    return torch.cat([x.detach().flatten() for x in named.values()])


@DATA
@pytest.mark.parametrize("fake, loop", RUNS)
def test_a_stack_of_one_lane_is_a_run_of_the_loop(data, fake, loop):
    shared = {"fake": fake, "iterations": 4, "alpha_weak_schedule": "cosine", "alpha_weak": 0.5}
    if fake == "full":
        shared.update(fake_weight_decay=0.0, alpha_weak=0.0)
    task, (config,) = task_and(data, {}, **shared)
    torch.manual_seed(config.seed)
    roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, 1.0, "lora", fake)
    state = State(config, roles, "cpu")
    running = loop(config, roles, state, task.batches())
    task, (config,) = task_and(data, {}, **shared)
    stack = Stack(task, [config], loop=loop)
    start = {role: flat(stack.roles.lane(0, role)) for role in ("generator", "fake")}
    for _ in range(3):
        next(running)
        stack.iterate()
    first = {name: x[0] for name, x in stack.average.items()}
    pairs = [("generator", state.average, first)]
    trained = [role for role in start if state.optimizers[role].state]
    pairs += [(role, roles.state(role), stack.roles.lane(0, role)) for role in trained]
    for role, exact, found in pairs:
        adam = [state.optimizers[role].state[p]["exp_avg_sq"] for p in roles.parameters(role)]
        squares = torch.cat([x.flatten() for x in adam])
        # Adam takes whole steps along gradients that are rounding, as that of a key's bias
        clear = squares > 1e-10 * squares.max()
        moved = flat(exact) - start[role]
        assert (flat(found) - start[role] - moved)[clear].norm() <= 1e-3 * moved.norm()
        assert clear.float().mean() > 0.8
    assert stack.iteration == state.iteration == 3 and stack.taken == state.taken


@DATA
def test_each_lane_evaluates_and_learns_with_its_own_weights(data):
    task, configs = task_and(data, {"alpha_weak": 0.0}, {"alpha_weak": 0.5}, {"alpha_weak": 0.9})
    stack, n, rng = Stack(task, configs), task.config.batch, torch.Generator().manual_seed(2)
    for role in ("generator", "fake"):  # away from 0, other ones for each lane
        for parameter in stack.roles.parameters(role):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    x_in, eps = (torch.randn(n, *task.shape, generator=rng) for _ in range(2))
    sigma_in, sigma = (torch.rand(n, generator=rng) for _ in range(2))
    cond = torch.randint(2, (n,), generator=rng) if data == "videos" else None
    backward(stack.roles, x_in, sigma_in, cond, sigma, eps)
    one = stack.roles.one
    for k, config in enumerate(configs):
        one.alpha_weak, part = config.alpha_weak, slice(8 * k, 8 * k + 8)
        own = [None if x is None else x[part] for x in (x_in, sigma_in, cond, sigma, eps)]
        for role in ("generator", "fake"):
            one.load(role, stack.roles.lane(k, role))
            for parameter in one.parameters(role):
                parameter.grad = None
        backward(one, *own)
        for role in ("generator", "fake"):
            for name, parameter in one.state(role).items():
                got = 3 * stack.roles.trained[role][name].grad[k]  # the mean over three lanes
                torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_spike_of_one_lane_is_cut_by_its_own_norms_and_each_takes_its_own_rate():
    task, configs = task_and("ring", {}, {"generator_lr": 0.01})
    stack = Stack(task, configs)
    parameters = stack.roles.parameters("generator")
    size = sum(p[0].numel() for p in parameters) ** 0.5
    for second in (1e-6, 1e-4):  # the second lane's next gradient is a hundred times its first
        for p in parameters:
            p.grad = torch.stack([torch.full_like(p[0], 1e-4), torch.full_like(p[0], second)])
        before = [p.detach().clone() for p in parameters]
        norm = float(stack.update("generator", 123.0))
        assert norm == pytest.approx((1e-4 + second) * size, rel=1e-4)  # the mean over two lanes
    # Adam's second moment after 1 and 3, in units of the first gradient: the spike counts as 3
    steps = [1.0, 3 / ((0.999 * 1**2 + 3**2) / (1 + 0.999)) ** 0.5]
    for p, old in zip(parameters, before):
        found = [float(x.mean()) for x in old - p.detach()]
        assert found == pytest.approx(
            [c.generator_lr * step for c, step in zip(configs, steps)], rel=2e-3
        )
    stack.lanes[1] = Lane(configs[1], waits=1)  # in the first iteration it stands still
    for p, old in zip(parameters, before):
        p.grad, old[:] = torch.ones_like(p), p.detach()
    stack.update("generator", 123.0)
    assert not any(torch.equal(p[0], old[0]) for p, old in zip(parameters, before))
    assert all(torch.equal(p[1], old[1]) for p, old in zip(parameters, before))
