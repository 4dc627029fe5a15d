"""Gaussian mixtures under x_t = (1 - sigma) x0 + sigma eps, every marginal and velocity exact.

Such a mixture is a data set, an exact real DiT and the ruler of `toy.metrics` in one. Its velocity
is a callable `velocity(x_t, sigma, cond)` like that of any model. With a = 1 - sigma, component k
of the marginal of x_t is

    N(a mu_k, S_k),   S_k = a^2 Sigma_k + sigma^2 I,   and with r = x_t - a mu_k
    E[x0 | x_t, k] = mu_k + a Sigma_k S_k^-1 r,        E[eps | x_t, k] = sigma S_k^-1 r.

Nothing here divides by sigma. Every covariance is kept in an eigenbasis,

    Sigma_k = U_k diag(lam_k) U_k^T + rest_k (I - U_k U_k^T),      U_k (D, R), lam_k (R,)

so that S_k is inverted exactly in O(D R): R is 0 for isotropic covariances, the rank for low-rank
ones and D for full ones. Diagonal ones have U = I, which is not stored.
"""

import math
from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """Sigma_k = F_k F_k^T + variance_k I."""

    factors: torch.Tensor  # (K, D, R)
    variance: torch.Tensor  # (K,)


def eigenbasis(covariances, means):
    """Sigma = U diag(lam) U^T + rest (I - U U^T): U (K, D, R) or None for I, lam (K, R), rest (K,).

    Where R = D only rounding errors lie outside U: the largest lam as rest keeps them small.
    """
    K, D = means.shape
    if isinstance(covariances, LowRank):
        factors, rest = (part.to(means) for part in covariances)
        U, singular, _ = torch.linalg.svd(factors, full_matrices=False)
        return U, singular**2 + rest[:, None], rest
    covariances = covariances.to(means)
    kinds = {1: (K,), 2: (K, D), 3: (K, D, D)}
    assert covariances.shape == kinds[covariances.ndim], f"{tuple(covariances.shape)}, K={K}, D={D}"
    if covariances.ndim == 1:
        return means.new_zeros(K, D, 0), means.new_zeros(K, 0), covariances
    if covariances.ndim == 2:
        return None, covariances, covariances.amax(1)
    lam, U = torch.linalg.eigh(covariances)
    return U, lam, lam.amax(1)


