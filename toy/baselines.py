"""What W2SVD is compared with, and the stage before it: loops in the place of `w2svd.distil`.

    python -m toy.baselines lcm      --model hunyuan --data my_clips/ --out runs/lcm
    python -m toy.baselines finetune --model hunyuan --data my_clips/ --out runs/tuned
    python -m toy.baselines regress  --model toy --data grid

    lcm       consistency distillation (arXiv 2310.04378), a baseline of the paper
    finetune  flow matching of the data by the generator, as a stage before distillation
    regress   one step fitted to where the backbone's 28 Euler steps lead (peer: DMD2 warms up so)

Flags and files are those of `python w2svd.py train`; the fake DiT is there and rests.
"""

import argparse
import math
import sys

import w2svd  # before torch, whose allocator it sets
from w2svd import Refused, add_noise, at_least_float32, draw_noise, torch, x0_from_velocity

LEVELS = 50  # of LCM's fine grid, at least; peer: 50 of 1000
ONE_STEP = dict(batch=512, iterations=1440, generator_lr=3e-3, save_every=720)  # ring and grid


def updates(config, state, data, step):
    """The frame of all three: an iteration is one update of the generator, by step(...)."""
    while state.iteration < config.iterations:
        state.seed_streams()
        stats = [step(name, x0, cond) for name, x0, cond in state.read(data)]
        lr = w2svd.lr_scale(config, state.iteration) * config.generator_lr
        norm = state.update("generator", lr)
        state.update_average()
        state.iteration += 1
        yield {**w2svd.mean_of(stats), "grad_norm": norm}


def consistency_step(roles, average, x0, cond, sigma, sigma_next, eps):
    """One backward of LCM's loss: mean |x0_generator(x_t, sigma) - x0_average(x_s, sigma_next)|^2.

    One Euler step of the backbone leads from x_t, x0 (B, ...) noised to sigma (B,), to x_s at
    sigma_next just below it; both shall show the same sample. At 0 it is x_s itself.
    paper: the baseline. peer: its loss, here a plain mean square of x0.
    """
    x_t = add_noise(x0, eps, sigma)
    with roles.use("generator"):
        with torch.no_grad():
            x_s = x0_from_velocity(x_t, roles.plain(x_t, sigma, cond), sigma - sigma_next)
            goal = x0_from_velocity(x_s, average(x_s, sigma_next, cond), sigma_next)
        x0_now = x0_from_velocity(x_t, roles.generator(x_t, sigma, cond), sigma)
        w2svd.require_finite("the generator's sample", x0_now, sigma)
        loss = torch.nn.functional.mse_loss(at_least_float32(x0_now), at_least_float32(goal))
        loss.backward()
    return {"generator_loss": loss.detach()}


def flow_matching_step(roles, x0, cond, sigma, eps):
    """One backward of mean |v_generator(x_t, sigma) - (eps - x0)|^2, x0 (B, ...) and sigma (B,)."""
    with roles.use("generator"):
        v = roles.generator(add_noise(x0, eps, sigma), sigma, cond)
        w2svd.require_finite("the generator's velocity", v, sigma)
        loss = w2svd.fake_loss(v, x0, eps)
        loss.backward()
    return {"generator_loss": loss.detach()}


def lcm(config, roles, state, data):
    """Consistency distillation: the samples of neighbouring levels of a fine grid shall agree."""
    levels = config.steps * math.ceil(LEVELS / config.steps)  # the generator's are among them
    grid = w2svd.few_step_sigmas(levels, config.shift).to(state.device)

    def average(x, sigma, cond):
        with state.averaged() as generator:
            return generator(x, sigma, cond)

    def step(name, x0, cond):
        _, eps = draw_noise(config, state, name, x0)
        k = torch.randint(levels, (len(x0),), generator=state.rngs["level"], device=x0.device)
        state.reads[-1] = name, grid[k]
        return consistency_step(roles, average, x0, cond, grid[k], grid[k + 1], eps)

    return updates(config, state, data, step)


def finetune(config, roles, state, data):
    """Flow matching of the data."""

    def step(name, x0, cond):
        sigma, eps = draw_noise(config, state, name, x0)
        return flow_matching_step(roles, x0, cond, sigma, eps)

    return updates(config, state, data, step)


def regress(config, roles, state, data):
    """At pure noise, flow matching of where the backbone leads from it; of data only captions."""
    grid = w2svd.few_step_sigmas(28, config.shift)

    def step(name, x0, cond):
        _, eps = draw_noise(config, state, name, x0)
        sigma = torch.ones(len(x0), device=x0.device)
        state.reads[-1] = name, sigma
        target = w2svd.euler_sample(roles.plain, eps, grid, cond)
        return flow_matching_step(roles, target, cond, sigma, eps)

    return updates(config, state, data, step)


def set_evaluations(loop, without_gradient, with_gradient):
    """Let the plan know an iteration's forwards; it asks first, so settings are refused here."""

    def evaluations(c):
        if c.gt_weight or c.gan_weight or c.guidance != 1 or c.fake == "full":
            flags = "--gt-weight, --gan-weight, --guidance or --fake"
            raise Refused(f"{loop.__name__} has no fake and real DiT: give no {flags}.")
        if loop is regress and c.steps > 1:
            raise Refused("regress fits one evaluation: --steps 1.")
        if loop is not regress and c.data.endswith(".txt"):
            raise Refused(f"{loop.__name__} needs clips: a .txt as --data has only captions.")
        return without_gradient, with_gradient

    loop.evaluations = evaluations


set_evaluations(lcm, 2, 1)
set_evaluations(finetune, 0, 1)
set_evaluations(regress, 28, 1)
LOOPS = {"lcm": lcm, "finetune": finetune, "regress": regress}


class FineTuned(w2svd.HunyuanVideo):
    """HunyuanVideo as a stage before distillation, sampled by Euler as the backbone itself.

    It learns at an embedded guidance of 1, as other trainers do: raw data at 6 would undo what the
    guidance-distilled backbone knows of guidance.
    """

    renoise = False
    preset = {**w2svd.HunyuanVideo.preset, "steps": 28, "shift": 7.0}  # the paper's table; released

    def velocity(self, x_t, sigma, cond):
        learning = torch.is_grad_enabled()
        self.guidance = 1.0 if learning else self.config.embedded_guidance
        return super().velocity(x_t, sigma, cond)


def one_step(argv):
    """Flags of regress, which go before the user's, so that the user's win."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--resume", action="store_true")
    look.add_argument("--model", nargs="?", default="toy")
    look.add_argument("--data", nargs="?", default="ring")
    given, _ = look.parse_known_args(argv)
    settings = {"steps": 1}
    if given.model == "toy" and given.data in ("ring", "grid"):
        settings.update(ONE_STEP)
    if given.resume:  # the run has its own
        settings = {}
    return [f"{w2svd.flag(name)}={value}" for name, value in settings.items()]


def main(argv=None, models=w2svd.MODELS):
    """`train` with one of the loops; returns its exit status."""
    method, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if method in ("-h", "--help"):
        print(__doc__)
        return 0
    if method not in LOOPS:
        print(f"w2svd: {method} is none of {', '.join(LOOPS)}.", file=sys.stderr)
        return 2
    if method == "finetune":
        models = {**models, "hunyuan": FineTuned}
    own = one_step(argv) if method == "regress" else []
    return w2svd.main(["train", *own, *argv], models=models, loop=LOOPS[method])


if __name__ == "__main__":
    sys.exit(main())
