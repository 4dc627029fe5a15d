"""Clips given their first frame: the exact mixture, both forms of the toy, train and sample.

Against: dense Gaussian conditioning by torch.linalg, autograd of log_prob, the joint mixture, an
undisturbed run of the same seed. Run: python -m pytest tests/test_first_frame.py; half a minute on
one core.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import (  # noqa: F401
    PICTURES,
    names,
    resume,
    run,
    same_run,
    small_toy,
    tensors,
    train,
)
from torch.distributions import MultivariateNormal

import toy.tasks
import w2svd
from toy.metrics import Metrics, still
from toy.mixtures import GaussianMixture, GivenFirstFrame, KeptFirstFrame, LowRank, videos
from toy.table import spread

SHAPE, K, R = (2, 3, 1, 2), 3, 2  # C, T, H, W
FIRST = torch.arange(12).reshape(SHAPE)[:, :1].flatten()  # where frame 0 is in a flat clip
OTHERS = torch.arange(12).reshape(SHAPE)[:, 1:].flatten()
FORMS = ("first-frame", "first-frame-concat")
SIGMAS = (0.02, 0.3, 0.7, 0.99)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*size, seed=0):
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64)


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


def relative(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


# ---- the exact mixture ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", (0.0, *SIGMAS))
def test_density_and_velocity_agree_with_dense_conditioning(joint, sigma):
    given = joint.sample(5, generator())[:, :, :1].double()
    x = randn(5, 2, 2, 1, 2)
    mixture = GivenFirstFrame(joint)
    for i in range(5):
        weights, means, covariances = dense(joint, given[i].flatten())
        alone = GaussianMixture(weights, means.reshape(K, 2, 2, 1, 2), covariances)
        one = x[i : i + 1], sigma, given[i : i + 1]
        for name in ("log_prob", "velocity", "posterior_mean"):
            expected = getattr(alone, name)(*one[:2])
            assert relative(getattr(mixture, name)(*one), expected) < 1e-9, name


def test_a_batch_of_frames_and_levels_equals_one_call_for_each(joint):
    mixture, x = GivenFirstFrame(joint), randn(4, 2, 2, 1, 2)
    given, sigma = randn(4, 2, 1, 1, 2, seed=3), torch.tensor([0.1, 0.5, 0.9, 1.0])
    for method in (mixture.velocity, mixture.log_prob):
        alone = [method(x[i : i + 1], sigma[i], given[i : i + 1]) for i in range(4)]
        assert torch.allclose(method(x, sigma, given), torch.cat(alone), rtol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_velocity_gives_the_score_that_autograd_finds_in_log_prob(joint, sigma):
    mixture, given = GivenFirstFrame(joint), randn(8, 2, 1, 1, 2)
    x_t = randn(8, 2, 2, 1, 2, seed=4).requires_grad_()
    score = torch.autograd.grad(mixture.log_prob(x_t, sigma, given).sum(), x_t)[0]
    with torch.no_grad():
        v = mixture.velocity(x_t, sigma, given)
    assert relative(-(x_t + (1 - sigma) * v) / sigma, score) < 1e-9


def test_first_frame_and_others_multiply_to_the_joint_density():
    joint = videos()
    mixture, x = GivenFirstFrame(joint), joint.sample(64, generator()).double()
    first, others = x[:, :, :1], x[:, :, 1:]
    product = mixture.first.log_prob(first) + mixture.log_prob(others, 0.0, first)
    assert torch.allclose(product, joint.log_prob(x), rtol=1e-9)


def test_samples_of_one_frame_have_the_dense_moments(joint):
    n, given = 100_000, randn(1, 2, 1, 1, 2)
    weights, means, covariances = dense(joint, given.flatten())
    x = GivenFirstFrame(joint).sample(n, generator(), given.expand(n, -1, -1, -1, -1))
    assert x.dtype == torch.float32 and x.shape == (n, 2, 2, 1, 2)
    x, mean = x.flatten(1).double(), weights @ means
    spread = (means - mean)[:, :, None] * (means - mean)[:, None]
    assert (x.mean(0) - mean).abs().max() < 0.02
    assert relative(torch.cov(x.T), torch.einsum("k,kij->ij", weights, covariances + spread)) < 0.02


def test_exact_frames_followed_by_exact_samples_are_the_joint_s_clips():
    """And a still one is found out, by the numbers of a run."""
    joint, n = videos(), 2048
    mixture, measure = KeptFirstFrame(joint), Metrics(joint, n)
    given = mixture.first.sample(n, generator())
    numbers = measure(mixture.sample(n, generator(1), given))
    assert abs(numbers["kl"] - measure.floor(generator(2))["kl"]) < 0.1
    assert numbers["dynamic_degree"] == pytest.approx(1, abs=0.03)
    frozen = measure(still(joint, n, generator()))
    assert frozen["kl"] > 10 and frozen["dynamic_degree"] == 0


def test_the_kept_frame_s_velocity_points_to_it(joint):
    mixture, given = KeptFirstFrame(joint), randn(6, 2, 1, 1, 2)
    sigma, x0 = torch.linspace(0.1, 1, 6).double(), mixture.sample(6, generator(), given)
    eps, level = randn(*x0.shape, seed=5), sigma.reshape(-1, 1, 1, 1, 1)
    x_t = (1 - level) * x0 + level * eps
    v = mixture.velocity(x_t, sigma, given)
    assert torch.allclose(v[:, :, :1], eps[:, :, :1] - given)
    others = mixture.others.velocity(x_t[:, :, 1:], sigma, given)
    assert torch.equal(v[:, :, 1:], others)


def test_moments_that_depend_on_the_frame_cannot_be_asked_for_without_it(joint):
    mixture = GivenFirstFrame(joint)
    for name in ("mean", "covariance", "project", "mahalanobis", "responsibilities"):
        with pytest.raises(TypeError):
            getattr(mixture, name)()
    with pytest.raises(AttributeError):
        mixture.velocity(randn(1, 2, 2, 1, 2), 0.5)


# ---- both forms as tasks -------------------------------------------------------------------------


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def task_of(form):
    config = w2svd.resolve({"data": "videos", "condition": form, "out": "r"})
    return toy.tasks.task(config)


def test_the_sample_is_what_the_form_says(form):
    task = task_of(form)
    batch = next(task.batches(generator()))
    frames = 7 if form == "first-frame" else 8
    assert batch["x0"].shape == (64, 4, frames, 8, 8) and batch["cond"].shape == (64, 4, 1, 8, 8)
    if form == "first-frame-concat":
        assert torch.equal(batch["x0"][:, :, :1], batch["cond"])
    v = task.backbone.velocity(batch["x0"], torch.full((64,), 0.5), batch["cond"])
    assert v.shape == batch["x0"].shape


def test_the_network_reads_the_frame_clean_and_in_its_place(form):
    task, (given, x_t) = task_of(form), (randn(2, 4, 1, 8, 8), randn(2, 4, 8, 8, 8, seed=1))
    if form == "first-frame":
        read, _ = task.backbone.inputs(x_t[:, :, 1:], given)
        assert torch.equal(read, torch.cat([given, x_t[:, :, 1:]], dim=2))
    else:
        read, _ = task.backbone.inputs(x_t, given)
        assert read.shape == (2, 9, 8, 8, 8) and torch.equal(read[:, :4], x_t)
        assert torch.equal(read[:, 4:8, :1], given) and not read[:, 4:8, 1:].any()
        assert (read[:, 8, 0] == 1).all() and not read[:, 8, 1:].any()


def test_a_frame_of_the_sample_s_own_is_replaced_by_the_given_one(form):
    task = task_of(form)
    given, x = randn(2, 4, 1, 8, 8), randn(2, *task.shape, seed=1)
    whole = task.whole(x, given)
    assert whole.shape == (2, 4, 8, 8, 8) and torch.equal(whole[:, :, :1], given)
    assert torch.equal(whole[:, :, 1:], x[:, :, -7:])


def test_the_exact_velocity_in_the_network_s_place_follows_its_frame(form):
    """In 28 Euler steps it gives clips of the mixture; behind other frames they are none."""
    task, n = task_of(form), 1024
    given, noise = task.start(n, seed=2)
    sigmas = w2svd.few_step_sigmas(28, 5.0)
    whole = task.whole(w2svd.euler_sample(task.data.velocity, noise, sigmas, given), given)
    measure = Metrics(task.mixture, n)
    assert measure.kl(whole) < measure.kl(task.mixture.sample(n, generator())) + 0.2
    assert measure.kl(task.whole(whole, given.roll(1, 0))) > 2


def test_the_backbone_learns_from_the_frame(form):
    """After a few steps it is closer to the exact velocity than one with the frames exchanged."""
    mixture = videos(centred=0.0)
    recipe = dataclasses.replace(toy.tasks.RECIPES[f"videos {form}"], iterations=60)
    backbone = toy.tasks.BACKBONES[form](toy.tasks.train_backbone(mixture, recipe, seed=0))
    data, sigma = toy.tasks.data_of(mixture, recipe), torch.full((64,), 0.9)
    given = data.first.sample(64, generator())
    x_t = w2svd.add_noise(data.sample(64, generator(1), given), torch.randn(64, *data.shape), 0.9)
    exact = data.velocity(x_t, sigma, given)[:, :, -7:]
    with torch.no_grad():
        right, wrong = (
            relative(backbone.velocity(x_t, sigma, frames)[:, :, -7:], exact)
            for frames in (given, -given)
        )
    assert right < wrong


# ---- train, resume, sample -----------------------------------------------------------------------


def test_a_run_goes_on_to_the_same_bits_and_samples(small_toy, form):  # noqa: F811
    flags = ["--data", "videos", "--condition", form, "--lr-schedule", "constant"]
    train("whole", *flags, "--iterations", 4)
    train("cut", *flags, "--iterations", 2)
    resume("cut", "--iterations", 4)
    same_run("whole", "cut")
    result = w2svd.json.loads(open("whole/result.json").read())
    assert result["impostor"]["name"] == "still" and result["student"]["kl"] > 0
    run("sample", "--run", "whole", "--n", 3, "--out", "a.safetensors")
    clips = tensors("a.safetensors")["samples"]
    assert clips.shape == (3, 4, 8, 8, 8)
    frames = tensors("whole/frames/000000.safetensors")["samples"]
    later = tensors("whole/frames/000004.safetensors")["samples"]
    assert torch.equal(frames[:, :, 0], later[:, :, 0])  # given
    assert not torch.equal(frames[:, :, 1:], later[:, :, 1:])


def test_a_run_leaves_its_pictures(small_toy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(toy.tasks.Task, "pictures", PICTURES)
    more = "--guidance 1 --gan-weight .01 --generator full --generator-input paired".split()
    train("v", "--data", "videos", "--condition", "first-frame", "--iterations", 2, *more)
    assert {"clips.gif", "samples.png", "training.gif"} < set(names("v"))


def test_the_readme_has_the_stored_numbers():
    place = Path(toy.tasks.__file__).parent
    stored = w2svd.json.loads((place / "results/first_frame.json").read_text())
    readme = (place / "README.md").read_text(encoding="utf-8")
    for form, seeds in stored.items():
        runs = list(seeds.values())
        rows = [[run["student"] for run in runs]]
        rows += [[run["euler"][steps] for run in runs] for steps in ("1", "4", "28")]
        rows += [[run[name] for run in runs] for name in ("impostor", "floor")]
        kls = [spread([row["kl"] for row in same], 2) for same in rows]
        assert f"| `{form}` | {len(runs)} | {' | '.join(kls)} |" in readme
