"""The study's data and settings, which what trains and what reports share."""

import dataclasses

import torch

from toy import mixtures
from toy.tasks import Recipe, Task
from w2svd import Config

# What all runs of the study share: with these its stored results were made, whatever the presets
# and recipes of toy/tasks.py have become since.
POINTS_BASE = dict(
    model="toy",
    shift=5.0,
    sigma_shift=1.0,
    steps=4,
    generator_input="rollout",
    fake_samples="final",
    fake_updates=5,
    fake_lr=5e-4,
    fake_weight_decay=2.0,
    lora_rank=16,
    generator_lr=1e-3,
    lr_schedule="linear",
    ema=0.98,
)
CLIPS_BASE = dict(POINTS_BASE, sigma_shift=5.0, generator_lr=5e-4)
BASE = {"ring": POINTS_BASE, "grid": POINTS_BASE, "videos": CLIPS_BASE}
RECIPES = {
    "ring": Recipe(),
    "grid": Recipe(),
    "videos": Recipe(
        width=128,
        heads=4,
        patch=(4, 8, 8),
        precondition=True,
        labels=2,
        batch=128,
        iterations=1000,
        lr=3e-3,
        shift=3.0,
    ),
}
SAMPLES = {"ring": 16384, "grid": 16384, "videos": 4096}  # measured


@dataclasses.dataclass(frozen=True)
class Case:
    """Data to distil on; `off` says why the real score is wrong at the generator's samples."""

    data: str  # whose preset and recipe
    rates: tuple  # the small grid of generator learning rates
    batch: int  # of a lane
    iterations: int
    seeds: tuple = (0, 1, 2, 3, 4, 5, 6, 7)
    tuning: tuple = (100, 101)  # seeds that choose the learning rates, and no table shows
    off: str = ""
    make: tuple = ()  # arguments of the mixture
    training: int = 0  # iterations of the backbone; the recipe's if 0
    moved: float = 0.0  # how far the data have moved since the backbone learnt them

    @property
    def middle(self):
        """The learning rate of what is trained at one rate only."""
        return self.rates[1] if len(self.rates) > 2 else self.rates[0]


POINTS, CLIPS, TWO = (3e-4, 1e-3, 3e-3, 1e-2), (1.5e-4, 5e-4, 1.5e-3), (1e-3, 3e-3)
CASES = {
    "ring": Case("ring", POINTS, 64, 360),
    "videos": Case("videos", CLIPS, 32, 120, (0, 1, 2, 3), (100,)),
    "weak": Case("ring", TWO, 64, 360, off="a backbone of 150 training steps", training=150),
    "grid": Case("grid", POINTS, 64, 360),
    "narrow": Case("ring", TWO, 64, 360, off="modes of std .05", make=(8, 2**0.5, 0.05)),
    "moved": Case("ring", TWO, 64, 360, off="data moved by half a radius", moved=0.5**0.5),
}


def task_of(case, config):
    """The case as a task of w2svd."""
    recipe = RECIPES[case.data]
    if case.training:
        recipe = dataclasses.replace(recipe, iterations=case.training)
    learnt = mixture = getattr(mixtures, case.data)(*case.make)
    if case.moved:
        means = learnt.means + torch.tensor([case.moved, 0.0])
        mixture = mixtures.GaussianMixture(learnt.weights, means, learnt.rest)
    return Task(config, recipe, mixture, learnt)


def config_of(case, seed, shared, lane):
    """The base of the case's data with the settings of a kind and of a lane."""
    settings = dict(BASE[case.data], data=case.data, seed=seed)
    settings.update(batch=case.batch, iterations=case.iterations)
    settings.update(shared)
    settings.update(lane)
    settings.pop("scaled", None)  # not a setting, see gradient_scale in study.py
    return Config(**settings)


DMD, W2S = {"alpha_weak": 0.0}, {"alpha_weak": 0.25}  # of a lane, see stack.py
