"""Section 6: the loop of Algorithm 1, its random streams, its state, and what a run shows of it.

Reference: `Reference`, the whole loop written again in plain torch, with weights W + alpha B A,
autograd of each loss, clipping, AdamW and the average by hand, and random streams of its own, drawn
from the same seeds. Run: python -m pytest tests/test_distil.py, 10 seconds on one core.
"""

import hashlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import POINT, VIDEO, column, generator_loss, merged, randomise
from torch.func import functional_call

import toy.tasks
import w2svd
from w2svd import Config, State, distil

N, ITERATIONS = 3, 3
RATES = dict(generator_lr=3e-3, fake_lr=2e-3, lora_rank=3, fake_updates=2, iterations=6, seed=7)
PAIRED = dict(gt_weight=0.3, guidance=1.5, accumulate=2, reuse=3, fake_warmup=3, ema=0.6)
PAIRED.update(alpha_weak=0.75, alpha_weak_schedule="cosine")
ROLLOUT = dict(generator_input="rollout", lr_schedule="linear")
FINAL = dict(fake_samples="final", fake_weight_decay=2.0, sigma_shift=5.0, ema=0.5, reuse=2)
ALL = dict(alpha_strong=1.3, sigma_low=0.3, sigma_high=0.6, accumulate=2)
FULL = dict(fake="full", alpha_weak=0.0)
CASES = {
    "the defaults": (VIDEO, {}),
    "all of a paired run's settings": (VIDEO, PAIRED),
    "ground truth at every level": (POINT, dict(gt_weight=0.3, steps=2, shift=3.0, ema=0.0)),
    "rollouts, a fake of final samples": (POINT, ROLLOUT | FINAL | dict(fake_warmup=1)),
    "rollouts, a fake of all samples": (VIDEO, ROLLOUT | ALL),
    "two whole copies, one step": (VIDEO, FULL | dict(generator="full", steps=1, ema=0.9)),
    "a full fake beside an adapter": (POINT, FULL | dict(generator_input="rollout", guidance=2.0)),
}


