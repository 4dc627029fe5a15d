"""What bf16 leaves of the generator's gradient, against float32, on random weights.

    python -m toy.precision          a table, 2 minutes on one CPU core

A HunyuanVideo of 5.8 M weights that bf16 can hold, with adapters as they are after some updates:
their B has a standard deviation of about (number of updates) x (learning rate). Three ways: all
in float32; bf16 as autocast has it; and bf16 with the stream between the blocks, and the last
layer, in float32 where no gradient is kept, which is what `w2svd.HunyuanVideo` does.
"""

import copy

import torch
from diffusers import HunyuanVideoTransformer3DModel

from w2svd import Config, HunyuanVideo, Roles, generator_step

RATE = 2e-5  # the preset's
UPDATES = (20, 50, 100, 200, 500)
WAYS = {  # dtype, and is the stream in float32
    "float32": (torch.float32, True),
    "bf16, as it comes": (torch.bfloat16, False),
    "bf16, stream in float32": (torch.bfloat16, True),
}


def hunyuan(form=None, heads=3):
    """A HunyuanVideo transformer of random weights, in float32; form: of image-to-video."""
    torch.manual_seed(0)
    module = HunyuanVideoTransformer3DModel(
        in_channels=33 if form == "latent_concat" else 16,
        out_channels=16,
        image_condition_type=form,
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=32,
        rope_axes_dim=(16, 24, 24),
    )
    return module.bfloat16().float().requires_grad_(False)


def roles_of(module, way, std, checkpointing=False):
    """Roles on a copy of the module, always with the same adapters; std: of their B."""
    dtype, in_float32 = WAYS[way]
    backbone = HunyuanVideo(copy.deepcopy(module).to(dtype), Config())
    backbone.guidance = 6.016  # as bf16 rounds it
    if not in_float32:
        module = backbone.module
        for layer in (module.x_embedder, module.context_embedder, module.proj_out):
            layer._forward_hooks.clear()
    torch.manual_seed(1)
    roles = Roles(backbone, 8, 0.25, 1.0)
    if checkpointing:
        roles.use_checkpointing()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in ("generator", "fake"):
            for name, parameter in roles.state(role).items():
                if "lora_B" in name:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=rng))
    return roles


def clip(form=None, frames=3, side=16):
    """Latents (1, 16, T, H, W) of noise, and text and first image of noise."""
    rng = torch.Generator().manual_seed(0)
    cond = {"prompt_embeds": torch.randn(1, 32, 64, generator=rng)}
    cond["pooled"] = torch.randn(1, 32, generator=rng)
    if form:
        cond["image"] = torch.randn(1, 16, 1, side, side, generator=rng)
    return torch.randn(1, 16, frames, side, side, generator=rng), cond


def difference_and_gradient(roles, form=None):
    """v_fake - v_real of one noised clip, and the generator's gradient, the sum of four levels'."""
    x, cond = clip(form)
    for seed, level in enumerate((0.3, 0.5, 0.7, 0.9)):
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        generator_step(roles, x, torch.tensor([0.9375]), cond, torch.tensor([level]), eps)
    gradient = torch.cat([p.grad.flatten() for p in roles.parameters("generator")])
    with torch.no_grad():
        v_fake, v_real = (f(x, torch.tensor([0.5]), cond) for f in (roles.fake, roles.real))
    return v_fake - v_real, gradient


def cosines(updates=UPDATES):
    """{way in bf16: [cosine of its gradient with float32's after so many updates]}."""
    module, found = hunyuan(), {way: [] for way in WAYS if way != "float32"}
    for n in updates:
        exact = difference_and_gradient(roles_of(module, "float32", n * RATE))[1]
        for way, values in found.items():
            gradient = difference_and_gradient(roles_of(module, way, n * RATE))[1]
            values.append(float(torch.cosine_similarity(gradient, exact, 0)))
    return found


def main():
    """Print the cosines, a row for each number of updates."""
    found = cosines()
    print(f"{'updates':>8}" + "".join(f"{way:>26}" for way in found))
    for n, *row in zip(UPDATES, *found.values()):
        print(f"{n:8}" + "".join(f"{value:26.3f}" for value in row))


if __name__ == "__main__":
    main()
