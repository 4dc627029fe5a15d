"""notebooks/wan.py: Wan 2.1 by the commands of w2svd.py, on tiny pipelines of both kinds.

Against: diffusers' own pipelines and transformer, with the exported LoRA and without; a guided
update written by hand; an uninterrupted run; one process on the clips of two; counted FLOPs.
Run with `python -m pytest tests/test_wan.py`; 40 seconds.
"""

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_ranks
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from helpers import said, same_run, tensors
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from video_runs import SMALL, run_card, watch_films

import w2svd
from toy import tiny_wan
from toy.tiny_hunyuan import SIZE, clips
from w2svd import Config, Machine, few_step_sigmas

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))
import to_comfyui  # noqa: E402
import wan  # noqa: E402
from wan import Wan  # noqa: E402

EACH = pytest.mark.parametrize("image", [False, True], indirect=True, scope="module")
IMAGE = pytest.mark.parametrize("image", [True], indirect=True, scope="module")
ALONE = Machine()
TINY = {"model": "wan", "height": 32, "width": 48, "frames": 9}


def run(*flags, code=0):
    assert wan.main([str(flag) for flag in flags]) == code


@pytest.fixture(scope="module", params=[False])
def image(request):
    """Whether a first frame is given."""
    return request.param


@pytest.fixture(scope="module")
def tiny(image, tmp_path_factory):
    tiny_wan.save_tiny(folder := tmp_path_factory.mktemp("wan"), image)
    return folder


@pytest.fixture(scope="module")
def fixed(tiny, tmp_path_factory):
    """Flags of train, with a folder of two clips."""
    folder = clips(tmp_path_factory.mktemp("clips"), a="a dog", b="the red blue square")
    return ["--data", folder, "--checkpoint", tiny, *SIZE, *SMALL[:8], *SMALL[10:]]


@pytest.fixture(scope="module")
def trained(fixed, tmp_path_factory):
    """A finished run of four iterations, and its films."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        films = watch_films(patch)
        run("train", *fixed, "--iterations", 4, "--out", folder)
    return folder, films


@pytest.fixture
def stock(tiny, image, monkeypatch):
    """diffusers' pipeline, whose image-to-video asks for ftfy, which repairs broken Unicode."""
    ftfy = SimpleNamespace(fix_text=str)
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", ftfy, raising=False)
    return (WanImageToVideoPipeline if image else WanPipeline).from_pretrained(tiny)


def given(backbone, batch=1):
    """A noised sample's cond, of random numbers, always the same."""
    rng, m = torch.Generator().manual_seed(0), backbone.module.config
    names = ("prompt_embeds", "negative_prompt_embeds")
    cond = {name: torch.randn(batch, 512, m.text_dim, generator=rng) for name in names}
    if backbone.form:
        cond["picture"] = torch.randn(batch, 17, m.image_dim, generator=rng)
        cond["image"] = torch.randn(batch, *backbone.video, generator=rng)
    return cond


def in_bf16(module):
    """Make a transformer what from_pretrained does in bf16: some of its weights stay in float32."""
    for name, p in module.named_parameters():
        if not any(part in name for part in WanTransformer3DModel._keep_in_fp32_modules):
            p.data = p.data.bfloat16()


def new_roles(image, dtype=torch.float32, machine=ALONE, **settings):
    """Roles on the tiny transformer, with adapters that do something."""
    config = Config(**{**TINY, "lora_rank": 2, **settings})
    module = tiny_wan.transformer(image)
    if dtype == torch.bfloat16:
        in_bf16(module)
    roles = w2svd.build_roles(config, Wan(module, config), machine)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in itertools.chain(*map(roles.parameters, ("generator", "fake"))):
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return roles


def merged(roles, role, alpha):
    """A plain transformer whose weights are W + alpha B A of the role's adapter."""
    image = bool(roles.backbone.form)
    module, trained = tiny_wan.transformer(image), roles.state(role)
    for name, A in trained.items():
        if "lora_A" in name:
            B = trained[name.replace("lora_A", "lora_B")]
            module.get_submodule(name.split(".lora_A")[0]).weight.data += alpha * B.data @ A.data
    return module


