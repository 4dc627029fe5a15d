"""The toy as a task of w2svd.train(): a mixture as data, a tiny DiT as backbone, exact metrics.

`task(config)` trains the backbone by flow matching, or reads it from the cache, where its file is
named after a hash of everything that its bits depend on.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from toy import dit, mixtures, plots
from toy.dit import DiT
from toy.metrics import Metrics, annulus, gaussian, square, still
from toy.mixtures import GivenFirstFrame, KeptFirstFrame
from w2svd import (
    Refused,
    Roles,
    add_noise,
    base_sum,
    euler_sample,
    few_step_sample,
    few_step_sigmas,
    memory_mb,
    read_safetensors,
    sample_sigma,
    stream_seed,
    write_safetensors,
)

# The presets, by --data. Trials, and why the ring's shift is .5: toy/README.md
RING = dict(  # expect a KL of .09, in 50 seconds on 2 CPU cores
    data="ring",
    generator_input="rollout",
    fake_samples="final",
    shift=0.5,
    reuse=5,
    lora_rank=16,
    generator_lr=1e-3,
    fake_lr=2e-3,
    lr_schedule="linear",
    fake_weight_decay=0.1,
    ema=0.98,
    batch=1536,
    iterations=240,
    log_every=20,
    save_every=120,
)
# expect 1.1: its modes are closer, so they are lost at less noise
GRID = dict(RING, data="grid", shift=0.3, reuse=3, batch=1024, iterations=360)
VIDEOS = dict(  # expect .5; a clip's motion is decided at high noise, hence both shifts
    RING,
    data="videos",
    shift=5.0,
    sigma_shift=5.0,
    generator_lr=5e-4,
    fake_lr=1e-3,
    batch=64,
    iterations=350,
    log_every=25,
    save_every=175,
)
FORMS = ("first-frame", "first-frame-concat")  # of clips that are given their first frame
PRESETS = {"ring": RING, "grid": GRID, "videos": VIDEOS}
PRESETS |= {f"videos-{form}": dict(VIDEOS, data=f"videos-{form}") for form in FORMS}


def preset(data):
    """The settings of a mixture; a data set that is not one is refused."""
    if data not in PRESETS:
        raise Refused(f"--data must be one of {', '.join(PRESETS)}, not {data!r}.")
    return dict(PRESETS[data])


@dataclass(frozen=True)
class Recipe:
    """How one mixture's backbone is built and trained; changing a line retrains it."""

    width: int = 32
    heads: int = 2
    double: int = 1
    single: int = 1
    patch: tuple = (1, 1, 1)
    waves: tuple = ()  # half-turns per unit of x, read as sine and cosine, see dit.py
    precondition: bool = False  # blocks predict F, see dit.py; the loss is that of x0, not of v
    uncaptioned: int = 10  # every so many batches go without captions, for guidance
    labels: int = 0  # captions that the model knows; one more means 'no caption'
    condition: str = "none"  # or a first frame, in one of HunyuanVideo's two forms
    batch: int = 512
    iterations: int = 1500
    lr: float = 2e-3
    shift: float = 1.0  # of the noise levels: more than 1 for more of the high ones


# the slowest wave, of period 8, tells apart all of the noise that sampling begins with
POINTS = Recipe(waves=(0.25, 0.5, 1.0), iterations=2500)
RECIPES = {
    "ring": POINTS,
    "grid": POINTS,
    "videos": Recipe(
        width=128,
        heads=4,
        patch=(4, 8, 8),
        precondition=True,
        labels=2,
        batch=128,
        iterations=3000,
        lr=3e-3,
        shift=3.0,
    ),
}
SAMPLES = {"ring": 16384, "grid": 16384, "videos": 4096}  # measured; videos: fewer, for time
IMPOSTORS = {"ring": annulus, "grid": square, "videos": gaussian}
# the grids among which Euler's best is looked for
SHIFTS = {"ring": (0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0), "videos": (3.0, 5.0, 7.0, 10.0)}
SHIFTS["grid"] = SHIFTS["ring"]
for form in FORMS:
    name, how = f"videos-{form}", {"labels": 0, "iterations": 2000, "condition": form}
    RECIPES[name] = dataclasses.replace(RECIPES["videos"], **how)  # the frame shows the look
    SAMPLES[name], IMPOSTORS[name], SHIFTS[name] = SAMPLES["videos"], still, SHIFTS["videos"]


