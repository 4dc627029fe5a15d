"""The metrics, against closed forms and against samples with one known fault each.

References: Gaussian formulas, and exact samples that are shifted, lack a mode, stand still, flicker
or are out of order. Run: python -m pytest tests/test_metrics.py, about ten seconds on one core.
"""

import math

import pytest
import torch

from toy.metrics import Metrics, frame_moments, frechet, moments
from toy.mixtures import GaussianMixture, grid, ring, videos

N_CLIPS = 2048


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def on_ring():
    return Metrics(ring())


@pytest.fixture(scope="module")
def on_videos():
    return Metrics(videos(), n=N_CLIPS)


@pytest.fixture(scope="module")
def clips(on_videos):
    return on_videos.mixture.sample(N_CLIPS, generator())


@pytest.fixture(scope="module")
def exact(on_videos, clips):
    return on_videos(clips)


@pytest.mark.parametrize("mixture", (ring(), grid()))
def test_exact_points_reach_the_floor(mixture):
    values = Metrics(mixture).floor(generator())
    assert list(values) == ["sliced_w2", "frechet", "precision", "coverage", "weight_tv"]
    assert values["sliced_w2"] < 0.04 and 0 <= values["frechet"] < 5e-4
    assert values["precision"] == pytest.approx(0.999, abs=0.001)
    assert values["coverage"] == 1 and values["weight_tv"] < 0.03


def test_exact_clips_reach_the_floor(on_videos, exact):
    assert list(exact) == [
        "sliced_w2",
        "clip_frechet",
        "frame_frechet",
        "precision",
        "coverage",
        "weight_tv",
        "dynamic_degree",
        "motion_smoothness",
    ]
    size = on_videos.moments[1].trace().item()
    assert exact["sliced_w2"] < 0.15 * math.sqrt(size / 64)
    assert exact["clip_frechet"] < 2e-3 * size and exact["frame_frechet"] < 2e-3 * size / 8
    assert exact["precision"] == pytest.approx(0.999, abs=0.003) and exact["coverage"] == 1
    assert exact["weight_tv"] < 0.06
    assert exact["dynamic_degree"] == pytest.approx(1, abs=0.03)
    assert exact["motion_smoothness"] == pytest.approx(1, abs=0.03)


def test_a_seed_fixes_the_numbers(on_ring):
    x = on_ring.mixture.sample(on_ring.n, generator())
    assert on_ring(x) == Metrics(ring())(x)
    assert on_ring(x)["sliced_w2"] != Metrics(ring(), seed=1)(x)["sliced_w2"]


def test_the_reference_shares_no_noise_with_samples_of_the_same_seed():
    one = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    floors = [Metrics(one, seed=0).floor(generator(seed))["sliced_w2"] for seed in range(4)]
    assert floors[0] > min(floors[1:]) / 2


def test_frechet_of_commuting_gaussians_is_the_difference_of_their_deviations():
    a, b = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    Q = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64))[0]
    cov_a, cov_b = Q * a**2 @ Q.T, Q * b**2 @ Q.T  # cov_b is singular
    mean = torch.tensor([1.0, 2.0, 3.0]).double()
    expected = 14 + ((a - b) ** 2).sum().item()
    assert frechet(mean, cov_a, 0 * mean, cov_b).item() == pytest.approx(expected)
    assert frechet(mean, cov_b, 0 * mean, cov_a).item() == pytest.approx(expected)


def test_frechet_of_any_gaussians_equals_the_cost_of_the_optimal_map():
    A, B = torch.randn(2, 4, 4, generator=generator(), dtype=torch.float64)
    C1, C2 = A @ A.T + torch.eye(4), B @ B.T + torch.eye(4)
    product = torch.linalg.eigvals(C1 @ C2)  # the textbook form: eigenvalues of C1 C2 itself
    expected = C1.trace() + C2.trace() - 2 * product.real.sqrt().sum()
    assert frechet(A[0], C1, A[0], C2).item() == pytest.approx(expected.item())


def test_a_shift_is_measured_in_closed_form():
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))
    metrics, shift = Metrics(mixture), torch.tensor([3.0, -2.0, 1.0])
    values = metrics(mixture.sample(metrics.n, generator()) + shift)
    along = metrics.directions @ (metrics.basis.T @ shift.double())
    assert values["sliced_w2"] == pytest.approx((along**2).mean().sqrt().item(), rel=0.02)
    assert values["sliced_w2"] == pytest.approx(shift.norm().item() / math.sqrt(3), rel=0.1)
    assert values["frechet"] == pytest.approx(14, rel=0.02)


