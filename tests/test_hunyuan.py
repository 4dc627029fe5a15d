"""HunyuanVideo, also image-to-video: roles, plan, training, films, sampling, export, on a tiny one.

Against: diffusers' own pipelines, transformer and LoRA loader, padded text with its mask, backward
without checkpointing, an uninterrupted run, torch's count of FLOPs for the released architecture.
Run with `python -m pytest tests/test_hunyuan.py`; a minute, with `-m slow` instead half of one.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import POINT
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video
from helpers import lines, names, refused, run, said, tensors, watch
from PIL import Image
from safetensors import safe_open
from video_runs import (
    SMALL,
    assert_head_reads,
    at_published_rates,
    changed,
    counted_flop,
    gib_at_work,
    random_adapters,
    sample_and_card,
    watch_films,
)

import w2svd
from toy.tiny_hunyuan import I2V_TEMPLATE, SIZE, TEMPLATE, clips, save_tiny
from w2svd import Config, HunyuanVideo, Machine, Roles, VideoTask, few_step_sigmas

FORMS = (None, "token_replace", "latent_concat")
EACH = pytest.mark.parametrize("form", FORMS, indirect=True, scope="module")
IMAGE = pytest.mark.parametrize("form", FORMS[1:], indirect=True, scope="module")
ATTEND = "dispatch_attention_fn"  # of diffusers
LINEARS = 2 * (12 + 5)  # of two double and two single blocks
FULL = "--generator full --fake full --gan-weight .003"  # DMD2
ROLES = ("generator", "fake")


@pytest.fixture
def drawn(monkeypatch):
    return watch_films(monkeypatch)


@pytest.fixture(scope="module", params=[None])
def form(request):
    """Of image-to-video, or None: most tests are of text-to-video."""
    return request.param


@pytest.fixture(scope="module")
def template(form):
    """The text encoder, which follows no instructions, knows no other."""
    return I2V_TEMPLATE if form else TEMPLATE


@pytest.fixture(scope="module")
def tiny(form, template, tmp_path_factory):
    """A pipeline of two blocks of each kind."""
    save_tiny(folder := tmp_path_factory.mktemp("hunyuan"), form, blocks=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunyuanVideo, "prompt_template", template)
        yield folder


@pytest.fixture(scope="module")
def fixed(tiny, tmp_path_factory):
    """Flags of train, with a folder of two clips."""
    folder = clips(tmp_path_factory.mktemp("clips"), a="a dog", b="a red dog/cat, blue?")
    return ["--model", "hunyuan", "--data", folder, "--checkpoint", tiny, *SIZE, *SMALL]


@pytest.fixture(scope="module")
def trained(fixed, tmp_path_factory):
    """A finished run, whose adapters do something from its beginning on; its films."""
    folder, build = tmp_path_factory.mktemp("runs") / "mine", w2svd.build_roles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w2svd, "build_roles", lambda *args: random_adapters(build(*args)))
        films = watch_films(patch)
        run("train", *fixed, "--iterations", 4, "--out", folder)
    return folder, films


def transformer(folder, dtype=torch.float32):
    found = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
    return found.requires_grad_(False)


def new_roles(folder, dtype=torch.float32, **settings):
    config = Config(height=32, width=48, frames=9, **settings)
    return random_adapters(Roles(HunyuanVideo(transformer(folder, dtype), config), 2, 0.25, 1.0))


def inputs(backbone):
    """x, sigma, cond, another sigma and eps, always the same."""
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, *backbone.shape, generator=rng)
    cond = {"prompt_embeds": torch.randn(1, 5, 16, generator=rng)}
    cond["pooled"] = torch.randn(1, 8, generator=rng)
    if backbone.form:
        cond["image"] = torch.randn(1, 4, 1, 4, 6, generator=rng)
    return x, torch.tensor([0.9375]), cond, torch.tensor([0.6]), eps


def test_the_velocity_is_the_stock_transformer_s_with_padded_text_and_its_mask(tiny):
    backbone = new_roles(tiny, embedded_guidance=5.0).backbone
    x, sigma, cond, _, _ = inputs(backbone)
    mask = (torch.arange(12) < 5)[None].float()
    padded = torch.cat([cond["prompt_embeds"], torch.randn(1, 7, 16)], dim=1)
    given = 1000 * sigma, padded, mask, cond["pooled"], torch.tensor([5000.0])
    stock, v = transformer(tiny)(x, *given).sample, backbone.velocity(x, sigma, cond)
    assert (v - stock).abs().max() < 2e-6 * max(1, v.abs().max())


def test_no_mask_reaches_attention_and_a_change_of_diffusers_blocks_is_loud(tiny, monkeypatch):
    calls, roles = watch(monkeypatch, transformer_hunyuan_video, ATTEND), new_roles(tiny)
    roles.use_checkpointing()
    w2svd.generator_step(roles, *inputs(roles.backbone))
    assert len(calls) == 4 * (3 + 1)  # 4 blocks; 3 forwards, recomputed 1
    assert {call.how["attn_mask"] for call in calls} == {None}
    with pytest.raises(AssertionError, match="diffusers"):  # something else in the mask's place
        roles.backbone.blocks[0](*torch.randn(4, 1, 5, 20), None)


def test_in_bf16_timesteps_and_adapters_stay_float32_and_products_do_not(tiny):
    roles, seen, products = new_roles(tiny, torch.bfloat16), {}, set()
    module = roles.backbone.module
    module.register_forward_pre_hook(lambda m, _, how: seen.update(how), with_kwargs=True)
    for layer in roles.layers:
        for linear in (layer.lora_A["fake"], layer.lora_B["fake"]):
            linear.register_forward_hook(lambda m, args, out: products.add(out.dtype))
    x, _, cond, _, eps = inputs(roles.backbone)
    w2svd.fake_step(roles, x, cond, torch.tensor([0.9545]), eps)
    assert seen["timestep"].dtype == torch.float32 and float(seen["timestep"]) == 954.5
    assert float(seen["guidance"]) == 6016  # as the stock pipeline's in bf16
    assert products == {torch.bfloat16}
    state = w2svd.State(Config(model="hunyuan"), roles, "cpu")
    held = [p.grad for p in roles.parameters("fake")]
    state.update("fake", 1e-3)
    assert {x.dtype for x in (*held, *w2svd.held_tensors(state).values())} == {torch.float32}


@pytest.fixture
def emptied(monkeypatch):
    """Weights that wait in host memory are 0 where they are; how many blocks are not, each time."""
    put, begin, found = w2svd.HostedBackbone.put, w2svd.HostedBackbone.begin, []

    def put_0(self, i, weights):
        away = weights is self.homes[i]
        put(self, i, [torch.zeros_like(x) for x in weights] if away else weights)

    def counted(self, i):
        begin(self, i)
        found.append(len(self.here))

    monkeypatch.setattr(w2svd.HostedBackbone, "put", put_0)
    monkeypatch.setattr(w2svd.HostedBackbone, "begin", counted)
    return found


@pytest.mark.parametrize("fp8, offload", [(False, False), (False, True), (True, True)])
def test_checkpointing_and_offload_change_no_bit_of_a_gradient(
    tiny, monkeypatch, emptied, fp8, offload
):
    """Also where the role has ended before the backward, with the backbone in 8 bits.

    With the base in host memory two blocks' weights are there at any time, and no others are read.
    """
    waiting, found = watch(monkeypatch, torch.autograd.graph, "save_on_cpu"), []
    size = {"height": 32, "width": 48, "frames": 9, "lora_rank": 2, "gan_weight": 1.0}
    for checkpointing in (False, True):
        config = Config(fp8_base=fp8, checkpointing=checkpointing, **size)
        model, machine = HunyuanVideo(transformer(tiny), config), Machine(offload=offload)
        for p in model.module.parameters():  # where a file's weights lie changes a product's bits
            p.data = p.data.clone()
        roles = random_adapters(
            w2svd.build_roles(config, model, machine if checkpointing else Machine())
        )
        x = inputs(model)
        v = roles.fake(*x[:3])
        with roles.use("real"):  # the same adapter at another scale: no shape or dtype tells
            v.square().sum().backward()
        w2svd.generator_step(roles, *x, gan_weight=5.0)
        found.append(
            {f"{role}/{n}": p.grad for role in ROLES for n, p in roles.state(role).items()}
        )
    plain, again = found
    assert bool(waiting) == offload and len(plain) == 4 * LINEARS
    assert set(emptied) == ({2} if offload else set())
    for name, g in plain.items():
        assert g.any() and torch.equal(again[name], g), name
    for name, p in model.module.named_parameters():
        if "transformer_blocks" in name and "to_q" in name:
            in_8_bits = fp8 and "lora" not in name
            assert p.dtype == (torch.float8_e4m3fn if in_8_bits else torch.float32), name


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_numbers(fixed, monkeypatch):
    compile_one = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_one(m, backend="aot_eager"))
    monkeypatch.setattr(VideoTask, "on_log", lambda *_: None)
    save_tiny("small")
    for out, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        flags = ["--checkpoint", "small", "--iterations", 2, "--log-every", 1, "--out", out]
        run("train", *fixed, *flags, flag)
    torch.testing.assert_close(lines("compiled"), lines("plain"), rtol=1e-3, atol=1e-6)


def test_adapters_of_single_stream_blocks_alone_are_those_blocks(tiny):
    trained = new_roles(tiny, lora_targets="single").state("generator")
    assert len(trained) == 2 * 2 * 5 and all(name.startswith("single_") for name in trained)


@EACH
def test_the_discriminator_s_features_are_the_sample_s_last_double_stream_tokens(tiny, form):
    """Not the given frame's, of the backbone without an adapter; the late blocks do not run."""
    roles = new_roles(tiny)
    x, module = inputs(roles.backbone)[:3], roles.backbone.module
    given = 4 * 6 if form == "token_replace" else 0
    last, later = module.transformer_blocks[-1], module.single_transformer_blocks
    tokens = assert_head_reads(roles, x, last, later[0], given)
    assert tokens.shape == (1, given + x[0][0, 0].numel(), 20) and len(later) == 2


