"""The metrics, against closed forms and against samples with one known fault each.

References: Gaussian formulas, and exact samples that are shifted, lack a mode, stand still, flicker
or are out of order. Run: python -m pytest tests/test_metrics.py, about ten seconds on one core.
"""

import math

import pytest
import torch
from conftest import gaussian, randn, seeded

import toy.metrics
from toy.metrics import Metrics, annulus, frechet, kl_to_mixture, square
from toy.mixtures import GaussianMixture, grid, ring, videos

N_CLIPS = 2048


@pytest.fixture(scope="module")
def on_ring():
    return Metrics(ring())


@pytest.fixture(scope="module")
def on_videos():
    return Metrics(videos(), n=N_CLIPS)


@pytest.fixture(scope="module")
def clips(on_videos):
    return on_videos.mixture.sample(N_CLIPS, seeded())


@pytest.fixture(scope="module")
def exact(on_videos, clips):
    return on_videos(clips)


@pytest.mark.parametrize("mixture", (ring(), grid()))
def test_exact_points_reach_the_floor(mixture):
    values = Metrics(mixture).floor(seeded())
    assert abs(values["kl"]) < 0.03
    assert values["sliced_w2"] < 0.04 and 0 <= values["frechet"] < 5e-4
    assert values["precision"] == pytest.approx(0.999, abs=0.001)
    assert values["coverage"] == 1 and values["weight_tv"] < 0.03


def test_exact_clips_reach_the_floor(on_videos, exact):
    assert abs(exact["kl"]) < 0.3
    size = on_videos.moments[1].trace().item()
    assert exact["sliced_w2"] < 0.15 * math.sqrt(size / 64)
    assert exact["clip_frechet"] < 2e-3 * size and exact["frame_frechet"] < 2e-3 * size / 8
    assert exact["precision"] == pytest.approx(0.999, abs=0.003) and exact["coverage"] == 1
    assert exact["weight_tv"] < 0.06
    assert exact["dynamic_degree"] == pytest.approx(1, abs=0.03)
    assert exact["motion_smoothness"] == pytest.approx(1, abs=0.03)


def test_the_reference_shares_no_noise_with_samples_of_the_same_seed():
    one = gaussian(torch.zeros(2), 1.0)
    floors = [Metrics(one, seed=0).floor(seeded(seed))["sliced_w2"] for seed in range(4)]
    assert floors[0] > min(floors[1:]) / 2


def test_frechet_of_gaussians_is_the_cost_of_the_optimal_map():
    A, B, mean = *randn(2, 4, 4), torch.tensor([1.0, 2.0, 3.0, 0.0]).double()
    C1, C2 = A @ A.T + torch.eye(4), B @ B.T + torch.eye(4)
    product = torch.linalg.eigvals(C1 @ C2)  # the textbook form: eigenvalues of C1 C2 itself
    expected = C1.trace() + C2.trace() - 2 * product.real.sqrt().sum()
    assert frechet(A[0], C1, A[0], C2).item() == pytest.approx(expected.item())
    a, b = torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.0, 0.0, 3.0]).double()
    Q = torch.linalg.qr(A)[0]
    C1, C2 = Q * a**2 @ Q.T, Q * b**2 @ Q.T  # which commute; one is singular
    for costs in (frechet(mean, C1, 0 * mean, C2), frechet(mean, C2, 0 * mean, C1)):
        assert costs.item() == pytest.approx(14 + (a - b).square().sum().item())


@pytest.mark.parametrize("shift, std", [(0.0, 1.0), (1.5, 0.5), (1.0, 1.5)])
@pytest.mark.parametrize("d, sigma", [(2, 0.0), (2, 0.5), (8, 0.0)])
def test_kl_of_two_gaussians_is_the_closed_form_also_noised(shift, std, d, sigma):
    """KL(N(m, a) || N(0, b)) = |m|^2 / 2b + d (a / b - 1 - log(a / b)) / 2."""
    mean, left = torch.full((d,), shift / math.sqrt(d)), 1 - sigma
    q, p = gaussian(mean.double(), std**2), gaussian(0 * mean.double(), 1.0)
    x = q.sample(16384, seeded()).double()
    a, b = (left * std) ** 2 + sigma**2, left**2 + sigma**2  # variances at sigma
    known = (left * shift) ** 2 / b / 2 + d * (a / b - 1 - math.log(a / b)) / 2
    found = kl_to_mixture(x, p.project(torch.eye(d)), sigma, seeded())
    # in 8 dimensions the density changes on the way to the fifth neighbour
    assert found == pytest.approx(known, abs=0.03 if d == 2 else 0.15)


def test_kl_of_two_mixtures_is_the_mean_log_ratio_of_their_densities(on_ring):
    weights = torch.tensor([4.0, 3, 2, 1, 1, 1, 1, 1])
    turned = ring().means @ torch.tensor([[0.96, 0.28], [-0.28, 0.96]]).double()
    q = GaussianMixture(weights, turned, torch.full((8,), 0.25**2))
    x = q.sample(on_ring.n, seeded())
    known = (q.log_prob(x) - on_ring.mixture.log_prob(x)).mean().item()
    assert 0.3 < known < 3 and on_ring(x)["kl"] == pytest.approx(known, abs=0.03)