def batches(shape, seed=11):
    """Endless {'x0', 'cond'}, always the same ones."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        x0 = torch.randn(N, *shape, generator=rng)
        yield {"x0": x0, "cond": torch.randint(2, (N,), generator=rng)}


class Reference:
    """Algorithm 1 again: nothing of w2svd.py is called here."""

    def __init__(self, config, plain, roles):
        self.c, self.plain = config, plain
        self.weights = {  # {role: {name: tensor}}
            role: {n: p.detach().clone().requires_grad_() for n, p in roles.state(role).items()}
            for role in ("generator", "fake")
        }
        self.average = {n: p.detach().clone() for n, p in self.weights["generator"].items()}
        self.squares = self.filled(0.0)
        self.least = self.filled(math.inf)  # of |gradient| in any update
        self.updates = {"generator": 0, "fake": 0}
        self.streams = {n: torch.Generator() for n in ("input", "exit", "level", "noise")}
        even = [1 - i / config.steps for i in range(config.steps + 1)]
        self.grid = [config.shift * u / (1 + (config.shift - 1) * u) for u in even]

    def filled(self, value):
        """A number in the place of each weight."""
        return {
            role: {name: torch.full_like(p, value) for name, p in named.items()}
            for role, named in self.weights.items()
        }

    def x0(self, role, x_t, sigma, cond):
        """What a role predicts; with a whole copy as fake, the real DiT is the backbone."""
        weights, trained = {}, self.weights["generator" if role == "generator" else "fake"]
        if role != "real" or self.c.fake == "lora":
            weights = merged(self.plain, trained, self.alphas[role])
        return x_t - column(sigma, x_t) * functional_call(self.plain, weights, (x_t, sigma, cond))

    def normal(self, x, stream):
        return torch.randn(x.shape, generator=self.streams[stream])

    def losses_noise(self, x0):
        """Levels (B,) and noise at which the two scores, or the fake's loss, are read."""
        c, u = self.c, torch.rand(len(x0), generator=self.streams["level"])
        u = c.sigma_low + u * (c.sigma_high - c.sigma_low)
        return u * c.sigma_shift / (1 + u * (c.sigma_shift - 1)), self.normal(x0, "noise")

    def input(self, x0, cond, final):
        x, count = self.normal(x0, "input"), len(self.grid) - 1
        if self.c.generator_input == "paired":
            exits = torch.randint(count, (len(x0),), generator=self.streams["exit"])
            sigma = torch.tensor(self.grid)[exits]
            return (1 - column(sigma, x)) * x0 + column(sigma, x) * x, sigma
        exit_at = int(torch.randint(count, (1,), generator=self.streams["exit"]))
        exit_at = count - 1 if final else exit_at
        for here, after in zip(self.grid[:exit_at], self.grid[1:]):
            with torch.no_grad():
                clean = self.x0("generator", x, torch.full((len(x),), here), cond)
            x = (1 - after) * clean + after * self.normal(x0, "input")
        return x, torch.full((len(x),), self.grid[exit_at])

    def sampled(self, batch):
        x_in, sigma_in = self.input(batch["x0"], batch["cond"], self.c.fake_samples == "final")
        x_gen = self.x0("generator", x_in, sigma_in, batch["cond"]).detach()
        return {"x0": x_gen, "cond": batch["cond"]}

    def fake_loss(self, x_gen, cond):
        sigma, eps = self.losses_noise(x_gen)
        s = column(sigma, eps)
        x_t = (1 - s) * x_gen + s * eps
        v_fake = (x_t - self.x0("fake", x_t, sigma, cond)) / s
        loss = (v_fake - (eps - x_gen)).square().mean()
        return loss, {"fake_loss": loss.detach()}

    def generator_loss(self, x0, cond):
        (sigma, eps), inputs = self.losses_noise(x0), self.input(x0, cond, final=False)
        weights = x0, self.c.gt_weight, self.c.guidance
        loss, x_gen, numbers = generator_loss(self.x0, *inputs, cond, sigma, eps, *weights)
        for name, z in (("gen", x_gen), ("data", x0)):
            numbers |= {f"{name}_mean": z.mean(), f"{name}_std": z.std()}
            if z.ndim == 5:
                numbers[f"{name}_motion"] = (z[:, :, 1:] - z[:, :, :-1]).abs().mean()
        return loss, numbers

    def update(self, role, loss_of, data, rate, decay=0.0):
        """AdamW with beta 0 and .999 on the mean over `accumulate` batches, spikes cut off."""
        named, total, all_numbers = self.weights[role], 0.0, []
        for batch in itertools.islice(data, self.c.accumulate):
            loss, numbers = loss_of(batch["x0"], batch["cond"])
            total = total + loss / self.c.accumulate
            all_numbers.append(numbers)
        gradients = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        clip, steps = 1.0, self.updates[role]
        if steps:  # to three times the root mean square of the norms so far
            usual = sum(square.sum() for square in self.squares[role].values())
            clip = min(1.0, 3 * (usual / (1 - 0.999**steps)).sqrt() / norm)
        self.updates[role] += 1
        for (name, p), g in zip(named.items(), gradients):
            g, square = g * clip, self.squares[role][name]
            self.least[role][name] = torch.minimum(self.least[role][name], g.abs())
            square.mul_(0.999).add_(0.001 * g**2)
            unbiased = square / (1 - 0.999 ** self.updates[role])
            p.data = (1 - rate * decay) * p.data - rate * g / (unbiased.sqrt() + 1e-15)
        return {k: sum(one[k] for one in all_numbers) / len(all_numbers) for k in numbers}, norm

    def iterate(self, data):
        c = self.c
        for i in range(c.iterations):
            for name, rng in self.streams.items():  # 63 bits of a hash, of the first process
                hashed = hashlib.sha256(f'[{c.seed}, {i}, 0, "{name}"]'.encode()).hexdigest()
                rng.manual_seed(int(hashed[:16], 16) // 2)
            scale = 1 - 0.95 * i / c.iterations if c.lr_schedule == "linear" else 1
            alpha_weak, done = c.alpha_weak, min(1, i / (c.iterations / 2))
            if c.alpha_weak_schedule == "cosine":
                alpha_weak *= (1 + math.cos(math.pi * done)) / 2
            self.alphas = {"generator": 1.0, "fake": c.alpha_strong, "real": alpha_weak}
            for k in range(c.fake_updates + (c.fake_warmup if i == 0 else 0)):
                if k % c.reuse == 0:
                    drawn = [self.sampled(b) for b in itertools.islice(data, c.accumulate)]
                loss_of, rate = self.fake_loss, scale * c.fake_lr
                numbers, norm = self.update("fake", loss_of, iter(drawn), rate, c.fake_weight_decay)
            numbers["fake_grad_norm"] = norm
            rate = scale * c.generator_lr
            more, norm = self.update("generator", self.generator_loss, data, rate)
            for name, p in self.weights["generator"].items():
                ema = min(c.ema, (i + 1) / (i + 10))  # the average's own warm-up
                self.average[name] = ema * self.average[name] + (1 - ema) * p.detach()
            yield numbers | more | {"grad_norm": norm, "alpha_weak": alpha_weak}


@pytest.fixture
def start(new_roles):
    """start(shape, config): roles and state of a run that was not started from zero adapters."""

    def make(shape, config):
        alphas, kinds = (config.alpha_weak, config.alpha_strong), (config.generator, config.fake)
        roles = new_roles(shape, *alphas, config.lora_rank, generator=kinds[0], fake=kinds[1])
        return roles, State(config, roles, "cpu")

    return make


def expect_close(named, exact, least):
    """Except where a gradient was 0 but for rounding, as that of a key's bias, which softmax
    cancels: AdamW takes full steps along rounding errors."""
    for name, x in named.items():
        clear = least[name] > 1e-5
        torch.testing.assert_close(x[clear], exact[name][clear], rtol=1e-5, atol=1e-5)
    assert sum((least[n] > 1e-5).sum() for n in named) > 0.8 * sum(
        x.numel() for x in named.values()
    )


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_algorithm_1_written_again(start, new_backbone, name):
    shape, settings = CASES[name]
    config = Config(**RATES | settings)
    roles, state = start(shape, config)
    reference = Reference(config, new_backbone(shape).module, roles)
    pairs = zip(distil(config, roles, state, batches(shape)), reference.iterate(batches(shape)))
    for stats, expected in itertools.islice(pairs, ITERATIONS):
        assert stats.keys() == expected.keys()
        for key, exact in expected.items():
            assert float(stats[key]) == pytest.approx(float(exact), rel=1e-4, abs=1e-5), key
    for role, named in reference.weights.items():
        expect_close(roles.state(role), named, reference.least[role])
    expect_close(state.average, reference.average, reference.least["generator"])
    for stream, rng in state.rngs.items():
        assert torch.equal(rng.get_state(), reference.streams[stream].get_state()), stream
    assert state.iteration == ITERATIONS


@pytest.mark.parametrize("kind, shared", [("paired", []), ("rollout", ["exit"])])
def test_processes_share_no_stream_but_that_of_a_rollout_s_exit(start, monkeypatch, kind, shared):
    """What else a stream depends on, and on nothing else: see the loop above."""
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(w2svd, "rank", lambda rank=rank: rank)
        _, state = start(POINT, Config(generator_input=kind))
        state.seed_streams()
        drawn.append({name: torch.rand(1, generator=rng) for name, rng in state.rngs.items()})
    assert [name for name in drawn[0] if drawn[0][name] == drawn[1][name]] == shared


def test_gradients_become_means_over_forwards_and_processes(new_roles, monkeypatch):
    def all_reduce(flat):  # there are three; the others have the gradients 10 and 100
        flat += (10 + 100) / (3 * 4)

    monkeypatch.setattr(w2svd, "ranks", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    parameters = new_roles().parameters("fake")
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 6.0)
    w2svd.average_gradients(parameters, 4)
    for parameter in parameters:
        expected = torch.full_like(parameter, (6 + 10 + 100) / (3 * 4))
        torch.testing.assert_close(parameter.grad, expected)


def test_a_line_of_the_log_holds_the_samples_against_the_data(start):
    _, state = start(POINT, Config(iterations=10))
    state.iteration = 4
    stats = {"gen_std": 1.0, "data_std": torch.tensor(2.0), "gen_motion": 3.0, "data_motion": 4.0}
    line = w2svd.log_line(stats, state, seconds=1800.0, pflop=9.0)
    assert {**line, **stats} == line and line["step"] == 4
    assert line["std_ratio"] == 0.5 and line["motion_ratio"] == 0.75
    assert line["seconds"] == 1800 and line["hours_left"] == 3 and line["tflops"] == 5


@pytest.mark.parametrize("kind, prefix", [("lora", "transformer."), ("full", "")])
def test_a_saved_generator_is_the_average_and_its_header_has_the_grid(tmp_path, kind, prefix):
    config = Config(**RATES | dict(steps=3, shift=2.0, generator=kind))
    task = toy.tasks.Task(config, toy.tasks.Recipe(width=8), toy.tasks.mixtures.ring())
    randomise(task.backbone.module.parameters(), seed=1, scale=0.3)
    run = w2svd.Run(config, w2svd.Machine(), task)
    for _ in itertools.islice(distil(config, run.state.roles, run.state, batches(POINT)), 2):
        pass
    run.save_generator(tmp_path / "g.safetensors")
    tensors, info = w2svd.read_safetensors(tmp_path / "g.safetensors")
    own = {prefix + name: p for name, p in run.state.roles.state("generator").items()}
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[prefix + name], x) for name, x in run.state.average.items())
    assert any(not torch.equal(tensors[name], p) for name, p in own.items())
    assert info["sigmas"] == pytest.approx([1, 0.8, 0.5, 0])
    assert (info["kind"], info["rank"], info["lora_alpha"], info["step"]) == (kind, 3, 3, 2)