def test_a_scale_is_measured_in_closed_form():
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    metrics = Metrics(mixture)
    values = metrics(1.5 * mixture.sample(metrics.n, generator()))
    assert values["sliced_w2"] == pytest.approx(0.5, rel=0.05)
    assert values["frechet"] == pytest.approx(2 * 0.5**2, rel=0.05)
    # |x|^2 / 2 is exponential: P(|x|^2 < q) = 1 - exp(-q / 2), and q = -2 log .001
    assert values["precision"] == pytest.approx(1 - 0.001 ** (1 / 1.5**2), abs=0.003)


def test_a_lost_mode_shows_in_coverage_and_in_the_weights(on_ring):
    labels = torch.randint(0, 7, (on_ring.n,), generator=generator())  # never the last of 8
    values = on_ring(on_ring.mixture.sample(on_ring.n, generator(), labels))
    assert values["coverage"] == 7 / 8
    assert values["weight_tv"] == pytest.approx(1 / 8, abs=0.01)
    assert values["precision"] == pytest.approx(0.999, abs=0.001)


def test_a_mode_with_less_than_a_tenth_of_its_weight_is_lost(on_ring):
    for kept, coverage in ((0.08, 7 / 8), (0.12, 1)):
        count = int(kept * on_ring.n / 8)
        labels = torch.arange(on_ring.n) % 7
        labels[:count] = 7
        values = on_ring(on_ring.mixture.sample(on_ring.n, generator(), labels))
        assert values["coverage"] == coverage


def test_bad_samples_count_for_the_weights_but_not_for_precision_and_coverage(on_ring):
    x = on_ring.mixture.sample(on_ring.n, generator())
    right = on_ring.mixture.responsibilities(x).argmax(1) == 0
    x[right] *= 2  # outside every region, still nearest to mode 0
    values = on_ring(x)
    assert values["precision"] == pytest.approx(0.999 * 7 / 8, abs=0.01)
    assert values["coverage"] == 7 / 8 and values["weight_tv"] < 0.02


def test_frames_out_of_order_fail_as_clips_only(on_videos, clips, exact):
    order = torch.randperm(8, generator=generator(1))
    values = on_videos(clips[:, :, order])
    assert values["frame_frechet"] == pytest.approx(exact["frame_frechet"], rel=1e-6)
    assert values["clip_frechet"] > 50 * exact["clip_frechet"]
    assert values["precision"] < 0.01 and values["motion_smoothness"] < 0.7


def test_a_still_clip_has_no_dynamic_degree(on_videos, clips):
    values = on_videos(clips[:, :, 3:4].expand_as(clips))
    assert values["dynamic_degree"] == 0 and values["coverage"] == 0
    assert 1 < values["motion_smoothness"] < math.inf


def test_flicker_lowers_the_smoothness(on_videos, clips):
    flicker = 1 + 0.2 * (-1.0) ** torch.arange(8).reshape(8, 1, 1)
    values = on_videos(clips * flicker)
    assert values["motion_smoothness"] < 0.8 and values["dynamic_degree"] > 1


def test_slow_motion_has_half_the_dynamic_degree(on_videos, clips, exact):
    half = clips.clone()
    half[:, :, 1::2] = half[:, :, ::2]  # every second frame repeats the one before
    ratio = on_videos(half)["dynamic_degree"] / exact["dynamic_degree"]
    assert 0.4 < ratio < 0.9


def test_frame_moments_are_those_of_all_frames(on_videos, clips):
    mixture = on_videos.mixture
    mean, cov = frame_moments(mixture.mean().flatten(), mixture.covariance(), mixture.shape)
    frames = clips.transpose(1, 2).reshape(-1, 4 * 8 * 8).double()
    sample_mean, sample_cov = moments(frames)
    assert (sample_mean - mean).norm() < 0.05 * mean.norm()
    assert (sample_cov - cov).norm() < 0.05 * cov.norm()


def test_samples_that_are_not_finite_or_not_n_are_refused(on_ring):
    x = on_ring.mixture.sample(on_ring.n, generator())
    x[5, 0], x[7, 1], x[7, 0] = math.nan, math.inf, math.nan
    with pytest.raises(ValueError, match="2 of 16384 samples are not finite"):
        on_ring(x)
    with pytest.raises(ValueError, match="16384"):
        on_ring(x[:100])
