"""Many runs of w2svd on one frozen backbone, trained side by side: what makes the study affordable.

A LANE is one run: its own adapters, optimizers, average, learning rates and alpha_weak. The lanes
of a stack read one batch, cut into as many parts, through `w2svd.distil` as it stands: an
evaluation of all lanes is one pass through the shared backbone, in which every LoRA layer adds the
adapters of the lanes to their parts of the batch. A lane's result is that of `w2svd.py train` with
the same numbers, up to rounding; the lanes share the backbone, the order of exits and the stream of
data.

    lanes  batch   one after the other   side by side        ring, 1 thread, milliseconds for
       16    128                    72             29        an iteration of one lane
"""

import dataclasses
from contextlib import contextmanager

import torch

from w2svd import SPIKE, Roles, State, alpha_weak_at, distil, ema_at, lr_scale


def along(numbers, x):
    """One number for each lane (lanes,), shaped to multiply x (lanes, ...)."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


class StackedRoles:
    """Roles for (lanes * B, ...): generator, real and fake, each lane with its own adapters.

    `trained` has what Roles trains, {role: {name: (lanes, ...)}}; all lanes start alike.
    """

    def __init__(self, backbone, configs):
        first, self.n = configs[0], len(configs)
        self.one = Roles(backbone, first.lora_rank, 0.0, 1.0, first.generator, first.fake)
        self.trained = {
            role: {
                name: torch.nn.Parameter(torch.stack([p.detach()] * self.n))
                for name, p in named.items()
            }
            for role, named in self.one.trained.items()
        }
        self.strong = [c.alpha_strong for c in configs]
        self.weak = [c.alpha_weak for c in configs]
        self.alpha_weak = None  # distil() sets it; each lane has its own in `weak`
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
        return self._velocity("real", x_t, sigma, cond, self.weak)

    def fake(self, x_t, sigma, cond=None):
        return self._velocity("fake", x_t, sigma, cond, self.strong)

    @contextmanager
    def use(self, role):
        yield  # the role is chosen anew by every call


class Stack(State):
    """A State of several lanes, and their run: what the loop, w2svd.distil() or another, changes.

    The configs may differ in learning rates and their schedule, alphas, decay and ema;
    `gradient_scales` multiplies each lane's generator gradient. All else must agree. Its AdamW is
    the State's, written for all lanes at once.
    """

    OWN = (
        "generator_lr",
        "fake_lr",
        "lr_schedule",
        "alpha_weak",
        "alpha_weak_schedule",
        "alpha_strong",
        "fake_weight_decay",
        "ema",
    )

    def __init__(self, task, configs, gradient_scales=None, loop=distil):
        shared = [
            {k: v for k, v in dataclasses.asdict(c).items() if k not in self.OWN} for c in configs
        ]
        assert all(s == shared[0] for s in shared), "lanes may differ in Stack.OWN alone"
        assert configs[0].accumulate == 1, "lanes are updated after each forward"
        n = len(configs) * configs[0].batch
        assert task.config.batch == n, f"the task's batch is {task.config.batch}, the lanes' {n}"
        torch.manual_seed(configs[0].seed)
        super().__init__(task.config, StackedRoles(task.backbone, configs), task.device)
        self.configs = configs
        trained = self.roles.trained
        self.squares = {r: [torch.zeros_like(p) for p in trained[r].values()] for r in trained}
        self.updates = dict.fromkeys(trained, 0)
        self.scales = torch.tensor(gradient_scales or [1.0] * len(configs))
        self.loop = loop(self.config, self.roles, self, task.batches())

    def each(self, of):
        """of(config) of every lane, (lanes,)."""
        return torch.tensor([of(c) for c in self.configs])

    def iterate(self):
        """One iteration of every lane; numbers that are means over all of them."""
        self.roles.weak = [alpha_weak_at(c, self.iteration) for c in self.configs]
        return next(self.loop)

    @torch.no_grad()
    def update(self, role, lr=None):
        """Each lane's own AdamW step, at a rate of its own instead of lr; the mean of their norms.

        The losses are means over all lanes, hence the factor.
        """
        how, parameters = self.optimizers[role].defaults, self.roles.parameters(role)
        beta, self.updates[role] = how["betas"][1], self.updates[role] + 1
        scale = len(self.configs) * (self.scales if role == "generator" else 1.0)
        squared = sum(p.grad.square().flatten(1).sum(1) for p in parameters)
        norm = scale * squared.sqrt()
        if not norm.isfinite().all():
            raise FloatingPointError(f"the gradient of the {role} is not finite")
        clip = torch.as_tensor(scale).expand(len(norm))
        if self.updates[role] > 1:  # as w2svd.usual_norm
            usual = sum(square.flatten(1).sum(1) for square in self.squares[role])
            usual = (usual / (1 - beta ** (self.updates[role] - 1))).sqrt()
            clip = clip * (SPIKE * usual / norm).clamp(max=1)
        lr = self.each(lambda c: getattr(c, f"{role}_lr") * lr_scale(c, self.iteration))
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