# ---- what the model is ---------------------------------------------------------------------------


@EACH
def test_a_clip_s_file_is_what_the_stock_pipeline_makes_of_it(fixed, trained, stock, image):
    """Scaled latents, padded text and negative prompt, picture's latents behind its mask, CLIP."""
    clip = tensors(next((fixed[1] / ".w2svd").glob("a-*")))
    video = w2svd.read_clip(fixed[1] / "a.mp4", w2svd.read_run(trained[0]))
    texts = ["a dog", Wan.prompt_template["negative"]]
    how = {"do_classifier_free_guidance": True, "max_sequence_length": 512}
    with torch.no_grad():
        embeds = stock.encode_prompt(texts[0], texts[1], **how)
    for name, expected in zip(("prompt_embeds", "negative_prompt_embeds"), embeds):
        assert torch.equal(clip[name], expected[0]) and clip[name].shape == (512, 16)
    c = stock.vae.config
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (c.latents_mean, c.latents_std))
    with torch.no_grad():
        mode = stock.vae.encode(video).latent_dist.mode()[0]
    torch.testing.assert_close(clip["latents"], (mode - mean) / std)
    if image:
        first = stock.video_processor.postprocess(video[:, :, 0], output_type="pil")
        pixels = stock.video_processor.preprocess(first[0], 32, 48)
        with torch.no_grad():
            assert torch.equal(clip["picture"], stock.encode_image(first)[0])
            _, beside = stock.prepare_latents(pixels, 1, 16, 32, 48, 9, torch.float32, "cpu")
        backbone = Wan(stock.transformer, Config(**TINY))
        x_t = torch.randn(1, 16, 3, 4, 6)
        found = backbone.with_image(x_t, {"image": clip["image"][None]})
        torch.testing.assert_close(found, torch.cat([x_t, beside], dim=1))


@EACH
def test_the_guided_update_is_the_hand_written_one(image, entered):
    """The real DiT's unconditional evaluation reads the negative prompt and the same picture."""
    roles = new_roles(image)
    cond, rng = given(roles.backbone), torch.Generator().manual_seed(1)
    x_in, eps = torch.randn(2, 1, *roles.backbone.shape, generator=rng)
    sigma_in, sigma = torch.tensor([0.9]), torch.tensor([0.5])
    w2svd.generator_step(roles, x_in, sigma_in, cond, sigma, eps, guidance=5.0)

    def x0(module, x_t, sigma, text="prompt_embeds"):
        x = x_t
        if image:
            mask = torch.cat([torch.ones(1, 4, 1, 4, 6), torch.zeros(1, 4, 2, 4, 6)], dim=2)
            x = torch.cat([x_t, mask, cond["image"]], dim=1)
        v = module(x, 1000 * sigma, cond[text], cond.get("picture"), return_dict=False)[0]
        return x_t - sigma * v

    with torch.no_grad():
        x_gen = x0(merged(roles, "generator", 1.0), x_in, sigma_in)
        x_t, real = 0.5 * x_gen + 0.5 * eps, merged(roles, "fake", 0.25)
        with_text, without = (x0(real, x_t, sigma, f"{n}prompt_embeds") for n in ("", "negative_"))
        x0_real = without + 5 * (with_text - without)
        g = (x0(merged(roles, "fake", 1.0), x_t, sigma) - x0_real) / (x_gen - x0_real).abs().mean()
    torch.testing.assert_close(entered[-1][1], g / g.numel(), rtol=1e-3, atol=1e-7)


@EACH
def test_checkpointing_and_the_base_in_host_memory_change_no_bit_of_a_gradient(image):
    found = []
    for machine in (ALONE, Machine(offload=True)):
        roles = new_roles(image, machine=machine, gan_weight=1.0)
        rng = torch.Generator().manual_seed(1)
        x_in, eps = torch.randn(2, 1, *roles.backbone.shape, generator=rng)
        given_to = torch.tensor([0.9]), given(roles.backbone), torch.tensor([0.5]), eps
        w2svd.generator_step(roles, x_in, *given_to, gan_weight=5.0, guidance=5.0)
        found.append([p.grad for p in roles.parameters("generator")])
    assert all(map(torch.equal, *found))


