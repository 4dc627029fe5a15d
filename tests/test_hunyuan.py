"""HunyuanVideo from clips to LoRA files, on a tiny pipeline that the tests build and save.

Against: diffusers' own pipeline and transformer, padded text with its mask, backward without
checkpointing, an uninterrupted run, the released architecture on the meta device. Run with
`python -m pytest tests/test_hunyuan.py`; about 2 minutes.
"""

import csv
import json
import math
import resource
import signal
from pathlib import Path

import hunyuan
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from hunyuan import HunyuanVideo
from safetensors import safe_open
from test_refusals import refused
from test_train import lines, run, same_bits, tensors
from torch.utils.flop_counter import FlopCounterMode

import w2svd
from toy.tiny_hunyuan import film, save_tiny
from w2svd import Config, Roles, fake_step, few_step_sample, generator_step

PLAIN = ["--prompt-template", "{}", "--prompt-crop-start", 0]
SIZE = ["--height", 32, "--width", 48, "--frames", 9, "--fps", 12]
SHAPE = (4, 3, 4, 6)  # of the latents
README = (Path(__file__).parent.parent / "README.md").read_text()
SMALL = ["--lora-rank", 2, "--fake-updates", 2, "--log-every", 2, "--save-every", 2]
FAST = ["--generator-lr", 0.02, "--fake-lr", 0.02, "--ema", 0]  # so that a few steps show


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def encoded(tiny, tmp_path_factory):
    """A folder of two encoded clips."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("one", "two"):
        film(folder / f"{name}.mp4", frames=40 if name == "one" else 33)
        (folder / f"{name}.txt").write_text("a red square moves to the left\n")
    encode(tiny, "--videos", folder, "--out", folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def trained(encoded, tmp_path_factory):
    """A finished run whose adapter does something."""
    folder = tmp_path_factory.mktemp("runs") / "portrait"
    train(encoded, folder, "--iterations", 4, *FAST)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def encode(tiny, *flags, code=0):
    run("encode", "--model", "hunyuan", "--checkpoint", tiny, *PLAIN, *SIZE, *flags, code=code)


def train(data, out, *flags, code=0):
    run("train", "--model", "hunyuan", "--data", data, "--out", out, *SMALL, *flags, code=code)


def backbone(tiny, dtype=torch.float32, **settings):
    module = HunyuanVideoTransformer3DModel.from_pretrained(
        tiny, subfolder="transformer", dtype=dtype
    )
    return HunyuanVideo(Config(**settings), module.requires_grad_(False), dtype)


def roles_of(tiny, dtype=torch.float32, rank=2, **settings):
    roles = Roles(backbone(tiny, dtype, **settings), rank, 0.25, 1.0)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in roles.parameters("generator") + roles.parameters("fake"):
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return roles


def inputs(tokens=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x0, x_in, eps = torch.randn(3, 1, *SHAPE, generator=rng)
    cond = {"prompt_embeds": torch.randn(1, tokens, 16, generator=rng),
            "pooled": torch.randn(1, 8, generator=rng)}  # fmt: skip
    return {"x0": x0, "cond": cond}, x_in, torch.tensor([0.9375]), torch.tensor([0.6]), eps


def gradients(roles, role):
    return {n: p.grad.clone() for n, p in roles.state(role).items() if p.grad is not None}


# ---- the backbone --------------------------------------------------------------------------------


def test_the_velocity_is_the_stock_transformer_s_with_padded_text_and_its_mask(tiny):
    ours = backbone(tiny)
    stock = HunyuanVideoTransformer3DModel.from_pretrained(tiny, subfolder="transformer")
    batch, x_t, sigma, _, _ = inputs()
    text, mask = batch["cond"]["prompt_embeds"], torch.zeros(1, 12)
    mask[:, :5] = 1
    padded = torch.cat([text, torch.randn(1, 7, 16)], dim=1)
    with torch.no_grad():
        v = ours.velocity(x_t, sigma, batch["cond"])
        expected = stock(x_t, 1000 * sigma, padded, mask, batch["cond"]["pooled"],
                         torch.tensor([6000.0]), return_dict=False)[0]  # fmt: skip
    assert (v - expected).abs().max() < 2e-6 * max(1, expected.abs().max())


def test_no_mask_reaches_attention_in_any_role(tiny, monkeypatch):
    import diffusers.models.transformers.transformer_hunyuan_video as source

    seen, attend = [], source.dispatch_attention_fn

    def spy(*args, attn_mask=None, **how):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **how)

    monkeypatch.setattr(source, "dispatch_attention_fn", spy)
    roles = roles_of(tiny)
    roles.use_checkpointing()
    generator_step(roles, *inputs())
    assert len(seen) == 2 * (3 + 1) and set(seen) == {None}  # 2 blocks; 3 forwards, recomputed 1


def test_guidance_and_timestep_are_the_stock_pipeline_s_in_bf16(tiny):
    ours, seen = backbone(tiny, torch.bfloat16), {}
    ours.module.register_forward_pre_hook(lambda m, args, how: seen.update(how), with_kwargs=True)
    batch, x_t, _, _, _ = inputs()
    ours.velocity(x_t, torch.tensor([0.9545]), batch["cond"])
    assert float(seen["guidance"]) == 6016 and seen["guidance"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.float32 and float(seen["timestep"]) == 954.5


def test_adapters_are_float32_and_compute_in_bf16_on_a_bf16_base(tiny):
    roles, dtypes = roles_of(tiny, torch.bfloat16), set()
    for layer in roles.layers:
        for linear in (layer.lora_A["fake"], layer.lora_B["fake"]):
            linear.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    fake_step(roles, *inputs())
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in roles.parameters("fake"))
    state = w2svd.State(Config(model="hunyuan"), roles, "cpu")
    state.update("fake", 1e-3, 1.0)
    slots = state.optimizers["fake"].state.values()
    assert all(x.dtype == torch.float32 for slot in slots for x in slot.values())


@pytest.mark.parametrize("fp8", [False, True])
def test_checkpointing_recomputes_under_the_role_of_the_forward(tiny, fp8):
    def run(checkpointing, moved):
        roles = roles_of(tiny)
        if fp8:
            roles.backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        if checkpointing:
            roles.use_checkpointing()
        batch, x_in, sigma_in, _, _ = inputs()
        v = roles.generator(x_in, sigma_in, batch["cond"])  # the role ends here
        with roles.use("fake" if moved else "generator"):
            v.square().sum().backward()
        return gradients(roles, "generator")

    plain, again, elsewhere = run(False, False), run(True, False), run(True, True)
    assert len(plain) == 2 * (12 + 5)
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(plain[name], elsewhere[name], rtol=1e-4, atol=1e-6)


def test_without_the_context_the_gradient_is_wrong(tiny, monkeypatch):
    def run(context):
        roles = roles_of(tiny)
        roles.use_checkpointing()
        if not context:
            naive = torch.utils.checkpoint.checkpoint
            roles.backbone.checkpoint_with(lambda f, *args: naive(f, *args, use_reentrant=False))
        batch, x_in, sigma_in, _, _ = inputs()
        v = roles.fake(x_in, sigma_in, batch["cond"])
        with roles.use("real"):  # the same adapter at another scale: no shape or dtype tells
            v.square().sum().backward()
        return torch.cat([g.flatten() for g in gradients(roles, "fake").values()])

    right, wrong = run(True), run(False)
    assert (right - wrong).norm() / right.norm() > 0.05


def test_fp8_keeps_the_base_in_8_bits_and_the_adapters_in_32(tiny, encoded):
    task = hunyuan.task(Config(model="hunyuan", **hunyuan.encoded_with(encoded),
                               data=str(encoded), fp8_base=True))  # fmt: skip
    task.load()
    before = task.backbone.module.get_memory_footprint()
    roles = Roles(task.backbone, 2, 0.25, 1.0)
    task.prepare()
    base = {n: p.dtype for n, p in task.backbone.module.named_parameters() if not p.requires_grad}
    linears = [n for n in base if "_blocks.0.attn.to_q" in n and "refiner" not in n]
    assert linears and all(base[n] == torch.float8_e4m3fn for n in linears)
    assert all(p.dtype == torch.float32 for p in roles.parameters("generator"))
    assert task.backbone.module.get_memory_footprint() < before
    x = inputs()
    with torch.no_grad():
        v = roles.generator(x[1], x[2], x[0]["cond"])
        exact = backbone(task.config.checkpoint).velocity(x[1], x[2], x[0]["cond"])
    assert 0 < (v - exact).norm() / exact.norm() < 0.1
    fake_step(roles, *x)
    assert gradients(roles, "fake") and not gradients(roles, "generator")


def test_compiled_blocks_give_the_same_numbers_in_every_role(tiny, encoded, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compile_one = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_one(m, backend="aot_eager"))
    task = hunyuan.task(Config(model="hunyuan", data=str(encoded), compile=True,
                               **hunyuan.encoded_with(encoded)))  # fmt: skip
    task.load()
    pair = [roles_of(tiny), Roles(task.backbone, 2, 0.25, 1.0)]
    task.prepare()
    for role in ("generator", "fake"):
        pair[1].load(role, pair[0].state(role))
    for roles in pair:
        roles.use_checkpointing()
    short, long, graphs = inputs(), inputs(tokens=9), []
    for alpha in (0.25, 0.2, 0.0, 0.1):  # as under a schedule
        for x in (short, long):
            numbers = []
            for roles in pair:
                roles.alpha_weak = alpha
                numbers.append(fake_step(roles, *x) | generator_step(roles, *x))
                with torch.no_grad():  # no adapter: for --compare
                    numbers[-1]["plain"] = roles.backbone.velocity(x[1], x[2], x[0]["cond"])
            for name in ("fake_loss", "relative_gap", "plain"):
                torch.testing.assert_close(numbers[0][name], numbers[1][name], rtol=1e-4, atol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0  # nothing is compiled for another alpha
    assert not torch._dynamo.utils.counters["graph_break"]
    for role in ("generator", "fake"):
        for name, g in gradients(pair[0], role).items():
            torch.testing.assert_close(gradients(pair[1], role)[name], g, rtol=1e-3, atol=1e-5)


# ---- the released architecture -------------------------------------------------------------------


@pytest.mark.parametrize("size, pflop", [
    ((480, 832, 61), 0.81), ((544, 960, 129), 4.29), ((720, 1280, 129), 12.07),
])  # fmt: skip
def test_the_13b_architecture_has_the_known_parameters_and_flops(size, pflop):
    height, width, frames = size
    config = Config(model="hunyuan", height=height, width=width, frames=frames)
    task = hunyuan.task(config)
    module = task.backbone.module
    assert sum(p.numel() for p in module.parameters()) == 12_821_012_544
    with torch.device("meta"):
        x, sigma = torch.empty(1, *task.shape), torch.empty(1)
        cond = {"prompt_embeds": torch.empty(1, 256, 4096), "pooled": torch.empty(1, 768)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            task.backbone.velocity(x, sigma, cond)
        roles = Roles(task.backbone, 64, 0.25, 1.0)
    assert counter.get_total_flops() / 1e15 == pytest.approx(pflop, rel=0.01)
    for role in ("generator", "fake"):
        assert sum(p.numel() for p in roles.parameters(role)) == 64 * 4_300_800


def test_the_plan_of_the_13b_model_follows_from_its_parts(capsys):
    flags = ("--model", "hunyuan", "--dry-run", "--gpu-memory", 80, "--data", "none")
    run("train", *flags)
    numbers = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.strip().partition(" ")
        numbers[name] = value.strip()
    gib = {n: float(x) for n, x in numbers.items() if n.startswith("gib_")}
    assert gib["gib_base"] == pytest.approx(12_821_012_544 * 2 / 2**30, rel=1e-3)
    assert gib["gib_trained_weights"] == pytest.approx(2 * 275_251_200 * 4 / 2**30, rel=1e-3)
    assert gib["gib_gradients_adam_ema"] == pytest.approx(6 * 275_251_200 * 4 / 2**30, rel=1e-3)
    inputs_of_blocks = 60 * (16 * 30 * 52 + 256) * 3072 * 2 / 2**30
    assert gib["gib_inputs_of_blocks"] == pytest.approx(inputs_of_blocks, rel=1e-3)
    parts = sum(x for n, x in gib.items() if n not in ("gib_in_all", "gib_of_the_gpu"))
    assert gib["gib_in_all"] == pytest.approx(parts, rel=1e-3) and numbers["fits"] == "True"
    forward, trained = (float(numbers[f"pflop_per_forward{x}"]) for x in ("", "_with_gradient"))
    assert 3 < trained / forward < 4  # forward, recomputation, backward without base weights
    assert numbers["forwards_without_gradient_per_iteration"] == "7"  # 5 x_gen, fake, real
    in_all = float(numbers["pflop_per_iteration"])
    assert in_all == pytest.approx(7 * forward + 6 * trained, rel=1e-3)
    floor = float(numbers["floor_seconds_per_iteration"])
    assert floor == pytest.approx(in_all * 1e3 / 790, rel=1e-3)
    row = next(line for line in README.splitlines() if line.startswith("| in all, with a margin"))
    assert row.split("|")[2].strip() == f"{gib['gib_in_all']:.1f} GiB"
    run("train", *flags, "--fp8-base", "--frames", 129, "--height", 720, "--width", 1280)
    assert "False" in capsys.readouterr().out.split("fits")[1].splitlines()[0]
    assert not list(Path().iterdir())


def test_without_a_gpu_the_full_model_prints_its_plan_and_stops(capsys, tmp_path):
    error = refused(capsys, tmp_path, "train", "--model", "hunyuan", "--weights", "random")
    assert "GPU" in error and "--dry-run" in error


# ---- encode --------------------------------------------------------------------------------------


def test_a_clip_is_the_vae_s_scaled_mode_and_its_trimmed_text(tiny, encoded):
    path = sorted(encoded.glob("one*.safetensors"))[0]
    clip, info = w2svd.read_safetensors(path)
    assert clip["latents"].shape == SHAPE and clip["latents"].dtype == torch.float32
    assert clip["prompt_embeds"].shape == (7, 16) and clip["pooled"].shape == (8,)
    assert info["shape"] == list(SHAPE) and info["scaling"] == 0.476986 and info["fps"] == 12
    assert info["caption"] == "a red square moves to the left" and len(info["sha256"]) == 64
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    video = hunyuan.read_clip(encoded.parent / "one.mp4", Config(height=32, width=48, frames=9,
                                                                 fps=12.0))  # fmt: skip
    assert video.shape == (1, 3, 9, 32, 48) and -1 <= video.min() and video.max() <= 1
    with torch.no_grad():
        mode = pipe.vae.encode(video).latent_dist.mode()[0]
    torch.testing.assert_close(clip["latents"], mode * 0.476986)
    embeds, pooled, mask = pipe.encode_prompt(
        info["caption"], prompt_template={"template": "{}", "crop_start": 0}
    )
    assert int(mask.sum()) == 7 and torch.equal(embeds[0, :7], clip["prompt_embeds"])
    assert torch.equal(pooled[0], clip["pooled"])


def test_resampling_keeps_the_motion_s_speed():
    film("fast.mp4", frames=40, fps=40)
    slow = hunyuan.read_clip(Path("fast.mp4"), Config(height=48, width=80, frames=9, fps=10.0))
    edges = [(frame[0, 20] > 0).nonzero().min().item() for frame in slow[0].transpose(0, 1)]
    assert all(abs(edge - 4 * i) <= 2 for i, edge in enumerate(edges))


@pytest.mark.parametrize("how", ["txt", "jsonl", "csv", "lists"])
def test_every_convention_of_folders_is_read(how):
    folder, rows = Path("clips"), [("a.mp4", "a dog"), ("b.mp4", 'a "red, blue" square')]
    folder.mkdir()
    for name, text in rows:
        (folder / name).touch()
        if how == "txt":
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    if how == "jsonl":
        made = [json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows]
        (folder / "metadata.jsonl").write_text("".join(made))
    if how == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    if how == "lists":
        (folder / "videos.txt").write_text("".join(f"{n}\n" for n, _ in rows))
        (folder / "prompt.txt").write_text("".join(f"{t}\n" for _, t in rows))
    assert hunyuan.find_clips(folder) == [(folder / n, t) for n, t in rows]


def test_bad_clips_are_skipped_with_their_reasons_and_a_restart_keeps_what_is_done(tiny, capsys):
    folder = Path("clips")
    folder.mkdir()
    film(folder / "good.mp4")
    film(folder / "short.mp4", frames=5)
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:300])
    film(folder / "silent.mp4")
    rows = [(str(Path("clips/good.mp4").resolve()), "a dog"), ("short.mp4", "a"),
            ("broken.mp4", "a"), ("silent.mp4", " "), ("missing.mp4", "a"),
            ("../escape.mp4", "a")]  # fmt: skip
    film("escape.mp4")
    made = [json.dumps({"file_name": n, "text": t}) for n, t in rows]
    (folder / "metadata.jsonl").write_text("\n".join(made))
    encode(tiny, "--videos", folder, "--out", "data", code=1)
    out = capsys.readouterr().out
    assert "1 clips in data, 5 skipped" in out
    for reason in ("too short: 2 of 9", "cannot be decoded", "no caption", "no such file"):
        assert reason in out
    index = json.loads(Path("data/index.json").read_text())
    assert len(index["clips"]) == 1 and len(index["skipped"]) == 5
    (clip,) = Path("data").glob("*.safetensors")
    done = clip.stat().st_mtime_ns
    (folder / "metadata.jsonl").write_text("\n".join(made[:1]))
    encode(tiny, "--videos", folder, "--out", "data")
    assert clip.stat().st_mtime_ns == done
    (folder / "metadata.jsonl").write_text(made[0].replace("dog", "woman"))
    encode(tiny, "--videos", folder, "--out", "data")
    assert clip.stat().st_mtime_ns != done


def test_nothing_usable_is_refused(tiny, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ("encode", "--model", "hunyuan", "--checkpoint", tiny, *PLAIN, *SIZE, "--out", "data")
    assert "can be used" in refused(capsys, tmp_path, *flags, "--videos", "empty")
    assert "cannot be read" in refused(capsys, tmp_path, *flags, "--videos", "nowhere")
    assert "cannot be read" in refused(capsys, tmp_path, *flags, "--prompts", "nowhere.txt")
    assert "either" in refused(capsys, tmp_path, *flags)


def test_a_template_without_its_crop_leaves_no_text_and_is_said_so(tiny, capsys, tmp_path):
    Path("p.txt").write_text("a dog\n")
    flags = ("encode", "--model", "hunyuan", "--checkpoint", tiny, "--prompt-template", "{}", *SIZE)
    error = w2svd.main([str(f) for f in (*flags, "--prompts", "p.txt", "--out", "data")])
    assert error == 2 and "--prompt-crop-start" in capsys.readouterr().err


def test_a_caption_that_is_no_text_costs_its_clip_alone():
    Path("clips").mkdir()
    for name in ("a.mp4", "b.MP4"):
        (Path("clips") / name).touch()
    Path("clips/a.txt").write_bytes(b"\xff\xfe\xfa")
    Path("clips/b.txt").write_bytes(b"\xef\xbb\xbfa dog")
    assert hunyuan.find_clips(Path("clips")) == [
        (Path("clips/a.mp4"), ""), (Path("clips/b.MP4"), "a dog")]  # fmt: skip


def test_a_failed_picture_comes_after_its_checkpoint_and_can_be_left_out(encoded, monkeypatch):
    def fail(self, latents):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(hunyuan.Task, "decode", fail)
        train(encoded, "r", "--iterations", 2, "--sample-every", 2, code=2)
    assert Path("r/checkpoint-000002.safetensors").exists()
    train(encoded, "r", "--resume", "--sample-every", 4)
    assert Path("r/generator.safetensors").exists() and len(lines(Path("r"))) == 1


def test_random_weights_are_measured_but_not_shown(tiny, capsys, tmp_path):
    flags = ["train", "--model", "hunyuan", "--checkpoint", tiny, "--weights", "random", *SIZE]
    run(*flags, *SMALL, "--iterations", 2, "--out", "r")
    for command in ("sample --run r --prompt a --out a.mp4",
                    "export --run r --format merged --out lora"):  # fmt: skip
        assert "random" in refused(capsys, tmp_path, *command.split())


def test_names_made_from_prompts_are_safe():
    assert hunyuan.safe_name("a/b\\c\n\x00d") == "a_b_c__d"
    assert hunyuan.safe_name("a dog, 2 x") == "a dog, 2 x"
    long = [hunyuan.safe_name("ü" * 5000), hunyuan.safe_name("ü" * 4999)]
    assert long[0] != long[1] and all(len(name.encode()) <= 180 for name in long)


# ---- train ---------------------------------------------------------------------------------------


def test_a_run_logs_every_health_number_and_leaves_samples(trained):
    rows = lines(trained)
    names = {"fake_loss", "relative_gap", "cos_fake_real", "gen_mean", "gen_std", "data_std",
             "gen_motion", "data_motion", "grad_norm", "fake_grad_norm"}  # fmt: skip
    assert [row["step"] for row in rows] == [2, 4] and names <= rows[0].keys()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert json.loads((trained / "result.json").read_text())["student"]["steps"] == 4
    found, info = w2svd.read_safetensors(trained / "generator.safetensors")
    assert info["sigmas"][1] == 0.9375 and info["embedded_guidance"] == 6.0 and info["rank"] == 2
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in found
    assert len(found) == 2 * (12 + 5)


def test_samples_come_every_so_many_iterations_beside_the_backbone_s(encoded):
    train(encoded, "r", "--iterations", 4, "--sample-every", 2, "--compare")
    assert {p.name for p in Path("r/samples").iterdir()} == {
        "000002.mp4", "000002.gif", "000004.mp4", "000004.gif"}  # fmt: skip
    assert iio.imread("r/samples/000004.mp4").shape == (9, 32, 48, 3)
    assert iio.imread("r/samples/000004.gif").shape == (5, 32, 96, 3)


@pytest.mark.parametrize("flags", [[], ["--fp8-base"], ["--generator", "full", "--fake", "full"]])
def test_n_iterations_resumed_for_n_more_equal_2n(encoded, flags):
    train(encoded, "whole", "--iterations", 4, *FAST, *flags)
    train(encoded, "parts", "--iterations", 2, *FAST, *flags)
    train(encoded, "parts", "--iterations", 4, "--resume")
    for name in ("checkpoint-000004.safetensors", "generator.safetensors"):
        assert same_bits(Path("whole") / name, Path("parts") / name)
    assert lines(Path("whole")) == lines(Path("parts"))


def test_captions_alone_train_by_rollout_and_refuse_pairs(tiny, capsys, tmp_path):
    Path("p.txt").write_text("a dog\n\na woman talks\n")
    encode(tiny, "--prompts", "p.txt", "--out", "data")
    assert len(list(Path("data").glob("*.safetensors"))) == 2
    error = refused(capsys, tmp_path, *"train --model hunyuan --data data --out r".split())
    assert "--generator-input rollout" in error
    train("data", "r2", "--generator-input", "rollout", "--iterations", 2, "--accumulate", 2)
    assert all(math.isfinite(x) for x in lines(Path("r2"))[0].values())


def test_accumulated_gradients_are_the_mean_of_the_forwards(encoded, monkeypatch):
    norms, batch = {}, inputs()
    for k in (1, 2):
        task = hunyuan.task(Config(model="hunyuan", data=str(encoded), fake_updates=1, accumulate=k,
                                   **hunyuan.encoded_with(encoded)))  # fmt: skip
        task.load()
        torch.manual_seed(0)
        roles = Roles(task.backbone, 2, 0.25, 1.0)
        state = w2svd.State(task.config, roles, "cpu")
        monkeypatch.setattr(w2svd, "generator_input", lambda *args: batch[1:3])
        monkeypatch.setattr(w2svd, "sample_sigma", lambda *args: batch[3])
        monkeypatch.setattr(torch, "randn", lambda *args, **how: batch[4])
        stats = w2svd.iterate(task.config, state, iter([batch[0]] * 4))
        monkeypatch.undo()
        norms[k] = float(stats["fake_grad_norm"])
    assert norms[1] == pytest.approx(norms[2], rel=1e-4)


def test_tensorboard_gets_every_logged_number(encoded, monkeypatch, capsys, tmp_path):
    import sys
    import types

    written = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert purge_step == 1

        def add_scalar(self, name, value, step):
            written[name, step] = value

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    train(encoded, "r", "--iterations", 2, "--tensorboard")
    assert written["relative_gap", 2] == lines(Path("r"))[0]["relative_gap"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(encoded, "r2", "--iterations", 2, "--tensorboard", code=2)
    assert "tensorboard for --tensorboard" in capsys.readouterr().err


# ---- sample and export ---------------------------------------------------------------------------


def test_a_prompt_becomes_one_film_of_the_right_size(trained):
    run("sample", "--run", trained, "--prompt", "a woman talks to the camera", "--out", "talk.mp4",
        "--compare")  # fmt: skip
    for name in ("talk.mp4", "talk-28-steps.mp4"):
        assert iio.imread(name).shape == (9, 32, 48, 3)
        assert iio.immeta(name, plugin="FFMPEG")["fps"] == 12
    assert {p.name for p in Path().iterdir()} == {"talk.mp4", "talk-28-steps.mp4"}


def test_many_prompts_get_vbench_s_names_and_a_seed_each(trained):
    Path("p.txt").write_text("a dog\na/b woman\n")
    run("sample", "--run", trained, "--prompts", "p.txt", "--videos-per-prompt", 2, "--out", "many")
    assert {p.name for p in Path("many").iterdir()} == {
        "a dog-0.mp4", "a dog-1.mp4", "a_b woman-0.mp4", "a_b woman-1.mp4"}  # fmt: skip
    assert Path("many/a dog-0.mp4").read_bytes() != Path("many/a dog-1.mp4").read_bytes()
    run("sample", "--run", trained, "--prompt", "a dog", "--seed", 1, "--out", "again.mp4")
    assert Path("many/a dog-1.mp4").read_bytes() == Path("again.mp4").read_bytes()


def our_latents(trained, seed):
    """few_step_sample of the run's generator and of its backbone, for the first clip's caption."""
    found, info = w2svd.read_generator(trained)
    config = w2svd.read_run(trained)
    task = hunyuan.task(config)
    task.load()
    roles = Roles(task.backbone, info["rank"], 0.25, 1.0)
    roles.load("generator", found)
    batch = task.read(0)
    both = []
    for velocity in (roles.generator, task.backbone.velocity):
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)  # renoising in the pipeline comes from the global generator
        sigmas = torch.tensor(info["sigmas"])
        both.append(few_step_sample(velocity, noise, sigmas, batch["cond"]))
    return both


def stock(pipe, sigmas, seed, how):
    """The README's ten lines, up to latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    torch.manual_seed(seed)
    return pipe("a red square moves to the left", sigmas=sigmas[:-1], guidance_scale=6.0, height=32,
                width=48, num_frames=9, generator=torch.Generator().manual_seed(seed),
                output_type="latent", **how).frames  # fmt: skip


