"""The small HunyuanVideo: what it shows, by the commands of the large one; and that it learns.

Against: clips drawn by formula, which a formula reads back; the same run with a part sabotaged,
which must not learn. Run: `python -m pytest tests/test_small_hunyuan.py`, 10 seconds; with `-m
slow` instead 3 minutes.
"""

from pathlib import Path

import pytest
import torch

import w2svd
from toy import shapes, small_hunyuan, small_table
from w2svd import HunyuanVideo, few_step_sample, few_step_sigmas

LEARN = "--batch 16 --iterations 30 --save-every 30 --generator-lr 1e-3 --fake-lr 2e-3"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The pipeline and a folder of clips."""
    folder = tmp_path_factory.mktemp("place")
    small_hunyuan.build(folder / "small")
    shapes.write_clips(folder / "clips", 64)
    return folder


def test_the_formula_reads_what_was_drawn_also_of_a_written_film(place):
    videos, captions = shapes.draw_clips(32, torch.Generator().manual_seed(9))
    drawn = (videos.permute(0, 2, 3, 4, 1) + 1) / 2
    assert all(shapes.right(film, text)["all"] for film, text in zip(drawn, captions))
    other = [shapes.right(film, text)["all"] for film, text in zip(drawn, captions[1:])]
    assert sum(other) <= 2  # two captions in a row may be the same
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(place / "small")})
    for path in sorted((place / "clips").glob("*.mp4"))[:8]:
        frames = (w2svd.read_clip(path, config)[0].permute(1, 2, 3, 0) + 1) / 2
        assert shapes.right(frames, path.with_suffix(".txt").read_text())["all"]


def test_its_folder_tells_train_its_sizes_rates_and_template(place):
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(place / "small")})
    assert (config.height, config.width, config.frames, config.batch) == (48, 64, 9, 16)
    assert HunyuanVideo.outline(config).prompt_template == small_hunyuan.TEMPLATE
    weights = Path(small_hunyuan.WEIGHTS).glob("*.safetensors")
    assert sum(path.stat().st_size for path in weights) < 12e6


def test_image_to_video_goes_on_from_the_frame_that_is_given(tmp_path):
    small_hunyuan.build(tmp_path / "small", first_frame=True)
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(tmp_path / "small")})
    model = HunyuanVideo.outline(config).load()
    pipe, right = w2svd.load_pipeline(config.checkpoint, w2svd.ENCODERS), 0
    for clip, caption in zip(*shapes.draw_clips(6, torch.Generator().manual_seed(11))):
        cond = model.encode_text(pipe, caption, clip[None, :, :1])
        sigmas = few_step_sigmas(4, config.shift)
        frames = model.decode(pipe, model.draw(w2svd.euler_sample, model.velocity, sigmas, cond, 0))
        given = (clip[:, 0].permute(1, 2, 0) + 1) / 2
        assert (torch.as_tensor(frames[0]) - given).abs().mean() < 0.01
        right += shapes.right(frames, caption)["all"]
    assert right >= 5


class WrongTime(HunyuanVideo):
    """Its timesteps are sigma, and not 1000 sigma."""

    def velocity(self, x_t, sigma, cond):
        return super().velocity(x_t, sigma / 1000, cond)


class WrongText(HunyuanVideo):
    """Every clip has the text of one."""

    def encode_text(self, pipe, caption, first=None):
        return super().encode_text(pipe, "a red disc moves left fast", first)


@pytest.mark.slow
def test_it_learns_in_30_iterations_and_a_sabotaged_path_does_not(place):
    """By the Frechet distance of a few steps' latents from those of unseen clips."""
    config = w2svd.resolve({"model": "hunyuan", "checkpoint": str(place / "small")})
    task = w2svd.VideoTask(config, HunyuanVideo)
    task.backbone = task.backbone.load()
    judge, sigmas = small_table.Judge(place / "small", task), few_step_sigmas(4, config.shift)

    def distance(velocity):
        return judge.measure(velocity, few_step_sample, sigmas, decode=False)["frechet"]

    def after(Model):
        flags = ["--checkpoint", place / "small", "--data", place / "clips", *LEARN.split()]
        flags = ["train", "--model", "hunyuan", *flags, "--cache", Model.__name__]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(w2svd.VideoTask, "on_log", lambda *_: None)
            out = f"run-{Model.__name__}"
            assert w2svd.main([str(f) for f in [*flags, "--out", out]], {"hunyuan": Model}) == 0
        fresh = w2svd.VideoTask(config, HunyuanVideo)
        fresh.backbone = fresh.backbone.load()
        return distance(fresh.student(*w2svd.read_generator(out)))

    before, learnt = distance(task.backbone.velocity), after(HunyuanVideo)
    wrong = {Model.__name__: after(Model) for Model in (WrongTime, WrongText)}
    assert learnt < 0.7 * before, (before, learnt)
    assert all(x > 1.2 * learnt for x in wrong.values()), (learnt, wrong)
