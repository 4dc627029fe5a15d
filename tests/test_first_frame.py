"""Clips given their first frame: the exact mixture, both forms of the toy, train and sample.

Against: dense Gaussian conditioning by torch.linalg, autograd of log_prob, stored results. Run:
python -m pytest tests/test_first_frame.py; half a minute on one core.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import randn, relative, seeded
from helpers import PICTURES, names, run, tensors, train
from torch.distributions import MultivariateNormal

import toy.tasks
import w2svd
from toy import table
from toy.metrics import Metrics
from toy.mixtures import GaussianMixture, GivenFirstFrame, LowRank
from toy.tasks import FORMS

SHAPE, K, R = (2, 3, 1, 2), 3, 2  # C, T, H, W
FIRST = torch.arange(12).reshape(SHAPE)[:, :1].flatten()  # where frame 0 is in a flat clip
OTHERS = torch.arange(12).reshape(SHAPE)[:, 1:].flatten()


@pytest.fixture
def joint():
    """Three overlapping components of small clips, float64; frame 0 tells something of each."""
    factors, variance = 0.7 * randn(K, 12, R, seed=1), torch.tensor([0.1, 0.2, 0.4]).double()
    weights = torch.tensor([0.2, 0.3, 0.5])
    return GaussianMixture(weights, randn(K, *SHAPE, seed=2), LowRank(factors, variance))


def dense(joint, y):
    """Weights (K,), means (K, D) and covariances (K, D, D) of the others given frame 0, y (D0,)."""
    U = joint.basis
    S = U @ torch.diag_embed(joint.lam - joint.rest[:, None]) @ U.mT
    S = S + joint.rest[:, None, None] * torch.eye(12).double()
    S00, S10 = S[:, FIRST][:, :, FIRST], S[:, OTHERS][:, :, FIRST]
    gain = S10 @ torch.linalg.inv(S00)
    mu0 = joint.means[:, FIRST]
    means = joint.means[:, OTHERS] + torch.einsum("kij,kj->ki", gain, y - mu0)
    covariances = S[:, OTHERS][:, :, OTHERS] - gain @ S10.mT
    log_w = joint.weights.log() + MultivariateNormal(mu0, S00).log_prob(y)
    return log_w.softmax(0), means, covariances


def test_density_and_velocity_agree_with_dense_conditioning(joint):
    """In a batch of frames and levels; and the velocity's score is autograd's of log_prob."""
    sigma = torch.tensor([0.0, 0.02, 0.3, 0.7, 0.99]).double()
    given, x = joint.sample(5, seeded())[:, :, :1].double(), randn(5, 2, 2, 1, 2)
    mixture = GivenFirstFrame(joint)
    for name in ("log_prob", "velocity", "posterior_mean"):
        found = getattr(mixture, name)(x, sigma, given)
        for i, frame in enumerate(given):
            weights, means, covariances = dense(joint, frame.flatten())
            alone = GaussianMixture(weights, means.reshape(K, 2, 2, 1, 2), covariances)
            expected = getattr(alone, name)(x[i : i + 1], sigma[i : i + 1])
            assert relative(found[i : i + 1], expected) < 1e-9, (name, sigma[i])
    x_t, sigma, given = x[1:].requires_grad_(), sigma[1:], given[1:]
    score = torch.autograd.grad(mixture.log_prob(x_t, sigma, given).sum(), x_t)[0]
    v, level = mixture.velocity(x_t, sigma, given), sigma.reshape(-1, 1, 1, 1, 1)
    assert relative(-(x_t + (1 - level) * v) / level, score) < 1e-9


def test_samples_of_one_frame_have_the_dense_moments(joint):
    n, given = 100_000, randn(1, 2, 1, 1, 2)
    weights, means, covariances = dense(joint, given.flatten())
    x = GivenFirstFrame(joint).sample(n, seeded(), given.expand(n, -1, -1, -1, -1))
    x, mean = x.flatten(1).double(), weights @ means
    spread = (means - mean)[:, :, None] * (means - mean)[:, None]
    assert (x.mean(0) - mean).abs().max() < 0.02
    assert relative(torch.cov(x.T), torch.einsum("k,kij->ij", weights, covariances + spread)) < 0.02


EACH = pytest.mark.parametrize("form", FORMS)


@EACH
def test_the_network_reads_the_frame_clean_and_in_its_place(form):
    """And a frame 0 of the sample's own is replaced by the given one."""
    task = toy.tasks.task(w2svd.Config(**toy.preset(f"videos-{form}")))
    batch = next(task.batches())
    x, given, replace = batch["x0"], batch["cond"], form == "first-frame"
    assert x.shape == (64, 4, 7 if replace else 8, 8, 8) and given.shape == (64, 4, 1, 8, 8)
    assert task.backbone.velocity(x, torch.full((64,), 0.5), given).shape == x.shape
    read, whole = task.backbone.inputs(x, given)[0], task.whole(x + 1, given)
    if replace:
        assert torch.equal(read, torch.cat([given, x], dim=2))
    else:
        assert torch.equal(x[:, :, :1], given) and torch.equal(read[:, :4], x)
        assert torch.equal(read[:, 4:8, :1], given) and not read[:, 4:8, 1:].any()
        assert (read[:, 8, 0] == 1).all() and not read[:, 8, 1:].any() and read.shape[1] == 9
    assert torch.equal(whole, torch.cat([given, x[:, :, -7:] + 1], dim=2))


@EACH
def test_the_exact_velocity_in_the_network_s_place_follows_its_frame(form):
    """In 28 Euler steps it gives clips of the mixture; behind other frames they are none."""
    task, n = toy.tasks.task(w2svd.Config(**toy.preset(f"videos-{form}"))), 512
    given, noise = task.start(n, seed=2)
    sigmas = w2svd.few_step_sigmas(28, 5.0)
    whole = task.whole(w2svd.euler_sample(task.data.velocity, noise, sigmas, given), given)
    measure = Metrics(task.mixture, n)
    assert measure.kl(whole) < measure.kl(task.mixture.sample(n, seeded())) + 0.2
    assert measure.kl(task.whole(whole, given.roll(1, 0))) > 2


@EACH
def test_a_run_keeps_the_frames_that_are_given(small_toy, form, monkeypatch):
    monkeypatch.setattr(toy.tasks.Task, "pictures", PICTURES)
    train("whole", "--data", f"videos-{form}", "--iterations", 4)
    assert {"clips.gif", "samples.png", "training.gif"} < set(names("whole"))
    result = json.loads(Path("whole/result.json").read_text())
    assert result["impostor"]["name"] == "still" and result["student"]["kl"] > 0
    run("sample", "--run", "whole", "--n", 3, "--out", "a.safetensors")
    assert tensors("a.safetensors")["samples"].shape == (3, 4, 8, 8, 8)
    before, after = (tensors(f"whole/frames/00000{i}.safetensors")["samples"] for i in (0, 4))
    assert torch.equal(before[:, :, 0], after[:, :, 0])  # given
    assert not torch.equal(before[:, :, 1:], after[:, :, 1:])


def test_the_readme_has_the_stored_numbers():
    place = Path(toy.tasks.__file__).parent
    rows = table.first_frame(json.loads((place / "results/first_frame.json").read_text()))
    readme = (place / "README.md").read_text(encoding="utf-8")
    assert all(row in readme for row in rows.splitlines()[2:])
