"""HunyuanVideo in every role, its plan, training, sampling and export, on a tiny pipeline.

Against: diffusers' own pipeline, transformer and LoRA loader, padded text with its mask, backward
without checkpointing, an uninterrupted run, torch's count of FLOPs for the released architecture.
Run with `python -m pytest tests/test_hunyuan.py`; about a minute. Clips: test_data.py.
"""

import functools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from diffusers.utils.torch_utils import randn_tensor
from helpers import lines, refused, run, same_bits
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import w2svd
from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny
from w2svd import (
    Config,
    HunyuanTask,
    HunyuanVideo,
    Machine,
    Roles,
    few_step_sigmas,
    read_safetensors,
)

SHAPE = (4, 3, 4, 6)  # of the latents
SMALL = ["--lora-rank", 2, "--fake-updates", 2, "--log-every", 2, "--save-every", 2]
# Rates at which a few steps show; and no default where a default could hide that it is ignored
ODD = "--generator-lr .02 --fake-lr .02 --ema .5 --shift 4 --embedded-guidance 3".split()
LINEARS = 12 + 5  # of a double and of a single block
SIMULATED = json.loads(Path(__file__).with_name("simulated_peaks.json").read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def plain_text():
    """The tiny text encoder knows no template; for the whole session, as fixtures train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunyuanVideo, "prompt_template", TEMPLATE)
        yield


@pytest.fixture(scope="session")
def clips(tiny, plain_text, tmp_path_factory):
    """A folder of three clips, encoded."""
    folder = tmp_path_factory.mktemp("clips")
    for name, caption in (("a", "a dog"), ("b", "a red square"), ("c", "a woman talks")):
        film(folder / f"{name}.mp4", fps=30 if name == "a" else 60, frames=60)
        (folder / f"{name}.txt").write_text(caption)
    run("encode", "--model", "hunyuan", "--data", folder, "--checkpoint", tiny, *SIZE)
    return folder


@pytest.fixture(scope="session")
def train(tiny, clips):
    """train(out, *flags) on the clips."""

    def make(out, *flags, code=0):
        fixed = ["--model", "hunyuan", "--data", clips, "--checkpoint", tiny, *SIZE, *SMALL]
        run("train", *fixed, "--out", out, *flags, code=code)

    return make


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """A finished run whose adapter does something."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train(folder, "--iterations", 4, *ODD)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, plain_text):
    monkeypatch.chdir(tmp_path)


def stock_transformer(tiny, dtype=torch.float32):
    Model = HunyuanVideoTransformer3DModel
    return Model.from_pretrained(tiny, subfolder="transformer", dtype=dtype).requires_grad_(False)


def backbone(tiny, dtype=torch.float32):
    return HunyuanVideo(stock_transformer(tiny, dtype), Config())


def randomise(roles):
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in roles.parameters("generator") + roles.parameters("fake"):
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return roles


def roles_of(tiny, dtype=torch.float32):
    return randomise(Roles(backbone(tiny, dtype), 2, 0.25, 1.0))


def inputs(tokens=5):
    """x, sigma, cond, another sigma and eps, always the same."""
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, *SHAPE, generator=rng)
    text = torch.randn(1, tokens, 16, generator=rng)
    cond = {"prompt_embeds": text, "pooled": torch.randn(1, 8, generator=rng)}
    return x, torch.tensor([0.9375]), cond, torch.tensor([0.6]), eps


def fake(roles, *draw):
    x, _, cond, sigma, eps = draw or inputs()
    return w2svd.fake_step(roles, x, cond, sigma, eps)


def generator(roles, *draw):
    return w2svd.generator_step(roles, *(draw or inputs()))


def gradients(roles, role):
    return {n: p.grad.clone() for n, p in roles.state(role).items() if p.grad is not None}


# ---- the backbone --------------------------------------------------------------------------------


def test_the_velocity_is_the_stock_transformer_s_with_padded_text_and_its_mask(tiny):
    x, sigma, cond, _, _ = inputs()
    mask = torch.zeros(1, 12)
    mask[:, :5] = 1
    padded = torch.cat([cond["prompt_embeds"], torch.randn(1, 7, 16)], dim=1)
    guidance = torch.tensor([6000.0])
    stock = stock_transformer(tiny)(x, 1000 * sigma, padded, mask, cond["pooled"], guidance)
    v = backbone(tiny).velocity(x, sigma, cond)
    assert (v - stock.sample).abs().max() < 2e-6 * max(1, v.abs().max())


def test_no_mask_reaches_attention_in_any_role(tiny, monkeypatch):
    import diffusers.models.transformers.transformer_hunyuan_video as source

    seen, attend = [], source.dispatch_attention_fn

    def spy(*args, attn_mask=None, **how):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **how)

    monkeypatch.setattr(source, "dispatch_attention_fn", spy)
    roles = roles_of(tiny)
    roles.use_checkpointing()
    generator(roles)
    assert len(seen) == 2 * (3 + 1) and set(seen) == {None}  # 2 blocks; 3 forwards, recomputed 1


def test_a_block_that_takes_its_mask_elsewhere_is_loud(tiny):
    block, text = backbone(tiny).blocks[0], torch.randn(1, 5, 20)
    with pytest.raises(AssertionError, match="diffusers"):
        block(torch.randn(1, 72, 20), text, torch.randn(1, 20), torch.ones(1), None)


def test_guidance_and_timestep_are_the_stock_pipeline_s_in_bf16(tiny):
    ours, seen = backbone(tiny, torch.bfloat16), {}
    ours.module.register_forward_pre_hook(lambda m, args, how: seen.update(how), with_kwargs=True)
    x, _, cond, _, _ = inputs()
    ours.velocity(x, torch.tensor([0.9545]), cond)
    assert float(seen["guidance"]) == 6016 and seen["guidance"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.float32 and float(seen["timestep"]) == 954.5


def test_embedded_guidance_reaches_the_transformer_in_training_and_sampling(
    train, trained, monkeypatch
):
    seen, forward = [], HunyuanVideoTransformer3DModel.forward

    def spy(*args, **how):
        seen.append(float(how["guidance"]))
        return forward(*args, **how)

    monkeypatch.setattr(HunyuanVideoTransformer3DModel, "forward", spy)
    train("r", "--iterations", 1, "--embedded-guidance", 2)
    assert len(seen) > 10 and set(seen) == {2000}
    seen.clear()
    run("sample", "--run", trained, "--prompt", "a dog", "--out", "a.mp4")
    assert seen == [3000] * 4


def test_adapters_are_float32_and_compute_in_bf16_on_a_bf16_base(tiny):
    roles, dtypes = roles_of(tiny, torch.bfloat16), set()
    for layer in roles.layers:
        for linear in (layer.lora_A["fake"], layer.lora_B["fake"]):
            linear.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    fake(roles)
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in roles.parameters("fake"))
    state = w2svd.State(Config(model="hunyuan"), roles, "cpu")
    state.update("fake", 1e-3)
    slots = state.optimizers["fake"].state.values()
    assert all(x.dtype == torch.float32 for slot in slots for x in slot.values())


