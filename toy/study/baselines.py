"""Consistency distillation (LCM, arXiv 2310.04378): what W2SVD is compared with besides DMD."""

import torch

from w2svd import consistency_step, few_step_sigmas

LEVELS = 50  # of the fine grid, on the student's shift; as LCM's 20 of 1000 steps (peer)


def consistency_iterate(stack):
    """One generator update of every lane of a Stack, in place of its iterate()."""
    batch = next(stack.data)
    x0, cond = batch["x0"], batch["cond"]
    grid = few_step_sigmas(LEVELS, stack.config.shift)
    k = torch.randint(LEVELS, (len(x0),), generator=stack.rngs["level"])
    eps = torch.randn(x0.shape, generator=stack.rngs["noise"])

    def average(*args):
        with stack.averaged() as generator:
            return generator(*args)

    stats = consistency_step(stack.roles, average, x0, cond, grid[k], grid[k + 1], eps)
    stack.update("generator")
    stack.update_average()
    stack.iteration += 1
    return stats["generator_loss"]
