"""Many runs of w2svd on one frozen backbone, trained side by side: what makes the study affordable.

A LANE is one run: its own adapters, which start from its own draws, its own data and noise,
optimizers, average, rates, weights and alpha_weak. The lanes of a stack read one batch, cut into as
many parts, through `w2svd.distil` as it stands: an evaluation of all lanes is one pass through the
shared backbone, in which every LoRA layer adds the adapters of the lanes to their parts of the
batch. A lane's result is that of `w2svd.py train` with the same numbers, up to rounding. What the
lanes of a stack share is the backbone and the order of a rollout's exits.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from unittest import mock

import torch

import w2svd
from w2svd import SPIKE, Config, Discriminator, Roles, State, distil, ema_at, lr_scale


@dataclass(frozen=True)
class Lane:
    """A run's config, and four knobs that w2svd does not have."""

    config: Config
    dmd_scale: float = 1.0  # DMD's gradient is multiplied by it; a second loss is not
    numerator: float | None = None  # alpha_weak in x0_fake - x0_real alone
    denominator: float | None = None  # alpha_weak in |x_gen - x0_real| alone
    waits: int = 0  # iterations, of its own, in which the generator stands still


def along(numbers, x):
    """One number for each lane (lanes,), shaped to multiply x (lanes, ...)."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


def for_samples(numbers, x):
    """One number for each lane (lanes,), shaped to multiply the samples x (lanes * B, ...)."""
    return along(numbers.repeat_interleave(len(x) // len(numbers)), x)


def stacked(states):
    """{name: (lanes, ...)}, trained, of one {name: (...)} for each lane."""
    return {
        name: torch.nn.Parameter(torch.stack([state[name] for state in states]))
        for name in states[0]
    }


class StackedRoles:
    """Roles for (lanes * B, ...): generator, real and fake, each lane with its own adapters.

    `trained` has what Roles trains, {role: {name: (lanes, ...)}}. The first lane starts as a run of
    w2svd with the same seed, the others from further draws.
    """

    def __init__(self, backbone, configs):
        first, self.n = configs[0], len(configs)
        self.one = Roles(backbone, first.lora_rank, 0.0, 1.0, first.generator, first.fake)
        draws = {role: [] for role in self.one.trained}
        for _ in range(self.n):
            for role, states in draws.items():
                states.append(
                    {name: p.detach().clone() for name, p in self.one.state(role).items()}
                )
                for layer in self.one.layers if role in self.one.adapters else ():
                    layer.reset_lora_parameters(role, True)
        self.trained = {role: stacked(states) for role, states in draws.items()}
        self.strong = [c.alpha_strong for c in configs]
        self.weak = self.weak_below = [c.alpha_weak for c in configs]  # Stack.iterate() sets them
        self.alpha_weak = None  # distil() sets it; each lane has its own in `weak`
        self.x0_below = None  # the denominator's x0_real, where it has an alpha_weak of its own
        names = {m: name for name, m in backbone.module.named_modules()}
        for layer in self.one.layers:
            layer.register_forward_hook(self._hook(names[layer]))
        self.weights = None  # of the role that is being evaluated: {name: (lanes, ...)}

    def lane(self, k, role):
        """The weights of one lane, as Roles.load() takes them."""
        return {name: p[k] for name, p in self.trained[role].items()}

    def state(self, role):
        return self.trained[role]

    def parameters(self, role):
        return list(self.trained[role].values())

    def _hook(self, name):
        def add_adapters(layer, args, out):
            if self.weights is None:
                return out
            A, B = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
            x = args[0].reshape(self.n, -1, args[0].shape[-1])
            rows = out.reshape(self.n, -1, out.shape[-1])
            return torch.baddbmm(rows, x @ A.mT, (self.alpha * B).mT).reshape(out.shape)

        return add_adapters

    def _velocity(self, role, x_t, sigma, cond, alphas):
        owner = "fake" if role == "real" else role
        if owner in self.one.copies:
            return self._whole_models(role, x_t, sigma, cond)
        self.alpha, self.weights = torch.tensor(alphas)[:, None, None], self.trained[owner]
        try:
            return self.one.backbone.velocity(x_t, sigma, cond)
        finally:
            self.weights = None

    def _whole_models(self, role, x_t, sigma, cond):
        """A full fake is a model of its own for every lane; its real DiT is the plain backbone."""
        if role == "real":
            return self.plain(x_t, sigma, cond)
        module, parts = self.one.copies[role].module, []
        conds = [None] * self.n if cond is None else cond.chunk(self.n)
        for k, *args in zip(range(self.n), x_t.chunk(self.n), sigma.chunk(self.n), conds):
            parts.append(torch.func.functional_call(module, self.lane(k, role), tuple(args)))
        return torch.cat(parts)

    def plain(self, x_t, sigma, cond=None):
        return self.one.backbone.velocity(x_t, sigma, cond)

    def generator(self, x_t, sigma, cond=None):
        return self._velocity("generator", x_t, sigma, cond, [1.0] * self.n)

    def real(self, x_t, sigma, cond=None):
        self.x0_below = None
        if self.weak_below != self.weak:
            v = self._velocity("real", x_t, sigma, cond, self.weak_below)
            self.x0_below = w2svd.x0_from_velocity(x_t, v, sigma)
        return self._velocity("real", x_t, sigma, cond, self.weak)

    def fake(self, x_t, sigma, cond=None):
        return self._velocity("fake", x_t, sigma, cond, self.strong)

    @contextlib.contextmanager
    def use(self, role):
        yield  # the role is chosen anew by every call


class StackedDiscriminator(Discriminator):
    """A head of its own for each lane, which counts with the lane's own gan_weight."""

    def __init__(self, roles, weights):
        heads = [Discriminator(roles.one).head for _ in range(roles.n)]
        self.roles, self.head, self.weights = roles, heads[0], weights
        self.stacked = stacked([head.state_dict() for head in heads])
        roles.discriminator, roles.trained["discriminator"] = self, self.stacked

    def logit(self, x_t, sigma, cond):
        features = self.roles.one.backbone.features(x_t, sigma, cond)
        parts = features.reshape(self.roles.n, -1, *features.shape[1:])

        def logits(weights, features):
            return torch.func.functional_call(self.head, weights, (features,))

        return torch.func.vmap(logits)(self.stacked, parts).mean(dim=(2, 3)).flatten()

    def gradient(self, x_gen, cond, sigma, eps):
        g, loss = super().gradient(x_gen, cond, sigma, eps)
        return for_samples(self.weights, g) * g, loss