COUNTED = json.loads(Path(__file__).with_name("counted_work.json").read_text())["rows"]
SIMULATED = json.loads(Path(__file__).with_name("simulated_peaks.json").read_text())["peaks"]


@pytest.fixture(scope="module")
def full_size():
    """The 13B model without numbers, with two adapters, which tell which of its blocks learn."""
    model = HunyuanVideo.outline(Config(model="hunyuan"))
    with torch.device("meta"):
        Roles(model, 64, 0.25, 1.0)
    return model


def test_the_plan_s_flops_are_those_that_torch_counts_in_the_13b_model(full_size):
    with torch.device("meta"):
        cond = {"prompt_embeds": torch.empty(1, 256, 4096), "pooled": torch.empty(1, 768)}
    counted = counted_flop(full_size, cond)
    assert full_size.flop() == pytest.approx(counted, rel=1e-3)
    assert sum(counted) == pytest.approx(0.81e15, rel=0.01)
    config = Config(model="hunyuan", checkpointing=True, iterations=500)
    found = w2svd.plan(config, HunyuanVideo.outline(config))
    assert found["parameters: backbone, generator, fake"] == [12_821_012_544, *2 * [64 * 4_300_800]]
    films = (2 + 500 / 250) * found["minutes of films, at each save"] / 60  # two at the start
    hours = found["seconds an iteration on an H100"] * 500 / 3600 + films
    assert found["hours on an H100"] == found["GPU-hours, H100"] == pytest.approx(hours)
    parts = [x for name, x in found.items() if name.startswith("GiB, ")]
    assert found["GiB in all"] == pytest.approx(sum(parts)) and found["clips an update"] == 1


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: str(row["height"]))
def test_the_plan_s_time_is_within_1_percent_of_the_work_counted_in_an_iteration(full_size, row):
    size = {name: row[name] for name in ("height", "width", "frames")}

    def planned(batch):
        config = Config(model="hunyuan", checkpointing=True, batch=batch, **size)
        model = HunyuanVideo(full_size.module, config)
        return w2svd.time_plan(config, model, Machine(), *w2svd.evaluations(config))

    found, flop = planned(batch=1), row["linear_flop"] + row["attention_flop"]
    assert found["PFLOP an iteration"] == pytest.approx(flop / 1e15, rel=0.01)
    an_iteration = found["seconds an iteration on an H100"]
    assert an_iteration == pytest.approx(at_published_rates(row), rel=0.01)
    assert planned(batch=2)["seconds an iteration on an H100"] == pytest.approx(2 * an_iteration)
    film = 4 * at_published_rates(row["forward"]) + 40e6 * math.prod(size.values()) / 150e12
    films = 4 if row["height"] == 480 else 1
    assert found["minutes of films, at each save"] == pytest.approx(films * film / 60, rel=0.01)