@EACH
def test_the_discriminator_s_features_are_the_tokens_after_a_third_of_the_blocks(image):
    roles, seen = new_roles(image), []
    x, sigma = torch.randn(1, *roles.backbone.shape), torch.tensor([0.5])
    cond = given(roles.backbone)
    blocks = roles.backbone.blocks
    blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        roles.plain(x, sigma, cond)
    blocks[1].register_forward_hook(lambda *_: 1 / 0)
    judge = w2svd.Discriminator(roles)
    with roles.use("generator"):
        logit = judge.logit(x, sigma, cond)
    torch.testing.assert_close(logit, judge.head(seen[0]).mean(dim=(1, 2)))
    assert roles.backbone.blocks == blocks and seen[0].shape == (1, 3 * 2 * 3, 24)


def test_bf16_keeps_the_difference_of_fake_and_real_and_the_noise_level():
    """As test_numbers for HunyuanVideo: with adapters as after a hundred updates of 2e-5."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 64, "ffn_dim": 768, "text_dim": 64}
    module = WanTransformer3DModel(num_layers=6, **sizes).requires_grad_(False)
    for p in module.parameters():
        p.data = p.data.bfloat16().float()
    found = {}
    for way in ("exact", "ours", "plain"):
        one, levels, rng = copy.deepcopy(module), [], torch.Generator().manual_seed(0)
        if way != "exact":
            in_bf16(one)
        config = Config(**{**TINY, "height": 128, "width": 128})
        roles = w2svd.Roles(Wan(one, config), 8, 0.25, 1.0)
        embedder = one.condition_embedder.time_embedder
        embedder.register_forward_hook(lambda m, args, out, levels=levels: levels.append(out))
        if way == "plain":
            for layer in (one.patch_embedding, one.proj_out):
                layer._forward_hooks.clear()
        with torch.no_grad():
            for name, p in roles.state("fake").items():  # A is drawn by peft
                p.copy_((2e-3 if "lora_B" in name else 0.1) * torch.randn(p.shape, generator=rng))
            x, cond = torch.randn(1, *roles.backbone.shape, generator=rng), given(roles.backbone)
            v_fake, v_real = (f(x, torch.tensor([0.9545]), cond) for f in (roles.fake, roles.real))
        found[way] = v_fake - v_real, levels[-1]
    exact, level = found["exact"]
    errors = {way: float((d - exact).norm() / exact.norm()) for way, (d, _) in found.items()}
    assert errors["ours"] < 1 and errors["plain"] > 2.5, errors
    torch.testing.assert_close(found["ours"][1], level)  # float32 layers


COMFYUI = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}  # diffusers' names, and the original
for here, there in {"attn1": "self_attn", "attn2": "cross_attn"}.items():
    COMFYUI.update({f"{here}.to_{x}": f"{there}.{x}" for x in "qkv"})
    COMFYUI[f"{here}.to_out.0"] = f"{there}.o"
COMFYUI.update({f"attn2.add_{x}_proj": f"cross_attn.{x}_img" for x in "kv"})
CHANGES = {  # of a tiny checkpoint's model_index.json and its transformer's config
    "two experts": ({"boundary_ratio": 0.9}, {}),
    "5B": ({"expand_timesteps": True}, {}),
    "last frame": ({}, {"pos_embed_seq_len": 514}),
    "another model": ({}, {"_class_name": "HunyuanVideoTransformer3DModel"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_wan_2_1_is_refused(fixed, capsys, change):
    other = Path("other")
    (other / "transformer").mkdir(parents=True)
    for name, new in zip(("model_index.json", "transformer/config.json"), CHANGES[change]):
        stored = json.loads((fixed[3] / name).read_text())
        (other / name).write_text(json.dumps({**stored, **new}))
    run("train", *fixed, "--checkpoint", other, code=2)
    sentence = said(capsys)
    assert "Wan" in sentence and ("2.2" in sentence) == (change in ("two experts", "5B"))


# ---- what the commands make of it ----------------------------------------------------------------


@EACH
def test_sample_draws_what_the_exported_card_s_code_draws_in_diffusers(
    trained, image, stock, monkeypatch
):
    """From raw clips to a LoRA in the stock pipeline, which asks its scheduler for no grid."""
    films = watch_films(monkeypatch)
    Image.radial_gradient("L").resize((96, 32)).save("a.png")
    picture = ["--image", "a.png"] if image else []
    run("sample", "--run", trained[0], *picture, "--prompt", "a dog", "--out", "dog.mp4")
    run("export", "--run", trained[0], "--out", "lora")
    checkpoint = w2svd.read_run(trained[0]).checkpoint
    pipe, latents, shown = run_card("lora", monkeypatch, checkpoint)
    assert pipe.scheduler.sigmas.tolist() == few_step_sigmas(4, 4.0).tolist()
    assert (latents - films["dog.mp4"]).abs().max() < 2e-5 < shown.std()
    assert len(shown) == 9
    assert to_comfyui.main(["lora", "comfyui"]) == 0
    ours, theirs = (
        load_file(*Path(folder).glob("*.safetensors")) for folder in ("lora", "comfyui")
    )
    for block, (part, name) in itertools.product(range(3), COMFYUI.items()):
        for x in "AB" if image or "img" not in name else "":
            x = f"lora_{x}.weight"
            found = theirs.pop(f"diffusion_model.blocks.{block}.{name}.{x}")
            assert torch.equal(found, ours.pop(f"transformer.blocks.{block}.{part}.{x}"))
    assert not ours and all("alpha" in name and x == 2 for name, x in theirs.items())


@EACH
def test_the_backbone_s_film_is_the_stock_pipeline_s_with_guidance(fixed, trained, stock, image):
    """At the start, beside the generator's, which is the backbone's without guidance."""
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    timesteps = stock.scheduler.set_timesteps
    grid = [1.0, 0.75, 0.5, 0.25]
    stock.scheduler.set_timesteps = lambda n, device: timesteps(device=device, sigmas=grid)
    how = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
    how.update(negative_prompt=Wan.prompt_template["negative"], output_type="latent")
    if image:
        video = w2svd.read_clip(fixed[1] / "a.mp4", w2svd.read_run(trained[0]))
        how["image"] = stock.video_processor.postprocess(video[:, :, 0], output_type="pil")[0]
    rng = torch.Generator().manual_seed(0)
    latents = stock(prompt="a dog", guidance_scale=5.0, generator=rng, **how).frames
    (name,) = [n for n in trained[1] if n.startswith("000000") and n.endswith("a-dog-backbone.mp4")]
    assert (latents - trained[1][name]).abs().max() < 2e-5
    rng = torch.Generator().manual_seed(0)
    latents = stock(prompt="a dog", guidance_scale=1.0, generator=rng, **how).frames
    assert (latents - trained[1][name]).abs().max() > 1e-2


@IMAGE
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(fixed, trained, capsys):
    run("train", *fixed, "--iterations", 2, "--out", "r")
    assert "python notebooks/wan.py sample" in capsys.readouterr().out
    run("train", "--resume", "--out", "r", "--iterations", 4)
    same_run("r", trained[0])


RATES = {"generator_lr": 1e-2, "fake_lr": 1e-2, "fake_updates": 2, "iterations": 2, "guidance": 5.0}
CASES = {  # as those of test_ranks: settings, is there a first image, is the backbone split
    "guided": (RATES, True, False),
    "bf16, split": ({**RATES, "checkpointing": True}, True, True),
}


def case_roles(folder, name, alone=False):
    settings, image, split = CASES[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    roles = new_roles(image, dtype, Machine(shard=split and not alone), **settings)
    return roles.backbone.config, roles


def endless(image, first=0, step=1):
    """Every step-th of an endless list of clips."""
    backbone = Wan(tiny_wan.transformer(image), Config(**TINY))
    for count in itertools.count(first, step):
        x0 = torch.randn(1, *backbone.shape, generator=torch.Generator().manual_seed(count))
        yield {"x0": x0, "cond": given(backbone), "name": str(count)}


WAN = {"CASES": CASES, "new_roles": case_roles, "endless": endless, "__file__": __file__}


def test_two_processes_train_as_one_does_on_the_clips_of_both(tmp_path, monkeypatch):
    """By the test of HunyuanVideo, which starts this file in place of itself."""
    for name, value in WAN.items():
        monkeypatch.setattr(test_ranks, name, value)
    test_ranks.test_processes_train_as_one_does_on_all_of_their_clips(tmp_path, 2, monkeypatch)


# ---- the plan ------------------------------------------------------------------------------------

STORED = json.loads(Path(__file__).with_name("wan_work.json").read_text())["rows"]
PARAMETERS = {"1.3B": 1_418_996_800, "14B": 14_288_491_584, "14B-480P": 16_394_878_784}


def planned(row):
    """The model of a stored row, as deep as that was, and its plan."""
    settings = {n: row[n] for n in ("checkpoint", "height", "width", "frames")}
    config = Config(**{**Wan.preset, "model": "wan", "fake_updates": 1, **settings})
    config = dataclasses.replace(config, checkpointing=row["checkpointing"])
    with pytest.MonkeyPatch.context() as patch:
        known = {**Wan.released[row["checkpoint"]], "num_layers": row["blocks"]}
        patch.setattr(Wan, "released", {row["checkpoint"]: known})
        model = Wan.outline(config)
    return model, w2svd.plan(config, model, Machine(offload=row["offload"]))


def name_of(row):
    return " ".join(
        str(row[n]) for n in ("checkpoint", "width", "blocks", "checkpointing", "offload")
    )


PARTS = {" in all": 1, ", CUDA, fragments": -1, ", margin": -1}


@pytest.mark.parametrize("row", STORED, ids=name_of)
def test_the_plan_is_within_5_percent_of_a_simulated_iteration(row):
    """Memory rather too much; work at the rates that the plan takes."""
    model, found = planned(row)
    memory = sum(found[f"GiB{name}"] * sign for name, sign in PARTS.items())
    if row["offload"]:  # on a GPU a third block is still there, which just ended
        memory -= (
            2 * sum(p.numel() for p in model.blocks[0].parameters() if not p.requires_grad) / 2**30
        )
    assert 0.99 * row["allocated_gib"] < memory < 1.05 * row["allocated_gib"]
    work = row["linear_flop"] + row["attention_flop"]
    assert found["PFLOP an iteration"] == pytest.approx(work / 1e15, rel=0.05)
    copied = found["seconds of copying the backbone"] * 25e9  # by the bus that the plan takes
    assert copied == pytest.approx(row["copied_bytes"], rel=0.05)
    seconds = row["linear_flop"] / 650e12 + row["attention_flop"] / 550e12 + row["bytes"] / 3e12
    assert found["seconds an iteration on an H100"] == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_released_sizes_have_their_parameters_and_flops(size):
    (checkpoint,) = [name for name in Wan.released if f"-{size}-D" in name]
    model = Wan.outline(Config(model="wan", checkpoint=checkpoint, frames=81, guidance=5.0))
    assert sum(p.numel() for p in model.module.parameters()) == PARAMETERS[size]
    with torch.device("meta"):
        x, sigma, cond = torch.empty(1, *model.shape), torch.empty(1), {}
        cond["prompt_embeds"] = torch.empty(1, 512, 4096)
        cond["image"], cond["picture"] = torch.empty(1, *model.video), torch.empty(1, 257, 1280)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.velocity(x, sigma, cond)
    counted = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    attention = counted["aten.bmm"]
    found = model.flop()
    assert found == pytest.approx((sum(counted.values()) - attention, attention), rel=5e-3)


if __name__ == "__main__":
    vars(test_ranks).update(WAN)
    test_ranks.work(Path(sys.argv[1]), sys.argv[2:])
