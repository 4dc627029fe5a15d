"""Image-to-video, HunyuanVideo's two forms: clips to latents, training, sampling, export.

Against: diffusers' own image-to-video pipeline from a picture and a prompt, on a tiny checkpoint of
each form. Run with `python -m pytest tests/test_first_image.py`; about a minute.
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from diffusers import HunyuanVideoImageToVideoPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from helpers import lines, refused, run, same_bits
from PIL import Image

import w2svd
from toy.tiny_hunyuan import I2V_TEMPLATE, SIZE, film, save_tiny
from w2svd import Config, HunyuanTask, HunyuanVideo, few_step_sigmas

SMALL = "--lora-rank 2 --fake-updates 1 --log-every 2 --save-every 2 --iterations 2".split()
ODD = "--generator-lr .02 --fake-lr .02 --ema .5 --shift 4 --embedded-guidance 3".split()
FORMS = ("token_replace", "latent_concat")


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(form, tmp_path_factory):
    folder = tmp_path_factory.mktemp(form) / "tiny"
    save_tiny(folder, form=form)
    return folder


@pytest.fixture(scope="module")
def template():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunyuanVideo, "prompt_template", I2V_TEMPLATE)
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, caption in (("a", "a dog"), ("b", "a red square")):
        film(folder / f"{name}.mp4", fps=30 if name == "a" else 60, frames=60)
        (folder / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def train(tiny, clips, template, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def make(out, *flags):
        fixed = ["--model", "hunyuan", "--data", clips, "--checkpoint", tiny, "--cache", cache]
        run("train", *fixed, *SIZE, *SMALL, *ODD, "--out", out, *flags)
        return cache

    return make


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)


def picture(path="face.png", size=(48, 32), colour=(200, 30, 30)):
    """A picture with an edge, at the video's size."""
    image = Image.new("RGB", size, colour)
    image.paste((20, 90, 200), (size[0] // 2, 0, size[0], size[1] // 2))
    image.save(path)
    return image


def stock(tiny, monkeypatch, seed, image, prompt, **how):
    """Latents of the stock pipeline, whose scheduler's renoising draws from the same stream."""
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as source

    rng = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(
        source,
        "randn_tensor",
        lambda shape, generator, **rest: randn_tensor(shape, generator=rng, **rest),
    )
    pipe = HunyuanVideoImageToVideoPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    for step, (folder, name) in enumerate(how.pop("loras", [])):
        pipe.load_lora_weights(folder, weight_name=name, adapter_name=f"lora{step}")
    pipe.scheduler = Scheduler(shift=4.0, stochastic_sampling=True)
    size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
    how = {"guidance_scale": 3.0, "prompt_template": I2V_TEMPLATE, "generator": rng} | size | how
    return pipe(image, prompt, output_type=how.pop("output_type", "latent"), **how).frames


def test_a_clip_has_its_first_frame_s_latents_and_a_text_that_saw_it(
    train, tiny, form, clips, capsys
):
    fixed = ["--data", clips, "--checkpoint", tiny, "--cache", "here", *SIZE]
    run("encode", "--model", "hunyuan", *fixed)
    assert "2 clips, 2 encoded now" in capsys.readouterr().out
    run("train", "--model", "hunyuan", *fixed, *SMALL, "--out", "first")
    assert "2 clips, 0 encoded now" in capsys.readouterr().out
    cache = train("r")
    found = {}
    for file in cache.glob("*.safetensors"):
        tensors, info = w2svd.read_safetensors(file)
        found[info["source"]] = tensors
    assert found.keys() == {"a.mp4", "b.mp4"}
    clip = found["a.mp4"]
    assert clip["latents"].shape == (4, 3, 4, 6) and clip["image"].shape == (4, 1, 4, 6)
    pipe = HunyuanVideoImageToVideoPipeline.from_pretrained(tiny)
    config = Config(height=32, width=48, frames=9, fps=12.0)
    frame = w2svd.read_clip(clips / "a.mp4", config)[:, :, :1]
    with torch.no_grad():
        mode = pipe.vae.encode(frame).latent_dist.mode()[0]
        pixels = ((frame[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        every = 4 if form == "token_replace" else 2
        embeds, pooled, mask = pipe.encode_prompt(
            image=Image.fromarray(pixels),
            prompt="a dog",
            prompt_template=I2V_TEMPLATE,
            image_embed_interleave=every,
        )
    torch.testing.assert_close(clip["image"], mode * 0.476986)
    assert torch.equal(clip["prompt_embeds"], embeds[0, mask[0].bool()])
    assert len(clip["prompt_embeds"]) >= 16 // every + 2 and torch.equal(clip["pooled"], pooled[0])
    assert all(row["relative_gap"] > 0 for row in lines("r"))


def test_the_sample_of_token_replace_is_what_lies_behind_the_first_frame(tiny, form):
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), height=32, width=48, frames=9))
    task.load_weights()
    frames = 2 if form == "token_replace" else 3
    assert task.shape == (4, frames, 4, 6)
    rng = torch.Generator().manual_seed(0)
    x_t, image = (
        torch.randn(1, *task.shape, generator=rng),
        torch.randn(1, 4, 1, 4, 6, generator=rng),
    )
    cond = {"prompt_embeds": torch.randn(1, 5, 16), "pooled": torch.randn(1, 8), "image": image}
    seen = {}
    task.backbone.module.register_forward_pre_hook(
        lambda m, args, how: seen.update(how), with_kwargs=True
    )
    with torch.no_grad():
        v = task.backbone.velocity(x_t, torch.tensor([0.7]), cond)
    assert v.shape == x_t.shape
    x = seen["hidden_states"]
    if form == "token_replace":
        assert torch.equal(x, torch.cat([image, x_t], dim=2))
    else:
        assert torch.equal(x[:, :4], x_t) and torch.equal(x[:, 4:8, :1], image)
        assert not x[:, 4:8, 1:].any() and not x[:, 8, 1:].any() and (x[:, 8, 0] == 1).all()


def test_sample_is_the_stock_pipeline_from_a_picture_and_a_prompt(tiny, form, trained, monkeypatch):
    drawn, few_step_sample = [], w2svd.few_step_sample
    monkeypatch.setattr(
        w2svd, "few_step_sample", lambda *args: drawn.append(few_step_sample(*args)) or drawn[-1]
    )
    image, sampled = picture(), ["sample", "--run", trained, "--seed", 5, "--out", "dog.mp4"]
    run(*sampled, "--prompt", "a dog", "--image", "face.png")
    lora = [(trained, "generator.safetensors")]
    theirs = stock(tiny, monkeypatch, 5, image, "a dog", loras=lora)
    # the stock pipeline's latents lack the first frame in the concatenating form
    ours = drawn[0] if form == "token_replace" else drawn[0][:, :, 1:]
    theirs = theirs[:, :, 1:] if form == "token_replace" else theirs
    assert (theirs - ours).abs().max() < 2e-5
    assert iio.imread("dog.mp4").shape == (9 if form == "token_replace" else 9 - 4, 32, 48, 3)
    picture("other.png", colour=(10, 200, 10))
    run(*sampled, "--prompt", "a dog", "--image", "other.png")
    run(*sampled, "--prompt", "a woman", "--image", "face.png")
    assert all((drawn[0] - other).abs().max() > 1e-6 for other in drawn[1:])


def test_a_picture_of_another_shape_is_cropped_and_not_stretched(tiny, form):
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), height=32, width=48, frames=9))
    image = Image.new("RGB", (480, 160))
    image.paste((255, 255, 255), (200, 40, 280, 120))  # a square in the middle
    image.save("wide.png")
    frame = task.first_frame("wide.png")
    assert frame.shape == (1, 3, 1, 32, 48)
    white = frame[0, 0, 0] > 0
    assert white.any(0).sum() == pytest.approx(16, abs=1)  # wide, and as high
    assert white.any(1).sum() == pytest.approx(16, abs=1)


