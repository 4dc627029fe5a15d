"""How far samples are from an exact mixture, and in what: distance, quality, modes, motion.

The exact side is exact wherever it can be (density, moments, weights, regions of the mixture); only
the sliced distance and the two motion ratios compare with a reference sample, fixed by the seed.
`Metrics.floor` gives the values of perfect samples, which are not 0 at a finite n;
the impostors at the end of this file are obviously wrong and score well on all but `kl`.

| key               | what                                                              | best |
|-------------------|-------------------------------------------------------------------|------|
| kl                | KL(samples || exact) in nats, by nearest neighbours               | ~0   |
| sliced_w2         | sliced 2-Wasserstein distance, not squared                        | ~0   |
| frechet           | squared Frechet distance of the moments                           | ~0   |
| clip_frechet      | the same, of whole clips                                          | ~0   |
| frame_frechet     | the same, of frames without regard to their order                 | ~0   |
| precision         | share inside the 99.9 % region of the most probable component     | .999 |
| coverage          | share of modes given a tenth of their weight by such samples      | 1    |
| weight_tv         | total variation between the shares of the modes and their weights | ~0   |
| dynamic_degree    | mean absolute frame difference over the data's; 0 for still clips | 1    |
| motion_smoothness | the data's mean absolute second difference over the samples'      | 1    |
"""

import math

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln
from scipy.stats import chi2

from toy.mixtures import GaussianMixture
from w2svd import add_noise

DIRECTIONS = 256
CLIP_DIM, FRAME_DIM = 64, 32
# The KL of clips is that of their 8 leading coordinates, noised to sigma .5. Without the noise, any
# network's small errors beside the data's own narrow noise would be most of it; in more dimensions
# neighbours are too far apart. DMD lowers the same KL, at every level.
KL_DIM, KL_NOISE = 8, 0.5
# The same for a clip by itself: without noise any network's errors put most clips outside
ASTRAY_NOISE = 0.3
NEIGHBOUR = 5  # the distance to this one tells the density
REGION = 0.999
# Runs use small seeds; a run whose generator met the reference's would seem closer than perfect.
REFERENCE_SEED = 1_000_003


def sqrt_psd(cov):
    """C^(1/2), symmetric; eigenvalues that rounding made negative count as 0."""
    lam, U = torch.linalg.eigh(cov)
    return U * lam.clamp(min=0).sqrt() @ U.T


