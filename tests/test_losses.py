"""Section 4: the gradients of DMD and of the ground truth, and the fake's loss.

References: autograd of torch.distributions' exact KL between noised Gaussians, exact velocities,
numbers written out by hand. Expectations are taken exactly: a mean over 2 n points with the moments
of N(0, I) up to the third. Run: python -m pytest tests/test_losses.py, 5 seconds on one core.
"""

import pytest
import torch
from conftest import COVARIANCE, MEAN, SHAPES, column, gaussian, randn
from torch.distributions import MultivariateNormal, kl_divergence

from w2svd import dmd_gradient, fake_loss, gt_gradient, x0_from_velocity

F64 = torch.float64


def gaussian_points():
    """z, eps (8, 2) each: any cubic polynomial's mean over them is its mean over N(0, I)."""
    eye = torch.eye(4, dtype=F64)
    points = 2 * torch.cat([eye, -eye])
    return points[:, :2], points[:, 2:]


def kl_gradient(m, s, sigma):
    """d KL(N(m, s^2) noised || real noised) / d (m, s), by autograd of the closed form."""
    m, s = m.clone().requires_grad_(), s.clone().requires_grad_()
    a, noise = 1 - sigma, sigma**2 * torch.eye(2, dtype=F64)
    fake = MultivariateNormal(a * m, a**2 * torch.diag(s**2) + noise)
    real = MultivariateNormal(a * MEAN, a**2 * COVARIANCE + noise)
    return torch.autograd.grad(kl_divergence(fake, real), (m, s))


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.7, 0.98])
def test_the_dmd_gradient_of_gaussians_is_autograd_of_the_exact_kl(sigma):
    """x0_fake - x0_real = sigma^2 / (1 - sigma) (score_fake - score_real), and x_t moves with
    (1 - sigma) x_gen, so the KL's gradient is the numerator times ((1 - sigma) / sigma)^2."""
    m, s = torch.tensor([-0.4, 0.5], dtype=F64), torch.tensor([0.8, 0.3], dtype=F64)
    (z, eps), level = gaussian_points(), torch.full((8,), sigma, dtype=F64)
    x_gen = m + s * z  # the generator at exact points, and what exact fake and real DiTs make of it
    x_t = (1 - sigma) * x_gen + sigma * eps
    models = gaussian(m, torch.diag(s**2)), gaussian(MEAN, COVARIANCE)
    x0_fake, x0_real = (x0_from_velocity(x_t, f.velocity(x_t, level), level) for f in models)
    g = dmd_gradient(x_gen, x0_real, x0_fake)
    g = g * (x_gen - x0_real).abs().mean(dim=1, keepdim=True)  # the stated denominator, undone
    g = g * ((1 - sigma) / sigma) ** 2
    exact_m, exact_s = kl_gradient(m, s, sigma)
    torch.testing.assert_close(g.mean(0), exact_m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((g * z).mean(0), exact_s, rtol=1e-9, atol=1e-12)


def test_half_precision_predictions_are_compared_in_float32():
    x, y, z = (randn(4, 8, seed=i).bfloat16() for i in range(3))
    z = y + 0.01 * z  # similar predictions: bf16 would lose most of their difference
    eps = randn(4, 8, seed=3).bfloat16()
    for function, args in ((dmd_gradient, (x, y, z)), (gt_gradient, (z, y))):
        result = function(*args)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(*(a.float() for a in args)))
    loss, target = fake_loss(x, y, eps), (eps - y).float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (x.float() - target).square().mean(), rtol=1e-6, atol=0)


def test_a_perfect_match_divides_by_the_floor_and_not_by_zero():
    x, y = randn(2, 4), randn(2, 4, seed=1)
    assert torch.equal(dmd_gradient(x, x, x), torch.zeros_like(x))
    assert torch.equal(gt_gradient(x, x), torch.zeros_like(x))
    torch.testing.assert_close(dmd_gradient(x, x, y), (y - x) * 1e6, rtol=1e-6, atol=0)


@SHAPES
def test_the_gt_gradient_points_from_the_ground_truth_with_unit_mean_absolute_value(shape):
    """Whatever the distance; so descending moves samples towards it."""
    x, y = randn(3, *shape), randn(3, *shape, seed=1)
    scale = column(torch.tensor([1e-3, 1.0, 1e3]), x)
    for g, difference in zip(gt_gradient(scale * x, scale * y), x - y):
        torch.testing.assert_close(g, difference / difference.abs().mean(), rtol=1e-6, atol=0)


def test_the_fake_loss_is_least_at_the_exact_velocity():
    """The gradient in (K, b) of this convex loss of v = x_t K^T + b vanishes at the generator's."""
    m, sigma = torch.tensor([-0.4, 0.5], dtype=F64), 0.6
    root = torch.tensor([[0.8, 0.0], [0.3, 0.4]], dtype=F64)
    z, eps = gaussian_points()
    x_gen = m + z @ root.T
    x_t = (1 - sigma) * x_gen + sigma * eps
    exact = gaussian(m, root @ root.T)
    level = torch.full((3,), sigma, dtype=F64)
    at = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    b, *columns = exact.velocity(at, level)  # read off the exact velocity, which is affine
    K = torch.stack([column - b for column in columns], dim=1).requires_grad_()
    b = b.clone().requires_grad_()
    for gradient in torch.autograd.grad(fake_loss(x_t @ K.T + b, x_gen, eps), (K, b)):
        assert gradient.abs().max() < 1e-12
