"""Consistency distillation (LCM, arXiv 2310.04378): what W2SVD is compared with besides DMD.

The generator learns that its prediction does not change along the backbone's flow: from x_t at
sigma one Euler step of the backbone leads to x_s at the next lower level, and the clean sample that
the generator sees at x_t shall be the one that its own average sees at x_s. At sigma = 0 the
prediction x_s - sigma v is x_s itself, so the boundary condition holds by construction.
"""

import torch
from torch.nn.functional import mse_loss

from w2svd import add_noise, few_step_sigmas, x0_from_velocity

LEVELS = 50  # of the fine grid, on the student's shift; as LCM's 20 of 1000 steps (peer)


def consistency_loss(backbone, generator, target, x0, cond, sigma, sigma_next, eps):
    """mean |x0_generator(x_t, sigma) - x0_target(x_s, sigma_next)|^2, a scalar.

    x0, eps (B, ...); sigma > sigma_next, both (B,). backbone, generator and target are velocities;
    the target is the generator's average and gets no gradient.
    """
    x_t = add_noise(x0, eps, sigma)
    with torch.no_grad():
        v = backbone(x_t, sigma, cond)
        x_s = x0_from_velocity(x_t, v, sigma - sigma_next)  # one Euler step down
        goal = x0_from_velocity(x_s, target(x_s, sigma_next, cond), sigma_next)
    return mse_loss(x0_from_velocity(x_t, generator(x_t, sigma, cond), sigma), goal)


def consistency_iterate(stack):
    """One generator update of every lane of a Stack, in place of its iterate()."""
    batch, roles = next(stack.data), stack.roles
    x0, cond = batch["x0"], batch["cond"]
    grid = few_step_sigmas(LEVELS, stack.config.shift)
    k = torch.randint(LEVELS, (len(x0),), generator=stack.rngs["level"])
    eps = torch.randn(x0.shape, generator=stack.rngs["noise"])

    def target(*args):
        with stack.averaged() as generator:
            return generator(*args)

    loss = consistency_loss(
        roles.backbone, roles.generator, target, x0, cond, grid[k], grid[k + 1], eps
    )
    loss.backward()
    stack.update("generator")
    stack.update_average()
    stack.iteration += 1
    return loss.detach()