class GaussianMixture:
    """p(x0) = sum_k w_k N(mu_k, Sigma_k), and p(x_t) for every sigma in [0, 1].

    weights (K,), means (K, *shape); covariances (K,), (K, D), (K, D, D) or LowRank, with D =
    prod(shape). labels (K,) long: the condition that each component belongs to, its own number by
    default; given a condition, the mixture is that of the components with this label.
    x (n, *shape); sigma float or (n,). Results have the dtype and device of x.
    """

    def __init__(self, weights, means, covariances, labels=None):
        # float64 inside: squared distances to a far mode, divided by a small variance, differ
        # between components by less than float32 resolves, and the posterior would be noise.
        self.weights = weights.double() / weights.double().sum()
        self.shape = tuple(means.shape[1:])
        self.means = means.double().flatten(1)  # (K, D)
        K, self.dim = self.means.shape
        self.basis, self.lam, self.rest = eigenbasis(covariances, self.means)
        assert (self.rest > 0).all() and (self.lam > 0).all(), "covariances: not positive definite"
        self.labels = torch.arange(K) if labels is None else labels
        assert self.labels.shape == (K,), f"labels {tuple(self.labels.shape)} for K={K}"
        own = torch.arange(K)
        self._means_along = self._along(self.means)[own, own]  # (K, R)
        member = self.labels == torch.arange(int(self.labels.max()) + 1)[:, None]
        assert member.any(1).all(), f"labels {self.labels.tolist()}: a label without a component"
        self._log_given = (self.weights * member).log().log_softmax(1)  # (labels, K)

    # ---------------------------------------------------------------- coordinates

    def _along(self, x):
        """U_k^T x for every k: (n, D) -> (n, K, R)."""
        if self.basis is None:
            return x[:, None].expand(-1, *self.means.shape)
        return torch.einsum("nd,kdr->nkr", x, self.basis)

    def _back(self, c):
        """sum_k U_k c_k: (n, K, R) -> (n, D)."""
        return c.sum(1) if self.basis is None else torch.einsum("nkr,kdr->nd", c, self.basis)

    def _coordinates(self, x, a):
        """c = U_k^T (x - a mu_k) (n, K, R), and |x - a mu_k - U_k c|^2 (n, K); no (n, K, D)."""
        c = self._along(x) - a[..., None] * self._means_along
        length = (x**2).sum(1, keepdim=True) - 2 * a * x @ self.means.T
        length = length + a**2 * (self.means**2).sum(1)
        return c, (length - (c**2).sum(2)).clamp(min=0)

    def _flat(self, x, sigma):
        """x (n, D) and sigma (n, 1) or (1, 1), in float64."""
        assert tuple(x.shape[1:]) == self.shape, f"{tuple(x.shape)} for (n, *{self.shape})"
        sigma = torch.as_tensor(sigma, dtype=self.means.dtype, device=self.means.device)
        return x.flatten(1).to(self.means), sigma.reshape(-1, 1)

    def _log_weights(self, labels, n):
        """log w_k (n, K), or log p(k | label): -inf for components of another label."""
        if labels is None:
            return self.weights.log().expand(n, -1)
        # index_select refuses -1, which indexing would silently take for the last label.
        return self._log_given.index_select(0, labels.to(self.means.device))

    def _shift(self, labels):
        """How far the condition moves each mean along U_k: (n, K, R), or 0, as labels move none."""
        return 0.0

    def _log_joint(self, x, sigma, labels):
        """log w_k + log N(x; a mu_k, S_k) (n, K), with w given the label; and c of _coordinates."""
        a = 1 - sigma
        c, outside = self._coordinates(x, a)
        c = c - a[..., None] * self._shift(labels)
        S_lam = a[..., None] ** 2 * self.lam + sigma[..., None] ** 2
        S_rest = a**2 * self.rest + sigma**2
        distance = (c**2 / S_lam).sum(2) + outside / S_rest
        logdet = S_lam.log().sum(2) + (self.dim - self.lam.shape[1]) * S_rest.log()
        log_normal = -(distance + logdet + self.dim * math.log(2 * math.pi)) / 2
        return self._log_weights(labels, len(x)) + log_normal, c

    # ---------------------------------------------------------------- sampling

    def sample_labels(self, n, rng):
        """Labels (n,) as often as the data have them; rng: a CPU generator."""
        return self.labels[torch.multinomial(self.weights, n, replacement=True, generator=rng)]

    def sample(self, n, rng, labels=None):
        """x0 = mu_k + Sigma_k^(1/2) eps, float32 (n, *shape); k ~ w, or ~ w given labels (n,)."""
        p = self._log_weights(labels, n).exp()
        k = torch.multinomial(p, 1, generator=rng)[:, 0]
        return self._draw(k, rng).float().reshape(n, *self.shape)

    def _draw(self, k, rng):
        """A sample of each component k (n,), float64 (n, D)."""
        eps = torch.randn(len(k), self.dim, generator=rng, dtype=torch.float64)
        x0 = self.means[k] + self.rest[k, None].sqrt() * eps
        stretch = self.lam.sqrt() - self.rest.sqrt()[:, None]
        for j in k.unique():
            own = k == j
            x0[own] += self._stretch(eps[own], j, stretch[j])
        return x0

    def _stretch(self, eps, k, by):
        """U_k diag(by) U_k^T eps: (n, D) -> (n, D)."""
        return eps * by if self.basis is None else eps @ self.basis[k] * by @ self.basis[k].T

    # ---------------------------------------------------------------- densities and expectations

    def log_prob(self, x, sigma=0.0, labels=None):
        """log p(x_t = x) (n,), given labels (n,) if there are any."""
        joint, _ = self._log_joint(*self._flat(x, sigma), labels)
        return joint.logsumexp(1).to(x)

    def responsibilities(self, x, sigma=0.0):
        """p(k | x_t = x) (n, K)."""
        joint, _ = self._log_joint(*self._flat(x, sigma), None)
        return joint.softmax(1).to(x)

    def mahalanobis(self, x):
        """(x - mu_k)^T Sigma_k^-1 (x - mu_k) (n, K): squared distances, at sigma = 0."""
        x64, sigma = self._flat(x, 0.0)
        c, outside = self._coordinates(x64, 1 - sigma)
        return ((c**2 / self.lam).sum(2) + outside / self.rest).to(x)

    def posterior_mean(self, x_t, sigma, labels=None):
        """E[x0 | x_t] (n, *shape)."""
        return self._expectation(x_t, sigma, labels, of_eps=0, of_x0=1)

    def velocity(self, x_t, sigma, cond=None):
        """v = E[eps - x0 | x_t] (n, *shape); cond: labels (n,), None for all components."""
        return self._expectation(x_t, sigma, cond, of_eps=1, of_x0=-1)

    def _expectation(self, x_t, sigma, labels, of_eps, of_x0):
        """E[of_eps eps + of_x0 x0 | x_t] = sum_k p(k | x_t) (of_x0 mu_k + G_k (x_t - a mu_k)).

        G = (of_eps sigma I + of_x0 a Sigma) S^-1 has the eigenvectors of Sigma. The sum over k is
        taken inside matrix products, so that no (n, K, D) is built unless R = D.
        """
        x, s = self._flat(x_t, sigma)
        a = 1 - s
        joint, c = self._log_joint(x, s, labels)
        p = joint.softmax(1)

        def gain(lam, a, s):
            return (of_eps * s + of_x0 * a * lam) / (a**2 * lam + s**2)

        G_rest = gain(self.rest, a, s)  # (n, K)
        G_lam = gain(self.lam, a[..., None], s[..., None])  # (n, K, R)
        of_mean = of_x0 - a * G_rest  # (n, K)
        mean = (p * G_rest).sum(1, keepdim=True) * x + (p * of_mean) @ self.means
        along = (G_lam - G_rest[..., None]) * c + of_mean[..., None] * self._shift(labels)
        mean = mean + self._back(p[..., None] * along)
        return mean.to(x_t).reshape(x_t.shape)

    # ---------------------------------------------------------------- moments and subspaces

    def mean(self):
        """E[x0], (*shape)."""
        return (self.weights @ self.means).reshape(self.shape)

    def covariance(self):
        """Cov[x0] (D, D) = sum_k w_k (Sigma_k + (mu_k - m) (mu_k - m)^T)."""
        U = self._along(torch.eye(self.dim, dtype=torch.float64))  # (D, K, R)
        within = self.weights[:, None] * (self.lam - self.rest[:, None])
        cov = torch.einsum("ikr,kr,jkr->ij", U, within, U)
        cov.diagonal().add_(self.weights @ self.rest)
        centred = self.means - self.weights @ self.means
        return cov + (self.weights * centred.T) @ centred

    def project(self, P):
        """The mixture of P^T x0, shape (r,), for P (D, r); its covariances are full."""
        P = P.to(self.means)
        U = self._along(P.T)  # (r, K, R)
        cov = torch.einsum("ikr,kr,jkr->kij", U, self.lam - self.rest[:, None], U)
        cov = cov + self.rest[:, None, None] * (P.T @ P)
        return GaussianMixture(self.weights, self.means @ P, cov, self.labels)