@pytest.mark.parametrize("fp8", [False, True])
def test_checkpointing_recomputes_under_the_role_of_the_forward(tiny, fp8):
    def one(checkpointing, moved):
        roles = roles_of(tiny)
        if fp8:
            roles.backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        if checkpointing:
            roles.use_checkpointing()
        v = roles.generator(*inputs()[:3])  # the role ends here
        with roles.use("fake" if moved else "generator"):
            v.square().sum().backward()
        return gradients(roles, "generator")

    plain, again, elsewhere = one(False, False), one(True, False), one(True, True)
    assert len(plain) == 2 * LINEARS
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(plain[name], elsewhere[name], rtol=1e-4, atol=1e-6)


def test_without_the_context_the_gradient_is_wrong(tiny):
    def one(context):
        roles = roles_of(tiny)
        roles.use_checkpointing()
        if not context:
            naive = torch.utils.checkpoint.checkpoint
            roles.backbone.checkpoint_with(
                lambda f, *args, keep: naive(f, *args, use_reentrant=False)
            )
        v = roles.fake(*inputs()[:3])
        with roles.use("real"):  # the same adapter at another scale: no shape or dtype tells
            v.square().sum().backward()
        return torch.cat([g.flatten() for g in gradients(roles, "fake").values()])

    right, wrong = one(True), one(False)
    assert (right - wrong).norm() / right.norm() > 0.05


