"""Both scores against exact ones: how wrong they are along a run, and a ladder of truer ones.

The data's score is the mixture's. The generator's samples have no density in closed form; theirs
is that of a cloud of them, each a narrow Gaussian (KERNEL), under the same noise.
"""

import torch

import w2svd
from toy.mixtures import GaussianMixture
from toy.study.stack import StackedRoles
from w2svd import add_noise, few_step_sample, x0_from_velocity

KERNEL = 0.05  # a sample's width, a quarter of a mode's, so that a cloud has a density
CLOUD = 2048  # samples in a cloud
LEVELS = (0.3, 0.6)  # sigma, at which errors are measured


def cloud(samples):
    """The density of samples (n, D): a mixture of n narrow Gaussians."""
    n = len(samples)
    return GaussianMixture(torch.ones(n), samples, torch.full((n,), KERNEL**2))


@torch.no_grad()
def students(stack, n, seed, averaged=True):
    """n final samples of each lane's generator, (lanes, n, ...), each lane from noise of its own.

    And the captions (lanes * n,), or None.
    """
    task, lanes, trained = stack.task, len(stack.configs), dict(stack.roles.trained)
    cond, noise = task.start(n * lanes, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    if averaged:
        stack.roles.trained = {**trained, "generator": stack.average}
    x = few_step_sample(stack.roles.generator, noise, task.sigmas, cond, rng)
    stack.roles.trained = trained
    return x.reshape(lanes, n, *task.shape), cond


def rms(x):
    return x.square().flatten(1).sum(1).mean().sqrt().item()


@torch.no_grad()
def errors(stack, seed, n=256):
    """Of each lane, over LEVELS: how far x0_real, x0_fake and their difference are from the exact.

    In units of the plane, at the lane's own samples; `real_unshifted` is the backbone itself, and
    `cosine` that of the difference with the exact one.
    """
    samples, _ = students(stack, CLOUD + n, seed, averaged=False)
    roles, mixture, lanes = stack.roles, stack.task.mixture, len(samples)
    rng, rows = torch.Generator().manual_seed(seed), [{} for _ in range(lanes)]
    clouds = [cloud(x[n:]) for x in samples]
    for level in LEVELS:
        x = samples[:, :n].flatten(0, 1)
        x_t = add_noise(x, torch.randn(x.shape, generator=rng), level)
        sigma = torch.full((len(x),), level)
        found = {
            "real": roles.real(x_t, sigma),
            "real_unshifted": roles.plain(x_t, sigma),
            "fake": roles.fake(x_t, sigma),
        }
        found = {k: x0_from_velocity(x_t, v, sigma).chunk(lanes) for k, v in found.items()}
        for k, (row, x) in enumerate(zip(rows, x_t.chunk(lanes))):
            real, fake = mixture.posterior_mean(x, level), clouds[k].posterior_mean(x, level)
            difference, exact = found["fake"][k] - found["real"][k], fake - real
            measured = {
                "real": rms(found["real"][k] - real),
                "real_unshifted": rms(found["real_unshifted"][k] - real),
                "fake": rms(found["fake"][k] - fake),
                "difference": rms(difference - exact),
                "exact_difference": rms(exact),
                "cosine": torch.cosine_similarity(difference.flatten(), exact.flatten(), 0).item(),
            }
            for name, value in measured.items():
                row[name] = row.get(name, 0.0) + value / len(LEVELS)
    return rows


@torch.no_grad()
def linearity(stack, seed, n=256):
    """What the shift makes of DMD's difference x0_fake - x0_real, at each lane's own samples.

    Its length over DMD's, 1 - alpha_weak where the velocity is linear in the adapter, and the
    cosine of the two. Samples and LEVELS are one vector: uneven lengths lower the cosine too.
    """
    samples, cond = students(stack, n, seed, averaged=False)
    rng, pairs = torch.Generator().manual_seed(seed), []
    for level in LEVELS:
        x = samples.flatten(0, 1)
        x_t = add_noise(x, torch.randn(x.shape, generator=rng), level)
        sigma = torch.full((len(x),), level)
        fake = stack.roles.fake(x_t, sigma, cond)
        shifted = fake - stack.roles.real(x_t, sigma, cond)
        plain = fake - stack.roles.plain(x_t, sigma, cond)
        pairs.append([level * v.reshape(len(samples), -1) for v in (shifted, plain)])
    shifted, plain = (torch.cat(parts, dim=1) for parts in zip(*pairs))
    length = shifted.norm(dim=1) / plain.norm(dim=1)
    cosine = torch.cosine_similarity(shifted, plain)
    return [{"length": a, "cosine": b} for a, b in zip(length.tolist(), cosine.tolist())]


# ---- the ladder: from exact scores to learnt ones ------------------------------------------------


class ExactReal(StackedRoles):
    """The real DiT is the mixture's own velocity."""

    mixture = sigmas = None  # of the task

    def real(self, x_t, sigma, cond=None):
        return self.mixture.velocity(x_t, sigma, cond)


class ExactScores(ExactReal):
    """And the fake is that of a cloud of the generator's samples, drawn anew for every update."""

    def fake(self, x_t, sigma, cond=None):
        if torch.is_grad_enabled():  # its own update, which the generator does not hear of
            return super().fake(x_t, sigma, cond)
        noise, parts = torch.randn(self.n * CLOUD // 2, *x_t.shape[1:]), []
        samples = few_step_sample(self.generator, noise, self.sigmas)
        for x, s, own in zip(x_t.chunk(self.n), sigma.chunk(self.n), samples.chunk(self.n)):
            parts.append(cloud(own).velocity(x, s))
        return torch.cat(parts)


@torch.no_grad()
def particles(mixture, config, seed, n=1024, steps=120, rate=0.5):
    """Samples without a generator, moved themselves along the exact scores' difference: (n, D)."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *mixture.shape, generator=rng)
    for i in range(steps):
        sigma = w2svd.sample_sigma(n, config.sigma_low, config.sigma_high, config.sigma_shift, rng)
        x_t = add_noise(x, torch.randn(x.shape, generator=rng), sigma)
        x0_real = mixture.posterior_mean(x_t, sigma)
        x0_fake = cloud(x).posterior_mean(x_t, sigma)
        x = x - rate * (1 - 0.95 * i / steps) * (x0_fake - x0_real)
    return x
