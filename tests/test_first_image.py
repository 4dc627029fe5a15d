"""Image-to-video, HunyuanVideo's two forms: clips to latents, training, sampling, export.

Against: diffusers' own image-to-video pipeline from a picture and a prompt, on a tiny checkpoint of
each form. Run with `python -m pytest tests/test_first_image.py`; 15 seconds.
"""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from helpers import names, refused, run, tensors, watch
from PIL import Image
from video_runs import SMALL, run_card, watch_films

import w2svd
from toy.tiny_hunyuan import I2V_TEMPLATE, SIZE, clips, save_tiny
from w2svd import Config, HunyuanVideo, VideoTask, few_step_sigmas


@pytest.fixture
def drawn(monkeypatch):
    return watch_films(monkeypatch)


@pytest.fixture(scope="module", params=["token_replace", "latent_concat"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def fixed(form, tmp_path_factory):
    """Flags of train, with two clips and a checkpoint of the form."""
    folder = tmp_path_factory.mktemp(form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunyuanVideo, "prompt_template", I2V_TEMPLATE)
        save_tiny(folder / "tiny", form=form)
        data = clips(folder / "clips", a="a dog", b="a red square")
        flags = ["--model", "hunyuan", "--data", data, "--checkpoint", folder / "tiny", *SIZE]
        yield [*flags, *SMALL, "--iterations", 2]


@pytest.fixture(scope="module")
def trained(fixed, tmp_path_factory):
    """A run and its films."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        films = watch_films(patch)
        run("train", *fixed, "--out", folder)
    return folder, films


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, fixed):
    monkeypatch.chdir(tmp_path)


def picture(path, size, colour=(200, 30, 30)):
    """A picture with a square in its middle."""
    image = Image.new("RGB", size, colour)
    x, y, half = size[0] // 2, size[1] // 2, size[1] // 4
    image.paste((255, 255, 255), (x - half, y - half, x + half, y + half))
    image.save(path)


def test_a_clip_has_its_first_frame_s_latents_and_a_text_that_saw_it(fixed, form, trained):
    data, checkpoint = fixed[3], fixed[5]
    clip = tensors(next(Path(data, ".w2svd").glob("a-*")))
    assert clip["latents"].shape == (4, 3, 4, 6) and clip["image"].shape == (4, 1, 4, 6)
    pipe = HunyuanVideoImageToVideoPipeline.from_pretrained(checkpoint)
    config = Config(height=32, width=48, frames=9, fps=12.0)
    frame = w2svd.read_clip(data / "a.mp4", config)[:, :, :1]
    pixels = ((frame[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with torch.no_grad():
        mode = pipe.vae.encode(frame).latent_dist.mode()[0]
        embeds, pooled, mask = pipe.encode_prompt(
            image=Image.fromarray(pixels),
            prompt="a dog",
            prompt_template=I2V_TEMPLATE,
            image_embed_interleave=4 if form == "token_replace" else 2,
        )
    torch.testing.assert_close(clip["image"], mode * 0.476986)
    assert torch.equal(clip["prompt_embeds"], embeds[0, mask[0].bool()])
    assert torch.equal(clip["pooled"], pooled[0])


def test_sample_draws_what_the_exported_card_s_code_draws_from_picture_and_prompt(
    trained, form, monkeypatch, drawn
):
    picture("a.png", (96, 32))  # wide: cropped by both
    picture("b.png", (48, 32), (10, 200, 10))
    frames = watch(monkeypatch, HunyuanVideo, "decode")
    for name, prompt in (("a", "a dog"), ("b", "a dog"), ("a", "a woman")):
        flags = ["--image", f"{name}.png", "--prompt", prompt, "--out", f"{name}-{prompt[2:]}.mp4"]
        run("sample", "--run", trained[0], *flags)
    run("export", "--run", trained[0], "--out", "lora")
    pipe, latents, shown = run_card("lora", monkeypatch, I2V_TEMPLATE)
    assert pipe.scheduler.sigmas.tolist() == few_step_sigmas(4, 4.0).tolist()
    one = drawn["a-dog.mp4"][0]
    if form == "latent_concat":  # the stock pipeline hands out no first latent frame
        one = one[:, 1:]
    assert (latents - one).abs().max() < 2e-5
    assert len(shown) == (9 if form == "token_replace" else 9 - 4)
    assert (torch.as_tensor(frames[0]) - shown).abs().max() < 2e-5
    for other in ("b-dog.mp4", "a-woman.mp4"):
        assert (drawn["a-dog.mp4"] - drawn[other]).abs().max() > 1e-6


def test_a_picture_of_another_shape_is_cropped_and_not_stretched(fixed):
    task = VideoTask(w2svd.resolve({"model": "hunyuan", "checkpoint": str(fixed[5])}), HunyuanVideo)
    picture("wide.png", (1664, 480), (0, 0, 0))
    frame = task.first_frame("wide.png")
    assert frame.shape == (1, 3, 1, 480, 832)
    white = frame[0, 0, 0] > 0
    assert white.any(0).sum() == white.any(1).sum() == 240


def test_a_film_goes_on_from_its_clip_s_first_frame(fixed, trained, form):
    """Films at 0 and at the save; in token_replace the latents begin with the frame itself."""
    folder, films = trained
    assert names(folder, "*.mp4") == sorted(f"samples/{name}" for name in films)
    assert sorted(name[:6] for name in films) == 4 * ["000000"] + 2 * ["000002"]
    image = tensors(next(Path(fixed[3], ".w2svd").glob("a-*")))["image"]
    for name, x0 in films.items():
        assert x0.shape == (1, 4, 3, 4, 6)
        if "a-dog" in name:
            assert torch.equal(x0[0, :, :1], image) == (form == "token_replace")


def test_what_has_no_first_frame_is_refused(fixed, trained, capsys):
    Path("captions.txt").write_text("a dog")
    Path("no.png").write_text("no picture")
    train = ["train", *fixed, "--data", "captions.txt", "--out", "r"]
    assert "first frame" in refused(capsys, ".", *train)
    sample = ["sample", "--run", trained[0], "--prompt", "a dog", "--out", "a.mp4"]
    assert "--image" in refused(capsys, ".", *sample)
    for name in ("no.png", "gone.png"):
        assert f"--image {name}" in refused(capsys, ".", *sample, "--image", name)