def test_half_of_the_modes_is_a_kl_of_log_2(on_videos):
    looks = torch.zeros(2 * N_CLIPS, dtype=torch.long)  # one of two
    x = on_videos.mixture.sample(2 * N_CLIPS, seeded(), looks)
    assert on_videos.kl(x) == pytest.approx(math.log(2), abs=0.2)


def test_impostors_fool_every_number_of_points_but_kl(on_ring):
    fake = on_ring(annulus(ring(), on_ring.n, seeded()))
    assert 0.4 < fake["kl"] < 0.55
    assert fake["sliced_w2"] < 0.1 and fake["precision"] > 0.99
    assert fake["coverage"] == 1 and fake["weight_tv"] < 0.02
    on_grid = Metrics(grid())
    fake = on_grid(square(grid(), on_grid.n, seeded()))
    assert fake["kl"] > 0.5 and fake["coverage"] == 1 and fake["sliced_w2"] < 0.1


def test_obviously_wrong_clips_have_a_large_kl(on_videos, clips):
    """Blurred, frozen, a still repeated, the average of the modes, a Gaussian of the moments."""
    mixture = on_videos.mixture
    wide = torch.nn.functional.pad(clips.flatten(1, 2), (1, 1, 1, 1), mode="circular")
    average = mixture.mean().float() + 0.05 * torch.randn(clips.shape, generator=seeded())
    wrong = {
        "blurred": torch.nn.functional.avg_pool2d(wide, 3, 1).reshape(clips.shape),
        "frozen": clips[:, :, 3:4].expand_as(clips),
        "a still": clips[:, :, :1].expand_as(clips),
        "average": average,
        "gaussian": toy.metrics.gaussian(mixture, len(clips), seeded()),
    }
    found = {name: on_videos.kl(x) for name, x in wrong.items()}
    assert min(found.values()) > 5, found
    assert on_videos(wrong["gaussian"])["clip_frechet"] < 10  # which cannot tell


def test_a_shift_and_a_scale_are_measured_in_closed_form():
    metrics, shift = Metrics(gaussian(torch.zeros(2), 1.0)), torch.tensor([3.0, -2.0])
    x = metrics.mixture.sample(metrics.n, seeded())
    shifted, scaled = metrics(x + shift), metrics(1.5 * x)
    along = metrics.directions @ (metrics.basis.T @ shift.double())
    assert shifted["sliced_w2"] == pytest.approx((along**2).mean().sqrt().item(), rel=0.02)
    assert shifted["frechet"] == pytest.approx(13, rel=0.02)
    assert scaled["sliced_w2"] == pytest.approx(0.5, rel=0.05)
    assert scaled["frechet"] == pytest.approx(2 * 0.5**2, rel=0.05)
    # |x|^2 / 2 is exponential: P(|x|^2 < q) = 1 - exp(-q / 2), and q = -2 log .001
    assert scaled["precision"] == pytest.approx(1 - 0.001 ** (1 / 1.5**2), abs=0.003)


@pytest.mark.parametrize("kept, coverage", [(0, 7 / 8), (0.08, 7 / 8), (0.12, 1)])
def test_a_mode_with_less_than_a_tenth_of_its_weight_is_lost(on_ring, kept, coverage):
    labels = torch.arange(on_ring.n) % 7  # of 8
    labels[: int(kept * on_ring.n / 8)] = 7
    values = on_ring(on_ring.mixture.sample(on_ring.n, seeded(), labels))
    assert values["coverage"] == coverage
    assert values["weight_tv"] == pytest.approx((1 - kept) / 8, abs=0.01)
    assert values["precision"] == pytest.approx(0.999, abs=0.001)


def test_bad_samples_count_for_the_weights_but_not_for_precision_and_coverage(on_ring):
    x = on_ring.mixture.sample(on_ring.n, seeded())
    right = on_ring.mixture.responsibilities(x).argmax(1) == 0
    x[right] *= 2  # outside every region, still nearest to mode 0
    values = on_ring(x)
    assert values["precision"] == pytest.approx(0.999 * 7 / 8, abs=0.01)
    assert values["coverage"] == 7 / 8 and values["weight_tv"] < 0.02


def test_frames_out_of_order_fail_as_clips_only(on_videos, clips, exact):
    order = torch.randperm(8, generator=seeded(1))
    values = on_videos(clips[:, :, order])
    assert values["frame_frechet"] == pytest.approx(exact["frame_frechet"], rel=1e-6)
    assert values["clip_frechet"] > 50 * exact["clip_frechet"]
    assert values["precision"] < 0.01 and values["motion_smoothness"] < 0.7


def test_flicker_lowers_the_smoothness(on_videos, clips):
    flicker = 1 + 0.2 * (-1.0) ** torch.arange(8).reshape(8, 1, 1)
    values = on_videos(clips * flicker)
    assert values["motion_smoothness"] < 0.8 and values["dynamic_degree"] > 1


def test_samples_that_are_not_finite_or_not_n_are_refused(on_ring):
    x = on_ring.mixture.sample(on_ring.n, seeded())
    x[5, 0], x[7, 1], x[7, 0] = math.nan, math.inf, math.nan
    with pytest.raises(ValueError, match="2 of 16384 samples are not finite"):
        on_ring(x)
    with pytest.raises(ValueError, match="16384"):
        on_ring(x[:100])