def test_the_run_resumes_to_the_same_bits_and_its_card_s_code_runs(
    train, tiny, trained, form, monkeypatch
):
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), height=32, width=48, frames=9))
    train("whole", "--iterations", 4)
    train("parts", "--iterations", 2)
    run("train", "--resume", "--out", "parts", "--iterations", 4)
    assert same_bits(
        Path("whole/checkpoint-000004.safetensors"), Path("parts/checkpoint-000004.safetensors")
    )
    films = sorted(path.name for path in Path("parts/samples").iterdir())
    assert len(films) == 2 * (1 + 1 + 2) and "000000-0-a-dog-backbone.mp4" in films
    run("export", "--run", trained, "--format", "diffusers", "--out", "lora")
    card = Path("lora/README.md").read_text()
    code = "\n".join(x.strip() for x in card.splitlines() if x.startswith("    "))
    code = "\n".join(x for x in code.splitlines() if "export_to_video(" not in x)
    code = code.replace("this folder", "lora").replace('.to("cuda")', "")
    code = code.replace("torch.bfloat16", "torch.float32")
    code = code.replace('"a woman talks"', '"a dog", output_type="latent", **how')
    picture("a.png", size=(96, 32))  # twice as wide: cropped, as `sample` does
    shown, resize = [], VaeImageProcessor.resize
    monkeypatch.setattr(
        VaeImageProcessor,
        "resize",
        lambda *args, **how: shown.append(resize(*args, **how)) or shown[-1],
    )
    names = {"how": {"prompt_template": I2V_TEMPLATE}}
    exec(code, names)
    assert torch.isfinite(names["video"]).all() and shown[0].size == (48, 32)
    pixels = torch.from_numpy(np.array(shown[0])) / 127.5 - 1
    assert torch.allclose(task.first_frame("a.png")[0, :, 0], pixels.permute(2, 0, 1))
    assert names["pipe"].scheduler.sigmas.tolist() == few_step_sigmas(4, 4.0).tolist()