def frechet(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)): squared 2-Wasserstein distance
    of Gaussians. The symmetric product has the eigenvalues of C1 C2 and keeps them real."""
    root = sqrt_psd(cov1)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * cross


def moments(x):
    """Mean (D,) and unbiased covariance (D, D) of x (n, D)."""
    return x.mean(0), torch.atleast_2d(torch.cov(x.T))  # of one column it is a number


def frame_moments(mean, cov, shape):
    """Moments of a frame at a uniform random time, from those of clips of shape (C, T, H, W)."""
    C, T, H, W = shape
    frames = mean.reshape(C, T, H * W).transpose(0, 1).reshape(T, -1)
    within = cov.reshape(C, T, H * W, C, T, H * W).diagonal(dim1=1, dim2=4).mean(-1)
    centred = frames - frames.mean(0)
    return frames.mean(0), within.reshape(C * H * W, -1) + centred.T @ centred / T


def principal(cov, dim):
    """The min(dim, D) leading eigenvectors of cov (D, D), as columns."""
    return torch.linalg.eigh(cov)[1][:, -dim:]


def distances(data, samples, k):
    """The Frechet distances of sets of rows (n, D) from data (m, D), over the data's variance.

    In k + 1 coordinates: those in the data's k leading directions, and the length of the rest,
    without which samples could be anything beside these directions. And the directions' share of
    the data's variance.
    """
    mean = data.mean(0)
    x = data - mean
    gram = (x @ x.T).double()  # (m, m), as (D, D) would be too large
    top = principal(gram, k)
    share = (top * (gram @ top)).sum() / gram.trace()
    directions = x.T @ top.float()  # (D, k)
    directions /= directions.norm(dim=0).clamp(min=1e-12)

    def found(x):
        along = x @ directions
        rest = (x.square().sum(1) - along.square().sum(1)).clamp(min=0).sqrt()
        return moments(torch.cat([along, rest[:, None]], dim=1).double())

    theirs = found(x)
    mine = [found(other - mean) for other in samples]
    return [(frechet(*m, *theirs) / theirs[1].trace()).item() for m in mine], share.item()


def sorted_slices(x, directions):
    """Every 1-D projection of x (n, D) in order: (directions, n)."""
    # numpy: torch.sort orders the indices too and takes longer
    return np.sort((directions @ x.T).numpy(), axis=1)


def kl_to_mixture(x, mixture, sigma, rng):
    """KL(q || p) in nats, of samples x (n, d) of q and the mixture p, both noised to sigma.

    E log p is exact. E log q comes from the distances to the fifth neighbours (Kozachenko and
    Leonenko), which are looked for among the samples of the same component and in its own standard
    coordinates, where exact samples are standard normal. The mixture: one of project().
    """
    (n, d), a = x.shape, 1 - sigma
    x = add_noise(x, torch.randn(x.shape, generator=rng, dtype=x.dtype), sigma)
    component = mixture.responsibilities(x, sigma).argmax(1)
    log_ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)  # the unit ball's volume
    log_ratio = torch.full((n,), math.nan, dtype=x.dtype)
    for j in component.unique():
        own = component == j
        variance = a**2 * mixture.lam[j] + sigma**2
        y = (x[own] - a * mixture.means[j]) @ mixture.basis[j] / variance.sqrt()
        k = min(NEIGHBOUR, len(y) - 1)
        if k == 0:
            continue  # one sample has no neighbour
        distance = cKDTree(y).query(y, k=[k + 1])[0][:, 0]  # the first is the sample itself
        log_radius = torch.from_numpy(np.log(distance.clip(1e-12)))  # of samples that coincide
        log_q = digamma(k) - digamma(n) - log_ball - d * log_radius - variance.log().sum() / 2
        log_ratio[own] = log_q - mixture.log_prob(x[own], sigma)
    return log_ratio.nanmean().item()


def motion(clips):
    """Mean |first| and mean |second difference| in time of clips (n, C, T, H, W)."""
    return tuple(clips.diff(n=order, dim=2).abs().mean().item() for order in (1, 2))


def travel(clips):
    """How far a clip's blob moves from the first frame to the last: (n, 2), pixels right and up.

    clips (n, C, T, H, W) wrap around, so a frame's blob is where the slowest wave of its energy has
    its phase, across and down, and the steps from frame to frame add up.
    """
    energy = clips.detach().square().sum(1)  # (n, T, H, W)

    def moved(line):
        """Pixels by which the line (n, T, W) of a frame's energy moves, (n,)."""
        wave = torch.fft.fft(line, dim=2)[..., 1]  # (n, T)
        turns = torch.angle(wave[:, :-1] * wave[:, 1:].conj())
        return turns.sum(1) * line.shape[2] / (2 * math.pi)

    return torch.stack([moved(energy.sum(2)), -moved(energy.sum(3))], dim=1)  # rows count down


def travel_of(mixture, n=8192):
    """Exact clips' travel as a mixture in the plane: each component's moments, of n clips."""
    clips = mixture.sample(n, torch.Generator().manual_seed(REFERENCE_SEED))
    points, component = travel(clips), mixture.responsibilities(clips).argmax(1)
    own = [moments(points[component == k].double()) for k in range(len(mixture.weights))]
    means, covariances = (torch.stack(part) for part in zip(*own))
    return GaussianMixture(mixture.weights, means, covariances)