@pytest.mark.parametrize("row", SIMULATED, ids=lambda row: "-".join(map(str, row.values())))
def test_the_plan_s_memory_is_within_5_percent_of_a_simulated_iteration_s(full_size, row):
    settings = {n: x for n, x in row.items() if n not in ("allocated_gib", "offload")}
    config = Config(model="hunyuan", checkpointing=True, **settings)
    model, trained = HunyuanVideo(full_size.module, config), 4_300_800 * config.lora_rank
    machine = Machine(offload=row["offload"])
    lines = w2svd.memory_plan(config, model, machine, trained, trained)
    found = gib_at_work(lines, model, machine)
    assert row["allocated_gib"] < found < 1.05 * row["allocated_gib"]  # rather too much


LOOPS = {
    "rollout": {"generator_input": "rollout"},
    "final": {"generator_input": "rollout", "fake_samples": "final", "reuse": 3},
    "judged": {"gan_weight": 0.1},
    "guided": {"guidance": 2.0},
}


@pytest.mark.parametrize("kind", LOOPS)
def test_the_forwards_of_the_plan_are_those_that_run(monkeypatch, new_backbone, kind):
    """A discriminator's look counts as a third; of a rollout's four exits each comes as often."""
    exits = itertools.cycle(range(4))
    monkeypatch.setattr(torch, "randint", lambda *_, **how: torch.tensor([next(exits)]))
    config = Config(fake_updates=4, iterations=4, **LOOPS[kind])
    backbone, runs = new_backbone(POINT), {False: 0, True: 0}

    def counted(name, worth):
        function = getattr(backbone, name)

        def call(*args):
            out = function(*args)
            runs[out.requires_grad] += worth
            return out

        setattr(backbone, name, call)

    counted("velocity", 1)
    counted("features", 1 / 3)
    roles = Roles(backbone, 2, 0.25, 1.0)
    if config.gan_weight:
        w2svd.Discriminator(roles)
    data = itertools.repeat({"x0": torch.zeros(1, *POINT), "cond": torch.tensor([0])})
    list(w2svd.distil(config, roles, w2svd.State(config, roles, "cpu"), data))
    found = runs[False] / 4, runs[True] / 4
    assert found == pytest.approx(w2svd.evaluations(config))