class GivenFirstFrame(GaussianMixture):
    """p(frames 1.. | frame 0) of a mixture of clips (C, T, H, W): a mixture of (C, T - 1, H, W).

    A component's clip is mu + L z + eps with z ~ N(0, I) and L (D, R) split into the rows L0 of
    frame 0 and L1 of the others. With C = (I + L0^T L0 / rest)^-1 a given frame y leaves

        z | y ~ N(C L0^T (y - mu0) / rest, C),       w_k | y ~ w_k N(y; mu0, L0 L0^T + rest I),

    so its covariances L1 C L1^T + rest I are the same for every y, and its means move along L1.
    given (n, C, 1, H, W) stands where labels do. Labels play no part: a frame tells the look.
    """

    mean = covariance = project = mahalanobis = responsibilities = None  # they depend on the frame

    def __init__(self, joint):
        stretch = joint.lam - joint.rest[:, None]
        assert joint.basis is not None and (stretch >= 0).all(), "not low-rank and isotropic"
        L = joint.basis * stretch.sqrt()[:, None]  # (K, D, R)
        L0, L1 = (x.flatten(1, 4) for x in self._split(L.unflatten(1, joint.shape)))
        means = joint.means.unflatten(1, joint.shape)
        means0, means1 = self._split(means)
        variance = joint.rest[:, None, None]
        C = torch.linalg.inv(torch.eye(L.shape[2]).to(L) + L0.mT @ L0 / variance)  # (K, R, R)
        factors = LowRank(L1 @ torch.linalg.cholesky(C), joint.rest)
        super().__init__(joint.weights, means1, factors, joint.labels)
        self.first = GaussianMixture(joint.weights, means0, LowRank(L0, joint.rest), joint.labels)
        self._gain = self.basis.mT @ L1 @ C @ L0.mT / variance  # (K, R, D of a frame)

    @staticmethod
    def _split(x):
        """Frame 0 and the others of x (K, C, T, ...)."""
        return x[:, :, :1], x[:, :, 1:]

    def _shift(self, given):
        y, _ = self.first._flat(given, 0.0)
        difference = torch.einsum("nd,krd->nkr", y, self._gain)
        return difference - torch.einsum("kd,krd->kr", self.first.means, self._gain)

    def _log_weights(self, given, n):
        return self.first._log_joint(*self.first._flat(given, 0.0), None)[0].log_softmax(1)

    def sample(self, n, rng, given):
        """Frames 1.. that follow the given ones, float32 (n, C, T - 1, H, W)."""
        k = torch.multinomial(self._log_weights(given, n).exp(), 1, generator=rng)
        own = torch.zeros(n, len(self.weights)).to(self.means).scatter_(1, k, 1.0)
        x0 = self._draw(k[:, 0], rng) + self._back(own[..., None] * self._shift(given))
        return x0.float().reshape(n, *self.shape)


