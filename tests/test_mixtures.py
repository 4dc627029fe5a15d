"""The exact mixtures and the DiT, against independent references.

References: torch.distributions' dense normals, and sampling; autograd's score: test_first_frame.py.
Run: python -m pytest tests/test_mixtures.py, a few seconds on one core.
"""

import math

import pytest
import torch
from conftest import VIDEO, gaussian, randn, relative, seeded
from torch.distributions import MultivariateNormal

from toy.dit import DiT
from toy.mixtures import GaussianMixture, LowRank, clip, grid, ring, videos
from toy.tasks import Recipe, build, start_at_principal_components

SHAPE, D, K = (2, 3), 6, 3
SIGMAS = (1e-4, 1e-3, 0.02, 0.3, 0.7, 0.99)
KINDS = ("isotropic", "diagonal", "full", "low rank", "no factors", "zero factors")


def small_mixture(kind, labels=None):
    """A mixture of 3 overlapping components of shape (2, 3), float64."""
    rng = seeded(1)

    def randn(*size):
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    factors, variance = 0.7 * randn(K, D, 2), torch.tensor([0.1, 0.2, 0.4]).double()
    root = 0.4 * randn(K, D, D)
    covariances = {
        "isotropic": variance,
        "diagonal": 0.05 + randn(K, D) ** 2,
        "full": root @ root.mT + 0.02 * torch.eye(D),
        "low rank": LowRank(factors, variance),
        "no factors": LowRank(factors[:, :, :0], variance),
        "zero factors": LowRank(0 * factors, variance),
    }[kind]
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    return GaussianMixture(weights, randn(K, *SHAPE), covariances, labels), covariances


def dense(covariances):
    """(K, D, D) from any kind."""
    eye = torch.eye(D, dtype=torch.float64)
    if isinstance(covariances, LowRank):
        factors, variance = covariances
        return factors @ factors.mT + variance[:, None, None] * eye
    if covariances.ndim == 1:
        return covariances[:, None, None] * eye
    return torch.diag_embed(covariances) if covariances.ndim == 2 else covariances