def test_the_plan_s_disk_is_what_a_run_s_tensors_take(trained):
    """Two checkpoints and one that is being written, the generators of 2 and 4 and the last."""
    held = {p.name: sum(x.nbytes for x in tensors(p).values()) for p in trained[0].glob("*.safe*")}
    kept = [held[f"{kind}-000004.safetensors"] for kind in ("checkpoint", "generator")]
    numbers = json.loads((trained[0] / "config.json").read_text())["plan"]
    assert numbers["GiB of disk"] * 2**30 == pytest.approx(3 * sum(kept), rel=0.02)


def test_what_does_not_fit_ends_with_1_and_the_cure(capsys, fixed):
    flags = ["train", *fixed, "--dry-run", "--gpu-memory"]
    run(*flags, 1, code=1)
    sentence = said(capsys)
    assert "--fp8-base" in sentence and "--frames" in sentence
    run(*flags, 2)
    assert "GiB in all" in capsys.readouterr().out and not list(Path().iterdir())


@EACH
def test_a_clip_s_file_is_the_vae_s_scaled_mode_and_its_trimmed_text(fixed, form, template, tiny):
    """Also those of its first frame, which image-to-video's text encoder saw."""
    run("encode", *fixed[: 6 + len(SIZE)])
    clip = tensors(next((fixed[3] / ".w2svd").glob("a-*")))
    pipe = DiffusionPipeline.from_pretrained(tiny)  # of the form
    how = {"prompt": "a dog", "prompt_template": template}
    config = Config(height=32, width=48, frames=9, fps=12.0)
    video = w2svd.read_clip(fixed[3] / "a.mp4", config)
    if form:
        pixels = ((video[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        how["image"] = Image.fromarray(pixels)
        how["image_embed_interleave"] = 4 if form == "token_replace" else 2
    with torch.no_grad():
        for name, frames in {"latents": video, "image": video[:, :, :1]}.items():
            mode = pipe.vae.encode(frames).latent_dist.mode()[0]
            torch.testing.assert_close(clip.get(name, mode * 0.476986), mode * 0.476986)
        embeds, pooled, mask = pipe.encode_prompt(**how)
    assert clip["latents"].shape == (4, 3, 4, 6) and ("image" in clip) == bool(form)
    assert torch.equal(clip["prompt_embeds"], embeds[0, mask[0].bool()])
    assert torch.equal(clip["pooled"], pooled[0])


def test_films_are_the_student_s_at_0_and_saves_and_the_backbone_s_beside_the_first(
    trained, tiny, drawn
):
    folder, films = trained
    assert names(folder, "*.mp4") == sorted(f"samples/{name}" for name in films)
    assert sorted(name[:6] for name in films) == 4 * ["000000"] + 2 * ["000002"] + 2 * ["000004"]
    last = {name[9:]: name for name in films if name[:6] == "000004"}
    assert last.keys() == {"a-dog.mp4", "a-red-dog-cat-blue.mp4"}
    last = last["a-dog.mp4"]
    assert iio.imread(folder / "samples" / last).shape == (9, 32, 48, 3)
    run("sample", "--run", folder, "--prompt", "a dog", "--out", "dog.mp4")
    torch.testing.assert_close(drawn["dog.mp4"], films[last])  # the average's, as of sample
    roles = new_roles(tiny, embedded_guidance=3.0)  # whose generator is the run's at its start
    cond = roles.backbone.encode_text(w2svd.load_pipeline(tiny, w2svd.ENCODERS), "a dog")
    start, rng = last.replace("000004", "000000"), torch.Generator().manual_seed(0)
    noise, grid = torch.randn(1, 4, 3, 4, 6, generator=rng), few_step_sigmas(4, 4.0)
    student = w2svd.few_step_sample(roles.generator, noise, grid, cond, rng)
    torch.testing.assert_close(films[start], student)
    plain = w2svd.euler_sample(roles.plain, noise, grid, cond)
    torch.testing.assert_close(films[start.replace(".mp4", "-backbone.mp4")], plain)


def test_a_run_of_full_copies_goes_on_elsewhere_and_is_sampled_and_not_exported(
    fixed, monkeypatch, tmp_path, capsys, drawn
):
    """Data and checkpoint are given once."""
    run("train", *fixed, *FULL.split(), "--iterations", 2, "--out", "r")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir("away")
    run("train", "--resume", "--out", tmp_path / "r", "--iterations", 3)
    run("sample", "--run", tmp_path / "r", "--prompt", "a dog", "--out", "dog.mp4")
    (last,) = [name for name in drawn if name[:6] == "000003" and "a-dog" in name]
    torch.testing.assert_close(drawn["dog.mp4"], drawn[last])
    assert "full" in refused(capsys, ".", "export", "--run", tmp_path / "r", "--out", "lora")


@EACH
def test_sample_draws_what_the_exported_card_s_code_draws_in_diffusers(
    trained, form, template, monkeypatch, drawn, capsys
):
    frames = watch(monkeypatch, HunyuanVideo, "decode")
    bands = Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256))
    Image.merge("RGB", bands).resize((96, 32)).save(
        "a.png"
    )  # wide: cropped, not stretched, by both
    given = {"picture": "a.png" if form else None, "prompt_template": template}
    latents, shown = sample_and_card(run, trained[0], monkeypatch, **given)
    lost = form == "latent_concat"  # of which the stock pipeline hands out no first latent frame
    assert (latents - drawn["dog.mp4"][0][:, int(lost) :]).abs().max() < 2e-5
    assert len(shown) == 9 - 4 * lost
    assert (torch.as_tensor(frames[0].result) - shown).abs().max() < 2e-5 < shown.std()
    film = iio.imread("dog.mp4") / 255.0
    assert abs(film - shown.numpy()).mean() < 0.05  # x264 loses some
    assert iio.immeta("dog.mp4", plugin="FFMPEG")["fps"] == 12
    with safe_open("lora/pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["transformer.r"] == about["transformer.lora_alpha"] == 2
    assert "in use" in refused(capsys, ".", "export", "--run", trained[0], "--out", "lora")


def test_a_file_of_prompts_is_filmed_line_by_line_with_one_loading(trained, drawn, monkeypatch):
    Path("prompts.txt").write_text("a dog\n\nthe woman talks\n")
    loads = watch(monkeypatch, w2svd, "load_pipeline")
    run("sample", "--run", trained[0], "--prompt", "prompts.txt", "--out", "films")
    assert names("films") == ["000-a-dog.mp4", "001-the-woman-talks.mp4"] and len(loads) == 3
    run("sample", "--run", trained[0], "--prompt", "the woman talks", "--out", "one.mp4")
    assert torch.equal(drawn["one.mp4"], drawn["001-the-woman-talks.mp4"])


def test_seed_iteration_steps_and_size_change_the_sample(trained, drawn):
    def sample(*flags):
        run("sample", "--run", trained[0], "--prompt", "a dog", "--out", "a.mp4", *flags)
        return drawn["a.mp4"]

    one = sample("--at", 4)
    for flags in (["--seed", 1], ["--at", 2], ["--steps", 3]):
        assert (one - sample(*flags)).abs().max() > 1e-3
    assert sample(*"--height 48 --width 32 --frames 5".split()).shape == (1, 4, 2, 6, 4)
    assert iio.imread("a.mp4").shape == (5, 48, 32, 3)


@pytest.mark.parametrize(
    "change", [{"_class_name": "Wan"}, {"patch_size_t": 2}, {"in_channels": 9}]
)
def test_a_checkpoint_that_is_not_hunyuanvideo_is_refused(fixed, tiny, capsys, change):
    other = changed(tiny, "transformer/config.json", change)
    assert "no HunyuanVideo" in refused(capsys, ".", "train", *fixed, "--checkpoint", other)


@IMAGE
def test_a_picture_is_turned_as_it_says_and_cropped_and_not_stretched(tiny):
    task = VideoTask(w2svd.resolve({"model": "hunyuan", "checkpoint": str(tiny)}), HunyuanVideo)
    photo, turned = Image.new("RGB", (480, 1664)), Image.Exif()
    photo.paste("white", (0, 712, 240, 952))  # at the middle of the left edge, the upper if turned
    turned[0x0112] = 6
    photo.save("photo.png", exif=turned)
    frame = task.first_frame("photo.png")
    white = frame[0, 0, 0] > 0
    assert frame.shape == (1, 3, 1, 480, 832) and white.any(0).sum() == 240
    assert white[:240, 296:536].all() and not white[240:].any()


@pytest.mark.parametrize(
    "mode, ink, expected",
    [
        ("RGBA", (0, 255, 0, 0), (0, 0, 0)),
        ("I;16", 40 * 257, (40, 40, 40)),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
    ],
)
def test_a_picture_is_read_as_a_viewer_shows_it(mode, ink, expected):
    """Black where it is transparent; 16 bits as 8; four inks as light."""
    assert w2svd.shown_picture(Image.new(mode, (4, 4), ink)).getpixel((0, 0)) == expected


@IMAGE
def test_what_has_no_first_frame_is_refused(fixed, trained, capsys):
    Path("captions.txt").write_text("a dog")
    Path("no.png").write_text("no picture")
    train = ["train", *fixed, "--data", "captions.txt", "--out", "r"]
    assert "first frame" in refused(capsys, ".", *train)
    sample = ["sample", "--run", trained[0], "--prompt", "a dog", "--out", "a.mp4"]
    assert "--image" in refused(capsys, ".", *sample)
    for name in ("no.png", "gone.png"):
        assert f"--image {name}" in refused(capsys, ".", *sample, "--image", name)


@pytest.mark.slow
def test_the_benchmark_of_the_full_model_runs_on_a_tiny_one(tiny):
    script = Path(__file__).with_name("benchmark_hunyuan.py")
    flags = ["--checkpoint", tiny, "--size", "32x32x5", "--option", "offload"]
    subprocess.run([sys.executable, script, *flags], check=True)
    row = json.loads(Path("benchmark.jsonl").read_text())
    assert row["option"] == "offload" and row["iteration_s"] > 0