class KeptFirstFrame:
    """The same, with the given frame kept in the sample (C, T, H, W): frame 0 is always it."""

    def __init__(self, joint):
        self.others, self.shape = GivenFirstFrame(joint), joint.shape
        self.first = self.others.first

    def sample(self, n, rng, given):
        """Clips that begin with the given frames, float32 (n, C, T, H, W)."""
        return torch.cat([given, self.others.sample(n, rng, given)], dim=2)

    def velocity(self, x_t, sigma, given):
        """v = E[eps - x0 | x_t, given] (n, C, T, H, W), for sigma above 0."""
        level = torch.as_tensor(sigma, dtype=x_t.dtype).reshape(-1, 1, 1, 1, 1)
        first = (x_t[:, :, :1] - given) / level  # x0 is known, and so is eps
        return torch.cat([first, self.others.velocity(x_t[:, :, 1:], sigma, given)], dim=2)


# -------------------------------------------------------------------- ready mixtures


def ring(modes=8, radius=2**0.5, std=0.2):
    """Equal modes on a circle, (2,); a coordinate's variance is radius^2 / 2 + std^2, near 1."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(torch.ones(modes), means, torch.full((modes,), std**2))


def grid(side=5, std=0.08):
    """side x side modes, (2,), a coordinate's std near 1; the heaviest has 4 times the lightest's
    weight."""
    K = side**2
    place = torch.linspace(-1, 1, side, dtype=torch.float64)
    place = place / place.std(correction=0)
    means = torch.cartesian_prod(place, place)
    scattered = (7 * torch.arange(K)) % K  # a permutation for any side that 7 does not divide
    return GaussianMixture(1 + 3 * scattered / (K - 1), means, torch.full((K,), std**2))


FRAMES = SIZE = 8
MIDDLE = (FRAMES - 1) / 2
# A look is a direction in the 4 channels, and a width.
LOOKS = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]], dtype=torch.float64)
WIDTHS = 1.0, 1.3  # pixels, of each look
SPEEDS = 0.4, 0.9  # pixels a frame; within +-3.2 pixels of the centre, so no clip goes all around
#         x    y    along across  brightness drift: one standard deviation of each wobble
WOBBLE = 0.25, 0.25, 0.05, 0.05, 0.15, 0.1


def clip(wobble, look, angle, speed, centred=MIDDLE):
    """A soft blob on a torus, at the centre in frame `centred`: (C, T, H, W) = (4, 8, 8, 8).

    wobble (6,): shift in x and y, speed along and across the direction, brightness and its drift.
    """
    x, y, along, across, brightness, drift = wobble
    time = torch.arange(FRAMES, dtype=torch.float64) - centred
    cos, sin = math.cos(angle), math.sin(angle)
    at_x = x + ((speed + along) * cos - across * sin) * time
    at_y = y + ((speed + along) * sin + across * cos) * time
    pixel = torch.arange(SIZE, dtype=torch.float64) - (SIZE - 1) / 2
    turn = 2 * math.pi / SIZE
    sharp = 1 / (turn * WIDTHS[look]) ** 2  # a periodic bump, Gaussian near its top
    column = (sharp * ((turn * (pixel - at_x[:, None])).cos() - 1)).exp()  # (T, W)
    row = (sharp * ((turn * (pixel - at_y[:, None])).cos() - 1)).exp()  # (T, H)
    light = 1 + brightness + drift * 2 * time / FRAMES
    return torch.einsum("c,t,th,tw->cthw", LOOKS[look], light, row, column)


def videos(std=0.05, centred=MIDDLE):
    """Moving blobs (4, 8, 8, 8): 2 looks x 4 directions x 2 speeds; average variance 1 per element.

    The label is the look: it tells what moves, not how, as a prompt leaves the motion open. All
    blobs pass the centre in mid-clip, and opposite directions show the same frames in opposite
    order: a frame does not tell its motion. A component's wobble changes its whole clip to
    first order, all frames together: a clip may move wrongly though every frame is right. std: of
    the isotropic noise on every element. centred: the frame in which blobs pass the centre; with 0
    the first frame shows what moves, and leaves open where to.
    """
    angles = [math.pi / 2 * quarter for quarter in range(4)]
    kinds = [(look, angle, speed) for look in (0, 1) for angle in angles for speed in SPEEDS]
    steps = torch.diag(torch.tensor(WOBBLE, dtype=torch.float64))
    means = torch.stack([clip(0 * steps[0], *kind, centred) for kind in kinds])

    def factor(kind):
        """What each step does to a clip, as columns: (D, 6)."""
        ends = [(clip(step, *kind, centred), clip(-step, *kind, centred)) for step in steps]
        return torch.stack([(plus - minus).flatten() / 2 for plus, minus in ends], 1)

    factors = torch.stack([factor(kind) for kind in kinds])  # (K, D, 6)
    variance = means.var(0, correction=0).mean() + (factors**2).sum(2).mean()
    scale = ((1 - std**2) / variance).sqrt()  # with the isotropic part the average variance is 1
    noise = torch.full((len(kinds),), std**2, dtype=torch.float64)
    labels = torch.tensor([look for look, _, _ in kinds])
    covariances = LowRank(scale * factors, noise)
    return GaussianMixture(torch.ones(len(kinds)), scale * means, covariances, labels)