def dense_posterior(mixture, Sigma, x_t, sigma):
    """log p(x_t), p(k | x_t), E[x0 | x_t], with every matrix written out."""
    a, x = 1 - sigma, x_t.flatten(1)
    S = a**2 * Sigma + sigma**2 * torch.eye(D, dtype=torch.float64)
    joint = MultivariateNormal(a * mixture.means, S).log_prob(x[:, None]) + mixture.weights.log()
    p = joint.softmax(1)
    r = x[:, None] - a * mixture.means
    x0 = mixture.means + a * torch.einsum("kij,nkj->nki", Sigma @ torch.linalg.inv(S), r)
    return joint.logsumexp(1), p, torch.einsum("nk,nki->ni", p, x0).reshape(x_t.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_density_posterior_and_distance_agree_with_dense_normals(kind):
    """In a batch of noise levels."""
    mixture, covariances = small_mixture(kind)
    x_t, Sigma = 1.5 * randn(60, *SHAPE), dense(covariances)
    levels = torch.tensor(SIGMAS, dtype=torch.float64).repeat_interleave(10)
    methods = (mixture.log_prob, mixture.responsibilities, mixture.posterior_mean, mixture.velocity)
    found = zip(*(method(x_t, levels).split(10) for method in methods))
    for sigma, x, (log_prob, p, x0, v) in zip(SIGMAS, x_t.split(10), found):
        exact_log_prob, exact_p, exact_x0 = dense_posterior(mixture, Sigma, x, sigma)
        assert torch.allclose(log_prob, exact_log_prob, rtol=1e-9)
        assert torch.allclose(p, exact_p, rtol=1e-7, atol=1e-12)
        assert relative(x0, exact_x0) < 1e-9
        # v = E[eps] - E[x0] with eps = (x_t - a x0) / sigma
        assert relative(v, (x - exact_x0) / sigma) < 1e-9
    r = x_t.flatten(1)[:, None] - mixture.means
    expected = torch.einsum("nki,kij,nkj->nk", r, torch.linalg.inv(Sigma), r)
    assert torch.allclose(mixture.mahalanobis(x_t), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sigma_zero_and_one_are_the_limits(kind):
    mixture, _ = small_mixture(kind)
    x = randn(9, *SHAPE)
    assert torch.allclose(mixture.posterior_mean(x, 0.0), x)
    assert torch.allclose(mixture.velocity(x, 0.0), -x)
    assert torch.allclose(mixture.posterior_mean(x, 1.0), mixture.mean().expand_as(x))
    assert torch.allclose(mixture.velocity(x, 1.0), x - mixture.mean())
    normal = -(x**2).flatten(1).sum(1) / 2 - D / 2 * math.log(2 * math.pi)
    assert torch.allclose(mixture.log_prob(x, 1.0), normal)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_exact_moments(kind):
    mixture, covariances = small_mixture(kind)
    x = mixture.sample(100_000, seeded()).flatten(1).double()
    Sigma, centred = dense(covariances), mixture.means - mixture.mean().flatten()
    exact = Sigma + centred[:, :, None] * centred[:, None]
    exact = (mixture.weights[:, None, None] * exact).sum(0)
    assert torch.allclose(mixture.covariance(), exact, atol=1e-12)
    assert (x.mean(0) - mixture.mean().flatten()).abs().max() < 0.02
    assert relative(torch.cov(x.T), exact) < 0.02
    distance = mixture.mahalanobis(mixture.sample(20_000, seeded(), torch.full((20_000,), 1)))
    assert distance[:, 1].mean() == pytest.approx(D, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_has_the_projected_moments_and_components(kind):
    mixture, covariances = small_mixture(kind, labels=torch.tensor([0, 1, 1]))
    P = randn(D, 2)  # any P, not orthonormal
    projected = mixture.project(P)
    assert projected.shape == (2,) and torch.equal(projected.labels, mixture.labels)
    assert torch.allclose(projected.mean(), mixture.mean().flatten() @ P)
    assert torch.allclose(projected.covariance(), P.T @ mixture.covariance() @ P)
    x = randn(10, 2)
    normals = MultivariateNormal(mixture.means @ P, P.T @ dense(covariances) @ P)
    joint = normals.log_prob(x[:, None]) + mixture.weights.log()
    assert torch.allclose(projected.log_prob(x), joint.logsumexp(1))


def test_a_condition_is_the_mixture_of_its_own_components():
    mixture, covariances = small_mixture("full", labels=torch.tensor([1, 0, 1]))
    own = torch.tensor([0, 2])
    means = mixture.means[own].reshape(2, *SHAPE)
    alone = GaussianMixture(mixture.weights[own], means, covariances[own])
    x = randn(10, *SHAPE)
    ones = torch.ones(10, dtype=torch.long)
    for method in ("velocity", "posterior_mean", "log_prob"):
        given = getattr(mixture, method)(x, 0.4, ones)
        assert torch.allclose(given, getattr(alone, method)(x, 0.4))
    mixed, other = torch.arange(10) % 2, mixture.velocity(x, 0.4, 0 * ones)
    both = torch.where((mixed == 1)[:, None, None], mixture.velocity(x, 0.4, ones), other)
    assert torch.allclose(mixture.velocity(x, 0.4, mixed), both)


def test_samples_follow_their_labels():
    mixture = ring(std=0.1)  # so that no sample is nearer to another mode
    labels = mixture.sample_labels(4000, seeded())
    x = mixture.sample(4000, seeded(1), labels)
    assert torch.equal(mixture.responsibilities(x).argmax(1), labels)
    assert torch.bincount(labels).min() > 400
    assert torch.equal(x, mixture.sample(4000, seeded(1), labels))


def test_an_unknown_label_is_refused():
    x = torch.zeros(1, 2)
    for label in (-1, 8):
        with pytest.raises(IndexError):
            ring().velocity(x, 0.5, torch.tensor([label]))


@pytest.mark.parametrize("distance", (1, 1e3, 1e6))
def test_float32_is_finite_and_right_also_far_from_every_mode(distance):
    for mixture in (ring(), grid(), videos()):
        way = randn(4, *mixture.shape, dtype=torch.float32)
        x = distance * way / way.flatten(1).norm(dim=1).reshape(-1, *[1] * len(mixture.shape))
        for sigma in (0.0, *SIGMAS, 1.0):
            v = mixture.velocity(x, sigma)
            assert v.dtype == torch.float32 and v.isfinite().all()
            assert mixture.posterior_mean(x, sigma).isfinite().all()
            assert mixture.log_prob(x, sigma).isfinite().all()
            assert relative(v, mixture.velocity(x.double(), sigma)) < 1e-6


def test_points_have_the_promised_scale_and_weights():
    assert torch.allclose(ring().covariance(), 1.04 * torch.eye(2).double())
    covariance, weights = grid().covariance(), grid().weights
    assert (covariance.diagonal().sqrt() - 1).abs().max() < 0.05
    assert weights.max() / weights.min() == pytest.approx(4)
    for mixture in (ring(), grid()):
        gaps = torch.cdist(mixture.means, mixture.means) + 9 * torch.eye(len(mixture.weights))
        assert gaps.min() > 5 * mixture.rest.max().sqrt()


def test_videos_have_unit_variance_and_two_captions():
    mixture = videos()
    assert mixture.shape == (4, 8, 8, 8) and len(mixture.weights) == 16
    assert mixture.covariance().diagonal().mean() == pytest.approx(1)
    assert torch.equal(mixture.labels, torch.tensor([0] * 8 + [1] * 8))
    assert (mixture.lam.sqrt() > 20 * mixture.rest.sqrt()[:, None]).all()
    x = mixture.sample(256, seeded())
    assert x.shape == (256, 4, 8, 8, 8) and x.dtype == torch.float32
    assert x.var() == pytest.approx(1 + mixture.mean().var(correction=0).item(), rel=0.1)


def test_video_wobble_is_shared_by_neighbouring_frames():
    mixture = videos()
    x = mixture.sample(4000, seeded())
    own = mixture.responsibilities(x).argmax(1) == 0
    residual = x[own] - mixture.means[0].reshape(mixture.shape).float()
    brightness = residual.mean((1, 3, 4))  # (n, T)
    correlation = torch.corrcoef(brightness.T)
    assert correlation.diagonal(1).min() > 0.9
    assert 0.2 < correlation[0, -1] < 0.8  # and the drift parts the ends


def test_video_motion_differs_where_single_frames_do_not():
    means = videos().means.reshape(2, 4, 2, 4, 8, 8, 8)  # look, direction, speed, then the clip
    right, up, left, down = means.unbind(1)
    assert torch.allclose(right.flip(3), left) and torch.allclose(up.flip(3), down)
    assert torch.allclose(right.transpose(-1, -2), up)
    distance = torch.pdist(videos().means) / math.sqrt(videos().dim)
    assert distance.min() > 0.4
    middle = means[:, :, :, :, 3:5].mean(4)  # all pass the centre in mid-clip
    assert relative(middle[:, 0], middle[:, 2]) < 1e-9


def test_a_clip_moves_at_its_speed_along_its_direction():
    blob = clip(torch.zeros(6), look=0, angle=0.0, speed=1.0)[0]  # (T, H, W)
    for t in range(7):
        assert torch.allclose(blob[t].roll(1, dims=1), blob[t + 1])


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
