"""toy/study/stack.py, many runs at once: a lane of a stack is a run of `w2svd.distil`.

Against: w2svd itself, with the lane's own settings. Run with
`python -m pytest tests/test_stack.py`; 10 seconds.
"""

import dataclasses

import pytest
import torch

from toy import mixtures
from toy.study.stack import Stack
from toy.tasks import Recipe, Task
from w2svd import (
    MAX_GRAD_NORM,
    PRESETS,
    Config,
    Roles,
    State,
    distil,
    fake_step,
    generator_step,
    x0_from_velocity,
)

LABELS = {"ring": 0, "videos": 2}


def task_and(data, *lanes, **shared):
    """A task with an untrained backbone, and the lanes' configs."""
    base = PRESETS["toy"] | PRESETS.get(f"toy {data}", {}) | {"data": data, "batch": 8}
    configs = [Config(**base | shared | lane) for lane in lanes]
    patch = (4, 8, 8) if data == "videos" else (1, 1, 1)
    recipe = Recipe(width=16, patch=patch, labels=LABELS[data], precondition=data == "videos")
    torch.manual_seed(1)
    task = Task(
        dataclasses.replace(configs[0], batch=8 * len(lanes)), recipe, getattr(mixtures, data)()
    )
    for parameter in task.backbone.module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    task.backbone.module.requires_grad_(False)
    return task, configs


def shaken(roles):
    """Adapters away from 0, other ones for each lane."""
    for role in ("generator", "fake"):
        for parameter in roles.parameters(role):
            rng = torch.Generator().manual_seed(3)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)


def flat(named):
    return torch.cat([x.detach().flatten() for x in named.values()])


@pytest.mark.parametrize("data", ["ring", "videos"])
@pytest.mark.parametrize("fake", ["lora", "full"])
def test_a_stack_of_one_lane_is_a_run_of_distil(data, fake):
    shared = {"fake": fake, "iterations": 4, "alpha_weak_schedule": "cosine"}
    shared |= {"fake_weight_decay": 0.0} if fake == "full" else {"alpha_weak": 0.5}
    task, (config,) = task_and(data, {}, **shared)
    torch.manual_seed(config.seed)
    roles = Roles(task.backbone, config.lora_rank, config.alpha_weak, 1.0, "lora", fake)
    state = State(config, roles, "cpu")
    loop = distil(config, roles, state, task.batches(state.rngs["data"]))
    for _ in range(3):
        next(loop)
    task, (config,) = task_and(data, {}, **shared)
    stack = Stack(task, [config])
    start = {role: flat(stack.roles.lane(0, role)) for role in ("generator", "fake")}
    for _ in range(3):
        stack.iterate()
    for role in start:  # AdamW makes whole steps of gradients that are rounding: hence the norm
        moved = flat(roles.state(role)) - start[role]
        assert (flat(stack.roles.lane(0, role)) - start[role] - moved).norm() < 1e-3 * moved.norm()
    average, moved = flat(state.average), flat(state.average) - start["generator"]
    found = flat({name: x[0] for name, x in stack.average.items()})
    assert (found - average).norm() < 1e-3 * moved.norm()
    assert stack.iteration == state.iteration == 3


def test_a_stack_has_as_many_iterations_as_its_config():
    task, (config, _) = task_and("ring", {}, {}, iterations=2)
    stack = Stack(task, [config, config])
    for done in (1, 2):
        numbers = torch.tensor([float(x) for x in stack.iterate().values()])
        assert stack.iteration == done and numbers.isfinite().all()
    with pytest.raises(StopIteration):
        stack.iterate()


def backward(role, roles, x_in, sigma_in, cond, sigma, eps):
    """One backward of the loss of 'fake' or 'generator'."""
    if role == "generator":
        return generator_step(roles, x_in, sigma_in, cond, sigma, eps)
    with torch.no_grad():
        x_gen = x0_from_velocity(x_in, roles.generator(x_in, sigma_in, cond), sigma_in)
    return fake_step(roles, x_gen, cond, sigma, eps)