class Stack(State):
    """A State of several lanes, and their run: what the loop, w2svd.distil() or another, changes.

    The configs of the lanes may differ in OWN; all else must agree. Its AdamW is the State's,
    written for all lanes at once.
    """

    OWN = {"generator_lr", "fake_lr", "lr_schedule", "fake_weight_decay", "ema"}
    OWN |= {"alpha_weak", "alpha_weak_schedule", "alpha_strong", "gt_weight", "gan_weight"}

    def __init__(self, task, lanes, loop=distil, roles=StackedRoles):
        self.lanes = [Lane(lane) if isinstance(lane, Config) else lane for lane in lanes]
        self.configs = configs = [lane.config for lane in self.lanes]
        shared = [
            {k: v for k, v in dataclasses.asdict(c).items() if k not in self.OWN} for c in configs
        ]
        assert all(s == shared[0] for s in shared), "lanes may differ in Stack.OWN alone"
        assert configs[0].accumulate == 1, "lanes are updated after each forward"
        n = len(configs) * configs[0].batch
        assert task.config.batch == n, f"the task's batch is {task.config.batch}, the lanes' {n}"
        torch.manual_seed(configs[0].seed)
        made = roles(task.backbone, configs)
        self.gt_weights = self.each(lambda c: c.gt_weight)
        weights = self.each(lambda c: c.gan_weight)
        if weights.any():
            StackedDiscriminator(made, weights)
        # a second loss is made where any lane has it, and each lane weighs its own
        on = {"gt_weight": float(self.gt_weights.any()), "gan_weight": float(weights.any())}
        config = dataclasses.replace(task.config, **on)
        super().__init__(config, made, task.device)
        self.task = task
        trained = self.roles.trained
        self.squares = {r: [torch.zeros_like(p) for p in trained[r].values()] for r in trained}
        self.updates = dict.fromkeys(trained, 0)
        self.scales = torch.tensor([lane.dmd_scale for lane in self.lanes])
        self.loop = loop(self.config, self.roles, self, task.batches())

    def each(self, of):
        """of(config) of every lane, (lanes,)."""
        return torch.tensor([float(of(c)) for c in self.configs])

    def iterate(self):
        """One iteration of every lane; numbers that are means over all of them."""
        self.roles.weak, self.roles.weak_below = [], []  # in DMD's numerator, and its denominator
        for lane in self.lanes:
            alpha = w2svd.alpha_weak_at(lane.config, self.iteration)
            above, below = (alpha if x is None else x for x in (lane.numerator, lane.denominator))
            self.roles.weak.append(above)
            self.roles.weak_below.append(below)
        own = {"dmd_gradient": self.dmd_gradient, "gt_gradient": self.gt_gradient}
        with mock.patch.multiple(w2svd, **own):
            return next(self.loop)

    def dmd_gradient(self, x_gen, x0_real, x0_fake):
        """w2svd.dmd_gradient with the lanes' scales and the denominator's own x0_real."""
        below = x0_real if self.roles.x0_below is None else self.roles.x0_below
        g = (x0_fake - x0_real) / w2svd.mean_abs(x_gen - below)
        return for_samples(self.scales, g) * g

    def gt_gradient(self, x0_fake, x0_gt):
        """w2svd.gt_gradient with the lanes' weights."""
        difference = x0_fake - x0_gt
        g = difference / w2svd.mean_abs(difference)
        return for_samples(self.gt_weights, g) * g

    @torch.no_grad()
    def update(self, role, lr=None):
        """Each lane's own AdamW step, at a rate of its own instead of lr; the mean of their norms.

        The losses are means over all lanes, hence the factor.
        """
        how, parameters = self.optimizers[role].defaults, self.roles.parameters(role)
        beta, self.updates[role] = how["betas"][1], self.updates[role] + 1
        squared = sum(p.grad.square().flatten(1).sum(1) for p in parameters)
        norm = len(self.configs) * squared.sqrt()
        if not norm.isfinite().all():
            raise FloatingPointError(f"the gradient of the {role} is not finite")
        clip = torch.full_like(norm, len(self.configs))
        if self.updates[role] > 1:  # as w2svd.usual_norm
            usual = sum(square.flatten(1).sum(1) for square in self.squares[role])
            usual = (usual / (1 - beta ** (self.updates[role] - 1))).sqrt()
            clip = clip * (SPIKE * usual / norm).clamp(max=1)
        owner = "generator" if role == "generator" else "fake"  # the discriminator's rate too
        lr = self.each(lambda c: getattr(c, f"{owner}_lr") * lr_scale(c, self.iteration))
        if role == "generator":
            lr = lr * torch.tensor([self.iteration >= lane.waits for lane in self.lanes])
        decay = 1 - lr * self.each(lambda c: c.fake_weight_decay if role == "fake" else 0.0)
        correction = (1 - beta ** self.updates[role]) ** 0.5
        for p, square in zip(parameters, self.squares[role]):
            g = along(clip, p) * p.grad
            square.mul_(beta).addcmul_(g, g, value=1 - beta)
            step = g / (square.sqrt() / correction + how["eps"])
            p.mul_(along(decay, p)).sub_(along(lr, p) * step)
            p.grad = None
        self.reads = []
        return norm.mean()

    @torch.no_grad()
    def update_average(self):
        rest = 1 - self.each(lambda c: ema_at(c, self.iteration))
        for name, p in self.roles.trained["generator"].items():
            self.average[name].lerp_(p, along(rest, p).expand_as(p))