class Metrics:
    """samples (n, *mixture.shape) -> {name: float}, in principal subspaces of the exact mixture.

    Points and other small shapes: their whole space. Clips (C, T, H, W): 64 dimensions, frames 32.
    Raises ValueError for samples that are not finite, or not n.
    """

    def __init__(self, mixture, n=16384, seed=0):
        rng = torch.Generator().manual_seed(REFERENCE_SEED + seed)
        self.mixture, self.n, self.is_video = mixture, n, len(mixture.shape) == 4
        mean, cov = mixture.mean().flatten(), mixture.covariance()
        self.basis = principal(cov, CLIP_DIM)
        self.projected = mixture.project(self.basis)
        self.leading = mixture.project(self.basis[:, -KL_DIM:])
        self.moments = self.basis.T @ mean, self.basis.T @ cov @ self.basis
        self.radius2 = chi2.ppf(REGION, self.projected.dim)
        directions = torch.randn(DIRECTIONS, self.projected.dim, generator=rng).double()
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        reference = mixture.sample(n, rng)
        self.slices = sorted_slices(reference.flatten(1).double() @ self.basis, self.directions)
        if self.is_video:
            self.motion = motion(reference)
            mean, cov = frame_moments(mean, cov, mixture.shape)
            self.frame_basis = P = principal(cov, FRAME_DIM)
            self.frame_moments = P.T @ mean, P.T @ cov @ P

    def __call__(self, samples):
        samples = samples.detach().cpu().float()
        if samples.shape != (self.n, *self.mixture.shape):
            raise ValueError(
                f"{tuple(samples.shape)}: these metrics compare {self.n} samples of "
                f"shape {self.mixture.shape}; use Metrics(mixture, n) with your n"
            )
        bad = (~samples.isfinite()).flatten(1).any(1).sum().item()
        if bad:
            raise ValueError(f"{bad} of {self.n} samples are not finite")
        x = samples.flatten(1).double() @ self.basis
        values = {"kl": self.kl(samples), "sliced_w2": self._sliced_w2(x)}
        values |= self._frechets(x, samples) | self._modes(x)
        return values | self._motion(samples) if self.is_video else values

    def floor(self, rng):
        """The metrics of n fresh exact samples."""
        return self(self.mixture.sample(self.n, rng))

    def kl(self, samples):
        """KL(samples || exact) in nats, of any number of samples; see KL_NOISE for clips."""
        x = samples.detach().flatten(1).double() @ self.basis
        rng = torch.Generator().manual_seed(REFERENCE_SEED)
        if self.is_video:
            return kl_to_mixture(x[:, -KL_DIM:], self.leading, KL_NOISE, rng)
        return kl_to_mixture(x, self.projected, 0.0, rng)

    def astray(self, clips):
        """Which clips are like none of the data: (n,) bool. See ASTRAY_NOISE.

        They lie outside the 99.9 % regions of all components, in the KL's coordinates.
        """
        x = clips.detach().flatten(1).double() @ self.basis[:, -KL_DIM:]
        rng, a = torch.Generator().manual_seed(REFERENCE_SEED), 1 - ASTRAY_NOISE
        x = add_noise(x, torch.randn(x.shape, generator=rng, dtype=x.dtype), ASTRAY_NOISE)
        distances = []
        for mean, U, lam in zip(self.leading.means, self.leading.basis, self.leading.lam):
            variance = a**2 * lam + ASTRAY_NOISE**2
            distances.append((((x - a * mean) @ U) ** 2 / variance).sum(1))
        return torch.stack(distances).amin(0) > chi2.ppf(REGION, KL_DIM)

    def _sliced_w2(self, x):
        """(mean over theta of W2(theta^T x, theta^T reference)^2)^(1/2): in 1-D, W2 pairs ranks."""
        return math.sqrt(((sorted_slices(x, self.directions) - self.slices) ** 2).mean())

    def _frechets(self, x, samples):
        """Distances of the samples' moments from the exact ones."""
        distance = frechet(*moments(x), *self.moments).item()
        if not self.is_video:
            return {"frechet": distance}
        frames = samples.transpose(1, 2).flatten(0, 1).flatten(1).double() @ self.frame_basis
        frame_distance = frechet(*moments(frames), *self.frame_moments).item()
        return {"clip_frechet": distance, "frame_frechet": frame_distance}

    def _modes(self, x):
        """Each sample belongs to its component of highest posterior; is it inside, is none lost?"""
        k = self.projected.responsibilities(x).argmax(1)
        inside = self.projected.mahalanobis(x).gather(1, k[:, None])[:, 0] <= self.radius2
        weights = self.projected.weights
        share = torch.bincount(k, minlength=len(weights)) / self.n
        good_share = torch.bincount(k[inside], minlength=len(weights)) / self.n
        return {
            "precision": inside.double().mean().item(),
            "coverage": (good_share >= weights / 10).double().mean().item(),
            "weight_tv": (share - weights).abs().sum().item() / 2,
        }

    def _motion(self, samples):
        """How much the samples move, and how evenly, against the reference; 1 is like the data."""
        first, second = motion(samples)
        # A still clip is smooth without bound: kept finite for JSON.
        smoothness = self.motion[1] / max(second, 1e-6)
        return {"dynamic_degree": first / self.motion[0], "motion_smoothness": smoothness}


# ------------------------------------------- obviously wrong samples, to hold the numbers against


def annulus(mixture, n, rng):
    """A ring without modes: exact points, each turned by an angle of its own."""
    x, angle = mixture.sample(n, rng), 2 * math.pi * torch.rand(n, generator=rng)
    turned = torch.complex(x[:, 0], x[:, 1]) * torch.polar(torch.ones(n), angle)
    return torch.view_as_real(turned).clone()


def square(mixture, n, rng):
    """A grid without modes: points uniform in the square around all of its modes."""
    half = mixture.means.abs().max() + mixture.means[:, 0].unique().diff().max() / 2
    return (half * (2 * torch.rand(n, *mixture.shape, generator=rng) - 1)).float()


def still(mixture, n, rng):
    """Clips that stay as they begin: exact first frames, repeated."""
    clips = mixture.sample(n, rng)
    return clips[:, :, :1].expand_as(clips).clone()


def gaussian(mixture, n, rng):
    """Clips of no mode: one Gaussian with the exact mean and covariance."""
    eps = torch.randn(n, mixture.dim, generator=rng, dtype=torch.float64)
    x = mixture.mean().flatten() + eps @ sqrt_psd(mixture.covariance())
    return x.float().reshape(n, *mixture.shape)