@pytest.mark.parametrize("data", ["ring", "videos"])
def test_each_lane_evaluates_and_learns_with_its_own_weights(data):
    task, configs = task_and(data, {"alpha_weak": 0.0}, {"alpha_weak": 0.5}, {"alpha_weak": 0.9})
    stack = Stack(task, configs)
    shaken(stack.roles)
    n = task.config.batch
    rng = torch.Generator().manual_seed(2)
    x_in, eps = (torch.randn(n, *task.shape, generator=rng) for _ in range(2))
    sigma_in, sigma = (torch.rand(n, generator=rng) for _ in range(2))
    cond = torch.randint(2, (n,), generator=rng) if LABELS[data] else None
    for role in ("fake", "generator"):
        backward(role, stack.roles, x_in, sigma_in, cond, sigma, eps)
    one = stack.roles.one
    for k, config in enumerate(configs):
        one.alpha_weak = config.alpha_weak
        part = slice(8 * k, 8 * k + 8)
        own = [None if x is None else x[part] for x in (x_in, sigma_in, cond, sigma, eps)]
        for role in ("fake", "generator"):
            for owner in ("generator", "fake"):
                one.load(owner, stack.roles.lane(k, owner))
            for parameter in one.parameters(role):
                parameter.grad = None
            backward(role, one, *own)
            for name, parameter in one.state(role).items():
                got = 3 * stack.roles.trained[role][name].grad[k]  # the mean over three lanes
                torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def test_lanes_have_their_own_rates_decay_and_gradient_scale():
    lanes = [{}, {"generator_lr": 0.01}, {}, {"fake_weight_decay": 50.0}]
    task, configs = task_and("ring", *lanes)
    stack = Stack(task, configs, [1.0, 1.0, 0.0, 1.0])
    before = stack.roles.parameters("generator")[1].detach().clone()
    stack.iterate()
    after = stack.roles.parameters("generator")[1].detach()
    moved = [float(x.norm()) for x in after - before]
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.1)  # Adam's step, but for its epsilon
    assert moved[2] == 0
    fakes = [float(x.norm()) for x in stack.roles.parameters("fake")[0].detach()]
    assert fakes[3] < 0.95 * fakes[0]


def test_each_lane_is_clipped_by_its_own_norm_and_takes_its_own_rate():
    task, configs = task_and("ring", {}, {"generator_lr": 0.01})
    stack = Stack(task, configs)
    parameters = stack.roles.parameters("generator")
    for p in parameters:  # the second lane's gradient is a thousand times the first's
        p.grad = torch.stack([torch.full_like(p[0], 1e-4), torch.full_like(p[0], 1e-1)])
    size = sum(p[0].numel() for p in parameters) ** 0.5
    norms = [2 * 1e-4 * size, 2 * 1e-1 * size]  # the losses are means over two lanes
    assert norms[0] < MAX_GRAD_NORM < norms[1]
    before = [p.detach().clone() for p in parameters]
    assert float(stack.update("generator", 123.0)) == pytest.approx(sum(norms) / 2, rel=1e-4)
    for square, p in zip(stack.squares["generator"], parameters):
        seen = [float(x.mean() / 0.001) ** 0.5 for x in square]  # the gradients after clipping
        assert seen[0] == pytest.approx(2e-4, rel=1e-3)
        assert seen[1] == pytest.approx(MAX_GRAD_NORM / size, rel=1e-3)
        assert p.grad is None
    for p, old in zip(parameters, before):
        steps = [float(x.mean()) for x in old - p.detach()]
        assert steps == pytest.approx([c.generator_lr for c in configs], rel=2e-3)


def test_lanes_that_differ_in_more_are_refused():
    task, configs = task_and("ring", {}, {"steps": 1})
    with pytest.raises(AssertionError, match="Stack.OWN"):
        Stack(task, configs)
