"""Many runs of w2svd on one frozen backbone, trained side by side: what makes the study affordable.

A LANE is one run: its own adapters, optimizers, EMA, learning rates and alpha_weak. The lanes of a
stack read one batch, cut into as many parts, through `w2svd.iterate` as it stands: an evaluation of
all lanes is one pass through the shared backbone, in which every LoRA layer adds the adapters of
the lanes to their parts of the batch. A lane's result is that of `w2svd.py train` with the same
numbers, up to rounding; the lanes share the backbone, the order of exits and the stream of data.

    lanes  batch   one after the other   side by side        ring, 1 thread, milliseconds for
       16    128                    72             29        an iteration of one lane
"""

import dataclasses
from contextlib import ExitStack, contextmanager

import torch

import w2svd
from w2svd import Roles, State, alpha_weak_at, lr_factor


class Lane(Roles):
    """The trained weights of one run, a copy of those that `roles` starts with."""

    def __init__(self, roles):
        self.trained = {
            role: {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}
            for role, named in roles.trained.items()
        }


class StackedRoles:
    """Roles for (lanes * B, ...): generator, real and fake, each lane with its own adapters."""

    def __init__(self, backbone, configs):
        first = configs[0]
        self.one = Roles(backbone, first.lora_rank, 0.0, 1.0, first.generator, first.fake)
        self.lanes = [Lane(self.one) for _ in configs]
        self.strong = [c.alpha_strong for c in configs]
        self.weak = [c.alpha_weak for c in configs]
        names = {m: name for name, m in backbone.module.named_modules()}
        for layer in self.one.layers:
            layer.register_forward_hook(self._hook(names[layer]))
        self.weights = None  # of the role that is being evaluated: {name: (lanes, ...)}

    def _hook(self, name):
        def add_adapters(layer, args, out):
            if self.weights is None:
                return out
            A, B = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
            x = args[0].reshape(len(A), -1, args[0].shape[-1])
            rows = out.reshape(len(A), -1, out.shape[-1])
            return torch.baddbmm(rows, x @ A.mT, (self.alpha * B).mT).reshape(out.shape)

        return add_adapters

    def _velocity(self, role, x_t, sigma, cond, alphas):
        owner = "fake" if role == "real" else role
        if owner in self.one.copies:
            return self._whole_models(role, x_t, sigma, cond)
        every = [lane.state(owner) for lane in self.lanes]
        self.alpha = torch.tensor(alphas)[:, None, None]
        self.weights = {name: torch.stack([lane[name] for lane in every]) for name in every[0]}
        try:
            return self.one.backbone.velocity(x_t, sigma, cond)
        finally:
            self.weights = None

    def _whole_models(self, role, x_t, sigma, cond):
        """A full fake is a model of its own for every lane; its real DiT is the plain backbone."""
        if role == "real":
            return self.backbone(x_t, sigma, cond)
        n, module, parts = len(self.lanes), self.one.copies[role].module, []
        conds = [None] * n if cond is None else cond.chunk(n)
        for lane, *args in zip(self.lanes, x_t.chunk(n), sigma.chunk(n), conds):
            parts.append(torch.func.functional_call(module, lane.state(role), tuple(args)))
        return torch.cat(parts)

    def backbone(self, x_t, sigma, cond=None):
        return self.one.backbone.velocity(x_t, sigma, cond)

    def generator(self, x_t, sigma, cond=None):
        return self._velocity("generator", x_t, sigma, cond, [1.0] * len(self.lanes))

    def real(self, x_t, sigma, cond=None):
        return self._velocity("real", x_t, sigma, cond, self.weak)

    def fake(self, x_t, sigma, cond=None):
        return self._velocity("fake", x_t, sigma, cond, self.strong)

    @contextmanager
    def use(self, role):
        yield  # the role is chosen anew by every call


class Stack:
    """A State of several lanes: what w2svd.iterate() changes.

    The configs may differ in learning rates and their schedule, alphas, decay, ema and clipping;
    `gradient_scales` multiplies each lane's generator gradient. All else must agree.
    """

    OWN = ("generator_lr", "fake_lr", "lr_schedule", "alpha_weak", "alpha_weak_schedule",
           "alpha_strong", "fake_weight_decay", "ema", "max_grad_norm")  # fmt: skip

    def __init__(self, task, configs, gradient_scales=None):
        shared = [{k: v for k, v in dataclasses.asdict(c).items() if k not in self.OWN}
                  for c in configs]  # fmt: skip
        assert all(s == shared[0] for s in shared), "lanes may differ in Stack.OWN alone"
        torch.manual_seed(configs[0].seed)
        self.configs, self.roles = configs, StackedRoles(task.backbone, configs)
        self.states = [State(c, lane, "cpu") for c, lane in zip(configs, self.roles.lanes)]
        self.scales = gradient_scales or [1.0] * len(configs)
        self.rngs, self.iteration = self.states[0].rngs, 0
        self.config, self.data = task.config, task.batches(self.rngs["data"])
        n = len(configs) * configs[0].batch
        assert task.config.batch == n, f"the task's batch is {task.config.batch}, the lanes' {n}"

    def iterate(self):
        """One iteration of every lane; numbers that are means over all of them."""
        self.roles.weak = [alpha_weak_at(c, self.iteration) for c in self.configs]
        return w2svd.iterate(self.config, self, self.data)

    def update(self, role, *_):
        """Each lane's own optimizer step; the losses are means over all lanes, hence the factor."""
        norms = []
        for config, state, scale in zip(self.configs, self.states, self.scales):
            factor = len(self.states) * (scale if role == "generator" else 1.0)
            for parameter in state.roles.parameters(role):
                parameter.grad *= factor
            lr = {"generator": config.generator_lr, "fake": config.fake_lr}[role]
            lr = lr * lr_factor(config, self.iteration)
            norms.append(state.update(role, lr, config.max_grad_norm))
        return torch.stack(norms).mean()

    def skip(self, error, _):
        raise error  # a lane that breaks would stop all

    def update_ema(self, _):
        for config, state in zip(self.configs, self.states):
            state.update_ema(config.ema)

    @contextmanager
    def averaged(self):
        """The generators with their averaged weights."""
        with ExitStack() as every:
            for state in self.states:
                every.enter_context(state.averaged())
            yield self.roles.generator