def test_every_role_and_the_discriminator_learn_under_a_form(train):
    for name, flags in (
        ("full", "--generator full --fake full"),
        ("judged", "--gan-weight 5 --gan-r1 1 --checkpointing"),
        ("plain", "--checkpointing"),
        ("quick", ""),
    ):
        train(name, "--seed", 3, *flags.split())
    found = {n: w2svd.read_generator(n)[0] for n in ("judged", "plain", "quick")}
    for name, x in found["quick"].items():  # checkpointing changes nothing but the last digits
        torch.testing.assert_close(x, found["plain"][name], rtol=1e-3, atol=1e-4)
    assert any((x - found["judged"][n]).abs().max() > 1e-3 for n, x in found["plain"].items())
    rows = lines("judged")
    assert rows[-1]["discriminator_loss"] > 0 and "gen_motion" in rows[-1]


def test_the_discriminator_does_not_see_the_given_frame(tiny, form):
    task = HunyuanTask(Config(model="hunyuan", checkpoint=str(tiny), height=32, width=48, frames=9))
    task.load_weights()
    x_t = torch.randn(1, *task.shape)
    text = {"prompt_embeds": torch.randn(1, 5, 16), "pooled": torch.randn(1, 8)}
    with torch.no_grad():
        tokens = task.backbone.features(
            x_t, torch.tensor([0.7]), text | {"image": torch.randn(1, 4, 1, 4, 6)}
        )
    assert tokens.shape == (1, x_t[0, 0].numel(), 20)


def test_what_has_no_first_frame_is_refused(tiny, clips, trained, capsys):
    Path("captions.txt").write_text("a dog")
    fixed = ["train", "--model", "hunyuan", "--checkpoint", tiny, "--out", "r", *SIZE]
    rollout = ["--generator-input", "rollout"]
    assert "first frames" in refused(capsys, ".", *fixed, "--data", "captions.txt", *rollout)
    prompts = ["--data", clips, "--sample-prompts", "captions.txt"]
    assert "first frame" in refused(capsys, ".", *fixed, *prompts)
    sample = ["sample", "--run", trained, "--prompt", "a dog", "--out", "a.mp4"]
    assert "--image" in refused(capsys, ".", *sample)
    Path("no.png").write_text("no picture")
    for name in ("no.png", "gone.png"):
        assert f"--image {name}" in refused(capsys, ".", *sample, "--image", name)