class Backbone:
    """A DiT behind the contract of w2svd.Roles."""

    lora_targets = DiT.lora_targets
    script = "w2svd.py"
    renoise = True  # as HunyuanVideo: a student is sampled by few_step_sample

    def __init__(self, module):
        self.module = module

    def inputs(self, x_t, cond):
        """What the module reads as a sample, and its captions."""
        return x_t, cond

    def velocity(self, x_t, sigma, cond):
        x, labels = self.inputs(x_t, cond)
        return self.module(x, sigma, labels)

    def checkpoint_with(self, function):
        self.module.run = function

    @property
    def width(self):
        return self.module.position.shape[-1]

    def features(self, x_t, sigma, cond):
        x, labels = self.inputs(x_t, cond)
        return self.module.double_stream(x, sigma, labels)[0][0]


class TokenReplace(Backbone):
    """The sample is frames 1.. (B, C, T - 1, H, W); the clean first one goes in front of them.

    As in HunyuanVideo's token_replace, whose first frame is modulated as one without noise, too;
    here its place alone tells it from the others.
    """

    def inputs(self, x_t, cond):
        return torch.cat([cond, x_t], dim=2), None  # (B, C, T, H, W)

    def velocity(self, x_t, sigma, cond):
        return super().velocity(x_t, sigma, cond)[:, :, 1:]


class LatentConcat(Backbone):
    """The sample is the clip (B, C, T, H, W); the first frame, and a mask, are further channels."""

    def inputs(self, x_t, cond):
        frames, mask = torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])
        frames[:, :, :1], mask[:, :, 0] = cond, 1
        return torch.cat([x_t, frames, mask], dim=1), None  # (B, 2 C + 1, T, H, W)


BACKBONES = {"none": Backbone, "first-frame": TokenReplace, "first-frame-concat": LatentConcat}


def data_of(mixture, recipe):
    """What is learnt and distilled: the mixture, or its clips given their first frame."""
    if recipe.condition == "none":
        return mixture
    return (GivenFirstFrame if recipe.condition == "first-frame" else KeptFirstFrame)(mixture)


def conditions(data, recipe, n, rng):
    """First frames (n, C, 1, H, W) or captions (n,), drawn; None where the model reads neither."""
    if recipe.condition != "none":
        return data.first.sample(n, rng)
    return data.sample_labels(n, rng) if recipe.labels else None


def build(mixture, recipe):
    r, rest = recipe, None
    if r.precondition:
        rest = float(mixture.rest.mean().sqrt())
    size = r.width, r.heads, r.double, r.single
    extra = mixture.shape[0] + 1 if r.condition == "first-frame-concat" else 0
    return DiT(mixture.shape, *size, r.patch, r.labels, rest, r.waves, extra)


@torch.no_grad()
def start_at_principal_components(module, mixture, rng):
    """A patch's numbers enter and leave the blocks along the data's leading directions.

    It spares the training to find the few dimensions in which clips differ among those that noise
    fills: the part of HunyuanVideo's VAE, which a patch of 4 frames of 8 x 8 pixels stands for.
    """
    patches = module.patches(mixture.sample(4096, rng)).flatten(0, 1)
    directions = torch.linalg.eigh(patches.T @ patches)[1][:, -module.embed.out_features :]
    module.embed.weight[:, : len(directions)].copy_(directions.T)  # not a condition's
    module.final.weight.copy_(directions)