class Kernels(TorchDispatchMode):
    """How often attention ran, forward and backward, and other operators by name."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        if "_scaled_dot_product" in name:
            self.backward += "_backward" in name
            self.forward += "_backward" not in name
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep, offload", [(1, False), (2, False), (0, True), (2, True)])
def test_what_is_kept_or_offloaded_saves_work_and_changes_no_bit(tiny, keep, offload):
    packed, save_on_cpu = [], torch.autograd.graph.save_on_cpu

    def one(keep, offload):
        roles = randomise(Roles(backbone(tiny), 2, 0.25, 1.0))
        roles.backbone.keep, roles.backbone.offload = keep, offload
        roles.use_checkpointing()
        v = roles.fake(*inputs()[:3])
        with roles.use("real"), Kernels() as kernels:
            v.square().sum().backward()
        return gradients(roles, "fake"), kernels

    class Spy(save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack, self.pack_hook = self.pack_hook, lambda x: (packed.append(x.shape), pack(x))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", Spy)
        expected, before = one(0, False)
        found, kernels = one(keep, offload)
    assert before.forward == before.backward == 2  # blocks
    assert (kernels.forward, kernels.backward) == (2 - keep, 2)
    assert bool(packed) == offload
    for name, g in expected.items():
        assert torch.equal(found[name], g), name


def test_fp8_keeps_the_base_in_8_bits_and_the_adapters_in_32(tiny):
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), fp8_base=True))
    task.load_weights()
    before = task.backbone.module.get_memory_footprint()
    roles = Roles(task.backbone, 2, 0.25, 1.0)
    task.prepare()
    base = {n: p.dtype for n, p in task.backbone.module.named_parameters() if not p.requires_grad}
    linears = [n for n in base if "_blocks.0.attn.to_q" in n and "refiner" not in n]
    assert linears and all(base[n] == torch.float8_e4m3fn for n in linears)
    assert all(p.dtype == torch.float32 for p in roles.parameters("generator"))
    assert task.backbone.module.get_memory_footprint() < before
    with torch.no_grad():
        v = roles.generator(*inputs()[:3])
    exact = backbone(tiny).velocity(*inputs()[:3])
    assert 0 < (v - exact).norm() / exact.norm() < 0.1
    fake(roles)
    assert gradients(roles, "fake") and not gradients(roles, "generator")


@pytest.mark.slow
def test_the_benchmark_of_the_full_model_runs_on_a_tiny_one(tiny):
    script = Path(__file__).with_name("benchmark_hunyuan.py")
    options = ["default", "attention not kept", "offload"]
    flags = ["--checkpoint", tiny, "--sizes", "tiny", "--repeats", 1, "--options", *options]
    subprocess.run(list(map(str, [sys.executable, script, *flags])), check=True)
    found = json.loads(Path("benchmark.json").read_text())
    assert [row["option"] for row in found["rows"]] == options
    assert not any("failed" in row for row in found["rows"])
    kept = [row["blocks_that_keep_attention"] for row in found["rows"]]
    assert kept == [2, 0, 2] and found["rows"][1]["time_ratio"] > 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_in_every_role(tiny, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compile_one = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_one(m, backend="aot_eager"))
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), compile=True))
    task.load_weights()
    pair = [roles_of(tiny), randomise(Roles(task.backbone, 2, 0.25, 1.0))]
    task.prepare()
    for roles in pair:
        roles.use_checkpointing()
    graphs = []
    for alpha in (0.25, 0.2, 0.0, 0.1):  # as under a schedule
        for x in (inputs(), inputs(tokens=9)):
            numbers = []
            for roles in pair:
                roles.alpha_weak = alpha
                numbers.append(fake(roles, *x) | generator(roles, *x))
                with torch.no_grad():  # no adapter: for the backbone's films
                    numbers[-1]["plain"] = roles.backbone.velocity(*x[:3])
            for name in ("fake_loss", "relative_gap", "plain"):
                torch.testing.assert_close(numbers[0][name], numbers[1][name], rtol=1e-4, atol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0  # nothing is compiled for another alpha
    assert not torch._dynamo.utils.counters["graph_break"]
    for role in ("generator", "fake"):
        for name, g in gradients(pair[0], role).items():
            torch.testing.assert_close(gradients(pair[1], role)[name], g, rtol=1e-3, atol=1e-5)


# ---- the discriminator ---------------------------------------------------------------------------


def test_the_discriminator_reads_the_plain_transformer_s_last_double_stream_block(tiny):
    x, sigma, cond, _, _ = inputs()
    stock, seen = backbone(tiny), []
    stock.module.transformer_blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    with torch.no_grad():
        stock.velocity(x, sigma, cond)
    roles = roles_of(tiny)
    roles.backbone.module.single_transformer_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    d = w2svd.Discriminator(roles)
    expected = d.head(seen[0]).mean(dim=(1, 2))
    for role in (None, "generator"):
        with roles.use(role):
            torch.testing.assert_close(d.logit(x, sigma, cond), expected)
    assert len(roles.backbone.module.single_transformer_blocks) == 1


def test_a_backward_through_generator_and_discriminator_keeps_both_roles(tiny):
    def one(checkpointing):
        roles = roles_of(tiny)
        torch.manual_seed(0)
        w2svd.Discriminator(roles)
        if checkpointing:
            roles.use_checkpointing()
        stats = w2svd.generator_step(roles, *inputs(), gan_weight=5.0)
        return gradients(roles, "generator"), stats

    (plain, stats), (again, _) = one(False), one(True)
    assert torch.isfinite(stats["gan_loss"])
    without = roles_of(tiny)
    generator(without)
    without = gradients(without, "generator")
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
    assert any((plain[n] - without[n]).norm() > 0.01 * without[n].norm() for n in plain)


def test_every_named_method_runs_from_clips_and_resumes(train, capsys):
    methods = {
        "w2svd": "--gan-weight .01 --gan-r1 1",
        "dmd2": "--fake full --generator full --gan-weight .003",
        "dmd": "--alpha-weak 0",
        "lcm": "--objective lcm",
        "finetune": "--objective finetune",
        "regress": "--objective regress --steps 1",
    }
    for name, flags in methods.items():
        train(name, "--iterations", 2, *ODD, *flags.split())
        run("train", "--resume", "--out", name, "--iterations", 3)
        assert math.isfinite(lines(name)[-1]["grad_norm"])
    Path("captions.txt").write_text("a dog")
    for flags in ("--gan-weight .1", "--objective lcm"):
        fixed = "--model hunyuan --data captions.txt --generator-input rollout --out r".split()
        assert "clips" in refused(capsys, ".", "train", *fixed, *flags.split())


def test_a_finetuned_backbone_is_distilled_as_a_checkpoint(train, tiny):
    """The paper's two stages: the data's flow matching, merged, then the distillation."""
    train("first", "--iterations", 2, *ODD, "--objective", "finetune")
    run("export", "--run", "first", "--format", "merged", "--out", "merged")
    shutil.copytree(tiny, "stage")
    shutil.rmtree("stage/transformer")
    shutil.copytree("merged", "stage/transformer")
    train("second", "--iterations", 1, "--checkpoint", "stage")
    tensors, info = w2svd.read_safetensors("first/generator.safetensors")
    assert info["euler"] and info["sigmas"] == few_step_sigmas(28, 7.0).tolist()
    stage = HunyuanVideoTransformer3DModel.from_pretrained("stage/transformer").state_dict()
    for name, base in stock_transformer(tiny).state_dict().items():
        A = tensors.get(f"transformer.{name.replace('weight', 'lora_A.weight')}")
        if A is not None:
            B = tensors[f"transformer.{name.replace('weight', 'lora_B.weight')}"]
            assert not torch.equal(base, base + B @ A)
            torch.testing.assert_close(stage[name], base + B @ A)
        else:
            assert torch.equal(stage[name], base)
    scheduler = json.loads(Path("merged/scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == 7 and not scheduler["stochastic_sampling"]


def test_a_finetuned_generator_is_sampled_as_the_backbone_is(train, tiny, latents):
    train("r", "--iterations", 2, *ODD, "--objective", "finetune")
    latents.clear()
    run("sample", "--run", "r", "--prompt", "a dog", "--seed", 5, "--out", "a.mp4")
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)  # with its own scheduler, of shift 7
    pipe.load_lora_weights("r", weight_name="generator.safetensors")
    rng = torch.Generator().manual_seed(5)
    stock = stock_call(pipe, rng, num_inference_steps=28)
    assert (stock - latents[0]).abs().max() < 1e-5


# ---- the released architecture and its plan ------------------------------------------------------

SIZES = {480: (480, 832, 61), 544: (544, 960, 129), 720: (720, 1280, 129)}


def full_size(size, **settings):
    height, width, frames = SIZES[size]
    shape = {"height": height, "width": width, "frames": frames}
    return Config(model="hunyuan", checkpointing=True, **shape, **settings)


@pytest.mark.parametrize("size, pflop", [(480, 0.81), (544, 4.29), (720, 12.07)])
def test_the_plan_s_flops_are_those_that_torch_counts_in_the_13b_model(size, pflop):
    task = HunyuanTask(full_size(size))
    assert sum(p.numel() for p in task.backbone.module.parameters()) == 12_821_012_544
    with torch.device("meta"):
        x, sigma = torch.empty(1, *task.shape), torch.empty(1)
        cond = {"prompt_embeds": torch.empty(1, 256, 4096), "pooled": torch.empty(1, 768)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            task.backbone.velocity(x, sigma, cond)
    counted = {str(name): n / 1e15 for name, n in counter.get_flop_counts()["Global"].items()}
    attention = counted["aten.bmm"]
    linear = sum(counted.values()) - attention

    def plan(forwards, backwards):
        return task.costs(forwards, backwards, 0, 0)["PFLOP an iteration"]

    assert plan(1, 0) == pytest.approx(linear + attention, rel=1e-3)
    assert plan(1, 0) == pytest.approx(pflop, rel=0.01)
    # 7 forwards; of 6 more, recomputed, backwards: 1 times a linear layer, 2.5 times attention
    expected = linear * (7 + 6 * 3) + attention * (7 + 6 * 4.5)
    assert plan(7, 6) == pytest.approx(expected, rel=1e-3)


VARIED = "lora_rank", "fp8_base", "lora_targets", "gan_weight"


def named(row):
    settings = ["fp8" * row["fp8_base"], "offload" * row["offload"], row.get("lora_targets")]
    settings += ["gan" * ("gan_weight" in row), f"{row['room']}"]
    return "-".join(map(str, (row["height"], row["lora_rank"], *filter(None, settings))))


@pytest.mark.parametrize("row", SIMULATED["peaks"], ids=named)
def test_the_plan_s_memory_is_that_of_a_simulated_iteration(row):
    settings = {n: row[n] for n in VARIED if n in row}
    config = full_size(row["height"], **settings)
    machine = Machine(gpu_memory=row["room"], offload=row["offload"])
    numbers = w2svd.plan(config, HunyuanTask(config), machine)
    memory = numbers["GPU memory, GiB"]
    assert numbers["blocks that keep attention's results"] == row["keep"]
    assert numbers["in all, GiB"] == pytest.approx(sum(memory.values()))
    allocated = sum(memory.values()) - memory["CUDA, fragments"]
    assert allocated == pytest.approx(row["allocated_gib"], rel=0.05)
    assert allocated > row["allocated_gib"]  # what is free gets filled, so rather too much


@pytest.mark.parametrize(
    "size, offload, layers, worth",
    [
        (480, 0, "all", 26.73),
        (544, 0, "all", 31.36),
        (544, 1, "all", 27.36),
        (720, 1, "all", 30.97),
        (544, 0, "single", 22.57),
    ],
)
def test_an_iteration_s_worth_in_forwards_on_a_card_of_80_gb(size, offload, layers, worth):
    config = full_size(size, lora_targets=layers)
    machine = Machine(gpu_memory=79.0, offload=bool(offload))
    numbers = w2svd.plan(config, HunyuanTask(config), machine)
    per_rank = {"all": 4_300_800, "single": 2_088_960}[layers]
    assert numbers["generator_parameters"] == numbers["fake_parameters"] == 64 * per_rank
    assert numbers["forwards an iteration"] == {"without gradient": 7, "with gradient": 6}
    assert numbers["forwards' worth of an iteration"] == pytest.approx(worth, abs=0.06)


@pytest.mark.parametrize(
    "keep, settings",
    [(0, {}), (1, {}), (2, {"fake_updates": 3, "reuse": 3}), (1, {"lora_targets": "single"})],
)
def test_an_iteration_runs_the_forwards_of_the_plan(tiny, keep, settings):
    size = dict(zip(("height", "width", "frames"), (32, 48, 9)))
    config = Config(model="hunyuan", checkpoint=str(tiny), checkpointing=True, **size, **settings)
    task = HunyuanTask(config)
    without = w2svd.plan(config, task)["in all, GiB"]
    config_of = task.backbone.module.config
    tokens = math.prod(task.shape[1:]) + 256
    width = config_of.num_attention_heads * config_of.attention_head_dim
    kept = tokens * (2 * width + 4 * config_of.num_attention_heads) / 2**30
    numbers = w2svd.plan(config, task, Machine(gpu_memory=(without + (keep + 0.5) * kept) / 0.95))
    assert numbers["blocks that keep attention's results"] == keep

    layers = settings.get("lora_targets", "all")
    wrapped = HunyuanVideo(stock_transformer(tiny), Config(lora_targets=layers))
    roles = randomise(Roles(wrapped, 2, 0.25, 1.0))
    roles.backbone.keep = keep
    roles.use_checkpointing()
    blocks = roles.backbone.module.transformer_blocks[0], roles.backbone.blocks[-1]
    calls, attended = [], Kernels()
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    refined = []  # of the text, which the plan leaves out
    roles.backbone.module.context_embedder.register_forward_hook(lambda *_: refined.append(1))
    state = w2svd.State(config, roles, "cpu")
    batch = {"x0": torch.zeros(1, *task.shape), "cond": inputs()[2]}
    with attended:
        next(w2svd.distil(config, roles, state, iter(lambda: batch, None)))
    backwards = config.fake_updates + 1
    linear = 2 * tokens * (4 + 2 * config_of.mlp_ratio) * width**2
    attention = 4 * tokens**2 * width
    forward = attended.forward - len(refined)
    learning = 1 if layers == "single" else 2
    assert attended.backward == learning * backwards
    counted = linear * (len(calls) + learning * backwards)
    counted += attention * (forward + 2.5 * attended.backward)
    worth = counted / (2 * (linear + attention))
    assert numbers["forwards' worth of an iteration"] == pytest.approx(worth, rel=1e-6)


def test_the_plan_counts_what_the_objective_runs():
    def counted(**settings):
        config = full_size(544, **settings)
        numbers = w2svd.plan(config, HunyuanTask(config))
        memory = numbers["GPU memory, GiB"]
        found = numbers["forwards an iteration"]
        return found["without gradient"], found["with gradient"], memory

    forwards, backwards, plain = counted()
    assert (forwards, backwards) == (7, 6)
    # 5 fake updates: 2 looks of a third each at samples, one more for R1; one with a gradient
    for r1, looks in ((0.0, 10), (1.0, 15)):
        forwards, backwards, memory = counted(gan_weight=0.01, gan_r1=r1)
        assert forwards == pytest.approx(7 + looks / 3)
        assert backwards == pytest.approx(6 + 1 / 3)
        inputs = "inputs of the blocks"
        assert memory[inputs] == pytest.approx(plain[inputs] * 4 / 3)
    assert counted(objective="finetune")[:2] == (0, 1)
    assert counted(objective="regress", steps=1)[:2] == (28, 1)
    forwards, backwards, memory = counted(objective="lcm")
    assert (forwards, backwards) == (2, 1)
    weights = "generator and fake, float32"
    assert memory[weights] == plain[weights]  # the fake's adapter is there, though it rests


def test_what_does_not_fit_ends_with_1_and_the_cure(capsys):
    flags = ["train", "--model", "hunyuan", "--dry-run", "--gpu-memory"]
    said = refused(capsys, ".", *flags, 40, code=1)
    assert "--fp8-base" in said and "--frames" in said
    refused(capsys, ".", *flags, 80, "--height", 720, "--width", 1280, "--frames", 129, code=1)
    run(*flags, 80)
    assert "in all" in capsys.readouterr().out and not list(Path().iterdir())


# ---- train ---------------------------------------------------------------------------------------


def test_a_run_logs_every_number_and_leaves_pictures_and_generators(trained):
    rows = lines(trained)
    names = "fake_loss relative_gap cos_fake_real gen_mean gen_std data_std gen_motion data_motion"
    names += " std_ratio motion_ratio grad_norm fake_grad_norm alpha_weak"
    assert [row["step"] for row in rows] == [2, 4] and set(names.split()) <= rows[0].keys()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert json.loads((trained / "result.json").read_text())["student"]["steps"] == 4
    found, info = read_safetensors(trained / "generator.safetensors")
    assert info["sigmas"] == few_step_sigmas(4, 4.0).tolist()
    assert info["embedded_guidance"] == 3 and info["rank"] == 2 and info["step"] == 4
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in found
    assert len(found) == 2 * LINEARS
    names = {path.stem for path in (trained / "samples").iterdir()}
    captions = sorted(name[9:] for name in names if name[:6] == "000004")
    assert captions == ["a-dog", "a-red-square", "a-woman-talks"]
    plain = {name for name in names if "backbone" not in name}
    last = [name[6:] for name in names if name[:6] == "000004"]
    assert plain == {f"{step}{end}" for step in ("000000", "000002", "000004") for end in last}
    assert sum("backbone" in name for name in names) == 3
    for path in (trained / "samples").iterdir():
        assert iio.imread(path).shape == (9, 32, 48, 3)


def test_films_on_the_way_are_the_averaged_generator_s_on_the_run_s_grid(train, monkeypatch):
    seen = []

    def spy(task, path, velocity, sigmas, cond, seed, euler=False):
        v = velocity(*inputs()[:3]).detach()
        seen.append((path.name, v, sigmas, cond, seed, euler))

    Path("prompts.txt").write_text("a red dog/cat, blue?\n\nthe dog\n")
    monkeypatch.setattr(HunyuanTask, "film", spy)
    train("r", "--iterations", 4, "--seed", 5, *ODD, "--sample-prompts", "prompts.txt")
    one, two = "0-a-red-dog-cat-blue", "1-the-dog"
    names = [f"000000-{n}{end}.mp4" for n in (one, two) for end in ("", "-backbone")]
    names += [f"{step}-{n}.mp4" for step in ("000002", "000004") for n in (one, two)]
    assert [name for name, *_ in seen] == names
    config = w2svd.read_run("r")
    assert Path(config.sample_prompts).is_absolute()
    pipe = HunyuanVideoPipeline.from_pretrained(config.checkpoint)
    conds = [w2svd.encode_text(pipe, text) for text in ("a red dog/cat, blue?", "the dog")]
    for name, v, sigmas, shown, seed, euler in seen:
        roles = roles_of(config.checkpoint)
        roles.backbone.guidance, expected = 3.0, roles.backbone.velocity
        if step := int(name[:6]):
            roles.load("generator", w2svd.read_generator("r", step)[0])
            expected = roles.generator
        torch.testing.assert_close(v, expected(*inputs()[:3]).detach())
        assert torch.equal(sigmas, few_step_sigmas(4, 4.0)) and seed == 5
        assert euler == ("backbone" in name)
        cond = conds["dog.mp4" in name.replace("-backbone", "") and "1-the" in name]
        assert all(torch.equal(shown[name], cond[name]) for name in cond)


def test_without_prompts_four_clips_captions_are_filmed_by_a_fixed_draw(tiny, clips, monkeypatch):
    monkeypatch.setattr(HunyuanTask, "load_weights", lambda task, split: None)
    files = [Path(f"{i}") for i in range(9)]
    monkeypatch.setattr(w2svd, "encoded_clips", lambda config, form: files)
    drawn = []
    for seed in (0, 1):
        task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), seed=seed))
        task.load()
        drawn.append(task.filmed)
    assert drawn[0] == drawn[1] != files[:4] and len(set(drawn[0])) == 4


def test_each_clip_is_read_once_in_an_epoch_also_by_a_run_that_goes_on(train, monkeypatch):
    reads, read = [], HunyuanTask.read

    def spy(task, clip):
        reads.append(clip.name[0])
        return read(task, clip)

    monkeypatch.setattr(HunyuanTask, "read", spy)
    monkeypatch.setattr(HunyuanTask, "on_log", lambda *args: None)
    train("r", "--iterations", 4, "--save-every", 1)  # 3 clips in each iteration, 4 epochs
    whole = list(reads)
    assert [set(whole[i : i + 3]) for i in (0, 3, 6, 9)] == [{"a", "b", "c"}] * 4
    assert len({tuple(whole[i : i + 3]) for i in (0, 3, 6, 9)}) > 1
    reads.clear()
    train("parts", "--iterations", 1, "--fake-updates", 1)  # 2 clips: within an epoch
    run("train", "--resume", "--out", "parts", "--iterations", 6)
    assert reads == whole
    reads.clear()
    train("other", "--iterations", 4, "--seed", 1)
    assert sorted(reads) == sorted(whole) and reads != whole


@pytest.mark.parametrize(
    "flags",
    [[], ["--fp8-base"], ["--generator", "full", "--fake", "full"]],
    ids=["lora", "fp8", "full"],
)
def test_n_iterations_resumed_for_n_more_equal_2n(train, flags, monkeypatch):
    train("whole", "--iterations", 4, *ODD, *flags)
    train("parts", "--iterations", 2, *ODD, *flags)
    parts = Path("parts").resolve()
    (parts.parent / "away").mkdir()
    monkeypatch.chdir("away")  # data and checkpoint were given once
    run("train", "--resume", "--out", parts, "--iterations", 4)
    for name in ("checkpoint-000004", "generator-000004", "generator"):
        name = f"{name}.safetensors"
        assert same_bits(parts.parent / "whole" / name, parts / name)
    assert lines(parts.parent / "whole") == lines(parts)


def test_a_failed_picture_comes_after_its_checkpoint(train, monkeypatch, capsys):
    def fail(task, path, *args, **how):
        if path.name[:6] > "000000":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(HunyuanTask, "film", fail)
        train("r", "--iterations", 4, code=2)
    assert "GPU memory" in capsys.readouterr().err.strip().splitlines()[-1]
    assert Path("r/checkpoint-000002.safetensors").exists()
    assert Path("r/generator-000002.safetensors").exists()
    run("train", "--resume", "--out", "r")
    assert [row["step"] for row in lines("r")] == [2, 4]
    assert len(list(Path("r/samples").glob("000002-*.mp4"))) == 3


# ---- sample --------------------------------------------------------------------------------------


@pytest.fixture
def latents(monkeypatch):
    """What the two samplers returned, in order."""
    drawn = []

    def spied(sampler):
        def sample(*args):
            drawn.append(sampler(*args))
            return drawn[-1]

        return sample

    monkeypatch.setattr(w2svd, "few_step_sample", spied(w2svd.few_step_sample))
    monkeypatch.setattr(w2svd, "euler_sample", spied(w2svd.euler_sample))
    return drawn


def one_stream(monkeypatch, seed):
    """A generator for a stock pipeline's noise, from which its scheduler's renoising draws too."""
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as source

    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(randn_tensor, generator=rng)
    monkeypatch.setattr(source, "randn_tensor", lambda *args, generator, **how: draw(*args, **how))
    return rng


def stock_call(pipe, rng, prompt="a dog", **how):
    """Latents of a stock pipeline."""
    size = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0}
    how |= {"prompt_template": TEMPLATE, "generator": rng} | size
    return pipe(prompt, output_type=how.pop("output_type", "latent"), **how).frames


def few_steps(pipe):
    pipe.scheduler = Scheduler(shift=1.0, stochastic_sampling=True)
    return {"sigmas": few_step_sigmas(4, 4.0)[:-1].tolist()}


def test_sample_is_the_stock_pipeline_with_the_run_s_lora(tiny, trained, latents, monkeypatch):
    written, write = [], iio.imwrite

    def spy(path, frames, **how):
        written.append(torch.from_numpy(frames))
        return write(path, frames, **how)

    monkeypatch.setattr(iio, "imwrite", spy)
    run("sample", "--run", trained, "--prompt", "a dog", "--seed", 5, "--out", "dog.mp4")
    assert iio.imread("dog.mp4").shape == (9, 32, 48, 3)
    assert iio.immeta("dog.mp4", plugin="FFMPEG")["fps"] == 12
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(trained, weight_name="generator.safetensors")
    grid = few_steps(pipe)
    stock = stock_call(pipe, one_stream(monkeypatch, 5), **grid)
    assert (stock - latents[0]).abs().max() < 1e-5
    frames = stock_call(pipe, one_stream(monkeypatch, 5), output_type="np", **grid)[0]
    assert (written[0].float() - 255 * torch.from_numpy(frames)).abs().max() < 1
    assert written[0].float().std() > 1


def test_seed_and_iteration_change_the_sample(trained, latents):
    def drawn(*flags):
        run("sample", "--run", trained, "--prompt", "a dog", "--out", "a.mp4", *flags)
        return latents[-1]

    one = drawn()
    assert torch.equal(one, drawn("--seed", 0, "--at", 4))
    for flags in (["--seed", 1], ["--at", 2], ["--prompt", "a woman"], ["--prompt", "the"]):
        assert (one - drawn(*flags)).abs().max() > 1e-3


def test_another_size_and_step_count_are_drawn_with_a_word(trained, latents, capsys, tiny):
    flags = "--height 48 --width 32 --frames 5 --steps 3 --prompt dog --out a.mp4".split()
    run("sample", "--run", trained, *flags)
    said = capsys.readouterr().out
    for word in ("--height 48", "--width 32", "--frames 5", "--steps 3", "trained with 9"):
        assert word in said
    assert iio.imread("a.mp4").shape == (5, 48, 32, 3) and latents[0].shape == (1, 4, 2, 6, 4)
    roles = roles_of(tiny)
    roles.backbone.guidance = 3.0
    roles.load("generator", w2svd.read_generator(trained)[0])
    cond = w2svd.encode_text(HunyuanVideoPipeline.from_pretrained(tiny), "dog")
    rng = torch.Generator().manual_seed(0)
    noise, grid = torch.randn(1, 4, 2, 6, 4, generator=rng), few_step_sigmas(3, 4.0)
    assert torch.equal(latents[0], w2svd.few_step_sample(roles.generator, noise, grid, cond, rng))
    run("sample", "--run", trained, "--height", 32, "--prompt", "dog", "--out", "a.mp4")
    assert "trained with" not in capsys.readouterr().out


def test_a_negative_prompt_is_the_stock_pipeline_s_true_guidance(
    tiny, trained, latents, monkeypatch
):
    flags = ["--prompt", "a dog", "--negative-prompt", "red woman", "--cfg", 3, "--out", "a.mp4"]
    run("sample", "--run", trained, *flags)
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(trained, weight_name="generator.safetensors")
    how = few_steps(pipe) | {"negative_prompt": "red woman", "true_cfg_scale": 3.0}
    stock = stock_call(pipe, one_stream(monkeypatch, 0), **how)
    assert (stock - latents[0]).abs().max() < 2e-5
    run("sample", "--run", trained, "--prompt", "a dog", "--out", "a.mp4")
    assert (latents[1] - latents[0]).abs().max() > 1e-3


def test_a_weight_alone_leads_away_from_the_empty_prompt(trained, latents, monkeypatch):
    template = {"template": "red {}", "crop_start": 0}
    monkeypatch.setattr(HunyuanVideo, "prompt_template", template)
    given = ["sample", "--run", trained, "--prompt", "a dog", "--out", "a.mp4"]
    for flags in ([], ["--cfg", 3], ["--negative-prompt", "", "--cfg", 3]):
        run(*given, *flags)
    assert torch.equal(latents[1], latents[2])
    assert (latents[1] - latents[0]).abs().max() > 1e-3


def test_an_empty_prompt_is_a_prompt(trained, monkeypatch):
    template = {"template": "red {}", "crop_start": 0}
    monkeypatch.setattr(HunyuanVideo, "prompt_template", template)
    run("sample", "--run", trained, "--prompt", "", "--out", "a.mp4")
    assert Path("a.mp4").stat().st_size


def test_a_checkpoint_that_moved_is_named_again(tiny, trained, latents, capsys):
    shutil.copytree(trained, "r")
    config = json.loads(Path("r/config.json").read_text())
    config["config"]["checkpoint"] = str(Path("gone").resolve())
    Path("r/config.json").write_text(json.dumps(config))
    given = ["sample", "--run", "r", "--prompt", "a dog", "--out", "a.mp4"]
    assert "--checkpoint" in refused(capsys, ".", *given)
    run(*given, "--checkpoint", tiny)
    run("sample", "--run", trained, *given[3:])
    assert torch.equal(latents[0], latents[1])
    for format in ("diffusers", "merged"):
        flags = ["--run", "r", "--format", format, "--out", format]
        assert "--checkpoint" in refused(capsys, ".", "export", *flags)
        run("export", *flags, "--checkpoint", tiny)


def test_sample_refuses_what_it_cannot_do(trained, capsys):
    prompt = ["sample", "--run", trained, "--prompt", "a"]
    refused(capsys, ".", *prompt, "--out", "a.png")
    refused(capsys, ".", *prompt, "--out", "a.mp4", "--n", 3)
    refused(capsys, ".", *prompt, "--out", "a.mp4", "--at", 3)
    refused(capsys, ".", "sample", "--run", trained, "--out", "a.mp4")


# ---- export --------------------------------------------------------------------------------------


def export(run_folder, format, *flags):
    run("export", "--run", run_folder, "--format", format, "--out", format, *flags)


def test_the_card_s_code_draws_our_latents_with_the_exported_lora(tiny, trained):
    export(trained, "diffusers")
    with safe_open("diffusers/pytorch_lora_weights.safetensors", "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == 2
    card = Path("diffusers/README.md").read_text()
    for said in (str(tiny), "licence", "alpha_weak\n0.25", "in 4 steps", "rank 2"):
        assert said in card
    lines = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    code = "\n".join(line for line in lines if "export_to_video(" not in line)
    code = code.replace("this folder", "diffusers").replace('.to("cuda")', "")
    code = code.replace("torch.bfloat16", "torch.float32")
    code = code.replace('"a woman talks"', '"a dog", output_type="latent", **how')
    names = {"how": {"prompt_template": TEMPLATE}}
    exec(code, names)
    pipe = names["pipe"]
    assert pipe.scheduler.sigmas.tolist() == few_step_sigmas(4, 4.0).tolist()
    tensors, info = w2svd.read_generator(trained)
    roles = roles_of(tiny)
    roles.backbone.guidance = 3.0
    roles.load("generator", tensors)
    cond = w2svd.encode_text(pipe, "a dog")
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    ours = w2svd.few_step_sample(roles.generator, noise, torch.tensor(info["sigmas"]), cond)
    assert (names["video"] - ours[0]).abs().max() < 1e-5


def test_merged_weights_are_the_backbone_with_its_adapter(tiny, trained, capsys):
    export(trained, "merged", "--at", 2)
    price = re.search(r"([\d.]+)% of what was learnt", capsys.readouterr().out)
    lost, card = float(price[1]) / 100, Path("merged/README.md").read_text()
    assert price[0] in card and "set_adapters" not in card
    merged = HunyuanVideo(HunyuanVideoTransformer3DModel.from_pretrained("merged"), Config())
    roles = roles_of(tiny)
    roles.load("generator", w2svd.read_generator(trained, 2)[0])
    with torch.no_grad():
        ours, theirs = roles.generator(*inputs()[:3]), merged.velocity(*inputs()[:3])
        plain = roles.backbone.velocity(*inputs()[:3])
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (ours - plain).abs().max()
    exact, base = merged.module.state_dict(), stock_transformer(tiny).state_dict()
    learnt = torch.cat([(exact[n] - base[n]).flatten() for n in base])
    changed = [exact[n] for n in base if not torch.equal(exact[n], base[n])]
    rounded = torch.cat([(x.bfloat16() - x).flatten() for x in changed])
    assert lost == pytest.approx(float(rounded.norm() / learnt.norm()), abs=1e-3)
    assert 0 < lost < 1
    run("export", "--run", trained, "--format", "merged", "--out", "half", "--dtype", "bfloat16")
    half = HunyuanVideoTransformer3DModel.from_pretrained("half", dtype=torch.bfloat16)
    assert half.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exported_adapters_have_the_dtype_that_was_asked_for(trained, dtype):
    ours = w2svd.read_generator(trained)[0]
    for format, name in (("diffusers", "pytorch_lora_weights"), ("comfyui", "w2svd_comfyui")):
        run("export", "--run", trained, "--format", format, "--out", format, "--dtype", dtype)
        found = read_safetensors(f"{format}/{name}.safetensors")[0]
        assert {x.dtype for x in found.values() if x.ndim} == {getattr(torch, dtype)}
        if format == "diffusers":
            assert all(torch.equal(x, ours[n].to(x.dtype)) for n, x in found.items())


def read_comfyui(found, width, mlp):
    """{our layer: B A} out of a file in HunyuanVideo's own names, as a program applies it.

    Written from the released checkpoint's layout alone: the rows of a fused layer are q, k, v and,
    in single blocks, the first half of the MLP. Strength is alpha / rank.
    """
    attention = [(f"to_{x}", width) for x in "qkv"], [(f"add_{x}_proj", width) for x in "qkv"]
    rows = {
        "img_attn_qkv": [(f"attn.{n}", k) for n, k in attention[0]],
        "txt_attn_qkv": [(f"attn.{n}", k) for n, k in attention[1]],
        "linear1": [(f"attn.{n}", k) for n, k in attention[0]] + [("proj_mlp", mlp)],
        "linear2": [("proj_out", width)],
        "img_attn_proj": [("attn.to_out.0", width)],
        "txt_attn_proj": [("attn.to_add_out", width)],
    }
    for stream, ours in (("img", "ff"), ("txt", "ff_context")):
        rows[f"{stream}_mlp.fc1"] = [(f"{ours}.net.0.proj", mlp)]
        rows[f"{stream}_mlp.fc2"] = [(f"{ours}.net.2", width)]
    updates = {}
    for name in [name for name in found if name.endswith("lora_A.weight")]:
        prefix = name.removesuffix(".lora_A.weight")
        program, kind, i, layer = prefix.split(".", 3)
        assert program == "diffusion_model"
        A, B = found[name], found[f"{prefix}.lora_B.weight"]
        update = B @ A * (found[f"{prefix}.alpha"] / len(A))
        block = {
            "double_blocks": "transformer_blocks",
            "single_blocks": "single_transformer_blocks",
        }
        for part, piece in zip(rows[layer], update.split([k for _, k in rows[layer]])):
            updates[f"transformer.{block[kind]}.{i}.{part[0]}"] = piece
    return updates


def assert_reads_back(found, ours, width, mlp):
    updates = read_comfyui(found, width, mlp)
    layers = [name.removesuffix(".lora_A.weight") for name in ours if "lora_A" in name]
    assert set(layers) == updates.keys()
    for layer in layers:
        A, B = (ours[f"{layer}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(updates[layer], B @ A, rtol=1e-5, atol=1e-6)


def test_a_second_reader_of_comfyui_s_names_finds_the_same_updates(trained):
    export(trained, "comfyui")
    found, _ = read_safetensors("comfyui/w2svd_comfyui.safetensors")
    assert len(found) == 3 * (8 + 2)  # fused layers of a double and of a single block
    assert_reads_back(found, w2svd.read_generator(trained)[0], 20, 80)


@pytest.mark.parametrize("targets", ["all", "single"])
def test_at_the_width_of_the_released_model_too(targets):
    """One block of each kind, 3072 wide, rank 4."""
    Model = HunyuanVideoTransformer3DModel
    with torch.device("meta"):
        module = Model(num_layers=1, num_single_layers=1, num_refiner_layers=1)
        roles = Roles(HunyuanVideo(module, Config(lora_targets=targets)), 4, 0.25, 1.0)
    rng = torch.Generator().manual_seed(0)
    shapes = {f"transformer.{n}": p.shape for n, p in roles.state("generator").items()}
    ours = {n: torch.randn(shape, generator=rng) for n, shape in shapes.items()}
    assert len(ours) == 2 * (LINEARS if targets == "all" else 5)
    assert_reads_back(w2svd.to_comfyui(ours), ours, 3072, 12288)


def test_diffusers_reads_the_comfyui_file_s_double_blocks_and_refuses_its_alphas(trained, tiny):
    export(trained, "comfyui")
    found, _ = read_safetensors("comfyui/w2svd_comfyui.safetensors")
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    with pytest.raises((RuntimeError, ValueError)):  # aloud, where it would apply a third
        pipe.load_lora_weights("comfyui", weight_name="w2svd_comfyui.safetensors")
    double = {n.removeprefix("diffusion_model."): x for n, x in found.items() if "double" in n}
    double = {n: x for n, x in double.items() if not n.endswith(".alpha")}
    read = _convert_hunyuan_video_lora_to_diffusers(double)
    expected = w2svd.read_generator(trained)[0]
    names = [n for n in expected if ".transformer_blocks" in n and "lora_A" in n]
    assert len(names) == 12
    for A in names:
        B = A.replace("lora_A", "lora_B")
        torch.testing.assert_close(read[B] @ read[A], expected[B] @ expected[A])


def test_the_comfyui_file_s_fused_layers_hold_the_same_numbers_and_zeros(trained):
    export(trained, "comfyui")
    found, _ = read_safetensors("comfyui/w2svd_comfyui.safetensors")
    ours, _ = w2svd.read_generator(trained)
    qkv, added = (["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"])
    for layer, block, parts, rows in (
        ("double_blocks.0.img_attn_qkv", "transformer_blocks.0.attn.", qkv, 60),
        ("double_blocks.0.txt_attn_qkv", "transformer_blocks.0.attn.", added, 60),
        ("single_blocks.0.linear1", "single_transformer_blocks.0.attn.", qkv, 60 + 80),
    ):
        A, B = (found.pop(f"diffusion_model.{layer}.lora_{x}.weight") for x in "AB")
        assert found.pop(f"diffusion_model.{layer}.alpha") == len(A)
        names = [f"transformer.{block}{part}" for part in parts]
        if rows > 60:
            names.append("transformer.single_transformer_blocks.0.proj_mlp")
        assert A.shape == (2 * len(names), 20) and B.shape == (rows, 2 * len(names))
        for k, name in enumerate(names):
            here, size = slice(2 * k, 2 * k + 2), 80 if name.endswith("mlp") else 20
            assert torch.equal(A[here], ours.pop(f"{name}.lora_A.weight"))
            assert torch.equal(B[20 * k : 20 * k + size, here], ours.pop(f"{name}.lora_B.weight"))
            B[20 * k : 20 * k + size, here] = 0
        assert not B.any()
    found = [x for name, x in found.items() if not name.endswith(".alpha")]
    assert sorted(x.sum() for x in found) == sorted(x.sum() for x in ours.values())


def test_a_generator_trained_in_full_is_sampled_and_merged(train, tiny, capsys, latents):
    train("r", "--iterations", 2, "--generator", "full", *ODD)
    latents.clear()
    run("sample", "--run", "r", "--prompt", "a dog", "--out", "dog.mp4")
    export("r", "merged")
    merged = HunyuanVideoTransformer3DModel.from_pretrained("merged").state_dict()
    average, base = w2svd.read_generator("r")[0], stock_transformer(tiny).state_dict()
    assert all(torch.equal(merged[name], average[name]) for name in merged)
    assert not torch.equal(merged["proj_out.weight"], base["proj_out.weight"])
    for format in ("diffusers", "comfyui"):
        said = refused(capsys, ".", "export", "--run", "r", "--format", format, "--out", "lora")
        assert "--format merged" in said


def test_a_folder_in_use_is_not_exported_into(trained, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    flags = ["--run", trained, "--format", "merged", "--out"]
    assert "in use" in refused(capsys, ".", "export", *flags, "mine")
    assert "in use" in refused(capsys, ".", "export", *flags, "mine/thesis.txt")


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--height 100", "multiples of 16"),
        ("--frames 60", "4 k + 1"),
        ("--frames 1", "4 k + 1"),
        ("--batch 2", "--accumulate"),
        ("--guidance 3", "--guidance"),
        ("--checkpoint nowhere", "nowhere"),
        ("--fps 0", "--fps"),
        ("--embedded-guidance nan", "--embedded-guidance"),
        ("--compile --fp8-base", "--compile"),
        ("--generator-input paired --data captions.txt", "rollout"),
    ],
)
def test_bad_settings_are_refused(tiny, clips, capsys, flags, says):
    fixed = ["train", "--model", "hunyuan", "--data", clips, "--checkpoint", tiny, "--out", "r"]
    assert says in refused(capsys, ".", *fixed, *flags.split())


def test_a_checkpoint_that_is_not_hunyuanvideo_is_refused(clips, tiny, capsys):
    config = json.loads((tiny / "transformer/config.json").read_text())
    Path("other/transformer").mkdir(parents=True)
    for change in (
        {"_class_name": "WanTransformer3DModel"},
        {"image_condition_type": "latent_concat"},
        {"patch_size_t": 2},
        {"in_channels": 33},
    ):
        Path("other/transformer/config.json").write_text(json.dumps(config | change))
        flags = ["--model", "hunyuan", "--data", clips, "--checkpoint", "other"]
        assert "other is no HunyuanVideo" in refused(capsys, ".", "train", *flags)


def test_a_damaged_generator_is_refused(trained, capsys):
    shutil.copytree(trained, "run")
    path = Path("run/generator-000004.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    for command in ("sample --prompt a --out a.mp4", "export --format merged --out lora"):
        assert path.name in refused(capsys, ".", *command.split(), "--run", "run")
    run("sample", "--run", "run", "--prompt", "a", "--out", "a.mp4", "--at", 2)


# ---- the workflow for ComfyUI --------------------------------------------------------------------


def test_the_workflow_is_a_whole_graph_with_the_card_s_settings(trained):
    """Every link leads to a node; the sampler is ours, its levels come from the shifted model."""
    path = Path(__file__).parent.parent / "notebooks/comfyui_workflow_api.json"
    graph = json.loads(path.read_text())
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in graph and value[0] != node, node

    def one(kind):
        (node,) = [node for node in graph.values() if node["class_type"] == kind]
        return node["inputs"]

    def feeds(kind, name):
        return graph[one(kind)[name][0]]["class_type"]

    assert feeds("ModelSamplingSD3", "model") == "LoraLoaderModelOnly"
    assert feeds("BasicScheduler", "model") == feeds("BasicGuider", "model") == "ModelSamplingSD3"
    assert feeds("BasicGuider", "conditioning") == "FluxGuidance"
    assert one("KSamplerSelect")["sampler_name"] == "lcm"
    assert one("LoraLoaderModelOnly")["strength_model"] == 1
    config = Config(model="hunyuan")
    assert one("ModelSamplingSD3")["shift"] == config.shift
    assert one("BasicScheduler")["steps"] == config.steps
    assert one("BasicScheduler")["scheduler"] == "simple"
    assert one("FluxGuidance")["guidance"] == config.embedded_guidance
    size = one("EmptyHunyuanLatentVideo")
    assert [size[n] for n in ("height", "width", "length")] == [480, 832, 61]
    export(trained, "comfyui")
    card = Path("comfyui/README.md").read_text()
    for node in graph.values():
        if node["class_type"] in ("LoraLoaderModelOnly", "ModelSamplingSD3", "BasicScheduler"):
            assert node["class_type"] in card
    assert (
        one("LoraLoaderModelOnly")["lora_name"] == next(Path("comfyui").glob("*.safetensors")).name
    )
