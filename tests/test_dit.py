"""The toy's DiT: its closed-form preconditioning and its patches.

Against: the exact velocity of a Gaussian, the identity. Run with `python -m pytest
tests/test_dit.py`; two seconds.
"""

import pytest
import torch
from conftest import VIDEO, gaussian, randn, seeded

from toy.dit import DiT
from toy.mixtures import GaussianMixture
from toy.tasks import Recipe, build, start_at_principal_components


@pytest.mark.parametrize("sigma", [0.0, 0.03, 0.5, 1.0])
def test_blocks_that_predict_the_mean_give_the_exact_velocity_of_a_gaussian(sigma):
    mean = torch.tensor([0.7, -1.2])
    module = DiT((2,), 8, 2, double=1, single=1, rest=0.05)
    with torch.no_grad():
        module.final.bias.copy_(mean)  # its weight is 0 at the start
        x_t = randn(6, 2, dtype=torch.float32)
        v = module(x_t, torch.full((6,), sigma))
    exact = gaussian(mean, 0.05**2).velocity(x_t, sigma)
    torch.testing.assert_close(v, exact, rtol=1e-4, atol=1e-5)


def test_patches_of_whole_frames_and_back_are_the_identity():
    module = DiT(VIDEO, 8, 2, double=1, single=1, patch=(2, 4, 4))
    x = randn(3, *VIDEO)
    tokens = module.patches(x)
    assert tokens.shape == (3, 2, 64)
    assert torch.equal(module.unpatch(tokens), x)
    assert torch.equal(tokens[:, 1].sort().values, x[:, :, 2:].flatten(1).sort().values)


def test_data_of_few_dimensions_pass_from_embed_to_final_unchanged_at_the_start():
    rng, few = seeded(1), randn(5, *VIDEO)
    mixture = GaussianMixture(torch.ones(5), few, torch.full((5,), 1e-12))
    module = build(mixture, Recipe(width=16, patch=(2, 4, 4), precondition=True))
    start_at_principal_components(module, mixture, rng)
    tokens = module.patches(mixture.sample(8, rng))
    through = tokens @ module.embed.weight.T @ module.final.weight.T
    torch.testing.assert_close(through, tokens, rtol=1e-3, atol=1e-3)