def train_backbone(mixture, recipe, seed):
    """Flow matching of the mixture: returns the module.

    Its target is E[eps - x0 | x_t], which the mixture knows, in place of eps - x0: the same
    expected gradient without the noise, so a minute is enough for a backbone worth distilling.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(stream_seed(seed, 0, 0, "backbone"))
    module = build(mixture, recipe)
    if module.embed.in_features > recipe.width:
        start_at_principal_components(module, mixture, rng)
    data, backbone = data_of(mixture, recipe), BACKBONES[recipe.condition](module)
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.lr, (0.9, 0.99), weight_decay=0, fused=True
    )
    warm_then_down = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * (1 - i / recipe.iterations)
    )
    with tqdm(range(recipe.iterations), desc="backbone", unit="it") as bar:
        for i in bar:
            cond = conditions(data, recipe, recipe.batch, rng)
            if recipe.labels and i % recipe.uncaptioned == 0:
                cond = None
            x0 = data.sample(recipe.batch, rng, cond)
            sigma = sample_sigma(len(x0), 0, 1, recipe.shift, rng)
            x_t = add_noise(x0, torch.randn(x0.shape, generator=rng), sigma)
            error = backbone.velocity(x_t, sigma, cond) - data.velocity(x_t, sigma, cond)
            weight = sigma**2 if recipe.precondition else torch.ones_like(sigma)
            loss = (weight * error.square().flatten(1).mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_then_down.step()
            if i % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}, {memory_mb('cpu'):.0f} MB")
    return module


def cached_backbone(mixture, recipe, config):
    """The trained backbone of this mixture and seed, from the cache or into it."""
    parts = (mixture.weights, mixture.means, mixture.lam, mixture.rest, mixture.labels)
    exact = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    code = "".join(Path(file).read_text() for file in (dit.__file__, __file__))
    settings = {
        "data": config.data,
        "seed": config.seed,
        "torch": torch.__version__,
        "mixture": exact,
        "code": hashlib.sha256(code.encode()).hexdigest(),
        **dataclasses.asdict(recipe),
    }
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = Path(config.cache or "~/.cache/w2svd").expanduser()
    path = folder / f"{config.data}-{name}.safetensors"
    if path.exists():
        module = build(mixture, recipe)
        try:
            module.load_state_dict(read_safetensors(path)[0])
            return module
        except (Refused, RuntimeError) as error:  # damaged, or another's
            print(f"w2svd: {error} The backbone is trained anew.", file=sys.stderr)
    try:  # before the minute of training, not after it
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error}); name a --cache.") from error
    module = train_backbone(mixture, recipe, config.seed)
    write_safetensors(path, module.state_dict(), settings)
    return module


class Task:
    """What w2svd.train() needs of a model and its data; see VideoTask there.

    The backbone has learnt `learnt`, which is the mixture itself unless the data have moved since.
    """

    device, clips = "cpu", ()  # its samples are drawn, not read

    def __init__(self, config, recipe, mixture, learnt=None):
        self.config, self.recipe, self.mixture = config, recipe, mixture
        self.data, self.learnt = data_of(mixture, recipe), learnt or mixture
        self.shape = self.data.shape
        if config.guidance != 1 and not self.recipe.labels:
            raise Refused("--guidance needs captions; of the toys, --data videos alone has them.")
        if config.fp8_base or config.compile or config.lora_targets != "all":
            flags = "--fp8-base, --compile and --lora-targets"
            raise Refused(f"{flags} are for video models; the toy has none of them.")
        self.backbone = BACKBONES[recipe.condition](build(self.mixture, self.recipe))
        self.sigmas = few_step_sigmas(config.steps, config.shift)

    def load(self, machine=None):
        """The trained backbone: a minute without a cache."""
        if machine and (machine.shard or machine.offload):
            raise Refused("--shard and --offload are for large backbones; the toy's is small.")
        module = cached_backbone(self.learnt, self.recipe, self.config)
        self.backbone.module = module.requires_grad_(False)

    def batches(self, taken=0, rank=0, ranks=1):
        """Every ranks-th batch from number taken / batch + rank on, each of a stream of its own."""
        for number in itertools.count(taken // self.config.batch + rank, ranks):
            rng = torch.Generator().manual_seed(stream_seed(self.config.seed, number, 0, "data"))
            cond = conditions(self.data, self.recipe, self.config.batch, rng)
            x0 = self.data.sample(self.config.batch, rng, cond)
            yield {"x0": x0, "cond": cond, "name": f"batch {number}"}

    def start(self, n, seed):
        """Conditions and noise of n samples, the same for every method."""
        rng = torch.Generator().manual_seed(seed)
        return conditions(self.data, self.recipe, n, rng), torch.randn(
            n, *self.shape, generator=rng
        )

    def whole(self, samples, cond):
        """Samples as they are measured and shown: behind the first frame that they were given.

        In both forms: a frame 0 of the sample's own is dropped, as the stock pipeline drops it.
        """
        if self.recipe.condition == "none":
            return samples
        return torch.cat([cond, samples[:, :, 1 - self.mixture.shape[1] :]], dim=2)

    def few_step(self, generator, sigmas, n, seed):
        cond, noise = self.start(n, seed)
        rng = torch.Generator().manual_seed(seed + 1)
        return self.whole(few_step_sample(generator, noise, sigmas, cond, rng), cond)

    @functools.cached_property
    def measure(self):
        """What holds SAMPLES samples against the mixture: seconds for videos."""
        return Metrics(self.mixture, SAMPLES[self.config.data])

    def on_log(self, step, generator):
        """Keep a few samples, and the KL of a quarter of SAMPLES: frames of the animation."""
        if step % self.config.log_every and step != self.config.iterations:
            return
        folder = Path(self.config.out) / "frames"
        folder.mkdir(exist_ok=True)
        samples = self.few_step(generator, self.sigmas, self.measure.n // 4, seed=1)
        info = {"step": step, "kl": self.measure.kl(samples)}
        shown = {"samples": samples[: 6 if len(self.shape) > 1 else plots.MAX_DOTS]}
        write_safetensors(folder / f"{step:06}.safetensors", shown, info)

    def finish(self, folder, generator):
        """Measure student and backbone against the exact mixture; pictures, result.json, table.

        First frames are exact, so the KL of whole clips is the mean KL of what follows them.
        """
        steps, measure, n = self.config.steps, self.measure, self.measure.n
        rng = torch.Generator().manual_seed(5)
        cond, _ = self.start(n, seed=2)
        samples = {"exact": self.whole(self.data.sample(n, rng, cond), cond)}
        make = IMPOSTORS[self.config.data]
        impostor = make.__name__
        samples[impostor] = make(self.mixture, n, rng)
        euler, same_grid = {}, {}
        for k in (1, 4, 28):
            shift, name = self.best_shift(measure, k), f"Euler, {k} step{'s' * (k > 1)}"
            samples[name] = self.euler(k, shift, n)
            euler[str(k)] = {"shift": shift, **measure(samples[name])}
            same_grid[str(k)] = euler[str(k)]
            if shift != self.config.shift:
                same = measure(self.euler(k, self.config.shift, n))
                same_grid[str(k)] = {"shift": self.config.shift, **same}
        student = f"student, {steps} step{'s' * (steps > 1)}"
        samples[student] = self.few_step(generator, self.sigmas, n, seed=2)
        result = {
            "student": {"steps": steps, **measure(samples[student])},
            "euler": euler,
            "euler_student_grid": same_grid,
            "floor": measure(samples["exact"]),
            "impostor": {"name": impostor, **measure(samples[impostor])},
        }
        rows = [result["floor"], result["impostor"], *euler.values(), result["student"]]
        kl = {name: row["kl"] for name, row in zip(samples, rows)}
        shown = {name: x for name, x in samples.items() if name != impostor}
        self.pictures(folder, shown, kl, student)
        now = f"now: python w2svd.py sample --run {folder} --out samples.png"
        return result, f"{table(result)}\n{now}"

    def euler(self, steps, shift, n):
        """n samples of the backbone by Euler's method, from the noise of every method."""
        cond, noise = self.start(n, seed=2)
        sigmas = few_step_sigmas(steps, shift)
        return self.whole(euler_sample(self.backbone.velocity, noise, sigmas, cond), cond)

    def best_shift(self, measure, steps):
        """The grid on which so many Euler steps come closest, by an eighth of the samples."""
        if steps == 1:  # from 1 to 0 on every grid
            return self.config.shift
        n = measure.n // 8
        return min(
            SHIFTS[self.config.data], key=lambda shift: measure.kl(self.euler(steps, shift, n))
        )

    def pictures(self, folder, samples, kl, student):
        """samples.png, training.gif and, for videos, clips.gif; the KL in each title."""
        panels = [(f"{k}\nKL {kl[k]:z.2f}", x) for k, x in samples.items()]
        frames, exact = [], self.measure.kl(samples["exact"][: self.measure.n // 4])
        for path in sorted((folder / "frames").glob("[0-9]*.safetensors")):
            tensors, info = read_safetensors(path)
            title = f"{student}, iteration {info['step']}\nKL {info['kl']:z.2f}"
            frames.append((f"{title} (exact: {exact:z.2f})", tensors["samples"]))
        if len(self.shape) > 1:
            plots.videos(folder / "samples.png", self.measure, panels)
            plots.clips_gif(folder / "clips.gif", panels)
            plots.training_gif_videos(folder / "training.gif", frames)
        else:
            plots.samples_2d(folder / "samples.png", self.mixture, panels)
            plots.training_gif_2d(folder / "training.gif", self.mixture, frames)

    def sample(self, tensors, info, out, seed, n=1000):
        """Draw n samples into a picture (.png), tensors (.safetensors) or an animation (.gif).

        The animation of points shows the predictions after 1, 2, ... evaluations.
        """
        if out.suffix not in (".png", ".gif", ".safetensors") or out.is_dir():
            raise Refused(f"--out must be a .png, .gif or .safetensors file, not {out}.")
        if n < 1:
            raise Refused(f"--n must be at least 1, not {n}.")
        self.load()
        generator = self.trained_generator(tensors, info)
        sigmas = torch.tensor(info["sigmas"])
        samples = self.few_step(generator, sigmas, n, seed)
        rows = [(f"student, {len(sigmas) - 1} steps{self.in_title(samples)}", samples)]
        if out.suffix == ".safetensors":
            write_safetensors(out, {"samples": samples}, {"seed": seed, "n": n})
        elif len(self.shape) == 1 and out.suffix == ".gif":
            cut = {k: torch.cat([sigmas[:k], sigmas[-1:]]) for k in range(1, len(sigmas))}
            frames = []
            for k, grid in cut.items():
                drawn = self.few_step(generator, grid, n, seed)
                title = f"student, evaluation {k} of {len(cut)}{self.in_title(drawn)}"
                frames.append((title, drawn))
            plots.training_gif_2d(out, self.mixture, frames)
        elif len(self.shape) == 1:
            plots.samples_2d(out, self.mixture, rows)
        elif out.suffix == ".gif":
            plots.clips_gif(out, rows)
        else:
            plots.videos(out, self.measure, rows)
        return f"wrote {out}"

    def in_title(self, samples):
        """The KL as the second line of a title; of too few samples it would say nothing."""
        if len(samples) < 500:
            return ""
        rng = torch.Generator().manual_seed(5)
        kls = self.measure.kl(samples), self.measure.kl(self.mixture.sample(len(samples), rng))
        return "\nKL {:z.2f} (exact: {:z.2f})".format(*kls)

    def trained_generator(self, tensors, info):
        """The velocity of a stored generator."""
        c = self.config
        roles = Roles(self.backbone, info["rank"], c.alpha_weak, c.alpha_strong, info["kind"])
        if base_sum(roles) != info["base_sum"]:
            raise Refused(f"The backbone at hand is not the one that {c.out} was distilled from.")
        roles.load("generator", tensors)
        return roles.generator


def table(result):
    """Lines of text from result.json: method, function evaluations (NFE), metrics."""
    steps = result["student"]["steps"]
    rows = [("exact", 0, result["floor"])]
    rows.append((result["impostor"]["name"], 0, result["impostor"]))
    for k, row in result["euler"].items():
        rows.append((f"Euler, {k} step{'s' * (k != '1')}", k, row))
    rows.append((f"student, {steps} step{'s' * (steps > 1)}", steps, result["student"]))
    columns = list(result["floor"])
    if "dynamic_degree" in columns:  # hardly any network's clip is within their narrow modes
        columns = [c for c in columns if c not in ("precision", "coverage")]
    widths = [max(len(name), 8) + 2 for name in columns]
    head = "".join(f"{name:>{width}}" for name, width in zip(columns, widths))
    lines = [f"{'method':17}{'NFE':>3}" + head]
    for name, nfe, row in rows:
        cells = "".join(f"{row[c]:>z{width}.3f}" for c, width in zip(columns, widths))
        lines.append(f"{name:17}{nfe:>3}" + cells)
    return "\n".join(lines)


def task(config):
    """The toy that config.data names."""
    # so small a network gains nothing from more threads, and waits for them on a busy machine
    torch.set_num_threads(1)
    recipe = RECIPES[preset(config.data)["data"]]
    if recipe.condition != "none":  # blobs that begin at the centre: the frame leaves motion open
        return Task(config, recipe, mixtures.videos(centred=0.0))
    return Task(config, recipe, getattr(mixtures, config.data)())