def test_sample_draws_our_latents_in_the_stock_pipeline(trained):
    config, (found, info) = w2svd.read_run(trained), w2svd.read_generator(trained)
    latents, plain = our_latents(trained, seed=5)
    pipe = hunyuan.hunyuan_pipeline(config, ())
    cond = hunyuan.encode_text(pipe, "a red square moves to the left", config)
    for scale, expected in ((1.0, latents), (0.0, plain)):
        hunyuan.load_generator(pipe, found, info, scale)
        got = hunyuan.run_pipeline(pipe, config, cond, 5, "latent", sigmas=info["sigmas"][:-1])
        assert (got - expected).abs().max() < 1e-5
        pipe.unload_lora_weights()


def test_the_exported_lora_gives_our_latents_in_a_stock_pipeline(tiny, trained):
    run("export", "--run", trained, "--format", "diffusers", "--out", "lora")
    with safe_open("lora/pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["lora_adapter_metadata"])["transformer.r"] == 2
    sigmas = json.loads(header["w2svd"])["sigmas"]
    how = {"prompt_template": {"template": "{}", "crop_start": 0}}
    pipe = HunyuanVideoPipeline.from_pretrained(tiny)
    pipe.load_lora_weights("lora")
    latents, plain = our_latents(trained, seed=5)
    assert (stock(pipe, sigmas, 5, how) - latents).abs().max() < 1e-5
    pipe.unload_lora_weights()
    pipe.load_lora_weights(trained, weight_name="generator.safetensors")  # the run's own will do
    assert (stock(pipe, sigmas, 5, how) - latents).abs().max() < 1e-5
    assert (plain - latents).abs().max() > 1e-3  # or the adapter would do nothing
    card = Path("lora/README.md").read_text()
    for said in (str(tiny), "licence", "0.9375", "0.25, 1.0", "2 clips", "gen_motion", "scheduler"):
        assert said in card


def test_the_readme_s_snippet_gives_the_same_video_without_our_code(tiny, trained):
    run("export", "--run", trained, "--format", "diffusers", "--out", "lora")
    lines = README.split("### Without our code")[1].split("## ")[0].strip().splitlines()
    assert len(lines) == 10
    code = "\n".join(line.strip() for line in lines)
    for text, tiny_one in (
        ('"hunyuanvideo-community/HunyuanVideo"', repr(str(tiny))), ("bfloat16", "float32"),
        ('"cuda"', '"cpu"'), ("height=480, width=832, num_frames=61", "height=32, width=48, "
         'num_frames=9, prompt_template={"template": "{}", "crop_start": 0}'),
    ):  # fmt: skip
        assert code.count(text) == 1
        code = code.replace(text, tiny_one)
    names = {}
    exec(code, names)
    assert iio.imread("talk.mp4").shape == (9, 32, 48, 3)
    config, (found, info) = w2svd.read_run(trained), w2svd.read_generator(trained)
    pipe = hunyuan.hunyuan_pipeline(config, ())
    cond = hunyuan.encode_text(pipe, "a woman talks to the camera", config)
    hunyuan.load_generator(pipe, found, info)
    ours = hunyuan.run_pipeline(pipe, config, cond, 0, sigmas=info["sigmas"][:-1])
    theirs = torch.stack([torch.from_numpy(np.array(frame)) for frame in names["video"]])
    assert (torch.from_numpy(ours) * 255 - theirs.float()).abs().max() <= 1


def test_merged_weights_give_the_adapter_s_output(tiny, trained):
    run("export", "--run", trained, "--format", "merged", "--out", "merged")
    transformer = HunyuanVideoTransformer3DModel.from_pretrained("merged")
    pipe = HunyuanVideoPipeline.from_pretrained(tiny, transformer=transformer)
    sigmas = w2svd.read_generator(trained)[1]["sigmas"]
    how = {"prompt_template": {"template": "{}", "crop_start": 0}}
    latents, _ = our_latents(trained, seed=5)
    assert (stock(pipe, sigmas, 5, how) - latents).abs().max() < 1e-5


def from_comfyui(converted, rank, widths):
    """The inverse of to_comfyui, written on its own: slices of A and of B."""
    names = {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "img_attn_proj": ["attn.to_out.0"], "txt_attn_proj": ["attn.to_add_out"],
        "img_mlp.fc1": ["ff.net.0.proj"], "img_mlp.fc2": ["ff.net.2"], "linear2": ["proj_out"],
        "txt_mlp.fc1": ["ff_context.net.0.proj"], "txt_mlp.fc2": ["ff_context.net.2"],
    }  # fmt: skip
    back = {}
    for name in [n for n in converted if "lora_A" in n]:
        _, kind, i, layer = name.removesuffix(".lora_A.weight").split(".", 3)
        kind = {"double_blocks": "", "single_blocks": "single_"}[kind] + "transformer_blocks"
        A, B = converted[name], converted[name.replace("lora_A", "lora_B")]
        row = 0
        for k, part in enumerate(names[layer][: len(A) // rank]):
            rows = widths if len(names[layer]) > 1 and part != "proj_mlp" else len(B) - row
            stem = f"transformer.{kind}.{i}.{part}"
            back[f"{stem}.lora_A.weight"] = A[k * rank : (k + 1) * rank]
            block = B[row : row + rows]
            back[f"{stem}.lora_B.weight"] = block[:, k * rank : (k + 1) * rank]
            others = block.clone()
            others[:, k * rank : (k + 1) * rank] = 0
            assert not others.any()
            row += rows
    return back


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_the_comfyui_file_converts_back_to_the_same_weights(tiny, encoded, trained, targets):
    if targets == "attention":
        train(encoded, "r", "--iterations", 2, *FAST, "--lora-targets", "attention")
        trained = "r"
    run("export", "--run", trained, "--format", "comfyui", "--out", "comfy")
    converted = tensors("comfy/w2svd_comfyui.safetensors")
    expected = w2svd.read_generator(trained)[0]
    assert "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight" in converted
    assert len(converted["diffusion_model.single_blocks.0.linear1.lora_B.weight"]) == 3 * 20 + 80
    back = from_comfyui(converted, 2, 20)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_diffusers_reads_the_comfyui_file_s_double_blocks_as_the_same_layers(trained):
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    run("export", "--run", trained, "--format", "comfyui", "--out", "comfy")
    original = {n.removeprefix("diffusion_model."): x for n, x in
                tensors("comfy/w2svd_comfyui.safetensors").items() if "double" in n}  # fmt: skip
    read = _convert_hunyuan_video_lora_to_diffusers(original)
    expected = w2svd.read_generator(trained)[0]
    found = 0
    for name in [n for n in expected if ".transformer_blocks" in n and "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(read[other] @ read[name], expected[other] @ expected[name])
        found += 1
    assert found == 12


def test_a_generator_trained_in_full_is_sampled_and_merged(encoded, capsys, tmp_path):
    train(encoded, "r", "--iterations", 2, "--generator", "full", *FAST)
    run("sample", "--run", "r", "--prompt", "a dog", "--out", "dog.mp4")
    run("export", "--run", "r", "--format", "merged", "--out", "merged")
    assert HunyuanVideoTransformer3DModel.from_pretrained("merged").config.num_layers == 1
    error = refused(capsys, tmp_path, *"export --run r --format diffusers --out lora".split())
    assert "merged" in error


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, says", [
    ("--height 100", "multiples of 16"), ("--frames 60", "4 k + 1"), ("--batch 2", "--accumulate"),
    ("--guidance 3", "embedded"), ("--checkpoint nowhere", "--checkpoint nowhere"),
    ("--data nothing", "run encode"), ("--sample-every 3", "multiple"), ("--fps 0", "--fps"),
    ("--prompt-template dog", "{}"), ("--width 64", "[4, 3, 4, 8]"), ("--frames 1", "4 k + 1"),
    ("--prompt-template {}{x}", "brace"), ("--prompt-crop-start 9999", "1000"),
    ("--embedded-guidance nan", "--embedded-guidance"), ("--compile --fp8-base", "--compile"),
])  # fmt: skip
def test_bad_settings_are_refused(encoded, capsys, tmp_path, flags, says):
    command = ["train", "--model", "hunyuan", "--out", "r", *SMALL]
    if "--data" not in flags:
        command += ["--data", encoded]
    if flags == "--data nothing":
        command += ["--checkpoint", hunyuan.encoded_with(encoded)["checkpoint"]]
    assert says in refused(capsys, tmp_path, *command, *flags.split())


def test_a_checkpoint_that_is_not_hunyuanvideo_is_refused(encoded, tiny, capsys, tmp_path):
    config = json.loads((tiny / "transformer/config.json").read_text())
    for change in ({"_class_name": "WanTransformer3DModel"},
                   {"image_condition_type": "latent_concat"}):  # fmt: skip
        (tmp_path / "other/transformer").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other/transformer/config.json").write_text(json.dumps(config | change))
        error = refused(capsys, tmp_path, "train", "--model", "hunyuan", "--data", encoded,
                        "--checkpoint", "other")  # fmt: skip
        assert "not a text-to-video HunyuanVideo" in error


@pytest.mark.parametrize("other, says", [
    ({"scaling": 0.5}, "scaling"), ({"text": 24}, "another model"), ({"channels": 8}, "shape"),
])  # fmt: skip
def test_data_encoded_for_another_model_is_refused(encoded, capsys, tmp_path, other, says):
    save_tiny(tmp_path / "other", **other)
    error = refused(capsys, tmp_path, "train", "--model", "hunyuan", "--data", encoded,
                    "--checkpoint", "other", "--out", "r")  # fmt: skip
    assert says in error


def test_damaged_data_and_generators_are_refused(tiny, encoded, trained, capsys, tmp_path):
    import shutil

    shutil.copytree(encoded, "data")
    train_it = ("train", "--model", "hunyuan", "--data", "data", "--out", "r")
    clip = next(Path("data").glob("one*"))
    clip.write_bytes(clip.read_bytes()[:-4])
    assert "run encode again" in refused(capsys, tmp_path, *train_it)
    Path("data/index.json").write_text("{")
    assert "damaged" in refused(capsys, tmp_path, *train_it)
    shutil.copytree(trained, "run")
    weights = Path("run/generator.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    for command in ("sample --run run --prompt a --out a.mp4",
                    "export --run run --format merged --out lora"):  # fmt: skip
        assert "is damaged" in refused(capsys, tmp_path, *command.split())


@pytest.mark.parametrize("flags", [
    "--prompt a --out a.png", "--prompt a --prompts b --out a.mp4", "--out a.mp4",
    "--n 3 --out a.mp4", "--prompt a --out a.mp4 --videos-per-prompt 0",
    "--prompts none.txt --out folder",
])  # fmt: skip
def test_sample_refuses_what_it_cannot_do(trained, capsys, tmp_path, flags):
    refused(capsys, tmp_path, "sample", "--run", trained, *flags.split())


def test_a_full_gpu_and_a_full_disk_end_in_one_sentence(encoded, trained, capsys, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(w2svd, "fake_step", no_memory)
        train(encoded, "r", "--iterations", 2, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GPU memory" in error and "--fp8-base" in error and "encode" in error

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    try:  # no file may grow beyond 4 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        code = w2svd.main(["export", "--run", str(trained), "--format", "diffusers", "--out", "lo"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "too large" in capsys.readouterr().err
    assert not list(Path("lo").iterdir())  # nothing half-written


def test_a_folder_in_use_is_not_exported_into_and_toys_not_at_all(trained, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    flags = ("export", "--run", trained, "--format", "merged", "--out", "mine")
    assert "in use" in refused(capsys, tmp_path, *flags)


def test_a_foreign_vae_and_a_missing_tensor_are_refused(encoded, tiny, capsys, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, "vae")
    config = json.loads(Path("vae/vae/config.json").read_text())
    Path("vae/vae/config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    Path("p.txt").write_text("a dog\n")
    error = refused(capsys, tmp_path, "encode", "--model", "hunyuan", "--checkpoint", "vae", *SIZE,
                    "--prompts", "p.txt", "--out", "data")  # fmt: skip
    assert "AutoencoderKLWan" in error
    shutil.copytree(tiny, "torn")
    path = next(Path("torn/transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights.pop("proj_out.weight")
    save_file(weights, path, metadata={"format": "pt"})
    error = refused(capsys, tmp_path, "train", "--model", "hunyuan", "--data", encoded,
                    "--checkpoint", "torn", "--out", "r")  # fmt: skip
    assert "--checkpoint torn" in error


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_lora_scale_that_is_no_number_is_refused(trained, capsys, tmp_path, scale):
    refused(capsys, tmp_path, "sample", "--run", trained, "--prompt", "a", "--out", "a.mp4",
            "--lora-scale", scale)  # fmt: skip


def test_prompts_of_one_name_keep_a_film_each(trained):
    Path("p.txt").write_text("a/b\na_b\n")
    run("sample", "--run", trained, "--prompts", "p.txt", "--out", "many")
    assert len(list(Path("many").iterdir())) == 2