def test_the_toy_shows_the_run_s_grid_and_samples_with_the_header_s(tmp_path, monkeypatch):
    config, levels = Config(data="ring", steps=3, shift=2.0, out=str(tmp_path)), []
    task = toy.tasks.Task(config, toy.tasks.Recipe(width=8), toy.tasks.mixtures.ring())

    def generator(x_t, sigma, cond):
        levels.append(float(sigma[0]))
        return x_t

    task.on_log(config.log_every, generator)
    assert levels == pytest.approx([1, 0.8, 0.5])
    levels.clear()
    monkeypatch.setattr(task, "load", lambda: None)
    monkeypatch.setattr(task, "trained_generator", lambda *args: generator)
    task.sample({}, {"sigmas": [1.0, 0.25, 0.0]}, tmp_path / "s.safetensors", seed=0, n=2)
    assert levels == [1.0, 0.25]


def test_the_toy_measures_euler_on_the_grid_on_which_it_is_best(monkeypatch):
    config = Config(data="ring", shift=2.0)
    task = toy.tasks.Task(config, toy.tasks.Recipe(width=8), toy.tasks.mixtures.ring())
    monkeypatch.setattr(task, "euler", lambda steps, shift, n: (steps, shift, n))
    kl = {0.2: 3.0, 0.3: 2.0, 0.5: 1.0, 0.7: 2.0, 1.0: 3.0, 2.0: 4.0, 5.0: 5.0}
    measure = SimpleNamespace(n=80, kl=lambda samples: kl[samples[1]] + (samples[::2] != (4, 10)))
    assert task.best_shift(measure, 4) == 0.5 and task.best_shift(measure, 1) == 2.0
